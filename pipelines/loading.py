"""Finding, checking and loading the model of a run. Nothing but small JSON files is read before `load`."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnproc.errors import AttnProcError, SettingsError
from attnproc.model_facts import CLASSES, KNOWN_MODELS, ModelFacts, model_facts, read_configs
from attnproc.pipelines.settings import EMBEDDED, RunSettings

# The model that ships with the package is tiny: its pictures are enlarged when written, so that they can be watched.
EMBEDDED_DEFAULTS = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 4.0}
EMBEDDED_FPS = 8
EMBEDDED_SIDE = 256
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
        """How many pixels a side one pixel becomes when a video is written."""
        return max(1, -(-EMBEDDED_SIDE // min(height, width))) if self.name == EMBEDDED else 1

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
    """Looks up a model: the embedded one, a local folder, or a Hugging Face id.

    Raises:
        SettingsError: there is no such model, or it is not a text-to-video pipeline.
        AttnProcError: the Hugging Face hub cannot be reached.
    """
    import diffusers

    location = embedded_location() if name == EMBEDDED else name
    configs = read_configs(location)
    if configs.pipeline_class is None:
        what = "known to `attnproc estimate` only" if name in KNOWN_MODELS else "a bare model"
        raise SettingsError(
            f"model {name!r} is {what}; expected a pipeline. Give {EMBEDDED}, a folder with a model_index.json, or a "
            "Hugging Face id such as 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'."
        )
    pipeline = getattr(diffusers, configs.pipeline_class, None)
    if pipeline is None:
        raise SettingsError(
            f"model {name!r} is a {configs.pipeline_class}, which diffusers {diffusers.__version__} does not have; "
            "expected one of its pipelines. Choose another model."
        )
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
    return Source(name, location, configs.pipeline_class, configs.denoiser_class, facts, parameters)


def embedded_location() -> str:
    """Folder of the model that ships with the package."""
    from attnproc.demos.shapes import shapes_video_path

    try:
        return str(shapes_video_path())
    except FileNotFoundError as error:
        raise SettingsError(str(error)) from error


def pick_device(settings: RunSettings) -> tuple[Any, Any]:
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
