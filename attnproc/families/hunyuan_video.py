"""HunyuanVideo, text- and image-to-video: joint attention of [video | text], text padded at its end."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnproc import compat
from attnproc.families.base import Family, SiteProcessor
from attnproc.families.projections import heads_first, heads_joined, project, project_out, project_text, rotate_video
from attnproc.kernels.once import once
from attnproc.layout import Grid


class HunyuanVideoSite(SiteProcessor):
    """Joint attention of dual-stream blocks (text has its own projections) and single-stream blocks (it has not)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        if attn.add_q_proj is None:
            query, key, value = project(attn, torch.cat([hidden_states, encoder_hidden_states], dim=1))
        else:
            query, key, value = project(attn, hidden_states)
        if image_rotary_emb is not None:
            query, key = (rotate_video(t, image_rotary_emb, 0, video) for t in (query, key))
        if attn.add_q_proj is not None:
            both = zip((query, key, value), project_text(attn, encoder_hidden_states), strict=True)
            query, key, value = (torch.cat(pair, dim=1) for pair in both)
        valid = None if attention_mask is None else once(attention_mask, _valid_text, video)
        out = self.attend(
            *heads_first(query, key, value), attention_mask=attention_mask, text_tokens=text, text_valid=valid
        )
        return project_out(attn, *heads_joined(out, query.dtype).split([video, text], dim=1))


def _valid_text(mask: Tensor, video: int) -> Tensor:
    """The model masks padding alone, so valid tokens are a prefix of the mask (batch, 1, 1, tokens)."""
    return mask.flatten(1).sum(1) - video


class HunyuanVideo(Family):
    """Grid from the five-dimensional latents; the text refiner keeps its own processors."""

    name = "hunyuan_video"
    models = ("HunyuanVideoTransformer3DModel",)
    site: ClassVar[type[SiteProcessor]] = HunyuanVideoSite

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in compat.attention_modules(model):
            if name.split(".")[0] in ("transformer_blocks", "single_transformer_blocks"):
                yield name, module

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        _, _, frames, height, width = arguments["hidden_states"].shape
        space, time = model.config.patch_size, model.config.patch_size_t
        return frames // time, height // space, width // space


compat.register_skippable(HunyuanVideoSite, compat.skipped_joint)
