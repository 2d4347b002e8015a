"""`selection.largest` in Triton: the score of the last one that is kept, found bit by bit, without sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NAN_CODE = tl.constexpr(0xFFC00000)


@triton.jit
def largest_kernel(scores, limits, kept, columns, COLUMNS: tl.constexpr, BY_SHARE: tl.constexpr):
    """One row. Scores become integers in the same order (`code`), each with an amount: 1, or its share of the softmax.

    `cut` is the largest code at and above which the amounts exceed the limit: all above it are kept, and of those
    equal to it the first ones, as far as the limit goes. Where not even all amounts exceed it the cut stays below all.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    there = column < columns
    score = tl.load(scores + row * columns + column, mask=there, other=float("-inf")) + 0.0  # one zero of two
    limit = tl.load(limits + row)
    bits = score.to(tl.uint32, bitcast=True)
    code = tl.where(score < 0.0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    code = tl.where(score == score, code, NAN_CODE)
    if BY_SHARE:
        peak = tl.max(tl.where(there, score, float("-inf")), 0)
        amount = tl.where(there, tl.exp(score - peak), 0.0)
        total = tl.sum(amount, 0)
        # Where there is no softmax nothing has a share, and the first one is kept below.
        ordinary = (total < float("inf")) & (tl.sum((there & (score != score)).to(tl.int32), 0) == 0)
        amount = tl.where(ordinary, amount, 1.0)
        goal = tl.where(ordinary, limit * total, 0.0)
        goal = tl.where(limit >= 1.0, float("inf"), tl.where(limit >= 0.0, goal, 0.0))
    else:
        amount = tl.where(there, 1.0, 0.0)
        goal = limit
    cut = tl.full((), 0, tl.uint32)
    for place in tl.static_range(32):
        trial = cut | (1 << (31 - place))
        reached = tl.sum(tl.where(there & (code >= trial), amount, 0.0), 0)
        cut = tl.where(reached > goal, trial, cut)
    above = there & (code > cut)
    equal = there & (code == cut)
    before = tl.sum(tl.where(above, amount, 0.0), 0)
    each = tl.max(tl.where(equal, amount, 0.0), 0)
    rank = tl.cumsum(equal.to(tl.int32), 0)
    chosen = above | (equal & (before + rank.to(tl.float32) * each <= goal))
    if BY_SHARE:
        # One at least: if the largest alone exceeds the share, the cut is at its code.
        none_above = tl.sum(above.to(tl.int32), 0) == 0
        chosen = chosen | (equal & none_above & (rank == 1))
    tl.store(kept + row * columns + column, chosen.to(tl.uint8), mask=there)


def largest(scores: Tensor, limits: Tensor, *, by_share: bool) -> Tensor:
    """See `selection.largest`; limits: the shape of scores without its last dimension."""
    columns = scores.shape[-1]
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not kept.numel():
        return kept
    width = triton.next_power_of_2(columns)
    with torch.cuda.device_of(scores):
        largest_kernel[(kept.numel() // columns,)](
            scores.contiguous(), limits.to(torch.float32).contiguous(), kept.view(torch.uint8), columns,
            COLUMNS=width, BY_SHARE=by_share, num_warps=min(max(width // 512, 1), 16),
        )  # fmt: skip
    return kept
