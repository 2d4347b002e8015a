"""Draws scenes: signed distances of the outlines give anti-aliased coverage, frame by frame, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .scene import BACKGROUNDS, COLORS, FRAMES, REACH, WORLD, Object, Scene

RIM = 0.14  # width of the outline in the main colour, as a fraction of the radius
PERIOD = {"striped": 0.85, "checkered": 1.3}  # of stripes, or of two checker cells, as a fraction of the radius

_STAR = [
    (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k in range(10) for r in [(1.25, 0.62)[k % 2]]
]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of the shape of radius 1 at the origin, negative inside (exact near the edges)."""
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if shape == "diamond":
        return (np.abs(x) / 0.72 + np.abs(y) / 1.25 - 1.0) / math.hypot(1 / 0.72, 1 / 1.25)
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 1.06, b - 0.47), np.maximum(a - 0.47, b - 1.06))
    if shape == "triangle":
        side = np.abs(x) * math.cos(math.pi / 6) - y * 0.5
        return np.maximum(side, y) - 0.625
    if shape == "star":
        # Fold the plane into one tip: the outline there is a single line from the tip to the notch.
        angle = np.arctan2(x, -y)
        wedge = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
        radius = np.hypot(x, y)
        (x0, y0), (x1, y1) = _STAR[0], _STAR[1]
        length = math.hypot(x1 - x0, y1 - y0)
        normal = (-(y1 - y0) / length, (x1 - x0) / length)
        px, py = radius * np.sin(wedge), -radius * np.cos(wedge)
        return -((px - x0) * normal[0] + (py - y0) * normal[1])
    raise ValueError(f"Got the shape {shape!r}. Expected one of {tuple(REACH)}. Use one of these.")


def second_color_wave(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A wave that is positive where the second colour lies, in units of the radius, with slope about one at zero."""
    if texture not in PERIOD:
        raise ValueError(f"Got the texture {texture!r}. Expected one of {tuple(PERIOD)}. Plain has no second colour.")
    unit = PERIOD[texture] / (2 * math.pi)
    if texture == "striped":
        return unit * np.cos(y / unit)
    return unit * np.sin(x / unit) * np.sin(y / unit) * 1.6


def object_coordinates(
    item: Object, progress: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """World coordinates x, y in the object's own frame: centred, turned back, divided by its radius."""
    shape = (-1, 1, 1)
    cx, cy = (np.asarray(v, np.float32).reshape(shape) for v in zip(*map(item.center, progress), strict=True))
    angle = np.asarray([item.angle(p) for p in progress], np.float32).reshape(shape)
    dx, dy = (x - cx) / item.radius, (y - cy) / item.radius
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * dx + sin * dy, cos * dy - sin * dx


def render(scene: Scene, size: int = 64, frames: int | Sequence[float] = FRAMES) -> np.ndarray:
    """Draws the scene.

    Args:
        scene: what to draw.
        size: width and height in pixels; the world's 64 units are stretched to it.
        frames: a number of frames spread over the clip, or the moments themselves, each in [0, 1].

    Returns:
        uint8 array (frames, size, size, 3).
    """
    progress = np.linspace(0.0, 1.0, frames) if isinstance(frames, int) else np.asarray(frames, float)
    pixel = WORLD / size
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * pixel).astype(np.float32)
    ramp = (axis / WORLD)[:, None, None]
    top, bottom = (np.asarray(BACKGROUNDS[name], np.float32) for name in (scene.top, scene.bottom))
    ground = np.broadcast_to((top + (bottom - top) * ramp), (size, size, 3))
    video = np.repeat(ground[None], len(progress), axis=0)
    for item in scene.objects:
        _draw(video, item, progress, axis, pixel)
    return (video + 0.5).astype(np.uint8)


def _draw(video: np.ndarray, item: Object, progress: np.ndarray, axis: np.ndarray, pixel: float) -> None:
    """Paints one object over `video` in place, touching only the box that its path covers."""
    reach = REACH[item.look.shape] * item.radius + 2 * pixel
    centers = np.asarray([item.center(p) for p in progress])
    low, high = centers.min(0) - reach, centers.max(0) + reach
    columns = slice(*np.searchsorted(axis, (low[0], high[0])))
    rows = slice(*np.searchsorted(axis, (low[1], high[1])))
    x, y = object_coordinates(item, progress, axis[None, None, columns], axis[None, rows, None])
    sharpness = item.radius / pixel
    distance = signed_distance(item.look.shape, x, y)
    cover = np.clip(0.5 - distance * sharpness, 0.0, 1.0)[..., None]
    paint: np.ndarray = np.asarray(COLORS[item.look.color], np.float32)
    if item.look.second_color is not None:
        wave = second_color_wave(item.look.texture, x, y)
        inside = np.clip(0.5 - (distance + RIM) * sharpness, 0.0, 1.0)
        amount = (inside * np.clip(0.5 + wave * sharpness, 0.0, 1.0))[..., None]
        paint = paint + (np.asarray(COLORS[item.look.second_color], np.float32) - paint) * amount
    box = video[:, rows, columns]
    box += cover * (paint - box)
