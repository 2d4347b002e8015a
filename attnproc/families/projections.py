"""Steps around the attention call that several families share; tensors are (batch, tokens, heads, head_dim)."""

from typing import Any

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]


def project(attn: Any, hidden_states: Tensor) -> Triple:
    """Query, key and value of the stream that a joint attention calls its hidden states, normalised."""
    query, key, value = (
        layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    return _normalised(query, attn.norm_q), _normalised(key, attn.norm_k), value


def project_text(attn: Any, encoder_hidden_states: Tensor) -> Triple:
    """As `project`, for the text stream with its own weights."""
    query, key, value = (
        layer(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    return _normalised(query, attn.norm_added_q), _normalised(key, attn.norm_added_k), value


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32 on neighbouring pairs of the last dimension; cos and sin broadcast to `tensor`."""
    even, odd = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (tensor.float() * cos + turned.float() * sin).to(tensor.dtype)


def rotate_video(tensor: Tensor, rotary: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
    """Rotary embedding with cos and sin of (video tokens, head_dim) on the tokens `start` to `stop` alone."""
    cos, sin = (t[None, :, None, :].to(tensor.device) for t in rotary)
    video = rotate(tensor[:, start:stop], cos, sin)
    return torch.cat([tensor[:, :start], video, tensor[:, stop:]], dim=1)


def _normalised(tensor: Tensor, norm: Any) -> Tensor:
    return tensor if norm is None else norm(tensor)


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """From (batch, tokens, heads, head_dim) to (batch, heads, tokens, head_dim)."""
    return tuple(t.transpose(1, 2) for t in tensors)


def heads_joined(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """From (batch, heads, tokens, head_dim) to (batch, tokens, channels)."""
    return tensor.transpose(1, 2).flatten(2, 3).to(dtype)


def project_out(attn: Any, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Output projections of both streams, where the module has them."""
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text
