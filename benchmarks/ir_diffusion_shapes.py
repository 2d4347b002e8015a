"""python -m benchmarks.ir_diffusion_shapes: how well IR-Diffusion keeps two subjects' looks on shapes-image.

A story is two portraits of held-out looks of two colours, which differ in shape and main colour, and four scenes with
both on the same background. A case is a scene. Scenes are captioned in two ways: "short" names main colour and shape
alone ("a red star"), as stories do, so that the rest of the look has to come from the portrait; "full" repeats the
portraits' words.

As published, the plain pipeline's picture is the rehearsal: where it shows the subjects, there they are for the
method, which then gets the same prompts and the same noise. Noise that does not show two objects is replaced, for both
alike. All variants are read by the same detector, which finds objects anywhere in a picture, with no learned part:

- colour distance: bright pixels around a subject are named after the nearest colour of the palette; half the sum of
  absolute differences of the two histograms, 0.0 to 1.0.
- picture distance: both crops are laid over each other, centred and scaled to the same radius; mean absolute
  difference of their pixels, 0.0 to 1.0, where either has the subject.
- Distances are those between a subject in the scene and in its own portrait, for the assignment of found objects to
  subjects with the smallest sum; a subject that is not there counts 1.0.
- leakage: share of subjects with a colour or texture that is not their own but the other's, as the portraits are
  captioned; who is who is read from shape and main colour.
- texture right, look right: share of subjects with the texture, or shape, colours and texture, of the portrait's
  caption.
- present: share of subjects for which an object is there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attnproc.control.ir_diffusion import IRSettings
from attnproc.demos.shapes import scene as world
from attnproc.demos.shapes import shapes_image_path
from attnproc.demos.shapes.detect import BRIGHT, Detection, agreement, detect
from attnproc.demos.shapes.scene import COLORS, REACH, WORLD, Look, caption, sample_look
from attnproc.files import write_text
from attnproc.pipelines.ir_diffusion import IRDiffusionPipeline, Scene, Subject
from attnproc.pipelines.picture_job import CONTROL_METHODS

from . import machine

SCENES = 4  # in a story
REHEARSALS = 5  # times that noise is tried
CAPTIONS = ("short", "full")
CROP = 32  # pixels of a side
SHOWN = 6  # stories on the sheet
PALETTE = np.asarray(list(COLORS.values()), np.float32)
NOTHING: dict[str, Any] = {"extended_steps": (0.0, 0.0), "isolation_steps": (0.0, 0.0), "lam": 0.0}
ON = (0.0, 1.0)
SETTINGS = dict(CONTROL_METHODS["story"].embedded)
METHOD: dict[str, dict[str, Any]] = {"IR-Diffusion": SETTINGS}
ABLATIONS: dict[str, dict[str, Any]] = {
    "isolation only": {**SETTINGS, **NOTHING, "isolation_steps": ON},
    "reposition only": {**SETTINGS, **NOTHING, "extended_steps": ON},
    "text only": {**SETTINGS, **NOTHING, "lam": IRSettings(**SETTINGS).lam},
    "no text": {**SETTINGS, "lam": 0.0},
    "text from the start, as released": {**SETTINGS, "text_steps": ON},
}


@dataclass(frozen=True)
class Story:
    """Two looks, the captions of their portraits and of some scenes, and the first seed of the noise."""

    looks: tuple[Look, ...]
    portraits: tuple[str, ...]
    scenes: tuple[str, ...]
    seed: int


def held_out_stories(count: int, captions: str, seed: int = 0) -> list[Story]:
    """The first stories of a longer list are those of a shorter one; both captions have the same looks and noise."""
    return [
        _story(random.Random(f"{seed} story {number}"), captions, 100_000 * seed + 100 * number)
        for number in range(count)
    ]


def _story(rng: random.Random, captions: str, seed: int) -> Story:
    while True:
        looks = tuple(sample_look(rng, held_out=True, still=True) for _ in range(2))
        different = looks[0].shape != looks[1].shape and looks[0].color != looks[1].color
        if different and "plain" not in [look.texture for look in looks]:
            break
    ground = rng.choice(tuple(world.BACKGROUNDS))
    portraits = tuple(_caption([look], ground) for look in looks)
    short = " and ".join(f"a {look.color} {look.shape}" for look in looks) + f" on a {ground} background"
    return Story(looks, portraits, (short if captions == "short" else _caption(looks, ground),) * SCENES, seed)


def _caption(looks: Sequence[Look], ground: str) -> str:
    return caption(world.Scene(tuple(world.Object(look, 0, 0, 0, 0) for look in looks), ground, ground), still=True)


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Appearance:
    """A found object: what was read, its share of each colour, its pixels (32, 32, 3), 0 to 255 and 0 around it."""

    found: Detection
    colors: np.ndarray
    pixels: np.ndarray


def appearances(picture: np.ndarray) -> list[Appearance]:
    """All objects of a picture, uint8 (height, width, 3)."""
    return [_appearance(picture, found) for found in detect(picture)]


def _appearance(picture: np.ndarray, found: Detection) -> Appearance:
    reach = REACH[found.look.shape] * found.radius
    offsets = ((np.arange(CROP) + 0.5) / CROP * 2 - 1) * reach
    columns, rows = (((center + offsets) * len(picture) / WORLD).astype(int) for center in found.position)
    inside = ((rows >= 0) & (rows < len(picture)))[:, None] & ((columns >= 0) & (columns < picture.shape[1]))
    pixels = picture[rows.clip(0, len(picture) - 1)][:, columns.clip(0, picture.shape[1] - 1)].astype(np.float32)
    bright = inside & (pixels.max(-1) >= BRIGHT)
    nearest = np.square(pixels[bright][:, None] - PALETTE).sum(-1).argmin(1)
    colors = np.bincount(nearest, minlength=len(PALETTE)) / max(1, len(nearest))
    return Appearance(found, colors, pixels * bright[..., None])


def distances(one: Appearance | None, other: Appearance | None) -> tuple[float, float]:
    """Colour and picture distance; 1.0 where there is nothing to compare."""
    if one is None or other is None:
        return 1.0, 1.0
    either = np.maximum(one.pixels, other.pixels).max(-1) > 0
    difference = np.abs(one.pixels - other.pixels)[either].mean() / 255
    return float(np.abs(one.colors - other.colors).sum() / 2), float(difference)


def measure(looks: Sequence[Look], portraits: Sequence[Appearance | None], picture: np.ndarray) -> dict[str, float]:
    """Means over the subjects of a scene, uint8 (height, width, 3)."""
    found = appearances(picture)
    most_alike, who = by_appearance(portraits, found), by_name(looks, found)
    pairs = [distances(portrait, one) for portrait, one in zip(portraits, most_alike, strict=True)]
    right = [agreement(look, one and one.found) for look, one in zip(looks, who, strict=True)]
    return {
        "colour distance": float(np.mean([colour for colour, _ in pairs])),
        "picture distance": float(np.mean([picture for _, picture in pairs])),
        "leakage": float(np.mean([leaked(*three) for three in zip(looks, looks[::-1], who, strict=True)])),
        "texture right": float(np.mean([r["texture"] for r in right])),
        "look right": float(np.mean([all(r.values()) for r in right])),
        "present": float(np.mean([one is not None for one in most_alike])),
    }


def by_appearance(portraits: Sequence[Appearance | None], found: Sequence[Appearance]) -> Sequence[Appearance | None]:
    """The object of each portrait: those with the smallest sum of distances; None where objects run out."""

    def total(order: Sequence[Appearance | None]) -> float:
        return sum(sum(distances(portrait, one)) for portrait, one in zip(portraits, order, strict=True))

    return min(permutations([*found, *[None] * len(portraits)], len(portraits)), key=total)


def by_name(looks: Sequence[Look], found: Sequence[Appearance]) -> Sequence[Appearance | None]:
    """The object of each look: most right shapes and main colours, at a tie most right shapes, then all else."""

    def agreeing(order: Sequence[Appearance | None]) -> tuple[int, int, int]:
        pairs = [(look, one.found) for look, one in zip(looks, order, strict=True) if one is not None]
        shapes = sum(look.shape == one.look.shape for look, one in pairs)
        colors = sum(look.color == one.look.color for look, one in pairs)
        return shapes + colors, shapes, sum(sum(agreement(*pair).values()) for pair in pairs)

    return max(permutations([*found, *[None] * len(looks)], len(looks)), key=agreeing)


def leaked(own: Look, other: Look, one: Appearance | None) -> bool:
    """Whether an object has a colour or texture of the other look that its own look has not."""
    if one is None:
        return False
    look = one.found.look
    mine, theirs = {own.color, own.second_color}, {other.color, other.second_color}
    color = bool(({look.color, look.second_color} - mine - {None}) & theirs)
    return color or (look.texture != own.texture and look.texture == other.texture)


# -- runs --------------------------------------------------------------------------------------------------------------


def as_pixels(images: Any) -> np.ndarray:
    return (np.asarray(images) * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Rehearsal:
    """Plain pictures of a story, uint8 (height, width, 3), the seeds of their noise, and how many were tried."""

    portraits: list[np.ndarray]
    scenes: list[np.ndarray]
    seeds: list[int]
    tried: int


def rehearse(pipe: Any, story: Story, **arguments: Any) -> Rehearsal:
    """The plain pipeline's pictures, with new noise where fewer objects than asked for are seen, up to a limit."""
    prompts = [*story.portraits, *story.scenes]
    wanted = [1] * len(story.portraits) + [len(story.looks)] * len(story.scenes)
    seeds = [story.seed + number for number in range(len(prompts))]
    pictures: list[Any] = [None] * len(prompts)
    missing, tried = list(range(len(prompts))), 0
    for attempt in range(REHEARSALS):
        seeds = [seed + len(prompts) * (attempt > 0 and n in missing) for n, seed in enumerate(seeds)]
        generators = [torch.Generator().manual_seed(seeds[n]) for n in missing]
        chosen = [prompts[n] for n in missing]
        images = as_pixels(pipe(chosen, generator=generators, output_type="np", **arguments).images)
        for n, image in zip(missing, images, strict=True):
            pictures[n] = image
        tried += len(missing)
        missing = [n for n in missing if len(detect(pictures[n])) < wanted[n]]
        if not missing:
            break
    count = len(story.portraits)
    return Rehearsal(pictures[:count], pictures[count:], seeds, tried)


