"""AdaSpa: a few searches measure the exact attention mass of every block; between them each head keeps its heaviest.

Source: "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation" (arXiv 2502.21079). No code
was released; what the paper leaves open is settled here and in `adaspa_blocks`.

The first steps are dense. At the last of them the log-sum-exp of every query and the attention mass of every block of
every head are computed, and each video row of blocks keeps its heaviest video blocks. Heads that lose little by that
get sparser, as many others denser. A later search refreshes the choice with the log-sum-exp of the earlier one: one
pass over queries and keys tells the new masses, and the new log-sum-exp too. Text is never dropped.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnproc.errors import AttnProcWarning, SettingsError
from attnproc.kernels import FEATURES, BlockMask
from attnproc.kernels.block_mask import make_lists
from attnproc.kernels.scores import block_mass, dense_lse
from attnproc.layout import AttentionCall, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.adaspa_blocks import (
    BASE,
    SPARSER,
    Segments,
    choose_blocks,
    drift,
    head_tiers,
    keep_count,
    rank_blocks,
    scale_rows,
    tier_densities,
    valid_tokens,
)
from attnproc.sparse.bits import pack_blocks, unpack_blocks

BLOCK_SIZES = (16, 32, 64, 128)
LEAST_BLOCKS = 4  # of video
# A search can pay for itself only if this share of the steps comes after it.
LEAST_SPARSE_SHARE = 0.4
CHUNK_BYTES = 1 << 28  # of scratch memory for the masses of a few heads
PAIR_BYTES = 32  # scratch for each pair of blocks: mass, scaled mass, sorted mass and its int64 place, gathered mass
# Between searches a mask of so many pairs of blocks is kept as it is, for speed; larger ones as bits, for memory.
SMALL_MASK_PAIRS = 1 << 18


@dataclass(kw_only=True)
class AdaSpaAttnProcessor(AttnProcessor):
    """AdaSpa as a processor. Remembers, for each layer and guidance branch, the blocks that the last search chose.

    Every call that has no blocks to go by (a second expert's first, one of another shape, text length or batch size
    than before) runs dense and searches, whatever the step. Such a dense call costs two passes over queries and keys
    more; its output is that of the model's own attention.

    Beside the settings of `AttnProcessor`:

    Args:
        density: share of the video blocks that each video row of blocks keeps, the mean over heads, above 0.0 to 1.0
            (1 - s in the paper). Text blocks come on top.
        search_steps: the steps that search, ascending. An int n is the n-th step, counted from 1 as in the paper (0
            is the first too), a float a fraction of the run, rounded to a step. Steps up to the first search, itself
            included, are dense: this is the warm-up. The others refresh the choice and are sparse. A fraction that
            falls on an earlier search, or an int past the end of the run, is left out.
        head_adaptive: let heads of high recall keep half as many blocks and as many heads of low recall one and a
            half times as many. Under context parallelism the heads of one device are ranked among themselves.
        recall_threshold: recall above which a head may get sparser, 0.0 to 1.0.
        guarded: let a head get sparser only if its recall stays above the threshold then. Not in the paper, whose
            rule can lower the mean recall where heads are alike.
        force_diagonal: keep the block of a query block's own tokens, as one of its blocks.
        lse_drift_max: a refresh is made as a dense first search if the log-sum-exp has moved by more than this since
            the last search, in the mean over queries and heads; above 0.
        update_lse: let a refresh start from the log-sum-exp of the search before it; False is the paper's way, always
            that of the first. Matters from the third search on.
        min_tokens: calls with fewer tokens run dense, and videos of fewer than 4 blocks; 0 turns both off.
        dense_steps: further steps that stay dense; the first search then waits for the first step after them.
        block_size: 16, 32, 64 or 128 tokens; None is 64. Blocks never mix video and text.

    Warns (`AttnProcWarning`) as a run starts if fewer than 40 % of its steps would be sparse.
    """

    name: ClassVar[str] = "adaspa"
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "high": {"density": 0.3, "search_steps": (0.3, 0.6)},
        "balanced": {"density": 0.2, "search_steps": (0.2, 0.6)},
        "fast": {"density": 0.1, "search_steps": (0.2, 0.6)},
    }

    density: float | None = None
    search_steps: Any = None
    head_adaptive: bool = True
    recall_threshold: float = 0.8
    guarded: bool = False
    force_diagonal: bool = False
    lse_drift_max: float = 0.5
    update_lse: bool = True
    min_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self.search_steps = _search_steps(self.search_steps)
        _check_number("density", self.density, "above 0.0 and up to 1.0; 0.2 is the published one", above=0.0, most=1.0)
        _check_number("recall_threshold", self.recall_threshold, "from 0.0 to 1.0", least=0.0, most=1.0)
        _check_number("lse_drift_max", self.lse_drift_max, "above 0.0; infinity never searches anew", above=0.0)
        for flag in ("head_adaptive", "guarded", "force_diagonal", "update_lse"):
            if not isinstance(getattr(self, flag), bool):
                raise SettingsError(f"{flag}={getattr(self, flag)!r} must be True or False.")
        if self.guarded and not self.head_adaptive:
            raise SettingsError("guarded=True came with head_adaptive=False, which moves no head; leave one out.")
        if not _is_int(self.min_tokens) or self.min_tokens < 0:
            raise SettingsError(f"min_tokens={self.min_tokens!r} must be an int of at least 0; 0 never runs dense.")
        if self.block_size not in (None, *BLOCK_SIZES):
            raise SettingsError(
                f"block_size={self.block_size!r} is not possible; choose one of {', '.join(map(str, BLOCK_SIZES))}, "
                "or None for 64."
            )

    # -- steps -------------------------------------------------------------------------------------------------------

    def searches(self, total: int | None) -> tuple[int, ...]:
        """Indices of the steps that search in a run of `total` steps, counted from 0, ascending (section 4.1).

        Raises:
            SettingsError: a fraction, and `total` is not known.
        """
        found: list[int] = []
        for step in self.search_steps:
            if isinstance(step, float):
                if total is None:
                    raise SettingsError(
                        f"search_steps={self.search_steps} needs the number of steps, which a bare model does not "
                        "tell; give attnproc.install(..., scheduler=scheduler), or counts such as (10, 30)."
                    )
                step = math.floor(round(step * total, 9) + 0.5)
            index = max(step, 1) - 1
            if (not found or index > found[-1]) and (total is None or index < total):
                found.append(index)
        return tuple(found)

    def dense_step_count(self, total: int) -> tuple[int, int]:
        """Dense (first, last) steps of a run of `total` steps; the first search is one of the first."""
        first, last = super().dense_step_count(total)
        searches = self.searches(total)
        return (min(max(first, searches[0]) + 1, total) if searches else total), last

    def is_dense_step(self, step: Step) -> bool:
        """Whether a step is left to the model: before the first search, or one of `dense_steps`."""
        if step.total is None:
            settled = super().is_dense_step(step)
        else:
            first, last = super().dense_step_count(step.total)
            settled = step.index < first or step.index >= step.total - last
        searches = self.searches(step.total)
        # Without any search, `plan` says so.
        return settled or (bool(searches) and step.index < searches[0])

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, call: AttentionCall) -> Plan | Dense:
        """The blocks of the last search; a search where one is due; dense where there is nothing to go by."""
        layout, index, total = call.layout, call.step.index, call.step.total
        if reason := self.dense_reason(layout):
            return Dense(reason)
        segments = self._segments(layout)
        if self._keeps(segments)[SPARSER] == segments.video_blocks:
            return Dense()
        searches = self.searches(total)
        if not searches:
            return Dense(
                f"search_steps={self.search_steps} has no step of a run of {total}; use fractions such as (0.2, 0.6)"
            )
        self._warn_once(call)
        facts = _facts(call, segments)
        known: _Choice | None = call.state.get(self.name)
        if known is None or known.facts != facts or known.step > index:
            return self._search_dense(call, segments)
        if any(known.step < step <= index for step in searches):
            if known.lse is None:  # no search was to follow: the schedule is not the one it was
                return self._search_dense(call, segments)
            found = self._search(call, segments, known.lse)
            if not found.drift <= self.lse_drift_max:  # also if it is NaN
                return self._search_dense(call, segments)
            known = self._remember(call, segments, found, found.lse if self.update_lse else known.lse)
        return Plan(known.mask(segments, layout.key_valid))

    def check(self, layout: TokenLayout) -> None:
        ragged = self._segments(layout).are_ragged and self.predicted_density(layout) < 1.0
        if ragged and self.backend != "auto" and "ragged blocks" not in FEATURES[self.backend]:
            raise SettingsError(
                f"backend={self.backend!r} takes blocks of one size only, but {layout.video_tokens} video tokens end "
                "in a shorter block before the text; use backend='auto', or a grid or block_size that fits."
            )

    def predicted_density(self, layout: TokenLayout) -> float:
        """Kept share of query-key pairs of a sparse call, for even heads and text without padding."""
        segments = self._segments(layout)
        keeps = self._keeps(segments)
        if self.dense_reason(layout) or keeps[SPARSER] == segments.video_blocks:
            return 1.0
        return 1.0 - (1.0 - keeps[BASE] / segments.video_blocks) * (layout.video_tokens / layout.tokens) ** 2

    def _search_dense(self, call: AttentionCall, segments: Segments) -> Dense:
        """A search beside a dense call, from the log-sum-exp of now (the paper's fused search)."""
        # Our own dense kernel could give the log-sum-exp, in one pass less: about 1 % of the attention of a run of 50
        # steps. But this way the output is that of the model's own attention, quantization has no part in it, and
        # reports count the call as what it is.
        found = self._search(call, segments, dense_lse(call.query, call.key, key_valid=call.layout.key_valid))
        if not found.finite:
            return Dense("query or key holds inf or NaN, so blocks cannot be ranked")
        self._remember(call, segments, found, found.lse)
        return Dense()

    def _search(self, call: AttentionCall, segments: Segments, lse: Tensor) -> "_Found":
        """The blocks that a log-sum-exp, of now or of an earlier step, finds; some heads at a time."""
        query, key, layout = call.query, call.key, call.layout
        keeps, size, bounds = self._keeps(segments), segments.size, segments.bounds(query.device)
        valid = torch.full((len(query),), layout.tokens, dtype=torch.int32, device=query.device)
        if layout.key_valid is not None:
            valid = layout.key_valid.to(query.device).expand(len(query))
        tokens = valid_tokens(bounds, valid)
        rankings, new_lse = [], []
        for heads in _head_chunks(query, segments):
            mass, now = block_mass(
                query[:, heads],
                key[:, heads],
                lse[:, heads],
                (size, size),
                query_offsets=bounds,
                key_offsets=bounds,
                query_valid=valid,
                key_valid=valid,
            )
            mass = scale_rows(mass, tokens)
            rankings.append(rank_blocks(mass, segments.video_blocks, keeps, self.force_diagonal))
            new_lse.append(now)
        columns, recall = (torch.cat(parts, dim=1) for parts in zip(*rankings, strict=True))
        tiers = head_tiers(recall, self.recall_threshold, self.guarded)
        keep = torch.tensor(keeps, device=query.device)[tiers]
        now = torch.cat(new_lse, dim=1)
        # One wait for the device: mass that is not finite makes the recall of its head NaN.
        moved, finite = torch.stack([drift(lse, now, valid), recall.isfinite().all().float()]).tolist()
        return _Found(choose_blocks(columns, keep, tokens), now, moved, bool(finite))

    def _remember(self, call: AttentionCall, segments: Segments, found: "_Found", lse: Tensor) -> "_Choice":
        index, blocks = call.step.index, found.blocks
        small = blocks.numel() <= SMALL_MASK_PAIRS
        kept = _mask(blocks, segments, call.layout.key_valid) if small else pack_blocks(blocks)
        last = index >= self.searches(call.step.total)[-1]
        choice = _Choice(_facts(call, segments), index, kept, None if last else lse)
        call.state[self.name] = choice
        return choice

    def _segments(self, layout: TokenLayout) -> Segments:
        return Segments(layout.video_tokens, layout.text_tokens, self.block_size or 64)

    def _keeps(self, segments: Segments) -> tuple[int, int, int]:
        """Video blocks that a row keeps in each tier."""
        assert self.density is not None
        densities = tier_densities(self.density) if self.head_adaptive else (self.density,) * 3
        sparser, base, denser = (keep_count(density, segments.video_blocks) for density in densities)
        return sparser, base, denser

    def dense_reason(self, layout: TokenLayout) -> str:
        if self.min_tokens == 0:
            return ""
        if layout.tokens < self.min_tokens:
            return (
                f"{layout.tokens} tokens; AdaSpa expects at least min_tokens={self.min_tokens}, "
                "use a longer or larger video or a smaller min_tokens"
            )
        blocks = self._segments(layout).video_blocks
        if blocks < LEAST_BLOCKS:
            return f"{blocks} blocks of video; AdaSpa expects at least {LEAST_BLOCKS}, use a smaller block_size"
        return ""

    def _warn_once(self, call: AttentionCall) -> None:
        """About the number of steps, once for each number."""
        total = call.step.total
        if total is None or (self.name, "steps", total, self.search_steps) in call.cache:
            return
        call.cache[self.name, "steps", total, self.search_steps] = True
        past = [step for step in self.search_steps if isinstance(step, int) and step > total]
        if past:
            warnings.warn(
                f"search_steps={self.search_steps} came with a run of {total} steps; {past} left out. Expected steps "
                "of the run, use fractions such as (0.2, 0.6).",
                AttnProcWarning,
                stacklevel=2,
            )
        sparse = max(total - sum(self.dense_step_count(total)), 0)
        if sparse < LEAST_SPARSE_SHARE * total:
            warnings.warn(
                f"{sparse} of {total} steps will be sparse, where AdaSpa expects at least {LEAST_SPARSE_SHARE:.0%}; "
                "little is gained. Use more steps, or earlier search_steps.",
                AttnProcWarning,
                stacklevel=2,
            )


class _Found(NamedTuple):
    """What a search found."""

    blocks: Tensor  # bool (B, H, N, N)
    lse: Tensor  # float32 (B, H, S), of the step of the search
    drift: float  # of that from the one it started with
    finite: bool


@dataclass(frozen=True, eq=False)
class _Choice:
    """What one layer and branch remembers of its last search."""

    facts: tuple  # what it holds for
    step: int
    kept: BlockMask | Tensor  # the mask, or its blocks packed
    lse: Tensor | None  # to search with once more

    def mask(self, segments: Segments, key_valid: Tensor | None) -> BlockMask:
        if isinstance(self.kept, BlockMask):
            return self.kept
        return _mask(unpack_blocks(self.kept, segments.blocks), segments, key_valid)


def _mask(blocks: Tensor, segments: Segments, key_valid: Tensor | None) -> BlockMask:
    # The bounds need no check, which would wait for the device.
    tokens, size, device = segments.video_tokens + segments.text_tokens, segments.size, blocks.device
    bounds = segments.bounds(device) if segments.are_ragged else None
    valid = None if key_valid is None else key_valid.to(device)
    lists = make_lists(blocks)
    return BlockMask(*lists, tokens, tokens, (size, size), valid, query_offsets=bounds, key_offsets=bounds)


def _facts(call: AttentionCall, segments: Segments) -> tuple:
    """All that must be as it was for a choice to hold."""
    query = call.query
    return segments, query.shape, query.dtype, query.device, call.layout.text_lengths


def _head_chunks(query: Tensor, segments: Segments) -> Iterator[slice]:
    batch, heads = query.shape[:2]
    step = max(CHUNK_BYTES // (batch * segments.blocks**2 * PAIR_BYTES), 1)
    return (slice(start, min(start + step, heads)) for start in range(0, heads, step))


# -- settings ----------------------------------------------------------------------------------------------------------


def _search_steps(value: Any) -> tuple[int | float, ...]:
    steps = tuple(value) if isinstance(value, tuple | list) else (value,)
    counts, fractions = ([x for x in steps if isinstance(x, kind)] for kind in (int, float))
    valid = all(_is_int(x) and x >= 0 for x in counts) and all(0.0 <= x <= 1.0 for x in fractions)
    first = [max(x, 1) for x in counts]
    ascending = all(a < b for some in (first, fractions) for a, b in pairwise(some))
    if not steps or len(counts) + len(fractions) < len(steps) or not valid or not ascending:
        raise SettingsError(
            f"search_steps={value!r} is not valid; give ascending steps, each an int from 1 (counted from 1) or a "
            "float from 0.0 to 1.0 (fraction of the run), such as (10, 30) or (0.2, 0.6)."
        )
    return steps


def _check_number(
    name: str, value: Any, expected: str, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (least <= value <= most and value > above):
        raise SettingsError(f"{name}={value!r} must be a number {expected}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
