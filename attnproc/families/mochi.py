"""Mochi: joint attention of [video | text], each sample with its valid text tokens only."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnproc import compat
from attnproc.families.base import Family, SiteProcessor
from attnproc.families.projections import heads_first, heads_joined, project, project_out, project_text
from attnproc.kernels.once import once
from attnproc.layout import Grid


class MochiSite(SiteProcessor):
    """Joint attention; valid text tokens are moved to the front, as the stock processor leaves them."""

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
            query, key = (_rotate(t, *image_rotary_emb) for t in (query, key))
        valid_first = attention_mask.int().argsort(dim=1, descending=True, stable=True)[:, :, None, None]
        both = zip((query, key, value), project_text(attn, encoder_hidden_states), strict=True)
        query, key, value = (torch.cat([v, t.take_along_dim(valid_first, dim=1)], dim=1) for v, t in both)
        out = self.attend(
            *heads_first(query, key, value), text_tokens=text, text_valid=once(attention_mask, _valid_text)
        )
        return project_out(attn, *heads_joined(out, query.dtype).split([video, text], dim=1))

    def _dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        text_valid: Tensor | None,
        text_tokens: int,
    ) -> Tensor:
        """Sample by sample as the stock processor does, to the last bit."""
        assert text_valid is not None
        tokens, out = query.shape[2], []
        for sample, valid in enumerate(text_valid.tolist()):
            kept = tokens - text_tokens + valid
            q, k, v = (t[sample : sample + 1, :, :kept] for t in (query, key, value))
            answer = super()._dense(q, k, v, None, None, 0)
            out.append(F.pad(answer, (0, 0, 0, tokens - kept)))
        return torch.cat(out)


def _valid_text(mask: Tensor) -> Tensor:
    return mask.sum(1, dtype=torch.int32)


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with frequencies of each head, (tokens, heads, head_dim / 2), on neighbouring channels."""
    even, odd = tensor[..., 0::2].float(), tensor[..., 1::2].float()
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack([t.to(tensor.dtype) for t in turned], dim=-1).flatten(-2)


class Mochi(Family):
    """Grid from the five-dimensional latents; time is not patched."""

    name = "mochi"
    models = ("MochiTransformer3DModel",)
    site = MochiSite
    timesteps_rise = True

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in compat.attention_modules(model):
            if name.startswith("transformer_blocks."):
                yield name, module

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        _, _, frames, height, width = arguments["hidden_states"].shape
        return frames, height // model.config.patch_size, width // model.config.patch_size


compat.register_skippable(MochiSite, compat.skipped_joint)
