"""Block scores in Triton: pooling, log-sum-exp of a dense row, block sums of an attention map.

The map is made in tiles and never stored. Tiles are made of slots: a block takes a power of two of them, at least as
many as it has tokens, so several small blocks fit in one tile, a large one takes several tiles, and blocks of any
length are summed by reshaping. Groups of `stride` tokens (XAttention) take the place of tokens: a score is then the
sum over an antidiagonal, read with strided loads. Sums are float32 and in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import _bounds
from .launch import SMALL_SHARED_MEMORY, shared_memory
from .scores import EXPONENT_LIMIT

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def slot_tokens(bounds, blocks, valid, first, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The token (or group) of each slot from `first` on, and whether there is a valid one."""
    slots = first + tl.arange(0, SLOTS)
    block = slots // BLOCK
    start = tl.load(bounds + block, mask=block < blocks, other=0)
    end = tl.load(bounds + block + 1, mask=block < blocks, other=0)
    token = start + slots % BLOCK
    return token, token < tl.minimum(end, valid)


@triton.jit
def load_rows(base, stride, token, there, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """(tokens, PADDED_DIM); 0 for tokens that are not there and columns past HEAD_DIM."""
    columns = tl.arange(0, PADDED_DIM)[None, :]
    pointers = base + token.to(tl.int64)[:, None] * stride + columns
    return tl.load(pointers, mask=there[:, None] & (columns < HEAD_DIM), other=0.0)


@triton.jit
def tile_scores(
    queries, keys, query_stride, key_stride, first_query, row, row_there, column, column_there, query_valid, key_valid,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of query groups `row` and key groups `column`: sums over the antidiagonal of their tokens.

    `first_query` is the last token of each query group: with STRIDE 1 it is loaded once for all tiles.
    """
    token = column * STRIDE
    key = load_rows(keys, key_stride, token, column_there & (token < key_valid), HEAD_DIM, PADDED_DIM)
    scores = tl.dot(first_query, tl.trans(key), input_precision=PRECISION)
    for place in range(1, STRIDE):
        token = row * STRIDE + (STRIDE - 1 - place)
        query = load_rows(queries, query_stride, token, row_there & (token < query_valid), HEAD_DIM, PADDED_DIM)
        token = column * STRIDE + place
        key = load_rows(keys, key_stride, token, column_there & (token < key_valid), HEAD_DIM, PADDED_DIM)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    return scores


@triton.jit
def lse_kernel(
    query, key, lse, query_valid, key_valid,
    query_batch, query_head, query_token, key_batch, key_head, key_token, heads, groups, scale,
    STRIDE: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query groups against all key groups; `scale` is for base-2 scores, `lse` is (B, H, groups)."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    queries = query + sample * query_batch + head * query_head
    keys = key + sample * key_batch + head * key_head
    query_end = tl.load(query_valid + sample)
    key_end = tl.load(key_valid + sample)

    row = tl.program_id(0) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    token = row * STRIDE + STRIDE - 1
    first_query = load_rows(queries, query_token, token, token < query_end, HEAD_DIM, PADDED_DIM)
    largest = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_TILE,), tl.float32)
    for start in range(0, tl.cdiv(key_end, STRIDE), KEY_TILE):
        column = start + tl.arange(0, KEY_TILE)
        there = column * STRIDE < key_end
        scores = tile_scores(
            queries, keys, query_token, key_token, first_query, row, row < groups, column, there, query_end, key_end,
            STRIDE, HEAD_DIM, PADDED_DIM, PRECISION,
        )  # fmt: skip
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        # Every tile has a key, so the maximum is above -inf from the first tile on.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(scores - new_largest[:, None]), 1)
        largest = new_largest
    # A total of 0 means that there was no key.
    found = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2)
    tl.store(lse + (sample * heads + head) * groups + row, found, mask=row < groups)


@triton.jit
def mass_kernel(
    query, key, lse, mass, new_lse, rows, columns, query_valid, key_valid,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    heads, groups, row_blocks, column_blocks, mass_rows, scale, limit,
    STRIDE: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query slots against all key blocks: one row of `mass` for each block, or part of one, in the tile."""
    ROWS: tl.constexpr = QUERY_TILE // QUERY_BLOCK if QUERY_TILE > QUERY_BLOCK else 1
    COLUMNS: tl.constexpr = KEY_TILE // KEY_BLOCK if KEY_TILE > KEY_BLOCK else 1
    PARTS: tl.constexpr = KEY_BLOCK // KEY_TILE if KEY_BLOCK > KEY_TILE else 1
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    queries = query + sample * query_batch + head * query_head
    keys = key + sample * key_batch + head * key_head
    query_end = tl.load(query_valid + sample)
    key_end = tl.load(key_valid + sample)

    first = tl.program_id(0) * QUERY_TILE
    row, row_there = slot_tokens(rows, row_blocks, tl.cdiv(query_end, STRIDE), first, QUERY_TILE, QUERY_BLOCK)
    token = row * STRIDE + STRIDE - 1
    first_query = load_rows(queries, query_token, token, row_there & (token < query_end), HEAD_DIM, PADDED_DIM)
    line = (sample * heads + head) * groups + row
    old = tl.load(lse + line, mask=row_there, other=0.0)

    mass_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = mass + ((sample * heads + head) * mass_rows + mass_row[:, None]) * column_blocks
    total = tl.zeros((QUERY_TILE,), tl.float32)
    for step in range(0, tl.cdiv(column_blocks, COLUMNS)):
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in range(0, PARTS):
            slot = (step * PARTS + part) * KEY_TILE
            column, there = slot_tokens(columns, column_blocks, tl.cdiv(key_end, STRIDE), slot, KEY_TILE, KEY_BLOCK)
            scores = tile_scores(
                queries, keys, query_token, key_token, first_query, row, row_there, column, there, query_end, key_end,
                STRIDE, HEAD_DIM, PADDED_DIM, PRECISION,
            )  # fmt: skip
            power = scores * scale - old[:, None] * LOG2_E
            power = tl.where(power > limit, limit, power)  # unlike minimum, this keeps NaN
            weights = tl.where(row_there[:, None] & there[None, :], tl.exp2(power), 0.0)
            by_column = tl.sum(tl.reshape(weights, (QUERY_TILE, COLUMNS, KEY_TILE // COLUMNS)), 2)
            total += tl.sum(by_column, 1)
            sums += tl.sum(tl.reshape(by_column, (ROWS, QUERY_TILE // ROWS, COLUMNS)), 1)
        block = step * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + block[None, :], sums, mask=(mass_row[:, None] < mass_rows) & (block[None, :] < column_blocks))
    found = tl.where(total == 0.0, float("-inf"), old + tl.log2(tl.where(total == 0.0, 1.0, total)) * LN_2)
    tl.store(new_lse + line, found, mask=row_there)


@triton.jit
def pool_kernel(
    x, mean, similarity, regular, bounds, valid, shift,
    x_batch, x_head, x_token, heads, blocks, block_size,
    BLOCK: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One block of tokens, read once."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    block = tl.program_id(0)
    tokens = x + sample * x_batch + head * x_head
    line = (sample * heads + head) * blocks + block
    channel = tl.arange(0, PADDED_DIM)
    count = tl.minimum(tl.load(bounds + block + 1), tl.load(valid + sample)) - tl.load(bounds + block)
    count = tl.maximum(count, 0)
    if SHIFT:
        moved = tl.load(shift + (sample * heads + head) * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    total = tl.zeros((PADDED_DIM,), tl.float32)
    directions = tl.zeros((PADDED_DIM,), tl.float32)
    odd = tl.zeros((TILE,), tl.int32)
    for start in range(0, BLOCK, TILE):
        place = start + tl.arange(0, TILE)
        there = place < count
        found = load_rows(tokens, x_token, tl.load(bounds + block) + place, there, HEAD_DIM, PADDED_DIM).to(tl.float32)
        if SHIFT:
            found = tl.where(there[:, None], found - moved[None, :], 0.0)
        norm = tl.sqrt(tl.sum(found * found, 1))
        ordinary = (norm > 0.0) & (norm < float("inf"))
        odd += (there & (ordinary == 0)).to(tl.int32)
        total += tl.sum(found, 0)
        directions += tl.sum(found / tl.where(norm == 0.0, 1.0, norm)[:, None], 0)
    some = tl.maximum(count, 1).to(tl.float32)
    tl.store(mean + line * HEAD_DIM + channel, total / some, mask=channel < HEAD_DIM)
    found_similarity = tl.sum(directions * directions, 0) / (some * some)
    # NaN is not below 1 either.
    capped = tl.where(found_similarity < 1.0, found_similarity, 1.0)
    tl.store(similarity + line, tl.where(found_similarity == found_similarity, capped, 0.0))
    tl.store(regular + line, ((count == block_size) & (tl.sum(odd, 0) == 0)).to(tl.int8))


INTERPRETED = not isinstance(mass_kernel, triton.JITFunction)


def pool_blocks(
    x: Tensor, block_size: int, bounds: Tensor, valid: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean float32 (B, H, N, D), similarity float32 (B, H, N), regular bool (B, H, N)."""
    batch, heads, _, head_dim = x.shape
    x = _rows_contiguous(x)
    mean = x.new_empty(batch, heads, len(bounds) - 1, head_dim, dtype=torch.float32)
    similarity = torch.empty_like(mean[..., 0])
    regular = torch.empty_like(similarity, dtype=torch.int8)
    padded_dim = triton.next_power_of_2(head_dim)
    block = triton.next_power_of_2(block_size)
    with torch.cuda.device_of(x):
        pool_kernel[(len(bounds) - 1, batch * heads)](
            x, mean, similarity, regular, bounds, valid.contiguous(),
            # Without a shift nothing is read through this pointer.
            mean if shift is None else shift.float().contiguous(),
            *x.stride()[:3], heads, len(bounds) - 1, block_size,
            BLOCK=block, TILE=min(block, max(8192 // padded_dim, 1)), HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
            SHIFT=shift is not None, num_warps=4,
        )  # fmt: skip
    return mean, similarity, regular.bool()


def dense_lse(query: Tensor, key: Tensor, scale: float, query_valid: Tensor, key_valid: Tensor) -> Tensor:
    """float32 (B, H, Sq)."""
    return _group_lse(query, key, 1, scale, query_valid, key_valid)


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_size: tuple[int, int],
    rows: Tensor,
    columns: Tensor,
    scale: float,
    query_valid: Tensor,
    key_valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mass float32 (B, H, Nq, Nk) and new lse float32 (B, H, Sq); `rows` and `columns` are the bounds of the blocks."""
    return _group_mass(query, key, lse, 1, block_size, rows, columns, scale, query_valid, key_valid)


def antidiagonal_scores(
    query: Tensor, key: Tensor, block_size: int, stride: int, scale: float, query_valid: Tensor, key_valid: Tensor
) -> Tensor:
    """float32 (B, H, Nq, Nk); `scale` is that of the sum over an antidiagonal. Scores are computed twice, not kept."""
    groups = block_size // stride
    rows, columns = (_bounds(triton.cdiv(x.shape[2], stride), groups, None, x.device) for x in (query, key))
    lse = _group_lse(query, key, stride, scale, query_valid, key_valid)
    mass, _ = _group_mass(query, key, lse, stride, (groups, groups), rows, columns, scale, query_valid, key_valid)
    return mass


def _group_lse(query: Tensor, key: Tensor, stride: int, scale: float, query_valid: Tensor, key_valid: Tensor) -> Tensor:
    batch, heads, length, head_dim = query.shape
    query, key = _rows_contiguous(query), _rows_contiguous(key)
    groups = triton.cdiv(length, stride)
    lse = query.new_empty(batch, heads, groups, dtype=torch.float32)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    query_tile, key_tile, warps, stages = launch_shape(query, padded_dim, stride)
    with torch.cuda.device_of(query):
        lse_kernel[(triton.cdiv(groups, query_tile), batch * heads)](
            query, key, lse, query_valid.contiguous(), key_valid.contiguous(),
            *query.stride()[:3], *key.stride()[:3], heads, groups, scale * math.log2(math.e),
            STRIDE=stride, QUERY_TILE=query_tile, KEY_TILE=key_tile, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
            PRECISION=_precision(query), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return lse


def _group_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    stride: int,
    block_size: tuple[int, int],
    rows: Tensor,
    columns: Tensor,
    scale: float,
    query_valid: Tensor,
    key_valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Block sizes and bounds are in groups of `stride` tokens."""
    batch, heads, length, head_dim = query.shape
    query, key = _rows_contiguous(query), _rows_contiguous(key)
    groups = triton.cdiv(length, stride)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    query_tile, key_tile, warps, stages = launch_shape(query, padded_dim, stride)
    query_block, key_block = (triton.next_power_of_2(size) for size in block_size)
    row_blocks, column_blocks = len(rows) - 1, len(columns) - 1
    parts = max(query_block // query_tile, 1)  # a query block of several tiles has as many rows, added up at the end
    mass = query.new_empty(batch, heads, row_blocks * parts, column_blocks, dtype=torch.float32)
    new_lse = query.new_full((batch, heads, groups), -torch.inf, dtype=torch.float32)
    grid = (triton.cdiv(row_blocks * query_block, query_tile), batch * heads)
    with torch.cuda.device_of(query):
        mass_kernel[grid](
            query, key, lse.contiguous(), mass, new_lse, rows, columns, query_valid.contiguous(),
            key_valid.contiguous(), *query.stride()[:3], *key.stride()[:3],
            heads, groups, row_blocks, column_blocks, row_blocks * parts, scale * math.log2(math.e), EXPONENT_LIMIT,
            STRIDE=stride, QUERY_BLOCK=query_block, KEY_BLOCK=key_block, QUERY_TILE=query_tile, KEY_TILE=key_tile,
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PRECISION=_precision(query),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return mass if parts == 1 else mass.unflatten(2, (row_blocks, parts)).sum(3), new_lse


def launch_shape(query: Tensor, padded_dim: int, stride: int) -> tuple[int, int, int, int]:
    """(query tile, key tile, warps, pipeline stages): tiles that fit in shared memory.

    Chosen from what the compiler reports for sm_80 and sm_90: the largest tiles whose registers hardly spill.
    """
    if query.dtype == torch.float32:  # at full precision there are no tensor cores: registers are the limit
        query_tile, key_tile, warps, stages = {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 2)}[
            max(padded_dim, 64)
        ]
    elif padded_dim <= 128:
        query_tile, key_tile, warps, stages = 128, 128 if stride == 1 else 64, 8, 3
    elif stride == 1:
        query_tile, key_tile, warps, stages = 128, 64, 8, 2
    else:
        query_tile, key_tile, warps, stages = 64, 32, 4, 2
    memory = shared_memory(query.device.index) if query.is_cuda else SMALL_SHARED_MEMORY
    while stages > 1 and resident_rows(query_tile, key_tile, stages, stride) * padded_dim * query.itemsize > memory:
        stages -= 1
    return query_tile, key_tile, warps, stages


def resident_rows(query_tile: int, key_tile: int, stages: int, stride: int) -> int:
    """Rows of tokens in shared memory at a time. With a stride query tiles are read again and again too."""
    return query_tile + stages * key_tile if stride == 1 else (stages + 1) * (query_tile + key_tile)


def _precision(x: Tensor) -> str | None:
    return "ieee" if x.dtype == torch.float32 else None


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
