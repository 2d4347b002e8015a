"""RadialAttnProcessor: settings, presets, when it prefers dense attention, and the plans it makes."""

import json
import re
import warnings

import numpy as np
import pytest
import torch

from attnproc import kernels
from attnproc.errors import AttnProcWarning, SettingsError
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.radial import RadialAttnProcessor, radial_blocks

SMALL = {"block_size": 16, "band_limit": 16, "max_density": 1.0}
WAN_720P = TokenLayout((21, 45, 80))
WAN_480P = TokenLayout((21, 30, 52))


def call_of(layout, cache=None, batch=1, layer=3):
    query = torch.zeros(batch, 2, layout.tokens, 8)
    return AttentionCall(
        query,
        query,
        query,
        layout,
        Step(5, 10, "cond", layout.grid),
        layer,
        Denoiser("transformer", "WanTransformer3DModel", 8),
        {} if cache is None else cache,
        {},
    )


def tokens_of(layout, batch, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, layout.tokens, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.fixture
def seed():
    value = int(torch.randint(2**31, ()))
    print(f"seed {value}")
    return value


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["high", "balanced", "fast"])
def test_the_dial_sets_every_open_setting_and_is_overridden_by_arguments(quality):
    processor = RadialAttnProcessor(quality=quality)
    assert None not in (processor.decay_factor, processor.dense_steps, processor.dense_layers)
    chosen = RadialAttnProcessor(quality=quality, decay_factor=0.37, dense_steps=3)
    assert (chosen.decay_factor, chosen.dense_steps) == (0.37, (3, 0))
    assert chosen.dense_layers == processor.dense_layers


@pytest.mark.parametrize("layout", [WAN_720P, WAN_480P, TokenLayout((33, 45, 80), 256)])
def test_a_higher_quality_keeps_more(layout):
    high, balanced, fast = (
        RadialAttnProcessor(quality=q).predicted_density(layout) for q in ("high", "balanced", "fast")
    )
    assert 1.0 > high > balanced > fast > 0.0


@pytest.mark.parametrize(
    "bad",
    [
        {"decay_factor": 0},
        {"decay_factor": -1.0},
        {"decay_factor": float("nan")},
        {"decay_factor": float("inf")},
        {"decay_factor": "0.2"},
        {"decay_factor": True},
        {"alignment": "frame"},
        {"sink_frames": -1},
        {"sink_frames": 1.0},
        {"adjacent_half_width": 0.0},
        {"adjacent_half_width": 1.5},
        {"adjacent_half_width": None},
        {"band_limit": 0},
        {"band_limit": 12.5},
        {"max_density": 0.0},
        {"max_density": 1.1},
        {"max_density": float("nan")},
        {"block_size": 0},
        {"dense_steps": -1},
        {"dense_layers": -1},
        {"quality": "best"},
    ],
    ids=str,
)
def test_bad_settings_raise_at_construction_and_are_named(bad):
    with pytest.raises(SettingsError, match=next(iter(bad))):
        RadialAttnProcessor(**bad)


def test_no_warm_up_warns():
    with pytest.warns(AttnProcWarning, match="quality collapses"):
        RadialAttnProcessor(dense_steps=0, dense_layers=0)
    with pytest.warns(AttnProcWarning, match="quality collapses"):
        RadialAttnProcessor(dense_steps=(0.0, 0), dense_layers=())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RadialAttnProcessor(dense_steps=0)  # one dense layer is left
        RadialAttnProcessor(dense_steps=0, dense_layers=(4,))
        RadialAttnProcessor(dense_steps=(0, 1), dense_layers=0)


def test_a_very_large_decay_factor_warns():
    with pytest.warns(AttnProcWarning, match=r"decay_factor=4\.5"):
        RadialAttnProcessor(decay_factor=4.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RadialAttnProcessor(decay_factor=4.0)


def test_settings_survive_json(tmp_path):
    processor = RadialAttnProcessor(
        decay_factor=0.3,
        alignment="reference",
        sink_frames=0,
        adjacent_half_width=0.5,
        band_limit=64,
        max_density=0.9,
        dense_steps=(0.2, 2),
        dense_layers={5, 1},
        block_size=32,
    )
    processor.save(tmp_path / "radial.json")
    assert RadialAttnProcessor.load(tmp_path / "radial.json") == processor
    assert AttnProcessor.load(tmp_path / "radial.json") == processor
    assert RadialAttnProcessor.from_settings(json.loads(json.dumps(processor.to_dict()))["settings"]) == processor


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RadialAttnProcessor.presets())
def test_every_preset_can_be_made_without_a_warning_and_says_its_source(name):
    preset = RadialAttnProcessor.presets()[name]
    assert set(preset) == {"settings", "for", "source"}
    assert preset["for"] and preset["source"].startswith(("mit-han-lab/radial-attention at ", "suggested: "))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = RadialAttnProcessor.from_preset(name)
    for key, value in preset["settings"].items():
        assert getattr(processor, key) == (tuple(value) if isinstance(value, list) else value)


