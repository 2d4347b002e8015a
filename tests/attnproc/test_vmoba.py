"""VMoBAAttnProcessor: settings, presets, which chunks a layer takes, plans, whole models, gradients."""

import json
import math
import re
import warnings

import pytest
import torch

import attnproc
from attnproc.errors import SettingsError
from attnproc.families import base
from attnproc.kernels import available_backends, block_sparse_attention
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.methods import method_class
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.vmoba import VMoBAAttnProcessor
from attnproc.sparse.vmoba_chunks import Partition
from attnproc.sparse.vmoba_selection import pair_density, select_chunks

SMALL = {"min_tokens": 0, "block_size": 16, "dense_steps": 0}
WAN_480P, WAN_720P = TokenLayout((21, 30, 52)), TokenLayout((21, 45, 80))
GRIDS = [(5, 8, 8), (5, 3, 7), (4, 4, 6)]
WAYS = {
    "topk query_head": {"mode": "topk", "scope": "query_head"},
    "topk head_global": {"mode": "topk", "scope": "head_global"},
    "topk overall": {"mode": "topk", "scope": "overall"},
    "threshold query_head": {"mode": "threshold", "scope": "query_head"},
    "threshold head_global": {"mode": "threshold", "scope": "head_global"},
    "threshold overall": {"mode": "threshold", "scope": "overall"},
    "threshold block": {"mode": "threshold", "scope": "block"},
}


@pytest.fixture
def seed():
    value = int(torch.randint(2**31, ()))
    print(f"seed {value}")
    return value


@pytest.fixture(params=WAYS)
def how(request):
    return WAYS[request.param]


@pytest.fixture(params=("oracle", "cpu"))
def backend(request):
    """Each backend that runs these masks on CPU tensors."""
    return request.param


def call_of(query, key, value, layout, layer=0, cache=None):
    step, denoiser = Step(5, 10, "cond", layout.grid), Denoiser("transformer", "WanTransformer3DModel", 8)
    return AttentionCall(query, key, value, layout, step, layer, denoiser, {} if cache is None else cache, {})


def tokens_of(layout, seed, batch=2, heads=2, channels=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, layout.tokens, channels)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def seen_by_definition(processor, query, key, layout, layer):
    """bool (B, H, tokens, tokens): the selected chunks token by token, all text, no padding."""
    video, text = layout.video_tokens, layout.text_tokens
    turn = processor.turn(layer)
    partition = Partition.of(layout.grid, processor.chunk_size(layout.grid, turn))
    selection = select_chunks(
        query[:, :, :video],
        key[:, :, :video],
        partition,
        mode=processor.mode,
        scope=processor.scope,
        topk=processor.chunk_budget(partition.chunks, turn),
        threshold=processor.threshold,
    )
    seen = torch.ones(*query.shape[:2], video + text, video + text, dtype=torch.bool)
    seen[:, :, :video, :video] = selection[..., partition.chunk]
    if layout.text_valid is not None:
        seen &= (torch.arange(video + text) < layout.key_valid[:, None])[:, None, None]
    return seen


