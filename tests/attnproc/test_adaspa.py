"""AdaSpaAttnProcessor: when it searches, what it remembers, the plans it makes, its settings."""

import dataclasses
import itertools
import json
import math
import re
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import diffusers
import pytest
import torch

import attnproc
from attnproc.context import context_of
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.kernels import block_sparse_attention, scores
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse import adaspa
from attnproc.sparse.adaspa import AdaSpaAttnProcessor

SMALL = {"block_size": 16, "min_tokens": 0}
GRID = (5, 8, 8)


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


def call_of(index=0, total=50, state=None, branch="cond", grid=GRID, text=0, valid=None, batch=1, cache=None, **shape):
    shape = {"heads": 3, "head_dim": 8, "dtype": torch.float32, **shape}
    layout = TokenLayout(grid, text, None if valid is None else torch.tensor(valid))
    size = (3, batch, shape["heads"], layout.tokens, shape["head_dim"])
    query, key, value = torch.randn(size).to(shape["dtype"])
    owner = Denoiser("transformer", "WanTransformer3DModel", 8)
    state, cache = {} if state is None else state, {} if cache is None else cache
    return AttentionCall(query, key, value, layout, Step(index, total, branch, grid), 0, owner, cache, state)


def at(call, index):
    """The same tensors at another step."""
    return dataclasses.replace(call, step=dataclasses.replace(call.step, index=index))


@pytest.fixture
def passes(monkeypatch):
    """Counts passes over queries and keys: .lse and .mass."""
    counted = SimpleNamespace(lse=0, mass=0)
    for name, count in (("dense_lse", "lse"), ("block_mass", "mass")):
        original = getattr(adaspa, name)

        def wrapped(*args, original=original, count=count, **kwargs):
            setattr(counted, count, getattr(counted, count) + 1)
            return original(*args, **kwargs)

        monkeypatch.setattr(adaspa, name, wrapped)
    return counted


def trace(processor, calls, passes):
    """What happens in each call: "." dense, "F" dense with a search, "C" cached search and sparse, "s" sparse."""
    letters = ""
    for call in calls:
        before = passes.lse, passes.mass
        if processor.is_dense_step(call.step):
            letters += "."
            continue
        plan = processor.plan(call)
        kind = isinstance(plan, Dense), passes.lse - before[0], passes.mass - before[1]
        letters += {(True, 1, 1): "F", (False, 0, 1): "C", (False, 0, 0): "s", (True, 0, 0): "."}[kind]
    return letters


def steady(processor, total, passes, start=0):
    """The trace of a run in which queries and keys hardly change."""
    call = call_of(total=total)
    return trace(processor, (at(call, index) for index in range(start, total)), passes)


# -- schedule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (50, "." * 9 + "F" + "s" * 19 + "C" + "s" * 20),
        (20, "..." + "F" + "s" * 7 + "C" + "s" * 8),
        (10, ".FsssCssss"),
        (4, "FCss"),
        (2, "Fs"),
        (1, "F"),
    ],
)
@pytest.mark.filterwarnings("ignore::attnproc.AttnProcWarning")
def test_a5_schedule(total, expected, passes):
    assert steady(AdaSpaAttnProcessor(**SMALL), total, passes) == expected


def test_a5_a_second_expert_searches_at_its_first_call_in_each_branch(passes):
    processor = AdaSpaAttnProcessor(**SMALL)
    for branch in ("cond", "uncond"):
        call = call_of(branch=branch)
        letters = trace(processor, (at(call, index) for index in range(14, 50)), passes)
        assert letters == "F" + "s" * 14 + "C" + "s" * 20


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [
        ((10, 30), 50, (9, 29)),
        ((0, 30), 50, (0, 29)),
        ((1, 30), None, (0, 29)),
        (10, 50, (9,)),
        ((0.2, 0.6), 50, (9, 29)),
        ((0.2, 0.6), 3, (0, 1)),
        ((0.25,), 10, (2,)),  # 2.5 is rounded up
        ((0.2, 5, 0.6), 20, (3, 4, 11)),
        ((0.5, 5, 8), 10, (4, 7)),  # falls on an earlier one
        ((10, 30), 20, (9,)),
        ((10, 30), 5, ()),
        ((0.0, 1.0), 10, (0, 9)),
    ],
)
def test_search_steps_are_counted_from_one_or_fractions_of_the_run(steps, total, expected):
    assert AdaSpaAttnProcessor(search_steps=steps).searches(total) == expected


