"""What users of sparse attention packages complain about, turned into claims about every sparse method.

Claims in which methods have no part, or which a test elsewhere makes for all of them:

| complaint | folder: tests |
|---|---|
| tails, any block size | kernels/test_attention: test_equals_the_float64_definition, test_cpu_takes_any_block_size |
| less speed than promised | test_estimation: test_ceilings_of_the_table, test_advice |
| recall on request | pipelines/test_inspect: test_recall_and_density_are_those_of_the_plan |
| calibrations of another version | test_calibration: test_a_header_must_be_one_of_ours |
| every difference of a calibration | test_calibration: test_each_difference_is_named_alone |
| rows that see nothing are 0 | kernels/test_attention: test_equals_the_float64_definition ("empty rows") |
| a self-test on one's own device | pipelines/test_cli: test_selftest_passes_here_and_fails_a_wrong_backend |
| Wan 2.2 | test_methods_on_families: test_two_experts_run_sparse |
| image-to-video, Animate, VACE | test_methods_on_families: test_image_to_video_and_other_variants_run_sparse |
| float16 and bfloat16 in models | test_methods_on_families: test_half_precision_is_finite_and_near |
| Ulysses on real ranks | test_with_diffusers_features: test_ulysses_on_two_ranks_is_one_process |
| step and branch for one's own method | test_runs: test_every_call_knows_its_step_and_branch |
| steps over two experts | test_runs: test_two_experts_share_one_count_of_steps |
| grouped key heads | kernels/test_attention: test_key_heads_are_shared_by_groups_of_query_heads |
| memory of the kernels | kernels/test_attention: test_cpu_memory_grows_with_tokens_not_their_square |
"""

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import attnproc
from attnproc import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.calibration import Calibration
from attnproc.kernels import BlockMask, block_sparse_attention
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.methods import METHODS, method_class
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.sparge_tune import SpargeCalibrationProcessor

NO_FLOOR = {
    "radial": {"band_limit": 8, "block_size": 8, "max_density": 1.0, "adjacent_half_width": 0.25, "sink_frames": 0},
    **{name: {"min_tokens": 0, "block_size": 16} for name in ("sparge", "adaspa", "vmoba", "paro")},
}
WAN_720P = TokenLayout((21, 45, 80))


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")


def call_of(grid, text=0, valid=None, *, batch=2, heads=2, head_dim=16, dtype=torch.float32, scale=1.0):
    """A random attention call at the first of ten steps."""
    layout = TokenLayout(grid, text, None if valid is None else torch.tensor(valid))
    query, key, value = (torch.randn(batch, heads, layout.tokens, head_dim) for _ in range(3))
    denoiser = Denoiser("transformer", "WanTransformer3DModel", 1)
    step = Step(0, 10, "cond", grid)
    tensors = (x.to(dtype) for x in (query * scale, key, value))
    return AttentionCall(*tensors, layout, step, 0, denoiser, {}, {})


def sample_of(call, n):
    layout, valid = call.layout, call.layout.text_valid
    layout = dataclasses.replace(layout, text_valid=None if valid is None else valid[n : n + 1])
    tensors = {name: getattr(call, name)[n : n + 1] for name in ("query", "key", "value")}
    return dataclasses.replace(call, **tensors, layout=layout, cache={}, state={})


def planned(processor, call):
    """The plan of the second step of a run; AdaSpa needs the first to search."""
    processor.check(call.layout)
    call.state.clear()
    for index in range(2):
        plan = processor.plan(dataclasses.replace(call, step=dataclasses.replace(call.step, index=index)))
    return plan


def attend(plan, call):
    return block_sparse_attention(
        call.query, call.key, call.value, plan.mask, token_order=plan.token_order, skip_threshold=plan.skip_threshold
    )


def seen_by(plan, call):
    """bool (batch, heads, tokens, tokens), in the order of the model: what a plan lets each query see."""
    seen = plan.mask.token_mask().expand(*call.query.shape[:2], -1, -1)
    if plan.token_order is None:
        return seen
    place = plan.token_order.long().argsort(-1)
    seen = seen.take_along_dim(place[None, :, :, None], 2)
    return seen.take_along_dim(place[None, :, None, :], 3)


def by_definition(plan, call):
    """Softmax in float64 over what the plan keeps; rows that see nothing are 0."""
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~seen_by(plan, call), -torch.inf)
    return scores.softmax(-1).nan_to_num() @ value


