"""How often A-STAR makes shapes-image draw every object of a caption: `python -m benchmarks.a_star_shapes`.

Captions of two and three objects from the combinations held out of training, at fixed seeds; the detector reads the
pictures back. The plain pipeline, the Attend-and-Excite objective and A-STAR start from the same noise. Once more
A-STAR is told a place for each object, a disk, which the captions do not say.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from attnproc.control.a_star import AStarSettings
from attnproc.demos.shapes import shapes_image_path
from attnproc.demos.shapes.detect import agreement, detect, match
from attnproc.demos.shapes.evaluate import Case
from attnproc.demos.shapes.scene import REACH, WORLD, Look, Object, Scene, caption, sample_scene
from attnproc.files import write_text
from attnproc.pipelines.a_star import AStarPipeline
from attnproc.pipelines.picture_job import SHAPES_A_STAR, SHAPES_CALL, SHAPES_LAYOUT
from benchmarks import machine

RESULT = Path(__file__).parent / "results" / "a-star-shapes-image.json"
# All settings were chosen on other seeds.
METHOD = AStarSettings(**SHAPES_A_STAR, attention_resolution=(16, 16))
BASELINE = replace(METHOD, objective="attend_and_excite", scale_factor=20.0)
PLACED = AStarSettings(**SHAPES_LAYOUT, attention_resolution=(16, 16))
CONCEPT = "phrase"
SCORES = ("objects", "color", "color and shape", "everything", "in place")


def held_out_cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases, two and three objects by turns; the first cases of a longer list are those of a shorter one."""
    cases = []
    for number in range(count):
        rng = random.Random(f"{seed} picture {number}")
        scene = sample_scene(rng, 2 + number % 2, held_out=True, still=True)
        cases.append(Case(scene, caption(scene, still=True), 1000 * seed + number))
    return cases


def concept(look: Look, kind: str) -> str:
    """Words of the caption for an object: its "shape", that with its colours ("colored"), or the whole "phrase"."""
    if kind == "shape":
        return look.shape
    colors = look.color if look.second_color is None else f"{look.color} and {look.second_color}"
    return f"{colors} {look.shape}" if kind == "colored" else f"{look.texture} {colors} {look.shape}"


def covers(item: Object, x: Any, y: Any) -> Any:
    """Whether the smallest disk around an object has these points in it; world units."""
    return np.hypot(x - item.x, y - item.y) <= REACH[item.look.shape] * item.radius


def disk(item: Object) -> np.ndarray:
    """That disk as a mask, boolean (64, 64)."""
    centers = np.arange(0.5, WORLD)
    return covers(item, centers, centers[:, None])


def score(scene: Scene, picture: np.ndarray) -> dict[str, float]:
    """Share of objects with the right colours; 1.0 if all have; and shape; and texture, with no object too many.

    At last the share of objects for which something of their colours has its centre in their disk.
    """
    looks, found = [item.look for item in scene.objects], detect(picture)
    right = [agreement(look, item) for look, item in zip(looks, match(looks, found), strict=True)]
    objects = sum(item["color"] for item in right) / len(right)
    shape = all(item["color"] and item["shape"] for item in right)
    everything = shape and all(item["texture"] for item in right) and len(found) == len(looks)
    placed = [
        any(agreement(item.look, one)["color"] and covers(item, *one.position) for one in found)
        for item in scene.objects
    ]
    return dict(zip(SCORES, map(float, (objects, objects == 1.0, shape, everything, np.mean(placed))), strict=True))


@dataclass(frozen=True)
class Way:
    """How pictures are made: by A-STAR with these settings, or None for the plain pipeline; and told places or not."""

    settings: AStarSettings | None = None
    places: bool = False


def generate(pipe: Any, cases: Sequence[Case], way: Way, kind: str) -> np.ndarray:
    """Pictures uint8 (cases, height, width, 3); each depends on its own seed alone."""
    arguments: dict[str, Any] = {
        "prompt": [case.prompt for case in cases],
        "generator": [torch.Generator().manual_seed(case.seed) for case in cases],
        "output_type": "np",
        **SHAPES_CALL,
    }
    if way.settings is None:
        images = pipe(**arguments).images
    else:
        concepts = [[concept(look, kind) for look in case.scene.looks] for case in cases]
        layouts = [
            dict(zip(named, map(disk, case.scene.objects), strict=True)) if way.places else None
            for named, case in zip(concepts, cases, strict=True)
        ]
        images = AStarPipeline(pipe)(concepts=concepts, layout_masks=layouts, settings=way.settings, **arguments).images
    return (np.asarray(images) * 255).round().astype(np.uint8)