def run_method(pipe: Any, story: Story, plain: Rehearsal, settings: IRSettings, **arguments: Any) -> list[np.ndarray]:
    """The scenes, uint8 (height, width, 3)."""
    portraits = [largest(picture) for picture in plain.portraits]
    subjects = [Subject(prompt, _region(one)) for prompt, one in zip(story.portraits, portraits, strict=True)]
    scenes = []
    for prompt, picture in zip(story.scenes, plain.scenes, strict=True):
        who = by_name(story.looks, appearances(picture))
        scenes.append(Scene(prompt, [one and _region(one) for one in who]))
    outputs = IRDiffusionPipeline(pipe).story(
        subjects,
        scenes,
        settings=settings,
        generator=[torch.Generator().manual_seed(seed) for seed in plain.seeds],
        output_type="np",
        **arguments,
    )
    return list(as_pixels([output.image for output in outputs]))


def _region(one: Appearance | None) -> tuple[float, float, float, float]:
    """The box around an object in fractions of the picture; most of the picture where there is none."""
    if one is None:
        return (0.05, 0.05, 0.95, 0.95)
    (x, y), reach = one.found.position, REACH[one.found.look.shape] * one.found.radius
    corners = (x - reach, y - reach, x + reach, y + reach)
    return tuple(min(1.0, max(0.0, corner / WORLD)) for corner in corners)  # type: ignore[return-value]


