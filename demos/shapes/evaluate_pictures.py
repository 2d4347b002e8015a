"""python -m attnproc.demos.shapes.evaluate_pictures: how often shapes-image draws what the caption says.

Captions come from the combinations held out of training; the detector reads the pictures back. Then rendered pictures
are inverted to noise and drawn again from it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from attnproc.files import write_text
from attnproc.hardware import device_name
from attnproc.pipelines.inversion import invert, reconstruct

from . import shapes_image_path
from .detect import detect
from .evaluate import Case, score, summary
from .render import render
from .scene import caption, sample_scene
from .training import pick_device

ATTRIBUTES = ("shape", "color", "texture", "count", "all")


def picture_cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases, one, two and three objects by turns; the first of a longer list are those of a shorter one."""
    cases = []
    for number in range(count):
        scene = sample_scene(random.Random(f"{seed} picture {number}"), 1 + number % 3, held_out=True, still=True)
        cases.append(Case(scene, caption(scene, still=True), 1000 * seed + number))
    return cases


def draw(pipe: Any, cases: Sequence[Case], *, steps: int, guidance: float) -> np.ndarray:
    """Pictures for the cases, uint8 (cases, height, width, 3); each depends on its own seed alone."""
    images = pipe(
        [case.prompt for case in cases],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def inversion_psnr(pipe: Any, count: int, steps: int, seed: int = 0) -> dict[str, float]:
    """PSNR in dB between held-out pictures and what the model draws from the noise that inverting them gives.

    Empty prompt, no guidance, DPM-Solver++(2M); the autoencoder's error is part of it.
    """
    pictures = [render(case.scene, 128, 1)[0] for case in picture_cases(count, seed)]
    found = invert(pipe, pictures, steps=steps)
    drawn = reconstruct(pipe, found, output_type="np")
    errors = [np.square(a - b / 255.0).mean() for a, b in zip(drawn, pictures, strict=True)]
    values = -10 * np.log10(np.asarray(errors))
    return {
        "steps": steps,
        "pictures": count,
        "mean": round(float(values.mean()), 2),
        "median": round(float(np.median(values)), 2),
        "lowest": round(float(values.min()), 2),
        "share from 25 dB on": round(float((values >= 25).mean()), 4),
    }


def sheet(pictures: Sequence[np.ndarray], columns: int = 6) -> Image.Image:
    """Pictures of one size in rows."""
    rows = [np.concatenate(list(pictures[k : k + columns]), 1) for k in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape], 0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m attnproc.demos.shapes.evaluate_pictures", description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inversions", type=int, default=30, help="pictures that are inverted and drawn again")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder; the shipped one by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, default=None, help="write the result to this JSON file")
    parser.add_argument("--sheet", type=Path, default=None, help="write the first pictures to this PNG file")
    args = parser.parse_args()

    device = pick_device(args.device)
    folder = args.model or shapes_image_path()
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    cases = picture_cases(args.cases, args.seed)
    scores: dict[int, list[dict[str, float]]] = {1: [], 2: [], 3: []}
    shown: list[np.ndarray] = []
    started = time.monotonic()
    for first in range(0, len(cases), args.batch):
        part = cases[first : first + args.batch]
        for case, picture in zip(part, draw(pipe, part, steps=args.steps, guidance=args.guidance), strict=True):
            right = score(case.scene.looks, detect(picture))
            scores[len(case.scene.objects)].append({name: right[name] for name in ATTRIBUTES})
            shown = [*shown, picture][:24]
        print(
            f"{first + len(part)}/{len(cases)}",
            json.dumps({k: summary(v, "pictures") for k, v in scores.items()}),
            flush=True,
        )
    training = folder / "training.json"
    result = {
        "what": "fractions of held-out captions that shapes-image draws right, read back by the detector",
        "one object": summary(scores[1], "pictures"),
        "two objects": summary(scores[2], "pictures"),
        "three objects": summary(scores[3], "pictures"),
        "PSNR of inverting and drawing again": [inversion_psnr(pipe, args.inversions, steps) for steps in (20, 50)],
        "settings": {"cases": args.cases, "steps": args.steps, "guidance": args.guidance, "seed": args.seed},
        "training": json.loads(training.read_text()) if training.exists() else None,
        "hardware": device_name(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }
    print(json.dumps(result, indent=2))
    if args.out:
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    if args.sheet:
        sheet(shown).save(args.sheet)


if __name__ == "__main__":
    main()
