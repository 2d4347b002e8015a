"""The definition of quantized attention: what every kernel that computes it is tested against.

Integers and scales are those of `quantize_inputs`; from there on all is done in the asked precision except for the
roundings that the definition demands. Memory grows with queries times one key block, so on the CPU it also serves as
the backend that simulates quantization.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .block_mask import BlockMask
from .oracle import put_back, take
from .quantize import FP8, FP8_LARGEST, LARGEST, Quantization, quantize_inputs, scale_of_token
from .request import Request

LN_2 = math.log(2.0)


def simulate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    quantization: Quantization,
    *,
    dtype: torch.dtype = torch.float64,
    key_tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantized attention over the key blocks that `mask` keeps for each query block.

    query (B, H, Sq, D), key and value (B, H, Sk, D) as `quantize_inputs` takes them; scale is the softmax scale.
    dtype: of all arithmetic, float64 for the definition, float32 for speed. Integer products are exact in both.
    key_tile: keys per step of the online softmax, for kernels that take less than a key block at a time.

    Returns out (B, H, Sq, D) and the natural-log log-sum-exp of the scaled scores (B, H, Sq), of the true keys, not of
    the smoothed ones, both of `dtype`. A query that sees no key gets out 0 and log-sum-exp -inf.
    """
    request = Request(query, key, value, mask, scale, quantization=quantization)
    out, lse, _ = forward(request, dtype=dtype, key_tile=key_tile)
    return out, lse


