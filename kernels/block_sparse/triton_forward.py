"""Block-sparse attention forward in Triton.

One program computes one tile of queries: it walks the key blocks that its query block lists, tile by tile, with the
online softmax. Scores are in base 2 (log2 e is folded into the scale); sums and output are accumulated in float32.
Programs of query blocks with long lists are launched first, so that no long one is left running alone at the end.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask
from .request import Request

LN_2 = tl.constexpr(math.log(2.0))
SMALL_SHARED_MEMORY = 99 * 1024  # bytes per program on consumer GPUs


@triton.jit
def load_tile(
    base, stride, row_end,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(ROWS, PADDED_DIM) starting at `base`. Columns past HEAD_DIM are 0; so are rows from `row_end` on, if CUT."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED_DIM)[None, :]
    pointers = base + rows * stride + columns
    if CUT:
        tile = tl.load(pointers, mask=(rows < row_end) & (columns < HEAD_DIM), other=0.0)
    elif HEAD_DIM != PADDED_DIM:
        tile = tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def online_softmax(scores, largest, total, out, GUARD: tl.constexpr):
    """Takes in a tile of base-2 scores: its weights, and the running maximum, sum and output brought up to date."""
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest) if GUARD else new_largest
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(largest - shift)
    return weights, new_largest, total * decay + tl.sum(weights, 1), out * decay[:, None]


@triton.jit
def attend(
    query, keys, values, key_stride, value_stride, row_end, scale, largest, total, out,
    KEY_TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys. With CUT the keys from `row_end` on are invisible and never read."""
    key = load_tile(keys, key_stride, row_end, KEY_TILE, HEAD_DIM, PADDED_DIM, CUT)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if CUT:
        scores = tl.where(tl.arange(0, KEY_TILE)[None, :] < row_end, scores, float("-inf"))
    weights, largest, total, out = online_softmax(scores, largest, total, out, CUT)
    value = load_tile(values, value_stride, row_end, KEY_TILE, HEAD_DIM, PADDED_DIM, CUT)
    out = tl.dot(weights.to(value.dtype), value, out, input_precision=PRECISION)
    return largest, total, out


