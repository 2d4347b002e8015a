"""Comparing methods at equal density: quality against dense at equal seed, recall, time; in runs or on a recording."""

import dataclasses
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

import attnproc
from attnproc.calibration import CalibrationProcessor
from attnproc.errors import SettingsError
from attnproc.files import write_text
from attnproc.hardware import device_name
from attnproc.kernels import block_sparse_attention, scores
from attnproc.layout import TokenLayout
from attnproc.methods import METHODS, calibration_class, method_class
from attnproc.pipelines import pictures
from attnproc.pipelines.calibrate import ONLINE, calibrate, calibrator, read_prompts
from attnproc.pipelines.generate import Video, run_once, versions
from attnproc.pipelines.inspection import InspectingProcessor, densities, mean_of
from attnproc.pipelines.loading import load
from attnproc.pipelines.metrics import psnr, ssim
from attnproc.pipelines.recording import Recording
from attnproc.pipelines.settings import EMBEDDED, typed_settings
from attnproc.processor import AttnProcessor, Dense

if TYPE_CHECKING:
    from attnproc.pipelines.generate import Job

CALIBRATION_PROMPTS = 2  # as in the PARO paper
EQUAL_PSNR = 100.0  # stands for infinite in means


@dataclass(frozen=True)
class Case:
    """A prompt, its seed, and a judge of the frames, float (frames, height, width, 3) from 0.0 to 1.0: right or not."""

    prompt: str
    seed: int
    judge: Callable[[np.ndarray], bool] | None = None


@dataclass(frozen=True)
class Row:
    """One method at one density, the mean over all cases or recorded calls; None where it was not measured.

    density: kept share of query-key pairs in sparse calls; run_density counts dense calls as 1.0.
    seconds: attention and planning of all sparse and dense calls of a run, or of the recorded calls.
    error: relative L1 error of the attention output, on recorded calls.
    """

    method: str
    target: float
    settings: dict[str, Any]
    density: float | None
    run_density: float | None
    recall: float | None
    seconds: float
    planning_seconds: float
    dense_seconds: float
    psnr: float | None = None
    psnr_min: float | None = None
    ssim: float | None = None
    success: float | None = None
    dense_success: float | None = None
    error: float | None = None
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)


def default_methods(on_recording: bool) -> list[str]:
    """All sparse methods; on a recording those that need no plan, which is made on a model."""
    sparse = [name for name in METHODS if name != "dense"]
    return [name for name in sparse if not on_recording or _plan_maker(name) is None]


def check_request(methods: Sequence[str], targets: Sequence[float]) -> None:
    """Raises SettingsError unless all methods are known and sparse, and all densities possible."""
    for name in methods:
        method_class(name)
        if name == "dense":
            raise SettingsError("method 'dense' is what the others are compared with; expected sparse methods.")
    for target in targets:
        if not 0.0 < target <= 1.0:
            raise SettingsError(f"density {target} is not possible; expected numbers above 0.0 and up to 1.0.")
    if not methods or not targets:
        raise SettingsError(f"nothing to compare; expected methods of {', '.join(METHODS)} and densities.")


def cases_of(job: "Job", prompts: Path | None, count: int) -> tuple[list[Case], list[str]]:
    """The cases to run and other prompts to calibrate on.

    Without a file: captions of the Shapes world with one object, which only shapes-video draws; its detector judges.
    From a file the first `count` prompts are cases, and those after them, if any, else the same, are for calibration.
    """
    if count < 1:
        raise SettingsError(f"cases={count} is not possible; expected at least 1. Give another number.")
    if prompts is not None:
        texts = read_prompts(prompts)
        first = [Case(text, job.settings.seed + number) for number, text in enumerate(texts[:count])]
        return first, texts[count : count + CALIBRATION_PROMPTS] or texts[:CALIBRATION_PROMPTS]
    if job.source.name != EMBEDDED:
        raise SettingsError(
            f"model {job.source.name!r} came without prompts; expected a text file, one prompt a line. Give --prompts."
        )
    from attnproc.demos.shapes.detect import detect
    from attnproc.demos.shapes.evaluate import held_out_cases, score

    def judge_of(looks: Any) -> Callable[[np.ndarray], bool]:
        return lambda video: score(looks, detect((video * 255).round().astype(np.uint8)))["all"] == 1.0

    scenes = held_out_cases(2 * (count + CALIBRATION_PROMPTS), job.settings.seed)
    scenes = [case for case in scenes if len(case.scene.looks) == 1]
    found = [Case(case.prompt, case.seed, judge_of(case.scene.looks)) for case in scenes]
    return found[:count], [case.prompt for case in found[count:]]


