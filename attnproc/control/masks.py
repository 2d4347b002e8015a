"""Boxes and masks of users, and their grids of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attnproc.errors import SettingsError

Region = Any  # a box (x0, y0, x1, y1), or a mask: a PIL image, or an array or tensor of two dimensions


def region_mask(region: Region, height: int, width: int, what: str) -> Tensor:
    """A boolean mask (height, width) in pixels, from a box or a mask.

    Args:
        region: a box (x0, y0, x1, y1), half-open, in pixels (integers) or fractions of the picture (floats up to 1.0);
            or a mask as PIL image, array or tensor of any size with the picture's aspect ratio: booleans, numbers from
            0 to 1, or uint8 from 0 to 255, cut at one half. Of a PIL image it is the alpha channel where that varies,
            so that a cut-out is the mask of what it shows, and else the luminance.
        height, width: of the picture, pixels.
        what: the region's role in messages.

    Raises:
        SettingsError: the region is neither; the box is empty or leaves the picture; or the mask has another aspect,
            values, rank or depth of pixels, or covers nothing.
    """
    box = as_box(region)
    if box is not None:
        return _box_mask(box, height, width, what)
    values = mask_values(region, what)
    if values.shape[0] * width != values.shape[1] * height:
        raise SettingsError(
            f"{what} is a mask of {values.shape[1]} x {values.shape[0]}; expected the aspect ratio of the picture, "
            f"{width} x {height}. Draw it at the picture's size."
        )
    mask = F.interpolate(values[None, None], (height, width), mode="nearest-exact")[0, 0] > 0.5
    if not mask.any():
        raise SettingsError(f"{what} is an empty mask; expected at least one pixel above one half. Draw something.")
    return mask


def as_box(region: Region) -> tuple[float, float, float, float] | None:
    """The plain numbers of a box, which may come as a sequence, array or tensor of four; None for anything else."""
    if isinstance(region, np.ndarray | Tensor) and region.ndim == 1:
        region = region.tolist()
    if not isinstance(region, Sequence) or len(region) != 4:
        return None
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in region):
        return None
    x0, y0, x1, y1 = (int(v) if isinstance(v, Integral) else float(v) for v in region)
    return x0, y0, x1, y1


def mask_values(region: Region, what: str) -> Tensor:
    """A mask as float32 (rows, columns) from 0 to 1, not cut yet; arguments and errors as of `region_mask`."""
    if isinstance(region, Image.Image):
        return torch.from_numpy(np.array(mask_channel(region, what), np.float32) / 255)
    try:
        values = region.detach().cpu() if isinstance(region, Tensor) else torch.from_numpy(np.array(region))
    except (TypeError, ValueError) as error:  # not an array of numbers
        raise _no_region(f"{what} is a {type(region).__name__}") from error
    if values.ndim != 2 or values.numel() == 0:
        raise _no_region(f"{what} has the shape {tuple(values.shape)}")
    values = values.float() / (255 if values.dtype == torch.uint8 and int(values.max()) > 1 else 1)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise SettingsError(
            f"{what} has values from {low:g} to {high:g}; expected booleans, numbers from 0 to 1, or uint8 from 0 to "
            "255. Convert it."
        )
    return values


def mask_channel(picture: Image.Image, what: str) -> Image.Image:
    """The mask in a picture, of mode "L": its alpha channel where that varies, else its luminance."""
    check_depth(picture, what)
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        low, high = alpha.getextrema()
        if low != high:
            return alpha
    return picture.convert("L")


def check_depth(picture: Image.Image, what: str) -> None:
    """Raises SettingsError for pixels of more than 8 bits a channel, which PIL would clip, not scale."""
    if picture.mode.startswith(("I", "F")):
        raise SettingsError(
            f"{what} has pixels of mode {picture.mode!r}; expected 8 bits a channel. Scale them to 0 to 255 and "
            "convert it to mode 'L' or 'RGB'."
        )


def token_mask(mask: Tensor, rows: int, columns: int) -> Tensor:
    """A pixel mask on a grid of tokens (rows, columns), boolean: tokens of which more than half is covered.

    Where the mask is not empty but covers no token by more than half, the most covered token stands for it.
    """
    coverage = F.adaptive_avg_pool2d(mask[None].float(), (rows, columns))[0]
    tokens = coverage > 0.5
    if mask.any() and not tokens.any():
        tokens.view(-1)[coverage.flatten().argmax()] = True
    return tokens


def bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the true values of a non-empty mask (rows, columns), half-open."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _box_mask(box: Sequence[float], height: int, width: int, what: str) -> Tensor:
    x0, y0, x1, y1 = box
    if any(isinstance(v, float) for v in box):
        if not all(0 <= v <= 1 for v in box):
            raise SettingsError(
                f"{what} is the box {tuple(box)}; expected fractions from 0.0 to 1.0, or whole pixels as integers. "
                "Write all four in one way."
            )
        x0, x1 = round(x0 * width), round(x1 * width)
        y0, y1 = round(y0 * height), round(y1 * height)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise SettingsError(
            f"{what} is the box {tuple(box)}; expected x0 < x1 and y0 < y1 inside the picture of {width} x {height} "
            "pixels. Move or shrink it."
        )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    return mask


def _no_region(came: str) -> SettingsError:
    return SettingsError(
        f"{came}; expected a box (x0, y0, x1, y1), a picture, or a mask of two dimensions (rows, columns). Pass one of "
        "these."
    )