@triton.jit
def forward_kernel(
    query, key, value, out, lse, order, counts, indices, key_valid,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, out_batch, out_head, out_token,
    order_batch, order_head, counts_batch, counts_head, indices_batch, indices_head, indices_row, indices_slot,
    valid_batch, heads, query_length, key_length, scale,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Offsets between samples, heads and blocks can pass 2 ** 31; within a tile they cannot.
    QUERY_TILES: tl.constexpr = QUERY_BLOCK // QUERY_TILE
    KEY_TILES: tl.constexpr = KEY_BLOCK // KEY_TILE
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    place = tl.program_id(0) // QUERY_TILES
    row = tl.load(order + sample * order_batch + head * order_head + place).to(tl.int64)
    count = tl.load(counts + sample * counts_batch + head * counts_head + row)
    listed = indices + sample * indices_batch + head * indices_head + row * indices_row
    if RAGGED:
        valid = tl.load(key_valid + sample * valid_batch)
    else:
        valid = key_length
    # Lists ascend, so only the last listed block can hold a key past the valid ones.
    whole = count
    if count > 0:
        last = tl.load(listed + (count - 1) * indices_slot)
        if (last + 1) * KEY_BLOCK > valid:
            whole = count - 1

    first = row * QUERY_BLOCK + (tl.program_id(0) % QUERY_TILES) * QUERY_TILE
    query_end = query_length - first
    queries = query + sample * query_batch + head * query_head + first * query_token
    tile = load_tile(queries, query_token, query_end, QUERY_TILE, HEAD_DIM, PADDED_DIM, True)
    keys = key + sample * key_batch + head * key_head
    values = value + sample * value_batch + head * value_head

    largest = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_TILE,), tl.float32)
    found = tl.zeros((QUERY_TILE, PADDED_DIM), tl.float32)
    for step in range(0, whole * KEY_TILES):
        block = tl.load(listed + (step // KEY_TILES) * indices_slot).to(tl.int64)
        start = block * KEY_BLOCK + (step % KEY_TILES) * KEY_TILE
        largest, total, found = attend(
            tile, keys + start * key_token, values + start * value_token, key_token, value_token, 0, scale,
            largest, total, found, KEY_TILE, HEAD_DIM, PADDED_DIM, False, PRECISION,
        )  # fmt: skip
    for step in range(whole * KEY_TILES, count * KEY_TILES):
        block = tl.load(listed + (step // KEY_TILES) * indices_slot).to(tl.int64)
        start = block * KEY_BLOCK + (step % KEY_TILES) * KEY_TILE
        largest, total, found = attend(
            tile, keys + start * key_token, values + start * value_token, key_token, value_token, valid - start, scale,
            largest, total, found, KEY_TILE, HEAD_DIM, PADDED_DIM, True, PRECISION,
        )  # fmt: skip

    seen = total > 0.0
    found = found / tl.where(seen, total, 1.0)[:, None]
    rows = tl.arange(0, QUERY_TILE)
    columns = tl.arange(0, PADDED_DIM)
    outs = out + sample * out_batch + head * out_head + first * out_token + rows[:, None] * out_token + columns[None, :]
    tl.store(outs, found.to(out.dtype.element_ty), mask=(rows[:, None] < query_end) & (columns[None, :] < HEAD_DIM))
    log_sum = tl.where(seen, (largest + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    tl.store(lse + (sample * heads + head) * query_length + first + rows, log_sum, mask=rows < query_end)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq)."""
    out, lse = attention(request.query, request.key, request.value, request.mask, request.scale)
    return out, lse, torch.zeros(*out.shape[:2], request.mask.grid[0], dtype=torch.int32, device=out.device)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, Sq, D) in the dtype and layout of query and lse float32 (B, H, Sq)."""
    batch, heads, query_length, head_dim = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query)
    lse = query.new_empty(batch, heads, query_length, dtype=torch.float32)
    order, counts = (x.expand(batch, heads, -1) for x in (mask.row_order, mask.visible_counts))
    indices = mask.indices.expand(batch, heads, -1, -1)
    # Without padding nothing is read through this pointer.
    valid = counts if mask.key_valid is None else mask.key_valid.expand(batch)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    query_tile, key_tile, warps, stages = launch_shape(query, padded_dim, mask.block_size)
    grid = (mask.grid[0] * (mask.block_size[0] // query_tile), batch * heads)
    with torch.cuda.device_of(query):
        forward_kernel[grid](
            query, key, value, out, lse, order, counts, indices, valid,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            *order.stride()[:2], *counts.stride()[:2], *indices.stride(),
            valid.stride(0), heads, query_length, mask.key_length, scale * math.log2(math.e),
            QUERY_BLOCK=mask.block_size[0], KEY_BLOCK=mask.block_size[1], QUERY_TILE=query_tile, KEY_TILE=key_tile,
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim, RAGGED=mask.key_valid is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else None, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


@functools.cache
def _shared_memory(device: int) -> int:
    """Shared memory in bytes that one program can have; asking the driver is too slow for every call."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def launch_shape(query: Tensor, padded_dim: int, block_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(query tile, key tile, warps, pipeline stages): tiles that divide the mask's blocks and fit in shared memory.

    Chosen from what the compiler reports for sm_80 and sm_90: the largest tiles whose registers hardly spill.
    """
    if query.dtype == torch.float32:  # at full precision there are no tensor cores: registers are the limit
        query_tile, key_tile, warps, most_stages = (64, 32, 8, 2) if padded_dim <= 64 else (16, 16, 4, 2)
    elif padded_dim <= 128:
        query_tile, key_tile, warps, most_stages = 128, 64, 4 if padded_dim <= 64 else 8, 3
    else:
        query_tile, key_tile, warps, most_stages = 128, 32, 8, 2
    query_tile, key_tile = min(query_tile, block_size[0]), min(key_tile, block_size[1])
    if query_tile <= 64 and query.dtype != torch.float32:
        warps = 4
    memory = _shared_memory(query.device.index) if query.is_cuda else SMALL_SHARED_MEMORY
    stages = most_stages
    while stages > 1 and (query_tile + 2 * stages * key_tile) * padded_dim * query.element_size() > memory:
        stages -= 1
    return query_tile, key_tile, warps, stages
