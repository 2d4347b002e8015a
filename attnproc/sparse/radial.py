"""Radial Attention: a fixed block mask in which far frames see an ever narrower band of same-position tokens.

Source: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation"
(arXiv 2506.19852), sections 3 and 4; where the paper's equation and its released code differ, the mask follows the
code, which reproduces the paper's reported densities.

Two frames d apart see each other through a band of half-width 2**(lg s - lg d) * decay_factor around the diagonal,
s the tokens per frame and lg the floor of log2: twice as far, half as wide. Where a band would get narrower than
`band_limit` tokens it keeps that share of the frames instead. Frames 0 and 1 apart see each other fully, and every
query sees all of the first frame (the sink). Text is never sparsified.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnproc.errors import AttnProcWarning, SettingsError
from attnproc.kernels import BlockMask
from attnproc.layout import AttentionCall, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan

ALIGNMENTS = ("global", "reference")
# Above this the band is wider than any published setting and little is left to save.
LARGE_DECAY = 4.0
# What `at_density` tries, and how much closer a less published rule must come.
DECAY_FACTORS = (4.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.35, 0.2, 0.1)
NEAR_DENSITY = 0.01


@dataclass(kw_only=True)
class RadialAttnProcessor(AttnProcessor):
    """Radial Attention as a processor. One mask serves every head, layer and step of a run.

    Beside the settings of `AttnProcessor`:

    Args:
        decay_factor: scales the width of the bands between frames two or more apart; above 0. Smaller is sparser,
            down to a floor: a band never gets narrower than one block to each side.
        alignment: "global" takes sequences of any length; "reference" is the released code's way of making blocks,
            block by block the same, which needs video tokens in whole blocks. Where frames are whole blocks, both
            give the same mask.
        sink_frames: first frames whose keys every query sees. 1 is the paper and the released Wan rule, 0 the
            released HunyuanVideo rule.
        adjacent_half_width: half-width of the band between neighbouring frames as a fraction of a frame, above 0 to
            1.0 (full). 0.5 is the released Wan rule before November 2025.
        band_limit: width in tokens below which a band loses frames instead of width; 128 in the released code,
            whatever the block size. Videos with fewer tokens per frame run dense, so tiny models need a smaller one.
        max_density: run dense where the mask would keep more than this share, as little could be gained.
        block_size: None is 64 below 2000 tokens per frame and 128 from there on.

    Warns (`AttnProcWarning`) if no step and no layer is dense, and above a decay factor of 4.
    """

    name: ClassVar[str] = "radial"
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "high": {"decay_factor": 1.5, "dense_steps": (0.35, 0.04), "dense_layers": 2},
        "balanced": {"decay_factor": 1.0, "dense_steps": (0.25, 1), "dense_layers": 1},
        "fast": {"decay_factor": 0.2, "dense_steps": (0.2, 0), "dense_layers": 1},
    }

    decay_factor: float | None = None
    alignment: str = "global"
    sink_frames: int = 1
    adjacent_half_width: float = 1.0
    band_limit: int = 128
    max_density: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rule(**self._rule())
        if not _is_real(self.max_density) or not 0.0 < self.max_density <= 1.0:
            raise SettingsError(
                f"max_density={self.max_density!r} must be a density above 0.0 and up to 1.0; 1.0 never runs dense."
            )
        if self.dense_steps == (0, 0) and not self.dense_layers:
            warnings.warn(
                "RadialAttnProcessor with dense_steps=0 and dense_layers=0 has no warm-up, and without one quality "
                "collapses; leave both at their defaults, or use dense_steps=2, dense_layers=2 with a length LoRA.",
                AttnProcWarning,
                stacklevel=3,
            )
        if self.decay_factor is not None and self.decay_factor > LARGE_DECAY:
            warnings.warn(
                f"RadialAttnProcessor with decay_factor={self.decay_factor} keeps almost everything; expected are "
                "0.2 to 2.0. Read predicted_density(layout) to see what it keeps.",
                AttnProcWarning,
                stacklevel=3,
            )

    def plan(self, call: AttentionCall) -> Plan | Dense:
        """The mask of this geometry, or the reason why the call is better dense. Reads no tensor data."""
        device = call.query.device
        key = (self.name, *self._geometry(call.layout), *self._rule().values(), self.max_density, str(device))
        if key not in call.cache:
            decided = self._decide(call.layout)
            call.cache[key] = decided if isinstance(decided, Dense) else decided.to(device)
        decided, valid = call.cache[key], call.layout.key_valid
        if isinstance(decided, Dense):
            return decided
        if valid is None:
            return Plan(decided)
        # All layers of a step have the same padding: sharing one mask also shares what backends derive from it.
        lengths = call.layout.text_lengths
        known, mask = call.cache.get((key, "padded"), (None, None))
        if known != lengths:
            mask = decided.with_key_valid(valid)
            call.cache[key, "padded"] = lengths, mask
        return Plan(mask)

    def dense_reason(self, layout: TokenLayout) -> str:
        decided = self._decide(layout)
        return decided.reason if isinstance(decided, Dense) else ""

    def check(self, layout: TokenLayout) -> None:
        frames, per_frame, _, size = self._geometry(layout)
        if self.alignment == "reference" and frames > 1:
            _check_whole_blocks(frames, per_frame, size)

    def mask(self, layout: TokenLayout) -> BlockMask:
        """The mask of a layout on the CPU, also where `plan` prefers dense attention; all text counted as valid."""
        return _cpu_mask(*self._geometry(layout), **self._rule())

    def predicted_density(self, layout: TokenLayout) -> float:
        decided = self._decide(layout)
        return 1.0 if isinstance(decided, Dense) else decided.density

    @classmethod
    def at_density(
        cls, density: float, layout: TokenLayout, settings: Mapping[str, Any] | None = None
    ) -> "RadialAttnProcessor":
        """The rule that comes closest to a density: first the published one at every decay factor, then narrower ones.

        The rule has a floor, frames 0 and 1 apart and the sink being full, which small grids reach early; below it the
        neighbours' band gets narrower and at last the sink is given up.
        """
        shared = {**(settings or {}), "max_density": 1.0}
        best: tuple[float, RadialAttnProcessor] | None = None
        for adjacent, sink in ((1.0, 1), (0.5, 1), (0.25, 1), (0.25, 0), (0.125, 0)):
            for decay in DECAY_FACTORS:
                rule = {"decay_factor": decay, "adjacent_half_width": adjacent, "sink_frames": sink}
                found = cls.from_settings({**shared, **rule})
                away = abs(found.predicted_density(layout) - density)
                if best is None or away < best[0] - NEAR_DENSITY:
                    best = away, found
        assert best is not None
        return best[1]

    def row_counts(self, layout: TokenLayout) -> Tensor:
        """int32 (query blocks,): key blocks kept in each row of the mask."""
        return self.mask(layout).row_counts[0, 0]

    def mask_picture(self, layout: TokenLayout) -> np.ndarray:
        """uint8 (query blocks, key blocks): 255 where a block is kept; `PIL.Image.fromarray` takes it as it is."""
        return self.mask(layout).to_blocks()[0, 0].numpy().astype(np.uint8) * 255

    def mask_text(self, layout: TokenLayout) -> str:
        """The mask as text, one line for each query block: '#' is a kept key block, '.' a dropped one."""
        return "\n".join("".join("#" if kept else "." for kept in row) for row in self.mask_picture(layout))

    def _geometry(self, layout: TokenLayout) -> tuple[int, int, int, int]:
        frames, rows, columns = layout.grid
        size = self.block_size or (64 if rows * columns < 2000 else 128)
        return frames, rows * columns, layout.text_tokens, size

    def _rule(self) -> dict[str, Any]:
        names = ("decay_factor", "alignment", "sink_frames", "adjacent_half_width", "band_limit")
        return {name: getattr(self, name) for name in names}

    def _decide(self, layout: TokenLayout) -> BlockMask | Dense:
        frames, per_frame, _, size = self._geometry(layout)
        if frames == 1:
            return Dense()
        if per_frame < self.band_limit:
            return Dense(
                f"{per_frame} tokens per frame; Radial Attention expects at least band_limit={self.band_limit}, "
                "use a larger picture or a smaller band_limit"
            )
        if frames * per_frame < 4 * size:
            return Dense(
                f"{frames * per_frame} video tokens; expected at least 4 blocks of {size}, "
                "use a longer video or a smaller block_size"
            )
        mask = self.mask(layout)
        if mask.density > self.max_density:
            return Dense(
                f"a density of {mask.density:.3f} where at most max_density={self.max_density} pays, "
                "use a longer video, a smaller decay_factor or a larger max_density"
            )
        return mask


def half_width(
    distance: int,
    tokens_per_frame: int,
    block_size: int,
    decay_factor: float,
    adjacent_half_width: float = 1.0,
    band_limit: int = 128,
) -> int | None:
    """Largest distance of positions (in tokens, raster order) that two frames `distance` apart may see.

    None if the pair of frames is dropped. Thinning does not depend on the decay factor. Released code, `attn_mask.py`.
    """
    width = 2.0 ** (tokens_per_frame.bit_length() - distance.bit_length())
    if width < band_limit and distance % int(band_limit / width) != 0:
        return None
    if distance == 0:
        return tokens_per_frame
    if distance == 1:
        return int(adjacent_half_width * tokens_per_frame)
    return int(min(tokens_per_frame, max(block_size, width * decay_factor)))


def radial_blocks(
    frames: int,
    tokens_per_frame: int,
    text_tokens: int = 0,
    *,
    block_size: int,
    decay_factor: float = 1.0,
    alignment: str = "global",
    sink_frames: int = 1,
    adjacent_half_width: float = 1.0,
    band_limit: int = 128,
) -> Tensor:
    """The block mask of Radial Attention, bool (N, N) on the CPU, N = ceil((V + text) / block), V the video tokens.

    A block is kept if more than 60 % of its key tokens that any of its queries sees are dense: seen by more than a
    third of its queries. "reference" asks this for each pair of frames apart, with the full block size as the number
    of queries, and keeps a block that any pair keeps; "global" asks it once for the tokens a block really has, so it
    also answers where frames or the sequence end inside a block. Rows and columns from the first block with text on
    are all kept.

    No token mask is built: the queries of one frame see an interval of keys, so counts are differences of ends.

    Raises:
        SettingsError: a rule setting is not valid, or "reference" was asked for V not in whole blocks.
    """
    _check_rule(decay_factor, alignment, sink_frames, adjacent_half_width, band_limit)
    for name, value, least in (
        ("frames", frames, 1),
        ("tokens_per_frame", tokens_per_frame, 1),
        ("text_tokens", text_tokens, 0),
        ("block_size", block_size, 1),
    ):
        if not _is_int(value) or value < least:
            raise SettingsError(f"{name}={value!r} must be an int of at least {least}; read it from the latent grid.")
    by_distance = [
        half_width(d, tokens_per_frame, block_size, decay_factor, adjacent_half_width, band_limit)
        for d in range(frames)
    ]
    frame = np.arange(frames)
    # Dropped pairs get a width so negative that every interval is empty.
    widths = np.array([-2 * tokens_per_frame if w is None else w for w in by_distance], dtype=np.int32)
    widths = widths[abs(frame[:, None] - frame)]
    widths[:, :sink_frames] = tokens_per_frame
    video = frames * tokens_per_frame
    if alignment == "reference":
        _check_whole_blocks(frames, tokens_per_frame, block_size)
        video_blocks = _reference_blocks(widths, tokens_per_frame, block_size)
    else:
        video_blocks = _global_blocks(widths, tokens_per_frame, block_size)
    if text_tokens == 0:
        return torch.from_numpy(video_blocks)
    total = -(-(video + text_tokens) // block_size)
    blocks = np.ones((total, total), dtype=bool)
    whole = video // block_size  # a last video block that ends inside a text block counts as text
    blocks[:whole, :whole] = video_blocks[:whole, :whole]
    return torch.from_numpy(blocks)


@lru_cache(maxsize=8)
def _cpu_mask(frames: int, tokens_per_frame: int, text_tokens: int, block_size: int, **rule: Any) -> BlockMask:
    blocks = radial_blocks(frames, tokens_per_frame, text_tokens, block_size=block_size, **rule)
    tokens = frames * tokens_per_frame + text_tokens
    return BlockMask.from_blocks(blocks, tokens, tokens, (block_size, block_size))


class _Pieces(NamedTuple):
    """The video tokens cut at every block and frame boundary, in order; int32 arrays (pieces,)."""

    frame: np.ndarray
    first: np.ndarray  # position in its frame
    last: np.ndarray
    block: np.ndarray
    starts: np.ndarray  # (blocks,) index of each block's first piece

    def where(self, condition: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks (rows,), first and last positions (rows, 1) of some pieces, to set against all pieces."""
        return self.block[condition], self.first[condition, None], self.last[condition, None]


