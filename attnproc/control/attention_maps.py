"""Cross-attention maps of a U-Net at one resolution, from a forward pass that ends at the last of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from attnproc.control.unet import attention_layers, finish, processors_replaced, project
from attnproc.errors import SettingsError, UnsupportedError


def layer_grids(unet: Any, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the queries of every cross-attention layer, by name in call order.

    Args:
        unet: a `UNet2DConditionModel`.
        height, width: of the latents.
    """
    levels, level = {}, 0
    for number, block in enumerate(unet.down_blocks):
        levels[f"down_blocks.{number}"] = level
        level += getattr(block, "downsamplers", None) is not None
    levels["mid_block"] = level
    for number, block in enumerate(unet.up_blocks):
        levels[f"up_blocks.{number}"] = level
        level -= getattr(block, "upsamplers", None) is not None
    grids = {}
    for name in attention_layers(unet, "attn2"):
        stage = name.split(".transformer_blocks")[0].rsplit(".attentions", 1)[0]
        if stage in levels:
            grids[name] = tuple(-(-size // 2 ** levels[stage]) for size in (height, width))
    return grids


def layers_at(unet: Any, height: int, width: int, resolution: tuple[int, int]) -> tuple[str, ...]:
    """Cross-attention layers with that many rows and columns, in call order, for latents of height x width.

    Raises:
        SettingsError: there is none; the message names the resolutions there are.
    """
    grids = layer_grids(unet, height, width)
    found = tuple(name for name, grid in grids.items() if grid == resolution)
    if not found:
        known = ", ".join(f"({r}, {c}) with {r * c} queries" for r, c in sorted(set(grids.values()), reverse=True))
        raise SettingsError(
            f"attention_resolution {resolution} has no cross-attention layer for latents of {height} x {width}; "
            f"expected one of {known or 'none: this U-Net has no attn2'}. Choose one of these (rows, columns)."
        )
    return found


class MapRecorder:
    """Sums the attention probabilities of some layers over layers and heads."""

    def __init__(self, layers: Sequence[str], grid: tuple[int, int]):
        self.layers = layers
        self.grid = grid
        self._sum: Tensor | None = None
        self._heads = 0
        self._missing = len(layers)

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def take(self, probabilities: Tensor) -> None:
        """The probabilities (batch, heads, queries, text tokens) of one layer."""
        if self.complete:  # gradient checkpointing calls a layer again during the backward pass
            return
        rows, columns = self.grid
        if probabilities.shape[2] != rows * columns:
            raise UnsupportedError(
                f"a cross-attention layer got {probabilities.shape[2]} queries; expected {rows} x {columns}, as each "
                "level of a U-Net halves the grid. Choose a height and width divisible by 64 pixels."
            )
        summed = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32)).sum(1)
        self._sum = summed if self._sum is None else self._sum + summed
        self._heads += probabilities.shape[1]
        self._missing -= 1

    def maps(self) -> Tensor:
        """Mean over layers and heads, (batch, rows, columns, text tokens), at least float32."""
        if self._sum is None or not self.complete:
            raise UnsupportedError(
                f"{self._missing} of {len(self.layers)} cross-attention layers were not called in a pass of the U-Net; "
                "expected every one. Take off what skips or replaces them."
            )
        return (self._sum / self._heads).unflatten(1, self.grid)


@contextmanager
def captured_maps(
    unet: Any,
    layers: Sequence[str],
    grid: tuple[int, int],
    sample: Tensor,
    timestep: Any,
    arguments: Mapping[str, Any],
    *,
    early_exit: bool = True,
) -> Iterator[Tensor]:
    """Runs the U-Net as far as the last of the layers, and yields their maps with the graph to `sample`.

    Gradients are to be taken inside the block: with gradient checkpointing they call the layers again, and the pass
    runs to its end. The U-Net runs eagerly, compiled or not.

    Args:
        unet: the `UNet2DConditionModel` itself.
        layers, grid: names in call order, and the rows and columns they share.
        sample: scaled latents (batch, channels, height, width).
        timestep, arguments: what else the U-Net takes, for that batch.
        early_exit: end the pass at the last layer; the gradient is the same either way.

    Yields:
        probabilities (batch, rows, columns, text tokens), at least float32, mean over layers and heads.
    """
    early_exit = early_exit and not any(getattr(module, "gradient_checkpointing", False) for module in unet.modules())
    recorder = MapRecorder(layers, grid)
    processors = {name: _Capture(recorder, early_exit) for name in layers}
    with processors_replaced(unet, processors), torch.compiler.set_stance("force_eager"):
        with suppress(_LastMapTaken):
            # Not the call: hooks that wait for the pipeline's own pass stay out of this one.
            unet.forward(sample, timestep, **arguments)
        yield recorder.maps()


@contextmanager
def listening(unet: nn.Module, layers: Sequence[str], grid: tuple[int, int], images: int) -> Iterator[MapRecorder]:
    """Records the last `images` rows of the batch, the conditional ones, in a pass that stays the same to the bit."""
    recorder = MapRecorder(layers, grid)
    processors = {
        name: _Listener(recorder, module.processor, images) for name in layers for module in [unet.get_submodule(name)]
    }
    with processors_replaced(unet, processors):
        yield recorder


class _LastMapTaken(Exception):
    """Ends a forward pass."""


class _Capture:
    """`AttnProcessor2_0` with the probabilities written out, so that they carry gradients."""

    def __init__(self, recorder: MapRecorder, early_exit: bool):
        self.recorder = recorder
        self.early_exit = early_exit

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        projected = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        probabilities = _probabilities(attn, projected.query, projected.key, projected.mask)
        self.recorder.take(probabilities)
        if self.early_exit and self.recorder.complete:
            raise _LastMapTaken
        return finish(attn, probabilities @ projected.value, projected)


class _Listener:
    """The stock processor, and the probabilities of the conditional rows beside it."""

    def __init__(self, recorder: MapRecorder, stock: Any, images: int):
        self.recorder = recorder
        self.stock = stock
        self.images = images

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        projected = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        query, key = projected.query[-self.images :], projected.key[-self.images :]
        mask = None if projected.mask is None else projected.mask[-self.images :]
        self.recorder.take(_probabilities(attn, query, key, mask))
        return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)


def _probabilities(attn: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, heads, queries, keys), upcast where the layer asks for it."""
    if mask is not None:
        mask = mask.expand(*query.shape[:2], -1, -1).flatten(0, 1)
        mask = mask.to(torch.float32 if attn.upcast_attention else query.dtype)
    scores = attn.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1), mask)
    return scores.unflatten(0, query.shape[:2])
