"""Tuning SpargeAttn: the search, how calls are joined, and files that SpargeAttnProcessor uses."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import attnproc
from attnproc.calibration import Calibration
from attnproc.errors import SettingsError, UnsupportedError
from attnproc.kernels import block_sparse_attention
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense
from attnproc.sparse import sparge_prediction, sparge_tune
from attnproc.sparse.sparge import SpargeAttnProcessor
from attnproc.sparse.sparge_tune import SpargeCalibrationProcessor, Tuned, join, smallest

LAYOUT = TokenLayout((4, 8, 8), 11, torch.tensor([11, 4]))
DENOISER = Denoiser("transformer", "WanTransformer3DModel", 2)
SMALL = {"block_size": 16, "similarity_thresholds": (-0.1,)}
USE = {"block_size": 16, "min_tokens": 0, "dense_layers": 0}


@pytest.fixture
def seed():
    value = int(torch.seed() % 2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def tokens_like(seed, layout=LAYOUT, heads=3, head_dim=8, sharpness=2.0):
    """Tokens that are alike where they are near, so that each attends to its neighbours; in head 0 the most.

    The corners of the video are orthogonal, whatever the seed: distant tokens are never alike by chance.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(2, heads, *shape, generator=generator)

    corners = head_dim**0.5 * torch.linalg.qr(randn(head_dim, 8)).Q
    corners = corners.reshape(2 * heads, head_dim, 2, 2, 2)
    smooth = F.interpolate(corners, layout.grid, mode="trilinear", align_corners=True)
    smooth = smooth.view(2, heads, head_dim, -1).transpose(-1, -2)
    smooth = torch.cat([smooth, 0.3 * randn(layout.text_tokens, head_dim)], dim=2)
    sharp = torch.linspace(sharpness, 0.7, heads).view(-1, 1, 1)
    query, key = (sharp * smooth + 0.05 * randn(layout.tokens, head_dim) for _ in range(2))
    return query, key, randn(layout.tokens, head_dim)


def call_of(tensors, layer=0, layout=LAYOUT, denoiser=DENOISER, step=5, total=10):
    return AttentionCall(*tensors, layout, Step(step, total, "cond", layout.grid), layer, denoiser, {}, {})


def calibrated(calls, **settings):
    processor = SpargeCalibrationProcessor(**{**SMALL, "steps": 10, **settings})
    for call in calls:
        assert isinstance(processor.plan(call), Dense)
    processor.end_prompt()
    processor.end_round()
    return processor.finish()


def relative_error(processor, call):
    """float32 (heads,): what the bounds are about, of a whole call."""
    plan = processor.plan(call)
    mask = torch.arange(call.layout.tokens) < call.layout.key_valid.view(-1, 1, 1, 1)
    dense = F.scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=mask)
    if isinstance(plan, Dense):
        return torch.zeros(dense.shape[1])
    out = block_sparse_attention(
        call.query,
        call.key,
        call.value,
        plan.mask,
        token_order=plan.token_order,
        skip_threshold=plan.skip_threshold,
    )
    padding = ~mask.transpose(-1, -2)
    out, dense = out.masked_fill(padding, 0.0), dense.masked_fill(padding, 0.0)
    return (out - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))


# -- the search --------------------------------------------------------------------------------------------------------


def test_halving_finds_the_smallest_value_that_passes_and_never_one_that_does_not():
    truth = torch.tensor([0.0, 0.3, 0.77, 0.9999, 2.0])
    asked = []

    def error(value):
        asked.append(value)
        return torch.where(value >= truth, 0.0, 1.0)

    found = smallest(error, 0.5, 1.0, 1e-3, torch.empty(5))
    assert len(asked) == 10
    assert found.tolist()[4] == 1.0, "nothing passed, the upper end stands"
    assert (found[:4] >= truth[:4]).all() and (found[:4] <= truth[:4] + 1e-3).all()


def test_an_error_that_is_not_a_number_does_not_pass():
    found = smallest(lambda value: torch.full_like(value, torch.nan), 0.5, 1.0, 1e-3, torch.empty(2))
    assert found.tolist() == [1.0, 1.0]


