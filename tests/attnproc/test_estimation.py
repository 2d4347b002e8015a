"""Estimates agree with FLOPs counted on the real model classes, and are refused where they would be guesses."""

import json

import pytest
import torch

import attnproc
from attnproc.errors import AttnProcError, SettingsError
from attnproc.estimation import attention_share, plan_bytes, speed_up_ceiling
from attnproc.layout import TokenLayout
from attnproc.methods import method_class
from attnproc.model_facts import KNOWN_MODELS, model_facts, read_configs
from attnproc.processor import AttnProcessor, DenseAttnProcessor

# Counted by running the real model classes on the meta device (self-attention only, batch 1):
# name, (height, width, frames), grid, tokens with text, self share in percent, TFLOP of one forward
COUNTED = [
    ("wan2.1-1.3b", (480, 832, 81), (21, 30, 52), 32_760, 69.9, 283.0),
    ("wan2.1-1.3b", (1088, 1920, 81), (21, 68, 120), 171_360, 92.4, 5857.0),
    ("wan2.1-1.3b", (2176, 3840, 81), (21, 136, 240), 685_440, 98.0, 88_379.0),
    ("wan2.1-14b", (480, 832, 81), (21, 30, 52), 32_760, 52.4, 1678.3),
    ("wan2.1-14b", (720, 1280, 81), (21, 45, 80), 75_600, 71.8, 6523.7),
    ("wan2.2-ti2v-5b", (704, 1280, 121), (31, 22, 40), 27_280, 53.1, 517.0),
    ("skyreels-v2-14b", (544, 960, 97), (25, 34, 60), 51_000, 63.2, 3374.4),
    ("hunyuanvideo", (544, 960, 129), (33, 34, 60), 67_576, 78.6, 4285.5),
    ("hunyuanvideo", (720, 1280, 129), (33, 45, 80), 119_056, 86.6, 12_069.0),
    ("hunyuanvideo-1.5", (480, 848, 121), (31, 30, 53), 51_275, 80.7, 1441.7),
    ("hunyuanvideo-1.5", (720, 1280, 121), (31, 45, 80), 113_585, 90.2, 6324.5),
    ("cogvideox-2b", (480, 720, 49), (13, 30, 45), 17_776, 60.7, 120.0),
    ("cogvideox-5b", (480, 720, 49), (13, 30, 45), 17_776, 49.1, 332.2),
    ("cogvideox1.5-5b", (768, 1360, 81), (11, 48, 85), 45_106, 71.0, 1479.2),
    ("mochi-1", (480, 848, 163), (28, 30, 53), 44_776, 70.9, 1668.0),
    ("mochi-1", (480, 848, 19), (4, 30, 53), 6_616, 26.9, 95.9),
    ("ltx-2b", (512, 704, 161), (21, 16, 22), 7_392, 33.8, 37.1),
    ("ltx-13b", (704, 1216, 121), (16, 22, 38), 13_376, 31.6, 445.9),
    ("allegro", (720, 1280, 88), (22, 45, 80), 79_200, 82.6, 2239.1),
    ("flux.1", (1024, 1024, 1), (1, 64, 64), 4_608, 20.0, 74.4),
    ("sd3-medium", (1024, 1024, 1), (1, 64, 64), 4_429, 32.5, 8.9),
    ("qwen-image", (1328, 1328, 1), (1, 83, 83), 7_401, 28.6, 141.0),
]


@pytest.mark.parametrize(("name", "size", "grid", "tokens", "share", "teraflop"), COUNTED)
def test_agrees_with_counted_flops(name, size, grid, tokens, share, teraflop):
    height, width, frames = size
    found = attnproc.estimate(name, height=height, width=width, num_frames=frames, processor=DenseAttnProcessor())
    assert found.grid == grid
    assert found.tokens == tokens
    assert abs(100 * found.attention_share - share) < 1.0
    assert found.petaflops * 1000 == pytest.approx(teraflop, rel=0.025)
    assert found.density == found.ceiling == 1.0


