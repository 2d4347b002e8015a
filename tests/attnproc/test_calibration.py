"""Calibrations: files that are whole, never pickles, refused with every difference named; gathering that resumes."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

import attnproc
from attnproc.calibration import FORMAT, METADATA, Calibration, CalibrationProcessor, Component
from attnproc.errors import SettingsError, UnsupportedError
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import Dense

FACTS = {"model": "WanTransformer3DModel", "layers": 2, "heads": 3, "head_dim": 8, "grid": [3, 4, 5], "text_tokens": 6}
LAYOUT = TokenLayout((3, 4, 5), 6)
WAN = Denoiser("transformer", "WanTransformer3DModel", 2)


@dataclass(kw_only=True)
class SumProcessor(CalibrationProcessor):
    """Sums the keys of each layer, and in a second round counts the calls."""

    name: ClassVar[str] = "sum-calibration"
    method: ClassVar[str] = "sum"
    rounds: ClassVar[tuple[str, ...]] = ("keys", "calls")
    factor: float = 1.0

    def observe(self, component, call):
        value = call.key.sum() * self.factor if self.round == "keys" else torch.ones(())
        self.accumulator.add(f"{component}.{self.round}.{call.layer}", value)

    def finish(self, about=None):
        return Calibration(self.method, self.header(about), self.accumulator.sums)


def call_of(layer=0, denoiser=WAN, layout=LAYOUT, heads=3):
    tensors = torch.randn(3, 2, heads, layout.tokens, 8)
    return AttentionCall(*tensors, layout, Step(0, 4, "cond", layout.grid), layer, denoiser, {}, {})


def calibration(names=("transformer",), **header):
    components = {name: dict(FACTS) for name in names}
    tensors = {"half": torch.randn(4, 3).half(), "bits": torch.randint(256, (2, 5, 7), dtype=torch.uint8)}
    return Calibration("sum", {"components": components, "settings": {"block_size": 64}, **header}, tensors)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path):
    made = calibration(about={"model": "tiny", "prompts": ["a", "ü"]})
    made.save(tmp_path / "plan.safetensors")
    found = Calibration.load(tmp_path / "plan.safetensors")
    assert (found.method, found.header) == ("sum", made.header)
    assert set(found.tensors) == set(made.tensors) and len(found.tensors) == 2
    for name, tensor in made.tensors.items():
        assert torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype
    with pytest.raises(KeyError):
        found.tensors["other"]


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    whole = torch.randn(4, 6)
    Calibration("sum", calibration().header, {"turned": whole.mT, "part": whole[1:3]}).save(tmp_path / "p.safetensors")
    found = Calibration.load(tmp_path / "p.safetensors").tensors
    assert torch.equal(found["turned"], whole.mT) and torch.equal(found["part"], whole[1:3])


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = tmp_path / "plan.safetensors"
    first = calibration()
    first.save(path)

    def fail(tensors, file, metadata):
        file.write_bytes(b"half of a fi")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises((SettingsError, KeyboardInterrupt)):
        calibration().save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(Calibration.load(path).tensors["half"], first.tensors["half"])


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere.*cannot be written"):
        calibration().save(tmp_path / "nowhere" / "plan.safetensors")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_pickles_are_never_opened(tmp_path):
    path = tmp_path / "plan.safetensors"
    torch.save({"bomb": Bomb()}, path)
    with pytest.raises(SettingsError, match=r"not a safetensors file.*attnproc calibrate"):
        Calibration.load(path)


def test_no_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(SettingsError, match=r"calibration .*attnproc calibrate"):
            Calibration.load(path)


def header_of(**changes):
    return {"format": FORMAT, "method": "sum", "components": {"transformer": FACTS}, **changes}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "expected was a calibration"),
        ({METADATA: "{broken"}, "expected was a calibration"),
        ({METADATA: "[1]"}, "expected was a calibration"),
        ({METADATA: json.dumps(header_of(format=0))}, f"format version 0; expected {FORMAT}"),
        ({METADATA: json.dumps({"method": "sum"})}, "format version None"),
        ({METADATA: json.dumps(header_of(components={"transformer": {"model": "Wan"}}))}, "incomplete.*layers"),
        ({METADATA: json.dumps(header_of(components={"transformer": {**FACTS, "grid": [3, 4]}}))}, "incomplete"),
        ({METADATA: json.dumps(header_of(components=[1]))}, "incomplete"),
        ({METADATA: json.dumps(header_of(components={}))}, "incomplete.*components"),
        ({METADATA: json.dumps({"format": FORMAT, "components": {}})}, "incomplete.*method"),
    ],
)
def test_a_header_must_be_one_of_ours(tmp_path, metadata, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(SettingsError, match=message):
        Calibration.load(tmp_path / "x.safetensors")


# -- whether a calibration fits ----------------------------------------------------------------------------------------


def test_what_fits_gives_the_component():
    made = calibration(("transformer", "transformer_2"))
    for name in ("transformer", "transformer_2"):
        denoiser = Denoiser(name, "WanTransformer3DModel", 2)
        found = made.require(
            method="sum", layout=LAYOUT, denoiser=denoiser, heads=3, head_dim=8, block_size=64, density=None
        )
        assert found == name
    assert made.require(method="sum", layout=LAYOUT) == "transformer"
    ragged = TokenLayout((3, 4, 5), 6, torch.tensor([6, 2]))
    assert made.require(method="sum", layout=ragged) == "transformer", "padding is no matter of the calibration"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "paro"}, "method sum, not paro"),
        ({"layout": TokenLayout((4, 3, 5), 6)}, r"latent grid \(3, 4, 5\), not \(4, 3, 5\)"),
        ({"layout": TokenLayout((3, 4, 5))}, "text tokens 6, not 0"),
        ({"heads": 6}, "heads 3, not 6"),
        ({"head_dim": 64}, "head_dim 8, not 64"),
        ({"block_size": 128}, "block_size 64, not 128"),
        ({"density": 0.5}, r"density None, not 0\.5"),
        ({"denoiser": Denoiser("transformer", "MochiTransformer3DModel", 2)}, "model Wan.*, not Mochi"),
        ({"denoiser": Denoiser("transformer", "WanTransformer3DModel", 30)}, "layers 2, not 30"),
        (
            {"denoiser": Denoiser("transformer_2", "WanTransformer3DModel", 2)},
            "component transformer, not transformer_2",
        ),
    ],
    ids=str,
)
def test_each_difference_is_named_alone(change, message):
    facts = {"method": "sum", "layout": LAYOUT, "denoiser": WAN, "heads": 3, "head_dim": 8, "block_size": 64}
    with pytest.raises(SettingsError, match=message) as error:
        calibration().require(**{**facts, **change})
    assert ";" not in str(error.value).partition(". ")[0], "nothing else differs"


def test_several_differences_are_named_together():
    with pytest.raises(
        SettingsError, match=r"method sum, not paro; .*; text tokens 6, not 7; heads 3, not 4.*calibrate"
    ):
        calibration().require(method="paro", layout=TokenLayout((3, 4, 6), 7), heads=4)


@pytest.mark.parametrize(
    ("names", "denoiser", "found"),
    [
        (["transformer"], "", "transformer"),
        (["model"], "transformer", "model"),
        (["model"], "", "model"),
        (["transformer"], "unet", None),
        (["transformer", "transformer_2"], "", None),
        (["transformer", "transformer_2"], "transformer_2", "transformer_2"),
    ],
)
def test_a_bare_model_takes_the_only_component(names, denoiser, found):
    assert calibration(names).component(Denoiser(denoiser, "WanTransformer3DModel", 2)) == found


# -- gathering ---------------------------------------------------------------------------------------------------------


def walk(processor, prompts=1):
    for _ in range(prompts):
        for layer in range(2):
            assert processor.plan(call_of(layer)) == Dense()
        processor.end_prompt()


def test_rounds_follow_each_other():
    processor = SumProcessor()
    assert (processor.round, processor.prompts, processor.done) == ("keys", 0, False)
    walk(processor, 2)
    assert processor.prompts == 2
    processor.end_round()
    assert (processor.round, processor.prompts, processor.done) == ("calls", 0, False)
    walk(processor)
    processor.end_round()
    assert processor.done and processor.round == "finished"
    assert set(processor.accumulator.sums) == {
        f"transformer.{what}.{n}" for what in ("keys", "calls") for n in range(2)
    }
    assert processor.accumulator.components == {"transformer": Component.read(FACTS)}
    before = dict(processor.accumulator.sums)
    processor.plan(call_of())
    assert processor.accumulator.sums == before, "a finished calibration watches no more"


def test_sums_add_up_and_leave_the_tensors_alone():
    processor, calls = SumProcessor(), [call_of() for _ in range(3)]
    copies = [call.key.clone() for call in calls]
    for call in calls:
        processor.plan(call)
    torch.testing.assert_close(processor.accumulator.sums["transformer.keys.0"], sum(key.sum() for key in copies))
    assert all(torch.equal(call.key, key) for call, key in zip(calls, copies, strict=True))
    x = torch.ones(2)
    processor.accumulator.add("x", x)
    processor.accumulator.add("x", x)
    assert processor.accumulator.sums["x"].tolist() == [2, 2] and x.tolist() == [1, 1]


def test_a_round_without_a_prompt_cannot_end():
    processor = SumProcessor()
    processor.plan(call_of())
    with pytest.raises(SettingsError, match=r"round 'keys'.*0 prompts"):
        processor.end_round()


def test_layers_that_were_never_seen_are_named():
    processor = SumProcessor()
    processor.plan(call_of(1))
    processor.end_prompt()
    with pytest.raises(UnsupportedError, match="layers 0 of transformer"):
        processor.end_round()


def test_a_component_must_be_there_from_the_first_round_on():
    processor = SumProcessor()
    walk(processor)
    processor.end_round()
    with pytest.raises(UnsupportedError, match=r"transformer_2.*first in round 2"):
        processor.plan(call_of(denoiser=Denoiser("transformer_2", "WanTransformer3DModel", 2)))


@pytest.mark.parametrize("other", [{"layout": TokenLayout((3, 4, 6), 6)}, {"heads": 2}], ids=str)
def test_one_calibration_is_for_one_size(other):
    processor = SumProcessor()
    processor.plan(call_of())
    with pytest.raises(UnsupportedError, match="expected one size"):
        processor.plan(call_of(1, **other))


def test_an_interrupted_calibration_goes_on_where_it_was_saved(tmp_path):
    path = tmp_path / "partial.safetensors"
    processor = SumProcessor(factor=2.0, dense_steps=(0, 0))
    walk(processor, 2)
    processor.end_round()
    walk(processor)
    processor.state().save(path)
    resumed = SumProcessor(factor=2.0)
    resumed.restore(Calibration.load(path))
    assert (resumed.round, resumed.prompts) == ("calls", 1)
    for each in (processor, resumed):
        walk(each)
        each.end_round()
    assert resumed.accumulator.sums.keys() == processor.accumulator.sums.keys()
    assert all(torch.equal(resumed.accumulator.sums[name], x) for name, x in processor.accumulator.sums.items())
    path.unlink()
    assert resumed.finish().header == processor.finish().header, "what was restored does not need its file"


def test_a_state_of_other_settings_or_a_finished_one_is_refused():
    processor = SumProcessor(factor=2.0)
    walk(processor)
    with pytest.raises(SettingsError, match=r"'factor': 2\.0.*'factor': 3\.0"):
        SumProcessor(factor=3.0).restore(processor.state())
    with pytest.raises(SettingsError, match="a finished calibration"):
        SumProcessor(factor=2.0).restore(processor.finish())


def test_a_state_is_no_calibration():
    processor = SumProcessor()
    walk(processor)
    with pytest.raises(SettingsError, match="finished False, not True"):
        processor.state().require(method="sum", layout=LAYOUT)
    assert processor.finish().require(method="sum", layout=LAYOUT) == "transformer"


def test_objects_do_not_share_what_they_saw():
    first, second = SumProcessor(), SumProcessor()
    walk(first)
    assert first == second, "they have the same settings"
    assert not second.accumulator.sums and second.prompts == 0
    assert "accumulator" not in first.to_dict()["settings"]


def test_watching_changes_nothing(video_family, run):
    model, inputs = video_family.model(), video_family.inputs(2)
    expected = run(model, inputs)
    processor = SumProcessor()
    attnproc.install(model, processor)
    assert torch.equal(run(model, inputs), expected)
    (component,) = processor.accumulator.components.values()
    assert (component.model, component.layers) == (video_family.model_class, video_family.sites)
    assert processor.accumulator.calls == {f"model.{n}": 1 for n in range(video_family.sites)}
    assert attnproc.report(model).density == 1.0