def dense_by_definition(call):
    valid = torch.tensor([call.layout.tokens]) if call.layout.key_valid is None else call.layout.key_valid
    scores = call.query.double() @ call.key.double().mT / call.query.shape[-1] ** 0.5
    scores.masked_fill_(torch.arange(scores.shape[-1]) >= valid.view(-1, 1, 1, 1), -torch.inf)
    return scores.softmax(-1) @ call.value.double()


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


# -- 1: only some sizes work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remainder", range(1, 16))
def test_any_number_of_tokens_works(method, methods, remainder):
    """Tokens are 1 to 15 more than whole blocks, and text makes it another remainder still."""
    width = next(width for width in range(27, 43) if 3 * width % 16 == remainder)
    for text, valid in ((0, None), (9, [9, 4])):
        call = call_of((3, 1, width), text, valid)
        plan = planned(methods.at(method, call), call)
        assert not seen_by(plan, call).all()
        assert_close(attend(plan, call), by_definition(plan, call))


def test_blocks_of_128_need_no_multiple_of_128(method, methods):
    """Two of the 127 remainders, others in every run of the tests."""
    for remainder in torch.randint(1, 128, (2,)).tolist():
        width = next(width for width in range(110, 238) if 5 * width % 128 == remainder)
        call = call_of((5, 1, width), batch=1)
        settings = {"partitions": ((2, 1, 60),)} if method == "vmoba" else {}  # small chunks are small blocks
        plan = planned(methods.at(method, call, block_size=128, **settings), call)
        assert plan.mask.query_bounds.diff().max() == (120 if method == "vmoba" else 128)
        assert_close(attend(plan, call), by_definition(plan, call))


@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 3, 11), (7, 1, 13)], ids=str)
@pytest.mark.parametrize("name", ["wan", "hunyuan", "mochi"])
def test_odd_heights_and_widths_are_exact_in_models(method, name, grid, methods, tiny_models, run):
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(1)
    inputs["hidden_states"] = torch.randn(1, 4, grid[0], 2 * grid[1], 2 * grid[2])
    expected = run(model, inputs)
    settings = methods.all_kept(method)
    if method == "paro":
        settings = {**settings, "calibration": methods.plan_of(model, inputs, 1.0)}
    attnproc.install(model, methods.on(method, name, **settings))
    for time in (500, 600) if name == "mochi" else (500, 400):
        out = run(model, {**inputs, "timestep": torch.tensor([time])})
        if time == 500:
            assert_close(out, expected)
    assert not attnproc.report(model).fallbacks


# -- 2: slower than the headline ---------------------------------------------------------------------------------------


def test_a_short_clip_runs_dense_by_default_and_says_so_once(method, wan, generate):
    """With what to do about it; the video is the stock one to the last bit."""
    pipe, inputs = wan
    expected = generate(pipe, inputs, steps=5)
    pipe.attn_processor = method_class(method)()
    with pytest.warns(AttnProcWarning) as caught:
        out = generate(pipe, inputs, steps=5)
    assert torch.equal(out, expected)
    (warning,) = [w for w in caught if issubclass(w.category, AttnProcWarning)]
    assert "tokens" in str(warning.message) and "use a" in str(warning.message)
    report = attnproc.report(pipe)
    assert report.density == 1.0 and sum(report.fallbacks.values()) > 0
    assert "tokens" in repr(report)


def test_the_estimate_tells_the_ceiling_before_the_run(method):
    processor = method_class(method)()
    estimate = attnproc.estimate("wan2.1-14b", height=720, width=1280, num_frames=81, processor=processor)
    assert 0.0 < estimate.density < 1.0
    assert 1.0 < estimate.ceiling <= 1.0 / (1.0 - estimate.attention_share * (1.0 - estimate.density)) + 1e-9
    assert f"{estimate.ceiling:.2f}x" in repr(estimate)


def test_the_estimate_says_where_nothing_can_be_gained(method):
    short = attnproc.estimate("wan2.1-14b", height=128, width=128, num_frames=9, processor=method_class(method)())
    assert short.ceiling == 1.0 and short.advice.startswith("run dense")


# -- 3: quality drops at defaults, no guidance -------------------------------------------------------------------------


