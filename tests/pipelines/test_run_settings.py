"""Flags over file over defaults; every wrong value is named."""

import pytest

from attnproc.errors import SettingsError
from attnproc.pipelines.settings import RunSettings, parse_assignments, typed_settings
from attnproc.processor import DenseAttnProcessor
from attnproc.sparse.radial import RadialAttnProcessor
from attnproc.sparse.sparge import SpargeAttnProcessor


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_flags_override_the_file_and_the_file_the_defaults(config):
    path = config("prompt: from file\nsteps: 7\nset: {decay_factor: 0.3, sink_frames: 2}\n")
    found = RunSettings.from_sources(path, {"steps": 9, "seed": None, "set": {"sink_frames": "0"}})
    assert (found.prompt, found.steps, found.seed) == ("from file", 9, 0)
    processor = found.processor()
    assert (processor.decay_factor, processor.sink_frames) == (0.3, 0)
    assert RunSettings.from_sources(config(""), {"prompt": "x"}) == RunSettings(prompt="x")


def test_set_overrides_the_preset():
    settings = RunSettings(prompt="x", model="a/b", preset="wan2.1-14b-720p", set={"decay_factor": "0.9"})
    assert settings.processor() == RadialAttnProcessor.from_preset("wan2.1-14b-720p", decay_factor=0.9)


def test_the_embedded_model_has_its_own_preset():
    preset = RadialAttnProcessor.from_preset("shapes-video")
    assert RunSettings(prompt="x").processor() == preset
    sizes = {"block_size": 16, "band_limit": 16, "max_density": 1.0}
    assert RunSettings(prompt="x", quality="high").processor() == RadialAttnProcessor(quality="high", **sizes)
    assert RunSettings(prompt="x", model="a/b").processor() == RadialAttnProcessor()
    assert RunSettings(prompt="x", attention="dense").processor() == DenseAttnProcessor()


def test_strict_reaches_the_processor():
    assert RunSettings(prompt="x", strict=True).processor().strict
    assert not RunSettings(prompt="x").processor().strict


def test_texts_get_the_types_of_the_settings():
    texts = {
        "decay_factor": "1",
        "block_size": "None",
        "sink_frames": "2",
        "strict": "true",
        "alignment": "reference",
        "dense_steps": "0.25,1",
        "dense_layers": "3",
    }
    found = typed_settings(RadialAttnProcessor, texts)
    assert found == {
        "decay_factor": 1.0,
        "block_size": None,
        "sink_frames": 2,
        "strict": True,
        "alignment": "reference",
        "dense_steps": (0.25, 1),
        "dense_layers": 3,
    }
    assert isinstance(found["decay_factor"], float)
    assert typed_settings(RadialAttnProcessor, {"dense_layers": "0,5"}) == {"dense_layers": (0, 5)}
    assert typed_settings(RadialAttnProcessor, {"dense_layers": "5,"}) == {"dense_layers": (5,)}
    assert typed_settings(RadialAttnProcessor, {"dense_steps": "[2, 1]"}) == {"dense_steps": (2, 1)}
    per_head = {"density": "0.5,0.25", "skip_threshold": "4", "cdf_threshold": "none"}
    found = typed_settings(SpargeAttnProcessor, per_head)
    assert found == {"density": (0.5, 0.25), "skip_threshold": 4, "cdf_threshold": None}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sink_frames", "1.5", "expected an integer"),
        ("decay_factor", "wide", "expected a number or none"),
        ("strict", "maybe", "expected true or false"),
        ("dense_steps", "a,b", "expected a number, or several with commas"),
        ("block_size", "big", "expected an integer or none"),
        ("decay_fact", "1", "Did you mean 'decay_factor'"),
        ("decay_factor", "-1", "must be a finite number above 0"),
        ("backend", "cuda", "choose one of auto, triton"),
    ],
)
def test_wrong_method_settings(key, text, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings(prompt="x", set={key: text}).processor()


def test_a_backend_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr("attnproc.pipelines.settings.available_backends", lambda: {"triton": "no GPU", "cpu": None})
    with pytest.raises(SettingsError, match=r"'triton' cannot be used here: no GPU"):
        RunSettings(prompt="x", set={"backend": "triton"}).processor()
    assert RunSettings(prompt="x", set={"backend": "cpu"}).processor().backend == "cpu"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt=3 has the wrong type; expected text"),
        ({"steps": "many"}, "steps='many' has the wrong type; expected an integer or none"),
        ({"steps": True}, "wrong type"),
        ({"steps": 0}, "steps=0 is not possible"),
        ({"num_videos": 0}, "num_videos=0"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance": -1.0}, "guidance=-1"),
        ({"guidance": "strong"}, "guidance='strong' has the wrong type"),
        ({"compare": "yes"}, "expected true or false"),
        ({"dtype": "float8"}, "choose one of auto, float32"),
        ({"offload": "disk"}, "choose one of none, model"),
        ({"set": ["a"]}, "expected settings"),
        ({"preset": "a", "quality": "high"}, "expected one of them"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings(**{"prompt": "x", **values})


def test_guidance_may_be_whole():
    assert RunSettings(prompt="x", guidance=5).guidance == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown key 'stepz'.*Did you mean 'steps'"),
        ("qqq: 3", "unknown key 'qqq'.*Remove it"),
        ("- a", "holds a list"),
        ("a: [", "cannot be read"),
        ("steps: x", "wrong type"),
    ],
)
def test_wrong_files(config, text, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings.from_sources(config(text), {"prompt": "x"})


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        RunSettings.from_sources(tmp_path / "no.yaml", {"prompt": "x"})


def test_assignments():
    assert parse_assignments(["a=1", "b = x=y"]) == {"a": "1", "b": "x=y"}
    for text in ("a", "=1"):
        with pytest.raises(SettingsError, match="expected key=value"):
            parse_assignments([text])


@pytest.mark.parametrize("method", ["radial", "sparge", "adaspa", "vmoba"])
@pytest.mark.parametrize("quality", ["high", "fast"])
def test_quality_on_the_embedded_model_keeps_the_sizes_of_its_preset(method, quality):
    """Without them every call would be too small and run dense."""
    from attnproc.layout import TokenLayout
    from attnproc.methods import method_class

    cls = method_class(method)
    processor = RunSettings(prompt="a", attention=method, quality=quality).processor()
    own, dial = cls.presets()["shapes-video"]["settings"], cls.dial[quality]
    assert processor.block_size == own["block_size"] and processor.dense_reason(TokenLayout((5, 8, 8))) == ""
    for key in set(dial) - {"dense_steps"}:
        assert getattr(processor, key) == dial[key]
