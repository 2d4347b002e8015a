"""Block-sparse attention forward in Triton, with every option of `Request`.

One program computes one tile of queries: it walks the key blocks that its query block lists, tile by tile, with the
online softmax, first the whole blocks, then the partial ones. Statistics and output are accumulated in float32.

Scores are left as the product of query and key. A positive factor (softmax scale and log2 e, and with quantization the
scales) turns them into powers of 2 inside the one multiply-add that also subtracts the maximum.

Options are compiled in only where a call has them: their pointers are None otherwise, and None is a constant.
"""

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask
from .launch import LaunchShape, launch_shape, workload
from .oracle import take
from .quantize import FP8_LARGEST, LARGEST, quantize_inputs
from .request import Request
from .rules import ChunkBits, Ranges
from .triton_tiles import (
    load_tile,
    load_tokens,
    seen_by_chunk,
    seen_by_ranges,
    to_float,
    to_int8,
    to_weights_fp8,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# Weights that are rounded to 8 bits are computed in units of the largest number: log2 of it goes into the exponent.
LOG2_FP8 = tl.constexpr(math.log2(FP8_LARGEST))
LOG2_INT8 = tl.constexpr(math.log2(LARGEST[8]))
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def finite(largest, GUARD: tl.constexpr):
    """A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN."""
    return tl.where(largest == NOTHING, 0.0, largest) if GUARD else largest


@triton.jit
def take_in(
    scores, factor, bias, own, values, largest, total, found,
    GUARD: tl.constexpr, PRECISION: tl.constexpr, KEY_TILE: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """The online softmax: running maximum, sum and output, brought up to date with a tile of scores and its values.

    Base-2 scores are scores * factor + bias; `own` is their maximum in each row.
    """
    new_largest = tl.maximum(largest, own)
    shift = finite(new_largest, GUARD)
    decay = tl.exp2(largest - shift)
    if values.dtype == tl.int8:
        # Rounded relative to the tile's own maximum: next to a larger earlier one all weights could round to 0.
        own = finite(own, GUARD)
        weights = tl.exp2(tl.fma(scores, factor, (bias - own + LOG2_INT8)[:, None]))
        share = tl.exp2(own - shift)
        total = total * decay + tl.sum(weights, 1) * share
        product = tl.dot(to_int8(weights), values)
        product = to_float(product) if KEY_TILE <= 256 else product.to(tl.float32)  # 127 * 127 each: see `to_float`
        found = found * decay[:, None] + product * share[:, None]
    elif values.dtype == tl.float8e4nv:
        weights = tl.exp2(tl.fma(scores, factor, (bias - shift + LOG2_FP8)[:, None]))
        total = total * decay + tl.sum(weights, 1)
        # Tensor cores sum 8-bit products with few bits, so those of one tile are summed apart and added in float32.
        # Hopper's own instruction order does that when told so; elsewhere a limit on it keeps the compiler from fusing.
        weights = to_weights_fp8(weights)
        if HOPPER:
            found = tl.dot(weights, values, found * decay[:, None], max_num_imprecise_acc=KEY_TILE)
        else:
            found = found * decay[:, None] + tl.dot(weights, values, max_num_imprecise_acc=KEY_TILE)
    else:
        weights = tl.exp2(tl.fma(scores, factor, (bias - shift)[:, None]))
        total = total * decay + tl.sum(weights, 1)
        found = tl.dot(weights.to(values.dtype), values, found * decay[:, None], input_precision=PRECISION)
    return new_largest, total, found


@triton.jit
def attend(
    step, listed, slot, largest, total, found, skips,
    queries, first_query, query_rows, query_factor,
    key, value, key_token, value_token, value_channel, token_order, valid, key_offsets,
    key_scale, key_bias, threshold, rule_keys, rule_low, rule_high, bits_token,
    QUERY_TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CUT: tl.constexpr, PARTIAL: tl.constexpr, AXES: tl.constexpr,
    CLEAN: tl.constexpr, KEY_GROUPS: tl.constexpr, PRECISION: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """One tile of keys. With CUT those past the end of the block, or of the valid keys, are invisible and never read.

    PARTIAL: the rule decides, by ranges on AXES axes or, with 0 axes, by chunk bits. CLEAN: ranges may hide a key from
    everybody.
    KEY_GROUPS: tokens that share a key scale, 1 or the block; 0 without quantization.
    """
    KEY_TILES: tl.constexpr = (KEY_BLOCK + KEY_TILE - 1) // KEY_TILE
    GUARD: tl.constexpr = CUT or PARTIAL or key_bias is not None  # a bias may be -inf
    block = tl.load(listed + (step // KEY_TILES) * slot)
    if key_offsets is None:
        first = block * KEY_BLOCK + (step % KEY_TILES) * KEY_TILE
        rows_left = valid - first
    else:
        first = tl.load(key_offsets + block) + (step % KEY_TILES) * KEY_TILE
        rows_left = tl.minimum(tl.load(key_offsets + block + 1), valid) - first
    if PARTIAL and AXES == 0:
        row_seen = seen_by_chunk(rule_low, bits_token, tl.load(rule_keys + block), first_query, query_rows, QUERY_TILE)
        rows_left = tl.where(tl.max(row_seen.to(tl.int32), 0) > 0, rows_left, 0)

    keys = load_tile(key, key_token, 1, first, rows_left, token_order, KEY_TILE, HEAD_DIM, PADDED_DIM, CUT)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    factor = query_factor
    if KEY_GROUPS > 0:
        scores = to_float(scores)
    if KEY_GROUPS == 1:
        columns = tl.arange(0, KEY_TILE)
        scores *= tl.load(key_scale + first + columns, mask=columns < rows_left, other=0.0)[None, :]
    if KEY_GROUPS > 1:
        factor *= tl.load(key_scale + block)
    bias = 0.0
    if key_bias is not None:
        bias = tl.load(key_bias + block) * LOG2_E

    if PARTIAL and AXES > 0:
        seen = seen_by_ranges(
            rule_keys, rule_low, rule_high, first_query, query_rows, first, rows_left, QUERY_TILE, KEY_TILE, AXES
        )
        scores = tl.where(seen, scores, NOTHING)
    elif PARTIAL:
        scores = tl.where(row_seen[:, None] & (tl.arange(0, KEY_TILE)[None, :] < rows_left), scores, NOTHING)
    elif CUT:
        scores = tl.where(tl.arange(0, KEY_TILE)[None, :] < rows_left, scores, NOTHING)

    values = load_tile(
        value, value_token, value_channel, first, rows_left, token_order, KEY_TILE, HEAD_DIM, PADDED_DIM, CUT
    )
    if PARTIAL and AXES > 0 and CLEAN:
        # What a key that nobody sees holds must not matter: 0 * NaN would be NaN.
        values = tl.where(tl.max(scores, 0)[:, None] > NOTHING, values, tl.zeros_like(values))
    column = factor[:, None] if KEY_GROUPS == 1 else factor
    own = tl.max(scores, 1) * factor + bias
    if threshold is None:
        largest, total, found = take_in(
            scores, column, bias, own, values, largest, total, found, GUARD, PRECISION, KEY_TILE, HOPPER
        )
    else:
        votes = (own > NOTHING) & (tl.arange(0, QUERY_TILE) < query_rows)
        rise = tl.max(tl.where(votes, own - largest, NOTHING), 0)
        if (rise + threshold > 0.0) | (threshold == float("inf")):
            largest, total, found = take_in(
                scores, column, bias, own, values, largest, total, found, GUARD, PRECISION, KEY_TILE, HOPPER
            )
        else:
            skips += 1
    return largest, total, found, skips


@triton.jit
def offset(sample, head, batch_stride, head_stride):
    """Elements to skip; a tensor can have more than 2 ** 31."""
    return sample.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@triton.jit
def forward_kernel(
    query, key, value, out, lse, skipped,
    head_order, row_order, counts, indices, partial_counts, partial_indices, key_valid, query_offsets, key_offsets,
    rule_keys, rule_low, rule_high, key_bias, load_order, store_order, skip_threshold,
    query_scale, key_scale, value_scale, lse_correction,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, value_channel, out_batch, out_head, out_token,
    order_batch, order_head, counts_batch, counts_head, indices_batch, indices_head, indices_row, indices_slot,
    partial_batch, partial_head, partials_batch, partials_head, partials_row, partials_slot, valid_batch,
    bits_batch, bits_head, bits_token, bias_batch, bias_head, tokens_head,
    heads, rows, query_length, key_length, key_groups, scale,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, AXES: tl.constexpr, CLEAN: tl.constexpr,
    QUERY_GROUP: tl.constexpr, KEY_GROUP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    HOPPER: tl.constexpr,
):  # fmt: skip
    QUERY_TILES: tl.constexpr = QUERY_BLOCK // QUERY_TILE
    KEY_TILES: tl.constexpr = (KEY_BLOCK + KEY_TILE - 1) // KEY_TILE
    # Programs of one head stay together, so that its keys stay in the L2 cache; see `_orders` for the order.
    place = tl.program_id(0) // QUERY_TILES
    map_id = tl.load(head_order + place // rows)
    sample, head = map_id // heads, map_id % heads
    row = tl.load(row_order + offset(sample, head, order_batch, order_head) + place % rows)
    part = tl.program_id(0) % QUERY_TILES

    skipped += map_id.to(tl.int64) * rows + row
    if skip_threshold is None:
        tl.store(skipped, 0)  # by each tile of the block; with skipping there is one per block

    if query_offsets is None:
        first = row * QUERY_BLOCK + part * QUERY_TILE
        query_rows = query_length - first
    else:
        first = tl.load(query_offsets + row) + part * QUERY_TILE
        query_rows = tl.load(query_offsets + row + 1) - first
    valid = key_length
    if key_valid is not None:
        valid = tl.load(key_valid + sample.to(tl.int64) * valid_batch)
    if load_order is not None:
        load_order += head.to(tl.int64) * tokens_head
    queries = load_tile(
        query + offset(sample, head, query_batch, query_head), query_token, 1, first, query_rows, load_order,
        QUERY_TILE, HEAD_DIM, PADDED_DIM, True,
    )  # fmt: skip
    key += offset(sample, head, key_batch, key_head)
    value += offset(sample, head, value_batch, value_head)
    queried = tl.arange(0, QUERY_TILE)
    factor = scale
    if QUERY_GROUP == 1:
        factor = tl.load(query_scale + map_id.to(tl.int64) * query_length + first + queried, queried < query_rows, 1.0)
    if QUERY_GROUP > 1:
        factor = tl.load(query_scale + map_id.to(tl.int64) * rows + row)
    if KEY_GROUP > 0:
        key_scale += map_id.to(tl.int64) * key_groups
    if key_bias is not None:
        key_bias += offset(sample, head, bias_batch, bias_head)
    threshold = None
    if skip_threshold is not None:
        threshold = tl.load(skip_threshold + head)

    count = tl.load(counts + offset(sample, head, counts_batch, counts_head) + row)
    listed = indices + offset(sample, head, indices_batch, indices_head) + row.to(tl.int64) * indices_row
    if query_rows <= 0:  # a tile past the end of a short query block
        count = 0
    whole = 0
    if key_offsets is None:
        # Lists ascend, so only the last listed block can hold a key past the valid ones.
        whole = count
        if count > 0:
            last = tl.load(listed + (count - 1) * indices_slot)
            if (last + 1) * KEY_BLOCK > valid:
                whole = count - 1

    largest = tl.full((QUERY_TILE,), NOTHING, tl.float32)
    total = tl.zeros((QUERY_TILE,), tl.float32)
    found = tl.zeros((QUERY_TILE, PADDED_DIM), tl.float32)
    skips = 0
    # The pipeline reads a list entry one tile before the keys it names, so a list costs no more than a run of blocks.
    if key_offsets is None:
        for step in tl.range(0, whole * KEY_TILES, num_stages=STAGES):
            largest, total, found, skips = attend(
                step, listed, indices_slot, largest, total, found, skips, queries, first, query_rows, factor,
                key, value, key_token, value_token, value_channel, load_order, valid, key_offsets,
                key_scale, key_bias, threshold, rule_keys, rule_low, rule_high, bits_token,
                QUERY_TILE, KEY_BLOCK, KEY_TILE, HEAD_DIM, PADDED_DIM, False, False, AXES, CLEAN,
                KEY_GROUP, PRECISION, HOPPER,
            )  # fmt: skip
    for step in tl.range(whole * KEY_TILES, count * KEY_TILES, num_stages=STAGES):
        largest, total, found, skips = attend(
            step, listed, indices_slot, largest, total, found, skips, queries, first, query_rows, factor,
            key, value, key_token, value_token, value_channel, load_order, valid, key_offsets,
            key_scale, key_bias, threshold, rule_keys, rule_low, rule_high, bits_token,
            QUERY_TILE, KEY_BLOCK, KEY_TILE, HEAD_DIM, PADDED_DIM, True, False, AXES, CLEAN,
            KEY_GROUP, PRECISION, HOPPER,
        )  # fmt: skip
    if partial_counts is not None:
        count = tl.load(partial_counts + offset(sample, head, partial_batch, partial_head) + row)
        if query_rows <= 0:
            count = 0
        listed = partial_indices + offset(sample, head, partials_batch, partials_head) + row.to(tl.int64) * partials_row
        if AXES == 0:
            rule_low += offset(sample, head, bits_batch, bits_head)
        for step in tl.range(0, count * KEY_TILES, num_stages=STAGES):
            largest, total, found, skips = attend(
                step, listed, partials_slot, largest, total, found, skips, queries, first, query_rows, factor,
                key, value, key_token, value_token, value_channel, load_order, valid, key_offsets,
                key_scale, key_bias, threshold, rule_keys, rule_low, rule_high, bits_token,
                QUERY_TILE, KEY_BLOCK, KEY_TILE, HEAD_DIM, PADDED_DIM, True, True, AXES, CLEAN,
                KEY_GROUP, PRECISION, HOPPER,
            )  # fmt: skip

    columns = tl.arange(0, PADDED_DIM)[None, :]
    seen = total != 0.0  # NaN is not nothing
    total = tl.where(seen, total, 1.0)
    found *= (1.0 / total)[:, None]
    if value_scale is not None:
        found *= tl.load(value_scale + map_id * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    log_sum = largest + tl.log2(total)
    if value.dtype.element_ty == tl.float8e4nv:
        log_sum -= LOG2_FP8
    if value.dtype.element_ty == tl.int8:
        log_sum -= LOG2_INT8
    log_sum *= LN_2
    if lse_correction is not None:
        log_sum += tl.load(
            lse_correction + map_id.to(tl.int64) * query_length + first + queried, queried < query_rows, 0.0
        )
    if store_order is not None:
        store_order += head.to(tl.int64) * tokens_head
    tokens = load_tokens(store_order, first, query_rows, QUERY_TILE, True)
    places = out + offset(sample, head, out_batch, out_head) + (tokens.to(tl.int64) * out_token)[:, None] + columns
    tl.store(places, found.to(out.dtype.element_ty), mask=(queried[:, None] < query_rows) & (columns < HEAD_DIM))
    lses = lse + map_id.to(tl.int64) * query_length + tokens
    tl.store(lses, tl.where(seen, log_sum, NOTHING), mask=queried < query_rows)
    if skip_threshold is not None:
        tl.store(skipped, skips)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class Operands(NamedTuple):
    """The tensors that the kernel multiplies: those of a call, or their quantization (see `QuantizedInputs`)."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float = 1.0
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    lse_correction: Tensor | None = None
    groups: tuple[int, int] = (0, 0)  # queries and keys that share a scale; 0 without

    @property
    def key_groups(self) -> int:
        return 0 if self.key_scale is None else self.key_scale.shape[2]


# Masks are used by every layer and step, so what is derived from them is kept as long as they live.
_known_orders: WeakKeyDictionary[BlockMask, dict[tuple[int, int], tuple[Tensor, Tensor]]] = WeakKeyDictionary()
_all_seen: WeakKeyDictionary[BlockMask, bool] = WeakKeyDictionary()


def forward(request: Request, shape: LaunchShape | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype and layout of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq).

    shape: how to launch the kernel, to try one out; None takes the one known to suit.
    """
    mask, order = request.mask, request.token_order
    batch, heads, query_length, head_dim = request.query.shape
    rows = mask.grid[0]
    work = workload(request)
    shape = shape or launch_shape(work)
    # The kernel stores channels side by side.
    out = torch.empty_like(request.query)
    out = out if out.stride(-1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    lse = out.new_empty(batch, heads, query_length, dtype=torch.float32)
    skipped = out.new_empty(batch, heads, rows, dtype=torch.int32)

    store_order = None if order is None else _rows_contiguous(order.int()).expand(heads, -1)
    load_order = store_order if request.quantization is None else None  # quantized tensors are in order already
    operands = _operands(request)
    query, key, value = operands[:3]
    head_order, row_order = _orders(mask, batch, heads)
    # The kernel knows strides of samples and heads; numbers of neighbouring blocks lie side by side.
    counts, indices, partial_counts, partial_indices, key_bias = (
        None if tensor is None else _rows_contiguous(tensor).expand(batch, heads, *tensor.shape[2:])
        for tensor in (
            mask.visible_counts, mask.indices, mask.visible_partial_counts, mask.partial_indices, request.key_bias,
        )
    )  # fmt: skip
    key_valid = None if mask.key_valid is None else mask.key_valid.expand(batch)
    # A tile longer than its block ends with it, as the tiles of ragged blocks do.
    ends_with_block = mask.key_offsets is not None or shape.key_tile > mask.block_size[1]
    key_offsets = mask.key_bounds if ends_with_block else None
    query_offsets = None if mask.query_offsets is None else mask.query_bounds
    threshold = None if request.skip_threshold is None else request.skip_threshold.contiguous()
    rule, bits, axes = _rule(mask, batch, heads)
    with torch.cuda.device_of(query):
        forward_kernel[(batch * heads * rows * (mask.block_size[0] // shape.query_tile),)](
            query, key, value, out, lse, skipped,
            head_order, row_order, counts, indices, partial_counts, partial_indices, key_valid,
            query_offsets, key_offsets, *rule, key_bias, load_order, store_order, threshold,
            operands.query_scale, operands.key_scale, operands.value_scale, operands.lse_correction,
            *query.stride()[:3], *key.stride()[:3], *value.stride(), *out.stride()[:3],
            *_strides(row_order, 2), *_strides(counts, 2), *_strides(indices, 4),
            *_strides(partial_counts, 2), *_strides(partial_indices, 4), *_strides(key_valid, 1),
            *_strides(bits, 3), *_strides(key_bias, 2), *_strides(store_order, 1),
            heads, rows, query_length, mask.key_length, operands.key_groups, operands.scale * math.log2(math.e),
            QUERY_BLOCK=mask.block_size[0], KEY_BLOCK=mask.block_size[1],
            QUERY_TILE=shape.query_tile, KEY_TILE=shape.key_tile, HEAD_DIM=head_dim, PADDED_DIM=work.padded_dim,
            AXES=axes, CLEAN=axes > 0 and not _every_key_is_seen(mask),
            QUERY_GROUP=operands.groups[0], KEY_GROUP=operands.groups[1],
            PRECISION="ieee" if out.dtype == torch.float32 else None,
            STAGES=shape.stages, HOPPER=work.gpu == "sm90", num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    if request.skip_threshold is not None and key_valid is not None:  # blocks of padding alone are not even listed
        skipped += (mask.row_counts - _visible_row_counts(mask)) * (request.skip_threshold < math.inf)[None, :, None]
    return out, lse, skipped


def _operands(request: Request) -> Operands:
    query, key, value, scale = request.query, request.key, request.value, request.scale
    if scale <= 0.0:  # the kernel takes the maximum before it multiplies by the scale
        query, scale = query * ((scale > 0.0) - (scale < 0.0)), abs(scale) or 1.0
    if request.quantization is None:
        return Operands(_rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value), scale)
    if request.token_order is not None:  # means and scales are those of the ordered tokens
        query, key, value = (take(x, request.token_order) for x in (query, key, value))
    inputs = quantize_inputs(query, key, value, request.mask, scale, request.quantization)
    value = _rows_contiguous(inputs.values)
    if inputs.value_scale is not None and request.mask.key_offsets is None:
        value = _by_channel(value)
    groups = (1, 1) if request.quantization.group == "token" else request.mask.block_size
    scales = (inputs.q_scale, inputs.k_scale, inputs.value_scale, inputs.lse_correction)
    return Operands(inputs.q_int8, inputs.k_int8, value, 1.0, *scales, groups)  # q_scale contains the softmax scale


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_channel(value: Tensor) -> Tensor:
    """The same tensor with the tokens of a channel side by side, as tensor cores want 8-bit values on Hopper.

    Ragged blocks begin anywhere, so there this would cost more in unaligned loads than it gains.
    """
    batch, heads, tokens, channels = value.shape
    padded = value.new_empty(batch, heads, channels, -(-tokens // 16) * 16)
    padded[..., :tokens] = value.transpose(-1, -2)
    return padded[..., :tokens].transpose(-1, -2)


def _rule(mask: BlockMask, batch: int, heads: int) -> tuple[tuple[Tensor | None, ...], Tensor | None, int]:
    """The three tables the kernel reads, the one of them that has strides, and the number of axes."""
    if isinstance(mask.rule, Ranges):
        return tuple(table.contiguous() for table in mask.rule.tensors), None, mask.rule.low.shape[1]
    if isinstance(mask.rule, ChunkBits):
        bits = mask.rule.bits.contiguous().expand(batch, heads, -1, -1)
        return (mask.rule.key_chunk.contiguous(), bits, None), bits, 0
    return (None, None, None), None, 0


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()[:dims]


def _orders(mask: BlockMask, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """The order in which programs start: int32 (batch * heads,) pairs of sample and head, and (batch, heads, Nq) rows.

    Longest lists first, so that no long row is left running alone at the end. Rows whose lists differ by less than a
    sixteenth of the longest keep their places: neighbours see much the same keys, which are then in the L2 cache.
    """
    orders = _known_orders.setdefault(mask, {})
    if (batch, heads) not in orders:
        lengths = _visible_row_counts(mask)
        coarse = lengths * 16 // lengths.amax(-1, keepdim=True).clamp(min=1)
        rows = coarse.argsort(dim=-1, descending=True, stable=True).int().contiguous().expand(batch, heads, -1)
        totals = lengths.sum(-1).expand(batch, heads).flatten()
        orders[batch, heads] = totals.argsort(descending=True, stable=True).int(), rows
    return orders[batch, heads]


def _visible_row_counts(mask: BlockMask) -> Tensor:
    """int32 (batch, Hm, Nq): key blocks listed for each query block that hold a valid key."""
    partial = mask.visible_partial_counts
    return mask.visible_counts if partial is None else mask.visible_counts + partial


def _every_key_is_seen(mask: BlockMask) -> bool:
    """True if each query sees its own token in some head, as in every window; waits for the device once per mask.

    Then what a hidden key holds matters elsewhere too, and partial blocks need no protection from NaN in values.
    """
    if mask not in _all_seen:
        found = mask.query_length == mask.key_length
        if found:
            assert mask.rule is not None
            tokens = torch.arange(mask.key_length, dtype=torch.int32, device=mask.device)
            row, column = (torch.searchsorted(x, tokens, right=True) - 1 for x in (mask.query_bounds, mask.key_bounds))
            partial = mask.partial_blocks()
            whole, by_rule = (mask.to_blocks() & ~partial).any(1), partial.any(1)
            none = torch.zeros_like(tokens)  # ranges are shared by samples and heads
            seen = mask.rule.visible(none, none, tokens, tokens, column)
            found = bool((whole[:, row, column] | (by_rule[:, row, column] & seen)).all())
        _all_seen[mask] = found
    return _all_seen[mask]
