"""`attnproc calibrate`: resumable, strict about what it goes on from, and its plans run."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from attnproc.calibration import Calibration
from attnproc.pipelines import calibrate, cli

SMALL = ("--frames", 17, "--height", 32, "--width", 32, "--steps", 4)
BLOCK = ("--set", "block_size=16")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n# no prompt\n\na circle moving right\n")
    return path


def make(wan_folder, prompts, output, *more):
    arguments = ("--model", wan_folder, *SMALL, "--prompts", prompts, "--output", output)
    return run("calibrate", *arguments, *(more or ("--attention", "paro", "--density", 0.5, *BLOCK)))


@pytest.fixture
def plan(wan_folder, prompts, tmp_path):
    path = tmp_path / "plan.safetensors"
    result = make(wan_folder, prompts, path)
    assert result.exit_code == 0, result.output
    return path


def test_a_plan_is_made_and_used(plan, wan_folder, tmp_path):
    calibration = Calibration.load(plan)
    assert calibration.method == "paro" and calibration.header["about"]["prompts"] == [
        "a red circle",
        "a circle moving right",
    ]
    assert not calibrate.partial_path(plan).exists()
    result = run(
        "generate", "a red circle", "--model", wan_folder, *SMALL, "--attention", "paro", "--plan", plan, *BLOCK,
        "--set", "min_tokens=0", "--output", tmp_path / "v.gif",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    sites = json.loads((tmp_path / "v.json").read_text())["report"]["sites"]
    assert all(site["sparse_calls"] and site["density_mean"] < 1.0 for site in sites)


@pytest.mark.parametrize("when", range(4))
def test_an_interrupted_calibration_goes_on_to_the_same_plan(plan, wan_folder, prompts, tmp_path, monkeypatch, when):
    """Two rounds of two prompts, stopped in each of the four runs."""
    other, whole, runs = tmp_path / "other.safetensors", calibrate.run_once, []

    def stops(*arguments):
        runs.append(arguments[3])
        if len(runs) == when + 1:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(calibrate, "run_once", stops)
    assert make(wan_folder, prompts, other).exit_code == 130
    assert not other.exists() and calibrate.partial_path(other).exists() == (when > 0)
    monkeypatch.setattr(calibrate, "run_once", lambda *a: runs.append(a[3]) or whole(*a))
    result = make(wan_folder, prompts, other)
    assert result.exit_code == 0, result.output
    assert len(runs) == 5 and not calibrate.partial_path(other).exists()  # 4 and the one that was stopped
    expected, found = load_file(plan), load_file(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_was_begun_differently_is_not_gone_on_with(wan_folder, prompts, tmp_path, monkeypatch):
    path, whole = tmp_path / "plan.safetensors", calibrate.run_once

    def stops(*arguments):
        if "2 of 2" in arguments[3]:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(calibrate, "run_once", stops)
    assert make(wan_folder, prompts, path).exit_code == 130
    monkeypatch.setattr(calibrate, "run_once", whole)
    for more, message in (
        (("--attention", "paro", "--density", 0.25, *BLOCK), "with settings"),
        (("--attention", "paro", "--density", 0.5, *BLOCK, "--seed", 5), "with other seed"),
    ):
        result = make(wan_folder, prompts, path, *more)
        assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["grid", "steps"])
def test_a_plan_for_another_size_is_refused_with_the_difference(plan, wan_folder, tmp_path, name):
    size = {"grid": ("--frames", 9), "steps": ("--steps", 8)}[name]
    result = run(
        "generate", "a red circle", "--model", wan_folder, *SMALL, *size, "--attention", "paro", "--plan", plan, *BLOCK,
        "--set", "min_tokens=0", "--output", tmp_path / "v.gif",
    )  # fmt: skip
    if name == "steps":  # slots are shares of a run, so a plan serves runs of any length
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code == 2 and "(5, 4, 4)" in result.output and "(3, 4, 4)" in result.output


@pytest.mark.parametrize(
    "more, message",
    [
        (("--attention", "radial"), "method with a calibration 'radial' is not known"),
        (("--attention", "paro", "--max-error", 0.05), "not calibrated by max_error"),
        (("--attention", "sparge", "--density", 0.5), "not calibrated by density"),
        (("--attention", "paro", "--density", 2.0), "density"),
        (("--output", "plan.pt"), "not a safetensors file"),
    ],
)
def test_bad_requests_are_named(wan_folder, prompts, tmp_path, more, message):
    result = make(wan_folder, prompts, tmp_path / "plan.safetensors", *more)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_sparge_is_tuned_to_an_error(wan_folder, prompts, tmp_path):
    path = tmp_path / "tuned.safetensors"
    more = ("--attention", "sparge", "--max-error", 0.1, *BLOCK, "--set", "steps=1", "--set", "query_blocks=2")
    result = make(wan_folder, prompts, path, *more)
    assert result.exit_code == 0, result.output
    settings = Calibration.load(path).header["settings"]
    assert (settings["l1"], settings["pv_l1"]) == (0.1, pytest.approx(0.12))


def test_methods_without_a_plan_refuse_one(wan_folder, plan, tmp_path):
    result = run("generate", "a", "--model", wan_folder, *SMALL, "--plan", plan, "--output", tmp_path / "v.gif")
    assert result.exit_code == 2 and "radial takes none" in result.output


@pytest.mark.parametrize(
    "text, message", [("", "has no prompt"), ("# a\n\n", "has no prompt"), (None, "cannot be read")]
)
def test_a_file_without_prompts_is_named(tmp_path, text, message):
    path = tmp_path / "p.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        calibrate.read_prompts(path)