def test_one_dial_from_quality_to_speed(method):
    high, balanced, fast = (
        method_class(method)(quality=quality).predicted_density(WAN_720P) for quality in ("high", "balanced", "fast")
    )
    assert 1.0 > high > balanced > fast > 0.0
    warm_up = [sum(method_class(method)(quality=q).dense_step_count(50)) for q in ("high", "balanced", "fast")]
    assert warm_up == sorted(warm_up, reverse=True)


def test_the_report_shows_the_density_that_was_computed(method, methods, wan, generate, monkeypatch):
    pipe, inputs = wan
    pipe.attn_processor = processor = methods.on(method, "wan")
    computed = {}
    plan = type(processor).plan

    def watched(self, call):
        made = plan(self, call)
        if isinstance(made, Plan):
            blocks = made.mask.to_blocks().double()  # every listed block is computed as a whole
            rows, columns = made.mask.query_bounds.diff().double(), made.mask.key_bounds.diff().double()
            share = torch.einsum("bhij,i,j->bh", blocks, rows, columns) / call.layout.tokens**2
            computed.setdefault(call.layer, []).append(float(share.mean()))
        return made

    monkeypatch.setattr(type(processor), "plan", watched)
    generate(pipe, inputs)
    for layer, site in enumerate(attnproc.report(pipe).sites):
        assert len(computed[layer]) == site.sparse_calls
        assert site.density_mean == pytest.approx(sum(computed[layer]) / len(computed[layer]), abs=1e-6)


def test_keeping_more_is_nearer_to_dense(method, methods):
    settings = {
        "radial": [{"decay_factor": 0.1}, {"decay_factor": 1.0, "adjacent_half_width": 0.7, "sink_frames": 1}],
        "vmoba": [{"density": 0.2}, {"density": 0.7}],
    }
    few, many = settings.get(method, [{"density": 0.3}, {"density": 0.8}])
    call = call_of((4, 8, 8))
    errors, densities = [], []
    for more in (few, many):
        plan = planned(methods.at(method, call, **more), call)
        errors.append((attend(plan, call).double() - dense_by_definition(call)).norm())
        densities.append(float(seen_by(plan, call).double().mean()))
    assert densities[0] < densities[1] < 1.0 and errors[1] < 0.9 * errors[0]


# -- 4: the last steps dense too ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_steps", [(1, 2), (0.2, 0.34), (2, 0), (0, 1)], ids=str)
def test_first_and_last_steps_stay_dense(method, methods, wan, generate, dense_steps):
    pipe, inputs = wan
    processor = methods.on(method, "wan", dense_steps=dense_steps)
    pipe.attn_processor = processor
    sparse_after = []

    def count(*args):
        sparse_after.append(sum(site.sparse_calls for site in attnproc.report(pipe).sites))
        return {}

    generate(pipe, inputs, steps=6, callback_on_step_end=count)
    sparse = [step for step, (before, after) in enumerate(pairwise([0, *sparse_after])) if after > before]
    first = {(1, 2): 1, (0.2, 0.34): 1, (2, 0): 2, (0, 1): 0}[dense_steps] + (method == "adaspa")
    last = {(1, 2): 2, (0.2, 0.34): 2, (2, 0): 0, (0, 1): 1}[dense_steps]
    assert sparse == list(range(first, 6 - last))
    assert processor.dense_step_count(6) == (first, last)


def test_chosen_layers_stay_dense(method, methods, wan, generate):
    pipe, inputs = wan
    pipe.attn_processor = methods.on(method, "wan", dense_layers=(1,))
    generate(pipe, inputs)
    first, second = attnproc.report(pipe).sites
    assert first.sparse_calls > 0 and (second.sparse_calls, second.dense_calls) == (0, 6)


# -- 5: tuning for hours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dense", "paro")])
def test_no_calibration_is_needed(method, wan, generate):
    """The defaults run sparse on a model nobody tuned anything for, once it is large enough."""
    pipe, inputs = wan
    processor = method_class(method)(**NO_FLOOR[method])
    pipe.attn_processor = processor
    generate(pipe, inputs, steps=5)
    report = attnproc.report(pipe)
    assert not report.fallbacks and sum(site.sparse_calls for site in report.sites) > 0


def test_the_one_method_that_needs_a_calibration_says_how_to_make_it_in_the_first_step(wan, generate):
    pipe, inputs = wan
    pipe.attn_processor = method_class("paro")(min_tokens=0, dense_steps=(3, 0))
    steps = []
    with pytest.raises(SettingsError, match="attnproc calibrate"):
        generate(pipe, inputs, steps=5, callback_on_step_end=lambda *args: steps.append(1) or {})
    assert not steps


