"""What the picture commands do: A-STAR, IR-Diffusion and PrimeComposer, each beside its plain counterpart.

In all of them `flags` are the fields of `PictureSettings` that were given, results are printed to `console`, and the
paths of the pictures are returned.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from rich.console import Console

from attnproc.control.prime_composer import PrimeComposerSettings, steps_of
from attnproc.errors import SettingsError
from attnproc.pipelines.inversion import ORDERS, resized
from attnproc.pipelines.picture_input import Story, parse_box, parse_layout, read_picture, read_region
from attnproc.pipelines.picture_job import (
    SHAPES_A_STAR,
    SHAPES_CALL,
    SHAPES_LAYOUT,
    Made,
    PictureJob,
    call,
    check_free,
    fill_size,
    load_pipelines,
    prepare,
    save,
    to_picture,
    write,
)
from attnproc.pipelines.prime_composer import DOMAINS
from attnproc.pipelines.settings import EMBEDDED_PICTURES, PictureSettings
from attnproc.pipelines.wrapping import ControlPipeline


def make_images(
    flags: Mapping[str, Any],
    prompt: str,
    concepts: str,
    layout: Sequence[str],
    console: Console,
    messages: Console,
) -> list[Path]:
    """`attnproc image`: pictures of one prompt with consecutive seeds, by A-STAR.

    Args:
        concepts: words of the prompt, with commas between them.
        layout: texts CONCEPT=x,y,w,h or CONCEPT=mask.png.
    """
    settings = PictureSettings(**flags)
    words = [concept.strip() for concept in concepts.split(",")]
    regions = parse_layout(layout, words)
    request = {"prompt": prompt, "concepts": words, "layout": list(layout)}
    job = prepare("image", settings, request, count=settings.num_images)
    pipe, controlled, load_seconds = load_pipelines(job, messages)
    fill_size(job, controlled)
    job = _tuned(job, controlled, placed=len(regions) == len(words))
    draw = functools.partial(controlled, prompt, concepts=words, layout_masks=regions or None, settings=job.options)
    for number, path in enumerate(job.outputs):
        seed = settings.seed + number
        made = call(job, f"A-STAR {path.name}", seed, pipe, draw)
        plain = None
        if settings.compare:
            plain = call(job, f"plain {path.name}", seed, pipe, functools.partial(pipe, prompt))
        report = {"seed": seed, "timings": _timings(load_seconds, made, plain), "log": made.output.log}
        other = None if plain is None else ("plain", plain.pictures[0])
        write(job, path, made.pictures[0], other, report, console)
    return job.outputs


def make_story(flags: Mapping[str, Any], story: Story, console: Console, messages: Console) -> list[Path]:
    """`attnproc story`: scenes with the same subjects, by IR-Diffusion, and the portraits that were generated.

    One seed is for all, so portraits and scenes are what the plain pipeline makes of the same prompts and noise, but
    for the method.
    """
    settings = PictureSettings(**flags)
    job = prepare("story", settings, story.data, count=len(story.scenes))
    path = Path(settings.output)
    base = f"{path.stem}-" if path.suffix else ""
    portrait_paths = [job.outputs[0].with_name(f"{base}portrait-{n + 1}.png") for n in range(len(story.subjects))]
    check_free(*portrait_paths)
    pipe, controlled, load_seconds = load_pipelines(job, messages)
    fill_size(job, controlled)
    draw = functools.partial(controlled.story, story.subjects, story.scenes, settings=job.options)
    made = call(job, "IR-Diffusion", settings.seed, pipe, draw)
    portraits = [to_picture(image, job) for image in made.output[0].references]
    plain = None
    if settings.compare:
        prompts = [one.prompt for one in (*story.subjects, *story.scenes)]
        plain = call(job, "plain", settings.seed, pipe, functools.partial(_plain_batch, pipe, prompts))
    for subject, portrait, path in zip(story.subjects, portraits, portrait_paths, strict=True):
        if subject.image is None:
            save(job, portrait, path)
            console.print(str(path), markup=False, soft_wrap=True)
    shown = {f"portrait {number}": portrait for number, portrait in enumerate(portraits, 1)}
    for number, path in enumerate(job.outputs):
        report = {
            "scene": number + 1,
            "seed": settings.seed,
            "timings": _timings(load_seconds, made, plain),
            "log": _places(made.output[number]),
        }
        other = None if plain is None else ("plain", plain.pictures[len(portraits) + number])
        write(job, path, made.pictures[number], other, report, console, beside=shown)
    return job.outputs


def make_composition(
    flags: Mapping[str, Any],
    prompt: str,
    files: Mapping[str, Path],
    box: str,
    subject: str | None,
    domain: str,
    console: Console,
    messages: Console,
) -> list[Path]:
    """`attnproc compose`: an object put into a picture by PrimeComposer; compared with pasting, and with inpainting.

    Args:
        prompt, subject, domain: as `PrimeComposerPipeline` takes them.
        files: of "background", "object" and "mask".
        box: the target as text, in pixels of the background's file or fractions.
    """
    settings = PictureSettings(**flags)
    if domain not in DOMAINS:
        raise SettingsError(f"domain={domain!r} is not known; choose one of {', '.join(DOMAINS)}.")
    target = parse_box(box, "--box")
    background, object_image = (read_picture(files[name], f"--{name}") for name in ("background", "object"))
    mask = read_region(str(files["mask"]), "--mask")
    request = {"prompt": prompt, **files, "box": box, "subject": subject, "domain": domain}
    preset, _ = DOMAINS[domain]
    options = functools.partial(PrimeComposerSettings.from_preset, preset)
    job = prepare("compose", settings, request, options=options)
    pipe, controlled, load_seconds = load_pipelines(job, messages)
    draw = functools.partial(
        controlled,
        prompt,
        background=background,
        object_image=object_image,
        object_mask=mask,
        target=target,
        subject=subject,
        domain=domain,
        settings=job.options,
    )
    (path,) = job.outputs
    made = call(job, f"PrimeComposer {path.name}", settings.seed, pipe, draw)
    plan = steps_of(job.options, len(made.step_seconds), ORDERS[job.options.solver])
    plain, other, shown = None, None, {}
    if settings.compare:
        inpainting = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
        draw_plain = functools.partial(_inpaint, inpainting, prompt, background, made)
        usual = SHAPES_CALL if job.source.name == EMBEDDED_PICTURES else {}
        plain_job = replace(job, arguments={**usual, **job.arguments})
        plain = call(plain_job, f"inpainting {path.name}", settings.seed, inpainting, draw_plain)
        other, shown = ("plain inpainting", plain.pictures[0]), {"pasted pixels": made.output.pastes[0]}
    report = {"seed": settings.seed, "timings": _timings(load_seconds, made, plain), "log": plan}
    write(job, path, made.pictures[0], other, report, console, beside=shown)
    return job.outputs


def _tuned(job: PictureJob, controlled: ControlPipeline, placed: bool) -> PictureJob:
    """On shapes-image the settings that suit it, but for those that were given; placed: every concept has a region."""
    if job.source.name != EMBEDDED_PICTURES:
        return job
    sides = controlled.size(job.arguments.get("height"), job.arguments.get("width"))
    # Its pictures are small: the maps at half the latents' sides, not at a quarter.
    rows, columns = (-(-side // controlled.vae_scale_factor // 2) for side in sides)
    tuned = {**(SHAPES_LAYOUT if placed else SHAPES_A_STAR), "attention_resolution": (rows, columns)}
    new = {name: value for name, value in tuned.items() if name not in job.settings.set}
    return replace(job, options=replace(job.options, **new))


def _plain_batch(pipe: Any, prompts: list[str], negative_prompt: str | None = None, **arguments: Any) -> Any:
    negative = None if negative_prompt is None else [negative_prompt] * len(prompts)
    return pipe(prompts, negative_prompt=negative, **arguments)


def _inpaint(pipe: Any, prompt: str, background: Image.Image, made: Made, **arguments: Any) -> Any:
    """The box of a composition drawn by diffusers' inpainting from the words alone, in as many steps."""
    size = made.pictures[0].size
    mask = Image.new("L", size)
    mask.paste(255, made.output.boxes[0])
    same = {"num_inference_steps": len(made.step_seconds), "height": size[1], "width": size[0]}
    return pipe(prompt, image=resized(background, *size), mask_image=mask, **{**arguments, **same})


def _places(scene: Any) -> dict[str, Any]:
    """Share of each grid of tokens that each subject took in the last step."""
    return {
        f"{rows}x{columns}": [float(mask.float().mean()) for mask in layout.targets]
        for (rows, columns), layout in scene.layouts.items()
    }


def _timings(load_seconds: float, made: Made, plain: Made | None = None) -> dict[str, Any]:
    """Seconds; those of a story's call are of all its scenes."""
    return {
        "load_seconds": load_seconds,
        "seconds": made.seconds,
        "step_seconds": made.step_seconds,
        "plain_seconds": None if plain is None else plain.seconds,
    }