@pytest.mark.filterwarnings("ignore::attnproc.AttnProcWarning")
def test_dense_steps_come_on_top_of_the_warm_up(passes):
    assert steady(AdaSpaAttnProcessor(**SMALL, dense_steps=(0, 3)), 20, passes) == "...FsssssssCsssss..."
    assert steady(AdaSpaAttnProcessor(**SMALL, dense_steps=(6, 1)), 20, passes) == "......FssssCsssssss."
    assert steady(AdaSpaAttnProcessor(**SMALL, dense_steps=(0.7, 0)), 20, passes) == "." * 14 + "F" + "s" * 5


@pytest.mark.filterwarnings("ignore::attnproc.AttnProcWarning")
def test_the_number_of_dense_steps_counts_the_first_search(passes):
    for settings, total in itertools.product(
        ({}, {"dense_steps": (6, 1)}, {"search_steps": (3,)}, {"dense_steps": (0, 2)}, {"search_steps": (40,)}),
        (7, 20, 50),
    ):
        processor = AdaSpaAttnProcessor(**SMALL, **settings)
        letters = steady(processor, total, passes)
        first, last = processor.dense_step_count(total)
        assert letters.count(".") + letters.count("F") == min(first + last, total)
        assert first == total or letters.index("F") + 1 == first


def test_a_search_that_was_missed_is_made_up(passes):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of()
    assert trace(processor, (at(call, index) for index in (9, 10, 31, 32)), passes) == "FsCs"
    # One that the dense steps hide is one of them.
    assert trace(processor, (at(call_of(), index) for index in (28, 29, 30)), passes) == "FFF"


def test_a_search_that_was_not_planned_for_starts_over(passes):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of()
    assert trace(processor, (at(call, index) for index in (9, 29, 30)), passes) == "FCs"
    processor.search_steps = (10, 30, 40)
    assert trace(processor, (at(call, index) for index in (38, 39, 40)), passes) == "sFs"


def test_a_bare_model_needs_counts(passes):
    with pytest.raises(SettingsError, match=r"search_steps=\(0\.2, 0\.6\).*scheduler"):
        AdaSpaAttnProcessor(**SMALL).is_dense_step(Step(0, None, "call0", GRID))
    processor, call = AdaSpaAttnProcessor(**SMALL, search_steps=(2, 4)), call_of(total=None)
    assert trace(processor, (at(call, index) for index in range(6)), passes) == ".FsCss"


def test_a_run_with_few_sparse_steps_warns_once():
    cache = {}
    processor = AdaSpaAttnProcessor(**SMALL, search_steps=(0.7,))
    with pytest.warns(AttnProcWarning, match=r"6 of 20 steps will be sparse.*at least 40%"):
        processor.plan(call_of(14, 20, cache=cache))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.plan(call_of(15, 20, cache=cache))
        AdaSpaAttnProcessor(**SMALL).plan(call_of(3, 20))
    with pytest.warns(AttnProcWarning, match="0 of 1 steps"):
        processor.plan(call_of(0, 1, cache=cache))


def test_search_steps_past_the_end_are_left_out_with_a_warning():
    processor = AdaSpaAttnProcessor(**SMALL, search_steps=(5, 30))
    with pytest.warns(AttnProcWarning, match=r"run of 20 steps; \[30\] left out"):
        processor.plan(call_of(4, 20))
    processor = AdaSpaAttnProcessor(**SMALL, search_steps=(30,))
    assert not processor.is_dense_step(Step(0, 20, "cond", GRID))
    plan = processor.plan(call_of(0, 20))
    assert isinstance(plan, Dense) and "no step of a run of 20" in plan.reason
    assert processor.dense_step_count(20) == (20, 0)


# -- what is remembered ------------------------------------------------------------------------------------------------


