"""Reads pictures and videos of the Shapes world back into looks and places, with nothing learned.

Objects are bright on dark ground, so a threshold finds them. Each one is then explained by drawing: every shape,
upright or spinning, is laid over the object's pixels, and the best overlap wins; then every texture is fitted with
two free colours, and the smallest error wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .render import RIM, second_color_wave, signed_distance
from .scene import COLORS, DIRECTIONS, SHAPES, SPIN_TURN, TEXTURES, WORLD, Look

BRIGHT = 128  # an object's pixel has a channel at least this bright
MIN_AREA = 40.0  # square world units; smaller bright spots are not objects
MIN_TRAVEL = 6.0  # world units over the clip; anything slower stands still
MAX_STEP = 8.0  # world units an object may seem to jump from one frame to the next
_PALETTE = np.asarray(list(COLORS.values()), np.float32)
_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Detection:
    """One object found: its look, its centre over time (world units, one pair per frame), its radius.

    In a single picture nothing moves, and the look's motion is "rest".
    """

    look: Look
    path: tuple[tuple[float, float], ...]
    radius: float

    @property
    def position(self) -> tuple[float, float]:
        """Centre in the middle of the clip."""
        return self.path[len(self.path) // 2]


@dataclass(frozen=True)
class _Blob:
    """Bright connected pixels of one frame: a boolean mask, its centroid and area in world units."""

    frame: int
    mask: np.ndarray
    x: float
    y: float
    area: float


def detect(pixels: np.ndarray, pixel: float | None = None) -> list[Detection]:
    """Finds the objects of a picture or video, from left to right.

    Args:
        pixels: uint8 array (height, width, 3) or (frames, height, width, 3), a whole clip.
        pixel: width of a pixel in world units; by default the height is 64 units.

    Returns:
        One Detection per object that is visible in more than half of the frames.
    """
    video = pixels[None] if pixels.ndim == 3 else pixels
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise ValueError(
            f"Got an array of shape {pixels.shape} and type {pixels.dtype}. Expected uint8 of shape (height, width, 3)"
            " or (frames, height, width, 3). Convert it, for example with (frames * 255).round().astype('uint8')."
        )
    pixel = WORLD / video.shape[1] if pixel is None else pixel
    tracks = _link([_blobs(frame, number, pixel) for number, frame in enumerate(video)])
    found = [_explain(video, track, pixel) for track in tracks if 2 * len(track) > len(video)]
    return sorted(found, key=lambda item: item.position)


def _blobs(frame: np.ndarray, number: int, pixel: float) -> list[_Blob]:
    """The bright connected regions of a frame (four neighbours)."""
    bright = frame.max(-1) >= BRIGHT
    labels = np.where(bright, np.arange(1, bright.size + 1).reshape(bright.shape), 0)
    while True:  # every pixel takes the largest label around it, until nothing changes
        grown = labels.copy()
        np.maximum(grown[1:], labels[:-1], out=grown[1:])
        np.maximum(grown[:-1], labels[1:], out=grown[:-1])
        np.maximum(grown[:, 1:], grown[:, :-1], out=grown[:, 1:])
        np.maximum(grown[:, :-1], grown[:, 1:], out=grown[:, :-1])
        grown[~bright] = 0
        if np.array_equal(grown, labels):
            break
        labels = grown
    blobs = []
    for label in np.unique(labels[bright]):
        mask = labels == label
        rows, columns = np.nonzero(mask)
        area = rows.size * pixel**2
        if area >= MIN_AREA:
            blobs.append(_Blob(number, mask, (columns.mean() + 0.5) * pixel, (rows.mean() + 0.5) * pixel, area))
    return blobs


def _link(frames: Sequence[Sequence[_Blob]]) -> list[list[_Blob]]:
    """Chains blobs over the frames, nearest first."""
    tracks: list[list[_Blob]] = []
    for blobs in frames:
        pairs = sorted(
            (math.hypot(track[-1].x - blob.x, track[-1].y - blob.y), t, b)
            for t, track in enumerate(tracks)
            for b, blob in enumerate(blobs)
        )
        used_tracks: set[int] = set()
        used_blobs: set[int] = set()
        for distance, t, b in pairs:
            if distance <= MAX_STEP and t not in used_tracks and b not in used_blobs:
                tracks[t].append(blobs[b])
                used_tracks.add(t)
                used_blobs.add(b)
        tracks += [[blob] for b, blob in enumerate(blobs) if b not in used_blobs]
    return tracks


def _direction(track: Sequence[_Blob], frames: int) -> str | None:
    """The nearest of the eight directions, or None for an object that stays where it is."""
    if len(track) < 2:
        return None
    time = np.asarray([blob.frame for blob in track], float) / (frames - 1)
    places = np.asarray([(blob.x, blob.y) for blob in track])
    dx, dy = np.polyfit(time, places, 1)[0]
    if math.hypot(dx, dy) < MIN_TRAVEL:
        return None
    return max(DIRECTIONS, key=lambda name: dx * DIRECTIONS[name][0] + dy * DIRECTIONS[name][1])


def _unit_areas() -> dict[str, float]:
    """Area of each shape of radius 1, measured on a fine grid."""
    axis = np.linspace(-1.5, 1.5, 601)
    cell = (axis[1] - axis[0]) ** 2
    return {s: float((signed_distance(s, axis[None], axis[:, None]) < 0).sum() * cell) for s in SHAPES}


_AREAS = _unit_areas()


def _own_coordinates(
    track: Sequence[_Blob], shape: tuple[int, int], radius: float, angles: np.ndarray, pixel: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (frames, height, width) in the object's frame, turned back by `angles`, over `radius`."""
    rows, columns = ((np.arange(n, dtype=np.float32) + 0.5) * pixel for n in shape)
    cx, cy = (np.asarray(v, np.float32)[:, None, None] for v in zip(*((b.x, b.y) for b in track), strict=True))
    dx, dy = (columns[None, None] - cx) / radius, (rows[None, :, None] - cy) / radius
    cos, sin = (f(angles.astype(np.float32))[:, None, None] for f in (np.cos, np.sin))
    return cos * dx + sin * dy, cos * dy - sin * dx


