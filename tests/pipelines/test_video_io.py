"""Videos are readable, right in size and number, and never half-written."""

import json
import os

import av
import numpy as np
import pytest
from imageio import v3

from attnproc.errors import AttnProcError, SettingsError
from attnproc.pipelines.video_io import check_output, write_video


@pytest.fixture
def video():
    """Smooth, and every frame different (a gif merges equal ones)."""
    rows, columns, time = np.meshgrid(np.arange(24), np.arange(32), np.arange(7), indexing="ij")
    picture = np.stack([rows / 24, columns / 32, time / 7], axis=-1)
    return picture.transpose(2, 0, 1, 3).astype(np.float32)


def _read(path):
    if path.is_dir():
        return np.stack([v3.imread(file) for file in sorted(path.iterdir())])
    return v3.imread(path, plugin="pyav" if path.suffix == ".mp4" else "pillow")


@pytest.mark.parametrize(("name", "error"), [("v.mp4", 12), ("v.gif", 40), ("v", 1)])
@pytest.mark.parametrize("upscale", [1, 3])
def test_reads_back(tmp_path, video, name, error, upscale):
    path = tmp_path / name
    check_output(path)
    write_video(path, video, 8, upscale=upscale, about={})
    found = _read(path)[..., :3]
    assert found.shape == (7, 24 * upscale, 32 * upscale, 3)
    expected = (video * 255).repeat(upscale, axis=1).repeat(upscale, axis=2)
    assert np.abs(found.astype(float) - expected).max() <= error
    assert os.listdir(tmp_path) == [name]


def test_pictures_are_exact(tmp_path, video):
    write_video(tmp_path / "v", video, 8, about={})
    assert sorted(os.listdir(tmp_path / "v"))[:2] == ["frame-0000.png", "frame-0001.png"]
    assert np.array_equal(_read(tmp_path / "v"), (video * 255).round().astype(np.uint8))


def test_mp4_has_rate_and_comment(tmp_path, video):
    write_video(tmp_path / "v.mp4", video, 8, about={"prompt": "a red “circle”", "seed": 3})
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 8
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert json.loads(container.metadata["comment"]) == {"prompt": "a red “circle”", "seed": 3}


def test_gif_has_rate_and_loops(tmp_path, video):
    write_video(tmp_path / "v.gif", video, 8, about={})
    metadata = v3.immeta(tmp_path / "v.gif", plugin="pillow")
    assert metadata["duration"] == pytest.approx(120, abs=10)  # gif counts in hundredths of a second
    assert metadata["loop"] == 0


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v"])
def test_values_that_are_not_finite_are_refused(tmp_path, video, name):
    video[2, 3, 4, 1] = np.nan
    with pytest.raises(AttnProcError, match="1 values that are not finite"):
        write_video(tmp_path / name, video, 8, about={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_after_a_failure(tmp_path, video, name, error, monkeypatch):
    def fail(*args, **kwargs):
        args[0].joinpath("part").write_text("x") if args[0].is_dir() else args[0].write_text("x")
        raise error

    for function in ("_write_mp4", "_write_gif", "_write_pictures"):
        monkeypatch.setattr(f"attnproc.pipelines.video_io.{function}", fail)
    if name != "v":
        (tmp_path / name).write_text("before")
    with pytest.raises(type(error)):
        write_video(tmp_path / name, video, 8, about={})
    if name != "v":
        assert (tmp_path / name).read_text() == "before"
        (tmp_path / name).unlink()
    assert os.listdir(tmp_path) == []


def test_odd_sizes_are_refused_as_mp4(tmp_path, video):
    with pytest.raises(AttnProcError, match="expected even numbers"):
        write_video(tmp_path / "v.mp4", video[:, :23], 8, about={})
    write_video(tmp_path / "v.mp4", video[:, :23], 8, upscale=2, about={})
    write_video(tmp_path / "v.gif", video[:, :23], 8, about={})
    assert _read(tmp_path / "v.gif").shape[:3] == (7, 23, 32)


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("v.avi", r"ending '\.avi'; expected \.mp4, \.gif"),
        ("missing/v.mp4", "is not a folder"),
        ("file/v.mp4", "is not a folder"),
        ("folder.mp4", "is a folder; expected a file"),
        ("full", "not an empty folder"),
        ("file", "not an empty folder"),
    ]:
        with pytest.raises(SettingsError, match=message):
            check_output(tmp_path / name)
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "folder.mp4", "full"]


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SettingsError, match=r"cannot be written \(Permission denied\)"):
        check_output(tmp_path / "v.mp4")