CHANGES = {
    "batch": {"batch": 2},
    "heads": {"heads": 4},
    "head_dim": {"head_dim": 16},
    "dtype": {"dtype": torch.bfloat16},
    "grid": {"grid": (4, 8, 8)},
    "text": {"text": 20},
    "padding": {"text": 12, "valid": [5]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_shape_dtype_or_text_searches_anew(change, passes):
    processor, state = AdaSpaAttnProcessor(**SMALL), {}
    base = {"text": 12, "valid": [7]}
    calls = [call_of(9, state=state, **base), call_of(10, state=state, **base)]
    new = {"index": 11, "state": state, **base, **({"valid": [7] * change["batch"]} if "batch" in change else {})}
    new = {**new, **change, **({"valid": None} if change.get("text") == 20 else {})}
    calls += [call_of(**new), call_of(**{**new, "index": 12})]
    assert trace(processor, calls, passes) == "FsFs"


def test_going_back_searches_anew(passes):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of()
    assert trace(processor, (at(call, index) for index in (12, 13, 11, 12)), passes) == "FsFs"


def test_branches_do_not_meet():
    processor = AdaSpaAttnProcessor(**SMALL)
    calls = {branch: call_of(branch=branch) for branch in ("cond", "uncond")}

    def masks(order):
        states = {branch: {} for branch in calls}
        found = {branch: [] for branch in calls}
        for branch, index in order:
            call = dataclasses.replace(at(calls[branch], index), state=states[branch])
            plan = processor.plan(call)
            found[branch].append(None if isinstance(plan, Dense) else plan.mask.to_blocks())
        return found

    steps = (9, 10, 29, 30)
    alternating = masks([(branch, index) for index in steps for branch in calls])
    apart = masks([(branch, index) for branch in calls for index in steps])
    for branch in calls:
        for one, other in zip(alternating[branch][1:], apart[branch][1:], strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(apart["cond"][1], apart["uncond"][1])


def test_the_log_sum_exp_is_freed_after_the_last_search():
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of()
    sizes = []
    for index in (9, 28, 29, 30):
        processor.plan(at(call, index))
        lse = call.state["adaspa"].lse
        sizes.append(None if lse is None else tuple(lse.shape))
    assert sizes == [(1, 3, 320), (1, 3, 320), None, None]
    late = call_of(35)
    processor.plan(late)
    assert late.state["adaspa"].lse is None


def test_large_masks_are_kept_as_bits_and_come_back_the_same(monkeypatch):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of(9, text=21, valid=[21, 6], batch=2)
    processor.plan(call)
    small = processor.plan(at(call, 10)).mask
    assert processor.plan(at(call, 11)).mask is small
    monkeypatch.setattr(adaspa, "SMALL_MASK_PAIRS", 0)
    call.state.clear()
    processor.plan(call)
    kept = call.state["adaspa"].kept
    assert kept.dtype == torch.uint8 and kept.shape == (2, 3, 22, 3)
    mask = processor.plan(at(call, 10)).mask.validate()
    assert torch.equal(mask.to_blocks(), small.to_blocks()) and torch.equal(mask.key_valid, small.key_valid)
    assert torch.equal(mask.query_bounds, small.query_bounds)


def test_heads_in_chunks_find_the_same(monkeypatch):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of(9, heads=5, text=9, valid=[4, 9], batch=2)
    found = []
    for size in (1 << 30, 1, 2 * 2 * 22**2 * adaspa.PAIR_BYTES):
        monkeypatch.setattr(adaspa, "CHUNK_BYTES", size)
        call.state.clear()
        processor.plan(call)
        found.append(processor.plan(at(call, 10)).mask.to_blocks())
        processor.plan(at(call, 29))  # cached
        assert torch.equal(processor.plan(at(call, 30)).mask.to_blocks(), found[-1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_samples_of_a_batch_do_not_meet():
    """Each sample ranks its own heads and has its own text, so a batch is its samples."""
    processor = AdaSpaAttnProcessor(**SMALL, recall_threshold=0.3)
    both = call_of(9, heads=5, text=21, valid=[21, 6, 0], batch=3)
    later = torch.randn_like(both.query)
    processor.plan(both)
    moved = dataclasses.replace(at(both, 29), query=both.query + 0.1 * later)
    together = processor.plan(moved).mask.to_blocks()
    for sample, valid in enumerate((21, 6, 0)):
        part = slice(sample, sample + 1)
        layout = TokenLayout(GRID, 21, torch.tensor([valid]))
        tensors = {name: getattr(both, name)[part] for name in ("query", "key", "value")}
        alone = dataclasses.replace(both, layout=layout, state={}, **tensors)
        processor.plan(alone)
        mask = processor.plan(dataclasses.replace(at(alone, 29), query=moved.query[part])).mask
        assert torch.equal(mask.to_blocks()[0], together[sample])


# -- refreshing --------------------------------------------------------------------------------------------------------


def drifted(call, index, amount):
    return dataclasses.replace(
        at(call, index),
        query=call.query + amount * torch.randn_like(call.query),
        key=call.key + amount * torch.randn_like(call.key),
    )


def test_a_refresh_chooses_by_the_new_queries_and_keys():
    processor, call = AdaSpaAttnProcessor(**SMALL, head_adaptive=False), call_of(9)
    processor.plan(call)
    old = processor.plan(at(call, 10)).mask.to_blocks()
    now = drifted(call, 29, 0.3)
    found = processor.plan(now).mask.to_blocks()
    fresh = dataclasses.replace(at(now, 9), state={})
    processor.plan(fresh)
    exact = processor.plan(at(fresh, 10)).mask.to_blocks()

    def overlap(one, other):
        return float((one & other).sum() / (one | other).sum())

    assert overlap(found, exact) > overlap(old, exact) and overlap(found, exact) > 0.7


def test_heads_are_ranked_by_their_recall_of_now():
    """A drift common to a block would weigh its row in the recall by as much, if rows were not scaled first."""
    processor = AdaSpaAttnProcessor(**SMALL, recall_threshold=0.0, lse_drift_max=math.inf)
    call = call_of(9, heads=12)
    call.query.mul_(4.0 * torch.rand(1, 12, 20, 1).repeat_interleave(16, dim=2))  # rows of unlike recall
    processor.plan(call)
    expected = processor.plan(at(call, 10)).mask.to_blocks()
    known = call.state["adaspa"]
    shift = 2.0 * torch.randn(1, 12, 20).repeat_interleave(16, dim=2)
    call.state["adaspa"] = dataclasses.replace(known, lse=known.lse + shift)
    assert torch.equal(processor.plan(at(call, 29)).mask.to_blocks(), expected)


@pytest.mark.parametrize("update", [True, False])
def test_what_the_third_search_starts_from(update):
    processor = AdaSpaAttnProcessor(**SMALL, search_steps=(10, 20, 30), update_lse=update)
    call = call_of(9)
    processor.plan(call)
    first = call.state["adaspa"].lse
    torch.testing.assert_close(first, scores.dense_lse(call.query, call.key), atol=1e-5, rtol=1e-5)
    now = drifted(call, 19, 0.3)
    processor.plan(now)
    exact = scores.dense_lse(now.query, now.key)
    assert (exact - first).abs().max() > 0.01
    torch.testing.assert_close(call.state["adaspa"].lse, exact if update else first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scale", "limit", "expected"), [(1.0, 0.5, "C"), (30.0, 0.5, "F"), (3.0, math.inf, "C"), (1e4, math.inf, "F")]
)
def test_a_refresh_after_a_large_drift_is_a_dense_search(scale, limit, expected, passes):
    processor, call = AdaSpaAttnProcessor(**SMALL, lse_drift_max=limit), call_of(9)
    processor.plan(call)
    now = dataclasses.replace(at(call, 29), query=call.query * scale)
    before = passes.lse
    plan = processor.plan(now)
    assert (isinstance(plan, Dense), passes.lse - before) == ((True, 1) if expected == "F" else (False, 0))
    fresh = dataclasses.replace(at(now, 9), state={})
    processor.plan(fresh)
    if expected == "F":
        exact = processor.plan(at(fresh, 10)).mask.to_blocks()
        assert torch.equal(processor.plan(at(now, 30)).mask.to_blocks(), exact)


@pytest.mark.parametrize("index", [9, 29])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "key"])
def test_nan_runs_dense_and_is_not_remembered(name, value, index):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of(9)
    if index == 29:
        processor.plan(call)
    remembered = dict(call.state)
    bad = getattr(call, name).clone()
    bad[0, 1, 17, 3] = value
    plan = processor.plan(dataclasses.replace(at(call, index), **{name: bad}))
    assert isinstance(plan, Dense) and "NaN" in plan.reason
    assert call.state == remembered


# -- plans -------------------------------------------------------------------------------------------------------------


def test_padding_may_hold_anything():
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of(9, text=24, valid=[24, 5], batch=2)

    def run(call):
        call.state.clear()
        processor.plan(call)
        processor.plan(at(call, 29))
        mask = processor.plan(at(call, 30)).mask
        return mask.to_blocks(), block_sparse_attention(call.query, call.key, call.value, mask)[:, :, :325]

    blocks, out = run(call)
    for tensor in (call.query, call.key, call.value):
        tensor[1, :, 325:] = torch.nan
    poisoned, same = run(call)
    assert torch.equal(poisoned, blocks)
    assert same.isfinite().all() and torch.equal(same, out)


@pytest.mark.parametrize("grid", [(5, 8, 8), (5, 7, 9)], ids=str)
def test_density_is_as_predicted_where_heads_are_alike(grid):
    processor = AdaSpaAttnProcessor(**SMALL, density=0.3, head_adaptive=False)
    call = call_of(9, text=32, grid=grid)
    processor.plan(call)
    density = processor.plan(at(call, 10)).mask.density
    # The short last block is in some rows and not in others.
    assert processor.predicted_density(call.layout) == pytest.approx(density, abs=1e-12 if grid == GRID else 0.01)


def test_blocks_need_offsets_only_where_text_follows_a_short_block():
    for grid, text, ragged in (((5, 8, 8), 20, False), ((5, 7, 9), 0, False), ((5, 7, 9), 20, True)):
        processor, call = AdaSpaAttnProcessor(**SMALL), call_of(9, grid=grid, text=text)
        processor.plan(call)
        assert (processor.plan(at(call, 10)).mask.query_offsets is not None) == ragged


@pytest.mark.parametrize(
    ("settings", "layout", "reason"),
    [
        ({}, TokenLayout(GRID), "320 tokens.*min_tokens=8192"),
        ({"min_tokens": 100, "block_size": 128}, TokenLayout(GRID), "3 blocks of video.*smaller block_size"),
        ({**SMALL, "density": 1.0}, TokenLayout(GRID), "^$"),
        ({**SMALL, "density": 0.99}, TokenLayout(GRID), "^$"),
        ({**SMALL, "density": 0.1}, TokenLayout((1, 3, 4), 8), "^$"),
    ],
)
def test_dense_is_preferred_where_nothing_can_be_gained(settings, layout, reason, passes):
    processor = AdaSpaAttnProcessor(**settings)
    for index in (9, 10):
        plan = processor.plan(call_of(index, grid=layout.grid, text=layout.text_tokens))
        assert isinstance(plan, Dense) and re.search(reason, plan.reason)
    assert (passes.lse, passes.mass) == (0, 0)
    assert processor.predicted_density(layout) == 1.0


def test_guarding_and_the_diagonal_reach_the_mask():
    call = call_of(9, heads=6)

    def blocks(**settings):
        processor = AdaSpaAttnProcessor(**SMALL, **settings)
        call.state.clear()
        processor.plan(call)
        return processor.plan(at(call, 10)).mask.to_blocks()

    rows = blocks(recall_threshold=0.0).sum(-1)[0, :, 0]
    assert sorted(rows.tolist()) == [2, 2, 2, 6, 6, 6]
    assert blocks(recall_threshold=0.0, head_adaptive=False).sum(-1).unique().tolist() == [4]
    assert blocks(recall_threshold=0.2, guarded=True).sum(-1).unique().tolist() == [4], "heads are alike"
    diagonal = blocks(force_diagonal=True)
    assert diagonal.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(diagonal.sum(-1), blocks().sum(-1))


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Watched(AdaSpaAttnProcessor):
    """Notes every call and its plan."""

    seen: list = field(default_factory=list, init=False, repr=False, compare=False)

    def plan(self, call):
        plan = super().plan(call)
        self.seen.append((call, plan))
        return plan


def walk(tiny, model, inputs, run, steps=4):
    """A bare model called step by step."""
    outs = []
    for step in range(steps):
        moved = {
            **inputs,
            "timestep": torch.full_like(inputs["timestep"], 100 * (step if is_mochi(tiny) else 9 - step)),
        }
        outs.append(run(model, moved))
    return outs


def is_mochi(tiny):
    return tiny.model_class.startswith("Mochi")


BARE = {**SMALL, "search_steps": (1, 3), "density": 0.3}


def test_keeping_everything_is_the_stock_model(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = walk(video_family, model, inputs, run)
    attnproc.install(model, AdaSpaAttnProcessor(**{**BARE, "density": 1.0}))
    assert all(map(torch.equal, walk(video_family, model, inputs, run), expected))


def test_in_every_family_attention_is_softmax_over_the_kept_tokens(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = walk(video_family, model, inputs, run)
    processor = Watched(**BARE)
    attnproc.install(model, processor)
    outs = walk(video_family, model, inputs, run)
    assert torch.equal(outs[0], expected[0]), "a dense search has the output of the model"
    for out, other in zip(outs[1:], expected[1:], strict=True):
        assert out.isfinite().all() and not torch.equal(out, other)
    sites = video_family.sites
    assert [isinstance(plan, Plan) for _, plan in processor.seen] == [False] * sites + [True] * 3 * sites
    for call, plan in processor.seen[sites:]:
        layout, mask = call.layout, plan.mask.validate()
        tokens, video = mask.token_mask(), layout.video_tokens
        valid = torch.full((2,), layout.tokens) if layout.key_valid is None else layout.key_valid
        visible = torch.arange(layout.tokens) < valid.view(-1, 1, 1, 1)
        assert torch.equal(tokens[:, :, :, video:].any(2), visible[:, :, 0, video:].expand(2, 2, -1))
        for sample, end in enumerate(valid.tolist()):
            assert tokens[sample, :, :end, video:end].all() and tokens[sample, :, video:end, :end].all()
        weights = (call.query.double() @ call.key.double().mT / call.query.shape[-1] ** 0.5).masked_fill(
            ~tokens, -torch.inf
        )
        softmax = weights.softmax(-1).nan_to_num() @ call.value.double()
        found = block_sparse_attention(call.query, call.key, call.value, mask)
        torch.testing.assert_close(found.double(), softmax, atol=1e-5, rtol=1e-5)
    report = attnproc.report(model)
    assert all((site.dense_calls, site.sparse_calls) == (1, 3) for site in report.sites) and not report.fallbacks


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan-true-cfg", "hunyuan15", "cog", "mochi", "ltx"])
def test_pipelines_search_twice_in_each_branch(name, tiny_pipelines, generate, passes):
    pipe, inputs = tiny_pipelines[name]()
    dense = generate(pipe, inputs, steps=6)
    pipe.attn_processor = AdaSpaAttnProcessor(**SMALL, density=0.3, search_steps=(2, 4), lse_drift_max=math.inf)
    first = generate(pipe, inputs, steps=6)
    report = attnproc.report(pipe)
    branches = 1 if name in ("hunyuan", "cog", "mochi", "ltx") else 2
    assert first.isfinite().all() and not torch.equal(first, dense) and not report.fallbacks
    assert all((s.dense_calls, s.sparse_calls) == (2 * branches, 4 * branches) for s in report.sites)
    assert passes.lse == branches * len(report.sites) and passes.mass == 2 * passes.lse
    model = getattr(pipe, "transformer", None)
    assert not context_of(model)._states, "nothing is remembered when a run ends"
    assert torch.equal(generate(pipe, inputs, steps=6), first)
    pipe.attn_processor = AdaSpaAttnProcessor(**SMALL, density=1.0)
    assert torch.equal(generate(pipe, inputs, steps=6), dense)


def test_each_expert_searches_on_its_own(tiny_pipelines, generate):
    pipe, inputs = tiny_pipelines["wan"](two_experts=True)
    pipe.attn_processor = processor = Watched(**SMALL, search_steps=(2, 6))
    generate(pipe, inputs, steps=8)
    kinds = {}
    for call, plan in processor.seen:
        if call.layer == 0 and call.step.branch == "cond":
            kinds.setdefault(call.denoiser.name, []).append((call.step.index, isinstance(plan, Dense)))
    first, second = kinds["transformer"], kinds["transformer_2"]
    assert first[0] == (1, True) and not any(dense for _, dense in first[1:])
    assert second[0] == (first[-1][0] + 1, True) and not any(dense for index, dense in second[1:] if index != 5)


def test_a_fallback_warns_once_and_is_an_error_under_strict(tiny_models, run):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    bad = {**inputs, "hidden_states": inputs["hidden_states"] * torch.nan}
    attnproc.install(model, AdaSpaAttnProcessor(**BARE))
    with pytest.warns(AttnProcWarning, match="NaN") as caught:
        walk(tiny, model, bad, run)
    assert len(caught) == 1
    attnproc.install(model, AdaSpaAttnProcessor(**BARE, strict=True))
    with pytest.raises(UnsupportedError, match="NaN"):
        run(model, bad)
    walk(tiny, model, inputs, run)  # searches are no fallback


def test_gradients_flow_through_the_kept_blocks(tiny_models):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, AdaSpaAttnProcessor(**BARE))
    for timestep in (900, 800):
        model.zero_grad()
        model(**{**inputs, "timestep": torch.tensor([timestep])})[0].square().sum().backward()
        gradient = model.blocks[0].attn1.to_q.weight.grad
        assert gradient.isfinite().all() and gradient.any()
    assert all(site.sparse_calls == 1 for site in attnproc.report(model).sites)


@pytest.mark.parametrize("quantization", ["int8", "int8+int8"])
def test_quantized_sparse_steps_stay_near_and_searches_are_exact(quantization, tiny_models, run):
    tiny = tiny_models["cog"]
    model, inputs = tiny.model(), tiny.inputs(2)
    attnproc.install(model, AdaSpaAttnProcessor(**BARE))
    expected = walk(tiny, model, inputs, run, steps=2)
    attnproc.install(model, AdaSpaAttnProcessor(**BARE, quantization=quantization))
    found = walk(tiny, model, inputs, run, steps=2)
    assert torch.equal(found[0], expected[0])
    assert 0.0 < (found[1] - expected[1]).norm() < 0.05 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_searches_in_float32(dtype):
    processor, call = AdaSpaAttnProcessor(**SMALL), call_of(9, dtype=dtype)
    processor.plan(call)
    assert call.state["adaspa"].lse.dtype == torch.float32
    half = processor.plan(at(call, 10)).mask.to_blocks()
    exact = dataclasses.replace(call, query=call.query.float(), key=call.key.float(), state={})
    processor.plan(exact)
    assert (half == processor.plan(at(exact, 10)).mask.to_blocks()).float().mean() > 0.99


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["high", "balanced", "fast"])
def test_the_dial_sets_every_open_setting_and_is_overridden_by_arguments(quality):
    processor = AdaSpaAttnProcessor(quality=quality)
    assert None not in (processor.density, processor.search_steps)
    chosen = AdaSpaAttnProcessor(quality=quality, density=0.37)
    assert (chosen.density, chosen.search_steps) == (0.37, processor.search_steps)


def test_the_defaults_are_the_papers():
    processor = AdaSpaAttnProcessor()
    assert processor.density == 0.2 and processor.searches(50) == (9, 29)
    assert processor.dense_step_count(50) == (10, 0) and processor.recall_threshold == 0.8
    assert processor._segments(TokenLayout((33, 45, 80), 256)).size == 64
    layout = TokenLayout((33, 45, 80), 256)
    high, balanced, fast = (
        AdaSpaAttnProcessor(quality=quality).predicted_density(layout) for quality in ("high", "balanced", "fast")
    )
    assert 0.31 > high > 0.3 > 0.21 > balanced > 0.2 > 0.11 > fast > 0.1


@pytest.mark.parametrize(
    "bad",
    [
        {"density": 0.0},
        {"density": -0.1},
        {"density": 1.01},
        {"density": math.nan},
        {"density": "0.2"},
        {"density": True},
        {"search_steps": ()},
        {"search_steps": (-1,)},
        {"search_steps": (30, 10)},
        {"search_steps": (10, 10)},
        {"search_steps": (0, 1)},
        {"search_steps": (0.6, 0.2)},
        {"search_steps": (0.2, 1.5)},
        {"search_steps": (math.nan,)},
        {"search_steps": (True, 30)},
        {"search_steps": ("10",)},
        {"search_steps": "10"},
        {"recall_threshold": 1.5},
        {"recall_threshold": None},
        {"lse_drift_max": 0.0},
        {"lse_drift_max": math.nan},
        {"head_adaptive": 1},
        {"guarded": None},
        {"force_diagonal": "yes"},
        {"update_lse": 0},
        {"guarded": True, "head_adaptive": False},
        {"min_tokens": -1},
        {"min_tokens": 1.5},
        {"block_size": 48},
        {"block_size": 8},
        {"block_size": 256},
        {"dense_steps": -1},
        {"quality": "best"},
    ],
    ids=str,
)
def test_bad_settings_raise_at_construction_and_are_named(bad):
    with pytest.raises(SettingsError, match=next(iter(bad))):
        AdaSpaAttnProcessor(**bad)


@pytest.mark.parametrize("backend", ["flex", "fa4"])
def test_backends_of_even_blocks_are_refused_where_text_follows_a_short_block(backend):
    processor = AdaSpaAttnProcessor(**SMALL, backend=backend)
    with pytest.raises(SettingsError, match=f"{backend}.*315 video tokens"):
        processor.check(TokenLayout((5, 7, 9), 20))
    for layout in (TokenLayout((5, 7, 9)), TokenLayout(GRID, 20)):
        processor.check(layout)
    dataclasses.replace(processor, backend="auto").check(TokenLayout((5, 7, 9), 20))
    dataclasses.replace(processor, min_tokens=8192).check(TokenLayout((5, 7, 9), 20))


def test_settings_survive_json(tmp_path):
    processor = AdaSpaAttnProcessor(
        density=0.35,
        search_steps=(0.1, 12, 0.7),
        recall_threshold=0.7,
        guarded=True,
        force_diagonal=True,
        lse_drift_max=math.inf,
        update_lse=False,
        min_tokens=0,
        dense_steps=(0, 2),
        dense_layers={5, 1},
        block_size=32,
    )
    processor.save(tmp_path / "adaspa.json")
    assert AdaSpaAttnProcessor.load(tmp_path / "adaspa.json") == processor
    assert AttnProcessor.load(tmp_path / "adaspa.json") == processor
    assert AdaSpaAttnProcessor.from_settings(json.loads(json.dumps(processor.to_dict()))["settings"]) == processor
    assert dataclasses.replace(processor, dense_steps=0, dense_layers=0).search_steps == (0.1, 12, 0.7)


@pytest.mark.parametrize("name", AdaSpaAttnProcessor.presets())
def test_every_preset_can_be_made_and_says_its_source(name):
    preset = AdaSpaAttnProcessor.presets()[name]
    assert set(preset) == {"settings", "for", "source"} and preset["for"]
    assert preset["source"].startswith(("arXiv 2502.21079, ", "suggested: "))
    processor = AdaSpaAttnProcessor.from_preset(name)
    for key, value in preset["settings"].items():
        assert getattr(processor, key) == (tuple(value) if isinstance(value, list) else value)


def test_the_smallest_model_runs_sparse(passes):
    processor = AdaSpaAttnProcessor.from_preset("shapes-video")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steady(processor, 20, passes) == "...FsssssssCssssssss"
    assert processor.predicted_density(TokenLayout(GRID)) == 0.5


def test_the_estimate_counts_the_warm_up():
    found = attnproc.estimate("hunyuanvideo", steps=50, processor=AdaSpaAttnProcessor())
    assert found.dense_step_share == 10 / 50 and found.density == pytest.approx(0.2, abs=0.01)


def test_image_to_video_that_starts_late_searches_at_its_own_first_steps(tiny_models, run):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(10)
    attnproc.install(model, AdaSpaAttnProcessor(**SMALL), scheduler=scheduler)
    for timestep in scheduler.timesteps[10:]:
        run(model, {**inputs, "timestep": timestep[None]})
    assert all((site.dense_calls, site.sparse_calls) == (2, 8) for site in attnproc.report(model).sites)
