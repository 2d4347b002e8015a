"""Trains the UNet2DConditionModel of shapes-image, and its text encoder with it, to predict the velocity."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from .latent_pool import PicturePool
from .picture_sizes import PictureSize
from .picture_text import build_clip_text_encoder, build_clip_tokenizer
from .scene import caption, sample_scene
from .train_denoiser import Denoising, train_denoiser
from .training import step_rng

SHIFT = 1.5  # moves the noise levels of training towards pure noise
CHUNKS = 8, 100  # chunks of encoded pictures at the start, and steps between two new ones


def build_unet(size: PictureSize) -> UNet2DConditionModel:
    """An untrained U-Net of three levels, with self- and cross-attention at the two coarser ones and in the middle."""
    return UNet2DConditionModel(
        sample_size=size.pixels // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=size.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=size.text_width,
        attention_head_dim=size.heads,  # the number of heads, in the models of this class
        norm_num_groups=8,
    )


def build_scheduler() -> Any:
    """The noise schedule of Stable Diffusion, with predicted velocity as in SD 2.1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def velocity_loss(
    unet: Any, scheduler: Any, text: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the predicted velocity at random noise levels, stratified in a batch."""
    count, device = len(latents), latents.device
    uniform = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    timesteps = (shifted * scheduler.config.num_train_timesteps).long()
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = unet(noisy, timesteps, text, return_dict=False)[0]
    return (velocity.float() - scheduler.get_velocity(latents, noise, timesteps)).square().mean()


def train_unet(
    size: PictureSize, steps: int, out: Path, *, resume: bool, seed: int, device: torch.device, save_every: int = 500
) -> StableDiffusionPipeline:
    """Trains for `steps` steps on pictures encoded with `out`/vae, and saves the pipeline in `out`/pipeline."""
    vae: Any = AutoencoderKL.from_pretrained(out / "vae")
    vae.to(device).eval()
    tokenizer = build_clip_tokenizer()
    torch.manual_seed(seed)
    unet: Any = build_unet(size)
    encoder: Any = build_clip_text_encoder(tokenizer, size.text_width, size.text_layers)
    torch.nn.init.zeros_(unet.conv_out.weight)
    unet.to(device)
    encoder.to(device)
    scheduler = build_scheduler()
    pool = PicturePool(out / "latents", size, vae, tokenizer, seed, device)

    def loss(modules: Any, latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return velocity_loss(modules[0], scheduler, modules[1](tokens).last_hidden_state, latents, generator)

    def save(done: int) -> None:
        pipe = save_picture_pipeline(out / "pipeline", tokenizer, encoder, vae, unet)
        facts = {"steps": done, "batch": size.batch, "pictures": len(pool), "seed": seed, "pixels": size.pixels}
        (out / "pipeline" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        save_samples(pipe, out / f"unet-{done:05d}.png")

    task = Denoising(
        {"unet": unet, "text_encoder": encoder},
        pool,
        CHUNKS,
        torch.tensor(tokenizer("", padding="max_length").input_ids, device=device),
        loss,
        lambda name: "transformer_blocks" in name,
        save,
    )
    train_denoiser(
        task, steps, size.batch, out / "unet.pt", resume=resume, seed=seed, device=device, save_every=save_every
    )
    return StableDiffusionPipeline.from_pretrained(out / "pipeline")


def save_picture_pipeline(path: Path, tokenizer: Any, encoder: Any, vae: Any, unet: Any) -> Any:
    """Writes a StableDiffusionPipeline with float16 weights that plain `from_pretrained` loads; returns it loaded."""
    pipe: Any = StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=copy.deepcopy(encoder),
        vae=copy.deepcopy(vae),
        unet=copy.deepcopy(unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # The text encoder stays in float32: transformers would compute in whatever type it finds in the file.
    for part in (pipe.vae, pipe.unet):
        part.half()
    pipe.save_pretrained(path)
    return StableDiffusionPipeline.from_pretrained(path)


def save_samples(pipe: Any, path: Path) -> None:
    """Twelve pictures of held-out captions, by number of objects from left to right."""
    pipe.set_progress_bar_config(disable=True)
    rng = step_rng(11, 0)
    prompts = [caption(sample_scene(rng, 1 + k // 4, held_out=True, still=True), still=True) for k in range(12)]
    generators = [torch.Generator().manual_seed(k) for k in range(12)]
    images = pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators, output_type="np").images
    rows = [np.concatenate(list(images[k : k + 6]), 1) for k in (0, 6)]
    Image.fromarray((np.concatenate(rows, 0) * 255).round().astype(np.uint8)).save(path)
