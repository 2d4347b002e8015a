"""Image models, by facts about where their tokens sit: SD3, Flux, and the UNets of SD 1.x, 2.x and SDXL."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from attnproc.families.generic import Generic
from attnproc.layout import Grid


class SD3(Generic):
    """Joint attention of [image | text]; `attn2` of SD 3.5 medium sees the image alone."""

    name = "sd3"
    models = ("SD3Transformer2DModel",)

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        return 1, height // model.config.patch_size, width // model.config.patch_size

    def joint(self, site: str) -> bool:
        return not site.endswith(".attn2")


class Flux(Generic):
    """Joint attention of [text | image]. With reference images the grid covers less than the image tokens."""

    name = "flux"
    models = ("FluxTransformer2DModel",)
    text_first = True

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid | None:
        ids = arguments["img_ids"].reshape(-1, 3)
        reference, row, column = (int(n) + 1 for n in ids.amax(0).tolist())
        tokens = arguments["hidden_states"].shape[1]
        return (1, row, column) if reference == 1 and row * column == tokens else None

    def joint(self, site: str) -> bool:
        return True

    def timestep(self, arguments: Mapping[str, Any]) -> Any:
        return 1000 * arguments["timestep"]


class UNet(Generic):
    """Self-attention `attn1` over the picture, which is halved from level to level."""

    name = "unet"
    models = ("UNet2DConditionModel",)

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        return ((name, module) for name, module in super().sites(model) if name.endswith(".attn1"))

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["sample"].shape[-2:]
        return 1, height, width

    def grid_at(self, grid: Grid, tokens: int) -> Grid:
        _, height, width = grid
        while height * width > tokens and height * width > 1:
            height, width = -(-height // 2), -(-width // 2)
        return 1, height, width
