"""Tuning SpargeAttn: thresholds for each layer and head under a bound on the error of its output.

Source: "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference" (arXiv 2502.18137), section 3.6, and
its released tuner at bfd980b. For every similarity threshold of a grid the smallest share of attention that keeps the
relative L1 error of a head's output within a bound is searched by halving, then the smallest skip threshold within a
second, larger bound. What calls found is joined cautiously: the similarity thresholds that kept least on average win,
with the largest of their values over all calls.

Other than the released tuner this one measures with the blocks that are always kept later on, takes the last value
that passed, compares means, looks at a few steps of the run, and at a sample of the query blocks.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnproc.calibration import Calibration, CalibrationProcessor
from attnproc.errors import SettingsError, UnsupportedError
from attnproc.kernels import BlockMask, block_sparse_attention
from attnproc.kernels.block_mask import count_blocks
from attnproc.layout import AttentionCall, Step
from attnproc.sparse.sparge import block_size_of, check_block_settings, order_of
from attnproc.sparse.sparge_prediction import (
    JUDGE_OFF,
    BlockScores,
    HeadThresholds,
    always_kept,
    head_chunks,
    real_keys,
    score_blocks,
    select_blocks,
)

CDF_WIDTH = 1e-3  # where halving stops
SKIP_WIDTH = 0.1
LOSSLESS_SKIP = 50.0  # 2**-50 is beyond float32
BIN_WIDTH = 0.125  # of similarity thresholds that are compared as one
NEARLY_DENSE = 0.9  # a density from which a head gains too little


@dataclass(kw_only=True)
class SpargeCalibrationProcessor(CalibrationProcessor):
    """Tunes the thresholds of SpargeAttn on dense runs; see `CalibrationProcessor` for how to run it.

    Beside the settings of `AttnProcessor`, of which block_size and quantization must be those of the later use:

    Args:
        l1: bound on the relative L1 error sum |o - o'| / sum |o| of a head, o dense and o' with the blocks kept; above
            0.0. The paper has 0.05 for CogVideoX and Mochi, 0.07 for FLUX; Wan was published with 0.02 and 0.03.
        pv_l1: the same with blocks skipped in the kernel as well; above l1.
        steps: steps of a run to tune at, spread evenly over it; all of them where the length of a run is not known.
        query_blocks: query blocks of each call that errors are measured on, spread evenly over it.
        similarity_thresholds: the grid, each up to 1.0; any negative one is "off".
        attention_sink, token_order: as in `SpargeAttnProcessor`, and as they will be there.

    Tuning attends about 20 times to each similarity threshold, layer, step and prompt.
    """

    name: ClassVar[str] = "sparge-calibration"
    method: ClassVar[str] = "sparge"

    l1: float = 0.05
    pv_l1: float = 0.06
    steps: int = 4
    query_blocks: int = 32
    similarity_thresholds: tuple[float, ...] = (JUDGE_OFF, *(n / 16 for n in range(16)))
    attention_sink: bool = False
    token_order: str = "hilbert"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_settings(self.attention_sink, self.token_order)
        if not (_is_real(self.l1) and _is_real(self.pv_l1) and 0.0 < self.l1 < self.pv_l1):
            raise SettingsError(
                f"l1={self.l1!r} and pv_l1={self.pv_l1!r} are not valid; expected 0.0 < l1 < pv_l1, both finite; "
                "0.05 and 0.06 are a good start."
            )
        for name in ("steps", "query_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(f"{name}={value!r} must be an int of at least 1; leave it out for the default.")
        grid = self.similarity_thresholds
        if not grid or not all(_is_real(x) and x <= 1.0 for x in grid):
            raise SettingsError(
                f"similarity_thresholds={grid!r} is not valid; expected numbers up to 1.0, at least one; "
                "leave it out for the default grid."
            )
        self.similarity_thresholds = tuple(sorted(grid))

    def observe(self, component: str, call: AttentionCall) -> None:
        if not self.tunes(call.step):
            return
        order = order_of(self.token_order, call)
        block_size = block_size_of(self.block_size)
        found = []
        for part in head_chunks(call.query, block_size, ordered=order is not None):
            tensors = [x[:, part] for x in (call.query, call.key, call.value)]
            if order is not None:
                tensors = [x.index_select(2, order[0]) for x in tensors]
            found.append(self._tune(SampledCall(self, call, *tensors)))
        density, cdf, skip = (torch.cat(parts, dim=1).cpu() for parts in zip(*found, strict=True))
        self.accumulator.add(f"{component}.tuned.{call.layer}", torch.ones(()))
        self.accumulator.add(f"{component}.density.{call.layer}", density)
        for name, value in (("cdf_threshold", cdf), ("skip_threshold", skip)):
            key = f"{component}.{name}.{call.layer}"
            largest = self.accumulator.sums.get(key, value)
            self.accumulator.sums[key] = torch.maximum(largest, value)

    def tunes(self, step: Step) -> bool:
        """Whether a step is one of those spread over the run: the middles of `steps` equal parts."""
        if step.total is None or step.total <= self.steps:
            return True
        return step.index in {(2 * n + 1) * step.total // (2 * self.steps) for n in range(self.steps)}

    def _tune(self, sample: "SampledCall") -> "Tuned":
        """Tunes the heads of a call, all at once."""
        found = []
        for threshold in self.similarity_thresholds:
            cdf = smallest(lambda x: sample.error(sample.select(x, threshold)), self.l1, 1.0, CDF_WIDTH, sample.heads)  # noqa: B023
            cdf = torch.where(cdf > 1.0 - CDF_WIDTH, 1.0, cdf)
            kept = sample.select(cdf, threshold)
            skip = smallest(lambda x: sample.error(kept, x), self.pv_l1, LOSSLESS_SKIP, SKIP_WIDTH, sample.heads)  # noqa: B023
            skip = torch.where(skip == LOSSLESS_SKIP, torch.inf, skip)
            found.append(Tuned(sample.density(kept), cdf, skip))
            if bool((found[-1].density >= NEARLY_DENSE).all()):
                break  # larger similarity thresholds keep more still
        dense = Tuned(*(torch.full_like(found[0].cdf, x) for x in (1.0, 1.0, torch.inf)))
        found += [dense] * (len(self.similarity_thresholds) - len(found))
        return Tuned(*(torch.stack(values) for values in zip(*found, strict=True)))

    def finish(self, about: Mapping[str, Any] | None = None) -> Calibration:
        seen, header = self.accumulator, self.header(about)
        tensors: dict[str, Tensor] = {}
        if not self.done:
            raise SettingsError(
                f"the calibration is in round {self.round!r} after {self.prompts} prompts; expected that it has ended. "
                "Call end_round() after the last prompt."
            )
        for component, facts in seen.components.items():
            layers = []
            for layer in range(facts.layers):
                calls = seen.sums.get(f"{component}.tuned.{layer}")
                if calls is None:
                    raise UnsupportedError(
                        f"layer {layer} of {component} was never tuned; expected at least one of {self.steps} steps "
                        "spread over each run. Run whole pipelines, or tune at more steps."
                    )
                density = seen.sums[f"{component}.density.{layer}"] / calls
                largest = (seen.sums[f"{component}.{name}.{layer}"] for name in ("cdf_threshold", "skip_threshold"))
                layers.append(join(self.similarity_thresholds, Tuned(density, *largest)))
            density, *thresholds = (torch.stack(values) for values in zip(*layers, strict=True))
            header["components"][component]["density"] = float(density.mean())
            names = ("cdf_threshold", "similarity_threshold", "skip_threshold")
            tensors |= {f"{component}.{name}": value for name, value in zip(names, thresholds, strict=True)}
        return Calibration(self.method, header, tensors)

    def header(self, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        header = super().header(about)
        header["settings"] |= dict(zip(("query_block", "key_block"), block_size_of(self.block_size), strict=True))
        return header


class Tuned(NamedTuple):
    """What a search found, float32 (similarity thresholds, heads) each."""

    density: Tensor
    cdf: Tensor
    skip: Tensor


class Joined(NamedTuple):
    """The thresholds of a layer, float32 (heads,) each."""

    density: Tensor
    cdf: Tensor
    similarity: Tensor
    skip: Tensor


class SampledCall:
    """A call in token order with some of its query blocks, to measure errors on."""

    def __init__(
        self, settings: SpargeCalibrationProcessor, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
    ):
        layout, device, tokens = call.layout, query.device, query.shape[2]
        self.block_size = block_size_of(settings.block_size)
        self.backend, self.quantization = settings.backend, settings.quantization
        self.heads = query.new_empty(query.shape[1], dtype=torch.float32)
        self.key_valid = layout.key_valid
        self.key, self.value = key, value

        blocks = count_blocks(tokens, self.block_size[0])
        sampled = min(settings.query_blocks, blocks)
        rows = torch.arange(1, sampled + 1, device=device) * blocks // sampled - 1
        places = (rows[:, None] * self.block_size[0] + torch.arange(self.block_size[0], device=device)).flatten()
        places = places[places < tokens]
        self.query = query.index_select(2, places)

        scores, queries, keys = score_blocks(query, key, self.block_size, key_valid=self.key_valid)
        self.scores = BlockScores(scores[:, :, rows], queries[:, :, rows], keys)
        text_start = layout.video_tokens if layout.text_tokens else None
        self.always = always_kept(tokens, self.block_size, text_start, settings.attention_sink, device)[rows]
        self.real = real_keys(tokens, self.block_size[1], self.key_valid, device)

        valid = torch.tensor([tokens]) if self.key_valid is None else self.key_valid
        self.padding = (places >= valid.to(device)[:, None])[:, None, :, None]
        full = BlockMask.full(len(places), tokens, self.block_size, self.key_valid, device)
        out = block_sparse_attention(self.query, key, value, full, backend=self.backend)
        self.dense = out.float().masked_fill(self.padding, 0.0)

    def select(self, cdf_threshold: Tensor, similarity_threshold: float) -> Tensor:
        """bool (batch, heads, sampled query blocks, key blocks): the mask with these thresholds."""
        thresholds = HeadThresholds(None, cdf_threshold, torch.full_like(self.heads, similarity_threshold))
        return (select_blocks(self.scores, thresholds, self.real) | self.always) & self.real

    def density(self, blocks: Tensor) -> Tensor:
        """float32 (heads,): kept share of the block pairs."""
        pairs = self.real.expand(blocks.shape[0], 1, *blocks.shape[2:]).sum()
        return blocks.sum((0, 2, 3)) / pairs

    def error(self, blocks: Tensor, skip_threshold: Tensor | None = None) -> Tensor:
        """float32 (heads,): relative L1 error of the output under a mask, over all samples."""
        mask = BlockMask.from_blocks(blocks, self.query.shape[2], self.key.shape[2], self.block_size, self.key_valid)
        out = block_sparse_attention(
            self.query,
            self.key,
            self.value,
            mask,
            skip_threshold=skip_threshold,
            quantization=self.quantization,
            backend=self.backend,
        )
        difference = (out.float() - self.dense).masked_fill(self.padding, 0.0).abs().sum((0, 2, 3))
        return difference / self.dense.abs().sum((0, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny)


def smallest(error: Callable[[Tensor], Tensor], bound: float, high: float, width: float, heads: Tensor) -> Tensor:
    """float32 (heads,): the smallest value from 0 to `high` with an error within the bound, found by halving.

    error: (heads,) -> (heads,), falling. Always a value that passed, or `high`, which counts as without error.
    """
    low, passed = torch.zeros_like(heads), torch.full_like(heads, high)
    for _ in range(math.ceil(math.log2(high / width))):
        middle = (low + passed) / 2
        within = error(middle) <= bound
        low, passed = torch.where(within, low, middle), torch.where(within, middle, passed)
    return passed


def join(similarity_thresholds: tuple[float, ...], tuned: Tuned) -> Joined:
    """The thresholds of each head from the mean density and the largest thresholds over all calls.

    similarity_thresholds: ascending; tuned: (similarity thresholds, heads).
    """
    bins = [max(math.floor(x / BIN_WIDTH), -1) for x in similarity_thresholds]
    parts, start = [], 0
    for _, members in itertools.groupby(bins):
        stop = start + len(list(members))
        parts.append(
            Joined(
                tuned.density[start:stop].mean(0),
                tuned.cdf[start:stop].amax(0),
                torch.full_like(tuned.cdf[0], similarity_thresholds[stop - 1]),
                tuned.skip[start:stop].amax(0),
            )
        )
        start = stop
    stacked = Joined(*(torch.stack(values) for values in zip(*parts, strict=True)))
    best = stacked.density.argmin(0, keepdim=True)
    density, cdf, similarity, skip = (values.gather(0, best)[0] for values in stacked)
    dense = density >= NEARLY_DENSE
    return Joined(
        *(torch.where(dense, x, y) for x, y in ((1.0, density), (1.0, cdf), (1.0, similarity), (torch.inf, skip)))
    )


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
