"""AdaSpa's choice of blocks: worked examples, float64 definitions, and what must hold for any input."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from attnproc.kernels import BlockMask, block_sparse_attention, oracle, scores
from attnproc.sparse.adaspa_blocks import (
    BASE,
    DENSER,
    SPARSER,
    Segments,
    choose_blocks,
    drift,
    head_tiers,
    keep_count,
    rank_blocks,
    scale_rows,
    tier_densities,
    valid_tokens,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


@dataclass(frozen=True)
class Shape:
    video: int
    text: int
    size: int
    valid: tuple[int, ...]  # text tokens of each sample
    heads: int = 3
    head_dim: int = 8

    @property
    def segments(self):
        return Segments(self.video, self.text, self.size)

    @property
    def tokens(self):
        return self.video + self.text

    @property
    def key_valid(self):
        return torch.tensor(self.valid, dtype=torch.int32) + self.video

    @property
    def block_tokens(self):
        return valid_tokens(self.segments.bounds(CPU), self.key_valid)

    def random(self, sharpness=2.0):
        query, key, value = torch.randn(3, len(self.valid), self.heads, self.tokens, self.head_dim)
        return sharpness * query, key, value

    def mask(self, blocks):
        bounds = self.segments.bounds(CPU)
        size = (self.size, self.size)
        return BlockMask.from_blocks(
            blocks, self.tokens, self.tokens, size, self.key_valid, query_offsets=bounds, key_offsets=bounds
        )


SHAPES = {
    "whole blocks, no text": Shape(96, 0, 16, (0,)),
    "short last block": Shape(90, 0, 16, (0, 0)),
    "text": Shape(64, 8, 8, (8,)),
    "ragged text": Shape(90, 21, 16, (21, 6)),
    "a sample without text": Shape(60, 40, 8, (9, 0)),
    "blocks of one token": Shape(9, 3, 1, (3, 2)),
    "one head": Shape(70, 10, 16, (10,), heads=1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def mass_of(query, key, shape, lse=None):
    if lse is None:
        lse = scores.dense_lse(query, key, key_valid=shape.key_valid)
    bounds = shape.segments.bounds(CPU)
    return scores.block_mass(
        query,
        key,
        lse,
        (shape.size, shape.size),
        query_offsets=bounds,
        key_offsets=bounds,
        query_valid=shape.key_valid,
        key_valid=shape.key_valid,
    )


def keeps_of(density, video_blocks):
    return tuple(keep_count(share, video_blocks) for share in tier_densities(density))


def searched(query, key, shape, density, threshold=0.8):
    """Blocks, ranking and tiers from the exact log-sum-exp, as the processor puts the functions together."""
    mass = scale_rows(mass_of(query, key, shape)[0], shape.block_tokens)
    keeps = keeps_of(density, shape.segments.video_blocks)
    ranking = rank_blocks(mass, shape.segments.video_blocks, keeps)
    tiers = head_tiers(ranking.recall, threshold)
    return choose_blocks(ranking.columns, torch.tensor(keeps)[tiers], shape.block_tokens), ranking, tiers


def softmax_of(query, key, shape):
    """float64 (B, H, S, S); rows of padding are 0."""
    valid = torch.arange(shape.tokens) < shape.key_valid.view(-1, 1, 1, 1)
    weights = (query.double() @ key.double().mT / query.shape[-1] ** 0.5).masked_fill(~valid, -torch.inf).softmax(-1)
    return weights.masked_fill(~valid.mT, 0.0)


def block_sums(weights, shape):
    """The definition of the block mass (section 4.1, equation 13)."""
    block = torch.arange(shape.segments.blocks).repeat_interleave(shape.segments.bounds(CPU).diff())
    member = (block == torch.arange(shape.segments.blocks)[:, None]).double()
    return member @ weights @ member.T


def rows_of(blocks, head, rows=(0, 1, 7)):
    return [set(blocks[head, row].nonzero().flatten().tolist()) for row in rows]


# -- worked examples ---------------------------------------------------------------------------------------------------


def test_a1_by_hand():
    shape = Shape(4, 0, 2, (0,), heads=1, head_dim=1)
    query = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 4, 1)
    key = torch.tensor([0.0, math.log(3), 0.0, 0.0]).view(1, 1, 4, 1)
    lse = scores.dense_lse(query, key)
    torch.testing.assert_close(lse.exp().flatten(), torch.tensor([6.0, 6.0, 4.0, 4.0]))
    mass, _ = mass_of(query, key, shape)
    torch.testing.assert_close(mass[0, 0], torch.tensor([[4 / 3, 2 / 3], [1.0, 1.0]]))
    # Exact ties, which float rounding may break in the computed mass.
    ranking = rank_blocks(torch.tensor([[[[4 / 3, 2 / 3], [1.0, 1.0]]]]), 2, (1, 1, 1))
    assert ranking.columns.flatten().tolist() == [0, 0]
    assert ranking.recall.flatten().tolist() == pytest.approx([0.583333] * 3, abs=1e-6)
    stale, new = mass_of(2 * query, key, shape, lse)
    torch.testing.assert_close(stale[0, 0], torch.tensor([[10 / 3, 2 / 3], [1.0, 1.0]]))
    torch.testing.assert_close((new - lse).exp().flatten(), torch.tensor([2.0, 2.0, 1.0, 1.0]))
    torch.testing.assert_close(new.exp().flatten(), torch.tensor([12.0, 12.0, 4.0, 4.0]))
    torch.testing.assert_close(new, scores.dense_lse(2 * query, key))


# sparsity, recall of each head -> sparsity of each head
TIERS = [
    (0.8, (0.95, 0.85, 0.81, 0.79, 0.60, 0.40), (0.9, 0.9, 0.9, 0.7, 0.7, 0.7)),
    (0.8, (0.99, 0.99, 0.99, 0.99, 0.99, 0.5), (0.9, 0.9, 0.9, 0.7, 0.7, 0.7)),
    (0.8, (0.7, 0.7, 0.7, 0.7), (0.8, 0.8, 0.8, 0.8)),
    (0.8, (0.9, 0.9, 0.9, 0.9, 0.1), (0.9, 0.9, 0.8, 0.7, 0.7)),
    (0.8, (0.80, 0.81), (0.7, 0.9)),
    (0.2, (0.9, 0.9, 0.5, 0.5), (0.4, 0.4, 0.0, 0.0)),
    (0.8, (0.99,), (0.8,)),
]


@pytest.mark.parametrize(("sparsity", "recall", "expected"), TIERS, ids=str)
def test_a2_tiers(sparsity, recall, expected):
    tiers = head_tiers(torch.tensor(recall)[:, None].expand(-1, 3), 0.8)
    densities = tier_densities(1 - sparsity)
    assert [1 - densities[tier] for tier in tiers] == pytest.approx(expected)


@dataclass(frozen=True)
class Worked:
    seed: int
    shape: Shape
    scales: tuple[float, ...]
    density: float
    keeps: tuple[int, ...]
    recall: tuple[float, ...]
    rows: dict[int, list[set[int]]]
    block_density: tuple[float, ...]
    sha: str
    out: tuple[float, ...]


A3 = Worked(
    15,
    Shape(64, 8, 8, (8,), heads=4),
    (0.5, 2, 6, 12),
    0.5,
    (6, 6, 2, 2),
    (0.6301, 0.7190, 0.8256, 0.9191),
    {2: [{2, 4, 8}, {3, 4, 8}, {3, 5, 8}], 3: [{2, 3, 8}, {6, 7, 8}, {1, 3, 8}]},
    (0.8025, 0.8025, 0.4074, 0.4074),
    "72202634ce3c021ecb490e79590bdb86f7a92436c10d9b6ca9946af4ae00ff25",
    (0.26188, -0.07277, 0.08354, 0.16599),
)
A4 = Worked(
    14,
    Shape(60, 12, 8, (9,), heads=6),
    (0.5, 1, 4, 8, 12, 16),
    0.25,
    (2,) * 6,
    (0.4615, 0.4959, 0.6169, 0.6981, 0.7088, 0.6454),
    {0: [{1, 2, 8, 9}, {1, 5, 8, 9}, {1, 2, 8, 9}], 3: [{3, 4, 8, 9}, {3, 4, 8, 9}, {1, 5, 8, 9}]},
    (0.52,) * 6,
    "b117f67c600ddcc19609a91a7ed00158ad5d173d8538f5d11f96fc5d3ef1d657",
    (0.11728, 0.66585, 0.40981, -0.04519),
)


def inputs_of(worked):
    state, shape = np.random.RandomState(worked.seed), worked.shape
    size = (shape.heads, shape.tokens, shape.head_dim)
    query, key, value = (torch.from_numpy(state.standard_normal(size).astype(np.float32))[None] for _ in range(3))
    return query * torch.tensor(worked.scales).view(1, -1, 1, 1), key, value


@pytest.mark.parametrize("worked", [A3, A4], ids=["A3", "A4"])
def test_worked_examples(worked):
    query, key, value = inputs_of(worked)
    blocks, ranking, tiers = searched(query, key, worked.shape, worked.density)
    assert ranking.recall[0, :, BASE].tolist() == pytest.approx(worked.recall, abs=6e-5)
    keeps = keeps_of(worked.density, 8)
    assert tuple(keeps[tier] for tier in tiers[0]) == worked.keeps
    for head, expected in worked.rows.items():
        assert rows_of(blocks[0], head) == expected
    assert blocks[0].double().mean((1, 2)).tolist() == pytest.approx(worked.block_density, abs=6e-5)
    bits = np.packbits(blocks[0].numpy().reshape(-1), bitorder="big")
    assert hashlib.sha256(bits.tobytes()).hexdigest() == worked.sha
    out = block_sparse_attention(query, key, value, worked.shape.mask(blocks))
    assert out[0, 0, 0, :4].tolist() == pytest.approx(worked.out, abs=2e-5)


def test_a3_recall_after_the_tiers_and_a_row_of_head_0():
    query, key, _ = inputs_of(A3)
    blocks, _, _ = searched(query, key, A3.shape, A3.density)
    assert rows_of(blocks[0], 0, rows=(0,)) == [{1, 2, 3, 4, 5, 6, 8}]
    after = scores.recall(query, key, A3.shape.mask(blocks))[0]
    assert after.tolist() == pytest.approx([0.8192, 0.8865, 0.5853, 0.6739], abs=6e-5)


# -- mass --------------------------------------------------------------------------------------------------------------


@shapes
def test_mass_is_the_softmax_summed_over_blocks(shape):
    query, key, _ = shape.random()
    mass, _ = mass_of(query, key, shape)
    torch.testing.assert_close(mass.double(), block_sums(softmax_of(query, key, shape), shape), atol=1e-4, rtol=1e-4)
    tokens = shape.block_tokens
    torch.testing.assert_close(mass.sum(-1), tokens[:, None].expand(-1, shape.heads, -1).float(), atol=1e-4, rtol=1e-5)
    assert tokens.sum(1).tolist() == shape.key_valid.tolist()
    torch.testing.assert_close(scale_rows(mass, tokens), mass, atol=1e-4, rtol=1e-4)


def test_a_constant_added_to_all_keys_changes_no_mass():
    shape = SHAPES["ragged text"]
    query, key, _ = shape.random()
    shifted = key + torch.randn(len(key), shape.heads, 1, shape.head_dim)
    torch.testing.assert_close(mass_of(query, shifted, shape)[0], mass_of(query, key, shape)[0], atol=1e-4, rtol=1e-3)


def test_permuted_key_blocks_permute_the_columns_of_mass():
    shape = SHAPES["whole blocks, no text"]
    query, key, _ = shape.random()
    order = torch.randperm(shape.segments.blocks)
    permuted = key.unflatten(2, (-1, shape.size))[:, :, order].flatten(2, 3)
    expected = mass_of(query, key, shape)[0][..., order]
    torch.testing.assert_close(mass_of(query, permuted, shape)[0], expected, atol=1e-5, rtol=1e-4)


@shapes
def test_a_stale_search_tells_the_exact_log_sum_exp_of_now(shape):
    """LSE_old + log r is LSE_new, so a refresh can start from the one before it."""
    query, key, _ = shape.random()
    old = scores.dense_lse(query, key, key_valid=shape.key_valid)
    query, key = query + 0.5 * torch.randn_like(query), key + 0.5 * torch.randn_like(key)
    _, new = mass_of(query, key, shape, old)
    real = torch.arange(shape.tokens) < shape.key_valid.view(-1, 1, 1)
    exact = scores.dense_lse(query, key, key_valid=shape.key_valid)
    torch.testing.assert_close(torch.where(real, new, exact), exact, atol=1e-5, rtol=1e-5)
    moved = (exact - old).abs()[real.expand_as(exact)].mean()
    torch.testing.assert_close(drift(old, new, shape.key_valid), moved, atol=1e-5, rtol=1e-4)


def test_a_drift_common_to_a_block_changes_nothing_once_rows_are_scaled():
    shape = SHAPES["ragged text"]
    query, key, _ = shape.random()
    lse = scores.dense_lse(query, key, key_valid=shape.key_valid)
    block = torch.randn(len(query), shape.heads, shape.segments.blocks)
    stale = lse + block.repeat_interleave(shape.segments.bounds(CPU).diff(), dim=2)
    mass, new = mass_of(query, key, shape, stale)
    exact, _ = mass_of(query, key, shape, lse)
    assert (mass - exact).abs().max() > 0.1
    torch.testing.assert_close(scale_rows(mass, shape.block_tokens), exact, atol=1e-4, rtol=1e-4)
    real = torch.arange(shape.tokens) < shape.key_valid.view(-1, 1, 1)
    torch.testing.assert_close(torch.where(real, new, 0.0), torch.where(real, lse, 0.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan, 30 * math.log(2.0)])
def test_one_row_that_is_not_exact_spoils_the_drift_but_padding_does_not(bad):
    old = torch.randn(2, 3, 20)
    new, valid = old + 0.25, torch.tensor([20, 15])
    assert float(drift(old, new, valid)) == pytest.approx(0.25, abs=1e-6)
    new[1, :, 15:] = bad
    assert float(drift(old, new, valid)) == pytest.approx(0.25, abs=1e-6)
    new[1, 2, 14] = old[1, 2, 14] + bad
    assert math.isnan(float(drift(old, new, valid)))


# -- ranking and tiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "blocks", "expected"),
    [(0.9, 15, 2), (0.8, 1857, 371), (0.9, 4, 1), (0.999, 100, 1), (0.5, 5, 3), (0.0, 7, 7), (0.25, 2, 2)],
)
def test_keep_count_rounds_half_up_and_keeps_one(sparsity, blocks, expected):
    assert keep_count(1 - sparsity, blocks) == expected


def test_tiers_have_the_density_as_their_mean():
    for density in [*torch.rand(100).tolist(), 2 / 3, 1.0, 1e-9]:
        sparser, base, denser = tier_densities(density)
        assert base == density and 0.0 <= sparser <= base <= denser <= 1.0
        assert (sparser + denser) / 2 == pytest.approx(density)
    recall = torch.rand(50, 11, 1).expand(-1, -1, 3)
    tiers = head_tiers(recall, 0.8)
    assert torch.equal((tiers == SPARSER).sum(-1), (tiers == DENSER).sum(-1))


def test_equal_heads_move_in_their_order():
    recall = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5]).view(-1, 1).expand(-1, 3)
    assert head_tiers(recall, 0.8).tolist() == [SPARSER] * 3 + [BASE] + [DENSER] * 3


def test_samples_rank_their_own_heads():
    recall = torch.rand(5, 8, 3)
    together = head_tiers(recall, 0.7)
    assert all(torch.equal(head_tiers(one, 0.7), tiers) for one, tiers in zip(recall, together, strict=True))


def test_guarded_heads_get_sparser_only_if_they_can_afford_it():
    base = torch.tensor([0.99, 0.95, 0.9, 0.5, 0.4, 0.3, 0.2])
    sparser = torch.tensor([0.90, 0.70, 0.85, 0.3, 0.2, 0.1, 0.1])
    recall = torch.stack([sparser, base, base], dim=-1)
    assert head_tiers(recall, 0.8).tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert head_tiers(recall, 0.8, guarded=True).tolist() == [0, 1, 0, 1, 1, 2, 2]
    recall[..., SPARSER] = 0.8
    assert head_tiers(recall, 0.8, guarded=True).tolist() == [1] * 7


def test_of_equal_masses_the_first_is_kept():
    mass = torch.randint(0, 3, (2, 3, 40, 40)).float() + 1.0
    columns = rank_blocks(mass, 40, (5, 10, 15)).columns
    for row, found in zip(mass.flatten(0, 2), columns.flatten(0, 2), strict=True):
        assert found.tolist() == sorted(range(40), key=lambda column: -row[column])[:15]


@shapes
@pytest.mark.parametrize("density", [0.1, 0.35, 0.7])
def test_recall_of_a_tier_is_the_mass_it_keeps(shape, density):
    query, key, _ = shape.random()
    weights = softmax_of(query, key, shape)
    keeps = keeps_of(density, shape.segments.video_blocks)
    ranking = rank_blocks(mass_of(query, key, shape)[0], shape.segments.video_blocks, keeps)
    for tier, keep in enumerate(keeps):
        counts = torch.full((len(query), shape.heads), keep)
        seen = shape.mask(choose_blocks(ranking.columns, counts, shape.block_tokens)).token_mask()
        expected = weights.masked_fill(~seen, 0.0).sum((2, 3)) / shape.key_valid[:, None]
        torch.testing.assert_close(ranking.recall[..., tier].double(), expected, atol=1e-5, rtol=1e-4)


def test_recall_grows_with_density():
    shape = SHAPES["ragged text"]
    query, key, _ = shape.random()
    mass, _ = mass_of(query, key, shape)
    keeps = tuple(range(1, shape.segments.video_blocks + 1))
    recall = rank_blocks(mass, shape.segments.video_blocks, keeps).recall  # any number of tiers
    assert (recall.diff(dim=-1) > 0).all()
    torch.testing.assert_close(recall[..., -1], torch.ones(2, 3))


def test_no_other_mask_with_the_same_rows_has_a_larger_recall():
    shape = SHAPES["text"]
    query, key, _ = shape.random()
    blocks, _, _ = searched(query, key, shape, 0.4)
    best = scores.recall(query, key, shape.mask(blocks))
    video = shape.segments.video_blocks
    for _ in range(100):
        other = blocks.clone()
        order = torch.rand(1, shape.heads, video, video).argsort(-1)
        other[..., :video, :video] = blocks[..., :video, :video].gather(-1, order)
        assert torch.equal(other.sum(-1), blocks.sum(-1))
        assert (scores.recall(query, key, shape.mask(other)) <= best + 1e-6).all()


def test_the_diagonal_can_be_forced():
    mass = torch.rand(2, 3, 13, 13)
    free, forced = (rank_blocks(mass, 11, (1, 2, 5), force) for force in (False, True))
    assert torch.equal(forced.columns[..., 0], torch.arange(11, dtype=torch.int32).expand(2, 3, 11))
    assert (forced.columns.sort(-1).values.diff(dim=-1) > 0).all()
    assert (forced.recall <= free.recall + 1e-6).all() and (forced.recall < free.recall).any()
    keep = torch.full((2, 3), 5)
    blocks = choose_blocks(forced.columns, keep, torch.ones(2, 13))
    kept = mass.masked_fill(~blocks, 0.0).sum((2, 3)) / mass.sum((2, 3))
    torch.testing.assert_close(forced.recall[..., 2], kept)


# -- blocks ------------------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_every_video_row_keeps_as_many_video_blocks_and_all_text(shape, density):
    query, key, _ = shape.random(4.0)
    blocks, _, tiers = searched(query, key, shape, density, threshold=0.5)
    video, keeps = shape.segments.video_blocks, torch.tensor(keeps_of(density, shape.segments.video_blocks))
    in_rows = blocks[..., :video, :video].sum(-1)
    assert torch.equal(in_rows, keeps[tiers][..., None].expand_as(in_rows))
    for sample, valid in enumerate(shape.valid):
        end = video + -(-valid // shape.size)
        assert blocks[sample, :, :end, video:end].all() and blocks[sample, :, video:end, :end].all()
        assert not blocks[sample, :, end:].any() and not blocks[sample, :, :, end:].any()


@shapes
def test_text_rows_are_dense_and_everything_kept_is_dense(shape):
    query, key, value = (x.double() for x in shape.random())
    exact = softmax_of(query, key, shape) @ value
    few, _, _ = searched(query.float(), key.float(), shape, 0.2)
    every, _, _ = searched(query.float(), key.float(), shape, 1.0)
    few_out, every_out = (block_sparse_attention(query, key, value, shape.mask(blocks)) for blocks in (few, every))
    for sample, valid in enumerate(shape.key_valid.tolist()):
        text = slice(shape.video, valid)
        torch.testing.assert_close(few_out[sample, :, text], exact[sample, :, text], atol=1e-12, rtol=0)
        torch.testing.assert_close(every_out[sample, :, :valid], exact[sample, :, :valid], atol=1e-12, rtol=0)


@shapes
def test_kept_probabilities_sum_to_one_again(shape):
    query, key, value = shape.random()
    blocks, _, _ = searched(query, key, shape, 0.2)
    mask = shape.mask(blocks).validate()
    expected, _ = oracle.attention(query, key, value, mask)
    torch.testing.assert_close(block_sparse_attention(query, key, value, mask).double(), expected, atol=1e-5, rtol=1e-5)
    ones = block_sparse_attention(query, key, torch.ones_like(value), mask)
    real = torch.arange(shape.tokens) < shape.key_valid.view(-1, 1, 1)
    assert (ones[real.expand(-1, shape.heads, -1)] - 1.0).abs().max() < 1e-5


def test_padding_changes_no_choice_and_no_output_whatever_it_holds():
    shape = SHAPES["a sample without text"]
    query, key, value = shape.random()
    blocks, ranking, _ = searched(query, key, shape, 0.3)
    out = block_sparse_attention(query, key, value, shape.mask(blocks))
    for sample, valid in enumerate(shape.key_valid.tolist()):
        for tensor in (key, value):
            tensor[sample, :, valid:] = torch.nan
    poisoned, same, _ = searched(query, key, shape, 0.3)
    assert torch.equal(poisoned, blocks) and torch.equal(same.recall, ranking.recall)
    again = block_sparse_attention(query, key, value, shape.mask(poisoned))
    assert again.isfinite().all() and torch.equal(again, out)


@pytest.mark.parametrize(
    ("segments", "bounds"),
    [
        (Segments(6, 0, 2), [0, 2, 4, 6]),
        (Segments(5, 0, 2), [0, 2, 4, 5]),
        (Segments(5, 3, 2), [0, 2, 4, 5, 7, 8]),
        (Segments(4, 3, 2), [0, 2, 4, 6, 7]),
        (Segments(3, 1, 4), [0, 3, 4]),
    ],
)
def test_blocks_never_mix_video_and_text(segments, bounds):
    assert segments.bounds(CPU).tolist() == bounds and segments.bounds(CPU).dtype == torch.int32
    assert segments.video_tokens in bounds and segments.blocks == len(bounds) - 1
    uniform = [min(n * segments.size, bounds[-1]) for n in range(len(bounds))]
    assert segments.are_ragged == (uniform != bounds)
