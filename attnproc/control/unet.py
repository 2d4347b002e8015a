"""Own attention on the layers of a `UNet2DConditionModel` for the length of a block of code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from attnproc.errors import SettingsError, UnsupportedError

STOCK = (AttnProcessor, AttnProcessor2_0)


def attention_layers(unet: nn.Module, kind: str) -> dict[str, Any]:
    """Attention modules by their full name in call order (down, mid, up); kind is "attn1" (self) or "attn2" (cross)."""
    stages = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found = [(name, module) for name, module in unet.named_modules() if name.split(".")[-1] == kind]
    return dict(sorted(found, key=lambda item: stages.get(item[0].split(".")[0], 3)))


@contextmanager
def processors_replaced(unet: nn.Module, replacements: dict[str, Any]) -> Iterator[None]:
    """Puts a processor on each named attention module; on every way out the very objects from before are back.

    Raises:
        UnsupportedError: a layer holds something else than diffusers' plain processor (IP-Adapter, PAG, a sparse
            processor of this package), whose effect would be lost.
    """
    modules = {name: unet.get_submodule(name) for name in replacements}
    before = {name: module.processor for name, module in modules.items()}
    for name, processor in before.items():
        if type(processor) not in STOCK:
            raise UnsupportedError(
                f"{name} has a {type(processor).__name__}; expected diffusers' plain attention processor. Take off "
                "what put it there (`pipe.attn_processor = None`, `pipe.unload_ip_adapter()`, "
                "`pipe.disable_attention_slicing()`), then call again."
            )
    try:
        for name, module in modules.items():
            # Not set_processor: it would register a processor that is a module, and logs.
            module.processor = replacements[name]
        yield
    finally:
        for name, module in modules.items():
            module.processor = before[name]


# Parameters by their owner and the name there: offloading may put another parameter in the same place.
Parameters = Sequence[tuple[nn.Module, str]]


def trainable(model: nn.Module) -> Parameters:
    """The parameters that ask for a gradient."""
    return [
        (owner, name)
        for owner in model.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


def require_gradients(parameters: Parameters, flag: bool) -> None:
    """Sets `requires_grad` of each."""
    for owner, name in parameters:
        owner._parameters[name].requires_grad_(flag)  # type: ignore[union-attr]


@contextmanager
def frozen(parameters: Parameters) -> Iterator[None]:
    """The `trainable` parameters of a model ask for no gradient inside the block, and do so again after it."""
    try:
        require_gradients(parameters, False)
        yield
    finally:
        require_gradients(parameters, True)


@dataclass(frozen=True)
class Projected:
    """Query, key and value (batch, heads, tokens, head_dim) of one call, and what `finish` needs of its input."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    residual: Tensor
    shape: tuple[int, ...]


def project(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Projected:
    """What `AttnProcessor2_0` does before its attention call.

    Args:
        attn: a diffusers `Attention`.
        hidden_states: (batch, tokens, channels) or (batch, channels, height, width).
        encoder_hidden_states: (batch, text tokens, text channels), or None for self-attention.
        attention_mask: as diffusers passes it; becomes additive, (batch, heads, 1, keys).
        temb: time embedding, for layers with a spatial norm.
    """
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    shape = tuple(hidden_states.shape)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
        attention_mask = attention_mask.view(context.shape[0], attn.heads, -1, attention_mask.shape[-1])
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if encoder_hidden_states is None:
        context = hidden_states
    elif attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        layer(states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for layer, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return Projected(query, key, value, attention_mask, residual, shape)


def finish(attn: Any, out: Tensor, projected: Projected) -> Tensor:
    """What `AttnProcessor2_0` does after its attention call; out is (batch, heads, tokens, head_dim)."""
    out = out.transpose(1, 2).flatten(2).to(projected.query.dtype)
    out = attn.to_out[1](attn.to_out[0](out))
    if len(projected.shape) == 4:
        out = out.transpose(-1, -2).reshape(projected.shape)
    if attn.residual_connection:
        out = out + projected.residual
    return out / attn.rescale_output_factor


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a layer with so many tokens, for latents of height x width (each level halves, rounded up).

    Raises:
        SettingsError: no level of a U-Net has this number of tokens.
    """
    rows, columns = height, width
    while rows * columns > tokens and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise SettingsError(
            f"a layer has {tokens} tokens, which is no halving of the latent grid {height} x {width}; expected a U-Net "
            "that halves at each level. Choose a height and width divisible by 64 pixels."
        )
    return rows, columns


def check_unet(pipe: Any, classes: Sequence[str], method: str) -> None:
    """Refuses a pipeline that is not one of the named diffusers classes (or a subclass), or has no conditioned U-Net.

    Raises:
        UnsupportedError: with the name of what came.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]
    if not any(name in names for name in classes):
        raise UnsupportedError(
            f"{method} got a {type(pipe).__name__}; expected one of {', '.join(classes)}, whose U-Net has separate "
            "cross-attention. Load such a model."
        )
