"""Trains the AutoencoderKLWan of shapes-video: still frames first, then short crops of clips, then whole clips."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image

from .picture_sizes import PictureSize
from .render import render
from .scene import FRAMES, WORLD, sample_scene
from .sizes import Size, Stage
from .training import Average, Checkpoint, Log, Shards, autocast, learning_rate, step_rng

PEAK_RATE = 1.5e-3
KL_WEIGHT = 2e-4


def build_autoencoder(size: Size) -> AutoencoderKLWan:
    """An untrained autoencoder: 8x in space (2x by patching, so that it is fast on a CPU), 4x in time."""
    model = AutoencoderKLWan(
        base_dim=size.encoder_dim,
        decoder_base_dim=size.decoder_dim,
        z_dim=size.latent_channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * size.latent_channels,
        latents_std=[1.0] * size.latent_channels,
    )
    start_frame_by_frame(model)
    return model


@torch.no_grad()
def start_frame_by_frame(model: AutoencoderKLWan) -> None:
    """Makes an untrained model treat every frame as a picture of its own, so that clips start from what stills taught.

    Still frames train only the last time slice of the causal kernels; the others would be noise. They start at zero,
    and the convolutions that halve and double the frame rate start near the identity.
    """
    for name, module in model.named_modules():
        if name.endswith("time_conv"):
            module.weight *= 0.1
            channels = module.in_channels
            for first in range(0, module.out_channels, channels):
                module.weight[first : first + channels, :, -1, 0, 0] += torch.eye(channels)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1] = 0.0


def to_model(video: np.ndarray) -> torch.Tensor:
    """uint8 (batch, frames, height, width, 3) to float32 (batch, 3, frames, height, width) in [-1, 1]."""
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def to_pixels(video: torch.Tensor) -> np.ndarray:
    """The inverse of `to_model`, rounded."""
    return (video.float() * 127.5 + 128).clamp(0, 255).permute(0, 2, 3, 4, 1).to(torch.uint8).cpu().numpy()


def sample_clips(rng: random.Random, size: Size | PictureSize, stage: Stage) -> torch.Tensor:
    """A batch of random clips: consecutive frames from a random moment, cropped around a random object."""
    clips = []
    for _ in range(stage.batch):
        scene = sample_scene(rng, count=rng.choice((1, 2, 3)))
        first = rng.randint(0, FRAMES - stage.frames)
        moments = [(first + k) / (FRAMES - 1) for k in range(stage.frames)]
        video = render(scene, size.pixels, moments)
        if stage.crop < size.pixels:
            x, y = rng.choice(scene.objects).center(0.5)
            free = size.pixels - stage.crop
            corner = []
            for center in (x, y):
                wanted = center / WORLD * size.pixels - stage.crop / 2 + rng.uniform(-0.2, 0.2) * stage.crop
                corner.append(min(max(0, round(wanted)), free))
            video = video[:, corner[1] : corner[1] + stage.crop, corner[0] : corner[0] + stage.crop]
        clips.append(video)
    return to_model(np.stack(clips))


def stage_at(size: Size, step: int, steps: int) -> Stage:
    """The stage in which `step` of `steps` lies."""
    passed = 0.0
    for stage in size.stages:
        passed += stage.share
        if step < passed * steps:
            return stage
    return size.stages[-1]


def train_autoencoder(
    size: Size, steps: int, out: Path, *, resume: bool, seed: int, device: torch.device, save_every: int = 200
) -> AutoencoderKLWan:
    """Trains for `steps` steps and saves the averaged weights, with latent statistics, in `out`/vae."""
    torch.manual_seed(seed)
    model: Any = build_autoencoder(size)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average({"vae": model}, decay=0.998)
    checkpoint = Checkpoint(out / "autoencoder.pt", average, optimizer)
    log = Log(out / "autoencoder.log")
    shards = Shards((model,), device)

    def reconstruct(modules, part: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        # On the CPU bfloat16 pays for still frames only (measured: 1.5x, against 0.9x for clips).
        with autocast(device, device.type == "cuda" or part.shape[2] == 1):
            posterior = modules[0].encode(part).latent_dist
            decoded = modules[0].decode(posterior.sample(generator)).sample
        error = decoded.float() - part
        absolute, kl = error.abs().mean(), posterior.kl().sum() / posterior.mean.numel()
        loss = absolute + 2 * error.square().mean() + KL_WEIGHT * kl
        return loss, absolute, kl

    start = checkpoint.load() if resume and checkpoint.path.exists() else 0
    log.line(f"autoencoder: {sum(p.numel() for p in model.parameters())} parameters, from step {start}")
    for step in range(start, steps):
        stage = stage_at(size, step, steps)
        clips = sample_clips(step_rng(seed, step), size, stage).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_RATE)
        optimizer.zero_grad(set_to_none=True)
        _, absolute, kl = shards.gradient(reconstruct, (clips,), seed * 1_000_003 + step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if step % 20 == 0:
            log.progress(step, steps, [("l1", absolute), ("kl", kl)])
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
            with average.applied():
                save_preview(model, size, out / f"autoencoder-{step + 1:05d}.png", device)
    with average.applied():
        measure_latents(model, size, seed, device)
        model.save_pretrained(out / "vae")
    log.line(f"saved {out / 'vae'}")
    return model


@torch.no_grad()
def measure_latents(model: AutoencoderKLWan, size: Size, seed: int, device: torch.device, clips: int = 128) -> None:
    """Writes the mean and deviation of each latent channel, over random clips, into the model's config."""
    rng = random.Random(seed + 1)
    latents = []
    for _ in range(0, clips, 8):
        video = np.stack([render(sample_scene(rng), size.pixels, size.frames) for _ in range(8)])
        latents.append(model.encode(to_model(video).to(device)).latent_dist.mode().float().cpu())
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    mean, std = values.mean(1).tolist(), values.std(1).tolist()
    model.register_to_config(latents_mean=mean, latents_std=std)


@torch.no_grad()
def save_preview(model: AutoencoderKLWan, size: Size, path: Path, device: torch.device) -> None:
    """Four clips above their reconstructions, every second frame."""
    rng = random.Random(7)
    video = np.stack([render(sample_scene(rng, 1 + k % 3), size.pixels, size.frames) for k in range(4)])
    inputs = to_model(video).to(device)
    decoded = to_pixels(model.decode(model.encode(inputs).latent_dist.mode()).sample)
    rows = []
    for clip, copy in zip(video, decoded, strict=True):
        rows += [np.concatenate(list(clip[::2]), 1), np.concatenate(list(copy[::2]), 1)]
    Image.fromarray(np.concatenate(rows, 0)).save(path)
