"""Trains the AutoencoderKL of shapes-image on crops of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from .picture_sizes import PictureSize
from .render import render
from .scene import sample_scene
from .sizes import Stage
from .train_autoencoder import sample_clips, to_model, to_pixels
from .training import Average, Checkpoint, Log, Shards, autocast, learning_rate, step_rng

PEAK_RATE = 2e-3
KL_WEIGHT = 1e-4


def build_picture_autoencoder(size: PictureSize) -> AutoencoderKL:
    """An untrained autoencoder: 4x in space, no attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=size.autoencoder_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=size.pixels,
        scaling_factor=1.0,
    )


def train_picture_autoencoder(
    size: PictureSize, steps: int, out: Path, *, resume: bool, seed: int, device: torch.device, save_every: int = 500
) -> AutoencoderKL:
    """Trains for `steps` steps and saves the averaged model in `out`/vae."""
    torch.manual_seed(seed)
    model: Any = build_picture_autoencoder(size)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average({"vae": model}, decay=0.998)
    checkpoint = Checkpoint(out / "autoencoder.pt", average, optimizer)
    log = Log(out / "autoencoder.log")
    shards = Shards((model,), device)

    def reconstruct(modules: Any, part: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        with autocast(device):
            posterior = modules[0].encode(part).latent_dist
            decoded = modules[0].decode(posterior.sample(generator)).sample
        error = decoded.float() - part
        absolute, kl = error.abs().mean(), posterior.kl().sum() / posterior.mean.numel()
        return absolute + 2 * error.square().mean() + KL_WEIGHT * kl, absolute, kl

    start = checkpoint.load() if resume and checkpoint.path.exists() else 0
    log.line(f"autoencoder: {sum(p.numel() for p in model.parameters())} parameters, from step {start}")
    # Clips of one frame: spinning and moving objects are seen at every angle and place.
    stage = Stage(share=1.0, batch=size.autoencoder_batch, frames=1, crop=size.pixels // 2)
    for step in range(start, steps):
        pictures = sample_clips(step_rng(seed, step), size, stage).squeeze(2).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_RATE)
        optimizer.zero_grad(set_to_none=True)
        _, absolute, kl = shards.gradient(reconstruct, (pictures,), seed * 1_000_003 + step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 20 == 0:
            log.progress(step, steps, [("l1", absolute), ("kl", kl)])
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
            with average.applied():
                error = save_picture_preview(model, size, out / f"autoencoder-{step + 1:05d}.png", device)
            log.line(f"PSNR of 32 reconstructions {error:.1f} dB")
    with average.applied():
        standardise(model, size, seed, device)
        model.save_pretrained(out / "vae")
    log.line(f"saved {out / 'vae'}")
    return model


def random_pictures(size: PictureSize, seed: int, count: int) -> np.ndarray:
    """uint8 (count, 1, pixels, pixels, 3): pictures with one to three objects."""
    rng = step_rng(seed, 0)
    return np.stack([render(sample_scene(rng, 1 + k % 3, still=True), size.pixels, 1) for k in range(count)])


@torch.no_grad()
def standardise(model: Any, size: PictureSize, seed: int, device: torch.device) -> None:
    """Rescales the latents inside the model so that every channel has mean 0 and deviation 1.

    StableDiffusionPipeline knows one scaling factor for all channels and no shift, so the two 1x1 convolutions around
    the latents absorb both.
    """
    inputs = to_model(random_pictures(size, seed + 1, 128)).squeeze(2)
    modes = [model.encode(part.to(device)).latent_dist.mode().float() for part in inputs.split(16)]
    values = torch.cat(modes).transpose(0, 1).flatten(1)
    mean, std = values.mean(1), values.std(1)
    before, after = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the second half is the logarithm of the variance
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def save_picture_preview(model: Any, size: PictureSize, path: Path, device: torch.device) -> float:
    """Eight pictures above their reconstructions; returns the PSNR over 32 pictures in dB."""
    pictures = random_pictures(size, 7, 32)
    inputs = to_model(pictures).squeeze(2).to(device)
    decoded = model.decode(model.encode(inputs).latent_dist.mode()).sample.unsqueeze(2)
    copies = to_pixels(decoded)
    rows = [np.concatenate(list(side[:8, 0]), 1) for side in (pictures, copies)]
    Image.fromarray(np.concatenate(rows, 0)).save(path)
    error = np.square(pictures.astype(np.float64) - copies).mean()
    return float(10 * np.log10(255**2 / error))