@pytest.fixture
def tuned(methods, tiny_models, tmp_path, run):
    """Processors with a calibration of the tiny Wan model, and a warm-up of three steps."""

    def make(method):
        if method == "paro":
            return methods.on("paro", "wan", dense_steps=(3, 0))
        tiny = tiny_models["wan"]
        model, inputs = tiny.model(), tiny.inputs(1)
        tuning = SpargeCalibrationProcessor(block_size=16)
        for _ in tuning.rounds:
            attnproc.install(model, tuning, scheduler=(scheduler := diffusers.FlowMatchEulerDiscreteScheduler()))
            scheduler.set_timesteps(2)
            for time in scheduler.timesteps:
                run(model, {**inputs, "timestep": time[None]})
            tuning.end_prompt()
            tuning.end_round()
        tuning.finish().save(tmp_path / "sparge.safetensors")
        settings = {"block_size": 16, "min_tokens": 0, "dense_steps": (3, 0), "dense_layers": 0}
        return method_class("sparge")(calibration=str(tmp_path / "sparge.safetensors"), **settings)

    return make


@pytest.mark.parametrize("method", ["paro", "sparge"])
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"num_layers": 3}, "layers 2, not 3"),
        ({"num_attention_heads": 4}, "heads 2, not 4"),
        ({"attention_head_dim": 16}, "head_dim 12, not 16"),
    ],
    ids=str,
)
def test_a_calibration_of_another_model_is_refused_in_the_first_step(
    method, change, difference, tuned, wan, tiny_models, generate
):
    """Not when the dense steps of the warm-up, which may take minutes, are over."""
    pipe, inputs = wan
    pipe.transformer = tiny_models["wan"].model(**change)
    pipe.attn_processor = tuned(method)
    steps = []
    with pytest.raises(SettingsError, match=difference):
        generate(pipe, inputs, steps=5, callback_on_step_end=lambda *args: steps.append(1) or {})
    assert not steps


def test_a_calibration_or_another_rule_takes_the_place_of_that_of_a_preset(tuned):
    """As on the command line, where the model that ships with the package has a preset of its own."""
    sparge, path = method_class("sparge"), tuned("sparge").calibration
    made = sparge.from_preset("shapes-video", calibration=path)
    assert (made.calibration, made.density, made.block_size) == (path, None, 16)
    by_share = sparge.from_preset("shapes-video", cdf_threshold=0.9)
    assert (by_share.cdf_threshold, by_share.density, by_share.min_tokens) == (0.9, None, 0)
    assert sparge.from_preset("paper", density=0.3).density == 0.3
    assert sparge.from_preset("shapes-video", block_size=32).density == 0.5
    with pytest.raises(SettingsError, match="came together"):
        sparge.from_preset("shapes-video", calibration=path, density=0.3)


def test_a_calibration_holds_bits_not_maps(methods, tiny_models):
    """A bit for each pair of blocks, head and layer, and a header."""
    file = Path(methods.on("paro", "wan").calibration)
    blocks = math.ceil(105 / 16)
    layers = heads = 2
    masks = layers * heads * blocks * math.ceil(blocks / 8)
    tensors = Calibration.load(file).tensors
    stored = sum(tensors[name].nbytes for name in tensors)
    assert masks <= stored <= masks + 8 * layers * heads


# -- 9: silent fallbacks -----------------------------------------------------------------------------------------------


@pytest.fixture
def masked_model(tiny_models):
    """A model that passes an attention mask no block mask can express, and what it says then."""
    tiny = tiny_models["skyreels"]
    model = tiny.model()
    model._set_ar_attention(3)
    return model, tiny.inputs(1)


def test_every_fallback_is_warned_of_once_and_counted(method, methods, masked_model, run):
    model, inputs = masked_model
    expected = run(model, inputs)
    attnproc.install(model, methods.on(method, "skyreels"))
    with pytest.warns(AttnProcWarning, match="mask that is not text padding") as caught:
        for time in (500, 400):
            out = run(model, {**inputs, "timestep": torch.tensor([time])})
            assert time != 500 or torch.equal(out, expected)
    assert len([w for w in caught if issubclass(w.category, AttnProcWarning)]) == 1
    assert attnproc.report(model).fallbacks == {"the model passes an attention mask that is not text padding": 4}
    assert [set(site.fallbacks.values()) for site in attnproc.report(model).sites] == [{2}, {2}]


