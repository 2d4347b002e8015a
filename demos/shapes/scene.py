"""The Shapes world as data: objects, scenes, their captions, and which combinations are held out of training.

Lengths are world units: a picture is 64 units wide and high, x to the right, y downwards, whatever its pixels.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

WORLD = 64.0
FRAMES = 17

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "orange": (255, 140, 15),
    "yellow": (250, 235, 40),
    "green": (40, 185, 60),
    "cyan": (45, 220, 230),
    "blue": (45, 85, 245),
    "pink": (255, 90, 205),
    "white": (248, 248, 248),
}
# Backgrounds stay dark (no channel above 80), objects bright (one channel above 180): a threshold parts them.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 14),
    "gray": (72, 72, 74),
    "navy": (16, 20, 78),
    "maroon": (76, 14, 26),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
TEXTURES = ("plain", "striped", "checkered")
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "up right": (_DIAGONAL, -_DIAGONAL),
    "up": (0.0, -1.0),
    "up left": (-_DIAGONAL, -_DIAGONAL),
    "left": (-1.0, 0.0),
    "down left": (-_DIAGONAL, _DIAGONAL),
    "down": (0.0, 1.0),
    "down right": (_DIAGONAL, _DIAGONAL),
}
MOTIONS = (*DIRECTIONS, "rest", "spin")

SPIN_TURN = math.pi / 2  # whole turn of a spinning object over the clip, clockwise
RADIUS = {1: 12.0, 2: 10.0, 3: 8.0}  # by number of objects
TRAVEL = {1: 20.0, 2: 20.0, 3: 15.0}  # whole path of a moving object over the clip
# Distance from the centre to the farthest point of the shape, as a multiple of its radius.
REACH = {"circle": 1.0, "square": 1.22, "triangle": 1.25, "star": 1.25, "cross": 1.16, "diamond": 1.25}
GAP = 2.5  # free space between two objects, and to the frame


@dataclass(frozen=True)
class Look:
    """What a caption says of one object.

    `second_color` is set exactly when `texture` is not "plain"; `motion` is one of `MOTIONS`.
    """

    shape: str
    color: str
    texture: str
    second_color: str | None
    motion: str

    def __post_init__(self) -> None:
        known = self.shape in SHAPES and self.color in COLORS and self.texture in TEXTURES and self.motion in MOTIONS
        two_colors = self.second_color in COLORS and self.second_color != self.color
        fits = self.second_color is None if self.texture == "plain" else two_colors
        if not known or not fits:
            raise ValueError(
                f"Got {self}. Expected a shape of {SHAPES}, a texture of {TEXTURES}, colours of {tuple(COLORS)}, a "
                f"motion of {MOTIONS}, and a different second colour exactly when the texture is not plain. "
                "Change the fields to known words."
            )


@dataclass(frozen=True)
class Object:
    """An object in the world: its look, its centre at the first frame, its radius and path length (world units)."""

    look: Look
    x: float
    y: float
    radius: float
    travel: float

    def center(self, progress: float) -> tuple[float, float]:
        """Centre at `progress` in [0, 1] of the clip."""
        dx, dy = DIRECTIONS.get(self.look.motion, (0.0, 0.0))
        return self.x + dx * self.travel * progress, self.y + dy * self.travel * progress

    def angle(self, progress: float) -> float:
        """Clockwise rotation in radians at `progress` in [0, 1] of the clip."""
        return SPIN_TURN * progress if self.look.motion == "spin" else 0.0


@dataclass(frozen=True)
class Scene:
    """One to three objects, and a background that goes from `top` to `bottom` (equal: plain)."""

    objects: tuple[Object, ...]
    top: str
    bottom: str

    @property
    def looks(self) -> tuple[Look, ...]:
        return tuple(item.look for item in self.objects)


def is_held_out(look: Look) -> bool:
    """Whether this combination is kept for evaluation: about one in twenty, fixed by a hash of its words."""
    words = f"{look.shape} {look.color} {look.texture} {look.second_color} {look.motion}"
    return hashlib.sha256(words.encode()).digest()[0] % 20 == 0


def sample_look(rng: random.Random, held_out: bool = False, still: bool = False) -> Look:
    """A random look from the training combinations, or from the held-out ones.

    A plain circle never spins (nobody could see it). With `still` every object rests, otherwise all motions are
    equally likely.
    """
    while True:
        texture = rng.choice(TEXTURES)
        color, second = rng.sample(tuple(COLORS), 2)
        motion = "rest" if still else rng.choice(MOTIONS)
        look = Look(rng.choice(SHAPES), color, texture, None if texture == "plain" else second, motion)
        if look.motion == "spin" and look.shape == "circle":
            continue
        if is_held_out(look) == held_out:
            return look


def sample_scene(rng: random.Random, count: int | None = None, held_out: bool = False, still: bool = False) -> Scene:
    """A random scene in which no two objects ever touch and every object stays inside the picture.

    Args:
        rng: the only source of randomness; the same state gives the same scene.
        count: number of objects, 1 to 3; None draws 60 %, 30 %, 10 %, or for a picture 30 %, 40 %, 30 %.
        held_out: take every object from the held-out combinations instead of the training ones.
        still: a picture: nothing moves, and the objects' radii vary by 15 % either way.
    """
    if count is None:
        count = rng.choices((1, 2, 3), weights=(3, 4, 3) if still else (6, 3, 1))[0]
    if count not in RADIUS:
        raise ValueError(f"Got {count} objects. Expected 1, 2 or 3. Ask for one of these.")
    top = rng.choice(tuple(BACKGROUNDS))
    bottom = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.5 else top
    while True:
        looks = [sample_look(rng, held_out, still) for _ in range(count)]
        if len({look.color for look in looks}) < count:
            continue  # different main colours, so that a caption's objects can be told apart
        for _ in range(30):
            objects: list[Object] = []
            for look in looks:
                radius = RADIUS[count] * (rng.uniform(0.85, 1.15) if still else 1.0)
                placed = _place(rng, look, radius, TRAVEL[count])
                if not all(_apart(placed, other) for other in objects):
                    break
                objects.append(placed)
            else:
                return Scene(tuple(objects), top, bottom)


def _place(rng: random.Random, look: Look, radius: float, travel: float) -> Object:
    """The object at a uniformly random place from which its whole path lies inside the picture."""
    margin = REACH[look.shape] * radius + 1.0
    dx, dy = DIRECTIONS.get(look.motion, (0.0, 0.0))
    start = []
    for step in (dx * travel, dy * travel):
        low, high = margin + max(0.0, -step), WORLD - margin - max(0.0, step)
        start.append(rng.uniform(low, high))
    return Object(look, start[0], start[1], radius, travel)


def _apart(a: Object, b: Object) -> bool:
    """Whether the two objects keep their distance through the clip."""
    need = REACH[a.look.shape] * a.radius + REACH[b.look.shape] * b.radius + GAP
    for step in range(FRAMES):
        (ax, ay), (bx, by) = a.center(step / (FRAMES - 1)), b.center(step / (FRAMES - 1))
        if math.hypot(ax - bx, ay - by) < need:
            return False
    return True


_STILL = {"rest": ("resting", "still"), "spin": ("spinning", "turning")}
_MOVING = ("moving", "drifting")
_WORD = re.compile(r"[a-z]+")


def caption(scene: Scene, rng: random.Random | None = None, still: bool = False) -> str:
    """The scene in words; with `rng`, the words are varied by synonyms, without it they are always the same.

    `still` leaves the motions out, as in the caption of a picture.
    """
    choose = (lambda options: options[0]) if rng is None else rng.choice
    parts = []
    for look in scene.looks:
        if look.texture == "plain":
            paint = choose((f"plain {look.color}", look.color))
        else:
            paint = f"{look.texture} {look.color} and {look.second_color}"
        words = ["a", paint, look.shape]
        if not still:
            words.append(choose(_STILL[look.motion]) if look.motion in _STILL else f"{choose(_MOVING)} {look.motion}")
        parts.append(" ".join(words))
    ground = scene.top if scene.top == scene.bottom else f"{scene.top} to {scene.bottom}"
    return f"{' and '.join(parts)} on a {ground} background"


def parse(text: str) -> tuple[tuple[Look, ...], tuple[str, str]]:
    """Reads a caption back: the looks in order, and the background's (top, bottom)."""
    words = _WORD.findall(text.lower())
    try:
        cut = len(words) - 1 - words[::-1].index("on")
        looks = tuple(_parse_looks(words[:cut]))
        ground = [word for word in words[cut + 1 :] if word in BACKGROUNDS]
        top, bottom = ground[0], ground[-1]
    except (ValueError, IndexError, StopIteration) as error:
        raise ValueError(
            f"Got the caption {text!r}. Expected 'a [texture] color [and color] shape motion [and ...] on a color "
            "[to color] background'. Write it in that form."
        ) from error
    return looks, (top, bottom)