# preset, latent grid and text of what it is for -> density of the mask that the released code makes
@pytest.mark.parametrize(
    ("name", "layout", "density"),
    [
        ("wan2.1-14b-720p", TokenLayout((18, 48, 80)), 0.2871),
        ("wan2.1-14b-lightx2v-4-steps", TokenLayout((18, 48, 80)), 0.2871),
        ("wan2.2-t2v-a14b-720p", TokenLayout((20, 48, 80)), 0.3491),
        ("hunyuanvideo-720p", TokenLayout((30, 48, 80), 256), 0.2778),
        ("hunyuanvideo-720p", TokenLayout((32, 45, 80), 256), 0.2785),
        ("hunyuanvideo-720p-509-frames", TokenLayout((128, 45, 80)), 0.1088),
    ],
)
def test_presets_have_the_density_of_the_published_masks(name, layout, density):
    processor = RadialAttnProcessor.from_preset(name, alignment="reference")
    assert processor.predicted_density(layout) == pytest.approx(density, abs=5.1e-5)


def test_the_smallest_model_gets_the_sparsest_mask_its_blocks_allow():
    layout = TokenLayout((5, 8, 8))
    preset = RadialAttnProcessor.from_preset("shapes-video")
    sparser = RadialAttnProcessor.from_preset("shapes-video", decay_factor=0.01)
    assert preset.predicted_density(layout) == sparser.predicted_density(layout) < 1.0
    assert isinstance(preset.plan(call_of(layout)), Plan)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match=r"Did you mean 'wan2\.1-14b-720p'"):
        RadialAttnProcessor.from_preset("wan2.1-14b-720")


# -- dense instead of sparse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "layout", "reason"),
    [
        ({}, TokenLayout((1, 45, 80)), "^$"),
        ({}, TokenLayout((21, 8, 8)), "64 tokens per frame.*band_limit=128"),
        ({}, TokenLayout((2, 10, 12)), "120 tokens per frame"),
        ({"block_size": 128}, TokenLayout((3, 10, 16)), "480 video tokens.*4 blocks of 128"),
        ({}, TokenLayout((5, 16, 32)), r"density of 0\.\d{3}.*max_density=0\.7"),
        ({"max_density": 0.3}, WAN_720P, r"density of 0\.396.*max_density=0\.3"),
        ({"alignment": "reference"}, TokenLayout((1, 30, 53)), "^$"),
    ],
)
def test_dense_is_preferred_where_sparse_gains_nothing(settings, layout, reason):
    processor = RadialAttnProcessor(**settings)
    decision = processor._decide(layout)
    assert isinstance(decision, Dense)
    assert re.search(reason, decision.reason)
    assert processor.predicted_density(layout) == 1.0


def test_the_mask_is_there_also_where_the_plan_is_dense():
    layout = TokenLayout((5, 16, 32))
    processor = RadialAttnProcessor(block_size=128)
    assert isinstance(processor.plan(call_of(layout)), Dense)
    assert processor.mask(layout).density == pytest.approx(0.945)
    assert processor.row_counts(layout).tolist()[:6] == [16, 19, 19, 16, 18, 20]


def test_reference_alignment_complains_as_a_run_starts():
    processor = RadialAttnProcessor(alignment="reference", block_size=128)
    with pytest.raises(ValueError, match="V=32760"):
        processor.check(WAN_480P)
    with pytest.raises(ValueError, match="V=32760"):
        processor.predicted_density(WAN_480P)
    processor.check(TokenLayout((18, 48, 80)))
    processor.check(TokenLayout((1, 30, 53)))
    RadialAttnProcessor(block_size=128).check(WAN_480P)


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "size"), [(WAN_480P, 64), (WAN_720P, 128), (TokenLayout((9, 40, 50)), 128)], ids=str
)
def test_block_size_follows_the_tokens_per_frame(layout, size):
    assert RadialAttnProcessor().mask(layout).block_size == (size, size)
    assert RadialAttnProcessor(block_size=32).mask(layout).block_size == (32, 32)


def test_settings_reach_the_mask():
    layout = TokenLayout((12, 10, 13), 37)
    settings = {
        "decay_factor": 0.4,
        "alignment": "global",
        "sink_frames": 2,
        "adjacent_half_width": 0.5,
        "band_limit": 64,
    }
    mask = RadialAttnProcessor(block_size=16, **settings).mask(layout)
    assert torch.equal(mask.to_blocks()[0, 0], radial_blocks(12, 130, 37, block_size=16, **settings))
    assert (mask.query_length, mask.key_length) == (layout.tokens, layout.tokens)
    mask.validate()


def test_density_counts_tokens_not_blocks():
    layout = TokenLayout((7, 5, 7), 11)
    processor = RadialAttnProcessor(decay_factor=0.2, **SMALL)
    mask = processor.mask(layout)
    expected = mask.token_mask().double().mean().item()
    assert processor.predicted_density(layout) == pytest.approx(expected, abs=1e-12)
    assert processor.plan(call_of(layout)).mask.density == pytest.approx(expected, abs=1e-12)


