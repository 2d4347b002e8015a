"""`attnproc bench` and `attnproc record`: every number can be found again by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from attnproc.kernels import block_sparse_attention, scores
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.pipelines import cli, comparison
from attnproc.pipelines.comparison import compare_recorded
from attnproc.pipelines.recording import Recording, RecordingProcessor
from attnproc.sparse.radial import RadialAttnProcessor

PROMPT = "a red circle moving right"
SMALL = ("--frames", 17, "--height", 32, "--width", 32, "--steps", 4)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def small_radial(monkeypatch):
    """Radial with defaults for the 16 tokens per frame of the tiny model."""
    small = {"block_size": 16, "band_limit": 16, "dense_steps": 1, "dense_layers": 0}
    monkeypatch.setattr(RadialAttnProcessor, "presets", classmethod(lambda cls: SmallPresets(small)))


class SmallPresets(dict):
    def __init__(self, settings):
        self.settings = settings

    def get(self, name, default=None):
        return {"settings": self.settings}


@pytest.fixture
def recorded(wan_folder, tmp_path):
    folder = tmp_path / "recording"
    result = run(
        "record", PROMPT, "--model", wan_folder, *SMALL, "--at-steps", "1,3", "--layers", "1", "--output", folder
    )
    assert result.exit_code == 0, result.output
    return folder


def test_a_recording_holds_the_calls_that_were_asked_for(recorded):
    recording = Recording.open(recorded)
    calls = [recording.call(n, {}, {}) for n in range(len(recording))]
    assert [(c.step.index, c.step.branch, c.layer) for c in calls] == [
        (step, branch, 1) for step in (1, 3) for branch in ("cond", "uncond")
    ]
    for call in calls:
        assert call.query.shape == call.key.shape == call.value.shape == (1, 2, 80, 16)
        assert call.layout.grid == (5, 4, 4) and call.denoiser.model == "WanTransformer3DModel" and call.step.total == 4
    assert not torch.equal(calls[0].query, calls[1].query)


def test_numbers_on_a_recording_are_those_of_the_method(recorded, small_radial):
    recording = Recording.open(recorded)
    (row,) = compare_recorded(recording, ["radial"], [0.6])
    call = recording.call(0, {}, {})
    processor = RadialAttnProcessor.from_settings(row.settings)
    mask = processor.plan(call).mask
    assert row.density == pytest.approx(mask.density) and abs(mask.density - 0.6) < 0.15
    errors, recalls = [], []
    for n in range(len(recording)):
        call = recording.call(n, {}, {})
        exact = scaled_dot_product_attention(call.query, call.key, call.value)
        out = block_sparse_attention(call.query, call.key, call.value, mask)
        errors.append(float((out - exact).abs().sum() / exact.abs().sum()))
        recalls.append(float(scores.recall(call.query, call.key, mask).mean()))
    assert row.error == pytest.approx(np.mean(errors), rel=1e-4)
    assert row.recall == pytest.approx(np.mean(recalls), rel=1e-4)


def test_bench_on_a_recording_writes_plot_and_numbers(recorded, small_radial, tmp_path):
    path = tmp_path / "offline.png"
    result = run("bench", "--methods", "radial", "--density", "0.9,0.6", "--recorded", recorded, "--output", path)
    assert result.exit_code == 0, result.output
    assert "paro" in comparison.default_methods(on_recording=False)
    assert "paro" not in comparison.default_methods(on_recording=True)
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [(row["method"], row["target"]) for row in rows] == [("radial", 0.9), ("radial", 0.6)]
    assert rows[0]["density"] > rows[1]["density"] and rows[0]["error"] < rows[1]["error"]
    assert Image.open(path).width > 500


def test_bench_in_runs_compares_with_dense_at_equal_seeds(wan_folder, small_radial, tmp_path):
    prompts, path = tmp_path / "prompts.txt", tmp_path / "runs.png"
    prompts.write_text("# two prompts\na red circle\n\na circle moving right\n")
    arguments = ("--methods", "radial", "--density", "1.0,0.6", "--prompts", prompts, "--seed", 3, "--output", path)
    result = run("bench", "--model", wan_folder, *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(path.with_suffix(".json").read_text())
    assert [case["seed"] for case in data["cases"]] == [3, 4]
    most, some = data["rows"]
    assert some["density"] < most["density"] and some["psnr"] < most["psnr"] and some["recall"] < most["recall"]
    # Step 0 of 4 is dense.
    assert some["run_density"] == pytest.approx(0.25 + 0.75 * some["density"])
    assert some["success"] is None and some["psnr_min"] <= some["psnr"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--methods", "radial,nothing"), "method 'nothing' is not known"),
        (("--methods", "dense"), "expected sparse methods"),
        (("--density", "0"), "expected numbers above 0.0"),
        (("--density", "half"), "not a list of numbers"),
        (("--recorded", "nowhere"), "not a recording"),
        (("--model", "WAN"), "came without prompts"),
        (("--cases", "0"), "cases=0 is not possible"),
        (("--recorded", "nowhere", "--steps", "3", "--model", "WAN"), "came with --model, --steps"),
    ],
)
def test_bad_requests_are_named_before_anything_runs(wan_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("bench", *(str(wan_folder) if a == "WAN" else a for a in arguments))
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_recording_is_not_written_over_and_must_be_whole(recorded, wan_folder):
    again = run(
        "record", PROMPT, "--model", wan_folder, *SMALL, "--at-steps", "1", "--layers", "0", "--output", recorded
    )
    assert again.exit_code == 2 and "is not empty" in again.output
    (recorded / "0001.safetensors").unlink()
    result = run("bench", "--methods", "radial", "--recorded", recorded, "--output", recorded / "x.png")
    assert result.exit_code == 2 and "lacks 0001.safetensors" in " ".join(result.output.split())


def test_an_interrupted_recording_leaves_nothing(wan_folder, tmp_path, monkeypatch):
    from attnproc.pipelines.recording import RecordingProcessor

    whole, folder = RecordingProcessor._write, tmp_path / "r"

    def stops(self, call):
        if self.calls:
            raise KeyboardInterrupt
        whole(self, call)

    monkeypatch.setattr(RecordingProcessor, "_write", stops)
    arguments = (PROMPT, "--model", wan_folder, *SMALL, "--at-steps", "1", "--layers", "0,1", "--output", folder)
    assert run("record", *arguments).exit_code == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(RecordingProcessor, "_write", whole)
    assert run("record", *arguments).exit_code == 0 and len(Recording.open(folder)) == 4


@pytest.mark.parametrize("steps, layers, message", [("4", "0", "from 0 to 3"), ("0", "2", "from 0 to 1")])
def test_steps_and_layers_beyond_the_run_are_refused(wan_folder, tmp_path, steps, layers, message):
    folder = tmp_path / "r"
    result = run(
        "record", PROMPT, "--model", wan_folder, *SMALL, "--at-steps", steps, "--layers", layers, "--output", folder
    )
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_settings_of_bench_hold_on_a_recording(recorded, tmp_path):
    path = tmp_path / "x.png"
    arguments = ("--methods", "sparge", "--density", "0.5", "--recorded", recorded, "--output", path)
    result = run("bench", *arguments, "--set", "block_size=16", "--set", "min_tokens=0", "--set", "backend=oracle")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert (row["settings"]["block_size"], row["settings"]["backend"]) == (16, "oracle") and row["density"] < 0.7
    result = run("bench", *arguments, "--set", "blocks=16")
    assert result.exit_code == 2 and "no setting 'blocks'" in " ".join(result.output.split())


def test_fallbacks_are_counted_over_all_cases(wan_folder, tmp_path):
    prompts, path = tmp_path / "prompts.txt", tmp_path / "runs.png"
    prompts.write_text("a red circle\na circle moving right\n")
    arguments = ("--methods", "sparge", "--density", "0.5", "--prompts", prompts, "--output", path)
    result = run("bench", "--model", wan_folder, *SMALL, *arguments, "--set", "dense_layers=0")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.with_suffix(".json").read_text())["rows"]
    # 4 steps, 2 layers, 2 branches, 2 prompts
    assert list(row["fallbacks"].values()) == [32]


def test_padding_has_no_part_in_the_numbers_on_a_recording(tmp_path):
    grid, text, valid = (3, 4, 4), 40, 5
    whole = torch.randn(3, 1, 2, 48 + text, 16)
    rows = []
    for name, layout in (("padded", TokenLayout(grid, text, torch.tensor([valid]))), ("short", TokenLayout(grid, 5))):
        recorder = RecordingProcessor(folder=tmp_path / name, steps=(1,), layers=(0,))
        recorder.folder.mkdir()
        call = AttentionCall(
            *whole[:, :, :, : layout.tokens], layout, Step(1, 4, "cond", grid), 0, Denoiser("", "M", 1), {}, {}
        )
        recorder.plan(call)
        recording = Recording(recorder.folder, {"model": "M", "calls": recorder.calls})
        settings = {"block_size": 16, "min_tokens": 0, "search_steps": (1,)}
        rows += compare_recorded(recording, ["adaspa"], [0.4], settings)
    padded, short = rows
    assert padded.recall == pytest.approx(short.recall, abs=1e-5) and padded.recall < 0.95
    assert padded.error == pytest.approx(short.error, rel=1e-4)
