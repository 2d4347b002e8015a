"""A run of a picture command: checks that need no weights, timed calls of its pipelines, and the files it writes."""

import dataclasses
import difflib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console

from attnproc.control.a_star import AStarSettings
from attnproc.control.ir_diffusion import IRSettings
from attnproc.control.prime_composer import PrimeComposerSettings
from attnproc.errors import AttnProcError, AttnProcWarning, SettingsError
from attnproc.files import write_text
from attnproc.hardware import device_name
from attnproc.pipelines import pictures
from attnproc.pipelines.a_star import AStarPipeline
from attnproc.pipelines.generate import versions
from attnproc.pipelines.ir_diffusion import IRDiffusionPipeline
from attnproc.pipelines.loading import Source, find_picture_source, load, pick_device
from attnproc.pipelines.prime_composer import PrimeComposerPipeline
from attnproc.pipelines.settings import EMBEDDED_PICTURES, PictureSettings, typed_settings
from attnproc.pipelines.video_io import check_output
from attnproc.pipelines.wrapping import ControlPipeline


@dataclass(frozen=True)
class ControlMethod:
    """A control method of image models.

    Attributes:
        title: its published name.
        pipeline, settings: its classes.
        embedded: settings that suit shapes-image, where they differ from the defaults.
        embedded_call: likewise arguments of the call.
    """

    title: str
    pipeline: type[ControlPipeline]
    settings: Any
    embedded: Mapping[str, Any]
    embedded_call: Mapping[str, Any]


# What suits shapes-image; the benchmarks on it take it from here, too.
SHAPES_CALL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0}
SHAPES_A_STAR: dict[str, Any] = {"scale_factor": 50.0, "update_window": (0.0, 0.15)}
# Where every concept has a region, which keeps them apart by itself.
SHAPES_LAYOUT: dict[str, Any] = {**SHAPES_A_STAR, "lambda_seg": 0.0, "update_window": (0.0, 0.5)}

# By the command that runs them.
CONTROL_METHODS = {
    # Its settings for shapes-image follow from the call, see `images.make_images`.
    "image": ControlMethod("A-STAR", AStarPipeline, AStarSettings, {}, SHAPES_CALL),
    # A portrait's text in the first steps moves objects out of the places where the plain pipeline puts them.
    "story": ControlMethod(
        "IR-Diffusion", IRDiffusionPipeline, IRSettings, {"experimental": True, "text_steps": (0.2, 1.0)}, SHAPES_CALL
    ),
    # Its own 20 steps and low guidance suit shapes-image; so does the longest paste of the published settings.
    "compose": ControlMethod("PrimeComposer", PrimeComposerPipeline, PrimeComposerSettings, {"tau_c": 0.3}, {}),
}


@dataclass(frozen=True)
class PictureJob:
    """A run that has passed every check that needs no weights.

    Attributes:
        request: what was asked for besides `settings`, as plain data.
        options: settings of the method, an object of its settings class.
        arguments: of every call of the pipeline, method or plain.
    """

    method: ControlMethod
    settings: PictureSettings
    request: Mapping[str, Any]
    source: Source
    options: Any
    arguments: dict[str, Any]
    outputs: list[Path]
    device: Any
    dtype: Any


@dataclass(frozen=True)
class Made:
    """What one call made: pictures in the model's size, the call's output, and seconds of the call and its steps."""

    pictures: list[Image.Image]
    output: Any
    seconds: float
    step_seconds: list[float]


def prepare(
    command: str,
    settings: PictureSettings,
    request: Mapping[str, Any],
    *,
    count: int = 1,
    options: Callable[..., Any] | None = None,
) -> PictureJob:
    """Checks a run of `count` pictures as far as that is possible without weights.

    Args:
        options: makes the settings of the method; its settings class, unless a preset is meant.

    Raises:
        SettingsError: something that was asked for does not exist, does not fit, or cannot be written.
        UnsupportedError: the method does not work with this model.
    """
    method = CONTROL_METHODS[command]
    embedded = settings.model == EMBEDDED_PICTURES
    values = {**(method.embedded if embedded else {}), **_typed(method.settings, settings.set)}
    made = (options or method.settings)(**values)
    outputs = _outputs(settings.output, count)
    check_output(Path(settings.output).expanduser(), (".png",))
    for path in outputs:
        check_free(path, _plain_path(path), _comparison_path(path), _report_path(path))
    device, dtype = pick_device(settings)
    source = find_picture_source(settings.model, method.pipeline.accepted, method.title)
    asked = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
    }
    arguments = {
        **(method.embedded_call if embedded else {}),
        **{name: value for name, value in asked.items() if value is not None},
    }
    return PictureJob(method, settings, request, source, made, arguments, outputs, device, dtype)


def check_free(*files: Path) -> None:
    """Raises SettingsError if one of the files to be written is a folder."""
    for file in files:
        if file.is_dir():
            raise SettingsError(f"{file} is a folder; expected a file or nothing there. Choose another --output.")


def load_pipelines(job: PictureJob, messages: Console) -> tuple[Any, Any, float]:
    """The plain pipeline with its weights, the method's pipeline around it, and the seconds that took."""
    began = time.perf_counter()
    with messages.status(f"loading {job.source.name}"):
        pipe = load(job.source, job.device, job.dtype, job.settings.offload)
    return pipe, job.method.pipeline(pipe), time.perf_counter() - began


def fill_size(job: PictureJob, controlled: ControlPipeline) -> None:
    """Where one side alone was asked for, the other is the model's: a plain pipeline would take its own for both."""
    sides = job.arguments.get("height"), job.arguments.get("width")
    if sides != (None, None):
        job.arguments["height"], job.arguments["width"] = controlled.size(*sides)