def test_pictures_show_the_mask():
    layout = TokenLayout((5, 16, 32))
    processor = RadialAttnProcessor(block_size=128)
    picture = processor.mask_picture(layout)
    assert picture.dtype == np.uint8 and set(np.unique(picture)) == {0, 255}
    np.testing.assert_array_equal(picture == 255, processor.mask(layout).to_blocks()[0, 0].numpy())
    lines = processor.mask_text(layout).split("\n")
    assert lines[0] == "###########.###.##.." and len(lines) == 20
    assert [line.count("#") for line in lines] == processor.row_counts(layout).tolist()


def test_plans_are_cached_by_value_not_by_token_count():
    cache = {}
    processor = RadialAttnProcessor(**SMALL, decay_factor=0.2)
    wide, tall = TokenLayout((8, 8, 8)), TokenLayout((16, 4, 8))  # as many tokens
    first = processor.plan(call_of(wide, cache)).mask
    assert processor.plan(call_of(wide, cache, layer=4)).mask is first
    assert processor.plan(call_of(TokenLayout((8, 4, 16)), cache)).mask is first  # same frames, same raster order
    other = processor.plan(call_of(tall, cache)).mask
    assert not torch.equal(other.to_blocks(), first.to_blocks())
    for change in ({"decay_factor": 1.0}, {"sink_frames": 0}, {"band_limit": 64}, {"adjacent_half_width": 0.5}):
        changed = RadialAttnProcessor(**{**SMALL, "decay_factor": 0.2, **change})
        assert not torch.equal(changed.plan(call_of(wide, cache)).mask.to_blocks(), first.to_blocks())
    assert processor.plan(call_of(wide, cache)).mask is first
    processor.decay_factor = 1.0
    assert processor.plan(call_of(wide, cache)).mask is not first


def test_text_padding_is_cached_by_value():
    cache = {}
    processor = RadialAttnProcessor(**SMALL)
    masks = [
        processor.plan(call_of(TokenLayout((5, 8, 8), 20, torch.tensor(valid)), cache, batch=2)).mask
        for valid in ([20, 3], [20, 3], [7, 3], [0, 0])
    ]
    assert masks[0] is masks[1]
    assert [mask.key_valid.tolist() for mask in masks] == [[340, 323], [340, 323], [327, 323], [320, 320]]
    assert processor.plan(call_of(TokenLayout((5, 8, 8), 20), cache)).mask.key_valid is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(5, 8, 8), (7, 5, 7), (9, 3, 11)], ids=str)
def test_planned_attention_is_softmax_over_the_kept_tokens(grid, dtype, seed):
    layout = TokenLayout(grid, 21, torch.tensor([21, 6]))
    mask = RadialAttnProcessor(decay_factor=0.2, **SMALL).plan(call_of(layout, batch=2)).mask
    query, key, value = tokens_of(layout, 2, seed, dtype)
    tokens = mask.to_blocks()[0, 0].repeat_interleave(16, 0).repeat_interleave(16, 1)
    seen = tokens[: layout.tokens, : layout.tokens] & (torch.arange(layout.tokens) < layout.key_valid[:, None, None])
    scores = (query.double() @ key.double().mT / 8**0.5).masked_fill(~seen[:, None], -torch.inf)
    expected = scores.softmax(-1) @ value.double()
    found = kernels.block_sparse_attention(query, key, value, mask)
    torch.testing.assert_close(found.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_padded_text_and_dropped_blocks_have_no_influence(seed):
    layout = TokenLayout((6, 8, 8), 24, torch.tensor([24, 5]))
    mask = RadialAttnProcessor(decay_factor=0.2, **SMALL).plan(call_of(layout, batch=2)).mask
    query, key, value = tokens_of(layout, 2, seed)
    clean = kernels.block_sparse_attention(query, key, value, mask)
    key[1, :, layout.video_tokens + 5 :] = value[1, :, layout.video_tokens + 5 :] = 1e4
    assert torch.equal(kernels.block_sparse_attention(query, key, value, mask), clean)
    row = int(mask.row_counts[0, 0].argmin())
    for column in (~mask.to_blocks()[0, 0, row]).nonzero().flatten().tolist():
        block = slice(column * 16, column * 16 + 16)
        key[:, :, block] = value[:, :, block] = 1e4
    poisoned = kernels.block_sparse_attention(query, key, value, mask)
    queries = slice(row * 16, row * 16 + 16)
    assert torch.equal(poisoned[:, :, queries], clean[:, :, queries])
    assert not torch.equal(poisoned, clean)


def test_a_batch_is_as_its_samples_alone(seed):
    layout = TokenLayout((6, 7, 9), 13, torch.tensor([13, 0]))
    processor = RadialAttnProcessor(decay_factor=0.5, **SMALL)
    tensors = tokens_of(layout, 2, seed)
    both = kernels.block_sparse_attention(*tensors, processor.plan(call_of(layout, batch=2)).mask)
    for n in range(2):
        alone = TokenLayout(layout.grid, 13, layout.text_valid[n : n + 1])
        mask = processor.plan(call_of(alone)).mask
        out = kernels.block_sparse_attention(*(t[n : n + 1] for t in tensors), mask)
        torch.testing.assert_close(out, both[n : n + 1], atol=1e-12, rtol=0)
