"""HunyuanVideo 1.5: joint attention of [video | image, glyph and prompt tokens], the valid ones of these first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc import compat
from attnproc.families.base import SiteProcessor
from attnproc.families.hunyuan_video import HunyuanVideo
from attnproc.families.projections import heads_first, heads_joined, project, project_out, project_text, rotate_video
from attnproc.kernels.once import once


class HunyuanVideo15Site(SiteProcessor):
    """Joint attention of dual-stream blocks.

    The stock processor masks padded queries too, with a mask of tokens x tokens in every layer. Padded tokens are
    never keys and never part of the video, so masking them as keys alone gives the same video.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        query, key, value = project(attn, hidden_states)
        if image_rotary_emb is not None:
            query, key = (rotate_video(t, image_rotary_emb, 0, video) for t in (query, key))
        both = zip((query, key, value), project_text(attn, encoder_hidden_states), strict=True)
        query, key, value = (torch.cat(pair, dim=1) for pair in both)
        mask = attention_mask.bool()
        out = self.attend(
            *heads_first(query, key, value),
            attention_mask=F.pad(mask, (video, 0), value=True)[:, None, None, :],
            text_tokens=text,
            text_valid=once(attention_mask, _valid_text),
        )
        return project_out(attn, *heads_joined(out, query.dtype).split([video, text], dim=1))


def _valid_text(mask: Tensor) -> Tensor:
    return mask.bool().sum(1)


class HunyuanVideo15(HunyuanVideo):
    """Grid and sites as in HunyuanVideo."""

    name = "hunyuan_video15"
    models = ("HunyuanVideo15Transformer3DModel",)
    site = HunyuanVideo15Site


compat.register_skippable(HunyuanVideo15Site, compat.skipped_joint)
