"""Block-sparse attention on the CPU.

Gathered key blocks are multiplied a few large steps at a time (see `cpu_plan`), in float32, or in float64 for float64
inputs. Where norms show that no score of a query block is large, its weights are plain exponentials; else its
softmax is the online one.
Masks of whole, equally large blocks over 16-bit tensors run on torch's flash kernel (see `cpu_flash`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu_flash
from .cpu_backward import backward
from .cpu_tiles import Tiles, exponentials
from .oracle import put_back, take
from .quantize import FP8, FP8_LARGEST, LARGEST, quantize_inputs, scale_of_token
from .request import Request

__all__ = ["attend", "backward", "forward"]


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq)."""
    if not request.features and request.query.element_size() == 2:
        out, lse = cpu_flash.attention(request.query, request.key, request.value, request.mask, request.scale)
        return out, lse, torch.zeros(*out.shape[:2], request.mask.grid[0], dtype=torch.int32)
    if request.quantization is not None:
        return _quantized(request)
    tiles = Tiles(
        request.query,
        request.key,
        request.value,
        request.mask,
        request.scale,
        key_bias=request.key_bias,
        token_order=request.token_order,
        one_by_one=request.skip_threshold is not None,
    )
    out, lse, skipped = attend(tiles, request.skip_threshold)
    return out.to(request.query.dtype), lse.float(), skipped


