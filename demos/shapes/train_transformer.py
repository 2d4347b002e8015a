"""Trains the WanTransformer3DModel of shapes-video, and its text encoder with it, by flow matching."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel

from .latent_pool import TEXT_LENGTH, LatentPool
from .sizes import Size
from .text import build_text_encoder, build_tokenizer
from .train_denoiser import Denoising, train_denoiser

PIPELINE_TEXT_LENGTH = 512  # WanPipeline pads prompt embeddings with zeros to this length and attends to all of them
SHIFT = 3.0  # moves the noise levels of training and sampling towards pure noise
CHUNKS = 3, 150  # chunks of encoded clips at the start, and steps between two new ones


def build_transformer(size: Size) -> WanTransformer3DModel:
    """An untrained transformer with one token per latent pixel."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        text_dim=size.text_dim,
        freq_dim=256,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


class ShortTextProcessor(WanAttnProcessor):
    """Cross-attention over `TEXT_LENGTH` text positions that equals the stock one over `PIPELINE_TEXT_LENGTH`.

    All padding keys are the same vector. So the last position, which is always padding here, stands for the missing
    ones too: adding log(n) to its logit counts it n times in the softmax. With so few keys plain matrix products are
    several times faster on a CPU than the fused attention.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).permute(0, 2, 3, 1)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        logits = torch.matmul(query * query.shape[-1] ** -0.5, key)
        bias = logits.new_zeros(TEXT_LENGTH)
        bias[-1] = math.log(PIPELINE_TEXT_LENGTH - TEXT_LENGTH + 1)
        out = torch.matmul((logits + bias).softmax(-1), value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def use_short_text(transformer: Any, short: bool) -> None:
    """Switches all cross-attention between `ShortTextProcessor` and the stock processor."""
    for block in transformer.blocks:
        block.attn2.set_processor(ShortTextProcessor() if short else WanAttnProcessor())


def encode_text(encoder: Any, tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """Token ids (batch, length) to embeddings (batch, length, width), zero at the padding as in WanPipeline."""
    mask = tokens != pad
    return encoder(tokens, mask.long()).last_hidden_state * mask.unsqueeze(-1)


def flow_loss(transformer: Any, text: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise - latents) at random noise levels, stratified in a batch."""
    count = len(latents)
    device = latents.device
    uniform = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = transformer(noisy, sigma * 1000, text, return_dict=False)[0]
    return (velocity.float() - (noise - latents)).square().mean()


def train_transformer(
    size: Size, steps: int, out: Path, *, resume: bool, seed: int, device: torch.device, save_every: int = 500
) -> WanPipeline:
    """Trains for `steps` steps on clips encoded with `out`/vae, and saves the pipeline in `out`/pipeline."""
    vae: Any = AutoencoderKLWan.from_pretrained(out / "vae")
    vae.to(device).eval()
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    transformer: Any = build_transformer(size)
    encoder: Any = build_text_encoder(size.text_dim, size.text_layers)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    transformer.to(device)
    encoder.to(device)
    use_short_text(transformer, True)
    pool = LatentPool(out / "latents", size, vae, tokenizer, seed, device)

    def loss(modules: Any, latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return flow_loss(modules[0], encode_text(modules[1], tokens, tokenizer.pad_token_id), latents, generator)

    def save(done: int) -> None:
        save_pipeline(out / "pipeline", tokenizer, encoder, vae, transformer)
        facts = {"steps": done, "batch": size.batch, "clips": len(pool), "seed": seed, "pixels": size.pixels}
        (out / "pipeline" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")

    task = Denoising(
        {"transformer": transformer, "text_encoder": encoder},
        pool,
        CHUNKS,
        torch.tensor(tokenizer("").input_ids + [tokenizer.pad_token_id] * (TEXT_LENGTH - 1), device=device),
        loss,
        lambda name: name.startswith("blocks."),
        save,
    )
    train_denoiser(
        task, steps, size.batch, out / "transformer.pt", resume=resume, seed=seed, device=device, save_every=save_every
    )
    return WanPipeline.from_pretrained(out / "pipeline")


def save_pipeline(path: Path, tokenizer: Any, encoder: Any, vae: Any, transformer: Any) -> None:
    """Writes a WanPipeline with float16 weights that plain `from_pretrained` loads."""
    pipe: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=copy.deepcopy(encoder),
        vae=copy.deepcopy(vae),
        transformer=copy.deepcopy(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    use_short_text(pipe.transformer, False)
    # The text encoder stays in float32: transformers would compute in whatever type it finds in the file.
    for part in (pipe.vae, pipe.transformer):
        part.half()
    pipe.save_pretrained(path)