# Published ceilings by attention share: d = 0.5, 0.3, 0.2, 0.1, (d = 0.3 with a quarter of the steps dense), d -> 0
CEILINGS = [
    (0.699, (1.54, 1.96, 2.27, 2.70, 1.58, 3.32)),
    (0.524, (1.35, 1.58, 1.72, 1.89, 1.38, 2.10)),
    (0.718, (1.56, 2.01, 2.35, 2.82, 1.60, 3.54)),
    (0.866, (1.76, 2.54, 3.25, 4.53, 1.83, 7.46)),
    (0.491, (1.33, 1.52, 1.65, 1.79, 1.35, 1.96)),
    (0.338, (1.20, 1.31, 1.37, 1.44, 1.22, 1.51)),
]


@pytest.mark.parametrize(("share", "expected"), CEILINGS)
def test_ceilings_of_the_table(share, expected):
    cases = [(0.5, 0.0), (0.3, 0.0), (0.2, 0.0), (0.1, 0.0), (0.3, 0.25), (0.0, 0.0)]
    for (density, warm_up), value in zip(cases, expected, strict=True):
        assert speed_up_ceiling(share, density, warm_up) == pytest.approx(value, rel=0.006)


def test_ceiling_is_the_ratio_of_summed_flops():
    """A plain count over steps and layers, on random runs."""
    seed = int(torch.randint(2**31, ()).item())
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        share, density = torch.rand(2, generator=generator).tolist()
        steps, layers = torch.randint(1, 30, (2,), generator=generator).tolist()
        dense_steps = int(torch.randint(0, steps + 1, (), generator=generator))
        dense_layers = int(torch.randint(0, layers + 1, (), generator=generator))
        cost = 0.0
        for step in range(steps):
            for layer in range(layers):
                dense = step < dense_steps or layer < dense_layers
                cost += (1 - share) + share * (1.0 if dense else density)
        expected = steps * layers / cost
        assert speed_up_ceiling(share, density, dense_steps / steps, dense_layers / layers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "heads", "mebibytes"),
    [(75_600, 40, 32), (119_056, 24, 48), (685_440, 12, 788), (32_760, 12, 2)],
)
def test_plan_memory_of_the_table(tokens, heads, mebibytes):
    assert plan_bytes(tokens, 0.3, (128, 64), heads) / 2**20 == pytest.approx(mebibytes, abs=0.6)


class _Half(AttnProcessor):
    """Test method: half of everything, nothing dense."""

    name = "half"

    def predicted_density(self, layout: TokenLayout) -> float:
        return 0.5


def test_settings_enter_the_estimate():
    processor = _Half(dense_steps=(0.25, 1), dense_layers=3, block_size=128)
    found = attnproc.estimate("wan2.1-14b", steps=40, batch=2, processor=processor)
    assert found.dense_step_share == 11 / 40
    assert found.dense_layer_share == 3 / 40
    share = attention_share(32_760, 29_184)
    assert found.ceiling == pytest.approx(speed_up_ceiling(share, 0.5, 11 / 40, 3 / 40))
    assert found.ceiling_without_warm_up == pytest.approx(1 / (1 - share / 2))
    assert found.plan_bytes == 2 * 256 * 256
    assert found.plan_bytes_per_layer == 2 * 256 * 256 * 40 * 2
    single = attnproc.estimate("wan2.1-14b", steps=40, processor=processor)
    assert found.petaflops == pytest.approx(2 * single.petaflops)


def test_density_and_memory_are_those_of_the_mask():
    processor = method_class("radial").from_preset("wan2.1-14b-720p")
    found = attnproc.estimate("wan2.1-14b", height=768, width=1280, num_frames=69, steps=50, processor=processor)
    layout = TokenLayout((18, 48, 80))
    assert found.density == processor.predicted_density(layout) < 1.0
    assert found.plan_bytes == processor.mask(layout).nbytes > 0
    assert found.dense_step_share == 12 / 50


def test_advice():
    radial = method_class("radial")
    assert "dense baseline" in attnproc.estimate("wan2.1-14b", processor=DenseAttnProcessor()).advice
    assert attnproc.estimate("ltx-2b", processor=radial()).advice.startswith("run dense: the ceiling is 1.1")
    assert "keeps everything" in attnproc.estimate("wan2.1-14b", num_frames=1, processor=radial()).advice
    assert attnproc.estimate("wan2.1-14b", num_frames=1, processor=radial()).plan_bytes == 0
    assert "worth it" in attnproc.estimate("hunyuanvideo", processor=radial()).advice
    warm = attnproc.estimate("hunyuanvideo", processor=radial(dense_steps=(0.5, 0))).advice
    assert "warm-up costs most" in warm
    assert "fewer dense steps" in attnproc.estimate("hunyuanvideo", processor=radial(dense_steps=0.95)).advice


