"""Lists of kept blocks from a boolean map, on the GPU and without waiting for it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # columns taken at a time


@triton.jit
def make_lists_kernel(
    blocks, counts, indices, blocks_sample, blocks_head, blocks_row, blocks_column, heads, rows, columns, width,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One row: its True columns in ascending order, then zeros."""
    place = tl.program_id(0).to(tl.int64)
    row, head, sample = place % rows, (place // rows) % heads, place // rows // heads
    blocks += sample * blocks_sample + head * blocks_head + row * blocks_row
    indices += place * width
    steps = tl.arange(0, CHUNK)
    count = 0
    for first in range(0, columns, CHUNK):
        column = first + steps
        kept = tl.load(blocks + column.to(tl.int64) * blocks_column, mask=column < columns, other=0) != 0
        slot = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(indices + slot, column, mask=kept & (slot < width))
        count += tl.sum(kept.to(tl.int32), 0)
    count = tl.minimum(count, width)
    tl.store(counts + place, count)
    for first in range(0, width, CHUNK):
        slot = first + steps
        tl.store(indices + slot, tl.zeros_like(slot), mask=(slot >= count) & (slot < width))


def make_lists(blocks: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Counts int32 (Bm, Hm, N) and ascending lists int32 (Bm, Hm, N, width) of the True columns of each row.

    blocks: bool (Bm, Hm, N, columns), any strides. width: the most blocks that a row keeps, where that is known; None
    leaves room for all columns. Of rows that keep more, the last blocks are dropped. Entries past a count are 0.
    """
    samples, heads, rows, columns = blocks.shape
    width = max(columns if width is None else width, 1)
    counts = torch.empty(samples, heads, rows, dtype=torch.int32, device=blocks.device)
    indices = torch.empty(samples, heads, rows, width, dtype=torch.int32, device=blocks.device)
    if counts.numel():
        with torch.cuda.device_of(blocks):
            make_lists_kernel[(counts.numel(),)](
                blocks.view(torch.uint8), counts, indices, *blocks.stride(), heads, rows, columns, width,
                CHUNK=min(CHUNK, triton.next_power_of_2(max(columns, width))),
            )  # fmt: skip
    return counts, indices