def _cut(frames: int, tokens_per_frame: int, block_size: int) -> _Pieces:
    video = frames * tokens_per_frame
    cuts = np.union1d(np.arange(0, video, block_size), np.arange(0, video, tokens_per_frame)).astype(np.int32)
    ends = np.append(cuts[1:], np.int32(video))
    frame = cuts // np.int32(tokens_per_frame)
    block = cuts // np.int32(block_size)
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    return _Pieces(frame, cuts - frame * tokens_per_frame, ends - 1 - frame * tokens_per_frame, block, starts)


def _seen(
    first: np.ndarray, last: np.ndarray, width: np.ndarray, least: Any, keys: _Pieces
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of each piece seen by any, and by at least `least`, of the queries `first..last` of one frame.

    A key at l is seen by the queries from l - width to l + width, so those seen by `least` queries are the interval
    from first + least - 1 - width to last - least + 1 + width, if so many queries fit into the band at all.
    """
    low = np.maximum(first - width, keys.first)
    high = np.minimum(last + width, keys.last)
    touched = np.maximum(high - low + 1, 0)
    low = np.maximum(first + (least - 1) - width, keys.first)
    high = np.minimum(last - (least - 1) + width, keys.last)
    possible = np.minimum(last - first, 2 * width) + 1 >= least
    return touched, np.where(possible, np.maximum(high - low + 1, 0), 0)


def _reference_blocks(widths: np.ndarray, tokens_per_frame: int, block_size: int) -> np.ndarray:
    pieces = _cut(len(widths), tokens_per_frame, block_size)
    # The released code cuts every pair of frames to as many blocks as one frame has when it starts on a block.
    first_block = pieces.frame * tokens_per_frame // block_size
    on_canvas = pieces.block - first_block < -(-tokens_per_frame // block_size)
    blocks = np.zeros((len(pieces.starts), len(pieces.starts)), dtype=bool)
    for i, width in enumerate(widths):
        row, first, last = pieces.where((pieces.frame == i) & on_canvas)
        touched, dense = _seen(first, last, width[pieces.frame], block_size // 3 + 1, pieces)
        kept = (5 * dense > 3 * touched) & on_canvas
        blocks[row] |= np.logical_or.reduceat(kept, pieces.starts, axis=1)
    return blocks


def _global_blocks(widths: np.ndarray, tokens_per_frame: int, block_size: int) -> np.ndarray:
    pieces = _cut(len(widths), tokens_per_frame, block_size)
    blocks = np.zeros((len(pieces.starts), len(pieces.starts)), dtype=bool)
    parts = np.diff(pieces.starts, append=len(pieces.block))

    def keep(touched: np.ndarray, dense: np.ndarray) -> np.ndarray:
        touched = np.add.reduceat(touched, pieces.starts, axis=-1)
        return 5 * np.add.reduceat(dense, pieces.starts, axis=-1) > 3 * touched

    for i, width in enumerate(widths):
        row, first, last = pieces.where((pieces.frame == i) & (parts[pieces.block] == 1))
        if len(row):
            blocks[row] = keep(*_seen(first, last, width[pieces.frame], (last - first + 1) // 3 + 1, pieces))
    for mixed in np.flatnonzero(parts > 1):
        segments = slice(pieces.starts[mixed], pieces.starts[mixed] + parts[mixed])
        blocks[mixed] = keep(*_seen_by_several(pieces, segments, widths))
    np.fill_diagonal(blocks, True)
    return blocks


def _seen_by_several(pieces: _Pieces, segments: slice, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_seen` for a query block that holds tokens of several frames, `segments` of the pieces.

    The counts of several frames add up, so they are taken per key token, once for all key frames of equal widths.
    """
    query_frames = pieces.frame[segments]
    classes, which = np.unique(widths[query_frames].T, axis=0, return_inverse=True)
    position = np.arange(int(pieces.last.max()) + 1, dtype=np.int32)
    low, high = position - classes[..., None], position + classes[..., None]  # (classes, segments, positions)
    first, last = pieces.first[segments, None], pieces.last[segments, None]
    queries = np.maximum(np.minimum(last, high) - np.maximum(first, low) + 1, 0).sum(axis=1)
    size = int((pieces.last[segments] - pieces.first[segments] + 1).sum())
    which = which.reshape(-1)[pieces.frame]

    def per_piece(condition: np.ndarray) -> np.ndarray:
        total = np.pad(condition.cumsum(axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        return total[which, pieces.last + 1] - total[which, pieces.first]

    return per_piece(queries > 0), per_piece(3 * queries > size)


def _check_rule(decay_factor: Any, alignment: Any, sink_frames: Any, adjacent_half_width: Any, band_limit: Any) -> None:
    if not _is_real(decay_factor) or decay_factor <= 0:
        raise SettingsError(f"decay_factor={decay_factor!r} must be a finite number above 0; 1.0 is a good start.")
    if alignment not in ALIGNMENTS:
        raise SettingsError(f"alignment={alignment!r} is not known; choose one of {', '.join(ALIGNMENTS)}.")
    if not _is_int(sink_frames) or sink_frames < 0:
        raise SettingsError(f"sink_frames={sink_frames!r} must be an int of at least 0; 1 is the paper's sink.")
    if not _is_real(adjacent_half_width) or not 0 < adjacent_half_width <= 1:
        raise SettingsError(
            f"adjacent_half_width={adjacent_half_width!r} must be a fraction of a frame above 0 and up to 1.0; "
            "1.0 lets neighbouring frames see each other fully."
        )
    if not _is_int(band_limit) or band_limit < 1:
        raise SettingsError(f"band_limit={band_limit!r} must be an int of at least 1 token; published masks use 128.")


def _check_whole_blocks(frames: int, tokens_per_frame: int, block_size: int) -> None:
    video = frames * tokens_per_frame
    if video % block_size == 0:
        return
    step = block_size // math.gcd(tokens_per_frame, block_size)
    legal = [n for n in (frames // step * step, -(-frames // step) * step) if n > 0]
    raise SettingsError(
        f"alignment='reference' got V={video} video tokens ({frames} latent frames of {tokens_per_frame}) with "
        f"B={block_size} tokens per block; it expects V in whole blocks. Use {' or '.join(map(str, legal))} latent "
        f"frames of this size, block_size={math.gcd(video, block_size)}, or alignment='global', which takes any size."
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