def largest(picture: np.ndarray) -> Appearance | None:
    """The subject of a portrait."""
    return max(appearances(picture), key=lambda one: one.found.radius, default=None)


def save_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """One row per story: its portraits, then for each variant its scenes."""
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def summary(scores: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the cases, standard errors of the distances, and how often it is closer than the plain picture."""
    result = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    for name in ("colour distance", "picture distance"):
        deviation = float(np.std([score[name] for score in scores], ddof=1)) if len(scores) > 1 else 0.0
        result[f"{name} error"] = deviation / math.sqrt(len(scores))
    if scores is not plain:
        closer = [a["picture distance"] < b["picture distance"] for a, b in zip(scores, plain, strict=True)]
        result["closer than plain"] = float(np.mean(closer))
    return {name: round(value, 4) for name, value in result.items()}


def evaluate(
    pipe: Any, stories: Sequence[Story], settings: dict[str, IRSettings], **arguments: Any
) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
    """What every variant reaches on the stories, and the pictures of the first ones by row."""
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in ("plain", *settings)}
    seconds = dict.fromkeys(scores, 0.0)
    sheet: list[list[np.ndarray]] = []
    tried = 0
    for story in track(stories, description="stories"):
        began = time.monotonic()
        plain = rehearse(pipe, story, **arguments)
        seconds["plain"] += time.monotonic() - began
        tried += plain.tried
        drawn = {"plain": plain.scenes}
        for name, chosen in settings.items():
            began = time.monotonic()
            drawn[name] = run_method(pipe, story, plain, chosen, **arguments)
            seconds[name] += time.monotonic() - began
        portraits = [largest(picture) for picture in plain.portraits]
        for name, scenes in drawn.items():
            scores[name] += [measure(story.looks, portraits, scene) for scene in scenes]
        if len(sheet) < SHOWN:
            sheet.append([*plain.portraits, *(scene for scenes in drawn.values() for scene in scenes)])
    rows = {
        name: {
            **summary(scores[name], scores["plain"]),
            "seconds per story": round(seconds[name] / len(stories), 2),
            "settings": asdict(settings[name]) if name in settings else None,
        }
        for name in scores
    }
    return {"cases": len(scores["plain"]), "rehearsed pictures": tried, "variants": rows}, sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ir_diffusion_shapes")
    parser.add_argument("--cases", type=int, default=104, help=f"scenes, {SCENES} in a story")
    parser.add_argument("--captions", nargs="*", choices=CAPTIONS, default=CAPTIONS)
    parser.add_argument("--ablations", action="store_true", help="run each part of the method alone, too")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder; the shipped one by default")
    parser.add_argument("--out", type=Path, default=None, help="write the result to this JSON file")
    parser.add_argument("--sheet", type=Path, default=None, help=f"write the first {SHOWN} stories to this PNG file")
    args = parser.parse_args()

    folder = args.model or shapes_image_path()
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    variants = {**METHOD, **(ABLATIONS if args.ablations else {})}
    settings = {name: IRSettings(**values) for name, values in variants.items()}
    began = time.monotonic()
    results, sheets = {}, []
    for captions in args.captions:
        stories = held_out_stories(-(-args.cases // SCENES), captions, args.seed)
        results[captions], sheet = evaluate(pipe, stories, settings, **arguments)
        sheets += sheet
    training = Path(folder) / "training.json"
    result = {
        "what": "two subjects of held-out looks in scenes, against their portraits; read back by the detector",
        "captions": results,
        "run": {**arguments, "seed": args.seed, "dtype": "float32"},
        "seconds": round(time.monotonic() - began, 1),
        "training": json.loads(training.read_text()) if training.exists() else None,
        "machine": machine.describe(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    if args.sheet:
        save_sheet(args.sheet, sheets)
    for captions, found in results.items():
        Console().print(table(f"{found['cases']} scenes, {captions} captions", found["variants"]))


def table(title: str, rows: dict[str, Any]) -> Table:
    """The variants, one a row."""
    columns = {
        "colour distance": "colour\ndistance",
        "picture distance": "picture\ndistance",
        "closer than plain": "closer\nthan plain",
        "leakage": "leakage",
        "texture right": "texture\nright",
        "look right": "look\nright",
        "present": "present",
        "seconds per story": "s per\nstory",
    }
    shown = Table("", *columns.values(), title=title)
    for name, row in rows.items():
        cells = [f"{row[column]:.3f}" if column in row else "-" for column in columns]
        for place, column in enumerate(columns):
            if f"{column} error" in row:
                cells[place] += f" ± {row[f'{column} error']:.3f}"
        shown.add_row(name, *cells)
    return shown


if __name__ == "__main__":
    main()
