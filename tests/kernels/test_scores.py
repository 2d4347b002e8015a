"""Block scores against their float64 definitions, worked examples, and what must hold for any input."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnproc.kernels import BlockMask, ChunkBits, Ranges, block_sparse_attention, score_oracle, scores

pytest.importorskip("triton")
from attnproc.kernels import triton_scores

ON_GPU = torch.cuda.is_available()
# The interpreter computes bfloat16 wrongly, so that is tested on a GPU only.
RUNS = [("cpu", "cpu", torch.float32), ("cpu", "cpu", torch.bfloat16)]
RUNS += [("triton", "cuda" if ON_GPU else "cpu", dtype) for dtype in (torch.float32, torch.float16)]
RUNS += [("triton", "cuda", torch.bfloat16)] if ON_GPU else []
backends = pytest.mark.parametrize("backend", ["cpu", "triton"])
runs = pytest.mark.parametrize("run", RUNS, ids=[f"{name}-{dtype}" for name, _, dtype in RUNS])


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    heads: int = 2
    queries: int = 70
    keys: int = 90
    head_dim: int = 16
    block_size: tuple[int, int] = (16, 16)
    query_valid: tuple[int, ...] | None = None
    key_valid: tuple[int, ...] | None = None
    ragged: bool = False
    layout: str = "heads first"


SHAPES = {
    "even": Shape(queries=64, keys=96),
    "odd lengths": Shape(queries=101, keys=77, head_dim=40, block_size=(32, 16)),
    "shorter than a block": Shape(queries=5, keys=9, block_size=(64, 32)),
    "blocks of several tiles": Shape(heads=1, queries=150, keys=140, block_size=(128, 128)),
    "blocks that are no power of two": Shape(block_size=(24, 20)),
    "blocks of one token": Shape(heads=1, queries=9, keys=7, block_size=(1, 1)),
    "head_dim 128": Shape(heads=1, queries=40, keys=40, head_dim=128),
    "head_dim 1": Shape(heads=1, head_dim=1),
    "ragged blocks": Shape(batch=2, queries=100, keys=80, block_size=(32, 16), ragged=True),
    "ragged samples": Shape(batch=3, heads=1, query_valid=(70, 33, 0), key_valid=(90, 17, 0)),
    "ragged blocks and samples": Shape(batch=2, heads=1, query_valid=(50, 33), key_valid=(81, 17), ragged=True),
    "same padding for all": Shape(batch=2, heads=1, query_valid=(40,), key_valid=(50,)),
    "tokens first": Shape(batch=2, queries=40, keys=50, layout="tokens first"),
    "strided": Shape(layout="strided"),
}


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    key: torch.Tensor
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    query_valid: torch.Tensor | None
    key_valid: torch.Tensor | None
    shape: Shape

    @property
    def definition(self) -> tuple[torch.Tensor, ...]:
        """Bounds and valid counts as the definitions want them: always there, one for each sample."""
        found = []
        for x, offsets, size in ((self.query, self.rows, 0), (self.key, self.columns, 1)):
            size, length = self.shape.block_size[size], x.shape[2]
            starts = torch.arange(-(-length // size) + 1) * size
            found.append(starts.clamp(max=length) if offsets is None else offsets.cpu())
        for x, valid in ((self.query, self.query_valid), (self.key, self.key_valid)):
            found.append(torch.tensor(x.shape[2]) if valid is None else valid.cpu())
        return found[0], found[1], found[2].expand(self.shape.batch), found[3].expand(self.shape.batch)

    @property
    def options(self) -> dict:
        return {
            "query_offsets": self.rows,
            "key_offsets": self.columns,
            "query_valid": self.query_valid,
            "key_valid": self.key_valid,
        }


def make_case(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    def tensor(tokens):
        if shape.layout == "tokens first":
            x = torch.randn(shape.batch, tokens, shape.heads, shape.head_dim).transpose(1, 2)
        elif shape.layout == "strided":
            x = torch.randn(shape.batch, shape.heads, tokens, 3 * shape.head_dim)[..., ::3]
        else:
            x = torch.randn(shape.batch, shape.heads, tokens, shape.head_dim)
        return x.to(dtype).to(device)

    offsets = [None, None]
    if shape.ragged:
        offsets = [
            ragged_bounds(n, size).to(device)
            for n, size in zip((shape.queries, shape.keys), shape.block_size, strict=True)
        ]
    valid = [None if x is None else torch.tensor(x, device=device) for x in (shape.query_valid, shape.key_valid)]
    return Case(tensor(shape.queries), tensor(shape.keys), *offsets, *valid, shape)


def ragged_bounds(length: int, size: int) -> torch.Tensor:
    """Bounds of blocks of 1 to `size` tokens, at random."""
    ends = [0]
    while ends[-1] < length:
        ends.append(min(ends[-1] + int(torch.randint(1, size + 1, ())), length))
    return torch.tensor(ends, dtype=torch.int32)


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request, seed) -> Shape:
    return request.param


# Pooling


@runs
def test_pooling_equals_its_definition(shape, run, poisoned_memory):
    backend, device, dtype = run
    case = make_case(shape, dtype, device)
    shift = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, device=device)
    size, bounds, valid = shape.block_size[1], case.definition[1], case.definition[3]
    found = scores.pool_blocks(case.key, size, offsets=case.columns, valid=case.key_valid, shift=shift, backend=backend)
    expected = score_oracle.pool_blocks(case.key.cpu(), size, bounds, valid, shift.cpu())
    assert found.mean.dtype == found.similarity.dtype == torch.float32
    close(found.mean, expected.mean)
    close(found.similarity, expected.similarity)
    assert torch.equal(found.regular.cpu(), expected.regular)
    assert float(found.similarity.max()) <= 1.0


@backends
def test_similarity_of_blocks_worked_out_by_hand(backend, seed):
    direction = torch.randn(16)
    equal = direction.expand(8, 16) * torch.rand(8, 1).add(0.1)
    opposite = torch.cat([direction.expand(4, 16), -direction.expand(4, 16)])
    orthogonal = 3.0 * torch.eye(16)[:8]
    halves = torch.eye(16)[[0] * 4 + [1] * 4]
    x = torch.cat([equal, opposite, orthogonal, halves])[None, None]
    found = scores.pool_blocks(x, 8, backend=backend)
    close(found.similarity[0, 0], torch.tensor([1.0, 0.0, 1 / 8, 0.5]), 1e-6)
    assert found.regular.all()


@backends
def test_equal_tokens_never_exceed_similarity_one(backend, seed):
    x = torch.randn(1, 1, 40, 24).repeat_interleave(16, dim=2)
    similarity = scores.pool_blocks(x, 16, backend=backend).similarity
    assert float(similarity.max()) <= 1.0 and float(similarity.min()) > 1 - 1e-5


@pytest.mark.parametrize("token", [0.0, math.nan, math.inf, -math.inf], ids=str)
@backends
def test_a_token_without_a_direction_makes_only_its_block_irregular(backend, token, seed):
    x = torch.randn(1, 2, 70, 8)
    before = scores.pool_blocks(x, 16, backend=backend)
    assert before.regular.tolist() == [[[True] * 4 + [False]] * 2]  # the tail is short
    x[0, 1, 20] = token
    after = scores.pool_blocks(x, 16, backend=backend)
    assert after.regular.tolist() == [[[True] * 4 + [False], [True, False, True, True, False]]]
    others = [0, 2, 3, 4]
    for one, two in zip(before[:2], after[:2], strict=True):
        assert torch.equal(one[:, 0], two[:, 0]) and torch.equal(one[:, 1, others], two[:, 1, others])
    assert after.similarity.isfinite().all()
    if token != 0.0:
        assert not after.mean[0, 1, 1].isfinite().any() and float(after.similarity[0, 1, 1]) == 0.0


@backends
def test_a_block_without_valid_tokens_is_zero(backend, seed):
    x = torch.randn(2, 1, 48, 8)
    found = scores.pool_blocks(x, 16, valid=torch.tensor([16, 0]), backend=backend)
    assert found.regular.tolist() == [[[True, False, False]], [[False] * 3]]
    assert not found.mean[0, 0, 1:].any() and not found.mean[1].any()
    assert not found.similarity[0, 0, 1:].any() and not found.similarity[1].any()


@backends
def test_the_token_mean_smooths_a_bias_away(backend, seed):
    """A large bias common to all keys makes every block look alike; with the mean as shift it is not seen."""
    x, bias = torch.randn(2, 2, 64, 16), 20 * torch.randn(2, 2, 1, 16)
    valid = torch.tensor([64, 40])
    plain = scores.pool_blocks(x, 16, valid=valid, shift=scores.token_mean(x, valid), backend=backend)
    moved = scores.pool_blocks(x + bias, 16, valid=valid, shift=scores.token_mean(x + bias, valid), backend=backend)
    close(moved.mean, plain.mean, 1e-4)
    close(moved.similarity, plain.similarity, 1e-4)
    assert float(scores.pool_blocks(x + bias, 16, backend=backend).similarity.min()) > 0.9


def test_the_token_mean_is_that_of_valid_tokens(seed):
    x = torch.randn(3, 2, 50, 8)
    close(scores.token_mean(x), x.double().mean(2, keepdim=True))
    x[1, :, 20:], x[2] = math.nan, math.nan
    found = scores.token_mean(x.half(), torch.tensor([50, 20, 0]))
    assert found.dtype == torch.float32 and not found[2].any()
    close(found[0], x.half()[0].double().mean(1, keepdim=True))
    close(found[1], x.half()[1, :, :20].double().mean(1, keepdim=True))


# Block mass and log-sum-exp


@runs
def test_log_sum_exp_equals_its_definition(shape, run, poisoned_memory):
    backend, device, dtype = run
    case = make_case(shape, dtype, device)
    found = scores.dense_lse(case.query, case.key, scale=0.3, key_valid=case.key_valid, backend=backend)
    assert found.dtype == torch.float32
    close(found, score_oracle.dense_lse(case.query.cpu(), case.key.cpu(), 0.3, case.definition[3]))


@runs
def test_block_mass_equals_its_definition(shape, run, poisoned_memory):
    backend, device, dtype = run
    case = make_case(shape, dtype, device)
    rows, columns, query_valid, key_valid = case.definition
    query, key = case.query.cpu(), case.key.cpu()
    exact = score_oracle.dense_lse(query, key, 0.3, key_valid)
    stale = exact.nan_to_num(neginf=0.0).float() + torch.randn(exact.shape)
    mass, new_lse = scores.block_mass(
        case.query, case.key, stale.to(device), shape.block_size, scale=0.3, **case.options, backend=backend
    )
    expected = score_oracle.block_mass(query, key, stale, rows, columns, 0.3, query_valid, key_valid)
    assert mass.dtype == new_lse.dtype == torch.float32
    close(mass, expected[0], 5e-5)
    close(new_lse, expected[1])
    there = torch.arange(shape.queries) < query_valid.view(-1, 1, 1)
    close(new_lse, exact.masked_fill(~there, -math.inf))


@backends
def test_block_mass_worked_out_by_hand(backend):
    """AdaSpa: four tokens of one channel in blocks of two; then the queries double and the log-sum-exp is stale."""
    query, key = (torch.tensor(x).view(1, 1, 4, 1) for x in ((1.0, 1.0, 0.0, 0.0), (0.0, math.log(3), 0.0, 0.0)))
    lse = scores.dense_lse(query, key, backend=backend)
    close(lse[0, 0], torch.tensor([6.0, 6.0, 4.0, 4.0]).log(), 1e-6)
    mass, new_lse = scores.block_mass(query, key, lse, (2, 2), backend=backend)
    close(mass[0, 0], torch.tensor([[4 / 3, 2 / 3], [1.0, 1.0]]), 1e-6)
    close(new_lse, lse, 1e-6)
    mass, new_lse = scores.block_mass(2 * query, key, lse, (2, 2), backend=backend)
    close(mass[0, 0], torch.tensor([[10 / 3, 2 / 3], [1.0, 1.0]]), 1e-6)
    close((new_lse - lse)[0, 0], torch.tensor([2.0, 2.0, 1.0, 1.0]).log(), 1e-6)
    close(new_lse, scores.dense_lse(2 * query, key, backend=backend), 1e-6)


@backends
def test_with_the_exact_log_sum_exp_rows_sum_to_their_queries(backend, seed):
    case = make_case(Shape(batch=2, queries=100, query_valid=(100, 41), key_valid=(90, 33), ragged=True))
    lse = scores.dense_lse(case.query, case.key, key_valid=case.key_valid, backend=backend)
    mass, new_lse = scores.block_mass(case.query, case.key, lse, (16, 16), **case.options, backend=backend)
    ends = torch.minimum(case.rows.expand(2, -1), case.query_valid[:, None])
    close(mass.sum(-1), ends.diff(dim=1)[:, None].expand(-1, 2, -1), 1e-4)
    for sample, valid in enumerate((100, 41)):
        close(new_lse[sample, :, :valid], lse[sample, :, :valid])
        assert (new_lse[sample, :, valid:] == -math.inf).all()


@backends
def test_a_constant_added_to_all_keys_changes_no_mass(backend, seed):
    case = make_case(Shape())
    moved = case.key + torch.randn(1, 2, 1, 16)
    found = []
    for key in (case.key, moved):
        lse = scores.dense_lse(case.query, key, backend=backend)
        found.append(scores.block_mass(case.query, key, lse, (16, 16), backend=backend)[0])
    close(found[0], found[1], 1e-4)


@backends
def test_permuted_key_blocks_permute_the_columns(backend, seed):
    query, key = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 96, 16)
    order = torch.randperm(6)
    moved = key.unflatten(2, (6, 16))[:, :, order].flatten(2, 3)
    lse = scores.dense_lse(query, key, backend=backend)
    mass, _ = scores.block_mass(query, key, lse, (16, 16), backend=backend)
    close(scores.block_mass(query, moved, lse, (16, 16), backend=backend)[0], mass[..., order])
    found = scores.antidiagonal_scores(query, key, 16, 4, backend=backend)
    close(scores.antidiagonal_scores(query, moved, 16, 4, backend=backend), found[..., order])


@backends
def test_a_log_sum_exp_that_is_far_too_low_stays_finite(backend, seed):
    case = make_case(Shape())
    low = torch.full((1, 2, 70), -1e4)
    low[:, :, 3] = -math.inf
    mass, new_lse = scores.block_mass(case.query, case.key, low, (16, 16), backend=backend)
    close(mass[0, 0, 0, 0], torch.tensor(16.0 * 16 * 2**30))
    assert mass.isfinite().all()
    drift = (new_lse - low)[..., torch.arange(70) != 3]
    assert float(drift.min()) >= 30 * math.log(2) and (new_lse[:, :, 3] == -math.inf).all()


@backends
def test_nan_in_valid_tokens_reaches_the_mass(backend, seed):
    """The caller must be able to see it and compute densely instead."""
    case = make_case(Shape())
    lse = scores.dense_lse(case.query, case.key, backend=backend)
    query = case.query.clone()
    query[0, 0, 20] = math.nan
    mass, new_lse = scores.block_mass(query, case.key, lse, (16, 16), backend=backend)
    assert mass[0, 0, 1].isnan().all() and new_lse[0, 0, 20].isnan()
    assert mass[0, 0, 0].isfinite().all() and mass[0, 1].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@backends
def test_padding_does_not_matter(backend, poison, seed):
    case = make_case(Shape(batch=2, query_valid=(37, 70), key_valid=(90, 53)))
    valid = {"query_valid": case.query_valid, "key_valid": case.key_valid}
    query, key = case.query.clone(), case.key.clone()
    query[0, :, 37:], key[1, :, 53:] = poison, poison

    def everything(query, key):
        lse = scores.dense_lse(query, key, key_valid=case.key_valid, backend=backend)
        lse[0, :, 37:] = 0.0
        return [
            lse,
            *scores.block_mass(query, key, lse, (16, 16), **valid, backend=backend),
            scores.antidiagonal_scores(query, key, 16, 4, **valid, backend=backend),
            *scores.pool_blocks(key, 16, valid=case.key_valid, backend=backend),
            scores.token_mean(key, case.key_valid),
        ]

    for before, after in zip(everything(case.query, case.key), everything(query, key), strict=True):
        assert torch.equal(before, after)


@backends
def test_two_samples_equal_two_calls_and_calls_repeat_bit_by_bit(backend, seed):
    case = make_case(
        Shape(batch=2, heads=1, queries=50, keys=60, query_valid=(37, 50), key_valid=(60, 33), ragged=True)
    )
    offsets = {"query_offsets": case.rows, "key_offsets": case.columns}

    def everything(samples):
        query, key = case.query[samples], case.key[samples]
        valid = {"query_valid": case.query_valid[samples], "key_valid": case.key_valid[samples]}
        lse = scores.dense_lse(query, key, key_valid=valid["key_valid"], backend=backend)
        return [
            *scores.block_mass(query, key, lse, (16, 16), **offsets, **valid, backend=backend),
            scores.antidiagonal_scores(query, key, 16, 8, **valid, backend=backend),
            *scores.pool_blocks(key, 16, offsets=case.columns, valid=valid["key_valid"], backend=backend),
        ]

    both = everything(slice(0, 2))
    for found, repeated in zip(both, everything(slice(0, 2)), strict=True):
        assert torch.equal(found, repeated)
    for sample in range(2):
        for found, alone in zip(both, everything(slice(sample, sample + 1)), strict=True):
            close(alone[0], found[sample], 1e-6)


# Antidiagonal scores


@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if not shape.ragged and name != "blocks of one token"]
)
@runs
def test_antidiagonal_scores_equal_their_definition(name, run, seed, poisoned_memory):
    (backend, device, dtype), shape = run, SHAPES[name]
    case = make_case(shape, dtype, device)
    size = shape.block_size[0]
    found = scores.antidiagonal_scores(
        case.query, case.key, size, 4, scale=0.3, query_valid=case.query_valid, key_valid=case.key_valid,
        backend=backend,
    )  # fmt: skip
    _, _, query_valid, key_valid = case.definition
    expected = score_oracle.antidiagonal_scores(case.query.cpu(), case.key.cpu(), size, 4, 0.3, query_valid, key_valid)
    assert found.dtype == torch.float32
    close(found, expected, 5e-5)


def published(seed: int, tokens: int = 64, channels: int = 8) -> torch.Tensor:
    """The example's own pseudo-random numbers in -1..1, (1, 1, tokens, channels)."""
    numbers = []
    for _ in range(tokens * channels):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        numbers.append(seed / 2**31 * 2 - 1)
    return torch.tensor(numbers, dtype=torch.float64).view(1, 1, tokens, channels)


