"""BlockMask: what it says, token by token, and its way to and from FlexAttention."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from attnproc.kernels import BlockMask


def test_blocks_survive_the_round_trip(shape, make_case):
    case = make_case(shape)
    mask = case.mask.validate()
    expected = case.blocks.reshape(mask.to_blocks().shape)
    assert torch.equal(mask.to_blocks(), expected)
    assert torch.equal(mask.row_counts, expected.sum(-1).int())


def test_counts_and_density_are_those_of_the_token_mask(shape, make_case):
    mask = make_case(shape).mask
    tokens = mask.token_mask()
    assert tokens.shape[-2:] == (shape.queries, shape.keys)
    first_rows = tokens[:, :, :: shape.block_size[0]]
    assert torch.equal(mask.visible_keys, first_rows.sum(-1).int())
    assert mask.density == pytest.approx(tokens.double().mean().item(), rel=1e-12)
    blocks_with_a_key = torch.nn.functional.pad(first_rows, (0, -shape.keys % shape.block_size[1]))
    blocks_with_a_key = blocks_with_a_key.unflatten(-1, (-1, shape.block_size[1])).any(-1)
    assert torch.equal(mask.visible_counts, blocks_with_a_key.sum(-1).int())


def test_the_token_mask_expands_blocks_and_hides_padding(make_case, new_shape):
    case = make_case(new_shape(batch=2, queries=37, keys=45, block_size=(16, 32), key_valid=(45, 20), mask_heads=True))
    tokens = case.mask.token_mask()
    for sample, valid in enumerate((45, 20)):
        for row in range(37):
            for column in range(45):
                kept = case.blocks[0, :, row // 16, column // 32] & (column < valid)
                assert torch.equal(tokens[sample, :, row, column], kept)


def test_rows_are_ordered_longest_first(make_case, new_shape):
    mask = make_case(new_shape(queries=200, keys=200, batch=2, key_valid=(200, 50), mask_heads=True)).mask
    order = mask.row_order.long()
    assert torch.equal(order.sort(-1).values, torch.arange(13).expand_as(order))
    lengths = mask.visible_counts.gather(-1, order)
    assert (lengths[..., 1:] <= lengths[..., :-1]).all()


def test_full_is_dense_and_stores_one_list():
    mask = BlockMask.full(1000, 70, (16, 32)).validate()
    assert mask.density == 1.0 and mask.token_mask().all()
    assert mask.grid == (63, 3)
    assert mask.nbytes == 4 * (63 + 3)


def test_density_counts_tails_and_padding_exactly():
    blocks = torch.tensor([[True, False], [False, True]])
    mask = BlockMask.from_blocks(blocks, 20, 18, (16, 16))
    assert mask.density == (16 * 16 + 4 * 2) / (20 * 18)
    mask = mask.with_key_valid(torch.tensor([18, 17, 5, 0]))
    assert mask.batch == 4
    assert mask.density == (16 * (16 + 16 + 5 + 0) + 4 * (2 + 1 + 0 + 0)) / (4 * 20 * 18)
    assert mask.with_key_valid(None).density == (16 * 16 + 4 * 2) / (20 * 18)


def test_to_moves_every_tensor(make_case, new_shape):
    mask = make_case(new_shape(batch=2, key_valid=(64, 3))).mask.to("meta")
    assert {mask.counts.device.type, mask.indices.device.type, mask.key_valid.device.type} == {"meta"}


def test_flex_round_trip(shape, make_case):
    mask = make_case(shape).mask
    flex = mask.to_flex()
    back = BlockMask.from_flex(flex, mask.key_valid).validate()
    assert torch.equal(back.token_mask(), mask.token_mask())
    assert back.block_size == mask.block_size


def test_flex_mask_says_the_same_about_every_token(shape, make_case):
    mask = make_case(shape).mask
    ids = [torch.arange(n) for n in (shape.batch, shape.heads, shape.queries, shape.keys)]
    visible = mask.to_flex().mask_mod(*torch.meshgrid(*ids, indexing="ij"))
    assert torch.equal(visible, mask.token_mask().expand_as(visible))


def test_flex_masks_of_whole_blocks_are_taken():
    """A sliding window by blocks over 90 tokens: its tail blocks are partial to FlexAttention, whole to us."""

    def window(batch, head, row, column):
        return (row // 16 - column // 16).abs() <= 1

    flex = create_block_mask(window, None, None, 90, 90, device="cpu", BLOCK_SIZE=16)
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 1
    assert torch.equal(BlockMask.from_flex(flex).to_blocks()[0, 0], near)


def test_flex_masks_that_cut_blocks_are_refused():
    causal = create_block_mask(lambda b, h, row, column: row >= column, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="partial blocks"):
        BlockMask.from_flex(causal)
    padded = BlockMask.full(64, 64, (16, 16), torch.tensor([64, 20])).to_flex()
    with pytest.raises(ValueError, match="pass key_valid"):
        BlockMask.from_flex(padded)


def test_validate_finds_wrong_values():
    good = BlockMask.from_blocks(torch.tensor([[True, True, False]]), 16, 48, (16, 16))
    counts, indices = good.counts, good.indices
    for bad_counts, bad_indices in (
        (counts + 1, indices),
        (counts, indices.flip(-1)),
        (counts, indices + 2),
        (counts - 1, indices),
    ):
        with pytest.raises(ValueError, match="expected"):
            BlockMask(bad_counts, bad_indices, 16, 48, (16, 16)).validate()
