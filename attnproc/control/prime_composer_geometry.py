"""Where PrimeComposer puts the object: box and silhouette in pixels, and their cells on every grid of the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attnproc.control.masks import Region, as_box, bounding_box, region_mask
from attnproc.errors import AttnProcWarning, SettingsError

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, half-open


@dataclass(frozen=True)
class Placement:
    """An object at its target: boolean silhouette (height, width) in pixels, and the box, inside the picture."""

    silhouette: Tensor
    box: Box

    def object_cells(self, rows: int, columns: int) -> Tensor:
        """Boolean (rows, columns): cells more than half covered by the object, which may be none. Never outside Bx."""
        coverage = F.adaptive_avg_pool2d(self.silhouette[None].float(), (rows, columns))[0]
        return (coverage > 0.5) & self.box_cells(rows, columns)

    def box_cells(self, rows: int, columns: int) -> Tensor:
        """Boolean (rows, columns): every cell that the box touches."""
        height, width = self.silhouette.shape
        x0, y0, x1, y1 = self.box
        cells = torch.zeros(rows, columns, dtype=torch.bool)
        cells[y0 * rows // height : -(-y1 * rows // height), x0 * columns // width : -(-x1 * columns // width)] = True
        return cells


def place(
    object_image: Image.Image, object_mask: Region, target: Region, size: tuple[int, int], height: int, width: int
) -> tuple[Placement, Image.Image]:
    """Cuts the object out, fits it into the target box with its aspect kept, centred, and draws it on black.

    Args:
        object_image: RGB.
        object_mask: what of it is the object: a mask of its aspect ratio, cut at one half, or a box.
        target: box (x0, y0, x1, y1) in pixels of the background as it came (integers) or in fractions of it (floats),
            cut at the border; or a mask of its aspect ratio, whose bounding box is taken.
        size: width and height of the background as it came.
        height, width: working size, pixels.

    Returns:
        The placement, and the canvas: RGB of the working size, black outside the silhouette.

    Raises:
        SettingsError: a mask is empty or covers everything, the box is larger than the picture or outside it.
    """
    mask = region_mask(object_mask, object_image.height, object_image.width, "object_mask")
    if bool(mask.all()):
        raise SettingsError(
            "object_mask covers the whole object picture; expected a silhouette with something around it. Draw what "
            "is object, or add a margin to the picture."
        )
    box = _target_box(target, size, height, width)
    top, bottom, left, right = bounding_box(mask)
    scale = min((box[2] - box[0]) / (right - left), (box[3] - box[1]) / (bottom - top))
    across, down = max(1, round(scale * (right - left))), max(1, round(scale * (bottom - top)))
    corner = (box[0] + (box[2] - box[0] - across) // 2, box[1] + (box[3] - box[1] - down) // 2)
    crop = object_image.crop((left, top, right, bottom)).resize((across, down), Image.Resampling.LANCZOS)
    cut = F.interpolate(mask[None, None, top:bottom, left:right].float(), (down, across), mode="nearest-exact")[0, 0]
    stencil = Image.fromarray((cut.numpy() * 255).astype(np.uint8))
    canvas, silhouette = Image.new("RGB", (width, height)), Image.new("L", (width, height))
    canvas.paste(crop, corner, stencil)  # parts beyond the border fall away, in the picture as in the mask
    silhouette.paste(stencil, corner)
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
    return Placement(torch.from_numpy(np.array(silhouette)) > 127, inside), canvas


def pasted(background: Image.Image, canvas: Image.Image, placement: Placement) -> Image.Image:
    """The background with the object's pixels copied over it; both RGB of the working size."""
    stencil = Image.fromarray((placement.silhouette.numpy() * 255).astype(np.uint8))
    return Image.composite(canvas, background, stencil)


def check_cells(placement: Placement, rows: int, columns: int) -> None:
    """Refuses what cannot be composed on a latent grid of rows x columns.

    Raises:
        SettingsError: fewer than 2 x 2 cells of the box are in the picture, it covers all of it, or no cell is object.
    """
    top, bottom, left, right = bounding_box(placement.box_cells(rows, columns))
    if bottom - top < 2 or right - left < 2:
        raise SettingsError(
            f"target has {right - left} x {bottom - top} latent cells inside the picture; expected at least 2 x 2. "
            "Move or enlarge the box."
        )
    if (bottom - top, right - left) == (rows, columns):
        raise SettingsError(
            "target covers the whole picture, so no background would stay; expected a part of it. Shrink it."
        )
    if not placement.object_cells(rows, columns).any():
        raise SettingsError(
            f"object too small: at the target it covers no cell of the latent grid {columns} x {rows} by more than "
            "half. Enlarge the target box."
        )


def _target_box(target: Region, size: tuple[int, int], height: int, width: int) -> Box:
    """The target in pixels of the working size; may pass the border, with a warning."""
    box = as_box(target)
    if box is not None:
        x0, y0, x1, y1 = _scaled(box, size, height, width)
    else:
        mask = region_mask(target, size[1], size[0], "target")
        part = _largest_part(mask)
        if int(part.sum()) < int(mask.sum()):
            warnings.warn("target has several parts; the largest is taken", AttnProcWarning, stacklevel=6)
        top, bottom, left, right = bounding_box(part)
        x0, y0, x1, y1 = _scaled((left, top, right, bottom), size, height, width)
    asked = f"target is the box {(x0, y0, x1, y1)} in the working size {width} x {height}"
    if not (x0 < x1 and y0 < y1 and x0 < width and y0 < height and x1 > 0 and y1 > 0):
        raise SettingsError(f"{asked}; expected x0 < x1 and y0 < y1, and a part inside the picture. Move it.")
    if x1 - x0 > width or y1 - y0 > height:
        raise SettingsError(f"{asked}, larger than the picture; expected one that fits. Shrink it.")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        warnings.warn(f"{asked}: box and object are cut at the border", AttnProcWarning, stacklevel=6)
    return x0, y0, x1, y1


def _scaled(box: Sequence[float], size: tuple[int, int], height: int, width: int) -> Box:
    if not all(math.isfinite(v) for v in box):
        raise SettingsError(f"target is the box {box}; expected finite numbers. Correct it.")
    fractions = any(isinstance(v, float) for v in box)
    if fractions and not all(-1 <= v <= 2 for v in box):
        raise SettingsError(
            f"target is the box {box}; expected fractions of the picture, or whole pixels as integers. Write "
            "all four in one way."
        )
    across, down = (width, height) if fractions else (width / size[0], height / size[1])
    x0, y0, x1, y1 = box
    return round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down)


def _largest_part(mask: Tensor) -> Tensor:
    """The connected part (eight neighbours) of a boolean mask that has the most pixels."""
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float64).view(1, *mask.shape)
    labels = numbers * mask
    while True:  # every pixel takes the largest number around it, until nothing changes
        grown = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    values, counts = labels[mask[None]].unique(return_counts=True)
    return labels[0] == values[counts.argmax()]