@backends
def test_antidiagonal_scores_worked_out_by_hand(backend):
    query, key = (torch.tensor(x).view(1, 1, 4, 1) for x in ((1.0, 0.0, 2.0, 1.0), (1.0, 2.0, 0.0, 1.0)))
    found = scores.antidiagonal_scores(query, key, 2, 2, backend=backend)
    close(found[0, 0], torch.tensor([[0.622459, 0.377541], [0.817574, 0.182426]]), 1e-5)


@backends
def test_antidiagonal_scores_of_the_example(backend):
    query, key = (3 * published(seed).float() for seed in (11, 12))
    expected = [
        [0.6454, 1.5245, 0.8992, 0.9309],
        [0.8121, 1.1743, 0.5498, 1.4637],
        [1.3981, 0.8326, 0.6709, 1.0984],
        [1.3759, 1.1620, 0.8948, 0.5673],
    ]
    found = scores.antidiagonal_scores(query, key, 16, 4, backend=backend)
    close(found[0, 0], torch.tensor(expected), 6e-5)
    close(found.sum(-1), torch.full((1, 1, 4), 4.0))


@backends
def test_missing_tokens_of_the_example_take_no_mass(backend):
    """Cut short or padded, the scores are the same: only real groups are in the softmax."""
    query, key = (3 * published(seed).float() for seed in (11, 12))
    cut = scores.antidiagonal_scores(query[:, :, :52], key[:, :, :52], 16, 4, backend=backend)
    close(cut[0, 0, 0], torch.tensor([0.6827, 1.6352, 0.9827, 0.6994]), 6e-5)
    close(cut[0, 0, 3], torch.tensor([0.6923, 0.2155, 0.0704, 0.0218]), 6e-5)
    valid = torch.tensor([52])
    padded = scores.antidiagonal_scores(query, key, 16, 4, query_valid=valid, key_valid=valid, backend=backend)
    close(padded, cut, 1e-6)