def call(job: PictureJob, title: str, seed: int, pipe: Any, make: Callable[..., Any]) -> Made:
    """Calls `make`, which runs `pipe`, with the job's arguments, a generator, and diffusers' bar under this title.

    Raises:
        AttnProcError: a picture has values that are not finite.
    """
    ends: list[float] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)  # so that the time of a step is its own
        ends.append(time.perf_counter())
        return {}

    pipe.set_progress_bar_config(desc=title, leave=False, disable=None)  # None: a bar on terminals only
    began = time.perf_counter()
    output = make(
        **job.arguments,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=on_step_end,
        output_type="np",
    )
    seconds = time.perf_counter() - began
    flags = [getattr(one, "nsfw_content_detected", None) for one in (output if isinstance(output, list) else [output])]
    if any(flag is True or (isinstance(flag, list) and any(flag)) for flag in flags):
        message = f"{title}: the model's safety checker made a picture black. Try another --seed or prompt."
        warnings.warn(message, AttnProcWarning, stacklevel=2)
    images = [scene.image for scene in output] if isinstance(output, list) else output.images
    drawn = [to_picture(image, job) for image in images]
    return Made(drawn, output, seconds, [end - start for start, end in zip([began, *ends], ends, strict=False)])


def to_picture(image: np.ndarray, job: PictureJob) -> Image.Image:
    """The picture of an array (height, width, 3) of floats from 0.0 to 1.0.

    Raises:
        AttnProcError: it has values that are not finite.
    """
    if not np.isfinite(image).all():
        raise AttnProcError(
            f"the picture has values that are not finite; expected numbers from 0.0 to 1.0 (the dtype is {job.dtype}). "
            "Try --dtype float32."
        )
    return Image.fromarray((image.clip(0.0, 1.0) * 255).round().astype(np.uint8))


def write(
    job: PictureJob,
    path: Path,
    picture: Image.Image,
    plain: tuple[str, Image.Image] | None,
    report: Mapping[str, Any],
    console: Console,
    *,
    beside: Mapping[str, Image.Image] = MappingProxyType({}),
) -> None:
    """Writes a picture, and where asked the plain one, both side by side, and the report; each file whole.

    Args:
        picture: in the model's size.
        plain: what to compare with, and its name.
        report: what is known of this picture: seed, timings, log.
        beside: more pictures by name that the side-by-side one begins with.
    """
    written = []
    if plain is not None:
        written += [_plain_path(path), _comparison_path(path)]
        save(job, plain[1], written[0])
        shown = {**beside, job.method.title: picture, plain[0]: plain[1]}
        pictures.save(_side_by_side({name: _enlarged(job, one) for name, one in shown.items()}), written[1])
    save(job, picture, path)
    if job.settings.report:
        written.append(_report_path(path))
        data = plain_data(_report(job, path, picture, plain, report))
        write_text(written[-1], json.dumps(data, indent=2, allow_nan=False) + "\n")
    console.print(", ".join([str(path), *(file.name for file in written)]), markup=False, soft_wrap=True)


def save(job: PictureJob, picture: Image.Image, path: Path) -> None:
    """Writes one picture, enlarged if it is of the embedded model, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    pictures.save(_enlarged(job, picture), path)


def plain_data(value: Any) -> Any:
    """What JSON can hold of a value: tensors become lists, numbers that are not finite None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_data(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # tensors, arrays and their numbers
        return plain_data(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain_data(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _typed(cls: Any, assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a settings class from texts."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in assignments:
        if key not in known:
            match = difflib.get_close_matches(key, known, n=1)
            raise SettingsError(
                f"{cls.__name__} has no setting {key!r}; it has {', '.join(known)}."
                + (f" Did you mean {match[0]!r}?" if match else " Leave it out.")
            )
    return typed_settings(cls, assignments)


def _report(
    job: PictureJob, path: Path, picture: Image.Image, plain: tuple[str, Any] | None, report: Mapping[str, Any]
) -> dict[str, Any]:
    """All that is needed to make a picture again, and how it went."""
    return {
        "picture": path.name,
        "method": job.method.title,
        "request": job.request,
        "settings": job.settings,
        "call": job.arguments,
        "method_settings": job.options,
        "model": job.source.name,
        "pipeline": job.source.pipeline_class,
        "height": picture.height,
        "width": picture.width,
        "upscale": job.source.upscale(picture.height, picture.width),
        "device": device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "versions": versions(),
        **report,
        "comparison": None
        if plain is None
        else {"with": plain[0], "picture": _plain_path(path).name, "side_by_side": _comparison_path(path).name},
    }


def _enlarged(job: PictureJob, picture: Image.Image) -> Image.Image:
    scale = job.source.upscale(picture.height, picture.width)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _side_by_side(parts: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures with their names above."""
    columns = []
    for name, picture in parts.items():
        column = Image.new("RGB", (picture.width, picture.height + pictures.LINE + 6), "white")
        ImageDraw.Draw(column).text((0, 0), name, pictures.INK, pictures.TEXT)
        column.paste(picture, (0, pictures.LINE + 6))
        columns.append(column)
    return pictures.stack([pictures.beside(columns)])


def _outputs(output: str, count: int) -> list[Path]:
    path = Path(output).expanduser()
    if not path.name:
        raise SettingsError(f"output {output!r} has no name; expected a file or folder. Give one.")
    if not path.suffix:
        return [path / f"picture-{n}.png" for n in range(1, count + 1)]
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, count + 1)]


def _plain_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.plain.png")


def _comparison_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.comparison.png")


def _report_path(path: Path) -> Path:
    return path.with_suffix(".json")
