"""Device functions on tiles of tokens: loading them, what is visible in a partial block, fast conversions.

A position counts tokens as the mask does; with a token order it is translated where memory is touched. Offsets
between samples, heads and tokens are 64-bit, those within a tile of consecutive tokens 32-bit.
"""

import triton
import triton.language as tl

from .triton_quantize import to_fp8

INT_MAX = tl.constexpr(2**31 - 1)
MAGIC = tl.constexpr(1.5 * 2.0**23)  # a float32 this large counts in ones: its low bits are an integer
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def load_tile(
    base, token_stride, channel_stride, first, rows_left, token_order,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(ROWS, PADDED_DIM) from position `first` on. Columns past HEAD_DIM are 0; with CUT, rows past `rows_left` too."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED_DIM)[None, :]
    if token_order is None:
        start = base + first.to(tl.int64) * token_stride
        pointers = start + (rows[:, None] * token_stride + columns * channel_stride)
    else:
        tokens = load_tokens(token_order, first, rows_left, ROWS, CUT).to(tl.int64)
        pointers = base + (tokens * token_stride)[:, None] + columns * channel_stride
    if CUT:
        tile = tl.load(pointers, mask=(rows[:, None] < rows_left) & (columns < HEAD_DIM), other=0.0)
    elif HEAD_DIM != PADDED_DIM:
        tile = tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_tokens(token_order, first, rows_left, ROWS: tl.constexpr, CUT: tl.constexpr):
    """int32 (ROWS,): the tokens at positions from `first` on; past `rows_left`, if CUT, any that exists."""
    rows = tl.arange(0, ROWS)
    if token_order is None:
        tokens = first + rows
    elif CUT:
        tokens = tl.load(token_order + first + rows, mask=rows < rows_left, other=0)
    else:
        tokens = tl.load(token_order + first + rows)
    return tokens


@triton.jit
def seen_by_ranges(
    coordinates, low, high, first_query, query_rows, first_key, key_rows,
    QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """bool (QUERY_TILE, KEY_TILE) by the rule `Ranges`; False for keys past the end."""
    rows, columns = tl.arange(0, QUERY_TILE), tl.arange(0, KEY_TILE)
    seen = tl.full((QUERY_TILE, KEY_TILE), 1, tl.int1)
    for axis in tl.static_range(AXES):
        # Negative coordinates lie in every range: without a sign they are above all bounds, with it below all. So the
        # two comparisons are all there is per pair. Missing keys are above all bounds.
        place = tl.load(coordinates + (first_key + columns) * AXES + axis, mask=columns < key_rows, other=INT_MAX)
        least = tl.maximum(tl.load(low + (first_query + rows) * AXES + axis, mask=rows < query_rows, other=0), 0)
        end = tl.maximum(tl.load(high + (first_query + rows) * AXES + axis, mask=rows < query_rows, other=0), 0)
        seen &= least.to(tl.uint32)[:, None] <= place.to(tl.uint32)[None, :]
        seen &= place[None, :] < end[:, None]
    return seen


@triton.jit
def seen_by_chunk(bits, bits_token, chunk, first_query, query_rows, QUERY_TILE: tl.constexpr):
    """bool (QUERY_TILE,): the queries that see `chunk` by the rule `ChunkBits`; False past the end."""
    rows = tl.arange(0, QUERY_TILE)
    places = bits + (first_query + rows).to(tl.int64) * bits_token + chunk // 32
    words = tl.load(places, mask=rows < query_rows, other=0)
    return ((words >> (chunk % 32)) & 1) != 0


@triton.jit
def to_float(integers):
    """float32 of int32 below 2 ** 22 in magnitude: an addition is four times as fast as the conversion on a GPU."""
    return (integers + MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def to_int8(x):
    """int8 of float32 in 0..127, rounded to nearest, as fast as `to_float`."""
    return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


INTERPRETED = tl.constexpr(not isinstance(to_int8, triton.JITFunction))


@triton.jit
def to_weights_fp8(x):
    """float8e4nv of float32 in 0..448 and a last bit. A GPU's conversion saturates, so it needs no clamp."""
    return to_fp8(x) if INTERPRETED else x.to(tl.float8e4nv)
