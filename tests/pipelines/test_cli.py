"""The command line: every command, every message, every exit code, and nothing half-written."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from imageio import v3
from typer.testing import CliRunner

import attnproc
from attnproc.pipelines import cli
from attnproc.pipelines.metrics import psnr, ssim
from attnproc.sparse.radial import RadialAttnProcessor

PROMPT = "a red circle moving right"
# Blocks and bands scaled to the 16 tokens per frame of the tiny model.
SPARSE = {"block_size": 16, "band_limit": 16, "max_density": 1.0, "dense_layers": 0, "decay_factor": 0.2}


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def config(tmp_path, wan_folder):
    """A YAML file for short runs of the tiny model, apart from the folder of the outputs."""
    path = tmp_path / "settings" / "run.yaml"
    path.parent.mkdir()
    settings = "".join(f"  {key}: {value}\n" for key, value in SPARSE.items())
    path.write_text(f"model: {wan_folder}\nframes: 17\nheight: 32\nwidth: 32\nsteps: 4\nset:\n{settings}")
    return path


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def record(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def pictures(folder):
    return np.stack([v3.imread(file) for file in sorted(folder.iterdir())])


# -- generate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v"])
def test_generates_a_readable_video_and_its_record(config, out, name):
    result = run("generate", PROMPT, "--config", config, "--output", out / name, "--seed", 3)
    assert result.exit_code == 0, result.output
    path = out / name
    found = pictures(path) if path.is_dir() else v3.imread(path, plugin="pyav" if name.endswith("mp4") else "pillow")
    assert found.shape[:3] == (17, 32, 32)
    assert sorted(os.listdir(out)) == sorted([name, "v.json"])
    data = record(out / "v.json")
    assert (data["video"], data["seed"], data["call"]["prompt"]) == (name, 3, PROMPT)
    assert data["call"]["num_inference_steps"] == len(data["timings"]["step_seconds"]) == 4
    assert data["processor"]["settings"] == json.loads(json.dumps(RadialAttnProcessor(**SPARSE).to_dict()["settings"]))
    assert data["versions"]["diffusers"] and data["versions"]["torch"]
    assert data["timings"]["seconds"] >= sum(data["timings"]["step_seconds"]) > 0
    # Steps 0 and 3 are dense (a quarter, and the last): 2 layers, 2 branches, 2 steps each.
    for site in data["report"]["sites"]:
        assert (site["dense_calls"], site["sparse_calls"]) == (4, 4)
        assert site["density_mean"] == pytest.approx(data["estimate"]["density"])
    assert data["estimate"]["density"] < 1.0
    assert data["comparison"] is None


def test_the_record_makes_the_same_video_again(config, out, wan_folder):
    assert run("generate", PROMPT, "--config", config, "--output", out / "a", "--seed", 5).exit_code == 0
    settings = {key: value for key, value in record(out / "a.json")["settings"].items() if key != "output"}
    again = out / "again.yaml"
    again.write_text(json.dumps(settings))
    assert run("generate", "--config", again, "--output", out / "b").exit_code == 0
    assert np.array_equal(pictures(out / "a"), pictures(out / "b"))


def test_numbered_videos_count_the_seed_up(config, out):
    result = run("generate", PROMPT, "--config", config, "--output", out / "v", "--seed", 7, "--num-videos", 2)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(out)) == ["v-1", "v-1.json", "v-2", "v-2.json"]
    assert [record(out / f"v-{n}.json")["seed"] for n in (1, 2)] == [7, 8]
    assert run("generate", PROMPT, "--config", config, "--output", out / "single", "--seed", 8).exit_code == 0
    assert np.array_equal(pictures(out / "v-2"), pictures(out / "single"))
    assert not np.array_equal(pictures(out / "v-1"), pictures(out / "v-2"))


def test_flags_override_the_file(config, out):
    result = run(
        *("generate", PROMPT, "--config", config, "--output", out / "v.gif", "--steps", 2, "--frames", 13),
        *("--set", "decay_factor=0.7", "--set", "dense_steps=1", "--negative-prompt", "a red", "--guidance", 1.5),
    )
    assert result.exit_code == 0, result.output
    data = record(out / "v.json")
    assert (data["call"]["num_inference_steps"], data["call"]["num_frames"]) == (2, 13)
    assert (data["call"]["negative_prompt"], data["call"]["guidance_scale"]) == ("a red", 1.5)
    assert data["processor"]["settings"]["decay_factor"] == 0.7
    assert data["processor"]["settings"]["dense_steps"] == [1, 0]
    assert data["processor"]["settings"]["band_limit"] == 16


def test_comparison_numbers_are_those_of_the_videos(config, out, monkeypatch):
    from attnproc.pipelines import generate

    written, write = {}, generate.write_video

    def keep(path, video, *args, **kwargs):
        written[path.name] = video
        write(path, video, *args, **kwargs)

    monkeypatch.setattr(generate, "write_video", keep)
    result = run("generate", PROMPT, "--config", config, "--output", out / "v.mp4", "--compare")
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(out)) == ["v.dense.mp4", "v.json", "v.mp4"]
    found = record(out / "v.json")["comparison"]
    assert found["psnr"] == pytest.approx(psnr(written["v.mp4"], written["v.dense.mp4"]))
    assert math.isfinite(found["psnr"]) and not found["equal"]
    assert found["ssim"] == pytest.approx(ssim(written["v.mp4"], written["v.dense.mp4"]))
    assert found["speed_up"] == pytest.approx(found["dense_seconds"] / found["seconds"])
    assert found["density"] == record(out / "v.json")["report"]["density"] < 1.0
    assert found["dense_video"] == "v.dense.mp4"
    for text in ("PSNR to dense", "SSIM to dense", "attention density", f"{found['speed_up']:.2f}x"):
        assert text in result.output


def test_dense_against_dense_is_equal_and_is_the_stock_pipeline(config, out, wan_folder):
    from diffusers import WanPipeline

    # Not the settings of the file: they are Radial Attention's.
    plain = out / "plain.yaml"
    plain.write_text(config.read_text().partition("set:")[0])
    result = run("generate", PROMPT, "--config", plain, "--attention", "dense", "--output", out / "v", "--compare")
    assert result.exit_code == 0, result.output
    found = record(out / "v.json")["comparison"]
    assert found["equal"] and found["psnr"] is None
    assert found["ssim"] == pytest.approx(1.0)
    assert found["density"] == 1.0
    assert "inf dB" in result.output
    pipe = WanPipeline.from_pretrained(wan_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        PROMPT, height=32, width=32, num_frames=17, num_inference_steps=4, generator=torch.Generator().manual_seed(0)
    ).frames[0]
    expected = (frames * 255).round().astype(np.uint8)
    assert np.array_equal(pictures(out / "v"), expected)
    assert np.array_equal(pictures(out / "v-dense"), expected)


def test_fallbacks_are_told_and_strict_forbids_them(config, out):
    wide = ("--set", "band_limit=128", "--output", out / "v.gif")
    result = run("generate", PROMPT, "--config", config, *wide)
    assert result.exit_code == 0
    assert "warning: RadialAttnProcessor runs dense attention: 16 tokens per frame" in result.stderr
    assert "dense in 8 attention calls: 16 tokens per frame" in result.stderr
    assert record(out / "v.json")["report"]["fallbacks"]
    for file in out.iterdir():
        file.unlink()
    result = run("generate", PROMPT, "--config", config, *wide, "--strict")
    assert result.exit_code == 3
    assert "error: radial would run dense on the latent grid (5, 4, 4)" in result.stderr
    assert os.listdir(out) == []


def test_the_warm_up_of_a_comparison_is_not_strict(wan_folder, out):
    """Its two steps are too few for a search at the third and fourth; those of the run are enough."""
    size = ("--model", wan_folder, "--frames", 17, "--height", 32, "--width", 32, "--steps", 5)
    searches = ("--attention", "adaspa", "--set", "search_steps=3,4", "--set", "min_tokens=0", "--set", "block_size=16")
    result = run("generate", PROMPT, *size, *searches, "--compare", "--strict", "--output", out / "v.gif")
    assert result.exit_code == 0, result.output
    assert record(out / "v.json")["processor"]["settings"]["strict"]


def test_dry_run_loads_nothing(config, out, wan_folder, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(wan_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", pytest.fail)
    monkeypatch.chdir(out)
    result = run("generate", PROMPT, "--config", config, "--model", bare, "--dry-run", "--num-videos", 2)
    assert result.exit_code == 0, result.output
    for text in (
        "nothing was loaded",
        "video-1.mp4, video-2.mp4",
        "5 x 4 x 4",
        "ceiling of the speed-up",
        "WanPipeline",
    ):
        assert text in result.output
    assert os.listdir(out) == []


def test_the_embedded_model_needs_no_flags(out, wan_folder, monkeypatch):
    """Its folder is another one here, so that the test does not depend on trained weights."""
    from attnproc.pipelines import loading

    monkeypatch.setattr(loading, "embedded_location", lambda *name: str(wan_folder))
    monkeypatch.chdir(out)
    result = run("generate", PROMPT, "--steps", 4)
    assert result.exit_code == 0, result.output
    assert v3.imread(out / "video.mp4", plugin="pyav").shape == (17, 256, 256, 3)
    data = record(out / "video.json")
    assert (data["upscale"], data["fps"], data["estimate"]["grid"]) == (4, 8, [5, 8, 8])
    assert (data["call"]["height"], data["call"]["width"], data["call"]["guidance_scale"]) == (64, 64, 4.0)
    preset = RadialAttnProcessor.from_preset("shapes-video").to_dict()
    assert data["processor"] == json.loads(json.dumps(preset))
    assert data["report"]["sparse_density"] < 1.0
    result = run("estimate", "shapes-video", "--json")
    assert json.loads(result.stdout)["grid"] == [5, 8, 8]
    assert json.loads(result.stdout)["steps"] == 20


def test_a_missing_embedded_model_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("attnproc.demos.shapes.MODELS", tmp_path)
    result = run("generate", PROMPT, "--dry-run")
    assert result.exit_code == 2
    assert "error: Found no model_index.json" in result.stderr


# -- generate: what cannot work is said before any long work -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "shapes-vido"], "model 'shapes-vido' is not known.*Did you mean 'shapes-video'"),
        (["--model", "wan2.1-14b"], "known to `attnproc estimate` only"),
        (["--attention", "radal"], "method 'radal' is not known.*Did you mean 'radial'"),
        (["--preset", "wan2.1-14b-720"], "has no preset 'wan2.1-14b-720'.*Did you mean"),
        (["--quality", "best"], "quality='best' is not known"),
        (["--set", "decay_fact=1"], "has no setting 'decay_fact'.*Did you mean 'decay_factor'"),
        (["--set", "decay_factor"], "expected key=value"),
        (["--set", "backend=fast"], "backend='fast' is not known"),
        (["--height", 36], "height=36 pixels.*multiple of 8. Use 32 or 40"),
        (["--frames", 16], r"num_frames=16.*4k \+ 1 frames. Use 13 or 17"),
        (["--steps", 0], "steps=0 is not possible"),
        (["--set", "dense_steps=9"], "9 dense steps, but the run has 4"),
        (["--set", "alignment=reference", "--set", "block_size=32"], "whole blocks"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--offload", "model", "--device", "cpu"], "needs an accelerator"),
        (["--output", "v.avi"], r"ending '\.avi'"),
        (["--output", "missing/v.mp4"], "is not a folder"),
        (["--config", "missing.yaml"], "config missing.yaml cannot be read"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(config, out, monkeypatch, arguments, message):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", pytest.fail)
    monkeypatch.chdir(out)
    result = run("generate", PROMPT, "--config", config, *arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
    assert os.listdir(out) == []


def test_a_record_that_would_replace_a_folder(config, out):
    (out / "v.json").mkdir()
    result = run("generate", PROMPT, "--config", config, "--output", out / "v.mp4")
    assert result.exit_code == 2
    assert "would replace a folder" in result.stderr
    assert os.listdir(out) == ["v.json"]


@pytest.mark.parametrize("prompt", [[], [""], ["  "]])
def test_an_empty_prompt(config, prompt):
    result = run("generate", *prompt, "--config", config)
    assert result.exit_code == 2
    assert "error: the prompt is empty" in result.stderr


def test_flags_that_do_not_exist_and_wrong_types():
    assert run("generate", PROMPT, "--framez", 3).exit_code == 2
    assert run("generate", PROMPT, "--frames", "many").exit_code == 2
    assert run("render").exit_code == 2


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("FluxPipeline", "expected a text-to-video pipeline"),
        ("WanImageToVideoPipeline", "which needs image; expected one that needs a prompt alone"),
        ("NoSuchPipeline", "which diffusers .* does not have"),
    ],
)
def test_pipelines_that_are_not_text_to_video(config, wan_folder, tmp_path, pipeline, message):
    folder = tmp_path / "other"
    shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    result = run("generate", PROMPT, "--config", config, "--model", folder)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


def test_strict_refuses_an_unknown_family(config, wan_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(wan_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "transformer": ["diffusers", "MotifVideoTransformer3DModel"]})
    )
    result = run("generate", PROMPT, "--config", config, "--model", folder, "--strict")
    assert result.exit_code == 3
    assert "of no known family" in result.stderr
    result = run("generate", PROMPT, "--config", config, "--model", folder, "--dry-run")
    assert result.exit_code == 0
    assert "no estimate: no sizes are known of MotifVideoTransformer3DModel" in result.output


@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_broken_weights_are_one_line(config, out, wan_folder, tmp_path, damage):
    folder = tmp_path / "broken"
    shutil.copytree(wan_folder, folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000] if damage == "cut" else b"\x00garbage" * 100)
    result = run("generate", PROMPT, "--config", config, "--model", folder, "--output", out / "v.mp4")
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "cannot be loaded" in lines[0] and "Download or save the model again" in lines[0]
    assert "Traceback" not in result.stderr
    assert os.listdir(out) == []


# -- generate: failures in the middle ----------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """Makes the transformer raise at its n-th call; gives the pipeline that was loaded."""
    from diffusers import WanTransformer3DModel

    from attnproc.pipelines import generate

    loaded, load, forward = [], generate.load, WanTransformer3DModel.forward

    def set_up(error, at):
        calls = []

        def fail(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise error
            return forward(self, *args, **kwargs)

        def keep(*args):
            pipe = load(*args)
            loaded.append((pipe, dict(pipe.transformer.attn_processors)))
            return pipe

        monkeypatch.setattr(WanTransformer3DModel, "forward", fail)
        monkeypatch.setattr(generate, "load", keep)
        return loaded

    return set_up


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("out\nof memory"), 1, "error: RuntimeError: out of memory"),
        (attnproc.UnsupportedError("no"), 3, "error: no"),
    ],
)
def test_a_failure_leaves_no_file_and_restores_the_pipeline(config, out, failing, error, code, message):
    loaded = failing(error, at=5)
    result = run("generate", PROMPT, "--config", config, "--output", out / "v.mp4")
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(out) == []
    (pipe, before), *_ = loaded
    assert attnproc.installed(pipe) is None
    after = pipe.transformer.attn_processors
    assert all(after[name] is before[name] for name in before)


def test_finished_videos_stay(config, out, failing):
    failing(KeyboardInterrupt(), at=12)  # 4 steps of 2 branches make one video
    result = run("generate", PROMPT, "--config", config, "--output", out / "v.gif", "--num-videos", 3)
    assert result.exit_code == 130
    assert sorted(os.listdir(out)) == ["v-1.gif", "v-1.json"]


def test_a_failure_in_the_dense_video_writes_nothing(config, out, failing):
    failing(KeyboardInterrupt(), at=15)  # 4 calls of warm-up, 8 sparse, then the dense ones
    result = run("generate", PROMPT, "--config", config, "--output", out / "v.gif", "--compare")
    assert result.exit_code == 130
    assert os.listdir(out) == []


def test_debug_shows_the_traceback(config, out, failing):
    failing(RuntimeError("boom"), at=1)
    result = run("--debug", "generate", PROMPT, "--config", config, "--output", out / "v.gif")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "RuntimeError: boom" in result.stderr


def test_a_video_that_is_not_finite_is_refused(config, out, monkeypatch):
    from diffusers import WanTransformer3DModel

    forward = WanTransformer3DModel.forward
    monkeypatch.setattr(
        WanTransformer3DModel, "forward", lambda self, **kwargs: (forward(self, **kwargs)[0] * float("nan"),)
    )
    result = run("generate", PROMPT, "--config", config, "--output", out / "v.gif")
    assert result.exit_code == 1
    assert "values that are not finite" in result.stderr and "--dtype float32" in result.stderr
    assert os.listdir(out) == []


# -- the other commands ------------------------------------------------------------------------------------------------


def test_estimate_is_that_of_python():
    arguments = ("--preset", "wan2.1-14b-720p", "--height", 768, "--width", 1280, "--frames", 69, "--batch", 2)
    result = run("estimate", "wan2.1-14b", *arguments, "--json")
    assert result.exit_code == 0, result.output
    expected = attnproc.estimate(
        "wan2.1-14b",
        processor=RadialAttnProcessor.from_preset("wan2.1-14b-720p"),
        height=768,
        width=1280,
        num_frames=69,
        batch=2,
    )
    assert json.loads(result.stdout) == json.loads(json.dumps(expected.to_dict()))
    table = run("estimate", "wan2.1-14b", *arguments)
    assert "69,120" in table.output and f"{expected.ceiling:.2f}x" in table.output


def test_estimate_of_a_folder(wan_folder):
    result = run(
        "estimate", wan_folder, "--height", 32, "--width", 32, "--frames", 17, "--attention", "dense", "--json"
    )
    assert json.loads(result.stdout)["grid"] == [5, 4, 4]


def test_estimate_of_a_pipeline_and_of_a_hub_id(wan_folder, monkeypatch):
    import huggingface_hub
    from diffusers import WanPipeline
    from huggingface_hub.errors import RemoteEntryNotFoundError

    asked = []

    def download(name, file):
        asked.append((name, file))
        if not (wan_folder / file).is_file():
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(wan_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    size = {"height": 32, "width": 32, "num_frames": 17, "steps": 4, "processor": RadialAttnProcessor(**SPARSE)}
    of_pipeline = attnproc.estimate(WanPipeline.from_pretrained(wan_folder), **size)
    of_hub = attnproc.estimate("owner/name", **size)
    assert of_pipeline.grid == (5, 4, 4) and of_pipeline.density < 1.0
    assert {**of_hub.to_dict(), "model": ""} == {**of_pipeline.to_dict(), "model": ""}
    files = [file for name, file in asked if name == "owner/name"]
    assert files == ["model_index.json", "transformer/config.json", "vae/config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wan2.1-14"], "Did you mean 'wan2.1-14b'"),
        (["shapes-image"], "is a UNet2DConditionModel, of which no sizes are known"),
        (["wan2.1-14b", "--height", 7], "multiple of 16"),
        (["wan2.1-14b", "--attention", "spars"], "method 'spars' is not known"),
        (["wan2.1-14b", "--batch", 0], "batch=0"),
        (["wan2.1-14b", "--quality", "high", "--preset", "ltx"], "expected one of them"),
    ],
)
def test_estimate_errors(arguments, message):
    result = run("estimate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("error: ")


def test_list_names_everything():
    from attnproc.families import FAMILIES
    from attnproc.methods import METHODS

    data = json.loads(run("list", "--json").stdout)
    assert set(data["methods"]) == set(METHODS) and all(data["methods"].values())
    assert data["presets"]["radial"] == json.loads(json.dumps(RadialAttnProcessor.presets()))
    assert data["families"] == {family.name: list(family.models) for family in FAMILIES}
    table = run("list").output
    for name in [*METHODS, "wan2.1-14b-720p", "WanTransformer3DModel"]:
        assert name in table


def test_doctor_tells_versions_devices_and_backends():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for text in ("diffusers", "attention backends", "triton", "flex", "libx264", "cpu"):
        assert text in result.output


def test_selftest_passes_here_and_fails_a_wrong_backend(monkeypatch):
    from attnproc.pipelines import doctor

    result = run("doctor", "--selftest", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.output
    right = doctor.block_sparse_attention

    def wrong(query, key, value, mask, **kwargs):
        out, lse = right(query, key, value, mask, **{**kwargs, "backend": "cpu"})
        return (out + 0.1 if kwargs["backend"] == "flex" else out), lse

    monkeypatch.setattr(doctor, "available_backends", lambda: {"flex": None, "cpu": None, "triton": "no GPU"})
    monkeypatch.setattr(doctor, "block_sparse_attention", wrong)
    result = run("doctor", "--selftest", "--device", "cpu", "--seed", 1)
    assert result.exit_code == 1
    assert "WRONG" in result.output
    told = result.stderr.partition("did not match")[0]
    assert "flex (torch.float32)" in told and "cpu" not in told and "triton" not in told


def test_selftest_holds_for_every_seed(monkeypatch):
    from attnproc.pipelines import doctor

    monkeypatch.setattr(doctor, "available_backends", lambda: {"cpu": None})
    for seed in range(15):  # some masks keep nothing at all
        checks = doctor.selftest(torch.device("cpu"), seed)
        assert len(checks) == 6 and all(check.passed for check in checks), (seed, checks)


def test_help_names_a_default_for_every_option():
    assert run("--help").exit_code == 0
    for command in ("generate", "calibrate", "inspect", "bench", "record", "estimate", "list", "doctor"):
        result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        options = re.findall(r"^│ (--[\w-]+).*$", result.output, flags=re.MULTILINE)
        for option in set(options) - {"--help"}:
            text = result.output.partition(f"│ {option} ")[2].partition("│ --")[0]
            assert "default" in text, f"{command} {option}"