def test_strict_forbids_fallbacks(method, methods, masked_model, run):
    model, inputs = masked_model
    attnproc.install(model, methods.on(method, "skyreels", strict=True))
    with pytest.raises(UnsupportedError, match="strict=True"):
        run(model, inputs)


def test_strict_forbids_clips_that_are_too_short(method, wan, generate):
    pipe, inputs = wan
    pipe.attn_processor = method_class(method)(strict=True)
    with pytest.raises(UnsupportedError, match=r"tokens.*strict=True"):
        generate(pipe, inputs, steps=5)


def test_what_has_no_backward_pass_is_told_not_wrong(method, methods, tiny_models):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, methods.on(method, "wan", quantization="int8"))
    with pytest.warns(AttnProcWarning, match="gradients are on and quantization='int8' has no backward pass"):
        model(**inputs)


def gradients_of(model, inputs):
    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_attention_that_ran(method, methods, tiny_models, run):
    """Every parameter has one; with nothing dropped they are those of dense attention."""
    tiny = tiny_models["hunyuan"]
    model, inputs = tiny.model(), tiny.inputs(2)
    expected = gradients_of(model, inputs)
    for settings in (methods.all_kept(method), {}):
        attnproc.install(model, methods.on(method, "hunyuan", **settings))
        run(model, {**inputs, "timestep": torch.full_like(inputs["timestep"], 900)})  # AdaSpa searches here
        found = gradients_of(model, inputs)
        assert found.keys() == expected.keys() and not attnproc.report(model).fallbacks
        if settings:
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
    assert all(site.sparse_calls > 0 for site in attnproc.report(model).sites)
    assert all(x.isfinite().all() for x in found.values())
    assert any((found[name] - expected[name]).abs().max() > 1e-6 for name in expected)


# -- 10: black, noisy or NaN frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2000.0], ids=["usual", "huge"])
def test_scores_of_any_size_give_finite_values_near_the_definition(method, methods, dtype, scale):
    call = call_of((3, 5, 7), 9, [9, 0], dtype=dtype, scale=scale)
    plan = planned(methods.at(method, call), call)
    assert isinstance(plan, Plan)
    out = attend(plan, call)
    assert out.dtype == dtype and out.isfinite().all()
    expected = by_definition(plan, call)
    error = (out.double() - expected).norm() / expected.norm()
    # Where scores are huge one key wins, and rounding of the two products may decide which.
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] * (10 if scale > 1 else 1)


def test_nan_in_one_sample_stays_there(method, methods):
    clean = call_of((3, 5, 7), 9, [9, 4])
    processor = methods.at(method, clean)
    expected = attend(planned(processor, clean), clean)
    broken = dataclasses.replace(clean, query=clean.query.clone(), key=clean.key.clone(), cache={}, state={})
    broken.query[1, 0, 20] = broken.key[1, 0, 50] = math.nan
    plan = planned(processor, broken)
    if isinstance(plan, Dense):
        assert "NaN" in plan.reason, "told, and dense attention keeps samples apart"
        return
    torch.testing.assert_close(attend(plan, broken)[0], expected[0], atol=1e-6, rtol=1e-6)


# -- 11: works for text-to-video only ----------------------------------------------------------------------------------


def test_a_model_nobody_knows_runs_dense_and_says_why(method, methods, run):
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 7, 24),
        "timestep": torch.tensor([500]),
        "attention_mask": torch.ones(1, 2, 8, 8),
    }
    expected = run(model, inputs)
    attnproc.install(model, methods.make(method))
    with pytest.warns(AttnProcWarning, match="runs dense attention: the model calls attention with a mask"):
        assert torch.equal(run(model, inputs), expected)
    attnproc.install(model, methods.make(method, strict=True))
    with pytest.raises(UnsupportedError, match="strict=True"):
        run(model, inputs)


