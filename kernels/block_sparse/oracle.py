"""Plain float64 definitions. Slow, S x S in memory, and what every backend is tested against."""

import torch
from torch import Tensor

from .block_mask import BlockMask


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask` lets each query see.

    query (B, H, Sq, D), key and value (B, H, Sk, D), any floating dtype; scale defaults to D ** -0.5.
    Returns out (B, H, Sq, D) and the natural-log log-sum-exp of the scaled scores (B, H, Sq), both float64.
    A query that sees no key gets out 0 and log-sum-exp -inf.
    """
    query, key, value = query.double(), key.double(), value.double()
    if scale is None:
        scale = query.shape[-1] ** -0.5
    visible = mask.token_mask()
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~visible, 0.0)
    # A key nobody sees must not matter, whatever it holds: 0 * inf would be NaN.
    seen = visible.any(dim=(1, 2)).reshape(-1, 1, key.shape[2], 1)
    return weights @ value.masked_fill(~seen, 0.0), lse
