"""The commands for pictures: image (A-STAR), story (IR-Diffusion), compose (PrimeComposer)."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attnproc.pipelines.cli_shared import Device, DType, Offload, Set, exit_codes, quiet_libraries

# The flags that all three have, once; None stands for "not given".
SHARED: dict[str, Any] = {
    "model": Annotated[
        str | None,
        typer.Option(
            help="shapes-image (ships with the package, needs no download), a local folder, or a Hugging Face id of a "
            "Stable Diffusion model. (default: shapes-image)"
        ),
    ],
    "set": Set,
    "steps": Annotated[
        int | None, typer.Option(help="Denoising steps. (default: the model's; shapes-image and compose 20)")
    ],
    "guidance": Annotated[
        float | None,
        typer.Option(
            help="Guidance scale, 1 is none. (default: the model's; shapes-image 4; compose 2, across domains 2.5)"
        ),
    ],
    "negative_prompt": Annotated[str | None, typer.Option(help="What it must not show. (default: none)")],
    "seed": Annotated[int | None, typer.Option(help="Of the first picture; the next ones count up. (default: 0)")],
    "height": Annotated[
        int | None,
        typer.Option(help="Pixels. (default: the model's; shapes-image 128; compose: the background's shape)"),
    ],
    "width": Annotated[
        int | None,
        typer.Option(help="Pixels. (default: the model's; shapes-image 128; compose: the background's shape)"),
    ],
    "dtype": DType,
    "device": Device,
    "offload": Offload,
    "output": Annotated[
        str | None,
        typer.Option(
            help="PNG file, numbered where there are several, or a new folder for picture-1.png and so on. "
            "(default: picture.png)"
        ),
    ],
    "compare": Annotated[
        bool | None,
        typer.Option(
            "--compare",
            help="Also write what the plain model makes of the same seed (compose: inpainting from the words alone) as "
            "NAME.plain.png, and both side by side as NAME.comparison.png. (default: off)",
        ),
    ],
    "report": Annotated[
        bool | None,
        typer.Option(
            "--report", help="Write NAME.json with settings, seed, versions, times and the method's log. (default: off)"
        ),
    ],
}


def _with_shared_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: the flags of SHARED that were given arrive in `flags`, and errors become exit codes."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]
    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, kind, default=None, annotation=hint) for name, hint in SHARED.items()]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with exit_codes():
            quiet_libraries()
            from attnproc.pipelines.settings import parse_assignments

            flags = {name: value for name in SHARED if (value := given.pop(name)) is not None}
            if "set" in flags:
                flags["set"] = parse_assignments(flags["set"])
            command(**given, flags=flags)

    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *shared]}
    return run


@_with_shared_flags
def image(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    concepts: Annotated[
        str,
        typer.Option(metavar="WORDS,WORDS,...", help="Words of the prompt that must all be drawn."),
    ],
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONCEPT=REGION",
            help="Where a concept belongs: x,y,w,h in pixels of the model or as fractions (0.5), or the file of a "
            "mask, white inside; may be repeated. (default: anywhere)",
        ),
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Pictures, in numbered files. (default: 1)")] = None,
    *,
    flags: dict[str, Any],
) -> None:
    """Draws every subject of the prompt: A-STAR.

    attnproc image "a red circle and a blue star on a black background" --concepts "red circle,blue star"

    Pictures of shapes-image have 128 pixels a side and are enlarged to 512 when written; boxes count the 128.
    """
    from attnproc.pipelines import images

    if num_images is not None:
        flags["num_images"] = num_images
    images.make_images(flags, prompt, concepts, layout or [], *_consoles())


@_with_shared_flags
def story(
    scenes: Annotated[Path, typer.Argument(help="YAML file with the subjects and the scenes; see above.")],
    *,
    flags: dict[str, Any],
) -> None:
    """Draws the same subjects in several pictures: IR-Diffusion.

    The file has the form below. A region is x, y, width and height, in pixels of the model or as fractions such as
    0.5, or the name of a mask's file, white inside. It says where a subject is and does not move it there: --compare
    shows where the plain model puts it. Names of files are relative to the folder of this one. Portraits on the
    background of the scenes work best.

    \b
    subjects:
      - prompt: a striped red and white star on a gray background   # the portrait
        word: star                       # found by the attention to this word
      - prompt: a plain green circle on a gray background
        region: [0.25, 0.25, 0.5, 0.5]   # where the circle is in its portrait
        image: circle.png                # a portrait that is given (optional)
      - prompt: a blue square on a gray background
        word: square
    scenes:
      - prompt: a striped red and white star and a plain green circle on a gray background
        regions:                         # one for each subject, in their order;
          - [0.05, 0.3, 0.4, 0.4]        # without the key, by the subjects' words
          - circle-mask.png
          - null                         # not in this scene

    Portraits that are generated are written too, as NAME-portrait-1.png and so on. The seed is for all pictures.
    Those of shapes-image have 128 pixels a side and are enlarged to 512 when written; boxes count the 128.
    """
    from attnproc.pipelines import images
    from attnproc.pipelines.picture_input import read_story

    images.make_story(flags, read_story(scenes), *_consoles())


@_with_shared_flags
def compose(
    prompt: Annotated[str, typer.Argument(help="What the finished picture shows, the object included.")],
    background: Annotated[Path, typer.Option(help="Picture that the object is put into.")],
    object_: Annotated[Path, typer.Option("--object", help="Picture of the object.")],
    mask: Annotated[Path, typer.Option(help="Where the object is in its picture, white inside.")],
    box: Annotated[
        str,
        typer.Option(
            metavar="X,Y,W,H",
            help="Where the object goes: pixels of the background's file, or fractions (0.5).",
        ),
    ],
    subject: Annotated[
        str | None,
        typer.Option(
            help="Words of the prompt that name the object; only its place sees them. (default: none, every place does)"
        ),
    ] = None,
    domain: Annotated[
        str, typer.Option(help="same: both pictures of one style; cross: the object takes on the background's.")
    ] = "same",
    *,
    flags: dict[str, Any],
) -> None:
    """Puts an object into a picture: PrimeComposer.

    attnproc compose --background b.png --object o.png --mask m.png --box 64,64,48,48 "a red star on a navy background"

    Pictures of shapes-image have 128 pixels a side and are enlarged to 512 when written.
    """
    from attnproc.pipelines import images

    files = {"background": background, "object": object_, "mask": mask}
    images.make_composition(flags, prompt, files, box, subject, domain, *_consoles())


COMMANDS = (image, story, compose)


def _consoles() -> tuple[Console, Console]:
    """For results, and for messages."""
    return Console(), Console(stderr=True)
