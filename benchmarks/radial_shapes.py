"""Quality of Radial Attention on shapes-video, and the README's pictures: `python -m benchmarks.radial_shapes`.

For held-out captions of one object at fixed seeds: PSNR and SSIM of the sparse video against the dense one, density,
and whether the detector reads the captioned objects in each. Writes benchmarks/results/radial-shapes-video.json and,
from its first cases, docs/images/radial-shapes-video.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

import attnproc
from attnproc import AttnProcessor, RadialAttnProcessor
from attnproc.demos.shapes import shapes_video_path
from attnproc.demos.shapes.detect import detect
from attnproc.demos.shapes.evaluate import Case, generate, held_out_cases, score
from attnproc.files import replacing, write_text
from attnproc.pipelines.metrics import psnr, ssim
from benchmarks import machine

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "radial-shapes-video.png"
PIXELS, FRAMES = 64, 17
RUN: dict[str, Any] = {"pixels": PIXELS, "frames": FRAMES, "steps": 20, "guidance": 4.0}
# From the shipped preset to sparser ones, up to what the rule allows on so small a grid.
VARIANTS: dict[str, dict[str, Any]] = {
    "preset shapes-video": {},
    "narrow neighbours": {"adjacent_half_width": 0.25},
    "narrow neighbours, no sink": {"adjacent_half_width": 0.25, "sink_frames": 0},
}

PICTURED = {"adjacent_half_width": 0.25, "sink_frames": 0}


def run(pipe: Any, cases: list[Case], processor: AttnProcessor | None) -> tuple[np.ndarray, attnproc.Report | None]:
    """Videos uint8 (cases, frames, height, width, 3), one pipeline call each, and the last report."""
    pipe.attn_processor = processor
    videos = [generate(pipe, [case], **RUN)[0] for case in cases]
    report = None if processor is None else attnproc.report(pipe)
    pipe.attn_processor = None
    return np.stack(videos), report


def detector_success(cases: list[Case], videos: np.ndarray) -> float:
    """Share of videos in which the detector reads every captioned object right, and no other."""
    return sum(score(case.scene.looks, detect(video))["all"] for case, video in zip(cases, videos, strict=True)) / len(
        cases
    )


def save_picture(cases: list[Case], dense: np.ndarray, sparse: np.ndarray, density: float, path: Path) -> None:
    """For each case the dense frames above the sparse ones, with what they are."""
    scale, shown, margin, line = 2, range(0, FRAMES, 4), 8, 14
    side = PIXELS * scale
    width = 2 * margin + 70 + len(shown) * (side + 4)
    height = margin + len(cases) * (2 * (side + 4) + line + 3 * margin)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = margin
    for case, full, fast in zip(cases, dense, sparse, strict=True):
        draw.text((margin, top), case.prompt, fill="black")
        top += line
        quality = psnr(fast / 255.0, full / 255.0)
        labels = ("dense", f"Radial\ndensity {density:.2f}\nPSNR {quality:.1f} dB")
        for video, label in zip((full, fast), labels, strict=True):
            draw.text((margin, top + 4), label, fill="black")
            for column, frame in enumerate(shown):
                picture = Image.fromarray(video[frame]).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(picture, (margin + 70 + column * (side + 4), top))
            top += side + 4
        top += 3 * margin
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.radial_shapes", description=__doc__)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=3, help="cases in the picture")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()

    pipe = WanPipeline.from_pretrained(shapes_video_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    cases = [case for case in held_out_cases(2 * args.cases) if len(case.scene.looks) == 1]
    dense, _ = run(pipe, cases, None)
    rows = []
    for name, overrides in track(VARIANTS.items(), description="variants"):
        processor = RadialAttnProcessor.from_preset("shapes-video", **overrides)
        sparse, report = run(pipe, cases, processor)
        assert report is not None and report.sparse_density is not None
        pairs = list(zip(sparse / 255.0, dense / 255.0, strict=True))
        rows.append(
            {
                "variant": name,
                "settings": processor.to_dict()["settings"],
                "density_of_sparse_calls": report.sparse_density,
                "density": report.density,
                "psnr_mean": float(np.mean([psnr(a, b) for a, b in pairs])),
                "psnr_min": float(np.min([psnr(a, b) for a, b in pairs])),
                "ssim_mean": float(np.mean([ssim(a, b) for a, b in pairs])),
                "detector_success": detector_success(cases, sparse),
            }
        )
        if overrides == PICTURED:
            shown = slice(args.pictures)
            save_picture(cases[shown], dense[shown], sparse[shown], report.sparse_density, PICTURE)
    result = {
        "cases": len(cases),
        "run": RUN,
        "detector_success_dense": detector_success(cases, dense),
        "variants": rows,
        "machine": machine.describe(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "radial-shapes-video.json", json.dumps(result, indent=2) + "\n")
    table = Table("variant", "density", "PSNR", "SSIM", "detector", title=f"{len(cases)} held-out captions, 20 steps")
    table.add_row("dense", "1.000", "-", "-", f"{result['detector_success_dense']:.2f}")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['density_of_sparse_calls']:.3f}",
            f"{row['psnr_mean']:.1f} (min {row['psnr_min']:.1f})",
            f"{row['ssim_mean']:.3f}",
            f"{row['detector_success']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
