"""Block-sparse attention backward in Triton.

With weights P = exp2(scores - lse) on visible pairs: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale * dS K and
dK = scale * dS^T Q, where delta = rowsum(dO * O) - dLSE. Weights are computed anew from the log-sum-exp, so nothing of
the size of the map is kept. One kernel walks the lists of query blocks for dQ, another those of key blocks for dK and
dV: each gradient is summed by one program in a fixed order, in float32, without atomics.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask, KeyMajor
from .launch import LaunchShape, gpu_class
from .request import Request
from .rules import ChunkBits, Ranges

LOG2_E = tl.constexpr(math.log2(math.e))
INT_MAX = tl.constexpr(2**31 - 1)
INT_MIN = tl.constexpr(-(2**31))
DELTA_ROWS = 64


@triton.jit
def tile_pointers(
    base, stride, token_order, first, end,
    ROWS: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(ROWS, PADDED_DIM): where the tokens at positions `first`, `first` + 1, ... are; `first` is 64 bits wide.

    With CUT positions from `end` on are replaced by the last one before it, so that all can be read.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED_DIM)[None, :]
    if CUT:
        rows = tl.minimum(rows, (end - first - 1).to(tl.int32))
    if ORDERED:
        token = tl.load(token_order + first + rows).to(tl.int64)
        pointers = base + token[:, None] * stride + columns
    else:
        pointers = base + first * stride + (rows[:, None] * stride + columns)
    return pointers


@triton.jit
def load_rows(pointers, there, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CUT: tl.constexpr):
    """A tile: 0 in columns past HEAD_DIM and, with CUT, in rows that are not `there`."""
    columns = tl.arange(0, PADDED_DIM)[None, :]
    if CUT:
        tile = tl.load(pointers, mask=there[:, None] & (columns < HEAD_DIM), other=0.0)
    elif HEAD_DIM != PADDED_DIM:
        tile = tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(pointers, tile, there, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    columns = tl.arange(0, PADDED_DIM)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=there[:, None] & (columns < HEAD_DIM))


@triton.jit
def across(queries, keys, KEY_MAJOR: tl.constexpr):
    """Numbers of queries and of keys, shaped to broadcast against each other."""
    if KEY_MAJOR:
        return queries[None, :], keys[:, None]
    else:
        return queries[:, None], keys[None, :]


@triton.jit
def rule_sees(
    query, key, query_there, key_there, key_block, table, low, high,
    RULE: tl.constexpr, WIDTH: tl.constexpr, KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """Whether each query sees each key of a partial block, (query, key) or with KEY_MAJOR (key, query)."""
    if RULE == "ranges":
        known, real = across(query_there, key_there, KEY_MAJOR)
        seen = known & real
        for axis in tl.static_range(WIDTH):
            place = tl.load(table + key * WIDTH + axis, mask=key_there, other=0)
            # A negative place lies in every range; said once per key, it costs nothing per pair.
            least, most = tl.where(place < 0, INT_MAX, place), tl.where(place < 0, INT_MIN, place)
            start, least = across(tl.load(low + query * WIDTH + axis, mask=query_there, other=0), least, KEY_MAJOR)
            end, most = across(tl.load(high + query * WIDTH + axis, mask=query_there, other=0), most, KEY_MAJOR)
            seen = seen & (start <= least) & (most < end)
    else:
        chunk = tl.load(low + key_block)
        word = tl.load(table + query * WIDTH + chunk // 32, mask=query_there, other=0)
        chosen, real = across(((word >> (chunk % 32)) & 1) == 1, key_there, KEY_MAJOR)
        seen = chosen & real
    return seen


@triton.jit
def block_range(bounds, block, length, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """First position of a block, and the one after its last; both 64 bits wide."""
    if RAGGED:
        first = tl.load(bounds + block).to(tl.int64)
        end = tl.load(bounds + block + 1).to(tl.int64)
    else:
        first = block.to(tl.int64) * BLOCK
        end = tl.minimum(first + BLOCK, length)
    return first, end


@triton.jit
def delta_kernel(
    out, out_gradient, lse, lse_gradient, token_order, shift, delta,
    out_batch, out_head, out_token, gradient_batch, gradient_head, gradient_token, order_head, heads, length, tiles,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Per position of the mask: the base-2 log-sum-exp and delta. A query that sees no key gets +inf and 0."""
    sample_head = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = sample_head // heads, sample_head % heads
    token_order += head * order_head
    first = (tl.program_id(0) % tiles).to(tl.int64) * ROWS
    position = first + tl.arange(0, ROWS)
    there = position < length
    out += sample * out_batch + head * out_head
    out_gradient += sample * gradient_batch + head * gradient_head
    outs = tile_pointers(out, out_token, token_order, first, length, ROWS, PADDED_DIM, ORDERED, True)
    gradients = tile_pointers(out_gradient, gradient_token, token_order, first, length, ROWS, PADDED_DIM, ORDERED, True)
    if ORDERED:
        token = tl.load(token_order + position, mask=there, other=0).to(tl.int64)
    else:
        token = position
    log_sum = tl.load(lse + sample_head * length + token, mask=there, other=float("-inf"))
    seen = log_sum > float("-inf")
    # Whatever the gradient of a constant 0 is, it must not matter.
    product = load_rows(outs, seen, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    product *= load_rows(gradients, seen, HEAD_DIM, PADDED_DIM, True).to(tl.float32)
    found = tl.sum(product, 1) - tl.load(lse_gradient + sample_head * length + token, mask=seen, other=0.0)
    tl.store(shift + sample_head * length + position, tl.where(seen, log_sum * LOG2_E, float("inf")), mask=there)
    tl.store(delta + sample_head * length + position, found, mask=there)


@triton.jit
def add_to_query(
    query, out_gradient, shift, delta, found, keys, values, key_token, value_token, token_order, first, end, scale,
    bias, there, seen,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr, CUT: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a query tile (before scaling) and one tile of keys.

    With CUT only the keys that are `there` are read, with PARTIAL only the pairs `seen` count.
    """
    keys = tile_pointers(keys, key_token, token_order, first, end, TILE, PADDED_DIM, ORDERED, CUT)
    values = tile_pointers(values, value_token, token_order, first, end, TILE, PADDED_DIM, ORDERED, CUT)
    key = load_rows(keys, there, HEAD_DIM, PADDED_DIM, CUT)
    value = load_rows(values, there, HEAD_DIM, PADDED_DIM, CUT)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale + bias
    weights = tl.exp2(scores - shift[:, None])
    if PARTIAL:
        weights = tl.where(seen, weights, 0.0)
    elif CUT:
        weights = tl.where(there[None, :], weights, 0.0)
    rise = tl.dot(out_gradient, tl.trans(value), input_precision=PRECISION)
    weights = weights * (rise - delta[:, None])
    return tl.dot(weights.to(key.dtype), key, found, input_precision=PRECISION)


@triton.jit
def query_kernel(
    query, key, value, out_gradient, shift, delta, used, query_gradient, token_order, key_bias, key_valid,
    order, counts, indices, partial_counts, partial_indices, query_bounds, key_bounds, table, low, high,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    out_batch, out_head, out_token, found_batch, found_head, found_token,
    token_order_head, bias_batch, bias_head, bias_block, valid_batch, order_batch, order_head,
    counts_batch, counts_head, indices_batch, indices_head, indices_row, indices_slot,
    partial_counts_batch, partial_counts_head, partial_batch, partial_head, partial_row, partial_slot,
    table_batch, table_head,
    heads, query_length, key_length, tiles, scale,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr, BIASED: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, RULE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Offsets between samples, heads and blocks can pass 2 ** 31; within a tile they cannot.
    QUERY_TILES: tl.constexpr = QUERY_BLOCK // QUERY_TILE
    KEY_TILES: tl.constexpr = KEY_BLOCK // KEY_TILE
    sample_head = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = sample_head // heads, sample_head % heads
    place = tl.program_id(0) % tiles
    row = tl.load(order + sample * order_batch + head * order_head + place // QUERY_TILES).to(tl.int64)
    first, query_end = block_range(query_bounds, row, query_length, QUERY_BLOCK, RAGGED)
    first += (place % QUERY_TILES) * QUERY_TILE
    position = first + tl.arange(0, QUERY_TILE)
    there = position < query_end
    count = tl.load(counts + sample * counts_batch + head * counts_head + row)
    indices += sample * indices_batch + head * indices_head + row * indices_row
    valid = key_length
    if PADDED:
        valid = tl.load(key_valid + sample * valid_batch)
    # Lists ascend, so only the last block of equally large ones can hold a key past the valid ones.
    whole = count
    if RAGGED:
        whole = 0
    elif count > 0:
        last = tl.load(indices + (count - 1) * indices_slot)
        if (last + 1) * KEY_BLOCK > valid:
            whole = count - 1

    token_order += head * token_order_head
    query += sample * query_batch + head * query_head
    out_gradient += sample * out_batch + head * out_head
    key += sample * key_batch + head * key_head
    value += sample * value_batch + head * value_head
    key_bias += sample * bias_batch + head * bias_head
    table += sample * table_batch + head * table_head
    shift_tile = tl.load(shift + sample_head * query_length + position, mask=there, other=float("inf"))
    delta_tile = tl.load(delta + sample_head * query_length + position, mask=there, other=0.0)
    # A query that sees no key is not read: its gradient is 0, whatever it holds.
    sighted = shift_tile < float("inf")
    queries = tile_pointers(query, query_token, token_order, first, query_end, QUERY_TILE, PADDED_DIM, ORDERED, True)
    query_tile = load_rows(queries, sighted, HEAD_DIM, PADDED_DIM, True)
    gradients = tile_pointers(
        out_gradient, out_token, token_order, first, query_end, QUERY_TILE, PADDED_DIM, ORDERED, True
    )
    gradient_tile = load_rows(gradients, sighted, HEAD_DIM, PADDED_DIM, True)

    found = tl.zeros((QUERY_TILE, PADDED_DIM), tl.float32)
    bias = 0.0
    for step in range(0, whole * KEY_TILES):
        block = tl.load(indices + (step // KEY_TILES) * indices_slot)
        start = block.to(tl.int64) * KEY_BLOCK + (step % KEY_TILES) * KEY_TILE
        if BIASED:
            bias = tl.load(key_bias + block * bias_block) * LOG2_E
        found = add_to_query(
            query_tile, gradient_tile, shift_tile, delta_tile, found, key, value, key_token, value_token, token_order,
            start, valid, scale, bias, True, True,
            KEY_TILE, HEAD_DIM, PADDED_DIM, ORDERED, False, False, PRECISION,
        )  # fmt: skip
    for step in range(whole * KEY_TILES, count * KEY_TILES):
        block = tl.load(indices + (step // KEY_TILES) * indices_slot)
        start, end = block_range(key_bounds, block, key_length, KEY_BLOCK, RAGGED)
        start, end = start + (step % KEY_TILES) * KEY_TILE, tl.minimum(end, valid)
        if BIASED:
            bias = tl.load(key_bias + block * bias_block) * LOG2_E
        found = add_to_query(
            query_tile, gradient_tile, shift_tile, delta_tile, found, key, value, key_token, value_token, token_order,
            start, end, scale, bias, start + tl.arange(0, KEY_TILE) < end, True,
            KEY_TILE, HEAD_DIM, PADDED_DIM, ORDERED, True, False, PRECISION,
        )  # fmt: skip
    if RULE != "none":
        count = tl.load(partial_counts + sample * partial_counts_batch + head * partial_counts_head + row)
        partial_indices += sample * partial_batch + head * partial_head + row * partial_row
        used += sample_head * key_length
        for step in range(0, count * KEY_TILES):
            block = tl.load(partial_indices + (step // KEY_TILES) * partial_slot)
            start, end = block_range(key_bounds, block, key_length, KEY_BLOCK, RAGGED)
            start, end = start + (step % KEY_TILES) * KEY_TILE, tl.minimum(end, valid)
            if BIASED:
                bias = tl.load(key_bias + block * bias_block) * LOG2_E
            places = start + tl.arange(0, KEY_TILE)
            seen = rule_sees(position, places, there, places < end, block, table, low, high, RULE, WIDTH, False)
            # A key nobody sees must not matter, whatever it holds: 0 * NaN would be NaN.
            known = tl.load(used + places, mask=places < end, other=0) != 0
            found = add_to_query(
                query_tile, gradient_tile, shift_tile, delta_tile, found, key, value, key_token, value_token,
                token_order, start, end, scale, bias, known, seen,
                KEY_TILE, HEAD_DIM, PADDED_DIM, ORDERED, True, True, PRECISION,
            )  # fmt: skip

    query_gradient += sample * found_batch + head * found_head
    outs = tile_pointers(
        query_gradient, found_token, token_order, first, query_end, QUERY_TILE, PADDED_DIM, ORDERED, True
    )
    store_rows(outs, found * (scale / LOG2_E), there, HEAD_DIM, PADDED_DIM)


@triton.jit
def add_to_key(
    key, value, found_key, found_value, mass, query, out_gradient, shift, delta, query_token, out_token, token_order,
    first, end, scale, bias, seen,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (before scaling) and dV of a key tile and the queries from `first` to `end`, a tile of them at most.

    With PARTIAL only the pairs `seen` count, and their weights are summed in `mass`.
    """
    position = first + tl.arange(0, TILE)
    # With +inf a query has weight 0. So past the end any query can stand in.
    shifts = tl.load(shift + position, mask=position < end, other=float("inf"))
    queries = tile_pointers(query, query_token, token_order, first, end, TILE, PADDED_DIM, ORDERED, True)
    gradients = tile_pointers(out_gradient, out_token, token_order, first, end, TILE, PADDED_DIM, ORDERED, True)
    # Only in a partial block can a query see no key at all; then it must not matter, whatever it holds.
    sighted = shifts < float("inf")
    query_tile = load_rows(queries, sighted, HEAD_DIM, PADDED_DIM, PARTIAL)
    # The map is made key-major, so that its tile is the first factor of both products that follow.
    scores = tl.dot(key, tl.trans(query_tile), input_precision=PRECISION) * scale + bias
    weights = tl.exp2(scores - shifts[None, :])
    if PARTIAL:
        weights = tl.where(seen, weights, 0.0)
        mass += tl.sum(weights, 1)
    gradient_tile = load_rows(gradients, sighted, HEAD_DIM, PADDED_DIM, PARTIAL)
    found_value = tl.dot(weights.to(gradient_tile.dtype), gradient_tile, found_value, input_precision=PRECISION)
    rise = tl.dot(value, tl.trans(gradient_tile), input_precision=PRECISION)
    # Loaded only here: it would take registers from the weights.
    deltas = tl.load(delta + position, mask=position < end, other=0.0)
    weights = weights * (rise - deltas[None, :])
    found_key = tl.dot(weights.to(query_tile.dtype), query_tile, found_key, input_precision=PRECISION)
    return found_key, found_value, mass


@triton.jit
def key_kernel(
    query, key, value, out_gradient, shift, delta, used, key_gradient, value_gradient, token_order, key_bias, key_valid,
    order, counts, indices, partial_counts, partial_indices, query_bounds, key_bounds, table, low, high,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    out_batch, out_head, out_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    token_order_head, bias_batch, bias_head, bias_block, valid_batch, order_batch, order_head,
    counts_batch, counts_head, indices_batch, indices_head, indices_row, indices_slot,
    partial_counts_batch, partial_counts_head, partial_batch, partial_head, partial_row, partial_slot,
    table_batch, table_head,
    heads, query_length, key_length, tiles, scale,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr, BIASED: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, RULE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    QUERY_TILES: tl.constexpr = QUERY_BLOCK // QUERY_TILE
    KEY_TILES: tl.constexpr = KEY_BLOCK // KEY_TILE
    sample_head = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = sample_head // heads, sample_head % heads
    place = tl.program_id(0) % tiles
    block = tl.load(order + sample * order_batch + head * order_head + place // KEY_TILES).to(tl.int64)
    first, stored_end = block_range(key_bounds, block, key_length, KEY_BLOCK, RAGGED)
    first += (place % KEY_TILES) * KEY_TILE
    end = stored_end
    if PADDED:
        end = tl.minimum(end, tl.load(key_valid + sample * valid_batch))
    position = first + tl.arange(0, KEY_TILE)
    there = position < end
    count = tl.load(counts + sample * counts_batch + head * counts_head + block)
    indices += sample * indices_batch + head * indices_head + block * indices_row
    if first >= end:
        count = 0

    token_order += head * token_order_head
    query += sample * query_batch + head * query_head
    out_gradient += sample * out_batch + head * out_head
    key += sample * key_batch + head * key_head
    value += sample * value_batch + head * value_head
    shift += sample_head * query_length
    delta += sample_head * query_length
    table += sample * table_batch + head * table_head
    keys = tile_pointers(key, key_token, token_order, first, key_length, KEY_TILE, PADDED_DIM, ORDERED, True)
    key_tile = load_rows(keys, there, HEAD_DIM, PADDED_DIM, True)
    values = tile_pointers(value, value_token, token_order, first, key_length, KEY_TILE, PADDED_DIM, ORDERED, True)
    value_tile = load_rows(values, there, HEAD_DIM, PADDED_DIM, True)
    bias = 0.0
    if BIASED:
        bias = tl.load(key_bias + sample * bias_batch + head * bias_head + block * bias_block) * LOG2_E

    found_key = tl.zeros((KEY_TILE, PADDED_DIM), tl.float32)
    found_value = tl.zeros((KEY_TILE, PADDED_DIM), tl.float32)
    mass = tl.zeros((KEY_TILE,), tl.float32)
    for step in range(0, count * QUERY_TILES):
        row = tl.load(indices + (step // QUERY_TILES) * indices_slot)
        start, row_end = block_range(query_bounds, row, query_length, QUERY_BLOCK, RAGGED)
        found_key, found_value, mass = add_to_key(
            key_tile, value_tile, found_key, found_value, mass, query, out_gradient, shift, delta, query_token,
            out_token, token_order, start + (step % QUERY_TILES) * QUERY_TILE, row_end, scale, bias, True,
            QUERY_TILE, HEAD_DIM, PADDED_DIM, ORDERED, False, PRECISION,
        )  # fmt: skip
    if RULE != "none":
        mass += (count > 0).to(tl.float32)
        count = tl.load(partial_counts + sample * partial_counts_batch + head * partial_counts_head + block)
        partial_indices += sample * partial_batch + head * partial_head + block * partial_row
        if first >= end:
            count = 0
        for step in range(0, count * QUERY_TILES):
            row = tl.load(partial_indices + (step // QUERY_TILES) * partial_slot)
            start, row_end = block_range(query_bounds, row, query_length, QUERY_BLOCK, RAGGED)
            start += (step % QUERY_TILES) * QUERY_TILE
            places = start + tl.arange(0, QUERY_TILE)
            seen = rule_sees(places, position, places < row_end, there, block, table, low, high, RULE, WIDTH, True)
            found_key, found_value, mass = add_to_key(
                key_tile, value_tile, found_key, found_value, mass, query, out_gradient, shift, delta, query_token,
                out_token, token_order, start, row_end, scale, bias, seen,
                QUERY_TILE, HEAD_DIM, PADDED_DIM, ORDERED, True, PRECISION,
            )  # fmt: skip
        # A weight that rounds to 0 has no gradient, so its key counts as one nobody sees.
        there = there & (mass != 0.0)
        tl.store(used + sample_head * key_length + position, there.to(tl.int8), mask=position < end)

    # Keys past the valid ones were read as 0, which has a weight too. Keys nobody sees can hold anything.
    found_key = tl.where(there[:, None], found_key * (scale / LOG2_E), 0.0)
    found_value = tl.where(there[:, None], found_value, 0.0)
    stored = position < stored_end
    key_gradient += sample * dk_batch + head * dk_head
    outs = tile_pointers(key_gradient, dk_token, token_order, first, key_length, KEY_TILE, PADDED_DIM, ORDERED, True)
    store_rows(outs, found_key, stored, HEAD_DIM, PADDED_DIM)
    value_gradient += sample * dv_batch + head * dv_head
    outs = tile_pointers(value_gradient, dv_token, token_order, first, key_length, KEY_TILE, PADDED_DIM, ORDERED, True)
    store_rows(outs, found_value, stored, HEAD_DIM, PADDED_DIM)


def backward(
    request: Request, out: Tensor, lse: Tensor, out_gradient: Tensor, lse_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtype and layout, for given gradients of out and log-sum-exp."""
    mask, scale = request.mask, request.scale * math.log2(math.e)
    query, key, value, out, out_gradient = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (request.query, request.key, request.value, out, out_gradient)
    )
    batch, heads, length, head_dim = query.shape
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    shift = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    delta = torch.empty_like(shift)
    # Where an option is not given nothing is read through its pointer.
    nothing = mask.counts
    # Keys that some query sees, found by the key kernel, which therefore runs first.
    used = nothing if mask.rule is None else torch.empty(key.shape[:3], dtype=torch.int8, device=key.device)
    token_order = nothing[0] if request.token_order is None else request.token_order.contiguous()
    token_order = token_order.expand(heads, -1)
    bias = nothing[..., :1] if request.key_bias is None else request.key_bias
    bias = bias.expand(batch, heads, -1)
    valid = nothing[0, 0, :1] if mask.key_valid is None else mask.key_valid
    tables, table_strides, rule, width = _rule_tables(mask, batch, heads)
    padded_dim = _padded(head_dim)
    flags = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "ORDERED": request.token_order is not None,
        "BIASED": request.key_bias is not None,
        "PADDED": mask.key_valid is not None,
        "RAGGED": mask.query_offsets is not None or mask.key_offsets is not None,
        "RULE": rule,
        "WIDTH": width,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
    }
    options = (token_order, bias, valid.expand(batch))
    option_strides = (token_order.stride(0), *bias.stride(), options[2].stride(0))
    bounds = (mask.query_bounds, mask.key_bounds)
    by_query = KeyMajor(
        mask.visible_counts, mask.indices, mask.visible_partial_counts, mask.partial_indices, mask.row_order
    )
    with torch.cuda.device_of(query):
        tiles = triton.cdiv(length, DELTA_ROWS)
        delta_kernel[(tiles * batch * heads,)](
            out, out_gradient, lse.contiguous(), lse_gradient.contiguous(), token_order, shift, delta,
            *out.stride()[:3], *out_gradient.stride()[:3], token_order.stride(0), heads, length, tiles,
            ROWS=DELTA_ROWS, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, ORDERED=flags["ORDERED"], num_warps=4,
        )  # fmt: skip
        for kernel, shape, blocks, results, lists in (
            (key_kernel, key_shape(request), 1, gradients[1:], mask.by_key),
            (query_kernel, query_shape(request), 0, gradients[:1], by_query),
        ):
            tensors, list_strides = _lists(lists, batch, heads)
            tiles = mask.grid[blocks] * (mask.block_size[blocks] // shape[blocks])
            kernel[(tiles * batch * heads,)](
                query, key, value, out_gradient, shift, delta, used, *results, *options, *tensors, *bounds, *tables,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out_gradient.stride()[:3],
                *(stride for x in results for stride in x.stride()[:3]),
                *option_strides, *list_strides, *table_strides,
                heads, length, mask.key_length, tiles, scale,
                QUERY_BLOCK=mask.block_size[0], KEY_BLOCK=mask.block_size[1],
                QUERY_TILE=shape.query_tile, KEY_TILE=shape.key_tile, **flags,
                num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
    return gradients


def _lists(lists: KeyMajor, batch: int, heads: int) -> tuple[list[Tensor], list[int]]:
    """Order, counts and lists as the kernels take them, shared by samples and heads through strides of 0; strides."""
    counts, indices, partial_counts, partial_indices, order = lists
    if partial_counts is None or partial_indices is None:
        partial_counts, partial_indices = counts, indices  # not read
    # The kernels have no stride for these from block to block.
    order, counts, partial_counts = (x.contiguous().expand(batch, heads, -1) for x in (order, counts, partial_counts))
    indices, partial_indices = (x.expand(batch, heads, -1, -1) for x in (indices, partial_indices))
    strides = [*order.stride()[:2], *counts.stride()[:2], *indices.stride()]
    strides += [*partial_counts.stride()[:2], *partial_indices.stride()]
    return [order, counts, indices, partial_counts, partial_indices], strides


def _rule_tables(mask: BlockMask, batch: int, heads: int) -> tuple[tuple[Tensor, ...], tuple[int, int], str, int]:
    """The rule as the kernels take it: three tables, the first one's strides of samples and heads, kind, row width."""
    rule = mask.rule
    if isinstance(rule, Ranges):
        return tuple(x.contiguous() for x in rule.tensors), (0, 0), "ranges", rule.low.shape[1]
    if isinstance(rule, ChunkBits):
        bits = rule.bits.contiguous().expand(batch, heads, -1, -1)
        strides = bits.stride(0), bits.stride(1)
        return (bits, rule.key_chunk.contiguous(), rule.key_chunk), strides, "bits", rule.bits.shape[3]
    return (mask.counts,) * 3, (0, 0), "none", 1


def _padded(head_dim: int) -> int:
    return max(triton.next_power_of_2(head_dim), 16)


def query_shape(request: Request) -> LaunchShape:
    """How to launch the kernel for dQ: query and dO stay, keys and values pass by.

    As `key_shape`, chosen from what the compiler reports: the largest tiles whose loop over whole blocks hardly spills.
    """
    gpu, padded_dim = gpu_class(request.query), _padded(request.query.shape[-1])
    if request.query.dtype == torch.float32:  # at full precision there are no tensor cores: registers are the limit
        wanted = LaunchShape(*_full_precision_tiles(padded_dim), 4, 2)
    elif padded_dim <= 128:
        wanted = LaunchShape(128, 64, 8, 2 if gpu == "sm89" and padded_dim == 128 else 3)
    else:
        by_gpu = {"sm80": (64, 64, 8, 2), "sm89": (32, 32, 4, 2)}
        wanted = LaunchShape(*by_gpu.get(gpu, (128, 32, 8, 2)))
    return _within(wanted, request.mask.block_size)


def key_shape(request: Request) -> LaunchShape:
    """How to launch the kernel for dK and dV: keys and values stay, query and dO pass by."""
    gpu, padded_dim = gpu_class(request.query), _padded(request.query.shape[-1])
    if request.query.dtype == torch.float32:
        wanted = LaunchShape(*_full_precision_tiles(padded_dim), 4, 2)
    elif padded_dim <= 128:
        # Each thread holds many columns, which are queries: their ranges take registers.
        narrow = padded_dim == 128 and isinstance(request.mask.rule, Ranges)
        wanted = LaunchShape(32 if narrow else 64, 128, 8, 3)
    else:
        by_gpu = {"sm80": (64, 64, 8, 2), "sm89": (32, 32, 4, 2)}
        wanted = LaunchShape(*by_gpu.get(gpu, (32, 64, 8, 2)))
    return _within(wanted, request.mask.block_size)


def _full_precision_tiles(padded_dim: int) -> tuple[int, int]:
    if padded_dim <= 64:
        return 32, 32
    return (32, 16) if padded_dim <= 128 else (16, 16)


def _within(shape: LaunchShape, block_size: tuple[int, int]) -> LaunchShape:
    query_tile, key_tile = (min(tile, block) for tile, block in zip(shape[:2], block_size, strict=True))
    # A tensor core instruction takes 16 rows of one warp, so small tiles have no work for 8.
    warps = 4 if max(query_tile, key_tile) <= 32 else shape.warps
    return LaunchShape(query_tile, key_tile, warps, shape.stages)