def about(job: "Job", cases: Sequence[Case], calibration_prompts: Sequence[str]) -> dict[str, Any]:
    """What a comparison was made of, for its JSON."""
    return {
        "model": job.source.name,
        "call": {key: value for key, value in job.arguments.items() if key != "prompt"},
        "cases": [{"prompt": case.prompt, "seed": case.seed} for case in cases],
        "calibration_prompts": list(calibration_prompts),
        "device": device_name(job.device),
        "threads": torch.get_num_threads(),
        "dtype": str(job.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def save(title: str, rows: Sequence[Row], shown: dict[str, np.ndarray], about: dict[str, Any], output: Path) -> None:
    """Writes the plot as PNG and the numbers beside it as JSON."""
    pictures.save(pictures.comparison_picture(title, rows, shown), output)
    data = {**about, "rows": [dataclasses.asdict(row) for row in rows]}
    write_text(output.with_suffix(".json"), json.dumps(data, indent=1) + "\n")


def compare(
    job: "Job",
    cases: Sequence[Case],
    calibration_prompts: Sequence[str],
    methods: Sequence[str],
    targets: Sequence[float],
    overrides: Mapping[str, Any],
    messages: Console,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Runs every case dense and with every method at every density.

    overrides: settings of every method, over those of its preset for the model; a text is read as the setting's type.

    Returns the rows, and the frames of the first case by "dense" and "method target".
    """
    check_request(methods, targets)
    pipe = load(job.source, job.device, job.dtype, job.settings.offload)
    layout, dense_videos, dense_seconds = _dense_runs(pipe, job, cases, messages)
    shown = {"dense": dense_videos[0].frames}
    rows = []
    for method in methods:
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                plan = Path(folder) / "plan.safetensors"
                processor = _processor(method, target, layout, job, calibration_prompts, overrides, plan, messages)
                row, videos = _run(pipe, job, cases, processor, target, dense_videos, dense_seconds, messages)
            rows.append(row)
            shown[f"{method} {target:g}"] = videos[0].frames
    return rows, shown


def _dense_runs(
    pipe: Any, job: "Job", cases: Sequence[Case], messages: Console
) -> tuple[TokenLayout, list[Video], float]:
    """The layout of the calls, the dense videos, and the seconds in dense attention of one run."""
    watcher = _LayoutWatcher()
    videos, seconds = [], 0.0
    with attnproc.using(pipe, watcher):
        for number, case in enumerate(cases):
            title = f"dense, case {number + 1} of {len(cases)}"
            videos.append(run_once(pipe, _with_prompt(job, case), case.seed, title, messages))
            report = videos[-1].report
            assert report is not None
            seconds += sum(site.attention_seconds for site in report.sites)
    if watcher.layout is None:
        raise SettingsError(
            f"no attention call of {job.source.name} could be sparse; expected a model of `attnproc list`."
        )
    return watcher.layout, videos, seconds / len(cases)


@dataclass(kw_only=True)
class _LayoutWatcher(AttnProcessor):
    """Runs dense and learns the layout of the calls."""

    name = "dense"
    layout: TokenLayout | None = dataclasses.field(default=None, init=False)

    def plan(self, call: Any) -> Dense:
        self.layout = self.layout or call.layout
        return Dense()

    def predicted_density(self, layout: TokenLayout) -> float:
        return 1.0


def _processor(
    method: str,
    target: float,
    layout: TokenLayout,
    job: "Job",
    calibration_prompts: Sequence[str],
    overrides: Mapping[str, Any],
    plan: Path,
    messages: Console,
) -> AttnProcessor:
    """The method at a density; where it needs a plan, one is made for the purpose."""
    cls = method_class(method)
    preset = cls.presets().get(job.source.name, {}).get("settings", {})
    preset = {**preset, **typed_settings(cls, overrides)}
    if (maker := _plan_maker(method)) is not None:
        known = {f.name for f in dataclasses.fields(maker)} - set(ONLINE)
        shared = {key: value for key, value in overrides.items() if key in known}
        watching = calibrator(method, shared, model=job.source.name, density=target)
        calibrate(job, watching, calibration_prompts, plan, messages)
        return cls.from_settings({**preset, "calibration": str(plan)})
    return cls.at_density(target, layout, preset)


def _plan_maker(method: str) -> type[CalibrationProcessor] | None:
    """What makes the plans of a method that needs one; None for the others."""
    return calibration_class(method) if method_class(method).needs_calibration else None


def _run(
    pipe: Any,
    job: "Job",
    cases: Sequence[Case],
    processor: AttnProcessor,
    target: float,
    dense_videos: Sequence[Video],
    dense_seconds: float,
    messages: Console,
) -> tuple[Row, list[Video]]:
    inspector = InspectingProcessor(inner=processor)
    videos, reports = [], []
    with attnproc.using(pipe, inspector):
        for number, case in enumerate(cases):
            title = f"{processor.name} at {target:g}, case {number + 1} of {len(cases)}"
            videos.append(run_once(pipe, _with_prompt(job, case), case.seed, title, messages))
            reports.append(videos[-1].report)
    pairs = [(a.frames, b.frames) for a, b in zip(videos, dense_videos, strict=True)]
    qualities = [min(psnr(a, b), EQUAL_PSNR) for a, b in pairs]
    attention = sum(site.attention_seconds for report in reports for site in report.sites) / len(cases)
    planning = inspector.stats.seconds["planning"] / len(cases)
    judged = all(case.judge is not None for case in cases)
    settings = processor.to_dict()["settings"]
    settings.pop("calibration", None)  # a temporary file
    row = Row(
        method=processor.name,
        target=target,
        settings=settings,
        density=mean_of(inspector.observations, "density"),
        run_density=float(np.mean([report.density for report in reports])),
        recall=mean_of(inspector.observations, "recall"),
        seconds=attention + planning,
        planning_seconds=planning,
        dense_seconds=dense_seconds,
        psnr=float(np.mean(qualities)),
        psnr_min=float(np.min(qualities)),
        ssim=float(np.mean([ssim(a, b) for a, b in pairs])),
        success=_success(cases, videos) if judged else None,
        dense_success=_success(cases, dense_videos) if judged else None,
        fallbacks=dict(sum((Counter(report.fallbacks) for report in reports), Counter())),
    )
    return row, videos


def _success(cases: Sequence[Case], videos: Sequence[Video]) -> float:
    return float(np.mean([case.judge(video.frames) for case, video in zip(cases, videos, strict=True)]))  # type: ignore[misc]


def _with_prompt(job: "Job", case: Case) -> "Job":
    return dataclasses.replace(job, arguments={**job.arguments, "prompt": case.prompt})


# -- on recorded calls -------------------------------------------------------------------------------------------------


def compare_recorded(
    recording: Recording, methods: Sequence[str], targets: Sequence[float], overrides: Mapping[str, Any] | None = None
) -> list[Row]:
    """Every method at every density on recorded calls: density, recall, error and time, without the model.

    overrides: as in `compare`.

    A method that searches at one call and uses the result at later ones is given each call twice and judged by the
    second. Methods that need a calibration are refused: they are calibrated on a model.
    """
    check_request(methods, targets)
    needing = [method for method in methods if _plan_maker(method) is not None]
    if needing:
        raise SettingsError(
            f"{', '.join(needing)} needs a calibration, which is made on a model; expected methods without one. "
            "Leave it out, or compare in runs."
        )
    rows = []
    for method in methods:
        cls = method_class(method)
        preset = cls.presets().get(recording.index["model"], {}).get("settings", {})
        preset = {**preset, **typed_settings(cls, overrides or {})}
        for target in targets:
            rows.append(_recorded_row(recording, cls, target, preset))
    return rows


def _recorded_row(recording: Recording, cls: type[AttnProcessor], target: float, preset: dict[str, Any]) -> Row:
    kept: list[float] = []
    recalls: list[float] = []
    errors: list[float] = []
    fallbacks: dict[str, int] = {}
    dense_seconds = attention_seconds = planning_seconds = 0.0
    processor: AttnProcessor | None = None
    cache: dict[Any, Any] = {}
    for number in range(len(recording)):
        call = recording.call(number, cache, {})
        processor = processor or cls.at_density(target, call.layout, preset)
        began = time.perf_counter()
        real = _visible(call)
        exact = scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=real)
        dense_seconds += time.perf_counter() - began
        plan = processor.plan(call)
        if not isinstance(plan, Dense) and plan.after is not None:
            plan.after(scores.dense_lse(call.query, call.key, key_valid=call.layout.key_valid))
        began = time.perf_counter()
        plan = processor.plan(call)
        planning_seconds += time.perf_counter() - began
        if isinstance(plan, Dense):
            reason = plan.reason or "the settings keep everything"
            fallbacks[reason] = fallbacks.get(reason, 0) + 1
            continue
        began = time.perf_counter()
        out = block_sparse_attention(
            call.query,
            call.key,
            call.value,
            plan.mask,
            token_order=plan.token_order,
            skip_threshold=plan.skip_threshold,
            quantization=processor.quantization,
            backend=processor.backend,
        )
        attention_seconds += time.perf_counter() - began
        kept.append(float(densities(plan.mask, *call.query.shape[:2]).mean()))
        valid = call.layout.key_valid
        recall = scores.recall(call.query, call.key, plan.mask, token_order=plan.token_order, query_valid=valid)
        recalls.append(float(recall.mean()))
        if real is not None:  # padding has no say
            out, exact = (tensor.masked_fill(~real.mT, 0.0) for tensor in (out, exact))
        errors.append(float((out.float() - exact.float()).abs().sum() / exact.float().abs().sum()))
    assert processor is not None
    return Row(
        method=processor.name,
        target=target,
        settings=processor.to_dict()["settings"],
        density=float(np.mean(kept)) if kept else None,
        run_density=None,
        recall=float(np.mean(recalls)) if recalls else None,
        seconds=attention_seconds + planning_seconds,
        planning_seconds=planning_seconds,
        dense_seconds=dense_seconds,
        error=float(np.mean(errors)) if errors else None,
        fallbacks=fallbacks,
    )


def _visible(call: Any) -> torch.Tensor | None:
    valid = call.layout.key_valid
    if valid is None:
        return None
    return (torch.arange(call.key.shape[2]) < valid[:, None])[:, None, None]


# -- showing it --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a rich table; columns nothing was measured for are left out."""
    columns: dict[str, Callable[[Row], str | None]] = {
        "method": lambda row: row.method,
        "asked": lambda row: f"{row.target:g}",
        "density": lambda row: _number(row.density, 3),
        "run": lambda row: _number(row.run_density, 3),
        "recall": lambda row: _number(row.recall, 3),
        "PSNR (min)": lambda row: None if row.psnr is None else f"{row.psnr:.1f} ({row.psnr_min:.1f})",
        "SSIM": lambda row: _number(row.ssim, 3),
        "detector (dense)": lambda row: (
            None if row.success is None else f"{row.success:.2f} ({_number(row.dense_success, 2)})"
        ),
        "error": lambda row: _number(row.error, 4),
        "attention s (dense)": lambda row: f"{row.seconds:.3g} ({row.dense_seconds:.3g})",
        "planning": lambda row: f"{row.planning_seconds / row.seconds:.0%}" if row.seconds else None,
    }
    filled = {name: [read(row) for row in rows] for name, read in columns.items()}
    filled = {name: cells for name, cells in filled.items() if any(cell is not None for cell in cells)}
    result = Table(*filled, title=title)
    for number in range(len(rows)):
        result.add_row(*(cells[number] or "-" for cells in filled.values()))
    return result


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None or math.isnan(value) else f"{value:.{digits}f}"
