"""Generating videos: all checks first, then the model is loaded, then videos and their records are written."""

import dataclasses
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import attnproc
from attnproc import AttnProcessor, Estimate, Report
from attnproc.errors import AttnProcError, AttnProcWarning, SettingsError, UnsupportedError
from attnproc.families import FAMILIES
from attnproc.files import write_text
from attnproc.hardware import device_name
from attnproc.pipelines.loading import Source, find_source, load, pick_device
from attnproc.pipelines.metrics import psnr, ssim
from attnproc.pipelines.settings import RunSettings
from attnproc.pipelines.video_io import check_output, write_video

PACKAGES = ("attnproc", "torch", "diffusers", "transformers", "accelerate", "triton", "av", "imageio")


@dataclass(frozen=True)
class Job:
    """A run that has passed every check that needs no weights."""

    settings: RunSettings
    source: Source
    processor: AttnProcessor
    arguments: dict[str, Any]
    estimate: Estimate | None
    outputs: list[Path]
    device: Any
    dtype: Any


@dataclass(frozen=True)
class Video:
    """One generated video and how it went. Frames are float (frames, height, width, 3) from 0.0 to 1.0."""

    frames: np.ndarray
    seconds: float
    step_seconds: list[float]
    report: Report | None


@dataclass(frozen=True)
class Comparison:
    """A video against the dense one from the same seed; seconds are those of the whole pipeline call."""

    psnr: float
    ssim: float
    density: float
    seconds: float
    dense_seconds: float
    dense_video: Path

    @property
    def speed_up(self) -> float:
        return self.dense_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `psnr` is None (and `equal` true) where it is infinite, which JSON cannot say."""
        equal = math.isinf(self.psnr)
        data = {**dataclasses.asdict(self), "dense_video": self.dense_video.name, "speed_up": self.speed_up}
        return {**data, "psnr": None if equal else self.psnr, "equal": equal}

    def table(self, method: str) -> Table:
        """The comparison as a rich table."""
        table = Table(title=f"{method} against dense, same seed")
        for heading in ("", method, "dense"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row("attention density", f"{self.density:.3f}", "1.000")
        table.add_row("time", f"{self.seconds:.2f} s", f"{self.dense_seconds:.2f} s")
        table.add_row("speed-up", f"{self.speed_up:.2f}x", "1.00x")
        table.add_row("PSNR to dense", f"{self.psnr:.2f} dB", "-")
        table.add_row("SSIM to dense", f"{self.ssim:.4f}", "-")
        return table


def prepare(settings: RunSettings) -> Job:
    """Checks a run as far as that is possible without weights.

    Raises:
        SettingsError: something that was asked for does not exist, does not fit, or cannot be written.
        UnsupportedError: the method would run dense, and `strict` forbids that.
    """
    processor = settings.processor()
    if processor.needs_calibration and processor.calibration is None:  # type: ignore[attr-defined]
        raise SettingsError(
            f"{processor.name} came without a plan; expected the file of this model and size. Make one with `attnproc "
            f"calibrate --attention {processor.name} --prompts prompts.txt --output plan.safetensors`, and give --plan."
        )
    outputs = _outputs(settings)
    for path in outputs:
        check_output(path)
        if _record_path(path).is_dir():
            raise SettingsError(
                f"the record {_record_path(path)} would replace a folder; expected a file or nothing there. "
                "Choose another --output."
            )
        if settings.compare:
            check_output(_dense_path(path))
    device, dtype = pick_device(settings)
    source = find_source(settings.model)
    arguments = source.call_arguments(settings)
    steps = arguments["num_inference_steps"]
    processor.dense_step_count(steps)
    known = any(source.denoiser_class in family.models for family in FAMILIES)
    if processor.strict and processor.name != "dense" and not known:
        raise UnsupportedError(
            f"{source.name} is a {source.denoiser_class}, of no known family, so {processor.name} would run dense; "
            "strict expects it to be sparse. Choose a model of `attnproc list`, or leave --strict out."
        )
    estimate = None
    if source.facts is not None:
        estimate = attnproc.estimate(
            source.location,
            processor=processor,
            height=arguments["height"],
            width=arguments["width"],
            num_frames=arguments["num_frames"],
            steps=steps,
        )
        estimate = dataclasses.replace(estimate, model=source.name)
        if processor.strict and processor.name != "dense" and estimate.density >= 1.0:
            raise UnsupportedError(
                f"{processor.name} would run dense on the latent grid {estimate.grid}; strict expects it to be sparse. "
                "Use a larger or longer video, other settings, or leave --strict out."
            )
    return Job(settings, source, processor, arguments, estimate, outputs, device, dtype)


def generate(job: Job, console: Console, messages: Console) -> list[Path]:
    """Runs a job and writes its files; tables go to `console`, progress to `messages`. Returns the videos' paths.

    The record of a video lies beside it as JSON. On any error, also an interrupt, the pipeline has its own processors
    back, finished videos stay, and nothing is half-written.
    """
    began = time.perf_counter()
    with messages.status(f"loading {job.source.name}"):
        pipe = load(job.source, job.device, job.dtype, job.settings.offload)
    load_seconds = time.perf_counter() - began
    if job.settings.compare:
        _warm_up(pipe, job, messages)
    for number, path in enumerate(job.outputs):
        seed = job.settings.seed + number
        with attnproc.using(pipe, job.processor):
            video = run_once(pipe, job, seed, f"{job.processor.name} {path.name}", messages)
        comparison = None
        if job.settings.compare:
            dense_path = _dense_path(path)
            dense = run_once(pipe, job, seed, f"dense {dense_path.name}", messages)
            assert video.report is not None
            comparison = Comparison(
                psnr(video.frames, dense.frames),
                ssim(video.frames, dense.frames),
                video.report.density,
                video.seconds,
                dense.seconds,
                dense_path,
            )
            _write(job, dense_path, dense, seed, "dense")
        _write(job, path, video, seed, job.processor.name)
        write_text(_record_path(path), _record(job, path, video, seed, load_seconds, comparison))
        if comparison is not None:
            console.print(comparison.table(job.processor.name))
        if video.report is not None:
            sparse = sum(site.sparse_calls for site in video.report.sites)
            calls = sparse + sum(site.dense_calls for site in video.report.sites)
            messages.print(
                f"attention density {video.report.density:.3f} over the run; {sparse} of {calls} calls sparse",
                markup=False,
            )
            for reason, count in video.report.fallbacks.items():
                messages.print(f"dense in {count} attention calls: {reason}", markup=False)
        console.print(f"{path} ({video.seconds:.1f} s), {_record_path(path).name}", markup=False, soft_wrap=True)
    return job.outputs


def _warm_up(pipe: Any, job: Job, messages: Console) -> None:
    """A run of two steps, sparse from the first, so that no compared time holds what is paid only once."""
    steps = min(2, job.arguments["num_inference_steps"])
    short = dataclasses.replace(job, arguments={**job.arguments, "num_inference_steps": steps})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnProcWarning)
        # Of two steps a method may have nothing to do; that is no fault of the run to come.
        everywhere = dataclasses.replace(job.processor, dense_steps=0, dense_layers=0, strict=False)
        with attnproc.using(pipe, everywhere):
            run_once(pipe, short, job.settings.seed, "warm-up", messages)


def run_once(pipe: Any, job: Job, seed: int, title: str, messages: Console) -> Video:
    """One pipeline call; the report is that of the processor which is installed now, if any."""
    import torch

    arguments = {
        **job.arguments,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
    }
    ends: list[float] = []
    shows_steps = "callback_on_step_end" in job.source.parameters
    with _progress(title, job.arguments["num_inference_steps"], messages, shows_steps) as advance:
        if shows_steps:  # otherwise diffusers shows its own bar
            pipe.set_progress_bar_config(disable=True)

            def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
                if job.device.type == "cuda":
                    torch.cuda.synchronize(job.device)  # so that the time of a step is its own
                ends.append(time.perf_counter())
                advance()
                return {}

            arguments["callback_on_step_end"] = on_step_end
        began = time.perf_counter()
        frames = np.asarray(pipe(**arguments).frames[0], dtype=np.float32)
        seconds = time.perf_counter() - began
    steps = [end - start for start, end in zip([began, *ends], ends, strict=False)]
    report = attnproc.report(pipe) if attnproc.installed(pipe) is not None else None
    if not np.isfinite(frames).all():
        raise AttnProcError(
            f"the video has values that are not finite; expected numbers from 0.0 to 1.0 (the dtype is {job.dtype}). "
            "Try --dtype float32, or --attention dense to see whether the model itself makes them."
        )
    return Video(frames, seconds, steps, report)


@contextmanager
def _progress(title: str, steps: int, messages: Console, visible: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True, disable=not visible) as progress:
        task = progress.add_task(title, total=steps)
        yield lambda: progress.advance(task)


def _write(job: Job, path: Path, video: Video, seed: int, method: str) -> None:
    about = {"prompt": job.settings.prompt, "model": job.source.name, "seed": seed, "attention": method}
    if method == job.processor.name:
        about["settings"] = job.processor.to_dict()["settings"]
    upscale = job.source.upscale(*video.frames.shape[1:3])
    write_video(path, video.frames, job.source.fps, upscale=upscale, about=about)


def _record(job: Job, path: Path, video: Video, seed: int, load_seconds: float, comparison: Comparison | None) -> str:
    """All that is needed to make a video again, and how it went, as JSON."""
    data = {
        "video": path.name,
        "seed": seed,
        "settings": dataclasses.asdict(job.settings),
        "call": job.arguments,
        "processor": job.processor.to_dict(),
        "pipeline": job.source.pipeline_class,
        "fps": job.source.fps,
        "upscale": job.source.upscale(*video.frames.shape[1:3]),
        "device": device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "versions": versions(),
        "timings": {"load_seconds": load_seconds, "seconds": video.seconds, "step_seconds": video.step_seconds},
        "estimate": None if job.estimate is None else job.estimate.to_dict(),
        "report": None if video.report is None else video.report.to_dict(),
        "comparison": None if comparison is None else comparison.to_dict(),
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["attnproc"] = attnproc.__version__
    return found


def _outputs(settings: RunSettings) -> list[Path]:
    path = Path(settings.output).expanduser()
    if not path.name:
        raise SettingsError(f"output {settings.output!r} has no name; expected a file or folder. Give one.")
    if settings.num_videos == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, settings.num_videos + 1)]


def _dense_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.dense{path.suffix}" if path.suffix else f"{path.name}-dense")


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")