def masked_softmax(query, key, value, seen):
    """out and log-sum-exp in float64."""
    scores = (query.double() @ key.double().mT / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_for_use_without_training():
    processor = VMoBAAttnProcessor()
    assert (processor.mode, processor.scope, processor.density, processor.topk) == ("topk", "query_head", 0.25, None)
    assert processor.dense_steps == (0.25, 0) and processor.dense_layers == 0
    assert processor.partitions == ("1d", "2d", "3d")


@pytest.mark.parametrize(("layout", "counts"), [(WAN_480P, [2, 6, 18]), (WAN_720P, [2, 10, 9])], ids=["480p", "720p"])
def test_the_rule_gives_the_published_numbers_of_chunks(layout, counts):
    processor = VMoBAAttnProcessor()
    chunks = [Partition.of(layout.grid, processor.chunk_size(layout.grid, turn)).chunks for turn in range(3)]
    assert [processor.chunk_budget(n, turn) for turn, n in enumerate(chunks)] == counts
    assert [processor.chunk_budget(n, 0) for n in (1, 2, 5, 6, 10, 48)] == [1, 2, 2, 2, 3, 12]


def test_a_quarter_of_fifty_steps_is_dense():
    processor = VMoBAAttnProcessor()
    dense = [processor.is_dense_step(Step(index, 50, "cond", None)) for index in range(50)]
    assert dense == [True] * 12 + [False] * 38


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("layout", [WAN_480P, WAN_720P, TokenLayout((33, 45, 80), 256)], ids=["480p", "720p", "text"])
def test_a_higher_quality_keeps_more(layout, mode):
    high, balanced, fast = (
        VMoBAAttnProcessor(quality=q, mode=mode).predicted_density(layout) for q in ("high", "balanced", "fast")
    )
    assert 1.0 > high > balanced > fast > 0.0


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "best"},
        {"scope": "local"},
        {"scope": "block"},
        {"density": 0.0},
        {"density": 1.5},
        {"density": float("nan")},
        {"threshold": -0.1},
        {"threshold": 1.01},
        {"threshold": float("nan")},
        {"threshold": "0.25"},
        {"topk": 0},
        {"topk": 2.0},
        {"topk": True},
        {"topk": (2, 6)},
        {"topk": (2, 6, 0)},
        {"topk": (2, None, 6)},
        {"partitions": ()},
        {"partitions": "3d"},
        {"partitions": ("4d",)},
        {"partitions": ((2, 3, 4, 5),)},
        {"partitions": ((),)},
        {"partitions": ((0,),)},
        {"partitions": ((2, 1.5),)},
        {"min_tokens": -1},
        {"min_tokens": 1.0},
        {"block_size": 0},
        {"quality": "best"},
    ],
    ids=str,
)
def test_bad_settings_raise_at_construction_and_are_named(bad):
    with pytest.raises(SettingsError, match=next(iter(bad))):
        VMoBAAttnProcessor(**bad)


def test_settings_survive_json(tmp_path):
    processor = VMoBAAttnProcessor(
        partitions=[[3], "2d", (7, 5, 13)],
        mode="threshold",
        scope="head_global",
        density=0.3,
        topk=[2, 6, 18],
        threshold=0.5,
        min_tokens=100,
        dense_steps=(0.2, 1),
        dense_layers=(0, 4),
        block_size=32,
    )
    assert processor.partitions == ((3,), "2d", (7, 5, 13)) and processor.topk == (2, 6, 18)
    processor.save(tmp_path / "vmoba.json")
    assert VMoBAAttnProcessor.load(tmp_path / "vmoba.json") == processor
    assert AttnProcessor.load(tmp_path / "vmoba.json") == processor
    assert VMoBAAttnProcessor.from_settings(json.loads(json.dumps(processor.to_dict()))["settings"]) == processor


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VMoBAAttnProcessor.presets())
def test_every_preset_can_be_made_and_says_its_source(name):
    preset = VMoBAAttnProcessor.presets()[name]
    assert set(preset) == {"settings", "for", "source"} and preset["for"]
    assert preset["source"].startswith(("arXiv 2506.23858", "arXiv 2502.13189", "hao-ai-lab/FastVideo", "suggested: "))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = VMoBAAttnProcessor.from_preset(name)
    for key, value in preset["settings"].items():
        assert json.loads(json.dumps(getattr(processor, key))) == value