@backends
def test_antidiagonals_underrate_a_single_hot_key(backend):
    query, key = torch.zeros(2, 1, 1, 64, 8)
    query[..., 0], key[:, :, 37, 0] = 6.0, 6.0
    found = scores.antidiagonal_scores(query, key, 16, 4, backend=backend)
    close(found[0, 0, :, 2] / 4, torch.full((4,), 0.6931), 6e-5)
    lse = scores.dense_lse(query, key, backend=backend)
    mass, _ = scores.block_mass(query, key, lse, (16, 16), backend=backend)
    close(mass[0, 0, :, 2] / 16, torch.full((4,), 0.9999), 6e-5)


@backends
def test_antidiagonals_are_exact_where_tokens_are_equal_in_groups(backend, seed):
    query, key = (torch.randn(1, 2, n, 16).repeat_interleave(4, dim=2) for n in (20, 28))
    lse = scores.dense_lse(query, key, backend=backend)
    mass, _ = scores.block_mass(query, key, lse, (16, 16), backend=backend)
    close(scores.antidiagonal_scores(query, key, 16, 4, backend=backend) * 4, mass, 5e-5)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 24])
def test_results_do_not_depend_on_the_chunks(chunk, monkeypatch, seed):
    case = make_case(Shape(batch=2, heads=3, query_valid=(37, 70), key_valid=(90, 53), ragged=True))
    valid = {"query_valid": case.query_valid, "key_valid": case.key_valid}

    def everything():
        lse = scores.dense_lse(case.query, case.key, key_valid=case.key_valid)
        return [
            lse,
            *scores.block_mass(case.query, case.key, lse, (16, 16), **case.options),
            scores.antidiagonal_scores(case.query, case.key, 16, 4, **valid),
            *scores.pool_blocks(case.key, 16, offsets=case.columns)[:2],
        ]

    before = everything()
    monkeypatch.setattr(scores, "CHUNK_SCORES", chunk)
    for one, two in zip(before, everything(), strict=True):
        close(one, two, 1e-6)


