"""PAROAttention in models and pipelines: calibrated on each, then sparse under its plan."""

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field

import pytest
import torch

import attnproc
from attnproc.calibration import Calibration
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.kernels import block_sparse_attention
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense
from attnproc.sparse import paro
from attnproc.sparse.bits import unpack_blocks
from attnproc.sparse.paro import ORDERS, PAROAttnProcessor, axis_order
from attnproc.sparse.paro_calibration import PAROCalibrationProcessor, choose_blocks

ONE_SLOT = {"slot_policy": "uniform", "slots": 1}


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


@dataclass(kw_only=True)
class Watched(PAROAttnProcessor):
    """Notes every call and plan."""

    seen: list = field(default_factory=list, init=False, repr=False, compare=False)

    def plan(self, call):
        plan = super().plan(call)
        self.seen.append((call, plan))
        return plan


def calibrated(run_prompts, install, prompts=1, **settings):
    """Walks through both rounds; `run_prompts(n)` runs prompt n on what `install` set the processor on."""
    processor = PAROCalibrationProcessor(**{"block_size": 16, **settings})
    install(processor)
    while not processor.done:
        for prompt in range(processor.prompts, prompts):
            run_prompts(prompt)
            processor.end_prompt()
        processor.end_round()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnProcWarning)  # tiny grids: much is forced
        return processor.finish(about={"prompts": prompts})


@pytest.fixture
def model_plan(tmp_path, run):
    """model_plan(model, inputs, **settings): the path of a calibration of a bare model."""

    def make(model, inputs, **settings):
        made = calibrated(
            lambda prompt: run(model, inputs), lambda p: attnproc.install(model, p), **{**ONE_SLOT, **settings}
        )
        attnproc.uninstall(model)
        made.save(tmp_path / "plan.safetensors")
        return str(tmp_path / "plan.safetensors")

    return make


@pytest.fixture
def pipeline_plan(tmp_path, generate):
    """pipeline_plan(pipe, inputs, **settings): the path of a calibration of a pipeline, 4 steps."""

    def make(pipe, inputs, steps=4, **settings):
        def install(processor):
            pipe.attn_processor = processor

        made = calibrated(lambda prompt: generate(pipe, inputs, steps=steps), install, **{"slots": 2, **settings})
        made.save(tmp_path / "plan.safetensors")
        return str(tmp_path / "plan.safetensors")

    return make


# -- models of every family --------------------------------------------------------------------------------------------


def test_keeping_everything_is_dense(video_family, run, model_plan):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = run(model, inputs)
    path = model_plan(model, inputs, density=1.0)
    attnproc.install(model, PAROAttnProcessor(calibration=path, min_tokens=0))
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert all(site.sparse_calls == 1 and site.dense_calls == 0 for site in attnproc.report(model).sites)