@pytest.mark.parametrize(
    ("name", "grid", "chunks", "topk"),
    [
        ("wan2.1-1.3b-480p", (21, 30, 52), [7, 24, 72], [2, 6, 18]),
        ("wan2.1-1.3b-720p", (21, 45, 80), [7, 40, 36], [2, 10, 9]),
        ("wan2.1-1.3b-576p-training", (24, 36, 64), [8, 48, 72], None),
        ("wan2.1-1.3b-480p-141-frames-training", (36, 30, 52), [12, 24, 36], None),
        ("fastvideo-wan2.1-1.3b-480x832", (20, 30, 52), [10, 130, 325], None),
        ("fastvideo-wan2.1-1.3b-448x832", (20, 28, 52), [10, 28, 140], [2, 6, 18]),
        ("moba", (21, 30, 52), [7], [2]),
    ],
)
def test_presets_have_the_published_chunks(name, grid, chunks, topk):
    processor = VMoBAAttnProcessor.from_preset(name)
    sizes = [processor.chunk_size(grid, turn) for turn in range(len(processor.partitions))]
    assert [Partition.of(grid, size).chunks for size in sizes] == chunks
    if topk is not None:
        assert [processor.chunk_budget(n, turn) for turn, n in enumerate(chunks)] == topk
    else:
        assert (processor.mode, processor.threshold) == ("threshold", 0.25)


def test_published_chunks_win_over_the_chooser_where_the_grid_matches():
    for name, grid in (
        ("wan2.1-1.3b-480p", (21, 30, 52)),
        ("wan2.1-1.3b-720p", (21, 45, 80)),
        ("wan2.1-1.3b-576p-training", (24, 36, 64)),
        ("wan2.1-1.3b-480p-141-frames-training", (36, 30, 52)),
    ):
        automatic, preset = VMoBAAttnProcessor(), VMoBAAttnProcessor.from_preset(name)
        assert tuple(automatic.chunk_size(grid, turn) for turn in range(3)) == preset.partitions
    assert VMoBAAttnProcessor().chunk_size((20, 30, 52), 1) == (6, 7)


# -- which chunks a layer takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({}, [0, 1, 2, 0, 1, 2, 0]),
        ({"dense_layers": 2}, [None, None, 0, 1, 2, 0, 1]),
        ({"dense_layers": (0, 3)}, [None, 0, 1, None, 2, 0, 1]),
        ({"partitions": ["1d", "1d", "3d"]}, [0, 1, 2, 0, 1, 2, 0]),
        ({"partitions": ["3d"]}, [0] * 7),
    ],
    ids=str,
)
def test_layers_take_turns_from_the_first_sparse_one(settings, turns):
    processor = VMoBAAttnProcessor(**settings)
    found = [None if processor.is_dense_layer(layer) else processor.turn(layer) for layer in range(7)]
    assert found == turns


def test_chunks_are_no_larger_than_the_grid():
    processor = VMoBAAttnProcessor(partitions=[(99,), (4, 99), (2, 99, 99)])
    assert [processor.chunk_size((5, 8, 6), turn) for turn in range(3)] == [(5,), (4, 6), (2, 8, 6)]


# -- dense instead of sparse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "grid", "reason"),
    [
        ({}, (5, 8, 8), "320 video tokens.*min_tokens=8192"),
        ({"min_tokens": 0}, (1, 8, 8), "^$"),  # one slab of frames
        ({"min_tokens": 0, "topk": 5}, (5, 8, 8), "^$"),
        ({"min_tokens": 0, "density": 1.0}, (5, 8, 8), "^$"),
        ({"min_tokens": 0, "mode": "threshold", "threshold": 1.0}, (5, 8, 8), "^$"),
        ({"min_tokens": 0, "mode": "threshold", "partitions": [(9, 9, 9)]}, (5, 8, 8), "^$"),
    ],
    ids=str,
)
def test_dense_where_sparse_gains_nothing_or_keeps_all(settings, grid, reason, seed):
    layout = TokenLayout(grid)
    processor = VMoBAAttnProcessor(**settings)
    decision = processor.plan(call_of(*tokens_of(layout, seed, batch=1), layout))
    assert isinstance(decision, Dense) and re.search(reason, decision.reason)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_values_that_cannot_be_ranked_run_dense_and_say_so(which, bad, how, seed):
    layout = TokenLayout((5, 8, 8), 5)
    tensors = tokens_of(layout, seed)
    tensors[which][1, 0, 17, 3] = bad
    decision = VMoBAAttnProcessor(**SMALL, **how).plan(call_of(*tensors, layout))
    assert isinstance(decision, Dense) and "inf or NaN" in decision.reason
    tensors[which][1, 0, 17, 3] = 0.0
    tensors[which][1, 0, -1] = bad  # text is not ranked
    assert isinstance(VMoBAAttnProcessor(**SMALL, **how).plan(call_of(*tensors, layout)), Plan)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", [None, 21], ids=["video", "text"])