def _quantized(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize_oracle` defines it, in float32: the integers times their scales take the place of the inputs."""
    mask, order, quantization = request.mask, request.token_order, request.quantization
    assert quantization is not None
    query, key, value = request.query, request.key, request.value
    if order is not None:
        query, key, value = (take(tensor, order) for tensor in (query, key, value))
    inputs = quantize_inputs(query, key, value, mask, request.scale, quantization)
    query_group, key_group = (1, 1) if quantization.group == "token" else mask.block_size
    q_scale = scale_of_token(inputs.q_scale, mask.query_length, query_group, mask.query_offsets) * math.log(2.0)
    k_scale = scale_of_token(inputs.k_scale, mask.key_length, key_group, mask.key_offsets)
    tiles = Tiles(
        inputs.q_int8 * q_scale[..., None],
        inputs.k_int8 * k_scale[..., None],
        inputs.values.float(),
        mask,
        1.0,
        key_bias=request.key_bias,
        one_by_one=True,
    )
    out, lse, skipped = attend(tiles, request.skip_threshold, _rounding(inputs.values.dtype))
    if inputs.value_scale is not None:
        out = out * inputs.value_scale
    if inputs.lse_correction is not None:
        lse = lse + inputs.lse_correction
    if order is not None:
        out, lse = put_back(out, order), put_back(lse[..., None], order).squeeze(-1)
    return out.to(request.query.dtype), lse, skipped


def attend(
    tiles: Tiles, skip_threshold: Tensor | None = None, rounding: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention: out (B, H, Sq, D) and lse (B, H, Sq) in the dtype of the tiles, and skipped blocks.

    rounding: of the weights (R, queries, keys) before they meet the values; their sum is taken before it.
    """
    rows, row_size, _ = tiles.query.shape
    out, lse = torch.empty_like(tiles.query), tiles.query.new_full((rows, row_size, 1), -torch.inf)
    skipped = torch.zeros(rows, dtype=torch.int32)
    small = torch.zeros(rows, dtype=torch.bool)
    if skip_threshold is None and rounding is None:
        small = tiles.small_rows()
    if small.all():
        _sum(tiles, out, lse)
    else:
        if skip_threshold is not None:
            skipped = _never_walked(tiles, skip_threshold)
        _sum_online(tiles, out, lse, small, skipped, skip_threshold, rounding)
    if sum(len(batch.rows) for batch in tiles.batches) < rows:
        out.masked_fill_(lse == -torch.inf, 0.0)  # query blocks without a key
    out, lse = (tiles.rows.to_tokens(blocks, tiles.batch, tiles.heads) for blocks in (out, lse))
    return out, lse.squeeze(-1), skipped.view(tiles.batch, tiles.heads, -1)


def _sum(tiles: Tiles, out: Tensor, lse: Tensor) -> None:
    """Fills out (rows, queries, D) and lse (rows, queries, 1), for scores whose exponentials are all in range."""
    for batch in tiles.batches:
        queries = tiles.queries(batch)
        totals, sums = torch.empty_like(queries[..., :1]), torch.empty_like(queries)
        for step in batch.steps:
            scores, _, values = tiles.step(batch, step, queries)
            weights = scores.exp_()
            if step.first:
                torch.sum(weights, -1, keepdim=True, out=totals)
                torch.bmm(weights, values, out=sums)
            else:
                some = slice(step.active)
                totals[some].add_(weights.sum(-1, keepdim=True))
                sums[some].baddbmm_(weights, values)
        out.index_copy_(0, batch.rows, sums.div_(totals.masked_fill(totals == 0.0, 1.0)))
        lse.index_copy_(0, batch.rows, totals.log_())


def _sum_online(
    tiles: Tiles,
    out: Tensor,
    lse: Tensor,
    small: Tensor,
    skipped: Tensor,
    skip_threshold: Tensor | None,
    rounding: Callable[[Tensor], Tensor] | None,
) -> None:
    """As `_sum`, and the same to the bit for rows that are `small`, for scores of any size; adds to skipped (rows,)."""
    for batch in tiles.batches:
        queries, unshifted = tiles.queries(batch), small[batch.rows, None, None]
        largest = totals = sums = queries  # until the first step
        for step in batch.steps:
            some = slice(step.active)
            scores, _, values = tiles.step(batch, step, queries)
            own = scores.amax(-1, keepdim=True)
            if skip_threshold is not None:
                skip = _skip(own, None if step.first else largest[some], tiles, batch.rows[some], skip_threshold)
                skipped[batch.rows[some]] += skip
                scores.masked_fill_(skip[:, None, None], -torch.inf)
                own.masked_fill_(skip[:, None, None], -torch.inf)
            now = own if step.first else torch.maximum(largest[some], own)
            now = now.masked_fill(unshifted[some], 0.0)
            hidden = step.cut or step.partial is not None or tiles.has_bias or skip_threshold is not None
            # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
            shift = now.masked_fill(now == -torch.inf, 0.0) if hidden else now
            weights = exponentials(scores.sub_(shift), hidden)
            own = weights.sum(-1, keepdim=True)
            if rounding is not None:
                weights = rounding(weights)
            if step.first:
                largest, totals, sums = now, own, torch.bmm(weights, values)
                continue
            decay = (largest[some] - shift).exp_()
            sums[some].mul_(decay).baddbmm_(weights, values)
            totals[some].mul_(decay).add_(own)
            largest[some] = now
        out.index_copy_(0, batch.rows, sums.div_(totals.masked_fill(totals == 0.0, 1.0)))
        lse.index_copy_(0, batch.rows, totals.log_().add_(largest))


def _never_walked(tiles: Tiles, threshold: Tensor) -> Tensor:
    """int32 (B * H * Nq,): listed blocks without a valid key, which lists end with; they count as skipped."""
    mask, partial = tiles.mask, tiles.mask.visible_partial_counts
    walked = mask.visible_counts if partial is None else mask.visible_counts + partial
    left = (mask.row_counts - walked).expand(tiles.batch, tiles.heads, -1)
    return left.masked_fill(threshold.isinf()[:, None], 0).reshape(-1)


def _skip(own: Tensor, largest: Tensor | None, tiles: Tiles, rows: Tensor, threshold: Tensor) -> Tensor:
    """bool (R,): no row of the query block rises above -threshold over its maximum so far (SpargeAttn, stage 2).

    own (R, queries, 1): maxima in this key block; largest: those so far, None at the first key block.
    """
    rise = torch.full_like(own, torch.inf) if largest is None else own - largest
    rise.masked_fill_(own == -torch.inf, -torch.inf)
    if tiles.rows.filled is not None:
        rise.masked_fill_(~tiles.rows.filled.view(-1, *own.shape[1:])[rows], -torch.inf)
    limit = threshold.to(rise.dtype)[rows // tiles.mask.grid[0] % tiles.heads]
    return rise.amax((1, 2)) * math.log2(math.e) + limit <= 0.0


def _rounding(values_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """What quantization does to weights, which are relative to the running maximum, for values of this dtype."""

    def to_fp8(weights: Tensor) -> Tensor:
        return (weights * FP8_LARGEST).clamp_(max=FP8_LARGEST).to(FP8).to(weights.dtype).div_(FP8_LARGEST)

    def to_int8(weights: Tensor) -> Tensor:
        # Relative to this step's own maximum: next to a larger earlier one all weights could round to 0.
        step = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny) / LARGEST[8]
        return (weights / step + 0.5).floor_().mul_(step)

    if values_dtype in (FP8, torch.int8):
        return to_fp8 if values_dtype == FP8 else to_int8
    if values_dtype in (torch.float32, torch.float64):
        return None
    return lambda weights: weights.to(values_dtype).to(weights.dtype)