def run(
    pipe: Any, cases: Sequence[Case], way: Way, kind: str, batch: int
) -> tuple[dict[str, Any], list[dict[str, float]], list[np.ndarray]]:
    """A row of the result, the scores of each picture, and the pictures."""
    pictures: list[np.ndarray] = []
    began = time.perf_counter()
    for first in range(0, len(cases), batch):
        pictures += list(generate(pipe, cases[first : first + batch], way, kind))
    seconds = time.perf_counter() - began
    scores = [score(case.scene, picture) for case, picture in zip(cases, pictures, strict=True)]
    row: dict[str, Any] = {
        "settings": None if way.settings is None else asdict(way.settings),
        "places": way.places,
        "seconds": round(seconds, 1),
    }
    for count in (2, 3):
        row[f"{count} objects"] = mean([s for s, c in zip(scores, cases, strict=True) if len(c.scene.objects) == count])
    row["all"] = mean(scores)
    return row, scores, pictures


def mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([s[name] for s in scores])), 4) for name in SCORES}


def against(plain: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> dict[str, dict[str, int]]:
    """Of the same captions and noise, how many pictures became right, and how many wrong."""
    pairs = list(zip(plain, other, strict=True))
    return {
        name: {"gained": sum(b[name] > a[name] for a, b in pairs), "lost": sum(b[name] < a[name] for a, b in pairs)}
        for name in SCORES
    }


def table(rows: dict[str, dict[str, Any]], cases: int) -> Table:
    """Shares in percent."""
    result = Table("", title=f"{cases} held-out captions: objects of the right colour; pictures with all objects right")
    for count in (2, 3):
        for name in SCORES:
            result.add_column(f"{count}: {name}", justify="right")
    result.add_column("seconds", justify="right")
    for name, row in rows.items():
        shares = [f"{row[f'{count} objects'][s]:.1%}" for count in (2, 3) for s in SCORES]
        result.add_row(name, *shares, f"{row['seconds']:.0f}")
    return result


def save_sheet(path: Path, cases: Sequence[Case], pictures: dict[str, list[np.ndarray]], count: int = 8) -> None:
    """The first cases side by side, one row per way of generating, captions above."""
    side, left, top = next(iter(pictures.values()))[0].shape[0], 110, 84
    sheet = Image.new("RGB", (left + count * (side + 4), top + len(pictures) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, case in enumerate(cases[:count]):
        draw.text((left + column * (side + 4), 2), textwrap.fill(case.prompt, 22), "black")
        for row, made in enumerate(pictures.values()):
            sheet.paste(Image.fromarray(made[column]), (left + column * (side + 4), top + row * (side + 4)))
    for row, name in enumerate(pictures):
        draw.text((4, top + row * (side + 4) + side // 2), name, "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.a_star_shapes", description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder; the shipped one by default")
    parser.add_argument("--concept", choices=("shape", "colored", "phrase"), default=CONCEPT)
    parser.add_argument("--excite", type=json.loads, default={}, help="JSON: other settings of the baseline")
    parser.add_argument("--a-star", type=json.loads, default={}, help="JSON: other settings of A-STAR")
    parser.add_argument("--places", type=json.loads, default={}, help="JSON: other settings of A-STAR with places")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file of the result")
    parser.add_argument("--sheet", type=Path, default=None, help="PNG file of the first pictures")
    args = parser.parse_args()

    folder = args.model or shapes_image_path()
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    cases = held_out_cases(args.cases, args.seed)
    ways = {
        "plain": Way(),
        "Attend-and-Excite": Way(replace(BASELINE, **args.excite)),
        "A-STAR": Way(replace(METHOD, **args.a_star)),
        "A-STAR, places": Way(replace(PLACED, **args.places), places=True),
    }
    rows: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[dict[str, float]]] = {}
    pictures: dict[str, list[np.ndarray]] = {}
    for name, way in ways.items():
        rows[name], scores[name], pictures[name] = run(pipe, cases, way, args.concept, args.batch)
        rows[name]["against plain"] = against(scores["plain"], scores[name])
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    training = folder / "training.json"
    result = {
        "what": "share of held-out captions of which shapes-image draws every object right, read back by the detector",
        "rows": rows,
        "run": {**SHAPES_CALL, "cases": args.cases, "seed": args.seed, "concept": args.concept, "dtype": "float32"},
        "training": json.loads(training.read_text()) if training.exists() else None,
        "machine": machine.describe(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, json.dumps(result, indent=2) + "\n")
    if args.sheet:
        save_sheet(args.sheet, cases, pictures)
    Console().print(table(rows, args.cases))


if __name__ == "__main__":
    main()
