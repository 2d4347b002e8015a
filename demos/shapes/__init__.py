"""The Shapes world: coloured, textured, moving shapes, their captions, a detector, and tiny models trained on them."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parent / "models"


def shapes_video_path() -> Path:
    """Folder of the trained shapes-video pipeline, for `WanPipeline.from_pretrained`.

    Its native size is 64 x 64 pixels and 17 frames; 20 steps and a guidance scale of 4 suit it.
    """
    return _shipped("shapes-video")


def shapes_image_path() -> Path:
    """Folder of the trained shapes-image pipeline, for `StableDiffusionPipeline.from_pretrained`.

    Its native size is 128 x 128 pixels; 20 steps and a guidance scale of 4 suit it.
    """
    return _shipped("shapes-image")


def _shipped(name: str) -> Path:
    path = MODELS / name
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"Found no model_index.json in {path}. Expected the trained pipeline that ships with this package. "
            "Install the package again, or train it with `python -m attnproc.demos.shapes.train`."
        )
    return path
