"""Plain float64 definitions. Slow, S x S in memory, and what every backend is tested against."""

import math

import torch
from torch import Tensor

from .block_mask import BlockMask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float | None = None,
    *,
    key_bias: Tensor | None = None,
    token_order: Tensor | None = None,
    skip_threshold: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask` lets each query see.

    query (B, H, Sq, D), key and value (B, H, Sk, D), any floating dtype; scale defaults to D ** -0.5. The other
    arguments are those of `block_sparse_attention`.
    Returns out (B, H, Sq, D) and the natural-log log-sum-exp of the scaled scores (B, H, Sq), both float64.
    A query that sees no key gets out 0 and log-sum-exp -inf. Differentiable.
    """
    query, key, value = query.double(), key.double(), value.double()
    if token_order is not None:
        query, key, value = (take(tensor, token_order) for tensor in (query, key, value))
    visible = mask.token_mask()
    if skip_threshold is not None:
        blocks = skipped_blocks(query, key, mask, scale, skip_threshold, key_bias=key_bias)
        visible = visible & ~_to_tokens(blocks, mask)
    scores = token_scores(query, key, mask, scale, key_bias).masked_fill(~visible, -torch.inf)
    seen = (visible & (scores != -torch.inf)).any(-1, keepdim=True)  # a bias of -inf hides a block too
    lse = scores.masked_fill(~seen, 0.0).logsumexp(-1, keepdim=True).masked_fill(~seen, -torch.inf)
    weights = (scores - lse.masked_fill(~seen, 0.0)).exp().masked_fill(~visible, 0.0)
    # A key nobody sees must not matter, whatever it holds: 0 * inf would be NaN.
    used = visible.any(dim=2)[..., None]
    out, lse = weights @ value.masked_fill(~used, 0.0), lse.squeeze(-1)
    if token_order is None:
        return out, lse
    return put_back(out, token_order), put_back(lse[..., None], token_order).squeeze(-1)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    out_gradient: Tensor,
    lse_gradient: Tensor,
    *,
    key_bias: Tensor | None = None,
    token_order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, float64, for given gradients of what `attention` returns.

    With weights P = exp(scores - lse) on visible pairs: dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O) + dLSE),
    dQ = scale * dS K, dK = scale * dS^T Q.
    """
    tensors = [tensor.double() for tensor in (query, key, value, out_gradient, lse_gradient[..., None])]
    if token_order is not None:
        tensors = [take(tensor, token_order) for tensor in tensors]
    query, key, value, out_gradient, lse_gradient = tensors
    out, lse = attention(query, key, value, mask, scale, key_bias=key_bias)
    visible = mask.token_mask()
    empty = lse[..., None] == -torch.inf
    # Keys that nobody sees and queries that see nothing must not matter, whatever they hold: 0 * NaN would be NaN.
    used = visible.any(dim=2)[..., None]
    key, value = (tensor.masked_fill(~used, 0.0) for tensor in (key, value))
    query, out_gradient, lse_gradient = (x.masked_fill(empty, 0.0) for x in (query, out_gradient, lse_gradient))
    weights = (token_scores(query, key, mask, scale, key_bias) - lse[..., None].masked_fill(empty, 0.0)).exp()
    weights = weights.masked_fill(~visible, 0.0)
    rise = out_gradient @ value.transpose(-1, -2) - (out_gradient * out).sum(-1, keepdim=True) + lse_gradient
    scores = (weights * rise).masked_fill(~visible, 0.0)
    found = (scale * scores @ key, scale * scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ out_gradient)
    if token_order is None:
        return found
    return put_back(found[0], token_order), put_back(found[1], token_order), put_back(found[2], token_order)


def token_scores(
    query: Tensor, key: Tensor, mask: BlockMask, scale: float | None, key_bias: Tensor | None = None
) -> Tensor:
    """float64 (B, H, Sq, Sk): scaled scores, the bias of each key block added."""
    scores = query.double() @ key.double().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is None:
        return scores
    return scores + key_bias.double().repeat_interleave(mask.key_bounds.diff(), dim=-1)[..., None, :]


def skipped_blocks(
    query: Tensor,
    key: Tensor,
    mask: BlockMask,
    scale: float | None,
    threshold: Tensor | float,
    *,
    key_bias: Tensor | None = None,
) -> Tensor:
    """bool (B, H, Nq, Nk): listed blocks that the in-kernel skip leaves out (SpargeAttn, stage 2).

    Blocks come in list order, whole ones ascending and then partial ones. With base-2 scores a block is skipped if
    max over the rows of (the row's maximum in the block - its maximum so far) + threshold <= 0. A row that sees
    nothing of the block does not vote; a row that has seen nothing yet keeps it.
    """
    batch, heads = query.shape[:2]
    scores = token_scores(query, key, mask, scale, key_bias) * math.log2(math.e)
    scores = scores.masked_fill(~mask.token_mask(), -torch.inf)
    listed, partial = mask.to_blocks(), mask.partial_blocks()
    listed, partial = (blocks.expand(batch, heads, -1, -1) for blocks in (listed, partial))
    limit = torch.as_tensor(threshold, dtype=torch.float64).expand(heads)
    skipped = torch.zeros(batch, heads, *mask.grid, dtype=torch.bool, device=query.device)
    rows, columns = mask.query_bounds.tolist(), mask.key_bounds.tolist()
    for sample, head, row in (
        (b, h, i) for b in range(batch) for h in range(heads) for i in range(mask.grid[0])
    ):  # one row of blocks after the other
        running = torch.full((rows[row + 1] - rows[row],), -torch.inf, dtype=torch.float64, device=query.device)
        kept, in_part = listed[sample, head, row], partial[sample, head, row]
        for block in [*(kept & ~in_part).nonzero().flatten().tolist(), *in_part.nonzero().flatten().tolist()]:
            part = scores[sample, head, rows[row] : rows[row + 1], columns[block] : columns[block + 1]]
            largest = part.amax(-1)
            votes = largest > -torch.inf
            first = votes & (running == -torch.inf)
            rise = torch.where(votes, largest - running, -torch.inf)
            if bool(votes.any()) and not bool(first.any()):
                skipped[sample, head, row, block] = float(rise.max() + limit[head]) <= 0.0
            elif not bool(votes.any()):
                skipped[sample, head, row, block] = bool(limit[head] < math.inf)  # nothing of it is visible
            if not skipped[sample, head, row, block]:
                running = torch.maximum(running, largest)
    return skipped


def take(tensor: Tensor, token_order: Tensor) -> Tensor:
    """(B, H, S, D) with position p of head h holding token token_order[h, p]."""
    batch, heads, length, channels = tensor.shape
    order = token_order.long().expand(heads, length)
    return tensor.gather(2, order[None, :, :, None].expand(batch, -1, -1, channels))


def put_back(tensor: Tensor, token_order: Tensor) -> Tensor:
    """The inverse of `take`."""
    return take(tensor, token_order.argsort(-1))


def _to_tokens(blocks: Tensor, mask: BlockMask) -> Tensor:
    return blocks.repeat_interleave(mask.query_bounds.diff(), dim=2).repeat_interleave(mask.key_bounds.diff(), dim=3)