# Recall


def random_mask(rows: int = 5, columns: int = 6, batch: int = 1, heads: int = 1) -> torch.Tensor:
    return torch.rand(batch, heads, rows, columns) < 0.5


def window(tokens: int) -> Ranges:
    """Every query sees keys at most 10 tokens away; the first 3 keys are text."""
    place = torch.arange(tokens, dtype=torch.int32)[:, None]
    return Ranges(torch.where(place < 3, -1, place), place - 10, place + 11)


def chunks(tokens: int, columns: int, heads: int) -> ChunkBits:
    selection = torch.rand(1, heads, tokens, 2) < 0.5
    return ChunkBits.from_selection(selection, torch.arange(columns, dtype=torch.int32) % 2)


def masks() -> dict:
    """Masks of 80 queries and 80 keys, 2 samples and 2 heads, made afresh for every test."""
    rows, columns = ragged_bounds(80, 16), ragged_bounds(80, 16)
    grid = len(rows) - 1, len(columns) - 1
    ragged = {"query_offsets": rows, "key_offsets": columns}
    valid = torch.tensor([80, 29])

    def build(blocks, *more, **options):
        return BlockMask.from_blocks(blocks, 80, 80, (16, 16), *more, **options)

    return {
        "one for all": build(random_mask(5, 5)),
        "per sample and head": build(random_mask(5, 5, 2, 2)),
        "ragged samples": build(random_mask(5, 5, 1, 2), valid),
        "a sample without keys": build(random_mask(5, 5), torch.tensor([40, 0])),
        "window in partial blocks": build(random_mask(5, 5), valid, partial=random_mask(5, 5), rule=window(80)),
        "chunks chosen by each query": build(
            random_mask(5, 5, 1, 2), partial=random_mask(5, 5, 1, 2), rule=chunks(80, 5, 2)
        ),
        "ragged blocks": build(random_mask(*grid), **ragged),
        "ragged blocks, window": build(
            random_mask(*grid), valid, partial=random_mask(*grid), rule=window(80), **ragged
        ),
    }


