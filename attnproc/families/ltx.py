"""LTX-Video: video-only self-attention `attn1`, rotary embedding over all heads' channels at once."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from attnproc import compat
from attnproc.families.base import Family, SiteProcessor
from attnproc.families.projections import heads_first, heads_joined, rotate
from attnproc.layout import Grid


class LTXSite(SiteProcessor):
    """Self-attention of an LTX block; norm and rotary embedding come before channels are split into heads."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
        query, key, value = heads_first(*(t.unflatten(2, (attn.heads, -1)) for t in (query, key, value)))
        out = self.attend(query, key, value, attention_mask=attention_mask)
        return attn.to_out[1](attn.to_out[0](heads_joined(out, query.dtype)))


class LTX(Family):
    """Grid from the arguments `num_frames`, `height` and `width`; latents arrive packed."""

    name = "ltx"
    models = ("LTXVideoTransformer3DModel",)
    site = LTXSite

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in compat.attention_modules(model):
            if name.startswith("transformer_blocks.") and name.endswith(".attn1"):
                yield name, module

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid | None:
        grid = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        return None if None in grid else grid  # type: ignore[return-value]  # video_coords alone may be given


compat.register_skippable(LTXSite, compat.skipped_video)
