"""The functions of `quantize` as Triton kernels: same names, same arguments, same integers.

All are limited by memory traffic. Reductions over tokens take two stages, so no program adds to what another wrote and
two runs give the same bits. Tensors are read through their strides, whatever the layout; results are contiguous.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import FP8, FP8_LARGEST, LARGEST, SMALLEST_SCALE, channel_scale

ROWS = 64  # tokens per tile
CHUNK = 1024  # tokens reduced by one program
EPSILON = tl.constexpr(SMALLEST_SCALE)
FP8_MAX = tl.constexpr(FP8_LARGEST)


@triton.jit
def load_rows(base, stride, first, end, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """float32 (ROWS, PADDED_DIM) of tokens from `first` on; 0 from token `end` on and past HEAD_DIM."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED_DIM)[None, :]
    pointers = base + first.to(tl.int64) * stride + rows * stride + columns
    return tl.load(pointers, mask=(first + rows < end) & (columns < HEAD_DIM), other=0.0).to(tl.float32)


@triton.jit
def load_shifted(
    base, stride, first, end, shift,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """As `load_rows`, less the vector `shift` where there is one; still 0 from `end` on."""
    tile = load_rows(base, stride, first, end, ROWS, HEAD_DIM, PADDED_DIM)
    if SHIFT:
        columns = tl.arange(0, PADDED_DIM)
        mean = tl.load(shift + columns, mask=columns < HEAD_DIM, other=0.0)
        tile = tl.where(first + tl.arange(0, ROWS)[:, None] < end, tile - mean[None, :], 0.0)
    return tile


@triton.jit
def store_rows(base, first, end, tile, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Writes the tokens from `first` to `end` of a contiguous (tokens, HEAD_DIM)."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, PADDED_DIM)[None, :]
    pointers = base + first.to(tl.int64) * HEAD_DIM + rows * HEAD_DIM + columns
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(first + rows < end) & (columns < HEAD_DIM))


@triton.jit
def magnitude(tile):
    """|x|, infinity for NaN, which the hardware's maximum would pass over."""
    return tl.where(tile == tile, tl.abs(tile), float("inf"))


@triton.jit
def divide(tile, scale):
    """tile / scale correctly rounded, and 0 instead of NaN, which comes from infinite scales."""
    quotient = tl.div_rn(tile, tl.broadcast_to(scale, tile.shape))
    return tl.where(quotient == quotient, quotient, 0.0)


@triton.jit
def to_int8(tile):
    """Rounded, halves away from zero: the cast cuts towards zero."""
    rounded = tile + tl.where(tile < 0.0, -0.5, 0.5)
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)


INTERPRETED = tl.constexpr(not isinstance(to_int8, triton.JITFunction))


