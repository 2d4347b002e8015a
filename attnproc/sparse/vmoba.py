"""VMoBA: every query token reads its own chunk of keys and the chunks whose mean key it matches best.

Source: "VMoBA: Mixture-of-Block Attention for Video Diffusion Models" (arXiv 2506.23858), section 3 and appendix A;
where the equations leave a question open, the rules are those of the released code.

Layers take turns with three ways of cutting the latent grid into chunks: slabs of frames (1D), spatial tiles through
all frames (2D), boxes (3D). A query's score for a chunk is its product with the mean key of the chunk, in float32;
the best scores win, by number (top-k) or until they hold a share of all score (threshold). The selection is per query
token: only the key side is blocked. Text is never gated: it sees everything and is seen by everything.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc.errors import SettingsError
from attnproc.kernels import BlockMask, ChunkBits
from attnproc.layout import AttentionCall, Grid, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.vmoba_chunks import (
    KINDS,
    PUBLISHED_CHUNKS,
    Blocks,
    Partition,
    axes_of,
    choose_chunk,
    count_chunks,
)
from attnproc.sparse.vmoba_selection import check_selection, selections

# Densities that the paper's table 3c reports for thresholds on Wan 2.1, and the two ends.
PUBLISHED_DENSITIES = ((0.0, 0.0), (0.15, 0.13), (0.25, 0.19), (0.35, 0.27), (0.5, 0.39), (1.0, 1.0))


@dataclass(kw_only=True)
class VMoBAAttnProcessor(AttnProcessor):
    """VMoBA as a processor. The selection is made anew in every call, for each sample by itself, and nothing is kept.

    Made for training: with `scope="head_global", mode="threshold", dense_steps=0` a model can be fine-tuned through it,
    gradients flow through the attention and the selection is a constant. The defaults are those for use without
    training; the video then still differs visibly from the dense one, and below some 33,000 tokens the paper found no
    gain in time. Videos below `min_tokens` run dense.

    The density in reports is the computed one: a block of queries computes every chunk that one of its queries
    selected. `pair_density` counts the selected pairs alone.

    Beside the settings of `AttnProcessor`:

    Args:
        partitions: what layers take in turn, from the first layer that is not dense: each "1d", "2d" or "3d", whose
            chunk size follows from the latent grid (published sizes where there are any, else `choose_chunk`), or a
            chunk size in latent tokens: (frames,), (rows, columns) or (frames, rows, columns). Chunks at the end of an
            axis may be shorter.
        mode: "topk" selects a number of chunks, "threshold" until the selected have a share of all score.
        scope: the pairs of query and chunk that share one budget: those of one "query_head", of one head of a sample
            ("head_global", the paper's global selection), of all heads of a sample ("overall"), or of one chunk
            ("block", threshold only). Under context parallelism the last two see the heads of one rank.
        density: top-k selects max(2, floor(density * chunks + 0.5)) chunks for each query, its own included.
        topk: the number itself, one for all partitions or one for each; None leaves it to `density`.
        threshold: share of the score, linear between the smallest (0) and the largest (1) of a group, from 0.0 to 1.0.
        min_tokens: videos with fewer tokens run dense. Tiny models need 0.
        block_size: None is 64. Chunks are cut into equal blocks of at most this many tokens.
    """

    name: ClassVar[str] = "vmoba"
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "high": {"density": 0.35, "threshold": 0.35, "dense_steps": (0.35, 0)},
        "balanced": {"density": 0.25, "threshold": 0.25, "dense_steps": (0.25, 0)},
        "fast": {"density": 0.15, "threshold": 0.15, "dense_steps": (0.2, 0)},
    }

    partitions: Any = KINDS
    mode: str = "topk"
    scope: str = "query_head"
    density: Any = None
    topk: Any = None
    threshold: Any = None
    min_tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self.partitions = _partitions(self.partitions)
        check_selection(self.mode, self.scope)
        if not _is_real(self.density) or not 0.0 < self.density <= 1.0:
            raise SettingsError(f"density={self.density!r} must be above 0.0 and up to 1.0; 0.25 is the published one.")
        if not _is_real(self.threshold) or not 0.0 <= self.threshold <= 1.0:
            raise SettingsError(
                f"threshold={self.threshold!r} must be a share from 0.0 to 1.0; 0.25 is the published one."
            )
        self.topk = tuple(self.topk) if isinstance(self.topk, list) else self.topk
        counts = self.topk if isinstance(self.topk, tuple) else () if self.topk is None else (self.topk,)
        if not all(_is_int(count) and count >= 1 for count in counts):
            raise SettingsError(
                f"topk={self.topk!r} must be an int of at least 1, one for each partition, or None for the rule of "
                "`density`; a query's own chunk is one of them."
            )
        if isinstance(self.topk, tuple) and len(self.topk) != len(self.partitions):
            raise SettingsError(
                f"topk={self.topk!r} has {len(self.topk)} numbers for {len(self.partitions)} partitions; "
                "give one number for all of them, or one for each."
            )
        if not _is_int(self.min_tokens) or self.min_tokens < 0:
            raise SettingsError(f"min_tokens={self.min_tokens!r} must be an int of at least 0; 0 never runs dense.")

    def plan(self, call: AttentionCall) -> Plan | Dense:
        """Selects the chunks of every query of the call."""
        layout, turn = call.layout, self.turn(call.layer)
        if reason := self.dense_reason(layout):
            return Dense(reason)
        spec = self.chunk_size(layout.grid, turn)
        if self._keeps_all(count_chunks(layout.grid, spec), turn):
            return Dense()
        size, device = self.block_size or 64, call.query.device
        key = (self.name, layout.grid, spec, layout.text_tokens, size, str(device))
        if key not in call.cache:
            partition = Partition.of(layout.grid, spec)
            call.cache[key] = partition.to(device), Blocks.of(partition, layout.text_tokens, size).to(device)
        partition, blocks = call.cache[key]
        video = layout.video_tokens
        mask = _mask(
            selections(call.query[:, :, :video], call.key[:, :, :video], partition, **self._how(turn, partition)),
            blocks,
            call.query.shape[:2],
            layout.key_valid,
        )
        if isinstance(mask, Dense):
            return mask
        return Plan(mask, token_order=None if len(spec) == 1 else blocks.token_order)  # slabs are in order already

    def kernel_features(self) -> frozenset[str]:
        return frozenset(("token_order", "partial blocks", "ragged blocks"))

    def predicted_density(self, layout: TokenLayout) -> float:
        """Share of query-key pairs selected, the mean over the partitions.

        Top-k is exact where chunks are equal; a threshold's density is that of the paper on Wan 2.1. What is computed
        is more, by as much as the queries of a block disagree.
        """
        if self.dense_reason(layout):
            return 1.0
        video, tokens = layout.video_tokens, layout.tokens
        kept = np.mean([self._density(layout.grid, turn) for turn in range(len(self.partitions))])
        return float(1.0 - (1.0 - kept) * (video / tokens) ** 2)

    def turn(self, layer: int) -> int:
        """Which of the partitions a layer takes: sparse layers count from the first one that is not dense."""
        return sum(not self.is_dense_layer(below) for below in range(layer)) % len(self.partitions)

    def chunk_size(self, grid: Grid, turn: int) -> tuple[int, ...]:
        """Chunk size of one of the partitions on a latent grid, no larger than the grid."""
        wanted = self.partitions[turn]
        if isinstance(wanted, str):
            published = PUBLISHED_CHUNKS.get(grid)
            return choose_chunk(grid, wanted) if published is None else published[KINDS.index(wanted)]
        return tuple(min(size, axis) for size, axis in zip(wanted, axes_of(grid, len(wanted)), strict=True))

    def chunk_budget(self, chunks: int, turn: int) -> int:
        """Chunks that top-k selects of so many in one of the partitions; each query's own is one of them."""
        if self.topk is None:
            return min(chunks, max(2, math.floor(self.density * chunks + 0.5)))
        return min(chunks, self.topk[turn] if isinstance(self.topk, tuple) else self.topk)

    def _how(self, turn: int, partition: Partition) -> dict[str, Any]:
        topk = self.chunk_budget(partition.chunks, turn)
        return {"mode": self.mode, "scope": self.scope, "topk": topk, "threshold": self.threshold}

    def dense_reason(self, layout: TokenLayout) -> str:
        if layout.video_tokens >= self.min_tokens:
            return ""
        return (
            f"{layout.video_tokens} video tokens; VMoBA expects at least min_tokens={self.min_tokens}, as below it "
            "selecting costs more than it saves, use a longer or larger video or a smaller min_tokens"
        )

    def _keeps_all(self, chunks: int, turn: int) -> bool:
        """Whether the selection would be dense attention, whatever the data."""
        if self.mode == "topk":
            return self.chunk_budget(chunks, turn) >= chunks
        return chunks == 1 or self.threshold >= 1.0

    def _density(self, grid: Grid, turn: int) -> float:
        spec = self.chunk_size(grid, turn)
        chunks = count_chunks(grid, spec)
        if self._keeps_all(chunks, turn):
            return 1.0
        shares = Partition.of(grid, spec).lengths.double().numpy() / math.prod(grid)
        own = float(shares @ shares)
        if self.mode == "threshold":
            thresholds, densities = zip(*PUBLISHED_DENSITIES, strict=True)
            return max(own, float(np.interp(self.threshold, thresholds, densities)))
        # Every other chunk counts as equally likely.
        return own + (self.chunk_budget(chunks, turn) - 1) * (1.0 - own) / (chunks - 1)


# -- from a selection to a mask ----------------------------------------------------------------------------------------


def _mask(
    chosen: Iterator[tuple[Tensor, Tensor]], blocks: Blocks, leading: torch.Size, key_valid: Tensor | None
) -> BlockMask | Dense:
    """Query blocks that agree on a chunk see its blocks as a whole; where they do not, bits decide token by token."""
    tokens, video_blocks = blocks.token_order.shape[1], len(blocks.members)
    text_blocks = len(blocks.chunk) - video_blocks
    every, some, bits, finite = [], [], [], []
    for selected, is_finite in chosen:
        of_block = selected[:, blocks.members]
        every.append(of_block.all(2))
        some.append(of_block.any(2))
        in_order = selected[:, blocks.token_order[0, : selected.shape[1]]]
        bits.append(ChunkBits.from_selection(in_order[None], blocks.chunk).bits[0])
        finite.append(is_finite)
    if not bool(torch.stack(finite).all()):
        return Dense("query or key holds inf or NaN, so chunks cannot be ranked")

    def by_block(of_chunks: list[Tensor], text: bool) -> Tensor:
        seen = torch.cat(of_chunks).unflatten(0, leading)[..., blocks.chunk[:video_blocks]]
        return F.pad(seen, (0, text_blocks, 0, text_blocks), value=text)

    packed = torch.cat(bits).unflatten(0, leading)
    packed = F.pad(packed, (0, 0, 0, tokens - packed.shape[2]))  # text has no use for them: its blocks are whole
    return BlockMask.from_blocks(
        by_block(every, text=True),
        tokens,
        tokens,
        (blocks.size, blocks.size),
        key_valid,
        partial=by_block(some, text=False),
        rule=ChunkBits(packed, blocks.chunk),
        query_offsets=blocks.offsets,
        key_offsets=blocks.offsets,
    )


# -- settings ----------------------------------------------------------------------------------------------------------


def _partitions(value: Any) -> tuple[str | tuple[int, ...], ...]:
    entries = tuple(tuple(n) if isinstance(n, list) else n for n in value) if isinstance(value, list | tuple) else ()
    for entry in entries:
        size = isinstance(entry, tuple) and 1 <= len(entry) <= 3 and all(_is_int(n) and n >= 1 for n in entry)
        if not size and entry not in KINDS:
            raise SettingsError(
                f"partitions={value!r} holds {entry!r}; give '1d', '2d' or '3d', or a chunk size of 1 to 3 ints of at "
                "least 1: (frames,), (rows, columns) or (frames, rows, columns)."
            )
    if not entries:
        raise SettingsError(f"partitions={value!r} must be a list of partitions; ('1d', '2d', '3d') is the paper's.")
    return entries


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
