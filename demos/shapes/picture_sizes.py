"""The size in which shapes-image is trained, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PictureSize:
    """Everything that fixes the models of shapes-image.

    The autoencoder divides `pixels` by 4, and the three levels of the U-Net by 1, 2 and 4 again, with attention at the
    last two: so the coarsest grid, pixels / 16, is the one where A-STAR reads attention maps, as in SDXL.
    """

    pixels: int = 128
    frames: int = 1
    autoencoder_channels: tuple[int, ...] = (16, 32, 48)
    autoencoder_batch: int = 32
    unet_channels: tuple[int, ...] = (32, 96, 128)
    heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    batch: int = 32


PICTURES = PictureSize()