@triton.jit
def to_fp8(tile):
    """Rounded to E4M3, halves to even, larger numbers to +-448."""
    tile = tl.minimum(tl.maximum(tile, -FP8_MAX), FP8_MAX)
    if INTERPRETED:
        # The interpreter's cast is right only for numbers that need no rounding: its carry loses the exponent. So
        # round to the format's step, 1/8 of the power of two below: adding 1.5 * 2 ** 23 steps drops what is finer.
        power = (tl.abs(tile).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        anchor = tl.maximum(power, 0.015625) * (0.125 * 12582912.0)
        tile = (tile + anchor) - anchor
    return tile.to(tl.float8e4nv)


@triton.jit
def reduce_channels_kernel(
    x, valid, out, x_batch, x_head, x_token, valid_batch, heads, length,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Of one chunk of tokens, per channel: the sum, or the largest magnitude."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    x += sample * x_batch + (tl.program_id(1) % heads).to(tl.int64) * x_head
    end = length
    if RAGGED:
        end = tl.load(valid + sample * valid_batch)
    found = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    for step in range(0, CHUNK // ROWS):
        tile = load_rows(x, x_token, tl.program_id(0) * CHUNK + step * ROWS, end, ROWS, HEAD_DIM, PADDED_DIM)
        found = tl.maximum(found, magnitude(tile)) if MAGNITUDE else found + tile
    columns = tl.arange(0, PADDED_DIM)
    place = out + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * HEAD_DIM + columns
    tl.store(place, tl.max(found, 0) if MAGNITUDE else tl.sum(found, 0), mask=columns < HEAD_DIM)


@triton.jit
def quantize_rows_kernel(
    x, shift, offsets, valid, out, scale, x_batch, x_head, x_token, valid_batch, heads, length, groups, largest,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr, SHIFT: tl.constexpr, OFFSETS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One group of tokens, or with PER_TOKEN one tile of groups of a single token."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    map_id = tl.program_id(1).to(tl.int64)
    x += sample * x_batch + (tl.program_id(1) % heads).to(tl.int64) * x_head
    out += map_id * length * HEAD_DIM
    shift += map_id * HEAD_DIM
    scale += map_id * groups
    if OFFSETS:
        first = tl.load(offsets + tl.program_id(0))
        end = tl.load(offsets + tl.program_id(0) + 1)
    else:
        first = tl.program_id(0) * GROUP
        end = tl.minimum(first + GROUP, length)
    known = end
    if RAGGED:
        known = tl.minimum(end, tl.load(valid + sample * valid_batch))

    if PER_TOKEN:
        tile = load_shifted(x, x_token, first, known, shift, ROWS, HEAD_DIM, PADDED_DIM, SHIFT)
        scales = tl.div_rn(tl.max(magnitude(tile), 1), tl.full((ROWS,), 0.0, tl.float32) + largest) + EPSILON
        rows = tl.arange(0, ROWS)
        tl.store(scale + first + rows, scales, mask=first + rows < end)
        store_rows(out, first, end, to_int8(divide(tile, scales[:, None])), ROWS, HEAD_DIM, PADDED_DIM)
    else:
        amax = tl.zeros((ROWS, PADDED_DIM), tl.float32)
        steps = tl.cdiv(end - first, ROWS)
        for step in range(0, steps):
            tile = load_shifted(x, x_token, first + step * ROWS, known, shift, ROWS, HEAD_DIM, PADDED_DIM, SHIFT)
            amax = tl.maximum(amax, magnitude(tile))
        group_scale = tl.div_rn(tl.max(tl.max(amax, 1), 0), largest) + EPSILON
        tl.store(scale + tl.program_id(0), group_scale)
        for step in range(0, steps):  # the group is still in cache
            start = first + step * ROWS
            tile = load_shifted(x, x_token, start, known, shift, ROWS, HEAD_DIM, PADDED_DIM, SHIFT)
            store_rows(out, start, end, to_int8(divide(tile, group_scale)), ROWS, HEAD_DIM, PADDED_DIM)


@triton.jit
def quantize_channels_kernel(
    x, scale, valid, out, x_batch, x_head, x_token, valid_batch, heads, length,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, RAGGED: tl.constexpr, TO_FP8: tl.constexpr,
):  # fmt: skip
    """One tile of tokens divided by the scales of their channels."""
    sample = (tl.program_id(1) // heads).to(tl.int64)
    x += sample * x_batch + (tl.program_id(1) % heads).to(tl.int64) * x_head
    out += tl.program_id(1).to(tl.int64) * length * HEAD_DIM
    end = length
    if RAGGED:
        end = tl.load(valid + sample * valid_batch)
    first = tl.program_id(0) * ROWS
    columns = tl.arange(0, PADDED_DIM)
    scales = tl.load(scale + tl.program_id(1) * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=1.0)
    tile = divide(load_rows(x, x_token, first, end, ROWS, HEAD_DIM, PADDED_DIM), scales[None, :])
    store_rows(out, first, length, to_fp8(tile) if TO_FP8 else to_int8(tile), ROWS, HEAD_DIM, PADDED_DIM)


@triton.jit
def correction_kernel(
    x, mean, out, x_batch, x_head, x_token, heads, length, scale,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """scale * x . mean for one tile of tokens."""
    x += (tl.program_id(1) // heads).to(tl.int64) * x_batch + (tl.program_id(1) % heads).to(tl.int64) * x_head
    first = tl.program_id(0) * ROWS
    columns = tl.arange(0, PADDED_DIM)
    means = tl.load(mean + tl.program_id(1) * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    tile = load_rows(x, x_token, first, length, ROWS, HEAD_DIM, PADDED_DIM)
    rows = tl.arange(0, ROWS)
    place = out + tl.program_id(1).to(tl.int64) * length + first + rows
    tl.store(place, tl.sum(tile * means[None, :], 1) * scale, mask=first + rows < length)


def key_mean(key: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """As `quantize.key_mean`."""
    total = _reduce_channels(key, key_valid, magnitude=False).sum(2, keepdim=True)
    return total / (key.shape[2] if key_valid is None else key_valid.clamp(min=1).view(-1, 1, 1, 1))


def lse_correction(query: Tensor, mean: Tensor, scale: float) -> Tensor:
    """As `quantize.lse_correction`."""
    query = _rows_contiguous(query)
    batch, heads, length, head_dim = query.shape
    out = query.new_empty(batch, heads, length, dtype=torch.float32)
    with torch.cuda.device_of(query):
        correction_kernel[(triton.cdiv(length, ROWS), batch * heads)](
            query, mean.contiguous(), out, *query.stride()[:3], heads, length, scale,
            ROWS=ROWS, HEAD_DIM=head_dim, PADDED_DIM=_padded(head_dim),
        )  # fmt: skip
    return out


def quantize_rows(
    x: Tensor,
    group_size: int,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    shift: Tensor | None = None,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """As `quantize.quantize_rows`."""
    x = _rows_contiguous(x)
    batch, heads, length, head_dim = x.shape
    per_token = group_size == 1
    if per_token:
        groups, programs, offsets = length, triton.cdiv(length, ROWS), None
    else:
        programs = groups = triton.cdiv(length, group_size) if offsets is None else len(offsets) - 1
    out = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(batch, heads, groups, dtype=torch.float32)
    ragged = None if valid is None else valid.expand(batch)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(programs, batch * heads)](
            # Where there is no shift, offsets or padding, nothing is read through its pointer.
            x, scale if shift is None else shift.contiguous(), scale if offsets is None else offsets,
            scale if ragged is None else ragged, out, scale, *x.stride()[:3], 0 if ragged is None else ragged.stride(0),
            heads, length, groups, float(LARGEST[bits]),
            GROUP=ROWS if per_token else group_size, ROWS=ROWS, HEAD_DIM=head_dim, PADDED_DIM=_padded(head_dim),
            PER_TOKEN=per_token, SHIFT=shift is not None, OFFSETS=offsets is not None, RAGGED=ragged is not None,
        )  # fmt: skip
    return out, scale


def quantize_values(value: Tensor, kind: Literal["fp8", "int8"], valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `quantize.quantize_values`."""
    value = _rows_contiguous(value)
    batch, heads, length, head_dim = value.shape
    scale = channel_scale(_reduce_channels(value, valid, magnitude=True).amax(2, keepdim=True), kind)
    out = value.new_empty(value.shape, dtype=FP8 if kind == "fp8" else torch.int8)
    ragged = None if valid is None else valid.expand(batch)
    with torch.cuda.device_of(value):
        quantize_channels_kernel[(triton.cdiv(length, ROWS), batch * heads)](
            value, scale, scale if ragged is None else ragged, out, *value.stride()[:3],
            0 if ragged is None else ragged.stride(0), heads, length,
            ROWS=ROWS, HEAD_DIM=head_dim, PADDED_DIM=_padded(head_dim), RAGGED=ragged is not None,
            TO_FP8=kind == "fp8",
        )  # fmt: skip
    return out, scale


def _reduce_channels(x: Tensor, valid: Tensor | None, magnitude: bool) -> Tensor:
    """float32 (B, H, chunks, D): the sum or the largest magnitude of each chunk of tokens."""
    x = _rows_contiguous(x)
    batch, heads, length, head_dim = x.shape
    out = x.new_empty(batch, heads, triton.cdiv(length, CHUNK), head_dim, dtype=torch.float32)
    ragged = None if valid is None else valid.expand(batch)
    with torch.cuda.device_of(x):
        reduce_channels_kernel[(out.shape[2], batch * heads)](
            x, out if ragged is None else ragged, out, *x.stride()[:3], 0 if ragged is None else ragged.stride(0),
            heads, length, CHUNK=CHUNK, ROWS=ROWS, HEAD_DIM=head_dim, PADDED_DIM=_padded(head_dim),
            RAGGED=ragged is not None, MAGNITUDE=magnitude,
        )  # fmt: skip
    return out


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(head_dim: int) -> int:
    return triton.next_power_of_2(head_dim)
