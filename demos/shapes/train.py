"""python -m attnproc.demos.shapes.train PART: trains shapes-video or shapes-image, each in two halves.

The autoencoder comes first; the denoiser then reads it from the same folder:

    python -m attnproc.demos.shapes.train autoencoder --size cpu --steps 4400 --out runs/cpu --resume
    python -m attnproc.demos.shapes.train transformer --size cpu --steps 5400 --out runs/cpu --resume
    python -m attnproc.demos.shapes.evaluate --size cpu --model runs/cpu/pipeline

    python -m attnproc.demos.shapes.train picture-autoencoder --steps 2000 --out runs/pictures --resume
    python -m attnproc.demos.shapes.train unet --steps 6000 --out runs/pictures --resume
    python -m attnproc.demos.shapes.evaluate_pictures --model runs/pictures/pipeline

All can be stopped at any time and go on with --resume. `--size gpu`, for shapes-video alone, has 128 x 128 pixels and a
token grid of (5, 16, 16); it is meant for a CUDA GPU, where everything but the rendering runs under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .picture_sizes import PICTURES
from .sizes import SIZES
from .training import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m attnproc.demos.shapes.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("autoencoder", "transformer", "picture-autoencoder", "unet"))
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu", help="of shapes-video")
    parser.add_argument("--steps", type=int, required=True, help="length of the whole run, resumed or not")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and previews")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    common = {"resume": args.resume, "seed": args.seed, "device": pick_device(args.device)}
    if args.part == "autoencoder":
        from .train_autoencoder import train_autoencoder

        train_autoencoder(SIZES[args.size], args.steps, args.out, **common)
    elif args.part == "transformer":
        from .train_transformer import train_transformer

        train_transformer(SIZES[args.size], args.steps, args.out, **common)
    elif args.part == "picture-autoencoder":
        from .train_picture_autoencoder import train_picture_autoencoder

        train_picture_autoencoder(PICTURES, args.steps, args.out, **common)
    else:
        from .train_unet import train_unet

        train_unet(PICTURES, args.steps, args.out, **common)


if __name__ == "__main__":
    main()
