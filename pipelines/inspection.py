"""Looking at what a method does in a run: density and recall of every call, masks over the latent grid, time.

Recall is the share of the true attention mass that the kept blocks hold; it is measured on the run's own queries and
keys, so a run that is inspected takes longer than one that is not.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import attnproc
from attnproc.errors import SettingsError
from attnproc.files import write_text
from attnproc.hardware import device_name
from attnproc.kernels import BlockMask, scores
from attnproc.layout import AttentionCall, Denoiser, Grid, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.reports import Report, SiteStats

if TYPE_CHECKING:
    from attnproc.pipelines.generate import Job


@dataclass(frozen=True)
class Observation:
    """One sparse call. Lists run over samples and then heads."""

    step: int
    branch: str
    layer: int
    denoiser: str
    density: list[list[float]]
    recall: list[list[float]]


@dataclass(frozen=True, eq=False)
class MaskView:
    """What one head keeps in one call.

    blocks: bool (query blocks, key blocks).
    seen: float (T, H, W), for the query in the middle of the video whether it sees each video token.
    """

    step: int
    layer: int
    head: int
    blocks: np.ndarray
    seen: np.ndarray
    query: Grid


@dataclass(kw_only=True)
class InspectingProcessor(AttnProcessor):
    """Runs another method unchanged and notes density, recall and masks of its sparse calls.

    Args:
        inner: the method.
        chosen: (layer, head) pairs whose masks are kept, of sample 0, at the last sparse step seen.
    """

    name: ClassVar[str] = "inspect"
    inner: AttnProcessor
    chosen: Sequence[tuple[int, int]] = ()
    observations: list[Observation] = field(default_factory=list, init=False, repr=False)
    views: dict[tuple[int, int], MaskView] = field(default_factory=dict, init=False, repr=False)
    stats: SiteStats = field(default_factory=SiteStats, init=False, repr=False)

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(AttnProcessor):
            setattr(self, setting.name, getattr(self.inner, setting.name))

    def plan(self, call: AttentionCall) -> Plan | Dense:
        with self.stats.timed("planning", call.query.device):
            plan = self.inner.plan(call)
        if isinstance(plan, Dense):
            return plan
        self._note(call, plan)
        after = plan.after
        if after is None:
            return plan

        def timed(lse: Tensor) -> None:
            with self.stats.timed("planning", call.query.device):
                after(lse)

        return dataclasses.replace(plan, after=timed)

    def predicted_density(self, layout: TokenLayout) -> float:
        return self.inner.predicted_density(layout)

    def mask(self, layout: TokenLayout) -> BlockMask | None:
        return self.inner.mask(layout)

    def check(self, layout: TokenLayout) -> None:
        self.inner.check(layout)

    def check_model(self, layout: TokenLayout, denoiser: Denoiser, heads: int, head_dim: int) -> None:
        self.inner.check_model(layout, denoiser, heads, head_dim)

    def dense_reason(self, layout: TokenLayout) -> str:
        return self.inner.dense_reason(layout)

    def is_dense_step(self, step: Any) -> bool:
        return self.inner.is_dense_step(step)

    def is_dense_layer(self, layer: int) -> bool:
        return self.inner.is_dense_layer(layer)

    def to_dict(self) -> dict[str, Any]:
        return self.inner.to_dict()

    def _note(self, call: AttentionCall, plan: Plan) -> None:
        batch, heads = call.query.shape[:2]
        valid = call.layout.key_valid
        kept = scores.recall(call.query, call.key, plan.mask, token_order=plan.token_order, query_valid=valid)
        self.observations.append(
            Observation(
                call.step.index,
                call.step.branch,
                call.layer,
                call.denoiser.name,
                densities(plan.mask, batch, heads).tolist(),
                kept.tolist(),
            )
        )
        for layer, head in self.chosen:  # the picture shows the last sparse step
            if layer == call.layer:
                if head >= heads:
                    raise SettingsError(f"head {head} was asked for; expected one of {heads}, counted from 0.")
                self.views[layer, head] = view_of(call, plan, head)


def densities(mask: BlockMask, batch: int, heads: int) -> Tensor:
    """float64 (batch, heads): kept (query, key) pairs of each head over all its pairs."""
    pairs = (mask.visible_keys.double() * mask.query_bounds.diff()).sum(-1)
    return (pairs / (mask.query_length * mask.key_length)).expand(batch, heads)


def view_of(call: AttentionCall, plan: Plan, head: int) -> MaskView:
    """What a head keeps, for the first sample."""
    mask, grid = plan.mask, call.layout.grid
    blocks = mask.to_blocks()[0, head % mask.counts.shape[1]].cpu()
    middle = tuple(n // 2 for n in grid)
    token = (middle[0] * grid[1] + middle[1]) * grid[2] + middle[2]
    position = torch.arange(call.query.shape[2])
    if plan.token_order is not None:  # position of each token
        position = plan.token_order[head % len(plan.token_order)].cpu().long().argsort()
    rows = torch.bucketize(position, mask.query_bounds[1:].cpu(), right=True)
    columns = torch.bucketize(position, mask.key_bounds[1:].cpu(), right=True)
    seen = blocks[rows[token]][columns]
    if mask.rule is not None:
        partial = mask.partial_blocks()[0, head % mask.counts.shape[1]].cpu()[rows[token]][columns]
        rule = mask.rule.to("cpu")
        ids = [torch.tensor([i]) for i in (0, head, int(position[token]))]
        seen = seen & (~partial | rule.visible(*ids, position, columns))
    video = seen[: call.layout.video_tokens].reshape(grid).numpy().astype(np.float32)
    return MaskView(call.step.index, call.layer, head, blocks.numpy(), video, middle)  # type: ignore[arg-type]


def to_dict(inspector: InspectingProcessor, report: Report, about: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of an inspected run, ready for JSON."""
    attention = sum(site.attention_seconds for site in report.sites)
    return {
        **about,
        "method": inspector.inner.to_dict(),
        "density": report.density,
        "sparse_density": report.sparse_density,
        "recall": mean_of(inspector.observations, "recall"),
        "dense_calls": sum(site.dense_calls for site in report.sites),
        "sparse_calls": sum(site.sparse_calls for site in report.sites),
        "fallbacks": report.fallbacks,
        "attention_seconds": attention,
        "planning_seconds": inspector.stats.seconds["planning"],
        "calls": [dataclasses.asdict(observation) for observation in inspector.observations],
    }


