"""Runs: which step and branch every denoiser call is, when a run starts and ends, what is freed."""

import diffusers
import pytest
import torch

import attnproc
from attnproc.context import Constants, Loop, context_of

BOTH, ONE, BATCHED = ("cond", "uncond"), ("cond",), ("cond_uncond",)
TRACES = {
    "wan": BOTH,
    "hunyuan": ONE,
    "hunyuan-true-cfg": BOTH,
    "hunyuan15": BOTH,
    "cog": BATCHED,
    "mochi": BATCHED,
    "ltx": BATCHED,
    "sd": ("call0",),
    "sd3": ("call0",),
    "flux": ONE,
}


def denoiser(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def states(model):
    return context_of(model)._states


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_every_call_knows_its_step_and_branch(pipeline_name, tiny_pipelines, generate, recording):
    pipe, inputs = tiny_pipelines[pipeline_name]()
    expected = generate(pipe, inputs)
    pipe.attn_processor = processor = recording()
    for _ in range(2):
        processor.calls.clear()
        assert torch.equal(generate(pipe, inputs), expected)
        assert processor.trace == [(step, branch) for step in range(3) for branch in TRACES[pipeline_name]]
        assert {step.total for step in processor.calls} == {3}
        assert not states(denoiser(pipe)), "what methods remember is freed when a run ends"
    assert all(site.dense_calls == len(processor.calls) for site in attnproc.report(pipe).sites)


def test_runs_repeat_and_sizes_may_change(pipeline_name, tiny_pipelines, generate, random_mask):
    pipe, inputs = tiny_pipelines[pipeline_name]()
    pipe.attn_processor = random_mask(density=0.3, dense_steps=(1, 1))
    first = generate(pipe, inputs)
    smaller = {**inputs, "height": inputs["height"] * 3 // 4 // 32 * 32}
    if pipeline_name not in ("cog",):  # its tiny model is made for one size
        assert generate(pipe, smaller).shape != first.shape
    assert torch.equal(generate(pipe, inputs), first)
    report = attnproc.report(pipe)
    calls = len(TRACES[pipeline_name])
    assert all((site.dense_calls, site.sparse_calls) == (2 * calls, calls) for site in report.sites)


def test_what_is_kept_for_sizes_is_bounded_and_the_latest(tiny_models, run):
    model, inputs = tiny_models["wan"].model(), tiny_models["wan"].inputs(1)
    with attnproc.using(model, attnproc.RadialAttnProcessor(block_size=16, dense_steps=(0, 0), dense_layers=0)):
        run(model, inputs)
        cache = context_of(model).cache
        assert isinstance(cache, Constants) and 0 < len(cache) <= Constants.MOST
    kept = Constants()
    for number in range(3 * Constants.MOST):
        kept[number] = number
        kept["used"] = number
    assert len(kept) == Constants.MOST and kept["used"] == kept[number] == number and 0 not in kept


def test_warm_up_settings_choose_steps_and_layers(wan, generate, random_mask):
    pipe, inputs = wan
    pipe.attn_processor = random_mask(density=0.3, dense_steps=(0.4, 1), dense_layers=[1])
    generate(pipe, inputs, steps=5)
    first, second = attnproc.report(pipe).sites
    assert (first.dense_calls, first.sparse_calls) == (6, 4)
    assert (second.dense_calls, second.sparse_calls) == (10, 0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "model"])
@pytest.mark.parametrize("name", ["wan", "sd", "mochi"])
def test_after_an_error_state_is_freed_and_a_rerun_is_like_a_fresh_run(
    name, where, error, tiny_pipelines, generate, recording
):
    pipe, inputs = tiny_pipelines[name]()
    expected = generate(pipe, inputs, steps=4)
    pipe.attn_processor = processor = recording()
    generate(pipe, inputs, steps=4)
    complete = list(processor.calls)
    processor.calls.clear()

    def fail(*args):
        if len(processor.calls) > len(complete) // 2:
            assert states(denoiser(pipe)), "the run has remembered something"
            raise error("stop")
        return {}

    with pytest.raises(error, match="stop"):
        if where == "callback":
            generate(pipe, inputs, steps=4, callback_on_step_end=fail)
        else:
            handle = denoiser(pipe).register_forward_hook(lambda *args: fail() or None)
            try:
                generate(pipe, inputs, steps=4)
            finally:
                handle.remove()
    assert not states(denoiser(pipe))
    processor.calls.clear()
    assert torch.equal(generate(pipe, inputs, steps=4), expected)
    assert processor.calls == complete
    assert all(site.dense_calls == len(complete) for site in attnproc.report(pipe).sites)


def test_an_error_in_step_0_is_no_step_1(wan, generate, recording):
    pipe, inputs = wan
    pipe.attn_processor = processor = recording()

    def fail(pipe, step, timestep, kwargs):
        raise RuntimeError("stop")

    for _ in range(2):
        processor.calls.clear()
        with pytest.raises(RuntimeError):
            generate(pipe, inputs, callback_on_step_end=fail)
        assert processor.trace == [(0, "cond"), (0, "uncond")]


def test_a_loop_that_was_given_up_does_not_end_the_next(wan, generate, recording):
    pipe, inputs = wan
    pipe.attn_processor = processor = recording()
    bar = pipe.progress_bar(total=3)  # entered and never closed

    def collect(pipe, step, timestep, kwargs):
        bar.close()
        return {}

    generate(pipe, inputs, callback_on_step_end=collect)
    assert attnproc.report(pipe).sites[0].dense_calls == len(processor.calls) == 6


def test_two_experts_share_one_count_of_steps(tiny_pipelines, generate, recording, random_mask):
    pipe, inputs = tiny_pipelines["wan"](two_experts=True)
    expected = generate(pipe, inputs, steps=6)
    pipe.attn_processor = processor = recording()
    assert torch.equal(generate(pipe, inputs, steps=6), expected)
    assert processor.trace == [(step, branch) for step in range(6) for branch in BOTH]
    assert {step.total for step in processor.calls} == {6}
    second = context_of(pipe.transformer_2)
    assert second is not context_of(pipe.transformer) and second.step.index == 5
    # Dense first steps are those of the run, not of each expert.
    pipe.attn_processor = random_mask(dense_steps=2)
    generate(pipe, inputs, steps=6)
    calls = {site.denoiser: (site.dense_calls, site.sparse_calls) for site in attnproc.report(pipe).sites}
    assert calls["transformer"][0] == 4 and calls["transformer_2"][0] == 0
    assert sum(calls["transformer"]) + sum(calls["transformer_2"]) == 12


def test_image_to_image_counts_from_where_it_starts(tiny_pipelines, generate, recording):
    pipe, inputs = tiny_pipelines["sd"](diffusers.StableDiffusionImg2ImgPipeline)
    del inputs["height"], inputs["width"]
    pipe.vae = diffusers.AutoencoderKL(  # only to be there: the image is given as latents
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
    )
    pipe.attn_processor = processor = recording()
    for _ in range(2):
        processor.calls.clear()
        generate(pipe, inputs, steps=10, image=torch.zeros(1, 4, 16, 12), strength=0.5)
        assert processor.trace == [(step, "call0") for step in range(5)]
        assert {step.total for step in processor.calls} == {5}


def test_begin_index_of_a_scheduler_is_step_0(tiny_models, run, recording):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    attnproc.install(model, processor := recording(), scheduler=scheduler)
    for timestep in scheduler.timesteps[3:]:
        run(model, {**inputs, "timestep": timestep[None]})
    assert processor.trace == [(step, "call0") for step in range(5)]
    assert processor.calls[0].total == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_rounded_to_half_precision_find_their_step(tiny_models, run, recording, dtype):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(50)
    attnproc.install(model, processor := recording(), scheduler=scheduler)
    for timestep in scheduler.timesteps:
        run(model, {**inputs, "timestep": timestep[None].to(dtype)})
    indices = [step.index for step in processor.calls]
    assert len(indices) == 50 and max(abs(i - n) for n, i in enumerate(indices)) <= 1 and indices == sorted(indices)


# -- bare models -------------------------------------------------------------------------------------------------------


def test_a_bare_model_counts_by_its_timesteps(tiny_models, run, recording):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, processor := recording())
    for _ in range(2):
        processor.calls.clear()
        for timestep in (900, 900, 500, 500, 100, 100):
            run(model, {**inputs, "timestep": torch.tensor([timestep])})
        assert processor.trace == [(step, f"call{call}") for step in range(3) for call in range(2)]
    assert {step.total for step in processor.calls} == {None}