GRID = (-0.1, 0.0, 0.0625, 0.125, 0.1875)


def joined(density, cdf=0.5, skip=5.0, grid=GRID):
    values = [torch.as_tensor(x).expand(len(grid)).float()[:, None] for x in (density, cdf, skip)]
    return [float(x) for x in join(grid, Tuned(*values))]


def test_the_bin_that_keeps_least_wins_with_the_largest_of_its_thresholds():
    found = joined([0.6, 0.3, 0.4, 0.2, 0.6], cdf=[0.9, 0.8, 0.7, 0.6, 0.5], skip=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == pytest.approx([0.35, 0.8, 0.0625, 3.0])


def test_the_grid_below_zero_is_a_bin_of_its_own():
    assert joined([0.1, 0.3, 0.4, 0.2, 0.6])[2] == pytest.approx(-0.1)
    assert joined([0.3, 0.1], grid=(-0.1, 0.0))[2] == 0.0


def test_bins_are_compared_by_mean_not_by_sum():
    """A bin of one threshold that saves more than each of two others wins against both together."""
    assert joined([0.3, 0.4, 0.4, 0.5, 0.5])[2] == pytest.approx(-0.1)


def test_a_head_that_gains_little_is_dense():
    assert joined([0.95, 0.9, 0.99, 1.0, 1.0]) == [1.0, 1.0, 1.0, math.inf]
    assert joined([0.95, 0.88, 0.89, 1.0, 1.0])[0] == pytest.approx(0.885)


# -- tuned calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"attention_sink": True, "token_order": "row-major"}], ids=str)
@pytest.mark.parametrize("l1", [0.1, 0.2])
def test_tuned_calls_keep_the_bounds(seed, tmp_path, l1, options):
    calls = [call_of(tokens_like(seed + layer), layer) for layer in range(2)]
    calibration = calibrated(calls, l1=l1, pv_l1=1.5 * l1, **options)
    calibration.save(tmp_path / "tuned.safetensors")
    processor = SpargeAttnProcessor(calibration=tmp_path / "tuned.safetensors", **options, **USE)
    for call in calls:
        assert (relative_error(processor, call) <= 1.5 * l1 + 1e-5).all()
    assert (calibration.tensors["transformer.similarity_threshold"][:, 0] < 1.0).all(), "the sharpest head is sparse"
    kept = torch.stack([kept_share(processor.plan(call).mask) for call in calls])
    density = calibration.header["components"]["transformer"]["density"]
    assert density == pytest.approx(float(kept.mean()), abs=1e-5) and density < 0.97
    assert processor.predicted_density(LAYOUT) == density


def kept_share(mask):
    """float32 (heads,): kept blocks of those that hold a valid key."""
    blocks = mask.to_blocks()
    real = torch.arange(blocks.shape[-1]) * mask.block_size[1] < mask.key_valid.view(-1, 1, 1, 1)
    return (blocks & real).sum((0, 2, 3)) / real.expand(-1, 1, blocks.shape[2], -1).sum()


def test_a_looser_bound_keeps_less(seed):
    calls = [call_of(tokens_like(seed), layer) for layer in range(2)]
    tight, loose = (calibrated(calls, l1=l1, pv_l1=1.5 * l1) for l1 in (0.05, 0.2))
    name = "transformer.cdf_threshold"
    assert (loose.tensors[name] <= tight.tensors[name]).all() and (loose.tensors[name] < tight.tensors[name]).any()
    tight, loose = (x.header["components"]["transformer"]["density"] for x in (tight, loose))
    assert loose < tight


@pytest.mark.parametrize("similarity", [-0.1, 0.4])
def test_a_search_passes_its_bounds_and_a_little_less_would_not(seed, similarity):
    processor = SpargeCalibrationProcessor(l1=0.1, pv_l1=0.2, **{**SMALL, "similarity_thresholds": (similarity,)})
    tensors = tokens_like(seed)
    sample = sparge_tune.SampledCall(processor, call_of(tensors), *tensors)
    density, cdf, skip = (values[0] for values in processor._tune(sample))
    kept = sample.select(cdf, similarity)
    assert torch.equal(sample.density(kept), density)
    assert (sample.error(kept) <= 0.1).all() and (sample.error(kept, skip) <= 0.2).all()
    assert (cdf < 1.0).any() and skip.isfinite().any()
    less = sample.error(sample.select(cdf - 2e-3, similarity))
    assert (less > 0.1)[(cdf < 1.0) & (cdf > 2e-3)].all()
    less = sample.error(kept, (skip - 0.2).clamp(min=1e-3))
    assert (less > 0.2)[skip.isfinite() & (skip > 0.2)].all()


def test_many_calls_are_joined_by_mean_density_and_largest_thresholds(seed):
    seen = []
    for numbers in ((0,), (1,), (0, 1)):
        processor = SpargeCalibrationProcessor(block_size=16, similarity_thresholds=(-0.1, 0.3))
        for n in numbers:
            processor.observe("transformer", call_of(tokens_like(seed + n), step=3))
        seen.append(processor.accumulator.sums)
    one, two, both = seen
    assert set(both) == {f"transformer.{x}.0" for x in ("tuned", "density", "cdf_threshold", "skip_threshold")}
    for name in both:
        join_two = torch.maximum if "threshold" in name else torch.add
        assert torch.equal(both[name], join_two(one[name], two[name]))
    assert both["transformer.density.0"].shape == (2, 3)


def test_sampled_query_blocks_include_all_if_there_are_few(seed):
    call = call_of(tokens_like(seed))
    whole = sparge_tune.SampledCall(SpargeCalibrationProcessor(query_blocks=99, **SMALL), call, *tokens_like(seed))
    assert torch.equal(whole.query, call.query) and whole.always[-1].all()
    some = sparge_tune.SampledCall(SpargeCalibrationProcessor(query_blocks=4, **SMALL), call, *tokens_like(seed))
    assert some.query.shape[2] == 3 * 16 + 11  # of 17 blocks the 4th, 8th, 12th and the tail
    assert torch.equal(some.query[:, :, :16], call.query[:, :, 48:64])
    torch.testing.assert_close(some.dense[:, :, :16], whole.dense[:, :, 48:64], atol=1e-6, rtol=1e-5)


def test_padding_is_not_measured(seed):
    query, key, value = tokens_like(seed)
    expected = calibrated([call_of((query, key, value), layer) for layer in range(2)])
    padding = torch.arange(LAYOUT.tokens) >= LAYOUT.key_valid.view(-1, 1, 1)
    dirty = [x.masked_fill(padding[..., None], torch.nan) for x in (query, key, value)]
    found = calibrated([call_of(dirty, layer) for layer in range(2)])
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_heads_are_tuned_alone(seed, monkeypatch):
    calls = [call_of(tokens_like(seed), layer) for layer in range(2)]
    expected = calibrated(calls)
    monkeypatch.setattr(sparge_prediction, "CHUNK_BYTES", 1)  # one head at a time
    found = calibrated(calls)
    for name in expected.tensors:
        torch.testing.assert_close(found.tensors[name], expected.tensors[name], atol=2e-3, rtol=1e-2)


def test_the_search_stops_where_larger_similarity_thresholds_are_hopeless(seed, monkeypatch):
    tried = []
    select = sparge_tune.SampledCall.select

    def watched(self, cdf, similarity):
        tried.append(similarity)
        return select(self, cdf, similarity)

    monkeypatch.setattr(sparge_tune.SampledCall, "select", watched)
    calibrated(
        [call_of(tokens_like(seed), layer) for layer in range(2)], similarity_thresholds=(-0.1, 0.9999, 0.99999, 1.0)
    )
    assert set(tried) == {-0.1, 0.9999}


@pytest.mark.parametrize(
    ("steps", "total", "tuned"),
    [(4, 50, [6, 18, 31, 43]), (1, 10, [5]), (4, 4, [0, 1, 2, 3]), (4, 3, [0, 1, 2]), (3, 4, [0, 2, 3])],
)
def test_tuned_steps_are_spread_over_the_run(steps, total, tuned):
    processor = SpargeCalibrationProcessor(steps=steps)
    assert [n for n in range(total) if processor.tunes(Step(n, total, "cond", None))] == tuned
    assert processor.tunes(Step(7, None, "call0", None)), "all steps of a run whose length is not known"


def test_other_steps_are_not_looked_at(seed):
    processor = SpargeCalibrationProcessor(steps=1, **SMALL)
    processor.plan(call_of(tokens_like(seed), step=0))
    assert not processor.accumulator.sums
    processor.plan(call_of(tokens_like(seed), step=5))
    assert processor.accumulator.sums


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    calibrated([call_of(tokens_like(1), layer) for layer in range(2)]).save(path)
    return path


def test_a_file_takes_the_place_of_the_thresholds(tuned_file, tmp_path):
    processor = SpargeAttnProcessor(calibration=tuned_file, **USE)
    assert processor.density is None and processor.similarity_threshold is None
    plan = processor.plan(call_of(tokens_like(1), 1))
    skip = Calibration.load(tuned_file).tensors["transformer.skip_threshold"]
    assert torch.equal(plan.skip_threshold, skip[1])
    processor.save(tmp_path / "sparge.json")
    assert AttnProcessor.load(tmp_path / "sparge.json") == processor
    for name, value in (("density", 0.5), ("cdf_threshold", 0.9), ("similarity_threshold", 0.5), ("skip_threshold", 5)):
        with pytest.raises(SettingsError, match=f"calibration=.* and {name} came together"):
            SpargeAttnProcessor(calibration=tuned_file, **{name: value})


def test_a_file_that_was_made_anew_is_read_anew(tuned_file, tmp_path):
    path, cache = tmp_path / "tuned.safetensors", {}
    Calibration.load(tuned_file).save(path)
    processor = SpargeAttnProcessor(calibration=path, **USE)
    call = dataclasses.replace(call_of(tokens_like(1), 1), cache=cache)
    before = processor.plan(call)
    file = Calibration.load(path)
    tensors = {name: file.tensors[name] + (name == "transformer.skip_threshold") for name in file.tensors}
    dataclasses.replace(file, tensors=tensors).save(path)
    after = processor.plan(call)
    assert torch.equal(after.skip_threshold, before.skip_threshold + 1)
    path.unlink()
    assert torch.equal(processor.plan(call).skip_threshold, after.skip_threshold), "what is known is enough for a run"


def test_a_missing_file_is_named_at_construction(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.safetensors cannot be read"):
        SpargeAttnProcessor(calibration=tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token_order": "row-major"}, "token_order hilbert, not row-major"),
        ({"attention_sink": True}, "attention_sink False, not True"),
        ({"quantization": "int8"}, "quantization None, not int8"),
        ({"block_size": 32}, "query_block 16, not 32; key_block 16, not 32"),
        ({"block_size": None}, "query_block 16, not 128; key_block 16, not 64"),
        ({"layout": TokenLayout((4, 4, 16), 11)}, r"latent grid \(4, 8, 8\), not \(4, 4, 16\)"),
        ({"layout": TokenLayout((4, 8, 8), 0)}, "text tokens 11, not 0"),
        ({"denoiser": Denoiser("transformer", "MochiTransformer3DModel", 2)}, "model WanTransformer3DModel, not Mochi"),
        ({"denoiser": Denoiser("transformer", "WanTransformer3DModel", 3)}, "layers 2, not 3"),
        ({"heads": 4}, "heads 3, not 4"),
        ({"head_dim": 16}, "head_dim 8, not 16"),
    ],
    ids=lambda x: None if isinstance(x, str) else str(next(iter(x))),
)
def test_a_file_of_something_else_is_refused_with_every_difference(tuned_file, change, named):
    settings = dict(change)
    shape = {name: settings.pop(name) for name in ("layout", "heads", "head_dim") if name in settings}
    denoiser = settings.pop("denoiser", DENOISER)
    processor = SpargeAttnProcessor(calibration=tuned_file, **{**USE, **settings})
    call = call_of(tokens_like(0, **shape), layout=shape.get("layout", LAYOUT), denoiser=denoiser)
    with pytest.raises(SettingsError, match=named):
        processor.plan(call)
    if "layout" in shape or settings:
        with pytest.raises(SettingsError, match=named):
            processor.check(call.layout)


def test_layers_that_are_dense_throughout_are_run_dense(seed, tmp_path):
    query, key, value = tokens_like(seed)
    flat = (0.0 * query, key, value)  # every key counts the same: nothing can be left out
    calls = [call_of((query, key, value), 0), call_of(flat, 1)]
    calibrated(calls, l1=1e-6, pv_l1=2e-6).save(tmp_path / "tuned.safetensors")
    processor = SpargeAttnProcessor(calibration=tmp_path / "tuned.safetensors", **USE)
    assert processor.plan(calls[1]) == Dense()


def test_a_calibration_goes_on_after_an_interruption(seed, tmp_path):
    calls = [call_of(tokens_like(seed + n), n % 2) for n in range(4)]
    settings = {**SMALL, "similarity_thresholds": (0.3,), "steps": 10}
    expected = calibrated(calls, **settings)
    first = SpargeCalibrationProcessor(**settings)
    for call in calls[:2]:
        first.plan(call)
    first.end_prompt()
    first.state().save(tmp_path / "partial.safetensors")
    with pytest.raises(SettingsError, match="finished"):
        SpargeAttnProcessor(calibration=tmp_path / "partial.safetensors", **USE).plan(calls[0])
    second = SpargeCalibrationProcessor(**settings)
    second.restore(Calibration.load(tmp_path / "partial.safetensors"))
    for call in calls[2:]:
        second.plan(call)
    second.end_prompt()
    second.end_round()
    found = second.finish()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert found.header["components"] == expected.header["components"]


def test_it_does_not_finish_before_its_time(seed):
    processor = SpargeCalibrationProcessor(**SMALL, steps=10)
    with pytest.raises(SettingsError, match="end_round"):
        processor.finish()
    processor = SpargeCalibrationProcessor(**SMALL, steps=1)
    for layer in range(2):
        processor.plan(call_of(tokens_like(seed), layer, step=0))
    processor.end_prompt()
    processor.end_round()
    with pytest.raises(UnsupportedError, match="layer 0 of transformer was never tuned"):
        processor.finish()


@pytest.mark.parametrize("name", ["wan", "cog", "hunyuan", "mochi"])
def test_tuned_on_a_pipeline_and_used_on_it(name, tiny_pipelines, generate, tmp_path):
    pipe, inputs = tiny_pipelines[name]()
    stock = generate(pipe, inputs)
    processor = SpargeCalibrationProcessor(
        block_size=16, steps=1, similarity_thresholds=(-0.1,), l1=0.2, pv_l1=0.3, query_blocks=4
    )
    attnproc.install(pipe, processor)
    assert torch.equal(generate(pipe, inputs), stock), "the runs it watches are dense"
    processor.end_prompt()
    processor.end_round()
    calibration = processor.finish({"prompts": 1})
    calibration.save(tmp_path / "tuned.safetensors")
    attnproc.install(pipe, SpargeAttnProcessor(calibration=str(tmp_path / "tuned.safetensors"), **USE))
    out = generate(pipe, inputs)
    assert out.isfinite().all()
    report = attnproc.report(pipe)
    assert not report.fallbacks
    assert float((stock - out).norm() / stock.norm()) < 0.5


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"l1": 0.0},
        {"l1": math.nan},
        {"l1": 0.1, "pv_l1": 0.1},
        {"pv_l1": math.inf},
        {"steps": 0},
        {"steps": 2.5},
        {"query_blocks": 0},
        {"similarity_thresholds": ()},
        {"similarity_thresholds": (0.5, 1.5)},
        {"token_order": "zigzag"},
        {"attention_sink": "yes"},
    ],
    ids=str,
)
def test_bad_settings_raise_at_construction_and_are_named(bad):
    with pytest.raises(SettingsError, match=f"{list(bad)[-1]}="):
        SpargeCalibrationProcessor(**bad)


def test_settings_survive_json():
    processor = SpargeCalibrationProcessor(l1=0.02, pv_l1=0.03, steps=3, similarity_thresholds=(0.5, -0.5))
    settings = json.loads(json.dumps(processor.to_dict()))["settings"]
    assert SpargeCalibrationProcessor.from_settings(settings) == processor
    assert processor.similarity_thresholds == (-0.5, 0.5)
