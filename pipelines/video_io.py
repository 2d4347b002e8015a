"""Writing a video whole or not at all: mp4 (H.264), gif, or a folder of PNG pictures.

Videos are float arrays (frames, height, width, 3) with values from 0.0 to 1.0.
"""

import json
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from attnproc.errors import AttnProcError, SettingsError
from attnproc.files import new_folder, replacing

ENDINGS = (".mp4", ".gif")
# Constant quality of H.264: 0 is lossless, 23 its default; 17 is close to what the eye can tell.
CRF = 17


def check_output(path: Path, endings: Sequence[str] = ENDINGS) -> None:
    """Raises SettingsError if a video (or picture) cannot be written to `path`. Writes nothing that stays.

    An existing file is going to be replaced; a folder of pictures must be new or empty.
    """
    if path.suffix.lower() not in (*endings, ""):
        raise SettingsError(
            f"output {path} has the ending {path.suffix!r}; expected {', '.join(endings)}, or none for a folder of PNG "
            "pictures. Choose another name."
        )
    if not path.parent.is_dir():
        raise SettingsError(
            f"output {path} would be in {path.parent}, which is not a folder; expected one that exists. "
            "Make it, or choose another."
        )
    if path.suffix and path.is_dir():
        raise SettingsError(f"output {path} is a folder; expected a file. Choose another name.")
    if not path.suffix and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise SettingsError(
            f"output {path} exists and is not an empty folder; expected a new one for the PNG pictures. "
            "Choose another name, or remove it."
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SettingsError(
            f"output {path} cannot be written ({error.strerror}); expected a folder that can be written to. "
            "Choose another."
        ) from error


def write_video(path: Path, video: np.ndarray, fps: int, *, upscale: int = 1, about: dict[str, Any]) -> None:
    """Writes a video to `path`, which `check_output` has seen.

    upscale: each pixel becomes a square of that many pixels a side. about: plain data kept in the mp4's comment.

    Raises:
        AttnProcError: the video has values that are not finite, or the frames cannot be encoded.
    """
    if not np.isfinite(video).all():
        raise AttnProcError(
            f"the video has {np.count_nonzero(~np.isfinite(video))} values that are not finite; expected numbers from "
            "0.0 to 1.0. Try --dtype float32, or --attention dense to see whether the model itself makes them."
        )
    frames = (video.clip(0.0, 1.0) * 255).round().astype(np.uint8)
    frames = frames.repeat(upscale, axis=1).repeat(upscale, axis=2)
    if not path.suffix:
        with new_folder(path) as folder:
            _write_pictures(folder, frames)
        return
    with replacing(path) as temporary:
        if path.suffix.lower() == ".gif":
            _write_gif(temporary, frames, fps)
        else:
            _write_mp4(temporary, frames, fps, json.dumps(about))


def _write_mp4(path: Path, frames: np.ndarray, fps: int, comment: str) -> None:
    import av

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise AttnProcError(
            f"frames of {height} x {width} pixels cannot be H.264; expected even numbers. Write a gif or a PNG folder."
        )
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(CRF)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: int) -> None:
    from imageio import v3

    v3.imwrite(path, frames, extension=".gif", plugin="pillow", duration=1000 / fps, loop=0)


def _write_pictures(folder: Path, frames: np.ndarray) -> None:
    from PIL import Image

    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame-{number:04d}.png")
