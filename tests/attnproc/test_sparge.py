"""SpargeAttnProcessor: the blocks it predicts, the plans it makes, its settings."""

import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass, field

import pytest
import torch

import attnproc
from attnproc.errors import AttnProcWarning, SettingsError
from attnproc.kernels import block_sparse_attention
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense
from attnproc.sparse import sparge_prediction
from attnproc.sparse.sparge import SpargeAttnProcessor
from attnproc.sparse.sparge_prediction import BlockScores, HeadThresholds, predict_blocks, score_blocks, select_blocks
from attnproc.sparse.token_orders import TOKEN_ORDERS, token_order

SMALL = {"block_size": 16, "min_tokens": 0, "dense_layers": 0}
CPU = torch.device("cpu")


@pytest.fixture
def seed():
    value = int(torch.seed() % 2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def recipe(seed, batch, heads, tokens, head_dim, block_size, *, own, spread, offset):
    """Queries and keys whose blocks have a common part of size `own`, and spreads of up to `spread` around it."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(batch, heads, *shape, generator=generator)

    blocks = [-(-tokens // size) for size in block_size]
    centres = [own * randn(n, head_dim) for n in blocks]
    spreads = [spread * torch.rand(batch, heads, n, 1, generator=generator) for n in blocks]
    noise = [randn(tokens, head_dim) for _ in blocks]
    bias = offset * randn(1, head_dim)
    block = [torch.arange(tokens) // size for size in block_size]
    query, key = (c[:, :, b] + s[:, :, b] * e for c, s, e, b in zip(centres, spreads, noise, block, strict=True))
    return query, key + bias


def tokens_like(seed, layout, batch=2, heads=3, head_dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.tokens, head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def call_of(layout, tensors, cache=None, layer=0):
    denoiser = Denoiser("transformer", "WanTransformer3DModel", 4)
    step = Step(5, 10, "cond", layout.grid)
    return AttentionCall(*tensors, layout, step, layer, denoiser, {} if cache is None else cache, {})


def run_plan(plan, query, key, value, backend="auto", **options):
    return block_sparse_attention(
        query,
        key,
        value,
        plan.mask,
        token_order=plan.token_order,
        skip_threshold=plan.skip_threshold,
        backend=backend,
        **options,
    )


def definition(
    query, key, block_size, *, density=None, cdf_threshold=None, similarity_threshold=-0.1, attention_sink=False
):
    """Section 3 of the method in float64, one row at a time."""
    key = key.double() - key.double().mean(2, keepdim=True)
    pooled, ok = [], []
    for x, size in ((query.double(), block_size[0]), (key, block_size[1])):
        blocks = x.split(size, dim=2)
        pooled.append(torch.stack([b.mean(2) for b in blocks], dim=2))
        unit = [b / b.norm(dim=-1, keepdim=True) for b in blocks]
        cosine = [(u @ u.transpose(-1, -2)).mean((-1, -2)) for u in unit]
        alike = [(c > similarity_threshold) & (b.shape[2] == size) for c, b in zip(cosine, blocks, strict=True)]
        ok.append(torch.stack(alike, dim=2))
    scores = pooled[0] @ pooled[1].transpose(-1, -2) / math.sqrt(query.shape[-1])
    blocks = torch.zeros(scores.shape, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row = scores[b, h, i].clone()
        row[~ok[1][b, h]] = -torch.inf
        order = row.argsort(descending=True, stable=True)
        share = row.softmax(-1).nan_to_num()[order].cumsum(-1)
        count = int((share <= cdf_threshold).sum()) if density is None else int(torch.tensor(density) * len(row))
        blocks[b, h, i, order[: max(count, 1)]] = True
        if not ok[0][b, h, i]:
            blocks[b, h, i] = True
    blocks |= ~ok[1][:, :, None]
    if attention_sink:
        blocks[..., 0] = True
    return blocks


# -- worked examples ---------------------------------------------------------------------------------------------------


def sha256(blocks):
    return hashlib.sha256(blocks.to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()


def rows_as_text(blocks):
    return ["".join(str(int(kept)) for kept in row) for row in blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_thresholds_of_the_paper_reproduce_the_released_map(dtype):
    query, key = recipe(1111, 1, 2, 1024, 64, (128, 64), own=1.6, spread=1.5, offset=2)
    assert (float(query.sum()), float(key.sum())) == pytest.approx((-12720.0629, 11348.6472), abs=0.01)
    assert query[0, 0, 0, :2].tolist() == pytest.approx([-2.929999, 2.816639], abs=1e-5)
    blocks = predict_blocks(query.to(dtype), key.to(dtype), (128, 64), cdf_threshold=0.98, similarity_threshold=0.6)
    assert blocks.shape == (1, 2, 8, 16) and int(blocks.sum()) == 161
    assert blocks.sum(-1)[0].tolist() == [[16, 8, 9, 16, 11, 7, 10, 8], [7, 7, 16, 10, 10, 7, 8, 11]]
    assert rows_as_text(blocks[0, 0]) == [
        "1111111111111111",
        "0111000101100011",
        "0101111110110000",
        "1111111111111111",
        "1111001100110111",
        "0101000101011010",
        "1111010100111010",
        "0111010100110100",
    ]
    assert sha256(blocks) == "02948e42a36263b4211339cfad5a1e282b5286bd7a41545bb1e0b56cb7db7617"


def test_similarities_and_shares_behind_the_released_map():
    query, key = recipe(1111, 1, 2, 1024, 64, (128, 64), own=1.6, spread=1.5, offset=2)
    found = score_blocks(query, key, (128, 64))
    expected = [0.5931, 0.8015, 0.9850, 0.5175, 0.6361, 0.8453, 0.9690, 0.6483]
    assert found.query_similarity[0, 0].tolist() == pytest.approx(expected, abs=1e-4)
    expected = (
        "0.9485 0.5830 0.9966 0.5339 0.6122 1.0000 0.6419 0.5856 0.9997 0.9672 0.9140 0.6178 0.7291 0.7297 0.9988"
    )
    expected = [float(x) for x in (expected + " 0.9095").split()]
    assert found.key_similarity[0, 0].tolist() == pytest.approx(expected, abs=1e-4)
    row = found.scores[0, 0, 1].masked_fill(found.key_similarity[0, 0] <= 0.6, -torch.inf)
    shares = row.softmax(-1).sort(descending=True).values.cumsum(-1)[:6]
    assert shares.tolist() == pytest.approx([0.4519, 0.8345, 0.8943, 0.9391, 0.9686, 0.9835], abs=1e-4)


def test_the_selection_reproduces_the_released_causal_map():
    """Attention here is never causal: the released causal rule is put around the selection, to check it once more."""
    query, key = recipe(1138, 1, 2, 768, 64, (128, 64), own=1, spread=1.3, offset=1)
    assert (float(query.sum()), float(key.sum())) == pytest.approx((5706.8230, -7962.7245), abs=0.01)
    rows, columns = torch.arange(6)[:, None], torch.arange(12)
    past = columns < 2 * (rows + 1)
    found = score_blocks(query, key, (128, 64))
    found = found._replace(scores=found.scores.masked_fill(~past, -torch.inf))
    thresholds = HeadThresholds.of(2, CPU, density=None, cdf_threshold=0.8, similarity_threshold=0.4)
    blocks = select_blocks(found, thresholds, torch.ones(1, 1, 1, 12, dtype=torch.bool)) & past
    assert int(blocks.sum()) == 52 and blocks[0, 0, 1].nonzero().flatten().tolist() == [0, 1]
    assert sha256(blocks) == "c240d34407263367eb697f496892205f9e746630c096f77d1c52d77b0fd2bcd0"
    blocks |= columns // 2 == rows  # the rule that keeps the diagonal
    assert int(blocks.sum()) == 63
    assert sha256(blocks) == "87cb4c04621174d7c3f4fe0c7c31239b0094b4436aef24786be5eab2fe538c93"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_fraction_with_a_ragged_tail_reproduces_the_released_map(dtype):
    query, key = recipe(1121, 2, 2, 1000, 64, (128, 64), own=0.6, spread=2, offset=2)
    assert (float(query.sum()), float(key.sum())) == pytest.approx((-3036.5596, 24991.3132), abs=0.01)
    blocks = predict_blocks(query.to(dtype), key.to(dtype), (128, 64), density=0.5)
    assert blocks.shape == (2, 2, 8, 16) and int(blocks.sum()) == 316
    assert (blocks.sum(-1)[..., :7] == 8 + 1).all(), "half of the blocks and the tail"
    assert blocks[..., 7, :].all() and blocks[..., 15].all()
    assert sha256(blocks) == "e415005162507b6021dbf14e1d1f468a5a856d5012399a69a14a72b7571e8ad7"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_thresholds_for_each_head_and_sink_reproduce_the_released_map(dtype):
    query, key = recipe(1240, 1, 3, 1280, 128, (64, 128), own=1.5, spread=2, offset=1)
    assert (float(query.sum()), float(key.sum())) == pytest.approx((-2385.9678, -710.8863), abs=0.01)
    thresholds = {"cdf_threshold": (0.9, 0.95, 0.98), "similarity_threshold": (0.3, 0.5, 0.7)}
    blocks = predict_blocks(query.to(dtype), key.to(dtype), (64, 128), attention_sink=True, **thresholds)
    assert blocks.shape == (1, 3, 20, 10) and int(blocks.sum()) == 378
    assert blocks.sum(-1)[0, 0].tolist() == [3, 2, 3, 3, 4, 2, 3, 6, 3, 1, 4, 1, 3, 2, 3, 2, 4, 2, 3, 4]
    assert sha256(blocks) == "55d3a998a3b9a906e2b370b6b48ec547c3085d0c435320530ece68076679e62d"


def select(scores, density=None, tau=None, theta=-0.1, query_similarity=1.0, key_similarity=1.0):
    """`select_blocks` for one head; similarities are of all blocks, or one for each."""
    scores = torch.as_tensor(scores, dtype=torch.float32)[None, None]
    alike = [
        torch.as_tensor(x, dtype=torch.float32).expand((*scores.shape[:2], n))
        for x, n in zip((query_similarity, key_similarity), scores.shape[2:], strict=True)
    ]
    thresholds = HeadThresholds.of(1, CPU, density=density, cdf_threshold=tau, similarity_threshold=theta)
    real = torch.ones(1, 1, 1, scores.shape[-1], dtype=torch.bool)
    return select_blocks(BlockScores(scores, *alike), thresholds, real)[0, 0]


SHARES = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"tau": 0.49}, "0100"),  # none fits, raised to one
        ({"tau": 0.6}, "0100"),  # the block that crosses the threshold is not kept
        ({"tau": 0.81}, "0101"),
        ({"tau": 0.96}, "1101"),
        ({"tau": 1.0}, "1111"),
        ({"density": 0.5}, "0101"),
        ({"density": 0.2}, "0100"),
        ({"density": 1.0}, "1111"),
    ],
)
def test_selection_worked_out_by_hand(rule, kept):
    assert rows_as_text(select(SHARES, **rule)) == [kept]


def test_forced_columns_come_on_top_of_a_density():
    assert rows_as_text(select(SHARES, density=0.5, theta=0.5, key_similarity=[1.0, 0.2, 1.0, 1.0])) == ["1101"]
    assert rows_as_text(select(SHARES, density=0.5, theta=0.5, key_similarity=0.2)) == ["1111"]
    assert rows_as_text(select(SHARES, tau=0.5, theta=0.5, key_similarity=0.2)) == ["1111"]


def test_kept_blocks_are_counted_in_float32():
    """0.29 * 100 is 29 there and 28.999999999999996 in float64."""
    assert int(select(torch.randn(1, 100), density=0.29).sum()) == 29


def test_distant_scores_do_not_tie():
    scores = torch.tensor([[0.0, -300.0, -200.0, 400.0, -250.0]])
    assert rows_as_text(select(scores, density=0.8)) == ["10111"]


@pytest.mark.parametrize(
    ("block", "similarity"),
    [
        (torch.eye(16)[[3] * 8], 1.0),
        (torch.eye(16)[[3] * 8] * torch.tensor([1.0, -1.0] * 4)[:, None], 0.0),
        (torch.eye(16)[:8], 1 / 8),
        (torch.eye(16)[[0] * 4 + [1] * 4], 0.5),
    ],
    ids=["equal", "opposite", "orthogonal", "halves"],
)
def test_similarity_worked_out_by_hand(block, similarity):
    scale = torch.rand(8, 1) + 0.5  # lengths of tokens do not matter
    found = score_blocks((block * scale)[None, None], torch.randn(1, 1, 8, 16), (8, 8))
    assert float(found.query_similarity) == pytest.approx(similarity, abs=1e-6)


@pytest.mark.parametrize(
    ("block_size", "tokens", "rule"),
    [
        ((16, 8), 96, {"density": 0.3}),
        ((8, 16), 100, {"density": 0.5, "similarity_threshold": 0.4}),
        ((16, 16), 77, {"cdf_threshold": 0.9}),
        ((16, 8), 83, {"cdf_threshold": 0.7, "similarity_threshold": 0.5, "attention_sink": True}),
        ((32, 32), 20, {"cdf_threshold": 0.7}),
    ],
    ids=str,
)
def test_the_map_is_its_definition(seed, block_size, tokens, rule):
    query, key = recipe(seed, 2, 3, tokens, 8, block_size, own=1.0, spread=1.0, offset=1.0)
    expected = definition(query, key, block_size, **rule)
    assert torch.equal(predict_blocks(query, key, block_size, **rule), expected)


# -- invariants --------------------------------------------------------------------------------------------------------


def random_call(seed, tokens=150, batch=2, heads=2, block_size=(16, 16)):
    return recipe(seed, batch, heads, tokens, 16, block_size, own=1.0, spread=1.0, offset=2.0)


@pytest.mark.parametrize("theta", [-0.1, 0.4])
def test_more_is_a_superset_of_less(seed, theta):
    query, key = random_call(seed)
    for name in ("density", "cdf_threshold"):
        maps = [
            predict_blocks(query, key, (16, 16), similarity_threshold=theta, **{name: share})
            for share in (0.05, 0.2, 0.5, 0.8, 1.0)
        ]
        assert all((less <= more).all() for less, more in itertools.pairwise(maps))
        assert maps[0].any(-1).all() and maps[-1].all()


def test_negative_similarity_thresholds_are_all_the_same(seed):
    query, key = random_call(seed)
    maps = [predict_blocks(query, key, (16, 16), density=0.3, similarity_threshold=x) for x in (-1.0, -0.5, -0.001)]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])


def test_similarity_threshold_one_keeps_everything_also_for_equal_tokens(seed):
    query = torch.randn(1, 4, 6, 1, 24).expand(1, 4, 6, 16, 24).reshape(1, 4, 96, 24)
    assert predict_blocks(query, query, (16, 16), density=0.2, similarity_threshold=1.0).all()
    assert not predict_blocks(query, query, (16, 16), density=0.2, similarity_threshold=0.9).all()


def test_a_common_part_of_all_keys_changes_nothing(seed):
    query, key = random_call(seed)
    shift = 3 * torch.randn(2, 2, 1, 16)
    for rule in ({"density": 0.3, "similarity_threshold": 0.3}, {"cdf_threshold": 0.8}):
        assert torch.equal(
            predict_blocks(query.double(), key.double() + shift, (16, 16), **rule),
            predict_blocks(query.double(), key.double(), (16, 16), **rule),
        )


def test_whole_key_blocks_in_another_order_are_columns_in_another_order(seed):
    query, key = random_call(seed, tokens=150)
    blocks = torch.randperm(9)
    places = torch.cat([(blocks[:, None] * 16 + torch.arange(16)).flatten(), torch.arange(144, 150)])
    columns = torch.cat([blocks, torch.tensor([9])])
    for rule in ({"density": 0.3, "similarity_threshold": 0.3}, {"cdf_threshold": 0.8}):
        moved = predict_blocks(query, key[:, :, places], (16, 16), **rule)
        assert torch.equal(moved, predict_blocks(query, key, (16, 16), **rule)[..., columns])


def test_the_order_within_a_block_does_not_matter(seed):
    query, key = random_call(seed, tokens=160)
    places = torch.cat([torch.randperm(16) + 16 * block for block in range(10)])
    moved = predict_blocks(
        query[:, :, places], key[:, :, places], (16, 16), cdf_threshold=0.8, similarity_threshold=0.3
    )
    # Means are rounded in another order, and now and then a running sum lies as close to the threshold as that.
    less, more = (
        predict_blocks(query, key, (16, 16), cdf_threshold=threshold, similarity_threshold=0.3)
        for threshold in (0.8 - 1e-5, 0.8 + 1e-5)
    )
    assert not (less & ~moved).any() and not (moved & ~more).any() and (more & ~less).sum() <= 2


def test_a_token_order_is_a_permutation_of_the_tokens(seed):
    layout = TokenLayout((3, 6, 8), 5)
    query, key, _ = tokens_like(seed, layout)
    order = token_order("hilbert", layout)[None]
    options = {"density": 0.3, "text_start": layout.video_tokens}
    found = predict_blocks(query, key, (16, 16), token_order=order, **options)
    assert torch.equal(found, predict_blocks(query[:, :, order[0]], key[:, :, order[0]], (16, 16), **options))


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"cdf_threshold": 0.8, "similarity_threshold": 0.2}], ids=str)
def test_samples_and_heads_are_judged_alone(seed, rule, monkeypatch):
    query, key = random_call(seed, batch=3, heads=3)
    valid = torch.tensor([150, 131, 148])
    options = {**rule, "text_start": 130}
    expected = predict_blocks(query, key, (16, 16), key_valid=valid, **options)
    monkeypatch.setattr(sparge_prediction, "CHUNK_BYTES", 1)  # one head at a time
    for sample in range(3):
        one = slice(sample, sample + 1)
        assert torch.equal(
            predict_blocks(query[one], key[one], (16, 16), key_valid=valid[one], **options), expected[one]
        )


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"cdf_threshold": 0.8, "similarity_threshold": 0.2}], ids=str)
def test_padding_changes_nothing(seed, rule):
    """Whatever it holds; also where a whole block is padding and where a block is cut."""
    query, key = random_call(seed, batch=3)
    valid = torch.tensor([90, 131, 144])
    padded = [x.clone() for x in (query, key)]
    for x in padded:
        x[torch.arange(150) >= valid.view(-1, 1, 1).expand(-1, 2, 150)] = torch.nan
    found = predict_blocks(*padded, (16, 16), key_valid=valid, **rule)
    for sample, length in enumerate(valid.tolist()):
        alone = [x[sample : sample + 1, :, :length] for x in (query, key)]
        blocks = -(-length // 16)
        assert torch.equal(found[sample, :, :blocks, :blocks], predict_blocks(*alone, (16, 16), **rule)[0])
        assert not found[sample, ..., blocks:].any(), "blocks of padding are never kept, not even in dense rows"


def test_text_blocks_are_kept_rows_and_columns(seed):
    query, key = random_call(seed, tokens=170)
    blocks = predict_blocks(query, key, (16, 32), density=0.1, text_start=130)
    assert blocks[..., 130 // 16 :, :].all() and blocks[..., 130 // 32 :].all()
    assert not blocks[..., :8, :4].all()
    no_text = predict_blocks(query, key, (16, 32), density=0.1)
    assert torch.equal(blocks[..., :8, :4], no_text[..., :8, :4])


def test_the_sink_is_the_first_key_block(seed):
    query, key = random_call(seed)
    without = predict_blocks(query, key, (16, 16), density=0.1)
    expected = without.clone()
    expected[..., 0] = True
    assert not torch.equal(without, expected)
    assert torch.equal(predict_blocks(query, key, (16, 16), density=0.1, attention_sink=True), expected)


# -- edge cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"cdf_threshold": 0.8}, {"cdf_threshold": 0.0}], ids=str)
@pytest.mark.parametrize("kind", ["zero query", "zero key", "constant key", "short", "one token"])
def test_degenerate_calls_keep_at_least_one_block_in_every_row(seed, kind, rule):
    query, key = random_call(seed, tokens={"short": 7, "one token": 1}.get(kind, 100))
    if kind == "zero query":
        query = torch.zeros_like(query)
    if kind == "zero key":
        key = torch.zeros_like(key)
    if kind == "constant key":
        key = torch.ones_like(key)
    blocks = predict_blocks(query, key, (16, 16), **rule)
    assert blocks.any(-1).all()
    if kind != "zero query":
        return
    assert blocks.all(), "tokens of norm 0 are like nothing: all rows are dense"


def test_a_sample_without_valid_tokens_keeps_nothing(seed):
    query, key = random_call(seed)
    blocks = predict_blocks(query, key, (16, 16), density=0.3, key_valid=torch.tensor([150, 0]), text_start=140)
    assert blocks[0].any(-1).all() and not blocks[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["query", "key"])
def test_a_token_that_is_not_finite_makes_its_own_block_dense_alone(seed, bad, side):
    query, key = random_call(seed, tokens=160)
    clean = predict_blocks(query, key - key.mean(2, keepdim=True), (16, 16), density=0.2)
    (query if side == "query" else key)[0, 1, 37] = bad
    blocks = predict_blocks(query, key, (16, 16), density=0.2)
    assert blocks[0, 1, 2, :].all() if side == "query" else blocks[0, 1, :, 2].all()
    assert torch.equal(blocks[1], clean[1]) and torch.equal(blocks[0, 0], clean[0, 0])
    assert not blocks[0, 1].all()


def test_a_nan_query_reaches_only_its_own_row(seed):
    layout = TokenLayout((2, 8, 8))
    query, key, value = tokens_like(seed, layout, batch=1)
    query[0, 1, 37] = torch.nan
    processor = SpargeAttnProcessor(density=0.4, token_order="row-major", **SMALL)
    out = run_plan(processor.plan(call_of(layout, (query, key, value))), query, key, value)
    reached = out.isnan().any(-1)
    assert reached[0, 1, 37] and int(reached.sum()) == 1


def test_half_precision_makes_the_map_of_float32(seed):
    query, key = (x.bfloat16() for x in random_call(seed))
    for rule in ({"density": 0.3}, {"cdf_threshold": 0.8, "similarity_threshold": 0.3}):
        expected = predict_blocks(query.float(), key.float(), (16, 16), **rule)
        assert torch.equal(predict_blocks(query, key, (16, 16), **rule), expected)


def test_many_equal_shares_add_up(seed):
    """512 equal shares: a running sum in bfloat16 would stop at one half and never reach the threshold."""
    query = torch.ones(1, 1, 512 * 4, 8)
    key = torch.randn(1, 1, 1, 8).expand(1, 1, 4, 8).repeat(1, 1, 512, 1) + 1e-3 * torch.randn(1, 1, 2048, 8)
    key = key - (key @ query[0, 0, 0])[..., None] / 8  # orthogonal to the queries: all scores are 0
    kept = predict_blocks(query[:, :, :4].bfloat16().repeat(1, 1, 512, 1), key, (4, 4), cdf_threshold=0.9)
    assert int(kept[0, 0, 0].sum()) == pytest.approx(0.9 * 512, abs=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "density=None and cdf_threshold=None"),
        ({"density": 0.5, "cdf_threshold": 0.9}, "density=0.5 and cdf_threshold=0.9"),
        ({"density": (0.5, 0.4, 0.3)}, "density.*3 entries.*2 heads"),
        ({"cdf_threshold": 0.9, "similarity_threshold": (0.5,)}, "similarity_threshold.*1 entries.*2 heads"),
    ],
)
def test_bad_arguments_are_named(options, named):
    query, key = random_call(0)
    with pytest.raises(SettingsError, match=named):
        predict_blocks(query, key, (16, 16), **options)


# -- plans -------------------------------------------------------------------------------------------------------------


LAYOUT = TokenLayout((3, 7, 9), 11, torch.tensor([11, 4]))


@pytest.mark.parametrize("order", TOKEN_ORDERS)
@pytest.mark.parametrize("rule", [{"density": 0.3}, {"cdf_threshold": 0.8, "similarity_threshold": 0.1}], ids=str)
def test_a_plan_is_attention_under_its_mask(seed, order, rule):
    query, key, value = tokens_like(seed, LAYOUT)
    processor = SpargeAttnProcessor(token_order=order, **rule, **SMALL)
    plan = processor.plan(call_of(LAYOUT, (query, key, value)))
    plan.mask.validate()
    assert (plan.token_order is None) == (order == "row-major")
    where = token_order(order, LAYOUT).long()
    mask = plan.mask.token_mask()
    assert not mask.all() and mask.shape[:2] == (2, 3)
    q, k, v = (x[:, :, where].double() for x in (query, key, value))
    expected = torch.empty_like(q)
    expected[:, :, where] = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(run_plan(plan, query, key, value), expected.float(), atol=1e-5, rtol=1e-5)


def test_text_tokens_see_and_are_seen_by_all(seed):
    tensors = tokens_like(seed, LAYOUT)
    plan = SpargeAttnProcessor(density=0.1, **SMALL).plan(call_of(LAYOUT, tensors))
    mask, video = plan.mask.token_mask(), LAYOUT.video_tokens
    for sample, text in enumerate(LAYOUT.text_valid.tolist()):
        assert mask[sample, :, video:, : video + text].all() and mask[sample, :, :, video : video + text].all()
        assert not mask[sample, ..., video + text :].any()
    assert plan.mask.density < 0.5


@pytest.mark.parametrize(
    "everything", [{"density": 1.0}, {"cdf_threshold": 1.0}, {"density": 0.2, "similarity_threshold": 1.0}]
)
def test_keeping_everything_is_dense(seed, everything):
    query, key, value = tokens_like(seed, LAYOUT)
    plan = SpargeAttnProcessor(**everything, **SMALL).plan(call_of(LAYOUT, (query, key, value)))
    valid = torch.arange(LAYOUT.tokens) < LAYOUT.key_valid.view(-1, 1, 1, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=valid)
    torch.testing.assert_close(run_plan(plan, query, key, value), expected, atol=1e-5, rtol=1e-5)


def test_the_reported_density_is_that_of_the_map(seed):
    layout = TokenLayout((4, 8, 8))
    tensors = tokens_like(seed, layout)
    plan = SpargeAttnProcessor(density=0.3, similarity_threshold=0.2, **SMALL).plan(call_of(layout, tensors))
    assert plan.mask.density == pytest.approx(float(plan.mask.to_blocks().float().mean()), abs=1e-9)


def test_two_calls_give_the_same_bits_and_leave_nothing_behind(seed):
    call = call_of(LAYOUT, tokens_like(seed, LAYOUT))
    other = call_of(LAYOUT, tokens_like(seed + 1, LAYOUT), call.cache)
    processor = SpargeAttnProcessor(cdf_threshold=0.8, **SMALL)
    first = processor.plan(call).mask.to_blocks()
    processor.plan(other)
    assert torch.equal(processor.plan(call).mask.to_blocks(), first) and not call.state


def test_scaling_a_value_channel_scales_that_channel_of_the_output(seed):
    query, key, value = tokens_like(seed, LAYOUT)
    scaled = value.clone()
    scaled[..., 3] *= 8.0
    processor = SpargeAttnProcessor(density=0.4, **SMALL)
    out = run_plan(processor.plan(call_of(LAYOUT, (query, key, value))), query, key, value)
    found = run_plan(processor.plan(call_of(LAYOUT, (query, key, scaled))), query, key, scaled)
    assert torch.equal(found[..., :3], out[..., :3])
    torch.testing.assert_close(found[..., 3], 8.0 * out[..., 3])


def test_a_large_skip_threshold_skips_nothing_and_a_small_one_errs_no_more_than_its_bound(seed):
    layout = TokenLayout((4, 8, 8))
    query, key = recipe(seed, 2, 3, layout.tokens, 16, (16, 16), own=2.0, spread=0.5, offset=1.0)
    value = torch.randn_like(key)
    call = call_of(layout, (query, key, value))
    settings = {"density": 0.7, "token_order": "row-major", **SMALL}
    exact = run_plan(SpargeAttnProcessor(**settings).plan(call), query, key, value)
    plan = SpargeAttnProcessor(skip_threshold=(3.0, 8.0, 1e6), **settings).plan(call)
    out, skipped = run_plan(plan, query, key, value, return_skipped=True)
    assert (skipped[:, :2].sum((0, 2)) > 0).all() and not skipped[:, 2].any()
    error = (out - exact).abs().amax(-1).unflatten(2, (-1, 16)).amax(-1)
    assert float(error[:, 2].max()) < 1e-5 < float(error[:, 0].max())
    bound = skipped * 16 * 2.0 ** -plan.skip_threshold[:, None] * 2 * float(value.abs().max())
    assert (error <= bound + 1e-5).all()


@pytest.mark.parametrize("quantization", ["int8", "int8+fp8", "int8+int8"])
def test_quantized_calls_stay_near(seed, quantization):
    query, key, value = tokens_like(seed, LAYOUT, head_dim=32)
    plan = SpargeAttnProcessor(density=0.4, quantization=quantization, **SMALL).plan(
        call_of(LAYOUT, (query, key, value))
    )
    exact = run_plan(plan, query, key, value)
    found = run_plan(plan, query, key, value, quantization=quantization)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.08


def test_small_calls_are_dense_and_say_so():
    layout = TokenLayout((2, 8, 8))
    decided = SpargeAttnProcessor().plan(call_of(layout, tokens_like(0, layout)))
    assert isinstance(decided, Dense) and "128 tokens" in decided.reason and "min_tokens=1024" in decided.reason
    assert SpargeAttnProcessor().predicted_density(layout) == 1.0


def test_the_published_block_size_is_the_default(seed):
    layout = TokenLayout((5, 16, 16))
    plan = SpargeAttnProcessor().plan(call_of(layout, tokens_like(seed, layout, batch=1, heads=1)))
    assert plan.mask.block_size == (128, 64)


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("block_size", [None, 16])
def test_the_predicted_density_is_near_that_of_a_plan(seed, density, block_size, text):
    layout = TokenLayout((5, 9, 31), text)
    processor = SpargeAttnProcessor(density=density, min_tokens=0, block_size=block_size)
    found = processor.plan(call_of(layout, tokens_like(seed, layout))).mask.to_blocks().float().mean()
    assert float(found) == pytest.approx(processor.predicted_density(layout), abs=0.06 if text else 1e-6)
    assert float(found) <= processor.predicted_density(layout) + 1e-6


def test_the_predicted_density_of_a_share_of_attention_is_a_bound(seed):
    layout = TokenLayout((5, 9, 31))
    processor = SpargeAttnProcessor(cdf_threshold=0.8, **SMALL)
    plan = processor.plan(call_of(layout, tokens_like(seed, layout)))
    assert float(plan.mask.to_blocks().float().mean()) <= processor.predicted_density(layout) + 1e-6


# -- on models ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Watched(SpargeAttnProcessor):
    """Keeps the plans it makes."""

    plans: list = field(default_factory=list, init=False)

    def plan(self, call):
        self.plans.append((super().plan(call), call))
        return self.plans[-1][0]


@pytest.mark.parametrize("everything", [{"density": 1.0}, {"cdf_threshold": 1.0}], ids=str)
def test_keeping_everything_is_the_stock_model(video_family, run, everything):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = run(model, inputs)
    attnproc.install(model, SpargeAttnProcessor(**everything, **SMALL))
    torch.testing.assert_close(run(model, inputs), expected, atol=2e-5, rtol=2e-5)
    assert all(site.sparse_calls and not site.dense_calls for site in attnproc.report(model).sites)


def test_every_family_runs_sparse_with_text_kept_and_samples_apart(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    stock = run(model, inputs)
    attnproc.install(model, processor := Watched(density=0.3, **SMALL))
    both = run(model, inputs)
    assert both.isfinite().all() and (both - stock).abs().max() > 1e-4, "the mask must matter"
    for plan, call in processor.plans:
        blocks, layout = plan.mask.to_blocks(), call.layout
        assert not blocks.all()
        if layout.text_tokens:
            valid = plan.mask.key_valid
            starts = torch.arange(blocks.shape[-1]) * 16
            real = starts < (layout.tokens if valid is None else valid.view(-1, 1, 1, 1))
            first = layout.video_tokens // 16
            assert (blocks[..., first:, :] == real).all() and (blocks[..., first:] == real[..., first:]).all()
    for sample in range(2):
        one = {
            name: value[sample : sample + 1]
            if isinstance(value, torch.Tensor) and value.ndim and name != "image_rotary_emb"
            else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(run(model, one), both[sample : sample + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wan", "cog", "hunyuan-true-cfg", "hunyuan15", "mochi", "ltx"])
def test_pipelines_of_both_guidance_styles_repeat_themselves(name, tiny_pipelines, generate):
    pipe, inputs = tiny_pipelines[name]()
    stock = generate(pipe, inputs)
    attnproc.install(pipe, SpargeAttnProcessor(density=0.3, skip_threshold=8.0, **SMALL))
    first = generate(pipe, inputs)
    assert first.isfinite().all() and not torch.equal(first, stock)
    other = {n: -x if n.endswith("prompt_embeds") else x for n, x in inputs.items()}
    assert not torch.equal(generate(pipe, other), first)
    assert torch.equal(generate(pipe, inputs), first), "nothing is left of the run before"
    report = attnproc.report(pipe)
    assert not report.fallbacks and report.density < 1.0


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["high", "balanced", "fast"])
def test_the_dial_sets_every_open_setting_and_is_overridden_by_arguments(quality):
    processor = SpargeAttnProcessor(quality=quality)
    assert None not in (processor.density, processor.similarity_threshold, processor.dense_layers)
    chosen = SpargeAttnProcessor(quality=quality, density=0.37, dense_layers=3)
    assert (chosen.density, chosen.dense_layers, chosen.dense_steps) == (0.37, 3, processor.dense_steps)
    by_share = SpargeAttnProcessor(quality=quality, cdf_threshold=0.9)
    assert by_share.density is None and by_share.dense_layers == processor.dense_layers


def test_a_higher_quality_keeps_more():
    layout = TokenLayout((21, 30, 52))
    high, balanced, fast = (
        SpargeAttnProcessor(quality=q).predicted_density(layout) for q in ("high", "balanced", "fast")
    )
    assert 1.0 > high > balanced > fast > 0.0


@pytest.mark.parametrize(
    "bad",
    [
        {"density": 0.0},
        {"density": 1.1},
        {"density": -0.5},
        {"density": math.nan},
        {"density": "0.5"},
        {"density": True},
        {"density": ()},
        {"density": (0.5, 2.0)},
        {"cdf_threshold": -0.1},
        {"cdf_threshold": 1.01},
        {"cdf_threshold": math.nan},
        {"similarity_threshold": 1.5},
        {"similarity_threshold": math.nan},
        {"similarity_threshold": -math.inf},
        {"skip_threshold": 0},
        {"skip_threshold": -1.0},
        {"skip_threshold": math.nan},
        {"skip_threshold": (5.0, None)},
        {"attention_sink": 1},
        {"token_order": "zigzag"},
        {"token_order": None},
        {"min_tokens": -1},
        {"min_tokens": 10.0},
        {"block_size": 0},
    ],
    ids=str,
)
def test_bad_settings_raise_at_construction_and_are_named(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(SettingsError, match=re.escape(f"{name}={value!r}")):
        SpargeAttnProcessor(**bad)


def test_a_density_and_a_share_of_attention_exclude_each_other():
    with pytest.raises(SettingsError, match=r"density=0\.5 and cdf_threshold=0\.9"):
        SpargeAttnProcessor(density=0.5, cdf_threshold=0.9)


def test_one_number_for_each_head_must_be_as_many_as_the_heads():
    layout = TokenLayout((2, 8, 8))
    processor = SpargeAttnProcessor(density=0.5, skip_threshold=(5.0, 6.0), **SMALL)
    with pytest.raises(SettingsError, match=r"skip_threshold=\(5\.0, 6\.0\) has 2 entries and the call 3 heads"):
        processor.plan(call_of(layout, tokens_like(0, layout)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"density": (0.2, 0.4), "skip_threshold": (5.0, math.inf), "similarity_threshold": 0.3},
        {"cdf_threshold": 0.97, "attention_sink": True, "token_order": "time-major", "min_tokens": 77},
        {"quality": "fast", "quantization": "int8+fp8", "dense_steps": (0.1, 2), "dense_layers": {1, 3}},
    ],
    ids=str,
)
def test_settings_survive_json(tmp_path, settings):
    processor = SpargeAttnProcessor(**settings)
    processor.save(tmp_path / "sparge.json")
    assert AttnProcessor.load(tmp_path / "sparge.json") == processor
    assert SpargeAttnProcessor.from_settings(json.loads(json.dumps(processor.to_dict()))["settings"]) == processor


@pytest.mark.parametrize("name", list(SpargeAttnProcessor.presets()))
def test_presets_are_valid_and_say_where_they_come_from(name):
    preset = SpargeAttnProcessor.presets()[name]
    processor = SpargeAttnProcessor.from_preset(name)
    assert preset["for"] and preset["source"]
    assert (processor.density is None) == ("cdf_threshold" in preset["settings"])


def test_a_video_that_is_too_small_warns_and_is_the_stock_model(tiny_models, run):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    expected = run(model, inputs)
    attnproc.install(model, SpargeAttnProcessor(dense_layers=0))
    with pytest.warns(AttnProcWarning, match="min_tokens=1024"):
        assert torch.equal(run(model, inputs), expected)