def test_timesteps_of_mochi_rise(tiny_models, run, recording):
    tiny = tiny_models["mochi"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, processor := recording())
    for _ in range(2):
        processor.calls.clear()
        for timestep in (0, 300, 800):
            run(model, {**inputs, "timestep": torch.tensor([timestep])})
        assert processor.trace == [(0, "call0"), (1, "call0"), (2, "call0")]


def test_fractions_of_a_run_need_its_length(tiny_models, run, random_mask):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, random_mask(dense_steps=(0.25, 1)))
    with pytest.raises(attnproc.SettingsError, match="scheduler=scheduler"):
        run(model, inputs)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    attnproc.install(model, random_mask(dense_steps=(0.25, 1)), scheduler=scheduler)
    for timestep in scheduler.timesteps:
        run(model, {**inputs, "timestep": timestep[None]})
    assert {(site.dense_calls, site.sparse_calls) for site in attnproc.report(model).sites} == {(2, 2)}


def test_per_token_timesteps_are_one_step(tiny_models, run, recording):
    """Wan 2.2 TI2V sends one timestep per token, 0 for tokens of the given first frame."""
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, processor := recording())
    for timestep in (900, 500):
        per_token = torch.full((1, 105), timestep)
        per_token[:, :35] = 0
        run(model, {**inputs, "timestep": per_token})
    assert processor.trace == [(0, "call0"), (1, "call0")]