def _explain(video: np.ndarray, track: Sequence[_Blob], pixel: float) -> Detection:
    """The look that redraws this track best."""
    direction = _direction(track, len(video))
    progress = np.asarray([blob.frame for blob in track]) / max(1, len(video) - 1)
    still = np.zeros_like(progress)
    turns = [still] if direction or len(video) == 1 else [still, SPIN_TURN * progress]
    # Everything happens in the smallest box around the whole track.
    seen = np.any([blob.mask for blob in track], axis=0)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    masks = np.stack([blob.mask[box] for blob in track])
    colors = np.stack([video[blob.frame][box] for blob in track]).astype(np.float32)
    moved = [
        _Blob(b.frame, b.mask, b.x - columns[0] * pixel, b.y - rows[0] * pixel, b.area) for b in track
    ]  # in the box's coordinates
    area = float(np.median([blob.area for blob in track]))

    best: tuple[float, str, np.ndarray] = (-1.0, "", still)
    for shape in SHAPES:
        radius = math.sqrt(area / _AREAS[shape])
        for angles in turns:
            distance = signed_distance(shape, *_own_coordinates(moved, masks.shape[1:], radius, angles, pixel))
            drawn = distance < 0
            overlap = float((drawn & masks).sum() / (drawn | masks).sum())
            if overlap > best[0]:
                best = (overlap, shape, angles)
    _, shape, angles = best
    radius = math.sqrt(area / _AREAS[shape])
    # A circle's outline does not tell whether it spins; its texture does.
    candidates = turns if shape == "circle" else [angles]
    fits = [_fit_paint(colors, masks, shape, moved, radius, a, pixel) for a in candidates]
    chosen = min(range(len(fits)), key=lambda k: fits[k][0])
    _, texture, color, second = fits[chosen]
    spins = bool(candidates[chosen].any()) and not (shape == "circle" and texture == "plain")
    look = Look(shape, color, texture, second, direction or ("spin" if spins else "rest"))
    path = tuple((float(blob.x), float(blob.y)) for blob in track)
    return Detection(look, path, radius)


def _fit_paint(
    colors: np.ndarray,
    masks: np.ndarray,
    shape: str,
    track: Sequence[_Blob],
    radius: float,
    angles: np.ndarray,
    pixel: float,
) -> tuple[float, str, str, str | None]:
    """The texture and named colours with the smallest mean squared error inside the object, and that error."""
    x, y = _own_coordinates(track, masks.shape[1:], radius, angles, pixel)
    distance = signed_distance(shape, x, y)
    sharpness = radius / pixel
    inside = masks & (distance * sharpness < -0.5)  # without the mixed pixels of the outline
    if not inside.any():
        inside = masks
    seen = colors[inside]
    mean = seen.mean(0)
    first = _nearest(mean)
    best: tuple[float, str, str, str | None] = (_error(seen, _PALETTE[first]), "plain", _NAMES[first], None)
    for texture in TEXTURES[1:]:
        wave = second_color_wave(texture, x[inside], y[inside])
        rim = np.clip(0.5 - (distance[inside] + RIM) * sharpness, 0.0, 1.0)
        amount = rim * np.clip(0.5 + wave * sharpness, 0.0, 1.0)
        basis = np.stack([1 - amount, amount], 1)
        fitted, *_ = np.linalg.lstsq(basis, seen, rcond=None)
        one, two = (_nearest(color) for color in fitted)
        if one != two:
            error = _error(seen, basis @ _PALETTE[[one, two]])
            if error < best[0]:
                best = (error, texture, _NAMES[one], _NAMES[two])
    return best


def _nearest(color: np.ndarray) -> int:
    return int(np.square(_PALETTE - color).sum(1).argmin())


def _error(seen: np.ndarray, drawn: np.ndarray) -> float:
    return float(np.square(seen - drawn).mean())


def match(wanted: Sequence[Look], found: Sequence[Detection]) -> list[Detection | None]:
    """Assigns detections to wanted looks so that the most attributes agree; None where none is left."""
    options: list[Detection | None] = [*found, *[None] * len(wanted)]
    order = max(
        permutations(range(len(options)), len(wanted)),
        key=lambda chosen: sum(
            sum(agreement(look, options[k]).values()) for look, k in zip(wanted, chosen, strict=True)
        ),
    )
    return [options[k] for k in order]


def agreement(wanted: Look, found: Detection | None) -> dict[str, bool]:
    """Which attributes of `wanted` the detection has; colour and second colour count as one."""
    if found is None:
        return dict.fromkeys(("shape", "color", "texture", "motion"), False)
    look = found.look
    return {
        "shape": look.shape == wanted.shape,
        "color": (look.color, look.second_color) == (wanted.color, wanted.second_color),
        "texture": look.texture == wanted.texture,
        "motion": look.motion == wanted.motion,
    }