def mean_of(observations: Sequence[Observation], what: str) -> float | None:
    """Mean of "density" or "recall" over calls, samples and heads, or None without any."""
    values = [value for observation in observations for row in getattr(observation, what) for value in row]
    return float(np.mean(values)) if values else None


def parse_heads(text: str) -> tuple[tuple[int, int], ...]:
    """(layer, head) pairs from a text such as "0:1,5:0"."""
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        layer, colon, head = part.partition(":")
        if not (colon and layer.strip().isdigit() and head.strip().isdigit()):
            raise SettingsError(f"heads={text!r} is not a list of heads; expected layer:head, such as 0:1,5:0.")
        pairs.append((int(layer), int(head)))
    return tuple(pairs)


def check_target(output: Path) -> None:
    """Raises SettingsError if the picture or the JSON beside it could not be written."""
    if output.suffix.lower() != ".png":
        raise SettingsError(f"output {output} is not a PNG file; expected a name such as inspection.png.")
    for path in (output, output.with_suffix(".json")):
        if path.is_dir():
            raise SettingsError(f"output {path} is a folder; expected a file or nothing there. Choose another name.")
    if not output.parent.is_dir():
        raise SettingsError(f"the folder {output.parent} does not exist; make it, or choose another --output.")


def inspect(
    job: "Job", chosen: Sequence[tuple[int, int]] | None, output: Path, console: Console, messages: Console
) -> None:
    """Runs a job once with its method inspected; writes the picture to `output` and the numbers beside it as JSON.

    chosen: (layer, head) pairs to draw, by default head 0 of the middle and of the last layer.
    """
    from attnproc.pipelines import pictures
    from attnproc.pipelines.generate import run_once, versions
    from attnproc.pipelines.loading import load

    check_target(output)
    pipe = load(job.source, job.device, job.dtype, job.settings.offload)
    inspector = InspectingProcessor(inner=job.processor)
    with attnproc.using(pipe, inspector):
        sites = len(attnproc.report(pipe).sites)
        inspector.chosen = ((sites // 2, 0), (sites - 1, 0)) if chosen is None else chosen
        for layer, _ in inspector.chosen:
            if layer >= sites:
                raise SettingsError(f"layer {layer} was asked for; expected one of {sites}, counted from 0.")
        video = run_once(pipe, job, job.settings.seed, f"inspecting {job.processor.name}", messages)
    assert video.report is not None
    about = {
        "model": job.source.name,
        "prompt": job.settings.prompt,
        "seed": job.settings.seed,
        "steps": job.arguments["num_inference_steps"],
        "layers": sites,
        "device": device_name(job.device),
        "versions": versions(),
    }
    data = to_dict(inspector, video.report, about)
    pictures.save(pictures.inspection_picture(inspector, data), output)
    write_text(output.with_suffix(".json"), json.dumps(data, indent=1, allow_nan=False) + "\n")
    for layer, head in sorted(set(inspector.chosen) - set(inspector.views)):
        messages.print(f"layer {layer}, head {head} had no sparse call, so there is no mask to draw", markup=False)
    console.print(f"{output}, {output.with_suffix('.json').name}", markup=False, soft_wrap=True)
