"""Wan 2.1 and 2.2 (both experts), VACE, Animate, and models with Wan's attention: video-only self-attention `attn1`."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from attnproc import compat
from attnproc.families.base import Family, SiteProcessor
from attnproc.layout import Grid


class WanSite(SiteProcessor):
    """Self-attention of a Wan block; tokens are video only, text enters through the untouched `attn2`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (t.unflatten(2, (attn.heads, -1)) for t in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = self.attend(query, key, value, attention_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on neighbouring pairs of channels; tensor (batch, tokens, heads, head_dim)."""
    even, odd = tensor.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = tensor.new_empty(tensor.shape)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


class Wan(Family):
    """Grid from the five-dimensional latents; `vace_blocks` see the same grid as `blocks`."""

    name = "wan"
    models = (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    )
    site = WanSite

    def sites(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in compat.attention_modules(model):
            if name.split(".")[0] in ("blocks", "vace_blocks") and name.endswith(".attn1"):
                yield name, module

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        _, _, frames, height, width = arguments["hidden_states"].shape
        patch = model.config.patch_size
        return frames // patch[0], height // patch[1], width // patch[2]


compat.register_skippable(WanSite, compat.skipped_video)