def _parse_looks(words: list[str]) -> Iterator[Look]:
    """Looks out of the caption's words before the background: an object ends with its motion."""
    still = {word: motion for motion, options in _STILL.items() for word in options}
    rest = iter(words)
    colors: list[str] = []
    texture, shape = "plain", ""
    pending: list[str] = []
    for word in [*rest, "a"]:
        if word == "a":
            if shape:
                motion = " ".join(pending) or "rest"  # captions of pictures name no motion
                yield Look(shape, colors[0], texture, colors[1] if texture != "plain" else None, motion)
            colors, texture, shape, pending = [], "plain", "", []
        elif word in COLORS:
            colors.append(word)
        elif word in TEXTURES:
            texture = word
        elif word in SHAPES:
            shape = word
        elif word in still:
            pending.append(still[word])
        elif shape and word in {"up", "down", "left", "right"}:
            pending.append(word)
        elif word not in {*_MOVING, "and"}:
            raise ValueError(f"unknown word {word!r}")


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, in a fixed order."""
    grammar = ("a", "and", "on", "to", "background", *_MOVING, *_STILL["rest"], *_STILL["spin"])
    directions = ("up", "down", "left", "right")
    return (*grammar, *directions, *TEXTURES, *COLORS, *SHAPES, *BACKGROUNDS)