def test_a_plan_sees_exactly_the_selected_chunks_and_all_text(grid, layer, text, how, seed):
    layout = TokenLayout(grid) if text is None else TokenLayout(grid, text, torch.tensor([21, 6]))
    processor = VMoBAAttnProcessor(**SMALL, **how)
    query, key, value = tokens_of(layout, seed)
    plan = processor.plan(call_of(query, key, value, layout, layer))
    plan.mask.validate()
    order = torch.arange(layout.tokens) if plan.token_order is None else plan.token_order[0]
    assert (plan.token_order is None) == (layer == 0), "slabs of frames are in order already"
    back = order.argsort()
    assert torch.equal(
        plan.mask.token_mask()[:, :, back][..., back].expand(2, 2, -1, -1),
        seen_by_definition(processor, query, key, layout, layer),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_planned_attention_is_softmax_over_the_selected_chunks(layer, dtype, backend, seed):
    layout = TokenLayout((5, 3, 7), 9, torch.tensor([9, 4]))
    for way in ("topk query_head", "threshold head_global"):
        processor = VMoBAAttnProcessor(**SMALL, **WAYS[way])
        query, key, value = tokens_of(layout, seed, dtype=dtype)
        plan = processor.plan(call_of(query, key, value, layout, layer))
        expected, expected_lse = masked_softmax(
            query, key, value, seen_by_definition(processor, query, key, layout, layer)
        )
        out, lse = block_sparse_attention(
            query, key, value, plan.mask, token_order=plan.token_order, return_lse=True, backend=backend
        )
        assert out.dtype == dtype
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_triton_runs_a_plan_with_ragged_chunks_and_text(seed):
    if problem := available_backends()["triton"]:
        pytest.skip(problem)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = TokenLayout((3, 4, 5), 7, torch.tensor([7, 2]))
    processor = VMoBAAttnProcessor(**SMALL, partitions=[(2, 3, 5)])
    tensors = tokens_of(layout, seed)
    seen = seen_by_definition(processor, *tensors[:2], layout, 0)
    on_device = TokenLayout(layout.grid, 7, layout.text_valid.to(device))
    plan = processor.plan(call_of(*(tensor.to(device) for tensor in tensors), on_device))
    assert plan.mask.partial_counts.any()
    out = block_sparse_attention(
        *(tensor.to(device) for tensor in tensors), plan.mask, token_order=plan.token_order, backend="triton"
    )
    torch.testing.assert_close(out.double().cpu(), masked_softmax(*tensors, seen)[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "threshold", "threshold": 1 - 1e-9},
        {"mode": "threshold", "scope": "head_global", "threshold": 1 - 1e-9},
    ],
    ids=str,
)
def test_everything_kept_is_dense_attention(settings, seed):
    layout = TokenLayout((4, 4, 6), 5)
    query, key, value = tokens_of(layout, seed)
    for layer in range(3):
        plan = VMoBAAttnProcessor(**SMALL, **settings).plan(call_of(query, key, value, layout, layer))
        assert plan.mask.density == 1.0
        out = block_sparse_attention(query, key, value, plan.mask, token_order=plan.token_order)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_only_the_own_chunk_is_block_diagonal_attention(seed):
    layout = TokenLayout((6, 4, 4))
    query, key, value = tokens_of(layout, seed)
    for scope in ("query_head", "head_global", "overall"):
        processor = VMoBAAttnProcessor(**SMALL, scope=scope, topk=1, partitions=[(2,)])
        plan = processor.plan(call_of(query, key, value, layout))
        out = block_sparse_attention(query, key, value, plan.mask, token_order=plan.token_order)
        parts = [
            torch.nn.functional.scaled_dot_product_attention(*(t[:, :, i : i + 32] for t in (query, key, value)))
            for i in range(0, 96, 32)
        ]
        torch.testing.assert_close(out, torch.cat(parts, dim=2), atol=1e-5, rtol=1e-5)


