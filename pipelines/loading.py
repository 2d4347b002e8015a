"""Finding, checking and loading the model of a run. Nothing but small JSON files is read before `load`."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnproc.errors import AttnProcError, SettingsError, UnsupportedError
from attnproc.model_facts import CLASSES, KNOWN_MODELS, ModelConfigs, ModelFacts, model_facts, read_configs
from attnproc.pipelines.settings import EMBEDDED, EMBEDDED_PICTURES, CommonSettings, RunSettings

EMBEDDED_DEFAULTS = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 4.0}
EMBEDDED_FPS = 8
# The models that ship with the package are tiny: what they make is enlarged when written, so that it can be looked at.
EMBEDDED_SIDES = {EMBEDDED: 256, EMBEDDED_PICTURES: 512}
UNKNOWN_FPS = 16


@dataclass(frozen=True)
class Source:
    """A model that was found.

    Attributes:
        name: as the user gave it; `location` is what `from_pretrained` takes.
        pipeline_class, denoiser_class: names of diffusers classes.
        facts: sizes of the model, or None if nothing is known of its class.
        parameters: arguments of the pipeline's call with their defaults.
    """

    name: str
    location: str
    pipeline_class: str
    denoiser_class: str
    facts: ModelFacts | None
    parameters: Mapping[str, inspect.Parameter]

    @property
    def fps(self) -> int:
        if self.name == EMBEDDED:
            return EMBEDDED_FPS
        return UNKNOWN_FPS if self.facts is None else self.facts.fps

    def upscale(self, height: int, width: int) -> int:
        """How many pixels a side one pixel becomes when a video or picture is written."""
        return max(1, -(-EMBEDDED_SIDES.get(self.name, 0) // min(height, width)))

    def call_arguments(self, settings: RunSettings) -> dict[str, Any]:
        """Arguments of the pipeline's call but for generator, callback and output type.

        Raises:
            SettingsError: the pipeline has no such argument, or the model cannot make this size.
        """
        size: Any = (None, None, None) if self.facts is None else self.facts.size
        arguments: dict[str, Any] = {"prompt": settings.prompt}
        for name, asked, known in (
            ("height", settings.height, size[0]),
            ("width", settings.width, size[1]),
            ("num_frames", settings.frames, size[2]),
            ("num_inference_steps", settings.steps, None),
            ("guidance_scale", settings.guidance, None),
            ("negative_prompt", settings.negative_prompt, None),
        ):
            if asked is not None and name not in self.parameters:
                raise SettingsError(
                    f"{self.pipeline_class} has no {name}; expected one of its arguments. Leave that flag out."
                )
            if name not in self.parameters:
                continue
            own = EMBEDDED_DEFAULTS.get(name) if self.name == EMBEDDED else None
            default = own if own is not None else self.parameters[name].default
            arguments[name] = asked if asked is not None else default if default is not None else known
        for name in ("height", "width", "num_frames"):
            if arguments[name] is None:
                raise SettingsError(
                    f"{self.pipeline_class} has no default {name}; expected one. Give --{name.removeprefix('num_')}."
                )
        if self.facts is not None:
            self.facts.grid(arguments["height"], arguments["width"], arguments["num_frames"])
        return arguments


def find_source(name: str) -> Source:
    """Looks up a text-to-video model: the embedded one, a local folder, or a Hugging Face id.

    Raises:
        SettingsError: there is no such model, or it is not a text-to-video pipeline.
        AttnProcError: the Hugging Face hub cannot be reached.
    """
    location, configs, pipeline = _find(name, "'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'")
    parameters = inspect.signature(pipeline.__call__).parameters
    if "num_frames" not in parameters or "prompt" not in parameters:
        raise SettingsError(
            f"model {name!r} is a {configs.pipeline_class}; expected a text-to-video pipeline. Choose another model, "
            "or set `pipe.attn_processor` on it in Python."
        )
    needed = [p for p, value in parameters.items() if p != "self" and value.default is inspect.Parameter.empty]
    if set(needed) - {"prompt", "args", "kwargs"}:
        raise SettingsError(
            f"model {name!r} is a {configs.pipeline_class}, which needs {', '.join(needed)}; expected one that needs a "
            "prompt alone. Use it in Python with `pipe.attn_processor`."
        )
    facts = dataclasses.replace(model_facts(configs), name=name) if configs.denoiser_class in CLASSES else None
    return Source(name, location, pipeline.__name__, configs.denoiser_class, facts, parameters)


def find_picture_source(name: str, accepted: Sequence[str], method: str) -> Source:
    """Looks up a model for a control method, which takes the `accepted` pipeline classes and their subclasses.

    Raises:
        SettingsError: there is no such model.
        UnsupportedError: it is of another class.
        AttnProcError: the Hugging Face hub cannot be reached.
    """
    location, configs, pipeline = _find(name, "'stabilityai/stable-diffusion-xl-base-1.0'")
    if not {kind.__name__ for kind in pipeline.__mro__} & set(accepted):
        raise UnsupportedError(
            f"model {name!r} is a {pipeline.__name__}; {method} expects a {' or '.join(accepted)}. "
            "Choose another model."
        )
    parameters = inspect.signature(pipeline.__call__).parameters
    return Source(name, location, pipeline.__name__, configs.denoiser_class, None, parameters)


def _find(name: str, example: str) -> tuple[str, ModelConfigs, type]:
    """Location, configurations and diffusers class of a pipeline."""
    import diffusers

    location = embedded_location(name) if name in EMBEDDED_SIDES else name
    configs = read_configs(location)
    if configs.pipeline_class is None:
        what = "known to `attnproc estimate` only" if name in KNOWN_MODELS else "a bare model"
        raise SettingsError(
            f"model {name!r} is {what}; expected a pipeline. Give {' or '.join(EMBEDDED_SIDES)}, a folder with a "
            f"model_index.json, or a Hugging Face id such as {example}."
        )
    pipeline = getattr(diffusers, configs.pipeline_class, None)
    if pipeline is None:
        raise SettingsError(
            f"model {name!r} is a {configs.pipeline_class}, which diffusers {diffusers.__version__} does not have; "
            "expected one of its pipelines. Choose another model."
        )
    return location, configs, pipeline


def embedded_location(name: str = EMBEDDED) -> str:
    """Folder of a model that ships with the package."""
    from attnproc.demos import shapes

    try:
        return str(shapes.shapes_video_path() if name == EMBEDDED else shapes.shapes_image_path())
    except FileNotFoundError as error:
        raise SettingsError(str(error)) from error


def pick_device(settings: CommonSettings) -> tuple[Any, Any]:
    """The torch device and dtype of a run.

    Raises:
        SettingsError: this machine has no such device, or offloading has nowhere to go.
    """
    import torch

    available = torch.cuda.is_available()
    name = ("cuda" if available else "cpu") if settings.device == "auto" else settings.device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(
            f"device {name!r} cannot be used here; expected cpu{' or cuda' if available else ''}. "
            "See `attnproc doctor` for the devices of this machine."
        ) from error
    if settings.offload != "none" and device.type == "cpu":
        raise SettingsError(
            f"offload={settings.offload!r} needs an accelerator, but the device is {device}; expected offload 'none'. "
            "Leave it out."
        )
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, default if settings.dtype == "auto" else getattr(torch, settings.dtype)


def load(source: Source, device: Any, dtype: Any, offload: str) -> Any:
    """Loads the pipeline with its weights.

    Raises:
        AttnProcError: a file is missing or corrupted, or memory is short.
    """
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(source.location, dtype=dtype)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
    except Exception as error:  # whatever the readers of many file formats raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise AttnProcError(
            f"model {source.name!r} cannot be loaded ({reason[:300]}); expected complete, readable weights. "
            "Download or save the model again, or free memory."
        ) from error
    return pipe
