"""torch FlexAttention: conversion of masks both ways, and the backend "flex".

On CUDA it is compiled, once for each shape. On a CPU it is not, as that would take longer than most runs: it then
computes all of S x S, and is for comparison and short sequences.
"""

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from .block_mask import BlockMask
from .errors import bad_argument
from .request import Request

CHECKED_TOKENS = 1 << 22  # (query, key) pairs of partial blocks looked at in one go


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq), all 0."""
    query, mask = request.query, request.mask
    asked = AuxRequest(lse=True)
    attend = _compiled() if query.is_cuda else flex_attention
    out, found = attend(
        query, request.key, request.value, block_mask=to_flex(mask), scale=request.scale, return_aux=asked
    )
    assert found.lse is not None
    skipped = torch.zeros(*query.shape[:2], mask.grid[0], dtype=torch.int32, device=query.device)
    return out, found.lse.float(), skipped


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def to_flex(mask: BlockMask) -> FlexBlockMask:
    """The same mask for FlexAttention. Blocks cut by the end of the keys or by padding become partial blocks."""
    if mask.query_offsets is not None or mask.key_offsets is not None:
        raise bad_argument("mask", "ragged blocks", "equally large blocks", "FlexAttention has no others.")
    partial, blocks = mask.partial_blocks(), mask.to_blocks()
    columns = torch.arange(mask.grid[1], device=mask.device)
    valid = torch.full((1,), mask.key_length, dtype=torch.int32, device=mask.device)
    if mask.key_valid is not None:
        valid = mask.key_valid
    some = blocks & (columns * mask.block_size[1] < valid.view(-1, 1, 1, 1))
    whole = blocks & ~partial & ((columns + 1) * mask.block_size[1] <= valid.view(-1, 1, 1, 1))
    # A size of 1 is shared: its index is always 0.
    batch_step, head_step, valid_step = (int(size > 1) for size in (*blocks.shape[:2], valid.shape[0]))
    query_block, key_block = mask.block_size
    rule = mask.rule

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # Uncompiled FlexAttention asks this alone and never looks at the lists, so it must say everything.
        place = batch * batch_step, head * head_step, row // query_block, column // key_block
        kept = blocks[place]
        if rule is not None:
            kept = kept & (~partial[place] | rule.visible(batch, head, row, column, column // key_block))
        return kept & (column < valid[batch * valid_step])

    return FlexBlockMask.from_kv_blocks(
        *_lists(some & ~whole),
        *_lists(whole),
        BLOCK_SIZE=mask.block_size,
        mask_mod=mask_mod,
        seq_lengths=(mask.query_length, mask.key_length),
    )


def from_flex(flex: FlexBlockMask, key_valid: Tensor | None = None) -> BlockMask:
    """The same mask as a `BlockMask`, which knows whole blocks only.

    key_valid: as in `BlockMask.with_key_valid`; keys past it are padding that the flex mask may hide or show.
    Partial blocks are taken if the flex mask's mask_mod lets every query see every valid key in them, which is so
    for tails; any other partial block raises ValueError.
    """
    partial = _blocks(flex.kv_num_blocks, flex.kv_indices, flex)
    blocks = partial
    if flex.full_kv_num_blocks is not None and flex.full_kv_indices is not None:
        blocks = partial | _blocks(flex.full_kv_num_blocks, flex.full_kv_indices, flex)
    mask = BlockMask.from_blocks(blocks, *flex.seq_lengths, flex.BLOCK_SIZE, key_valid)
    if not _partial_blocks_are_whole(flex, partial.expand(mask.batch, -1, -1, -1), mask):
        raise bad_argument(
            "flex",
            "a flex BlockMask with partial blocks, of which the mask_mod hides some tokens",
            "whole blocks (the last one may be a tail)",
            "Round the mask to blocks first; pass key_valid if padding is what it hides.",
        )
    return mask


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and full-width lists, kept blocks first and ascending, as FlexAttention stores them."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _blocks(counts: Tensor, indices: Tensor, flex: FlexBlockMask) -> Tensor:
    """bool (Bm, Hm, Nq, Nk) from FlexAttention's lists."""
    rows, columns = (-(-length // size) for length, size in zip(flex.seq_lengths, flex.BLOCK_SIZE, strict=True))
    counts, indices = counts.expand(*counts.shape[:2], rows), indices[:, :, :rows]
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    blocks = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=indices.device)
    blocks.scatter_(-1, torch.where(listed, indices, columns).long(), True)  # the extra column takes the unlisted
    return blocks[..., :columns]


def _partial_blocks_are_whole(flex: FlexBlockMask, partial: Tensor, mask: BlockMask) -> bool:
    found = partial.nonzero()
    query_block, key_block = mask.block_size
    row_offsets = torch.arange(query_block, device=partial.device).repeat_interleave(key_block)
    column_offsets = torch.arange(key_block, device=partial.device).repeat(query_block)
    visible = torch.vmap(flex.mask_mod)
    for some in found.split(max(CHECKED_TOKENS // (query_block * key_block), 1)):
        rows = (some[:, 2:3] * query_block + row_offsets).reshape(-1)
        columns = (some[:, 3:4] * key_block + column_offsets).reshape(-1)
        batches, heads = (some[:, i].repeat_interleave(len(row_offsets)) for i in (0, 1))
        valid = torch.full_like(columns, mask.key_length)
        if mask.key_valid is not None:
            valid = mask.key_valid.expand(mask.batch)[batches]
        # Tokens past the end do not exist: the mask_mod must not be asked about them.
        real = (rows < mask.query_length) & (columns < valid)
        tokens = tuple(ids[real] for ids in (batches, heads, rows, columns))
        if len(tokens[0]) and not bool(visible(*tokens).all()):
            return False
    return True
