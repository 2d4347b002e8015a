"""Block masks with ragged blocks and with partial blocks: what they say about themselves, token by token."""

import pytest
import torch

from attnproc.kernels import BlockMask, ChunkBits, Ranges, block_sparse_attention, oracle

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def random_offsets(length, size):
    """Blocks of 1 to `size` tokens."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(bounds[-1] + int(torch.randint(1, size + 1, ())), length))
    return torch.tensor(bounds, dtype=torch.int32)


def random_ranges(queries, keys, axes):
    key = torch.randint(-1, 6, (keys, axes)).int()
    low = torch.randint(-2, 5, (queries, axes)).int()
    return Ranges(key, low, low + torch.randint(0, 6, (queries, axes)).int())


def expected_tokens(whole, partial, rule, rows, columns, samples, heads):
    """The token mask by loops over pairs of blocks, the rule asked pair by pair of tokens."""
    tokens = torch.zeros(samples, heads, int(rows[-1]), int(columns[-1]), dtype=torch.bool)
    for b in range(samples):
        for h in range(heads):
            for i in range(len(rows) - 1):
                for j in range(len(columns) - 1):
                    place = (b % whole.shape[0], h % whole.shape[1], i, j)
                    for q in range(int(rows[i]), int(rows[i + 1])):
                        for k in range(int(columns[j]), int(columns[j + 1])):
                            if whole[place]:
                                tokens[b, h, q, k] = True
                            elif partial[place] and isinstance(rule, Ranges):
                                c, low, high = rule.key_coordinates[k], rule.low[q], rule.high[q]
                                tokens[b, h, q, k] = all(
                                    x < 0 or a <= x < z for x, a, z in zip(c, low, high, strict=True)
                                )
                            elif partial[place]:
                                chunk = int(rule.key_chunk[j])
                                word = int(rule.bits[b % rule.bits.shape[0], h % rule.bits.shape[1], q, chunk // 32])
                                tokens[b, h, q, k] = bool((word >> (chunk % 32)) & 1)
    return tokens


@pytest.fixture(params=["ranges", "chunk bits"])
def ragged_mask(request, seed):
    """A mask of two samples and two heads with ragged and partial blocks, and its token mask by hand."""
    rows, columns = random_offsets(37, 8), random_offsets(41, 16)
    grid = len(rows) - 1, len(columns) - 1
    whole, partial = torch.rand(2, 2, *grid) < 0.3, torch.rand(2, 2, *grid) < 0.5
    if request.param == "ranges":
        rule = random_ranges(37, 41, 2)
    else:
        chunks = torch.randint(0, 40, (grid[1],)).sort().values.int()
        rule = ChunkBits.from_selection(torch.rand(2, 2, 37, 40) < 0.5, chunks)
    mask = BlockMask.from_blocks(
        whole, 37, 41, (8, 16), partial=partial, rule=rule, query_offsets=rows, key_offsets=columns
    ).validate()
    return mask, expected_tokens(whole, partial, rule, rows, columns, 2, 2)


def test_the_token_mask_is_what_lists_and_rule_say(ragged_mask):
    mask, expected = ragged_mask
    assert torch.equal(mask.token_mask().expand(2, 2, -1, -1), expected)
    assert (mask.batch, mask.heads) == (2, 2)


def test_kept_pairs_count_listed_blocks_as_a_whole(ragged_mask):
    mask, _ = ragged_mask
    valid = torch.tensor([41, 17])
    for kept, limit in ((mask, torch.tensor([41, 41])), (mask.with_key_valid(valid), valid)):
        listed = oracle._to_tokens(kept.to_blocks(), kept)
        listed = listed & (torch.arange(41) < limit.view(-1, 1, 1, 1))
        assert int(kept.kept_pairs) == int(listed.sum())
        assert kept.density == pytest.approx(listed.double().mean().item())
        first = [int(i) for i in kept.query_bounds[:-1]]
        assert torch.equal(kept.visible_keys.expand(2, 2, -1), listed[:, :, first].sum(-1).int())


def test_the_lists_by_key_are_the_transpose(ragged_mask):
    mask, _ = ragged_mask
    seen = mask.by_key
    for counts, indices, blocks in (
        (seen.counts, seen.indices, mask.to_blocks() & ~mask.partial_blocks()),
        (seen.partial_counts, seen.partial_indices, mask.partial_blocks()),
    ):
        for b, h, j in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            found = indices[b, h, j, : counts[b, h, j]].tolist()
            assert found == blocks[b, h, :, j].nonzero().flatten().tolist()
    lengths = (seen.counts + seen.partial_counts).gather(-1, seen.order.long())
    assert bool((lengths.diff(dim=-1) <= 0).all())


def test_a_moved_mask_takes_everything_along(ragged_mask):
    mask, _ = ragged_mask
    moved = mask.with_key_valid(torch.tensor([41, 3])).to("meta")
    assert {tensor.device.type for _, tensor in moved._named_tensors()} == {"meta"}
    assert len(moved._named_tensors()) == len(mask._named_tensors()) + 1 and moved.grid == mask.grid


def test_every_bit_of_a_word_can_be_set(seed):
    selection = torch.rand(1, 2, 9, 70) < 0.5
    selection[..., 31] = selection[..., 63] = True  # the sign bits
    rule = ChunkBits.from_selection(selection, torch.arange(70))
    ids = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate((1, 2, 9, 70))]
    assert torch.equal(rule.visible(*ids, ids[3]), selection) and rule.bits.shape == (1, 2, 9, 3)


def test_a_key_at_minus_one_is_in_every_range():
    rule = Ranges(
        torch.tensor([[-1, -1], [2, 5], [-1, 9]]).int(), torch.tensor([[1, 4]]).int(), torch.tensor([[3, 6]]).int()
    )
    zero = torch.zeros(1, dtype=torch.long)
    assert rule.visible(zero, zero, zero, torch.arange(3), zero).tolist() == [True, True, False]


def test_partial_blocks_go_to_flex_and_ragged_ones_are_refused(seed, close):
    query, key, value = (torch.randn(2, 2, n, 16) for n in (40, 50, 50))
    rule = random_ranges(40, 50, 3)
    whole, partial = torch.rand(1, 2, 3, 4) < 0.3, torch.rand(1, 2, 3, 4) < 0.6
    mask = BlockMask.from_blocks(whole, 40, 50, (16, 16), torch.tensor([50, 21]), partial=partial, rule=rule)
    out, lse = block_sparse_attention(query, key, value, mask, backend="flex", return_lse=True)
    close(out, lse, *oracle.attention(query, key, value, mask))
    ragged = BlockMask.from_blocks(whole, 40, 50, (16, 16), query_offsets=torch.tensor([0, 9, 25, 40]).int())
    with pytest.raises(ValueError, match="without ragged blocks"):
        block_sparse_attention(query, key, value, ragged, backend="flex")
