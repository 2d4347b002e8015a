"""Plain float64 definitions of the block scores. Slow, S x S in memory, and what both backends are tested against.

`bounds` are always given: int (N + 1,), first token of each block and the length at the end. Valid counts are
integers (B,). Everything else is as in `scores`.
"""

import torch
from torch import Tensor

from . import oracle
from .block_mask import BlockMask
from .scores import EXPONENT_LIMIT, Pooled


def pool_blocks(x: Tensor, block_size: int, bounds: Tensor, valid: Tensor, shift: Tensor | None = None) -> Pooled:
    """Mean, mean cosine over all pairs of tokens, and whether the block is whole and every token has a direction."""
    x = x.double() if shift is None else x.double() - shift.double()
    batch, heads, _, head_dim = x.shape
    blocks = len(bounds) - 1
    mean = x.new_zeros(batch, heads, blocks, head_dim)
    similarity = x.new_zeros(batch, heads, blocks)
    regular = torch.zeros(batch, heads, blocks, dtype=torch.bool)
    for b in range(batch):
        for n in range(blocks):
            tokens = x[b, :, bounds[n] : min(int(bounds[n + 1]), int(valid[b]))]
            if tokens.shape[1] == 0:
                continue
            norm = tokens.norm(dim=-1, keepdim=True)
            unit = tokens / norm.masked_fill(norm == 0, 1.0)
            mean[b, :, n] = tokens.mean(1)
            similarity[b, :, n] = (unit @ unit.mT).mean((1, 2)).nan_to_num(nan=0.0)
            regular[b, :, n] = (tokens.shape[1] == block_size) & ((norm > 0) & norm.isfinite()).all(1).squeeze(-1)
    return Pooled(mean, similarity, regular)


def dense_lse(query: Tensor, key: Tensor, scale: float, key_valid: Tensor) -> Tensor:
    """float64 (B, H, Sq): log-sum-exp of the scaled scores over the valid keys."""
    return _scores(query, key, scale, key_valid).logsumexp(-1)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: float,
    query_valid: Tensor,
    key_valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Block sums of exp(score - lse), and lse + log(row sum); query blocks end at `rows`, key blocks at `columns`."""
    power = _scores(query, key, scale, key_valid) - lse.double()[..., None]
    weights = torch.exp2((power / torch.log(torch.tensor(2.0).double())).clamp(max=EXPONENT_LIMIT))
    there = _prefix(query, query_valid)
    weights = weights.masked_fill(~there, 0.0)
    new_lse = (lse.double() + weights.sum(-1).log()).masked_fill(~there.squeeze(-1), -torch.inf)
    return _member(rows) @ weights @ _member(columns).T, new_lse


def antidiagonal_scores(
    query: Tensor, key: Tensor, block_size: int, stride: int, scale: float, query_valid: Tensor, key_valid: Tensor
) -> Tensor:
    """Block sums of the softmax, over key groups, of the mean score on the antidiagonal of each tile of tokens."""
    query = query.double().masked_fill(~_prefix(query, query_valid), 0.0)
    key = key.double().masked_fill(~_prefix(key, key_valid), 0.0)
    scores = query @ key.mT * scale
    tokens = torch.arange(max(scores.shape[-2:]))
    antidiagonal = tokens[: scores.shape[2], None] % stride + tokens[: scores.shape[3]] % stride == stride - 1
    group = [(tokens[:n] // stride)[None] == torch.arange(-(-n // stride))[:, None] for n in scores.shape[-2:]]
    mean = group[0].double() @ (scores * antidiagonal) @ group[1].double().T / stride
    first = [torch.arange(len(members)) * stride for members in group]
    mean = mean.masked_fill(first[1] >= key_valid.view(-1, 1, 1, 1), -torch.inf)
    weights = mean.softmax(-1).nan_to_num(nan=0.0)
    weights = weights.masked_fill((first[0] >= query_valid.view(-1, 1, 1))[..., None], 0.0)
    block = [(start // block_size)[None] == torch.arange(-(-n // block_size))[:, None].to(start)
             for start, n in zip(first, scores.shape[-2:], strict=True)]  # fmt: skip
    return block[0].double() @ weights @ block[1].double().T


def recall(
    query: Tensor, key: Tensor, mask: BlockMask, scale: float, key_valid: Tensor, token_order: Tensor | None = None
) -> Tensor:
    """float64 (B, H): the softmax over valid keys, summed where the mask lets see, the mean over queries."""
    if token_order is not None:
        query, key = oracle.take(query, token_order), oracle.take(key, token_order)
    weights = _scores(query, key, scale, key_valid).softmax(-1)
    return weights.masked_fill(~mask.token_mask(), 0.0).sum(-1).mean(-1)


def _scores(query: Tensor, key: Tensor, scale: float, key_valid: Tensor) -> Tensor:
    scores = query.double() @ key.double().mT * scale
    return scores.masked_fill(~_prefix(key, key_valid).mT, -torch.inf)


def _prefix(x: Tensor, valid: Tensor) -> Tensor:
    """bool (B, 1, S, 1): whether a token is valid."""
    return torch.arange(x.shape[2])[:, None] < valid.view(-1, 1, 1, 1)


def _member(bounds: Tensor) -> Tensor:
    """float64 (N, S): 1 where a token is in a block."""
    tokens = torch.arange(int(bounds[-1]))
    return ((bounds[:-1, None] <= tokens) & (tokens < bounds[1:, None])).double()