# -- 12: several GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["radial", "sparge", "adaspa", "vmoba"])
def test_the_heads_of_one_rank_are_planned_as_among_all(method, methods):
    """Ulysses gives each rank whole sequences of some heads."""
    call = call_of((3, 5, 7), heads=4)
    settings = {"head_adaptive": False} if method == "adaspa" else {}
    processor = methods.at(method, call, **settings)
    whole = attend(planned(processor, call), call)
    for heads in (slice(0, 2), slice(2, 4)):
        tensors = {name: getattr(call, name)[:, heads] for name in ("query", "key", "value")}
        part = dataclasses.replace(call, **tensors, cache={}, state={})
        assert_close(attend(planned(processor, part), part), whole[:, heads])


def test_a_calibration_for_all_heads_is_refused_on_a_rank_that_has_some(methods):
    """Which of them it has is not known, so it would get the plans of others."""
    call = call_of((3, 5, 7), heads=4)
    processor = methods.at("paro", call)
    tensors = {name: getattr(call, name)[:, :2] for name in ("query", "key", "value")}
    with pytest.raises(SettingsError, match="heads 4, not 2"):
        planned(processor, dataclasses.replace(call, **tensors, cache={}, state={}))


# -- 13: endless recompilation -----------------------------------------------------------------------------------------


def test_compiled_blocks_are_one_graph_for_all_layers_and_steps(method, methods, tiny_models, run):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    attnproc.install(model, methods.on(method, "wan", dense_steps=(1, 0)), scheduler=scheduler)
    calls = [{**inputs, "timestep": t[None].to(inputs["timestep"].dtype)} for t in scheduler.timesteps]
    expected = [run(model, call) for call in calls]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    out = [run(model, call) for call in calls]
    torch._dynamo.reset()
    for ours, plain in zip(out, expected, strict=True):
        assert_close(ours, plain)
    assert len([g for g in counter.graphs if any("attnproc" in str(n.target) for n in g.graph.nodes)]) == 1
    assert all(site.sparse_calls >= 2 for site in attnproc.report(model).sites)


# -- 14: out of memory -------------------------------------------------------------------------------------------------


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


def test_no_map_of_tokens_by_tokens_is_ever_made(method, methods):
    """Neither to plan nor to attend, and nowhere near one of bytes."""
    call = call_of((8, 16, 32), batch=1, heads=1, head_dim=8)
    tokens = call.layout.tokens
    settings = {"partitions": ("2d",)} if method == "vmoba" else {}
    processor = methods.at(method, call, block_size=64, **settings)
    with LargestTensor() as largest:
        plan = planned(processor, call)
        attend(plan, call)
    assert 0 < largest.bytes < tokens**2 / 4


def test_what_is_remembered_grows_with_blocks_not_tokens_squared(method, methods):
    call = call_of((4, 16, 16), batch=1)
    planned(methods.at(method, call, block_size=64), call)
    assert sum(x.nbytes for x in _tensors((call.cache, call.state))) < 64 * call.layout.tokens


def _tensors(value, seen=None):
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(vars(value), seen)


# -- 15: LoRA, few-step models, offloading -----------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["high", "balanced", "fast"])
def test_warm_up_of_the_defaults_scales_from_50_steps_to_4(method, quality):
    processor = method_class(method)(quality=quality)
    counts = {total: sum(processor.dense_step_count(total)) for total in (4, 8, 20, 50)}
    assert all(count < total for total, count in counts.items()), "something is left to gain"
    assert counts[4] <= counts[8] <= counts[20] <= counts[50]
    assert (counts[4] >= 1) == (counts[50] >= 1), "a warm-up never rounds away"


@pytest.mark.parametrize("preset", [(m, p) for m in METHODS for p in method_class(m).presets()], ids="-".join)
def test_presets_made_for_many_steps_fit_few_or_say_so(preset):
    """Counts tuned for 50 steps are not silently all there is of a run of 4."""
    method, name = preset
    processor = method_class(method).from_preset(name)
    try:
        dense = sum(processor.dense_step_count(4))
    except SettingsError as error:
        assert "the run has 4" in str(error) and "fraction" in str(error)
    else:
        assert dense < 4 or method == "adaspa"  # which warns as the run starts


def test_a_schedule_with_no_sparse_step_is_told(methods, wan, generate):
    pipe, inputs = wan
    pipe.attn_processor = methods.on("adaspa", "wan", search_steps=(10, 30))
    with pytest.warns(AttnProcWarning, match=r"search_steps=\(10, 30\)"):
        generate(pipe, inputs, steps=4)