MASKS = (
    "one for all",
    "per sample and head",
    "ragged samples",
    "a sample without keys",
    "window in partial blocks",
    "chunks chosen by each query",
    "ragged blocks",
    "ragged blocks, window",
)


RECALLS = [("cpu", name, ordered) for name in MASKS for ordered in (False, True)]
# The attention kernel has its own tests; these see that the two log-sum-exps are of the same keys.
RECALLS += [("triton", "ragged samples", False), ("triton", "ragged blocks, window", True)]


@pytest.mark.parametrize("backend, name, ordered", RECALLS)
def test_recall_equals_its_definition(backend, name, ordered, seed):
    device = "cuda" if ON_GPU and backend == "triton" else "cpu"
    mask = masks()[name]
    query, key = torch.randn(2, 2, 2, 80, 16)
    order = torch.stack([torch.randperm(80) for _ in range(2)]) if ordered else None
    valid = torch.tensor(80) if mask.key_valid is None else mask.key_valid
    expected = score_oracle.recall(query, key, mask, 0.5, valid.expand(2), order).nan_to_num(nan=0.0)
    found = scores.recall(
        query.to(device), key.to(device), mask.to(device), scale=0.5,
        token_order=None if order is None else order.to(device), backend=backend,
    )  # fmt: skip
    assert found.dtype == torch.float32
    close(found, expected)


