"""VMoBA's chunks: how video tokens are cut into chunks, and chunks into the blocks of the kernels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc.layout import Grid

KINDS = ("1d", "2d", "3d")

# Chunk sizes of the paper's appendix, table 4, by latent grid (its 36-frame row prints 7 slabs where 3 frames make 12).
PUBLISHED_CHUNKS: Mapping[Grid, tuple[tuple[int, ...], ...]] = {
    (21, 30, 52): ((3,), (5, 13), (7, 5, 13)),
    (21, 45, 80): ((3,), (9, 10), (7, 15, 20)),
    (24, 36, 64): ((3,), (6, 8), (8, 12, 8)),
    (36, 30, 52): ((3,), (5, 13), (12, 10, 13)),
}


def count_chunks(grid: Grid, spec: tuple[int, ...]) -> int:
    """Chunks of a latent grid; those at the end of an axis may be shorter."""
    return math.prod(-(-axis // size) for axis, size in zip(axes_of(grid, len(spec)), spec, strict=True))


@lru_cache(maxsize=64)
def choose_chunk(grid: Grid, kind: str) -> tuple[int, ...]:
    """A chunk size for a latent grid without a published one: about 8, 40 or 72 chunks, compact and even.

    1D takes an eighth of the frames. 2D and 3D weigh the number of chunks against their shape (square tiles; boxes as
    long in frames as a tile is wide) and against axes that end in a shorter chunk; of equal ones the smallest wins.
    """
    if kind == "1d":
        return (max(1, math.floor(grid[0] / 8 + 0.5)),)
    sizes = [np.arange(min(2, axis), axis + 1) for axis in axes_of(grid, int(kind[0]))]
    spec = np.meshgrid(*sizes, indexing="ij")
    axes = axes_of(grid, len(spec))
    chunks = np.prod([-(-axis // size) for axis, size in zip(axes, spec, strict=True)], axis=0)
    ragged = np.sum([axis % size != 0 for axis, size in zip(axes, spec, strict=True)], axis=0)
    height, width = spec[-2:]
    cost = abs(np.log(chunks / (40 if kind == "2d" else 72))) + 0.5 * abs(np.log(height / width)) + 0.3 * ragged
    if kind == "3d":
        cost = cost + 0.25 * abs(np.log(spec[0] ** 2 / (height * width)))
    best = np.unravel_index(cost.round(9).argmin(), cost.shape)  # the first of equals: the smallest size
    return tuple(int(size[place]) for size, place in zip(sizes, best, strict=True))


@dataclass(frozen=True, eq=False)
class Partition:
    """Video tokens cut into chunks.

    chunk: int64 (S,), chunk of each token in raster order.
    order: int64 (S,), the tokens chunk by chunk, raster order inside.
    lengths: int64 (C,), tokens of each chunk.
    members: int64 (C, longest), tokens of each chunk; a shorter one repeats its last.
    """

    chunk: Tensor
    order: Tensor
    lengths: Tensor
    members: Tensor

    @property
    def chunks(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, grid: Grid, spec: tuple[int, ...]) -> "Partition":
        """The chunks of a latent grid, on the CPU. Sizes as in `VMoBAAttnProcessor`, numbered in raster order."""
        chunk = torch.zeros(grid, dtype=torch.int64)
        first = 1 if len(spec) == 2 else 0
        for axis, size in enumerate(spec, first):
            along = torch.arange(grid[axis]) // size
            chunk = chunk * (-(-grid[axis] // size)) + along.view([-1 if i == axis else 1 for i in range(3)])
        chunk = chunk.flatten()
        order = chunk.argsort(stable=True)
        lengths = chunk.bincount(minlength=count_chunks(grid, spec))
        ends = lengths.cumsum(0)
        return cls(chunk, order, lengths, order[_slots(ends - lengths, ends)])

    def to(self, device: torch.device | str) -> "Partition":
        return Partition(*(tensor.to(device) for tensor in (self.chunk, self.order, self.lengths, self.members)))


@dataclass(frozen=True, eq=False)
class Blocks:
    """A partition as the kernels see it: tokens chunk by chunk, then text, in blocks that end where a chunk ends.

    token_order: int32 (1, tokens).
    offsets: int32 (blocks + 1,), first position of each block and the number of tokens at the end.
    chunk: int32 (blocks,), chunk of each block; text blocks, for which nobody asks, have the last one.
    members: int64 (video blocks, longest), tokens of each block; a shorter one repeats its last.
    size: most tokens of a block.
    """

    token_order: Tensor
    offsets: Tensor
    chunk: Tensor
    members: Tensor
    size: int

    @classmethod
    def of(cls, partition: Partition, text_tokens: int, size: int) -> "Blocks":
        """Cuts each chunk, and the text, into the fewest blocks of at most `size` tokens, as equal as can be."""
        video, chunks = len(partition.order), partition.chunks
        lengths = F.pad(partition.lengths, (0, 1), value=text_tokens)
        counts = (lengths + size - 1) // size
        chunk = torch.arange(chunks + 1).repeat_interleave(counts)
        place = torch.arange(len(chunk)) - (counts.cumsum(0) - counts)[chunk]
        starts = (lengths.cumsum(0) - lengths)[chunk] + place * lengths[chunk] // counts[chunk]
        offsets = F.pad(starts, (0, 1), value=video + text_tokens)
        of_video = int(counts[:chunks].sum())
        members = partition.order[_slots(offsets[:of_video], offsets[1 : of_video + 1])]
        order = torch.cat([partition.order, torch.arange(video, video + text_tokens)])
        return cls(order.int()[None], offsets.int(), chunk.clamp(max=chunks - 1).int(), members, size)

    def to(self, device: torch.device | str) -> "Blocks":
        order, offsets, chunk = self.token_order.to(device), self.offsets.to(device), self.chunk.to(device)
        return Blocks(order, offsets, chunk, self.members.to(device), self.size)


def _slots(starts: Tensor, ends: Tensor) -> Tensor:
    """int64 (runs, longest): the positions of each run; a shorter one repeats its last."""
    longest = int((ends - starts).max())
    return torch.minimum(starts[:, None] + torch.arange(longest), ends[:, None] - 1)


def axes_of(grid: Grid, dimensions: int) -> tuple[int, ...]:
    """The axes that a chunk size of so many numbers is about."""
    return {1: grid[:1], 2: grid[1:], 3: grid}[dimensions]