def test_shows_as_table_and_plain_data():
    found = attnproc.estimate("hunyuanvideo", processor=_Half(dense_steps=2))
    text = repr(found)
    for part in ("118,800 + 256 text", "33 x 45 x 80", "86.6%", f"{found.ceiling:.2f}x", "half on hunyuanvideo"):
        assert part in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["tokens"] == 119_056
    assert data["grid"] == [33, 45, 80]
    assert data["ceiling"] == found.ceiling


def test_every_known_model_has_a_default_size():
    for name in KNOWN_MODELS:
        found = attnproc.estimate(name, processor=DenseAttnProcessor())
        assert 0.0 < found.attention_share < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 730}, "height=730 .* multiple of 16. Use 720 or 736"),
        ({"width": 0}, "width=0 .* Use 16"),
        ({"num_frames": 80}, r"4k \+ 1 frames. Use 77 or 81"),
        ({"num_frames": 0}, r"4k \+ 1 frames. Use 1"),
        ({"steps": 0}, "steps=0"),
        ({"batch": 0}, "batch=0"),
        ({"steps": 4, "processor": _Half(dense_steps=12)}, "12 dense steps"),
    ],
)
def test_a_size_the_model_cannot_make_is_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        attnproc.estimate("wan2.1-14b", **{"processor": _Half(), **arguments})


def test_other_models_have_other_rules():
    with pytest.raises(SettingsError, match=r"multiple of 32\. Use 448 or 480"):
        attnproc.estimate("wan2.2-ti2v-5b", height=464, processor=_Half())
    with pytest.raises(SettingsError, match=r"4k frames\. Use 84 or 88"):
        attnproc.estimate("allegro", num_frames=85, processor=_Half())
    with pytest.raises(SettingsError, match="picture model"):
        attnproc.estimate("flux.1", num_frames=5, processor=_Half())


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(SettingsError, match=r"Did you mean 'wan2.1-14b'"):
        attnproc.estimate("wan2.1-14", processor=_Half())
    with pytest.raises(SettingsError, match="target is a int"):
        attnproc.estimate(3, processor=_Half())


def test_hub_errors_are_told_apart(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(AttnProcError, match="hub cannot be reached") as found:
        attnproc.estimate("owner/name", processor=_Half())
    assert not isinstance(found.value, SettingsError)


def _wan(tmp_path):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        patch_size=(1, 2, 2),
    )
    model.save_pretrained(tmp_path / "model")
    return model


def test_a_model_and_its_folder_give_the_same(tmp_path, monkeypatch):
    model = _wan(tmp_path)
    # Only the configuration is read from a folder.
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    size = {"height": 48, "width": 32, "num_frames": 9, "steps": 5}
    of_model = attnproc.estimate(model, processor=_Half(), **size)
    of_folder = attnproc.estimate(tmp_path / "model", processor=_Half(), **size)
    assert of_model.grid == (3, 3, 2)
    assert {**of_model.to_dict(), "model": ""} == {**of_folder.to_dict(), "model": ""}
    facts = model_facts(read_configs(model))
    assert (facts.heads, facts.head_dim, facts.layers, facts.mlp_width) == (2, 12, 3, 32)


def test_a_broken_folder_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"has no config\.json"):
        attnproc.estimate(str(tmp_path), processor=_Half())
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(SettingsError, match="cannot be read"):
        attnproc.estimate(str(tmp_path), processor=_Half())
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(SettingsError, match="no usable 'num_attention_heads'"):
        attnproc.estimate(str(tmp_path), processor=_Half())
    (tmp_path / "config.json").write_text('{"_class_name": "MyTransformer"}')
    with pytest.raises(SettingsError, match="is a MyTransformer, of which no sizes are known"):
        attnproc.estimate(str(tmp_path), processor=_Half())
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline", "vae": ["diffusers", "X"]}')
    with pytest.raises(SettingsError, match="without a denoiser"):
        attnproc.estimate(str(tmp_path), processor=_Half())
