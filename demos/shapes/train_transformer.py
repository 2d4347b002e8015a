"""Trains the WanTransformer3DModel of shapes-video, and its text encoder with it, by flow matching."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from .latent_pool import TEXT_LENGTH, LatentPool
from .sizes import Size
from .text import build_text_encoder, build_tokenizer
from .training import Average, Checkpoint, Log, autocast, learning_rate, step_rng

PIPELINE_TEXT_LENGTH = 512  # WanPipeline pads prompt embeddings with zeros to this length and attends to all of them
SHIFT = 3.0  # moves the noise levels of training and sampling towards pure noise
CAPTION_DROPOUT = 0.1
MATRIX_RATE, OTHER_RATE = 2e-3, 1e-3


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
    ones too: adding log(n) to its logit counts it n times in the softmax.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        bias = hidden_states.new_zeros(1, 1, 1, TEXT_LENGTH)
        bias[..., -1] = math.log(PIPELINE_TEXT_LENGTH - TEXT_LENGTH + 1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


def use_short_text(transformer: Any, short: bool) -> None:
    """Switches all cross-attention between `ShortTextProcessor` and the stock processor."""
    for block in transformer.blocks:
        block.attn2.set_processor(ShortTextProcessor() if short else WanAttnProcessor())


def encode_text(encoder: Any, tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """Token ids (batch, length) to embeddings (batch, length, width), zero at the padding as in WanPipeline."""
    mask = tokens != pad
    return encoder(tokens, mask.long()).last_hidden_state * mask.unsqueeze(-1)


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for everything else, behind one face."""

    def __init__(self, transformer: torch.nn.Module, encoder: torch.nn.Module):
        matrices, others = [], []
        for name, parameter in transformer.named_parameters():
            inside = name.startswith("blocks.") and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
        others += encoder.parameters()
        self.parameters = matrices + others
        self.parts = [
            (torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), MATRIX_RATE),
            (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01), OTHER_RATE),
        ]

    def step(self, factor: float) -> None:
        """One update with every peak rate times `factor`; forgets the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


def flow_loss(
    transformer: Any, text: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise - latents) at random noise levels, stratified in a batch."""
    count = len(latents)
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    sigma = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
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
    optimizers = Optimizers(transformer, encoder)
    average = Average({"transformer": transformer, "text_encoder": encoder}, decay=0.999)
    checkpoint = Checkpoint(out / "transformer.pt", average, optimizers)
    log = Log(out / "transformer.log")
    start = checkpoint.load() if resume and checkpoint.path.exists() else 0
    count = sum(p.numel() for p in optimizers.parameters)
    log.line(f"transformer and text encoder: {count} parameters, from step {start}")
    pool = LatentPool(out / "latents", size, vae, tokenizer, seed, device)
    generator = torch.Generator()
    sums = torch.zeros(2)
    for step in range(start, steps):
        # One new chunk of clips per 50 steps, beyond the first 8: no clip is seen more than a few times.
        pool.grow(8 + step // 50)
        rng = step_rng(seed, step)
        latents, tokens = pool.batch(rng, size.batch)
        dropped = [rng.random() < CAPTION_DROPOUT for _ in range(len(tokens))]
        empty = torch.tensor(tokenizer("").input_ids + [tokenizer.pad_token_id] * (TEXT_LENGTH - 1), device=device)
        tokens[torch.tensor(dropped, device=device)] = empty
        generator.manual_seed(seed * 1_000_003 + step)
        with autocast(device):
            text = encode_text(encoder, tokens, tokenizer.pad_token_id)
            loss = flow_loss(transformer, text, latents, generator)
        loss.backward()
        optimizers.step(learning_rate(step, steps, 1.0))
        average.update(step)
        sums += torch.tensor([loss.item(), 1.0])
        if step % 20 == 0:
            log.progress(step, steps, [("loss", float(sums[0] / sums[1]))])
            sums.zero_()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
            with average.applied():
                save_pipeline(out / "pipeline", tokenizer, encoder, vae, transformer)
    return WanPipeline.from_pretrained(out / "pipeline")


def save_pipeline(path: Path, tokenizer: Any, encoder: Any, vae: Any, transformer: Any) -> None:
    """Writes a float16 WanPipeline that plain `from_pretrained` loads."""
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    use_short_text(transformer, False)
    pipe.save_pretrained(path)
    use_short_text(transformer, True)