def test_a_timestep_may_be_a_number(tiny_models, run, recording):
    tiny = tiny_models["unet"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, processor := recording())
    with torch.no_grad():
        model(inputs["sample"], 500, inputs["encoder_hidden_states"])
        model(inputs["sample"], 100.0, inputs["encoder_hidden_states"])
    assert processor.trace == [(0, "call0"), (1, "call0")]


def test_without_a_timestep_there_is_no_step(tiny_models, recording):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, recording())
    with pytest.raises(attnproc.UnsupportedError, match="without a timestep"):
        model(**{**inputs, "timestep": None})


def test_the_report_of_a_run_that_stopped_early_has_nothing_of_the_run_before(tiny_pipelines, generate, recording):
    pipe, inputs = tiny_pipelines["wan"](two_experts=True)
    pipe.attn_processor = recording()
    generate(pipe, inputs, steps=6)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, inputs, steps=6, callback_on_step_end=stop)
    calls = {(site.denoiser, site.dense_calls) for site in attnproc.report(pipe).sites}
    assert calls == {("transformer", 2), ("transformer_2", 0)}


def test_a_bare_model_after_a_pipeline_starts_a_run_of_its_own(wan, generate, recording, tiny_models, run):
    pipe, inputs = wan
    pipe.attn_processor = processor = recording()
    generate(pipe, inputs)
    processor.calls.clear()
    run(pipe.transformer, {**tiny_models["wan"].inputs(1), "timestep": torch.tensor([3])})
    assert processor.trace == [(0, "call0")]


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ],
)
def test_a_second_expert_that_starts_late_counts_from_the_start_of_the_loop(scheduler, tiny_models, run, recording):
    """As in Wan 2.2 image-to-video, which tells no step: each expert is called in its part of the schedule alone."""
    tiny = tiny_models["wan"]
    experts, traces = [tiny.model(), tiny.model()], [recording(), recording()]
    loop = Loop()
    for expert, trace in zip(experts, traces, strict=True):
        attnproc.install(expert, trace)
        context_of(expert).begin(loop, lambda: scheduler)
    scheduler.set_timesteps(8)
    sample = torch.zeros(1, 2)
    for number, t in enumerate(scheduler.timesteps):
        run(experts[number >= 3], {**tiny.inputs(1), "timestep": t.expand(1)})
        sample = scheduler.step(sample, t, sample, return_dict=False)[0]
    assert [step.index for step in traces[0].calls] == [0, 1, 2]
    assert [step.index for step in traces[1].calls] == [3, 4, 5, 6, 7]
    assert {step.total for trace in traces for step in trace.calls} == {8}