def test_values_and_text_have_no_influence_on_the_selection(how, seed):
    layout = TokenLayout((5, 3, 7), 9)
    processor = VMoBAAttnProcessor(**SMALL, **how)
    query, key, value = tokens_of(layout, seed)
    first = processor.plan(call_of(query, key, value, layout)).mask.token_mask()
    query[:, :, -9:] *= 100
    key[:, :, -9:] *= 100
    assert torch.equal(processor.plan(call_of(query, key, value * 7 + 1, layout)).mask.token_mask(), first)


def test_text_tokens_are_never_dropped(how, seed):
    layout = TokenLayout((5, 3, 7), 33, torch.tensor([33, 2]))
    query, key, value = tokens_of(layout, seed)
    for layer in range(3):
        mask = VMoBAAttnProcessor(**SMALL, **how).plan(call_of(query, key, value, layout, layer)).mask
        tokens = mask.token_mask()
        for sample, valid in enumerate((33, 2)):
            assert tokens[sample, :, :, 105 : 105 + valid].all() and not tokens[sample, :, :, 105 + valid :].any()
            assert tokens[sample, :, 105:, : 105 + valid].all(), "text sees all of the video"


def test_a_batch_is_as_its_samples_alone(how, seed):
    layout = TokenLayout((5, 3, 7), 9, torch.tensor([9, 0, 4]))
    processor = VMoBAAttnProcessor(**SMALL, **how)
    tensors = tokens_of(layout, seed, batch=3)
    for layer in range(3):
        both = processor.plan(call_of(*tensors, layout, layer)).mask.token_mask()
        for n in range(3):
            alone = TokenLayout(layout.grid, 9, layout.text_valid[n : n + 1])
            plan = processor.plan(call_of(*(t[n : n + 1] for t in tensors), alone, layer))
            assert torch.equal(plan.mask.token_mask()[0], both[n])


def test_tables_are_cached_by_value_and_selections_are_not(seed):
    cache = {}
    processor = VMoBAAttnProcessor(**SMALL)
    wide, tall = TokenLayout((4, 4, 8)), TokenLayout((4, 8, 4))  # as many tokens
    tensors = tokens_of(wide, seed)
    first = processor.plan(call_of(*tensors, wide, 1, cache))
    again = processor.plan(call_of(-tensors[0], *tensors[1:], wide, 1, cache))
    assert again.token_order is first.token_order
    assert not torch.equal(again.mask.token_mask(), first.mask.token_mask())
    assert not torch.equal(processor.plan(call_of(*tensors, tall, 1, cache)).token_order, first.token_order)
    assert not torch.equal(processor.plan(call_of(*tensors, wide, 2, cache)).token_order, first.token_order)
    with_text = TokenLayout((4, 4, 8), 3)
    assert processor.plan(call_of(*tokens_of(with_text, seed), with_text, 1, cache)).token_order.shape == (1, 131)
    smaller = VMoBAAttnProcessor(**{**SMALL, "block_size": 8})
    assert smaller.plan(call_of(*tensors, wide, 1, cache)).mask.block_size == (8, 8)


