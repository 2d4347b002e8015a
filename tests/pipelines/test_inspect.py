"""`attnproc inspect`: its numbers are those of the run, its picture shows them, and the run is not changed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from attnproc.errors import SettingsError
from attnproc.kernels import BlockMask, Ranges, scores
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.pipelines import cli, inspection, pictures
from attnproc.processor import Plan
from attnproc.sparse.radial import RadialAttnProcessor

PROMPT = "a red circle moving right"
SMALL = ("--frames", 17, "--height", 32, "--width", 32, "--steps", 4)
SETTINGS = ("block_size=16", "band_limit=16", "max_density=1.0", "dense_layers=0", "decay_factor=0.2")
SPARSE = [part for setting in SETTINGS for part in ("--set", setting)]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def make_call(grid=(3, 4, 4), text=0, heads=2, batch=1):
    layout = TokenLayout(grid, text)
    tensors = [torch.randn(batch, heads, layout.tokens, 8) for _ in range(3)]
    step = Step(1, 4, "cond", grid)
    return AttentionCall(*tensors, layout, step, 0, Denoiser("transformer", "WanTransformer3DModel", 2), {}, {})


def test_writes_numbers_and_a_picture_of_the_run(wan_folder, tmp_path):
    path = tmp_path / "seen.png"
    result = run("inspect", PROMPT, "--model", wan_folder, *SMALL, *SPARSE, "--heads", "1:0", "--output", path)
    assert result.exit_code == 0, result.output
    data = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    # Steps 0 and 3 are dense, so 2 steps x 2 branches x 2 layers are sparse.
    assert (data["sparse_calls"], data["dense_calls"], data["steps"], data["layers"]) == (8, 8, 4, 2)
    assert {(c["step"], c["branch"], c["layer"]) for c in data["calls"]} == {
        (step, branch, layer) for step in (1, 2) for branch in ("cond", "uncond") for layer in (0, 1)
    }
    for call in data["calls"]:
        assert np.shape(call["density"]) == np.shape(call["recall"]) == (1, 2)
        assert np.allclose(call["density"], data["sparse_density"])
        assert 0.0 < np.min(call["recall"]) <= np.max(call["recall"]) <= 1.0
    assert data["planning_seconds"] > 0.0 and data["attention_seconds"] > 0.0
    picture = Image.open(path)
    assert picture.width > 600 and len(set(picture.convert("L").getdata())) > 10


def test_the_video_is_that_of_the_method_alone(wan_folder, tmp_path):
    """Watching must not change what is watched."""
    import diffusers

    import attnproc

    pipe = diffusers.DiffusionPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    processor = RadialAttnProcessor(
        block_size=16, band_limit=16, max_density=1.0, dense_layers=0, dense_steps=1, decay_factor=0.2
    )

    def video():
        call = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 3, "output_type": "np"}
        return pipe(PROMPT, generator=torch.Generator().manual_seed(1), **call).frames

    pipe.attn_processor = processor
    plain, report = video(), attnproc.report(pipe)
    pipe.attn_processor = inspection.InspectingProcessor(inner=processor)
    assert np.array_equal(plain, video())
    watched = attnproc.report(pipe)
    assert watched.density == report.density and watched.settings == report.settings


def test_recall_and_density_are_those_of_the_plan():
    call = make_call()
    kept = torch.rand(1, 2, 3, 3) < 0.6
    kept |= torch.eye(3, dtype=torch.bool)
    mask = BlockMask.from_blocks(kept, 48, 48, (16, 16))
    inspector = inspection.InspectingProcessor(inner=RadialAttnProcessor())
    inspector._note(call, Plan(mask))
    (seen,) = inspector.observations
    assert np.allclose(seen.density, kept.double().mean((-1, -2)))
    weights = (call.query.double() @ call.key.double().transpose(-1, -2) * 8**-0.5).softmax(-1)
    expected = (weights * mask.token_mask()).sum(-1).mean(-1)
    torch.testing.assert_close(torch.tensor(seen.recall).double(), expected, atol=1e-5, rtol=1e-5)
    assert scores.recall(call.query, call.key, mask).tolist() == seen.recall


def test_a_view_shows_what_the_middle_query_sees_through_order_and_rule():
    call = make_call(grid=(2, 4, 4), text=5)
    order = torch.stack([torch.randperm(37), torch.randperm(37)]).int()
    place = torch.randint(0, 4, (37, 1)).int()
    low = torch.randint(0, 3, (37, 1)).int()
    rule = Ranges(place, low, low + 2)
    whole, partial = torch.rand(1, 2, 3, 3) < 0.4, torch.rand(1, 2, 3, 3) < 0.5
    mask = BlockMask.from_blocks(whole, 37, 37, (16, 16), partial=partial, rule=rule)
    for head in range(2):
        view = inspection.view_of(call, Plan(mask, token_order=order), head)
        token = (1 * 4 + 2) * 4 + 2
        position = order[head].long().argsort()
        expected = mask.token_mask()[0, head][position[token]][position][:32].view(2, 4, 4)
        assert view.query == (1, 2, 2) and np.array_equal(view.seen > 0, expected.numpy())
        assert np.array_equal(view.blocks, mask.to_blocks()[0, head].numpy())


def test_tables_leave_dense_calls_empty():
    seen = [inspection.Observation(2, "cond", 1, "transformer", [[0.5, 0.3]], [[0.9, 0.7]])]
    by_step = pictures.table(seen, "recall", "step", 4, 3)
    assert by_step[1, 2] == pytest.approx(0.8) and np.isnan(by_step).sum() == 11
    by_head = pictures.table(seen, "density", "head", 2, 3)
    assert by_head[1].tolist() == [0.5, 0.3] and np.isnan(by_head).sum() == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--heads", "7"), "layer:head"),
        (("--heads", "9:0"), "expected one of 2"),
        (("--heads", "1:5"), "head 5 was asked for; expected one of 2"),
        (("--output", "a.jpg"), "not a PNG"),
        (("--attention", "nearest"), "is not known"),
    ],
)
def test_bad_requests_are_named(wan_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run("inspect", PROMPT, "--model", wan_folder, *SMALL, *SPARSE, *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_heads_are_read_from_text():
    assert inspection.parse_heads(" 0:1, 12:3,") == ((0, 1), (12, 3))
    with pytest.raises(SettingsError, match="layer:head"):
        inspection.parse_heads("0:a")