def test_in_a_pipeline_rounded_timesteps_that_fall_together_are_still_steps(tiny_models, run, recording):
    tiny = tiny_models["wan"]
    model = tiny.model()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=17.0)
    attnproc.install(model, processor := recording())
    context_of(model).begin(Loop(), lambda: scheduler)
    scheduler.set_timesteps(30)
    assert len({float(t.bfloat16()) for t in scheduler.timesteps}) < 30
    sample = torch.zeros(1, 2)
    for t in scheduler.timesteps:
        run(model, {**tiny.inputs(1), "timestep": t.bfloat16().expand(1)})
        sample = scheduler.step(sample, t, sample, return_dict=False)[0]
    assert [step.index for step in processor.calls] == list(range(30))


def test_in_a_pipeline_timesteps_of_the_models_own_scale_are_counted(tiny_models, run, recording):
    tiny = tiny_models["wan"]
    model = tiny.model()
    attnproc.install(model, processor := recording())
    context_of(model).begin(Loop(), lambda: None)
    for t in (0.1, 0.1, 0.4, 0.4, 0.9, 0.9):
        run(model, {**tiny.inputs(1), "timestep": torch.tensor([t])})
    assert processor.trace == [(step, f"call{call}") for step in range(3) for call in range(2)]


def test_a_backend_that_cannot_run_is_an_error_in_the_first_step(tiny_models, run):
    tiny = tiny_models["wan"]
    model = tiny.model()
    rule = {"block_size": 8, "band_limit": 1, "max_density": 1.0}
    attnproc.install(model, attnproc.RadialAttnProcessor(backend="triton", dense_steps=2, **rule))
    with pytest.raises(attnproc.SettingsError, match="triton"):
        run(model, {**tiny.inputs(1), "timestep": torch.tensor([900.0])})


def test_a_bar_that_is_switched_off_ends_its_loop_too(wan):
    pipe, _ = wan
    pipe.attn_processor = attnproc.DenseAttnProcessor()
    pipe.set_progress_bar_config(disable=True)
    context = context_of(pipe.transformer)
    seen = []
    for item in pipe.progress_bar([1, 2]):
        seen.append((item, context._loop is not None))
    assert seen == [(1, True), (2, True)] and context._loop is None


@pytest.mark.parametrize("method", ["vmoba", "sparge", "paro"])
def test_a_backend_that_cannot_run_the_plans_is_refused_at_once(method):
    from attnproc.methods import method_class

    for backend in ("flex", "fa4"):
        with pytest.raises(attnproc.SettingsError, match=f"backend='{backend}' cannot do .*token_order"):
            method_class(method)(backend=backend)


def test_values_that_are_not_finite_are_found_where_they_arise(tiny_models, run, random_mask):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, random_mask(density=0.5, check_finite=True))
    run(model, inputs)
    module = attnproc.context.context_of(model).sites[1].module
    with torch.no_grad():
        module.to_v.weight[0, 0] = torch.nan
    attnproc.install(model, random_mask(density=0.5))
    run(model, inputs)  # without the setting nothing is looked at
    attnproc.install(model, random_mask(density=0.5, check_finite=True))
    with pytest.raises(attnproc.AttnProcError, match=r"blocks\.1\.attn1 at step 0, .* not finite; its value had some"):
        run(model, inputs)


@pytest.mark.parametrize("method", ["radial", "sparge", "adaspa", "vmoba", "paro"])
def test_strict_says_at_the_first_step_that_a_video_is_too_small(method, tiny_models, run):
    """Not when the dense warm-up is over: that may be minutes later."""
    from attnproc.methods import method_class

    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    counts = {"search_steps": (2,)} if method == "adaspa" else {}  # a bare model does not tell the steps of a run
    processor = method_class(method)(strict=True, dense_steps=1, dense_layers=0, **counts)
    attnproc.install(model, processor)
    with pytest.raises(attnproc.UnsupportedError, match="tokens"):
        run(model, inputs)