@backends
def test_a_full_mask_recalls_everything_and_an_empty_one_nothing(backend, seed):
    query, key = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 90, 16)
    close(scores.recall(query, key, BlockMask.full(70, 90, (16, 16)), backend=backend), torch.ones(1, 2))
    nothing = BlockMask.from_blocks(torch.zeros(5, 6, dtype=torch.bool), 70, 90, (16, 16))
    assert not scores.recall(query, key, nothing, backend=backend).any()


def test_recall_of_padded_queries_can_be_left_out(seed):
    query, key = torch.randn(2, 2, 2, 64, 16)
    valid = torch.tensor([64, 35], dtype=torch.int32)
    blocks = (torch.rand(2, 2, 4, 4) < 0.6) | torch.eye(4, dtype=torch.bool)
    blocks[1, :, 3] = False  # padding alone
    found = scores.recall(query, key, BlockMask.from_blocks(blocks, 64, 64, (16, 16), valid), query_valid=valid)
    for n, length in enumerate(valid.tolist()):
        rows = -(-length // 16)
        alone = BlockMask.from_blocks(blocks[n : n + 1, :, :rows, :rows], length, length, (16, 16))
        close(found[n : n + 1], scores.recall(query[n : n + 1, :, :length], key[n : n + 1, :, :length], alone))


def test_recall_is_the_kept_block_mass(seed):
    """The log-sum-exp that dense attention returns serves, and masks of any method are measured the same way."""
    query, key = torch.randn(2, 2, 70, 16), torch.randn(2, 2, 90, 16)
    blocks = random_mask(5, 6, 2, 2)
    mask = BlockMask.from_blocks(blocks, 70, 90, (16, 16))
    _, lse = block_sparse_attention(query, key, key, BlockMask.full(70, 90, (16, 16)), return_lse=True)
    mass, _ = scores.block_mass(query, key, lse, (16, 16))
    kept = (mass * blocks).sum((2, 3)) / mass.sum((2, 3))
    close(scores.recall(query, key, mask, lse=lse), kept)
    close(scores.recall(query, key, mask), kept)


# Memory, bad arguments, compilation


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation returned."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    tokens = 4096
    query, key = torch.randn(2, 1, 1, tokens, 16)
    with LargestTensor() as largest:
        lse = scores.dense_lse(query, key)
        scores.block_mass(query, key, lse, (64, 64))
        scores.antidiagonal_scores(query, key, 128, 8)
        scores.pool_blocks(key, 64)
        scores.recall(query, key, BlockMask.from_blocks(torch.eye(64).bool(), tokens, tokens, (64, 64)), lse=lse)
    assert 0 < largest.bytes <= 4 * scores.CHUNK_SCORES < 4 * tokens * tokens / 20


X = torch.randn(2, 2, 40, 16)
LSE = torch.zeros(2, 2, 40)
WRONG = {
    "rank": (lambda: scores.pool_blocks(X[0], 16), "x"),
    "integers": (lambda: scores.pool_blocks(X.int(), 16), "x"),
    "no tokens": (lambda: scores.token_mean(X[:, :, :0]), "x"),
    "head_dim too large": (lambda: scores.pool_blocks(torch.zeros(1, 1, 2, 257), 16), "x"),
    "block of 0": (lambda: scores.pool_blocks(X, 0), "block_size"),
    "offsets that stop short": (
        lambda: scores.pool_blocks(X, 16, offsets=torch.tensor([0, 16, 32], dtype=torch.int32)),
        "offsets",
    ),
    "offsets of long blocks": (
        lambda: scores.block_mass(X, X, LSE, (16, 16), key_offsets=torch.tensor([0, 20, 40], dtype=torch.int32)),
        "key_offsets",
    ),
    "shift of one token each": (lambda: scores.pool_blocks(X, 16, shift=X), "shift"),
    "boolean padding": (lambda: scores.pool_blocks(X, 16, valid=torch.ones(2, 40).bool()), "valid"),
    "padding of three samples": (lambda: scores.dense_lse(X, X, key_valid=torch.tensor([1, 2, 3])), "key_valid"),
    "fewer key heads": (lambda: scores.dense_lse(X, X[:, :1]), "key"),
    "dtypes differ": (lambda: scores.dense_lse(X, X.half()), "key"),
    "scale": (lambda: scores.dense_lse(X, X, scale=math.inf), "scale"),
    "lse in half precision": (lambda: scores.block_mass(X, X, LSE.half(), (16, 16)), "lse"),
    "lse of one head": (lambda: scores.block_mass(X, X, LSE[:, :1], (16, 16)), "lse"),
    "stride": (lambda: scores.antidiagonal_scores(X, X, 16, 3), "stride"),
    "unknown backend": (lambda: scores.dense_lse(X, X, backend="flex"), "backend"),
    "float64 in Triton": (lambda: scores.dense_lse(X.double(), X.double(), backend="triton"), "backend"),
}


@pytest.mark.parametrize("call, argument", WRONG.values(), ids=WRONG.keys())
def test_bad_arguments_are_refused(call, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; expected .+\. .+\.$"):
        call()


@pytest.mark.skipif(ON_GPU, reason="on a GPU it computes bfloat16 rightly")
def test_bfloat16_is_refused_in_the_interpreter():
    with pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        scores.pool_blocks(X.bfloat16(), 16, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("stride", [1, 8])
def test_tiles_fit_a_small_gpu(stride, padded_dim, dtype):
    query_tile, key_tile, _, stages = triton_scores.launch_shape(torch.empty(0, dtype=dtype), padded_dim, stride)
    rows = triton_scores.resident_rows(query_tile, key_tile, stages, stride)
    assert rows * padded_dim * dtype.itemsize <= triton_scores.SMALL_SHARED_MEMORY
    assert min(query_tile, key_tile) >= 16 and stages >= 1


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnproc.kernels import triton_scores as module

pointers = dict.fromkeys(("query", "key", "x"), "*bf16") | {"regular": "*i8", "scale": "fp32", "limit": "fp32"}
pointers |= dict.fromkeys(("lse", "new_lse", "mass", "mean", "similarity", "shift"), "*fp32")
pointers |= dict.fromkeys(("rows", "columns", "bounds", "valid", "query_valid", "key_valid"), "*i32")

def build(kernel, options, **constants):
    constants |= dict(HEAD_DIM=128, PADDED_DIM=128)
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name.split("_")[-1] in ("batch", "head", "token")}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= module.SMALL_SHARED_MEMORY, (kernel.__name__, compiled.metadata.shared)
    return compiled.asm["ptx"]

build(module.pool_kernel, dict(num_warps=4), BLOCK=128, TILE=64, SHIFT=True)
for stride, kernel, block in ((1, module.lse_kernel, {}), (8, module.mass_kernel, dict(QUERY_BLOCK=16, KEY_BLOCK=16))):
    query_tile, key_tile, warps, stages = module.launch_shape(torch.empty(0, dtype=torch.bfloat16), 128, stride)
    tiles = dict(STRIDE=stride, QUERY_TILE=query_tile, KEY_TILE=key_tile, PRECISION=None)
    assert "wgmma" in build(kernel, dict(num_warps=warps, num_stages=stages), **tiles, **block)
print("compiled")
"""


@pytest.mark.skipif(ON_GPU, reason="the other tests compile them for the GPU here")
def test_kernels_compile_for_a_gpu_that_is_not_here():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
