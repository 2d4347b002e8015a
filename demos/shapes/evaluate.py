"""python -m attnproc.demos.shapes.evaluate: how often shapes-video draws what the caption says.

Captions come from the combinations held out of training; the detector reads the generated videos back.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image

from attnproc.hardware import device_name

from . import shapes_video_path
from .detect import Detection, agreement, detect, match
from .scene import Look, Scene, caption, sample_scene
from .sizes import SIZES
from .training import pick_device

ATTRIBUTES = ("shape", "color", "texture", "motion")


@dataclass(frozen=True)
class Case:
    """A held-out scene, its caption, and the seed of its noise."""

    scene: Scene
    prompt: str
    seed: int


def held_out_cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases, one and two objects by turns; the first cases of a longer list are those of a shorter one."""
    cases = []
    for number in range(count):
        scene = sample_scene(random.Random(f"{seed} case {number}"), 1 + number % 2, held_out=True)
        cases.append(Case(scene, caption(scene), 1000 * seed + number))
    return cases


def generate(pipe: Any, cases: Sequence[Case], *, pixels: int, frames: int, steps: int, guidance: float) -> np.ndarray:
    """Videos for the cases, uint8 (cases, frames, pixels, pixels, 3); each depends on its own seed alone."""
    output = pipe(
        [case.prompt for case in cases],
        height=pixels,
        width=pixels,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        output_type="np",
    ).frames
    return (np.asarray(output) * 255).round().astype(np.uint8)


def score(wanted: Sequence[Look], found: Sequence[Detection]) -> dict[str, float]:
    """Fractions of the wanted objects with each attribute right; "all": every one right and no object too many."""
    right = [agreement(look, item) for look, item in zip(wanted, match(wanted, found), strict=True)]
    result = {name: sum(r[name] for r in right) / len(right) for name in ATTRIBUTES}
    result["count"] = float(len(found) == len(wanted))
    result["all"] = float(len(found) == len(wanted) and all(all(r.values()) for r in right))
    return result


def summary(scores: Sequence[dict[str, float]], what: str = "clips") -> dict[str, float]:
    """Mean of every score, rounded to four digits, and their number under the name `what`."""
    names = scores[0] if scores else ()
    return {what: len(scores), **{n: round(sum(s[n] for s in scores) / len(scores), 4) for n in names}}


def save_sheet(path: Path, videos: Sequence[np.ndarray]) -> None:
    """One row per video, every fourth frame."""
    rows = [np.concatenate(list(video[::4]), 1) for video in videos]
    Image.fromarray(np.concatenate(rows, 0)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m attnproc.demos.shapes.evaluate", description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder; the shipped one by default")
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu", help="the size the model was trained in")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, default=None, help="write the result to this JSON file")
    parser.add_argument("--sheet", type=Path, default=None, help="write the first videos' frames to this PNG file")
    args = parser.parse_args()

    device = pick_device(args.device)
    folder = args.model or shapes_video_path()
    pipe: Any = WanPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    cases = held_out_cases(args.cases, args.seed)
    size = SIZES[args.size]
    settings = {"pixels": size.pixels, "frames": size.frames, "steps": args.steps, "guidance": args.guidance}
    scores: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    shown: list[np.ndarray] = []
    started = time.monotonic()
    for first in range(0, len(cases), args.batch):
        part = cases[first : first + args.batch]
        for case, video in zip(part, generate(pipe, part, **settings), strict=True):
            scores[len(case.scene.objects)].append(score(case.scene.looks, detect(video)))
            shown = [*shown, video][:16]
        done = {count: summary(s) for count, s in scores.items() if s}
        print(
            f"{first + len(part)}/{len(cases)} " + json.dumps({f"{k} objects": v for k, v in done.items()}), flush=True
        )
    training = folder / "training.json"
    result = {
        "what": "fractions of held-out captions that shapes-video draws right, read back by the detector",
        "one object": summary(scores[1]),
        "two objects": summary(scores[2]),
        "settings": {**settings, "cases": args.cases, "seed": args.seed, "dtype": "float32"},
        "training": json.loads(training.read_text()) if training.exists() else None,
        "hardware": device_name(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.sheet:
        save_sheet(args.sheet, shown)


if __name__ == "__main__":
    main()
