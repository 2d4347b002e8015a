"""Choosing blocks by their scores: the largest of each row, a number of them or a share of their softmax."""

from typing import Any

import torch
from torch import Tensor

from .errors import bad_argument
from .scores import choose_backend_for

ROW_LIMIT = 1 << 13  # columns of a row that one program of the Triton kernel holds in registers


@torch.no_grad()
def largest(
    scores: Tensor, *, count: int | Tensor | None = None, share: float | Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """bool, shape of scores (..., N): the largest of each row; of equal ones the first come first.

    scores: float32. -inf ranks last, NaN first.
    count: how many of each row, all if there are not so many; an integer, or a tensor of the shape of scores without N
        or one that broadcasts to it. Below 1 it is none.
    share: as many as have together at most this share, from 0 to 1, of the softmax of their row, and at least one; a
        number, or a tensor as for `count`. At 1 it is all of them. A row that has no softmax (all -inf, +inf or NaN in
        it) keeps one. Shares are sums in float32, rounded in an order of their own.
    backend: "auto" ("triton" for CUDA tensors, "cpu" for CPU tensors), or one of those.

    Exactly one of count and share; what does not fit raises ValueError. On a GPU rows of up to 8192 are neither sorted
    nor waited for.
    """
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32 or scores.ndim < 1 or scores.shape[-1] == 0:
        came = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise bad_argument("scores", came, "a float32 tensor (..., N), N at least 1", "Use .float().")
    if (count is None) == (share is None):
        raise bad_argument("count", f"count={count!r} and share={share!r}", "exactly one of them", "Leave one out.")
    name: str = "count" if share is None else "share"
    amount: Any = count if share is None else share
    rows = scores.shape[:-1]
    dtype = torch.int64 if share is None else torch.float32
    if isinstance(amount, Tensor):
        right = amount.is_floating_point() if share is not None else amount.dtype in (torch.int32, torch.int64)
    else:
        right = isinstance(amount, int if share is None else (int, float)) and not isinstance(amount, bool)
    if not right:
        came = str(amount.dtype) if isinstance(amount, Tensor) else repr(amount)
        expected = "integers" if share is None else "floating point numbers"
        raise bad_argument(name, came, expected, "count counts blocks, share is a share from 0 to 1.")
    if isinstance(amount, Tensor):
        limit = amount.to(scores.device, dtype)
    else:
        limit = torch.full((), max(min(amount, scores.shape[-1]), 0), dtype=dtype, device=scores.device)
    try:
        limit = limit.expand(rows)
    except RuntimeError:
        raise bad_argument(
            name, f"shape {tuple(limit.shape)}", f"a shape that broadcasts to {tuple(rows)}", "Give one for each row."
        ) from None
    if choose_backend_for(scores, backend) == "triton" and scores.shape[-1] <= ROW_LIMIT:
        from . import triton_selection

        return triton_selection.largest(scores, limit, by_share=share is not None)
    return _by_share(scores, limit) if share is not None else _by_count(scores, limit)


def _by_count(scores: Tensor, count: Tensor) -> Tensor:
    most = min(int(count.max()), scores.shape[-1]) if count.numel() else 0
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Only the last of those kept can have equals that are not.
    ranked = scores.topk(most).values
    least = ranked.gather(-1, (count.clamp(1, most) - 1).long()[..., None])
    # NaN is larger than all and equal to itself here, as in sorting.
    bare = least.isnan()
    above = torch.where(bare, False, (scores > least) | scores.isnan())
    equal = torch.where(bare, scores.isnan(), scores == least)
    left = count[..., None] - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= left))


def _by_share(scores: Tensor, share: Tensor) -> Tensor:
    # Ranked by score, not by share: distant shares underflow to 0 and would tie.
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    kept = ranked.softmax(-1).cumsum(-1) <= share[..., None]
    kept[..., 0] = True
    kept |= (share >= 1.0)[..., None]  # a running sum may end above 1
    return torch.zeros_like(kept).scatter_(-1, order, kept)