def test_a_plan_is_softmax_over_the_blocks_of_the_permuted_tokens(video_family, run, model_plan):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = run(model, inputs)
    path = model_plan(model, inputs, density=0.4)
    processor = Watched(calibration=path, min_tokens=0)
    attnproc.install(model, processor)
    out = run(model, inputs)
    assert out.isfinite().all() and (out - expected).abs().max() > 1e-3, "the mask must matter"
    file = Calibration.load(path)
    (name,) = file.header["components"]
    facts = file.header["components"][name]
    assert len(processor.seen) == video_family.sites
    for call, plan in processor.seen:
        layout = call.layout
        blocks = unpack_blocks(file.tensors[f"{name}.mask.0.{call.layer}"], -(-layout.tokens // 16))
        seen = torch.zeros(len(blocks), layout.tokens, layout.tokens, dtype=torch.bool)
        for head, order in enumerate(facts["order"][call.layer]):
            place = torch.arange(layout.tokens)
            place[axis_order(layout.grid, order)] = torch.arange(layout.video_tokens)
            seen[head] = blocks[head][place // 16][:, place // 16]
        assert seen[:, layout.video_tokens :].all() and seen[:, :, layout.video_tokens :].all(), "text is never dropped"
        valid = torch.tensor([layout.tokens]) if layout.key_valid is None else layout.key_valid
        visible = seen & (torch.arange(layout.tokens) < valid.view(-1, 1, 1, 1))
        scores = call.query.double() @ call.key.double().mT / call.query.shape[-1] ** 0.5
        softmax = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ call.value.double()
        found = block_sparse_attention(call.query, call.key, call.value, plan.mask, token_order=plan.token_order)
        torch.testing.assert_close(found.double(), softmax, atol=1e-5, rtol=1e-5)
        plan.mask.validate()
        density = seen.double().mean().item()
        assert facts["density"][0][call.layer] == pytest.approx(density, abs=1e-12)


def test_a_batch_is_its_samples(video_family, run, model_plan):
    model, inputs = video_family.model(), video_family.inputs(2)
    path = model_plan(model, inputs, density=0.4)
    attnproc.install(model, PAROAttnProcessor(calibration=path, min_tokens=0))
    both = run(model, inputs)
    for sample in range(2):
        one = {
            name: value[sample : sample + 1]
            if isinstance(value, torch.Tensor) and value.ndim and name != "image_rotary_emb"
            else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(run(model, one), both[sample : sample + 1], atol=1e-5, rtol=1e-5)


def test_what_padding_holds_changes_no_calibration(tiny_models, run, model_plan):
    tiny = tiny_models["hunyuan"]
    model, inputs = tiny.model(), tiny.inputs(2)
    first = Calibration.load(model_plan(model, inputs, density=0.4))
    tensors, header = {name: first.tensors[name] for name in first.tensors}, first.header
    mask = inputs["encoder_attention_mask"].bool()
    text = inputs["encoder_hidden_states"].clone()
    text[~mask] = 5 * torch.randn_like(text[~mask])
    second = Calibration.load(model_plan(model, {**inputs, "encoder_hidden_states": text}, density=0.4))
    assert second.header["components"] == header["components"]
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("quantization", ["int8", "int8+int8"])
def test_quantization_stays_near(tiny_models, run, model_plan, quantization):
    tiny = tiny_models["cog"]
    model, inputs = tiny.model(), tiny.inputs(2)
    path = model_plan(model, inputs, density=0.5)
    attnproc.install(model, PAROAttnProcessor(calibration=path, min_tokens=0))
    expected = run(model, inputs)
    attnproc.install(model, PAROAttnProcessor(calibration=path, min_tokens=0, quantization=quantization))
    out = run(model, inputs)
    assert 0.0 < (out - expected).norm() < 0.05 * expected.norm()


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan-true-cfg", "cog", "mochi"])
def test_a_calibrated_pipeline_runs_sparse_in_every_step(name, tiny_pipelines, generate, pipeline_plan):
    pipe, inputs = tiny_pipelines[name]()
    dense = generate(pipe, inputs, steps=4)
    path = pipeline_plan(pipe, inputs, density=0.5)
    pipe.attn_processor = PAROAttnProcessor(calibration=path, min_tokens=0)
    first = generate(pipe, inputs, steps=4)
    report = attnproc.report(pipe)
    assert not report.fallbacks and all(site.dense_calls == 0 for site in report.sites)
    assert first.isfinite().all() and not torch.equal(first, dense)
    assert torch.equal(generate(pipe, inputs, steps=4), first)
    assert generate(pipe, inputs, steps=7).isfinite().all(), "other numbers of steps use the same slots"
    pipe.attn_processor = PAROAttnProcessor(calibration=pipeline_plan(pipe, inputs, density=1.0), min_tokens=0)
    torch.testing.assert_close(generate(pipe, inputs, steps=4), dense, atol=1e-4, rtol=1e-4)


def test_each_expert_has_its_own_part_of_the_file(tiny_pipelines, generate, pipeline_plan):
    pipe, inputs = tiny_pipelines["wan"](two_experts=True)
    path = pipeline_plan(pipe, inputs, steps=6, density=0.5, slots=3)
    components = Calibration.load(path).header["components"]
    assert set(components) == {"transformer", "transformer_2"}
    # The first expert has the noisy steps only, so the slots of the later ones are its last.
    assert components["transformer"]["slots"][0] == 0
    assert components["transformer_2"]["slots"][-1] == len(components["transformer_2"]["density"]) - 1
    pipe.attn_processor = processor = Watched(calibration=path, min_tokens=0)
    assert generate(pipe, inputs, steps=6).isfinite().all()
    file = Calibration.load(path)
    for call, plan in processor.seen:
        name = call.denoiser.name
        slot = components[name]["slots"][paro.slot_of(call.step.index, 6, "half_shared", 3)]
        blocks = unpack_blocks(file.tensors[f"{name}.mask.{slot}.{call.layer}"], plan.mask.grid[1])
        assert torch.equal(plan.mask.to_blocks()[0], blocks), "each call has the mask of its own layer and slot"


def test_two_branches_and_all_steps_are_averaged(wan, generate):
    """The mass of a slot is the mean over prompts, steps of the slot and branches."""
    pipe, inputs = wan
    calls = []

    @dataclass(kw_only=True)
    class Noting(PAROCalibrationProcessor):
        def observe(self, component, call):
            super().observe(component, call)
            calls.append((self.round, call))

    processor = Noting(block_size=16, slots=2, density=0.4)
    pipe.attn_processor = processor
    for _ in processor.rounds:
        for prompt in range(2):
            generate(pipe, {**inputs, "guidance_scale": 3.0 + prompt}, steps=4)
            processor.end_prompt()
        processor.end_round()
    made = processor.finish()
    facts = made.header["components"]["transformer"]
    for slot, steps in ((0, [0]), (1, [1]), (2, [2, 3])):
        for layer in range(2):
            samples = [
                call for round_, call in calls if round_ == "masks" and call.layer == layer and call.step.index in steps
            ]
            assert len(samples) == 2 * 2 * len(steps)
            mass = torch.zeros(2, 7, 7, dtype=torch.float64)
            for call in samples:
                weights = (call.query.double() @ call.key.double().mT / call.query.shape[-1] ** 0.5).softmax(-1)[0]
                for head, name in enumerate(facts["order"][layer]):
                    order = axis_order(call.layout.grid, name)
                    turned = torch.nn.functional.pad(weights[head][order][:, order], (0, 7, 0, 7))
                    rows = torch.tensor([16] * 6 + [9])
                    mass[head] += turned.view(7, 16, 7, 16).sum((1, 3)) / rows[:, None] / len(samples)
            kept = unpack_blocks(made.tensors[f"transformer.mask.{slot}.{layer}"], 7)
            # Masses of random models are so alike that rounding may exchange two of them at the threshold.
            expected = choose_blocks(mass, 0.4)
            assert (kept != expected).sum() <= 2
            assert abs(mass[kept].sum() - mass[expected].sum()) < 1e-4


def test_the_order_is_that_of_the_mean_over_samples(tiny_models, run):
    tiny = tiny_models["wan"]
    model = tiny.model()
    processor = PAROCalibrationProcessor(block_size=16, density=0.2, **ONE_SLOT)
    attnproc.install(model, processor)
    for _ in range(3):
        run(model, tiny.inputs(2))
        processor.end_prompt()
    sums = processor.accumulator.sums
    assert sums["model.samples.0"] == 6 and sums["model.orders.1"].shape == (2, len(ORDERS), 3)
    expected = [processor.pick(*(sums[f"model.orders.{n}"] / 6).unbind(-1)) for n in range(2)]
    processor.end_round()
    assert torch.equal(processor.accumulator.sums["model.order"].long(), torch.stack(expected))


def test_orders_are_compared_on_the_map_of_the_video_alone():
    processor = PAROCalibrationProcessor(block_size=16, density=0.5, eps=2e-4, **ONE_SLOT)
    call = call_of(batch=2, valid=[8, 3])
    call.query[:] *= 3
    processor.plan(call)
    query, key = (x[:, :, :105].double() for x in (call.query, call.key))
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    eps, rows = 2e-4 * 17550 / 105, torch.tensor([16] * 6 + [9])
    entries = rows[:, None] * rows
    for n, name in enumerate(ORDERS):
        order = axis_order(GRID, name)
        padded = torch.nn.functional.pad(weights[:, :, order][..., order], (0, 7, 0, 7), value=torch.nan)
        tiles = padded.view(2, HEADS, 7, 16, 7, 16)
        total = tiles.nansum((3, 5))
        sparse = (tiles < eps).sum((3, 5)) / entries >= 0.9
        incoherence = tiles.nan_to_num(0.0).amax((3, 5)) * entries / total
        mass = total / rows[:, None]
        kept = torch.stack([mass_ * choose_blocks(mass_, 0.5, scope="head") for mass_ in mass])
        expected = [sparse.double().mean((2, 3)), incoherence.mean((2, 3)), kept.sum(3).mean(2)]
        found = processor.accumulator.sums["transformer.orders.0"][:, n]
        # A weight at eps may fall to either side, and with it a tile: one of 49 in one of two samples.
        torch.testing.assert_close(found[:, 0], expected[0].sum(0), atol=1.1 / 49, rtol=0)
        torch.testing.assert_close(found[:, 1:], torch.stack(expected[1:], -1).sum(0), atol=1e-4, rtol=1e-4)


def test_a_batch_counts_as_its_samples():
    batch = [call_of(layer=layer, batch=2, valid=[8, 3], layers=2) for layer in range(2)]

    def sample(call, n):
        layout = TokenLayout(call.layout.grid, 8, call.layout.text_valid[n : n + 1])
        tensors = {name: getattr(call, name)[n : n + 1] for name in ("query", "key", "value")}
        return dataclasses.replace(call, **tensors, layout=layout)

    together, apart = (PAROCalibrationProcessor(block_size=16, density=0.5, **ONE_SLOT) for _ in range(2))
    for _ in together.rounds:
        for processor, calls in ((together, batch), (apart, [sample(call, n) for call in batch for n in range(2)])):
            for call in calls:
                processor.plan(call)
        sums = together.accumulator.sums
        assert any(name.endswith(".samples.1") or name.endswith(".samples.0.1") for name in sums)
        for name, value in sums.items():
            torch.testing.assert_close(value, apart.accumulator.sums[name], atol=1e-5, rtol=1e-5)
        for processor in (together, apart):
            processor.end_prompt()
            processor.end_round()


def test_an_interrupted_calibration_goes_on_to_the_same_file(wan, generate, tmp_path):
    pipe, inputs = wan
    settings = {"block_size": 16, "slots": 2, "density": 0.5}

    def prompt(n):
        generate(pipe, {**inputs, "guidance_scale": 3.0 + n}, steps=2)

    whole = calibrated(prompt, lambda p: setattr(pipe, "attn_processor", p), prompts=2, **settings)
    partial = tmp_path / "partial.safetensors"
    attempts = 0
    while True:  # each attempt does one prompt, and is cut off in the middle of the next
        processor = PAROCalibrationProcessor(**settings)
        if partial.exists():
            processor.restore(Calibration.load(partial))
        while not processor.done and processor.prompts == 2:
            processor.end_round()
        if processor.done:
            break
        pipe.attn_processor = processor
        prompt(processor.prompts)
        processor.end_prompt()
        processor.state().save(partial)
        prompt(processor.prompts)  # what was seen of it is lost
        attempts += 1
    assert attempts == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnProcWarning)
        resumed = processor.finish(about={"prompts": 2})
    assert resumed.header == whole.header
    assert set(resumed.tensors) == set(whole.tensors)
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


# -- the processor alone -----------------------------------------------------------------------------------------------

GRID, HEADS, LAYERS = (3, 5, 7), 2, 3


def call_of(index=0, total=10, layer=0, text=8, valid=None, cache=None, batch=1, grid=GRID, heads=HEADS, **denoiser):
    layout = TokenLayout(grid, text, None if valid is None else torch.tensor(valid))
    tensors = torch.randn(3, batch, heads, layout.tokens, 8)
    owner = Denoiser(**{"name": "transformer", "model": "WanTransformer3DModel", "layers": LAYERS, **denoiser})
    cache = {} if cache is None else cache
    return AttentionCall(*tensors, layout, Step(index, total, "cond", grid), layer, owner, cache, {})


@pytest.fixture
def made(tmp_path):
    """made(**settings): a calibration of random calls, and its path."""

    def make(text=8, **settings):
        def run_prompt(_):
            for index in range(10):
                for layer in range(LAYERS):
                    assert isinstance(processor.plan(call_of(index, layer=layer, text=text)), Dense)

        processor = PAROCalibrationProcessor(**{"block_size": 16, "density": 0.6, "slots": 2, **settings})
        for _ in processor.rounds:
            run_prompt(0)
            processor.end_prompt()
            processor.end_round()
        file = processor.finish(about={"model": "tiny"})
        path = tmp_path / "random.safetensors"
        file.save(path)
        return file, str(path)

    return make


def test_masks_of_other_layers_and_slots_give_other_outputs(made):
    _, path = made()
    processor = PAROAttnProcessor(calibration=path, min_tokens=0)
    cache, call = {}, call_of()
    outs = []
    for index in (0, 3, 9):
        for layer in range(LAYERS):
            plan = processor.plan(call_of(index, layer=layer, cache=cache))
            outs.append(
                block_sparse_attention(
                    call.query, call.key, call.value, plan.mask, token_order=plan.token_order, backend="oracle"
                )
            )
    for n, out in enumerate(outs):
        assert all((out - other).abs().max() > 1e-6 for other in outs[:n])


def test_masks_are_expanded_once_a_slot_and_freed_with_it(made, monkeypatch):
    _, path = made()
    processor, cache = PAROAttnProcessor(calibration=path, min_tokens=0), {}
    first = processor.plan(call_of(0, cache=cache))
    assert processor.plan(call_of(1, cache=cache, batch=2)) is first
    ragged = processor.plan(call_of(1, cache=cache, batch=2, valid=[8, 3]))
    assert processor.plan(call_of(1, cache=cache, batch=2, valid=[8, 3])) is ragged is not first
    assert ragged.mask.key_valid.tolist() == [113, 108]
    other = processor.plan(call_of(9, cache=cache))
    assert all(plan is not first for _, plan in cache[processor.name, "masks"][1].values())
    assert not torch.equal(other.mask.to_blocks(), first.mask.to_blocks())
    monkeypatch.setattr(paro, "CACHED_MASK_BYTES", 0)
    again = processor.plan(call_of(0, cache=cache))
    assert torch.equal(again.mask.to_blocks(), first.mask.to_blocks())
    assert not cache[processor.name, "masks"][1], "what is too large is not kept"


def test_the_file_says_what_it_was_made_with(made):
    file, path = made(density=0.7, slots=2)
    header = Calibration.load(path).header
    assert header == json.loads(json.dumps(file.header))
    assert header["about"] == {"model": "tiny"} and set(header["made_with"]) == {"torch", "diffusers"}
    assert (header["settings"]["density"], header["settings"]["block_size"]) == (0.7, 16)
    facts = header["components"]["transformer"]
    assert facts["eps"] == pytest.approx(1e-3 * 17550 / 105)
    assert len(facts["density"]) == 3 and all(len(layers) == LAYERS for layers in facts["density"])
    assert all(order in ORDERS for layer in facts["order"] for order in layer)
    layout = TokenLayout(GRID, 8)
    mean = PAROAttnProcessor(calibration=path, min_tokens=0).predicted_density(layout)
    assert mean == pytest.approx(sum(map(sum, facts["density"])) / 9)
    masks = [
        PAROAttnProcessor(calibration=path, min_tokens=0).plan(call_of(index, layer=layer)).mask.density
        for index in (0, 3, 9)
        for layer in range(LAYERS)
    ]
    assert mean == pytest.approx(sum(masks) / 9, abs=1e-12)


def test_text_alone_may_be_more_than_the_density_and_says_so(made):
    with pytest.warns(AttnProcWarning, match=r"0\.\d+ of the blocks where density=0\.1 was asked for"):
        made(density=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scope in ("layer", "head"):
            made(density=0.6, scope=scope)


def test_heads_that_look_at_text_only_are_found_and_may_be_dropped(tmp_path):
    """Head 1 gives the text all of its attention."""
    processor = PAROCalibrationProcessor(block_size=16, density=0.9, **ONE_SLOT)

    def call(layer):
        made = call_of(layer=layer, text=23, layers=2)
        made.key[:, 1, :105] -= 30 * made.query[:, 1].mean(1, keepdim=True)
        made.query[:, 1, :, 0], made.key[:, 1, :105, 0], made.key[:, 1, 105:, 0] = 20.0, -5.0, 5.0
        return made

    for _ in processor.rounds:
        for layer in range(2):
            processor.plan(call(layer))
        processor.end_prompt()
        processor.end_round()
    path = str(tmp_path / "plan.safetensors")
    processor.finish().save(path)
    assert Calibration.load(path).tensors["transformer.empty"].tolist() == [[0, 1], [0, 1]]
    ignored = PAROAttnProcessor(calibration=path, min_tokens=0).plan(call(0)).mask.to_blocks()[0]
    dropped = PAROAttnProcessor(calibration=path, min_tokens=0, drop_empty_heads=True).plan(call(0)).mask.to_blocks()[0]
    assert torch.equal(ignored[0], dropped[0]) and not torch.equal(ignored[1], dropped[1])
    assert torch.equal(dropped[1], paro.text_blocks(TokenLayout(GRID, 23), 16))
    assert dropped.any(-1).all(), "every row sees something"


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_without_a_calibration_it_says_how_to_make_one():
    processor = PAROAttnProcessor(min_tokens=0)
    with pytest.raises(SettingsError, match="attnproc calibrate"):
        processor.plan(call_of())
    with pytest.raises(SettingsError, match="attnproc calibrate"):
        processor.check_model(TokenLayout(GRID), Denoiser("transformer", "WanTransformer3DModel", 2), 2, 8)
    processor.check(TokenLayout(GRID))  # an estimate needs no file
    assert processor.predicted_density(TokenLayout(GRID)) == 0.3
    assert PAROAttnProcessor(min_tokens=0, density=0.42).predicted_density(TokenLayout(GRID)) == 0.42


def test_a_file_that_does_not_fit_names_every_difference(made):
    _, path = made()
    processor = PAROAttnProcessor(calibration=path, min_tokens=0, density=0.2, block_size=64)
    with pytest.raises(SettingsError) as error:
        processor.plan(call_of(grid=(3, 5, 8), text=9, heads=4, model="MochiTransformer3DModel", layers=5))
    text = str(error.value)
    for difference in (
        "latent grid (3, 5, 7), not (3, 5, 8)",
        "text tokens 8, not 9",
        "heads 2, not 4",
        "block_size 16, not 64",
        "density 0.6, not 0.2",
        "model WanTransformer3DModel, not MochiTransformer3DModel",
        "layers 3, not 5",
    ):
        assert difference in text
    with pytest.raises(SettingsError, match=r"latent grid \(3, 5, 7\), not \(4, 5, 7\)"):
        PAROAttnProcessor(calibration=path, min_tokens=0).check(TokenLayout((4, 5, 7), 8))
    with pytest.raises(SettingsError, match="component transformer, not transformer_2"):
        PAROAttnProcessor(calibration=path, min_tokens=0).plan(call_of(name="transformer_2"))


def test_a_pipeline_of_another_size_is_refused_as_its_run_starts(wan, generate, pipeline_plan):
    pipe, inputs = wan
    path = pipeline_plan(pipe, inputs, density=0.5)
    pipe.attn_processor = PAROAttnProcessor(calibration=path, min_tokens=0, dense_steps=(2, 0))
    with pytest.raises(SettingsError, match="latent grid"):
        generate(pipe, {**inputs, "height": 96}, steps=4)


def test_small_videos_run_dense_and_say_why(made):
    _, path = made()
    processor = PAROAttnProcessor(calibration=path)
    decision = processor.plan(call_of())
    assert isinstance(decision, Dense) and "105 video tokens" in decision.reason and "4096" in decision.reason
    assert processor.predicted_density(TokenLayout(GRID, 8)) == 1.0
    processor.check(TokenLayout((1, 2, 3)))
    assert isinstance(PAROAttnProcessor().plan(call_of()), Dense)


def test_a_partial_file_is_no_calibration(tmp_path):
    processor = PAROCalibrationProcessor(block_size=16, density=0.5, **ONE_SLOT)
    for layer in range(LAYERS):
        processor.plan(call_of(layer=layer))
    processor.end_prompt()
    path = str(tmp_path / "partial.safetensors")
    processor.state().save(path)
    with pytest.raises(SettingsError, match="finished False"):
        PAROAttnProcessor(calibration=path, min_tokens=0).plan(call_of())
    with pytest.raises(SettingsError, match="round 'orders'"):
        processor.finish()


def test_attention_that_is_not_a_number_makes_no_plan():
    processor = PAROCalibrationProcessor(block_size=16, density=0.5, **ONE_SLOT)
    for _ in processor.rounds:
        for layer in range(LAYERS):
            call = call_of(layer=layer)
            if layer == 2:
                call.key[:, 1, 40] = torch.nan
            processor.plan(call)
        processor.end_prompt()
        processor.end_round()
    with pytest.raises(UnsupportedError, match=r"layer 2 of transformer.*NaN"):
        processor.finish()


def test_layers_of_different_size_are_not_supported():
    processor = PAROCalibrationProcessor(block_size=16, density=0.5, **ONE_SLOT)
    processor.plan(call_of())
    with pytest.raises(UnsupportedError, match=r"layer 1 of transformer.*\(3, 5, 6\)"):
        processor.plan(call_of(layer=1, grid=(3, 5, 6)))


@pytest.mark.parametrize(
    "bad",
    [
        {"calibration": 3},
        {"density": 0},
        {"density": 1.5},
        {"density": math.nan},
        {"drop_empty_heads": 1},
        {"min_tokens": -1},
    ],
    ids=str,
)
def test_bad_settings_are_named(bad):
    with pytest.raises(SettingsError, match=next(iter(bad))):
        PAROAttnProcessor(**bad)


def test_settings_survive_json(tmp_path):
    for processor in (
        PAROAttnProcessor(calibration=tmp_path / "plan.safetensors", density=0.3, min_tokens=7, drop_empty_heads=True),
        PAROAttnProcessor(quality="high"),
    ):
        processor.save(tmp_path / "paro.json")
        assert PAROAttnProcessor.load(tmp_path / "paro.json") == processor == AttnProcessor.load(tmp_path / "paro.json")
    processor = PAROCalibrationProcessor(density=0.3, slots=8, query_blocks=None)
    assert PAROCalibrationProcessor.from_settings(json.loads(json.dumps(processor.to_dict()))["settings"]) == processor


@pytest.mark.parametrize("name", PAROAttnProcessor.presets())
def test_every_preset_can_be_made(name):
    assert set(PAROAttnProcessor.presets()[name]) == {"settings", "for", "source"}
    PAROAttnProcessor.from_preset(name)


def test_masks_of_one_padding_make_room_for_those_of_the_next(made):
    _, path = made()
    processor, cache = PAROAttnProcessor(calibration=path, min_tokens=0), {}
    for valid in range(1, 9):
        plan = processor.plan(call_of(0, cache=cache, valid=[valid]))
        assert plan.mask.key_valid.tolist() == [105 + valid]
    assert len(cache[processor.name, "masks"][1]) == 1


@pytest.mark.parametrize("change", [{"density": 0.9}, {"block_size": 8}])
def test_a_file_that_was_made_anew_is_read_anew(made, change):
    _, path = made()
    processor, cache = PAROAttnProcessor(calibration=path, min_tokens=0), {}
    before = processor.plan(call_of(0, cache=cache))
    made(**change)
    after, fresh = (processor.plan(call_of(0, cache=c)) for c in (cache, {}))
    assert torch.equal(after.mask.to_blocks(), fresh.mask.to_blocks())
    assert not torch.equal(after.mask.to_blocks(), before.mask.to_blocks())
