"""Block-sparse attention on the CPU: gather each query block's keys, run PyTorch's flash kernel on them.

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
    columns: Tensor  # int64 (R * blocks,) the key block ids of each, one after the other
    keys: int  # keys seen by each


# Masks are used by every layer and step, so what they boil down to is kept as long as they live.
_batches: WeakKeyDictionary[BlockMask, dict[tuple[int, int, int], list[Batch]]] = WeakKeyDictionary()


def attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out (B, H, Sq, D) in the dtype of query and lse float32 (B, H, Sq). Memory grows with the tokens."""
    batch, heads, query_length, head_dim = query.shape
    query_block, key_block = mask.block_size
    query_rows, key_rows, value_rows = (
        _blocks(tensor, size) for tensor, size in ((query, query_block), (key, key_block), (value, key_block))
    )
    out = torch.zeros_like(query_rows)
    lse = query_rows.new_full((out.shape[0], query_block), -torch.inf, dtype=torch.float32)
    for part in _plan(mask, batch, heads, head_dim * key.element_size()):
        shape = (len(part.rows), 1, -1, head_dim)
        part_out, part_lse = flash(
            query_rows.index_select(0, part.rows).view(shape),
            key_rows.index_select(0, part.columns).view(shape)[:, :, : part.keys],
            value_rows.index_select(0, part.columns).view(shape)[:, :, : part.keys],
            scale=scale,
        )
        out.index_copy_(0, part.rows, part_out.reshape(len(part.rows), -1))
        lse.index_copy_(0, part.rows, part_lse.view(len(part.rows), query_block).float())
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


def _plan(mask: BlockMask, batch: int, heads: int, bytes_per_key: int) -> list[Batch]:
    plans = _batches.setdefault(mask, {})
    name = (batch, heads, bytes_per_key)
    if name not in plans:
        plans[name] = _make_plan(mask, batch, heads, bytes_per_key)
    return plans[name]


def _make_plan(mask: BlockMask, batch: int, heads: int, bytes_per_key: int) -> list[Batch]:
    key_block, columns = mask.block_size[1], mask.grid[1]
    keys = mask.visible_keys.expand(batch, heads, -1).reshape(-1)
    # Row r of the expanded mask reads row list_of[r] of the stored one.
    stored = torch.arange(mask.counts.numel()).view(mask.counts.shape)
    list_of = stored.expand(batch, heads, -1).reshape(-1)
    first_column = torch.arange(batch * heads).repeat_interleave(mask.grid[0]) * columns
    lists = mask.indices.reshape(-1, mask.indices.shape[-1])

    order = keys.argsort(stable=True)
    counts = keys[order].unique_consecutive(return_counts=True)
    budget = GATHER_BYTES * torch.get_num_threads()
    plan = []
    for seen, rows in zip(counts[0].tolist(), order.split(counts[1].tolist()), strict=True):
        if seen == 0:
            continue
        width = count_blocks(seen, key_block)
        for part in rows.split(max(budget // (2 * seen * bytes_per_key), 1)):
            gathered = lists[list_of[part], :width] + first_column[part, None]
            plan.append(Batch(part, gathered.reshape(-1).long(), seen))
    return plan
