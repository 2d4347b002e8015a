"""The two sizes in which shapes-video can be trained, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from .scene import FRAMES


@dataclass(frozen=True)
class Stage:
    """A part of the autoencoder's training: its share of the steps, and what a batch holds."""

    share: float
    batch: int
    frames: int
    crop: int  # pixels


@dataclass(frozen=True)
class Size:
    """Everything that distinguishes one trained shapes-video from another.

    `pixels` is the native width and height. The autoencoder divides it by 8, and time by 4, so that the token grid is
    (5, pixels / 8, pixels / 8) for 17 frames.
    """

    pixels: int
    frames: int
    encoder_dim: int
    decoder_dim: int
    latent_channels: int
    stages: tuple[Stage, ...]
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    text_layers: int
    batch: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.frames - 1) // 4 + 1, self.pixels // 8, self.pixels // 8


SIZES = {
    "cpu": Size(
        pixels=64,
        frames=FRAMES,
        encoder_dim=24,
        decoder_dim=32,
        latent_channels=12,
        stages=(Stage(0.5, 16, 1, 64), Stage(0.3, 8, 9, 48), Stage(0.2, 4, 17, 64)),
        heads=5,
        head_dim=32,
        layers=6,
        ffn_dim=512,
        text_dim=96,
        text_layers=2,
        batch=24,
    ),
    "gpu": Size(
        pixels=128,
        frames=FRAMES,
        encoder_dim=24,
        decoder_dim=32,
        latent_channels=12,
        stages=(Stage(0.3, 64, 1, 128), Stage(0.3, 32, 9, 96), Stage(0.4, 16, 17, 128)),
        heads=5,
        head_dim=32,
        layers=8,
        ffn_dim=640,
        text_dim=96,
        text_layers=2,
        batch=128,
    ),
}
