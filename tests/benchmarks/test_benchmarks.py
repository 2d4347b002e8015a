"""The benchmarks run, check what they time, and save what they print. Their numbers are not asserted here."""

import json

import pytest
import torch

pytest.importorskip("benchmarks", reason="an installed package has no benchmarks folder")
from benchmarks import attention, kernels, timing


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
    module.main()


def test_attention_saves_rows_with_their_limit(monkeypatch, tmp_path):
    run(attention, monkeypatch, "--quick", "--no-peers", "--output", tmp_path)
    (path,) = tmp_path.glob("attention-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["mask"] for row in rows] == list(attention.MASKS)
    for row in rows:
        assert row["limit"] == pytest.approx(1 / row["density"])
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ours_ms"])
        assert row["of_limit"] == pytest.approx(row["speedup"] * row["density"])
    assert path.with_suffix(".md").read_text().count("|\n") >= len(rows) + 2


def test_kernels_saves_every_part(monkeypatch, tmp_path):
    run(kernels, monkeypatch, "--quick", "--output", tmp_path)
    (path,) = tmp_path.glob("kernels-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} == {"block shape", "option", "quantization", "backward", "planning"}
    failed = [row for row in rows if row["ms"] is None]
    assert not failed, failed


def test_a_contender_with_another_result_is_not_timed():
    right = torch.randn(1, 2, 8, 4)
    assert attention.checked("twin", lambda: right.clone(), right) == ""
    assert "differs from ours" in attention.checked("other", lambda: right + 1.0, right)

    def broken():
        raise RuntimeError("out of shared memory")

    assert "out of shared memory" in attention.checked("broken", broken, right)


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.in_turn(calls, 3, timing.clock("cpu"))
    assert order == list("ab") * 4 and {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("kind", attention.MASKS)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_masks_have_about_the_density_asked_for(kind, density):
    work = attention.Workload("", 4, 4096, 16, torch.float32)
    mask = attention.make_mask(kind, density, work, "cpu")
    assert mask.density == pytest.approx(density, abs=0.06)
    assert bool(mask.to_blocks().diagonal(dim1=-2, dim2=-1).all())
