"""A pool of encoded clips or pictures with their captions, on disk and growing: a training step never waits for the
autoencoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .picture_text import TEXT_LENGTH as PICTURE_TEXT_LENGTH
from .render import render
from .scene import Scene, caption, sample_scene
from .train_autoencoder import to_model
from .training import Shards, autocast

TEXT_LENGTH = 40  # positions that a training caption may take; the longest has 36 tokens


def normalised(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Latents (batch, channels, frames, height, width) with the mean and deviation of the vae's config taken out."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=latents.device).view(shape)
    return (latents.float() - mean) / std


class LatentPool:
    """Chunks of clips in `folder`, each made from its own seed: chunk n is the same in every run.

    A clip keeps three wordings of its caption; an epoch draws one of them.
    """

    text_length = TEXT_LENGTH
    still = False

    def __init__(self, folder: Path, size: Any, vae: Any, tokenizer: Any, seed: int, device: torch.device):
        self.folder, self.size, self.vae, self.tokenizer = folder, size, vae, tokenizer
        self.shards = Shards((vae,), device)
        self.seed, self.device = seed, device
        folder.mkdir(parents=True, exist_ok=True)
        self.latents: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self.latents)

    def grow(self, chunks: int, clips: int = 512) -> None:
        """Loads or makes chunks until there are `chunks` of them."""
        for number in range(len(self.latents), chunks):
            path = self.folder / f"{number:04d}.pt"
            if not path.exists():
                torch.save(self._make(number, clips), path)
            latents, tokens = torch.load(path, weights_only=True)
            self.latents.append(latents)
            self.tokens.append(tokens)

    def _make(self, number: int, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{self.seed} latents {number}")
        scenes = [sample_scene(rng, still=self.still) for _ in range(clips)]
        share = -(-clips // self.shards.count)
        parts = [(scenes[k : k + share],) for k in range(0, clips, share)]
        latents = torch.cat(self.shards.map(self._encode, parts))
        wordings = [caption(scene, rng, self.still) for scene in scenes for _ in range(3)]
        length = self.text_length
        ids = self.tokenizer(wordings, padding="max_length", max_length=length, return_tensors="pt").input_ids
        if int((ids != self.tokenizer.pad_token_id).sum(1).max()) >= length:
            raise ValueError(f"Got a caption of {length} tokens or more. Raise TEXT_LENGTH.")
        return latents, ids.view(clips, 3, length).to(torch.int16)

    @torch.no_grad()
    def _encode(self, modules: Any, scenes: list[Scene]) -> torch.Tensor:
        batch = 8 if self.device.type == "cpu" else 64
        latents = []
        for first in range(0, len(scenes), batch):
            clips = [render(scene, self.size.pixels, self.size.frames) for scene in scenes[first : first + batch]]
            with autocast(self.device, self.device.type == "cuda"):
                mode = modules[0].encode(to_model(np.stack(clips)).to(self.device)).latent_dist.mode()
            latents.append(normalised(mode, self.vae).half().cpu())
        return torch.cat(latents)

    def batch(self, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random clips: latents float32 (count, channels, frames, height, width) and token ids (count, text length)."""
        picks = []
        for _ in range(count):
            chunk = rng.randrange(len(self.latents))
            picks.append((chunk, rng.randrange(len(self.latents[chunk])), rng.randrange(3)))
        latents = torch.stack([self.latents[c][k] for c, k, _ in picks]).float()
        tokens = torch.stack([self.tokens[c][k, w] for c, k, w in picks]).long()
        return latents.to(self.device), tokens.to(self.device)


class PicturePool(LatentPool):
    """The same with pictures: latents (count, channels, height, width)."""

    text_length = PICTURE_TEXT_LENGTH
    still = True

    @torch.no_grad()
    def _encode(self, modules: Any, scenes: list[Scene]) -> torch.Tensor:
        latents = []
        for first in range(0, len(scenes), 16):
            pictures = np.stack([render(scene, self.size.pixels, 1) for scene in scenes[first : first + 16]])
            with autocast(self.device):
                mode = modules[0].encode(to_model(pictures).squeeze(2).to(self.device)).latent_dist.mode()
            latents.append(mode.half().cpu())
        return torch.cat(latents)
