"""The training loop of both models' denoisers, each with its text encoder, on encoded samples and their captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .training import Average, Checkpoint, Log, Optimizers, Shards, autocast, learning_rate, step_rng

CAPTION_DROPOUT = 0.1
HOLD = 0.6  # part of the steps at the highest learning rate


@dataclass(frozen=True)
class Denoising:
    """What is trained on what.

    Attributes:
        modules: the denoiser and then the text encoder, by name.
        pool: gives latents and tokens (see `latent_pool`).
        chunks: of encoded samples at the start, and steps between two new ones.
        empty: token ids (length,) of no caption.
        loss: loss(modules, latents, tokens, generator) is a scalar, the mean over the batch.
        is_matrix: which parameters of the denoiser Muon trains, by name.
        save: save(steps) is called with averaged weights in the modules.
    """

    modules: dict[str, nn.Module]
    pool: Any
    chunks: tuple[int, int]
    empty: torch.Tensor
    loss: Callable[[Sequence[Any], torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
    is_matrix: Callable[[str], bool]
    save: Callable[[int], None]


def train_denoiser(
    task: Denoising,
    steps: int,
    batch: int,
    path: Path,
    *,
    resume: bool,
    seed: int,
    device: torch.device,
    save_every: int,
) -> None:
    """Trains up to `steps` steps; checkpoints go to `path`, a .pt file, and the log beside it."""
    modules = tuple(task.modules.values())
    optimizers = Optimizers(modules, task.is_matrix)
    average = Average(task.modules, decay=0.999)
    checkpoint = Checkpoint(path, average, optimizers)
    log = Log(path.with_suffix(".log"))
    start = checkpoint.load() if resume and path.exists() else 0
    count = sum(p.numel() for p in optimizers.parameters)
    log.line(f"{' and '.join(task.modules)}: {count} parameters, from step {start}")
    shards = Shards(modules, device)

    def loss(modules: Any, *arguments: Any) -> tuple[torch.Tensor]:
        with autocast(device):
            return (task.loss(modules, *arguments),)

    sums = torch.zeros(2)
    for step in range(start, steps):
        task.pool.grow(task.chunks[0] + step // task.chunks[1])
        rng = step_rng(seed, step)
        latents, tokens = task.pool.batch(rng, batch)
        dropped = [rng.random() < CAPTION_DROPOUT for _ in range(len(tokens))]
        tokens[torch.tensor(dropped, device=device)] = task.empty
        [found] = shards.gradient(loss, (latents, tokens), seed * 1_000_003 + step)
        optimizers.step(learning_rate(step, steps, 1.0, hold=HOLD))
        average.update(step)
        sums += torch.tensor([found, 1.0])
        if step % 20 == 0:
            log.progress(step, steps, [("loss", float(sums[0] / sums[1]))])
            sums.zero_()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoint.save(step + 1)
            with average.applied():
                task.save(step + 1)