# -- density -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [0, 21])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_predicted_density_of_top_k_is_the_selected_one_where_chunks_are_equal(layer, text, seed):
    layout = TokenLayout((4, 4, 6), text)
    partitions = ((1,), (2, 3), (2, 2, 3))
    processor = VMoBAAttnProcessor(**SMALL, partitions=[partitions[layer]], topk=2)
    query, key, _ = tokens_of(layout, seed)
    seen = seen_by_definition(processor, query, key, layout, 0)
    assert processor.predicted_density(layout) == pytest.approx(seen.double().mean().item(), abs=1e-12)


def test_predicted_density_is_the_mean_over_the_turns():
    layout = TokenLayout((4, 4, 6))
    partitions = ((1,), (2, 3), (9, 9, 9))  # the last one is a single chunk, so dense
    each = [VMoBAAttnProcessor(min_tokens=0, partitions=[p]).predicted_density(layout) for p in partitions]
    assert each[:2] == pytest.approx([2 / 4, 2 / 4]) and each[2] == 1.0
    processor = VMoBAAttnProcessor(min_tokens=0, partitions=partitions)
    assert processor.predicted_density(layout) == pytest.approx(sum(each) / 3)
    assert VMoBAAttnProcessor(partitions=partitions).predicted_density(layout) == 1.0  # too small


def test_predicted_density_of_the_paper_s_settings():
    # 7, 24 and 72 chunks of which 2, 6 and 18 are read
    expected = (2 / 7 + 6 / 24 + 18 / 72) / 3
    assert VMoBAAttnProcessor().predicted_density(WAN_480P) == pytest.approx(expected, abs=1e-12)
    trained = VMoBAAttnProcessor.from_preset("wan2.1-1.3b-576p-training")
    assert trained.predicted_density(TokenLayout((24, 36, 64))) == pytest.approx(0.19)


def test_computed_density_counts_whole_blocks_and_pair_density_the_selected_pairs(how, seed):
    layout = TokenLayout((4, 4, 6))
    processor = VMoBAAttnProcessor(**SMALL, **how)
    query, key, value = tokens_of(layout, seed)
    mask = processor.plan(call_of(query, key, value, layout, 2)).mask
    seen = seen_by_definition(processor, query, key, layout, 2)
    partition = Partition.of(layout.grid, processor.chunk_size(layout.grid, 2))
    chosen = seen[..., partition.members[:, 0]]
    assert pair_density(chosen, partition) == pytest.approx(seen.double().mean().item(), abs=1e-12)
    blocks = mask.to_blocks().double()
    sizes = mask.key_bounds.diff().double()
    computed = torch.einsum("bhij,i,j->", blocks, sizes, sizes) / (4 * 96 * 96)
    assert mask.density == pytest.approx(computed.item(), abs=1e-12)
    assert mask.density >= pair_density(chosen, partition)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["topk query_head", "threshold head_global", "threshold block"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradients_are_those_of_the_masked_softmax(way, layer, backend, seed):
    layout = TokenLayout((5, 3, 7), 9)
    processor = VMoBAAttnProcessor(**SMALL, **WAYS[way])
    tensors = [tensor.requires_grad_() for tensor in tokens_of(layout, seed)]
    with torch.no_grad():
        plan = processor.plan(call_of(*tensors, layout, layer))
    out = block_sparse_attention(*tensors, plan.mask, token_order=plan.token_order, backend=backend)
    expected, _ = masked_softmax(*tensors, seen_by_definition(processor, *tensors[:2], layout, layer))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    found = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch):
    """Answers every sparse call of a model by the definition, and counts them."""
    calls = []

    def attention(query, key, value, mask, *, token_order, return_lse, **_):
        processor, layout, layer = calls_of[-1]
        calls.append(layer)
        out, lse = masked_softmax(query, key, value, seen_by_definition(processor, query, key, layout, layer))
        return out.to(query.dtype), lse.float()

    calls_of = []
    plan = VMoBAAttnProcessor.plan

    def noting(self, call):
        calls_of.append((self, call.layout, call.layer))
        return plan(self, call)

    def start():
        monkeypatch.setattr(base, "block_sparse_attention", attention)
        monkeypatch.setattr(VMoBAAttnProcessor, "plan", noting)
        return calls

    return start


