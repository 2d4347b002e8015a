"""CogVideoX 2b, 5b and 1.5: joint attention of [text | video] with shared projections; padded text is attended to."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnproc import compat
from attnproc.families.base import Family, SiteProcessor
from attnproc.families.projections import heads_first, heads_joined, project, rotate_video
from attnproc.layout import Grid


class CogVideoXSite(SiteProcessor):
    """Joint attention; without `image_rotary_emb` in 2b, which adds positions to its embeddings instead."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        batch, tokens = hidden_states.shape[0], text + video
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query, key, value = project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        if image_rotary_emb is not None:
            query, key = (rotate_video(t, image_rotary_emb, text, tokens) for t in (query, key))
        out = self.attend(
            *heads_first(query, key, value), attention_mask=attention_mask, text_tokens=text, text_first=True
        )
        out = attn.to_out[1](attn.to_out[0](heads_joined(out, query.dtype)))
        return out[:, text:], out[:, :text]


class CogVideoX(Family):
    """Grid from latents (batch, frames, channels, height, width)."""

    name = "cogvideox"
    models = ("CogVideoXTransformer3DModel",)
    site = CogVideoXSite

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in compat.attention_modules(model):
            if name.startswith("transformer_blocks."):
                yield name, module

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        _, frames, _, height, width = arguments["hidden_states"].shape
        space, time = model.config.patch_size, model.config.patch_size_t or 1
        return frames // time, height // space, width // space


compat.register_skippable(CogVideoXSite, compat.skipped_joint)
