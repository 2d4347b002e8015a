"""Whole, equally large blocks on the CPU: gather each query block's keys, run PyTorch's flash kernel on them.

Query blocks that see the same number of keys form one batch of the flash kernel, so a call costs a few large steps
however many query blocks there are. Batches are cut so that the gathered keys stay in cache. Since lists ascend and
valid keys are a prefix, a tail block or padding is always the end of a gathered run: it is trimmed, never masked.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .block_mask import BlockMask, count_blocks

GATHER_BYTES = 1 << 21  # keys and values gathered at a time, per thread: they should stay in cache

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Batch:
    """Query blocks that see equally many keys. Ids count over batch * heads * blocks."""

    rows: Tensor  # int64 (R,) query block ids
    columns: Tensor  # int64 (R * listed key blocks,) the key block ids of each row, one row after the other
    keys: int  # keys seen by each, 0 allowed
    run: slice | None  # the key blocks of a row alone where they are neighbours in memory: nothing to gather


# Masks are used by every layer and step, so what they boil down to is kept as long as they live.
_batches: WeakKeyDictionary[BlockMask, dict[tuple[int, int, int], list[Batch]]] = WeakKeyDictionary()


def attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, Sq, D) in the dtype of query and lse float32 (B, H, Sq). Memory grows with the tokens."""
    batch, heads, query_length, head_dim = query.shape
    query_block, key_block = mask.block_size
    batches = _batches_of(mask, batch, heads, head_dim * key.element_size())
    query_rows, key_rows, value_rows = _blocks(query, query_block), _blocks(key, key_block), _blocks(value, key_block)
    out = torch.empty_like(query_rows)
    lse = query_rows.new_empty(out.shape[0], query_block, dtype=torch.float32)
    # Fresh memory for every batch would cost as much in page faults as the copying itself.
    most = max(len(part.columns) for part in batches)
    key_buffer, value_buffer = (rows.new_empty(most, rows.shape[1]) for rows in (key_rows, value_rows))
    for part in batches:
        if part.keys == 0:
            out.index_fill_(0, part.rows, 0.0)
            lse.index_fill_(0, part.rows, -torch.inf)
            continue
        shape = (len(part.rows), 1, -1, head_dim)
        if part.run is not None:
            keys, values = key_rows[part.run], value_rows[part.run]
        else:
            keys, values = key_buffer[: len(part.columns)], value_buffer[: len(part.columns)]
            torch.index_select(key_rows, 0, part.columns, out=keys)
            torch.index_select(value_rows, 0, part.columns, out=values)
        part_out, part_lse = flash(
            query_rows.index_select(0, part.rows).view(shape),
            keys.view(shape)[:, :, : part.keys],
            values.view(shape)[:, :, : part.keys],
            scale=scale,
        )
        out.index_copy_(0, part.rows, part_out.reshape(len(part.rows), -1))
        lse.index_copy_(0, part.rows, part_lse.view(len(part.rows), -1).float())
    out = out.view(batch, heads, -1, head_dim)[:, :, :query_length]
    return out, lse.view(batch, heads, -1)[:, :, :query_length]


def _blocks(tensor: Tensor, size: int) -> Tensor:
    """(B, H, S, D) as (B * H * blocks, size * D), the last block of each head filled up with zeros."""
    batch, heads, length, head_dim = tensor.shape
    padded = count_blocks(length, size) * size
    if padded != length:
        filled = tensor.new_zeros(batch, heads, padded, head_dim)
        filled[:, :, :length] = tensor
        tensor = filled
    return tensor.reshape(-1, size * head_dim)


def _batches_of(mask: BlockMask, batch: int, heads: int, bytes_per_key: int) -> list[Batch]:
    made = _batches.setdefault(mask, {})
    name = (batch, heads, bytes_per_key)
    if name not in made:
        made[name] = _make_batches(mask, batch, heads, bytes_per_key)
    return made[name]


def _make_batches(mask: BlockMask, batch: int, heads: int, bytes_per_key: int) -> list[Batch]:
    keys = mask.visible_keys.expand(batch, heads, -1).reshape(-1)
    order = keys.argsort(stable=True)
    # Row r of the expanded mask reads row list_of[r] of the stored lists, shifted to its own head's key blocks.
    list_of = torch.arange(mask.counts.numel()).view(mask.counts.shape).expand(batch, heads, -1).reshape(-1)
    first_column = torch.arange(batch * heads).repeat_interleave(mask.grid[0]) * mask.grid[1]
    lists = mask.indices.reshape(-1, mask.indices.shape[-1])

    budget = GATHER_BYTES * torch.get_num_threads()
    made = []
    lengths, groups = keys[order].unique_consecutive(return_counts=True)
    for seen, rows in zip(lengths.tolist(), order.split(groups.tolist()), strict=True):
        listed = count_blocks(seen, mask.block_size[1])
        for part in rows.split(max(budget // max(2 * seen * bytes_per_key, 1), 1)):
            columns = lists[list_of[part], :listed] + first_column[part, None]
            made.append(Batch(part, columns.reshape(-1), seen, _run(columns)))
    return made


def _run(columns: Tensor) -> slice | None:
    if columns.shape[0] > 1 or columns.numel() == 0:
        return None
    first, last = int(columns[0, 0]), int(columns[0, -1])
    return slice(first, last + 1) if last - first + 1 == columns.numel() else None