@pytest.mark.parametrize("way", ["topk query_head", "threshold head_global"])
def test_every_family_computes_the_definition(video_family, run, checked, way):
    processor = VMoBAAttnProcessor(**SMALL, **WAYS[way], partitions=["3d", "2d"])
    model, inputs = video_family.model(), video_family.inputs(2)
    stock = run(model, inputs)
    attnproc.install(model, processor)
    out = run(model, inputs)
    report = attnproc.report(model)
    calls = checked()
    expected = run(model, inputs)
    assert len(calls) >= video_family.sites and not report.fallbacks
    assert all(site.sparse_calls and not site.dense_calls and site.density_max <= 1.0 for site in report.sites)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    assert (out - stock).abs().max() > 1e-3, "the selection must matter"


def test_every_family_with_everything_kept_is_the_stock_model(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = run(model, inputs)
    attnproc.install(model, VMoBAAttnProcessor(**SMALL, mode="threshold", threshold=1 - 1e-9))
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert all(site.sparse_calls for site in attnproc.report(model).sites)


def test_every_family_takes_a_batch_as_its_samples(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    attnproc.install(model, VMoBAAttnProcessor(**SMALL))
    both = run(model, inputs)
    for sample in range(2):
        one = {
            name: value[sample : sample + 1]
            if isinstance(value, torch.Tensor) and value.ndim and name != "image_rotary_emb"
            else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(run(model, one), both[sample : sample + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan-true-cfg", "hunyuan15", "cog", "mochi", "ltx"])
def test_runs_of_both_guidance_styles_repeat(name, tiny_pipelines, generate):
    pipe, inputs = tiny_pipelines[name]()
    stock = generate(pipe, inputs)
    pipe.attn_processor = VMoBAAttnProcessor(**{**SMALL, "dense_steps": (1, 1)})
    first = generate(pipe, inputs)
    assert first.isfinite().all() and not torch.equal(first, stock)
    assert torch.equal(generate(pipe, inputs), first)
    report = attnproc.report(pipe)
    assert not report.fallbacks and all(site.dense_calls == 2 * site.sparse_calls for site in report.sites)


@pytest.mark.parametrize("settings", [{"mode": "threshold", "threshold": 1.0}, {"dense_steps": 3}], ids=str)
def test_nothing_to_save_leaves_a_wan_model_to_the_last_bit(settings, tiny_pipelines, tiny_models, generate):
    pipe, inputs = tiny_pipelines["wan"]()
    pipe.transformer = tiny_models["wan"].model(num_layers=3, attention_head_dim=16)
    expected = generate(pipe, inputs)
    pipe.attn_processor = VMoBAAttnProcessor(**{**SMALL, **settings})
    assert torch.equal(generate(pipe, inputs), expected)
    assert attnproc.report(pipe).density == 1.0 and not attnproc.report(pipe).fallbacks


def test_a_model_can_be_trained_through_it(tiny_models):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(2)
    attnproc.install(model, VMoBAAttnProcessor(**SMALL, mode="threshold", scope="head_global"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(**inputs, return_dict=False)[0].square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert all(site.sparse_calls and not site.dense_calls for site in attnproc.report(model).sites)


def test_short_videos_run_dense_and_say_so_once(tiny_models, run):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    expected = run(model, inputs)
    attnproc.install(model, VMoBAAttnProcessor(dense_steps=0))
    with pytest.warns(attnproc.AttnProcWarning, match="105 video tokens") as caught:
        assert torch.equal(run(model, inputs), expected)
    assert len(caught) == 1
    attnproc.install(model, VMoBAAttnProcessor(dense_steps=0, strict=True))
    with pytest.raises(attnproc.UnsupportedError, match="min_tokens=8192"):
        run(model, inputs)


def test_it_is_found_by_its_name():
    assert method_class("vmoba") is VMoBAAttnProcessor