def forward(
    request: Request, *, dtype: torch.dtype = torch.float64, key_tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `simulate`, for a call with any options: out, lse and skipped blocks int32 (B, H, Nq).

    With a token order, means, groups and blocks are those of the ordered tokens.
    """
    mask, order, quantization = request.mask, request.token_order, request.quantization
    assert quantization is not None
    query, key, value = request.query, request.key, request.value
    if order is not None:
        query, key, value = (take(tensor, order) for tensor in (query, key, value))
    inputs = quantize_inputs(query, key, value, mask, request.scale, quantization)
    query_group, key_group = (1, 1) if quantization.group == "token" else mask.block_size
    q_scale = scale_of_token(inputs.q_scale, mask.query_length, query_group, mask.query_offsets)
    k_scale = scale_of_token(inputs.k_scale, mask.key_length, key_group, mask.key_offsets)
    q_int = inputs.q_int8.to(dtype)

    def scores(keys: slice) -> Tensor:
        # Below 2 ** 24 for head_dim up to 1040, so the sum of products is exact in float32 as well.
        products = q_int @ inputs.k_int8[:, :, keys].to(dtype).transpose(-1, -2)
        return products * q_scale[..., None].to(dtype) * k_scale[:, :, None, keys].to(dtype)

    out, lse, skipped = attend(
        scores,
        inputs.values,
        inputs.value_scale,
        mask,
        key_bias=request.key_bias,
        skip_threshold=request.skip_threshold,
        dtype=dtype,
        key_tile=key_tile,
    )
    if inputs.lse_correction is not None:
        lse = lse + inputs.lse_correction
    if order is not None:
        out, lse = put_back(out, order), put_back(lse[..., None], order).squeeze(-1)
    return out, lse, skipped


def attend(
    scores: Callable[[slice], Tensor],
    values: Tensor,
    value_scale: Tensor | None,
    mask: BlockMask,
    *,
    key_bias: Tensor | None = None,
    skip_threshold: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    key_tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The online softmax with weights rounded for `values`: out, log-sum-exp of the given scores, skipped blocks.

    scores(keys) gives the base-2 scores (B, H, Sq, keys) of a slice of key positions. values: (B, H, Sk, D), 8-bit or
    not. key_bias (B or 1, H or 1, Nk), skip_threshold (H,) and key_tile are those of `Request` and `simulate`.
    Each query block takes its whole key blocks in ascending order, then its partial ones in ascending order. The sum of
    the weights is taken before they are rounded.
    """
    batch, heads, _, head_dim = values.shape
    largest = values.new_full((batch, heads, mask.query_length, 1), -torch.inf, dtype=dtype)
    total = torch.zeros_like(largest)
    out = values.new_zeros((batch, heads, mask.query_length, head_dim), dtype=dtype)
    skipped = torch.zeros(batch, heads, mask.grid[0], dtype=torch.int32, device=mask.device)
    for step in _steps(mask):
        block_scores = scores(step.keys).masked_fill(~step.visible, -torch.inf)
        if key_bias is not None:
            block_scores = block_scores + key_bias[..., step.block, None, None].to(dtype) / LN_2
        if skip_threshold is not None:
            skip = step.listed & _skip(block_scores, largest, mask, skip_threshold)
            skipped += skip
            block_scores = block_scores.masked_fill(_to_rows(skip, mask)[..., None], -torch.inf)
        # What a key that nobody sees holds must not matter: 0 * NaN would be NaN.
        block_values = values[:, :, step.keys].to(dtype).masked_fill(~step.visible.any(2)[..., None], 0.0)
        tile = key_tile or block_scores.shape[-1]
        for part, seen in zip(block_scores.split(tile, -1), block_values.split(tile, 2), strict=True):
            before, largest = largest, torch.maximum(largest, part.amax(-1, keepdim=True))
            decay = (before - _finite(largest)).exp2()
            weights = (part - _finite(largest)).exp2()
            total = total * decay + weights.sum(-1, keepdim=True)
            out = out * decay + _weigh(weights, part, largest, seen, values.dtype)
    if value_scale is not None:
        out = out * value_scale.to(dtype)
    out = torch.where(total == 0.0, 0.0, out / total)
    return out, (largest + total.log2()).squeeze(-1) * LN_2, skipped


def _weigh(weights: Tensor, scores: Tensor, largest: Tensor, values: Tensor, values_dtype: torch.dtype) -> Tensor:
    """The sum of values by weights = exp2(scores - largest), with the weights rounded as the dtype of values asks."""
    if values_dtype == torch.int8:
        # Relative to this step's own maximum: next to a larger earlier one all weights could round to 0.
        own = scores.amax(-1, keepdim=True)
        integers = ((scores - _finite(own)).exp2() * LARGEST[8]).round()
        return integers @ values * ((own - _finite(largest)).exp2() / LARGEST[8])
    if values_dtype == FP8:
        return (weights * FP8_LARGEST).clamp(max=FP8_LARGEST).to(FP8).to(values.dtype) @ values / FP8_LARGEST
    return weights.to(values_dtype).to(values.dtype) @ values


def _skip(scores: Tensor, largest: Tensor, mask: BlockMask, threshold: Tensor) -> Tensor:
    """bool (B, H, Nq): no row comes within the threshold of its maximum so far, or above it (SpargeAttn, stage 2)."""
    own = scores.amax(-1)
    rise = (own - largest.squeeze(-1)).masked_fill(own == -torch.inf, -torch.inf)
    blocks = rise.new_full((*rise.shape[:2], mask.grid[0]), -torch.inf)
    rows = _to_rows(torch.arange(mask.grid[0], device=mask.device), mask)
    blocks.scatter_reduce_(2, rows.expand_as(rise), rise, "amax")
    return blocks + threshold.view(1, -1, 1).to(rise.dtype) <= 0.0


class _Step(NamedTuple):
    """One key block, for all the query blocks that list it."""

    block: int
    keys: slice
    listed: Tensor  # bool (Bm, Hm, Nq)
    visible: Tensor  # bool (B or 1, H or 1, Sq, keys)


def _steps(mask: BlockMask) -> Iterator[_Step]:
    partial = mask.partial_blocks()
    passes = [(mask.to_blocks() & ~partial, False)] + ([(partial, True)] if mask.rule is not None else [])
    bounds = mask.key_bounds.tolist()
    for blocks, cut in passes:
        for block in blocks.flatten(0, 2).any(0).nonzero().squeeze(-1).tolist():
            keys, listed = slice(*bounds[block : block + 2]), blocks[..., block]
            visible = _to_rows(listed, mask)[..., None] & _visible(mask, keys, block, cut)
            yield _Step(block, keys, listed, visible)


def _visible(mask: BlockMask, keys: slice, block: int, cut: bool) -> Tensor:
    """bool, broadcasts to (B, H, Sq, keys): by padding and, in a partial block, by the rule."""
    key = torch.arange(keys.start, keys.stop, device=mask.device)
    visible = key < (mask.key_length if mask.key_valid is None else mask.key_valid.view(-1, 1, 1, 1))
    if cut and mask.rule is not None:
        sizes = (mask.batch, mask.heads, mask.query_length)
        ids = torch.meshgrid(*(torch.arange(size, device=mask.device) for size in sizes), indexing="ij")
        sample, head, query = (x[..., None] for x in ids)
        visible = visible & mask.rule.visible(sample, head, query, key, torch.full_like(key, block))
    return visible


def _to_rows(blocks: Tensor, mask: BlockMask) -> Tensor:
    """(..., Nq) repeated for each query of the block: (..., Sq)."""
    return blocks.repeat_interleave(mask.query_bounds.diff(), -1)


def _finite(largest: Tensor) -> Tensor:
    """A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN."""
    return largest.masked_fill(largest == -torch.inf, 0.0)
