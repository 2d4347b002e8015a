"""Making a calibration: dense runs over prompts under the eyes of a method, resumable after every prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import attnproc
from attnproc.calibration import Calibration, CalibrationProcessor
from attnproc.errors import SettingsError
from attnproc.methods import calibration_class, method_class
from attnproc.pipelines.generate import run_once
from attnproc.pipelines.loading import load
from attnproc.pipelines.settings import typed_settings

if TYPE_CHECKING:
    from attnproc.pipelines.generate import Job


# Settings of a method that say when it is used, or that a calibration takes the place of.
ONLINE = ("dense_steps", "dense_layers", "density")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"prompts {path} cannot be read: {error}; expected a text file, one prompt a line.") from (
            error
        )
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise SettingsError(f"prompts {path} has no prompt; expected one a line.")
    return prompts


def calibrator(
    method: str,
    settings: Mapping[str, Any],
    *,
    model: str,
    density: float | None = None,
    max_error: float | None = None,
) -> CalibrationProcessor:
    """The calibrating processor of a method, with what the method's preset for the model says, if there is one.

    density: kept share of the blocks, for methods that take one. max_error: for methods that are tuned to an error,
    the largest relative L1 error of a head by leaving out blocks; skipping in the kernel may add a fifth of it.
    """
    found = calibration_class(method)
    known = {f.name for f in dataclasses.fields(found)}
    aims = {
        "density": {} if density is None else {"density": density},
        "max_error": {} if max_error is None else {"l1": max_error, "pv_l1": 1.2 * max_error},
    }
    for name, aim in aims.items():
        if not set(aim) <= known:
            other = "max_error" if name == "density" else "density"
            raise SettingsError(f"{method} is not calibrated by {name}; expected {other}. Give that instead.")
    preset = method_class(method).presets().get(model, {}).get("settings", {})
    shared = {key: value for key, value in preset.items() if key in known and key not in ONLINE}
    given = {**shared, **aims["density"], **aims["max_error"], **settings}
    return found.from_settings(typed_settings(found, given))


def check_target(output: Path) -> None:
    """Raises SettingsError if the calibration could not be written."""
    if output.suffix != ".safetensors":
        raise SettingsError(f"output {output} is not a safetensors file; expected a name such as plan.safetensors.")
    if output.is_dir() or not output.parent.is_dir():
        raise SettingsError(f"output {output} is not a file in a folder that exists; choose another --output.")


def partial_path(output: Path) -> Path:
    """Where an unfinished calibration is kept."""
    return output.with_name(f"{output.stem}.partial{output.suffix}")


def calibrate(
    job: "Job", processor: CalibrationProcessor, prompts: Sequence[str], output: Path, messages: Console
) -> Calibration:
    """Runs every prompt in every round and saves the calibration.

    After each prompt what was seen is saved beside `output`, and a call with the same prompts and settings goes on
    from there; the file is removed at the end.
    """
    check_target(output)
    partial = partial_path(output)
    about = {
        "model": job.source.name,
        "prompts": list(prompts),
        "seed": job.settings.seed,
        "call": {key: value for key, value in job.arguments.items() if key != "prompt"},
    }
    if partial.exists():
        _resume(processor, Calibration.load(partial), about, partial, messages)
    pipe = load(job.source, job.device, job.dtype, job.settings.offload)
    with attnproc.using(pipe, processor):
        while not processor.done:
            for number in range(processor.prompts, len(prompts)):
                one = dataclasses.replace(job, arguments={**job.arguments, "prompt": prompts[number]})
                title = f"{processor.round}, prompt {number + 1} of {len(prompts)}"
                run_once(pipe, one, job.settings.seed + number, title, messages)
                processor.end_prompt()
                _save_state(processor, about, partial)
            processor.end_round()
            _save_state(processor, about, partial)
    calibration = processor.finish(about)
    calibration.save(output)
    partial.unlink(missing_ok=True)
    return calibration


def _save_state(processor: CalibrationProcessor, about: Mapping[str, Any], partial: Path) -> None:
    state = processor.state()
    state.header["about"] = dict(about)
    state.save(partial)


def _resume(
    processor: CalibrationProcessor, state: Calibration, about: Mapping[str, Any], partial: Path, messages: Console
) -> None:
    known = state.header.get("about", {})
    different = [key for key, value in about.items() if known.get(key) != value]
    if different:
        raise SettingsError(
            f"{partial} is an unfinished calibration with other {', '.join(different)}; expected the same as now. "
            "Remove the file to start afresh, or give what it was started with."
        )
    processor.restore(state)
    messages.print(f"going on from {partial}: {processor.round}, {processor.prompts} prompts done", markup=False)