def test_lora_weights_come_and_go_under_a_method(method, methods, tiny_models, run):
    peft = pytest.importorskip("peft")
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)

    def outputs():
        return torch.stack([run(model, {**inputs, "timestep": torch.tensor([time])}) for time in (900, 500)])

    attnproc.install(model, methods.on(method, "wan"))
    without = outputs()
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapted = outputs()
    assert adapted.isfinite().all() and (adapted - without).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(outputs(), without, atol=1e-5, rtol=1e-5)
    assert all(site.sparse_calls > 0 for site in attnproc.report(model).sites)


def test_sequential_offloading_changes_nothing(method, methods, tiny_models, run):
    from accelerate import cpu_offload

    tiny = tiny_models["hunyuan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, methods.on(method, "hunyuan"))

    def outputs():
        return torch.stack([run(model, {**inputs, "timestep": torch.tensor([time])}) for time in (900, 500)])

    expected = outputs()
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    assert torch.equal(outputs(), expected)
    assert all(site.sparse_calls > 0 for site in attnproc.report(model).sites)


def test_a_cache_that_skips_layers_and_a_method_go_together(method, methods, wan, generate):
    """Layers that are skipped miss steps, searches among them."""
    pipe, inputs = wan
    pipe.attn_processor = methods.on(method, "wan")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    first = generate(pipe, inputs, steps=5)
    report = attnproc.report(pipe)
    first_layer, second_layer = report.sites
    calls = [site.sparse_calls + site.dense_calls for site in report.sites]
    assert calls[1] < calls[0] == 10 and first_layer.sparse_calls > 0 and second_layer.method == method
    assert first.isfinite().all() and not report.fallbacks
    assert torch.equal(generate(pipe, inputs, steps=5), first)


# -- 16: a stable way to add one's own method --------------------------------------------------------------------------


@dataclass(kw_only=True)
class EvenSteps(AttnProcessor):
    """A user's own method: block-diagonal attention in even steps of the run."""

    name: ClassVar[str] = "even-steps"
    width: int = 1

    def plan(self, call):
        if call.step.index % 2:
            return Dense()
        layout, size = call.layout, self.block_size or 16
        blocks = -(-layout.tokens // size)
        near = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs() <= self.width
        near[:, layout.video_tokens // size :] |= bool(layout.text_tokens)
        mask = BlockMask.from_blocks(near, layout.tokens, layout.tokens, (size, size))
        return Plan(mask.with_key_valid(layout.key_valid))

    def predicted_density(self, layout):
        return 0.5


def test_a_method_of_ones_own_is_one_class(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    attnproc.install(model, EvenSteps())
    for time in (100, 500) if video_family.model_class.startswith("Mochi") else (500, 100):
        run(model, {**inputs, "timestep": torch.full_like(inputs["timestep"], time)})
    report = attnproc.report(model)
    assert all((site.sparse_calls, site.dense_calls) == (1, 1) for site in report.sites)
    assert not report.fallbacks and "even-steps" in repr(report)


def test_a_method_of_ones_own_has_all_that_ours_have(wan, generate, tmp_path):
    pipe, inputs = wan
    processor = EvenSteps(width=2, dense_steps=(1, 1), dense_layers=(1,))
    pipe.attn_processor = processor
    generate(pipe, inputs, steps=5)
    first, second = attnproc.report(pipe).sites
    assert (first.sparse_calls, second.sparse_calls) == (2, 0), "step 2 of 5, two branches"
    assert json.loads(json.dumps(attnproc.report(pipe).to_dict()))
    assert attnproc.estimate("wan2.1-14b", processor=processor).density == 0.5
    processor.save(tmp_path / "mine.json")
    assert EvenSteps.load(tmp_path / "mine.json") == processor
    with pytest.raises(SettingsError, match="even-steps"):
        method_class("radial").load(tmp_path / "mine.json")


# -- 18: other head dims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [1, 3, 40, 80, 96, 160, 256])
def test_any_head_dim_works(method, methods, head_dim):
    call = call_of((3, 5, 7), 9, [9, 4], head_dim=head_dim)
    plan = planned(methods.at(method, call), call)
    assert_close(attend(plan, call), by_definition(plan, call))


def test_warnings_and_errors_are_ours_alone():
    """All that can be caught is one base class; warnings have one of their own."""
    assert issubclass(SettingsError, attnproc.AttnProcError) and issubclass(UnsupportedError, attnproc.AttnProcError)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in METHODS:
            method_class(name)()
    assert not caught
