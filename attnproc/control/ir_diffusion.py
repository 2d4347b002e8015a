"""IR-Diffusion: the same characters in several pictures, by isolation and reposition attention.

Source: "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention"
(arXiv 2411.19261) and its released code. Portraits of the subjects are denoised together with the scene. In the scene,
tokens of one subject do not see tokens of another (isolation), and in late layers they also see the features of their
own portrait, resized and moved to where the subject stands (reposition).

This file is who stands where and who sees whom; `ir_diffusion_attention` carries it out in a U-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnproc.control.masks import bounding_box, token_mask
from attnproc.errors import SettingsError

NOBODY = -1
# Masks smaller than this are grown: a third of the short side, 256 of 768 pixels in the released code.
SMALL = 1 / 3


@dataclass(frozen=True, kw_only=True)
class IRSettings:
    """What IR-Diffusion does and where. The defaults are the released settings.

    Args:
        extended_from: name, or the beginning of it, of the first self-attention layer in call order in which scenes
            see the portraits. None is "up_blocks.0.attentions.0.transformer_blocks.2" for SDXL (34 of 70 layers) and
            "up_blocks" for other U-Nets.
        extended_steps: the part of the run, from and to as fractions of the steps, in which scenes see the portraits.
            (0.0, 0.0) is never.
        isolation_layers: beginnings of the names of the self-attention layers that isolate. None is every layer on a
            grid of at least a quarter of the latent grid's sides: all of SDXL, all but the coarsest of SD 1.x.
        isolation_steps: the part of the run in which subjects are isolated. Less than all of it gives contact,
            shared light and occlusion back.
        exempt_border: subject tokens that touch a token of another subject are not isolated.
        reposition: resize and move each portrait's subject to its place in the scene. Off, its tokens are seen once
            each.
        keep_aspect: resize without changing the aspect ratio, in the middle of the place (an experiment).
        lam: how far the subject's tokens take the text of their portrait in place of the scene's, 0.0 to 1.0.
        text_steps: the part of the run in which they do. Where regions come from rehearsals, starting later keeps the
            layout of the rehearsal (this project's; all of the run in the released code).
        query_dropout: chance that a subject's token does not look at the portrait in a step, 0.0 to below 1.0. More
            keeps poses varied.
        ref_bias: added to the logits of portrait keys.
        ref_bottom_crop: share of the picture, at the bottom, that is cut from the masks in portraits; 1/6 in the
            released code.
        grow_small_masks: grow masks in scenes whose sides or area are below a third of the picture's short side.
        experimental: says that you know that U-Nets other than SDXL's are an extension of the method; spares a
            warning.

    Raises:
        SettingsError: a value is out of its range.
    """

    extended_from: str | None = None
    extended_steps: tuple[float, float] = (0.0, 1.0)
    isolation_layers: tuple[str, ...] | None = None
    isolation_steps: tuple[float, float] = (0.0, 1.0)
    exempt_border: bool = False
    reposition: bool = True
    keep_aspect: bool = False
    lam: float = 0.9
    text_steps: tuple[float, float] = (0.0, 1.0)
    query_dropout: float = 0.5
    ref_bias: float = 0.0
    ref_bottom_crop: float = 0.0
    grow_small_masks: bool = False
    experimental: bool = False

    def __post_init__(self) -> None:
        _check_range("lam", self.lam, 0.0, 1.0)
        _check_range("query_dropout", self.query_dropout, 0.0, 1.0, below=True)
        _check_range("ref_bottom_crop", self.ref_bottom_crop, 0.0, 1.0, below=True)
        _check_range("ref_bias", self.ref_bias, -1e4, 1e4)
        for name in ("extended_steps", "isolation_steps", "text_steps"):
            part = getattr(self, name)
            if not isinstance(part, Sequence) or len(part) != 2:
                raise SettingsError(f"{name}={part!r} must be two fractions of the steps, such as (0.0, 0.6).")
            for value in part:
                _check_range(name, value, 0.0, 1.0)
        if isinstance(self.isolation_layers, str):
            raise SettingsError(
                f"isolation_layers={self.isolation_layers!r} must be a list of beginnings of layer names, such as "
                "('up_blocks',)."
            )


def _check_range(name: str, value: Any, low: float, high: float, below: bool = False) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not low <= value <= high or (below and value == high):
        raise SettingsError(f"{name}={value!r} must be a number from {low:g} to {'below ' if below else ''}{high:g}.")


def grow_small(masks: Tensor) -> Tensor:
    """Scene masks (subjects, height, width) in pixels in which small ones are filled up to a box in their middle.

    A mask shorter than a third of the picture's short side gets a box of that length along this axis, one of small
    area along both; pixels of other masks stay theirs.
    """
    height, width = masks.shape[1:]
    least = round(min(height, width) * SMALL)
    grown = masks.clone()
    for number, mask in enumerate(masks):
        if not mask.any():
            continue
        top, bottom, left, right = bounding_box(mask)
        small = int(mask.sum()) < least**2
        if small or bottom - top < least:
            top, bottom = _widened(top, bottom, least, height)
        if small or right - left < least:
            left, right = _widened(left, right, least, width)
        if (top, bottom, left, right) != bounding_box(mask) or small:
            others = torch.cat([masks[:number], masks[number + 1 :]]).any(0)
            grown[number, top:bottom, left:right] |= ~others[top:bottom, left:right]
    return grown


def _widened(first: int, last: int, least: int, end: int) -> tuple[int, int]:
    """The interval with the same middle and at least this length, cut at the picture's edges."""
    missing = max(0, least - (last - first))
    return max(0, first - missing // 2), min(end, last + missing - missing // 2)


def crop_bottom(mask: Tensor, share: float) -> Tensor:
    """A portrait's mask (height, width) without its lowest rows."""
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return mask & (rows < int(len(mask) * (1 - share)))


def disjoint(masks: Tensor) -> Tensor:
    """Token masks (subjects, rows, columns) in which no token has two subjects: the one with fewer tokens keeps it.

    At equal size the earlier one keeps it.
    """
    result = torch.zeros_like(masks)
    taken = torch.zeros(masks.shape[1:], dtype=torch.bool, device=masks.device)
    for number in sorted(range(len(masks)), key=lambda n: int(masks[n].sum())):
        result[number] = masks[number] & ~taken
        taken = taken | masks[number]
    return result


def reposition(reference: Tensor, target: Tensor, keep_aspect: bool = False) -> tuple[Tensor, Tensor]:
    """Where the subject's tokens of the portrait go in the scene.

    The bounding box of the reference mask is stretched over that of the target mask, each place reading the nearest
    token above and left of it in exact integer arithmetic.

    Args:
        reference, target: boolean (rows, columns), neither empty.
        keep_aspect: stretch by the same factor along both sides, in the middle of the target's box.

    Returns:
        places, sources: int64 (moved tokens,): the scene's token indices, ascending, and the portrait's token that
        each of them reads. Only tokens of the subject move; places can lie outside the target mask in its box, and a
        ragged subject that shrinks can lose them all.
    """
    top, bottom, left, right = bounding_box(reference)
    to_top, to_bottom, to_left, to_right = bounding_box(target)
    height, width = bottom - top, right - left
    to_height, to_width = to_bottom - to_top, to_right - to_left
    if keep_aspect:
        if to_height * width <= to_width * height:
            fitted = to_height, max(1, (2 * to_height * width + height) // (2 * height))
        else:
            fitted = max(1, (2 * to_width * height + width) // (2 * width)), to_width
        to_top += (to_height - fitted[0]) // 2
        to_left += (to_width - fitted[1]) // 2
        to_height, to_width = fitted
    columns_of_grid = reference.shape[1]
    down = torch.arange(to_height, device=reference.device)[:, None]
    across = torch.arange(to_width, device=reference.device)
    places = (to_top + down) * columns_of_grid + to_left + across
    sources = (top + down * height // to_height) * columns_of_grid + left + across * width // to_width
    moved = reference.flatten()[sources]
    return places[moved], sources[moved]


def drop_queries(mask: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """A mask (tokens,) of which each token is dropped with this chance; the whole mask where none would be left."""
    if chance == 0:
        return mask
    kept = mask & (torch.rand(mask.shape, generator=generator, device=generator.device) >= chance).to(mask.device)
    return kept if kept.any() else mask


@dataclass(frozen=True)
class Layout:
    """Who stands where on one grid of tokens, in one scene.

    Attributes:
        targets: bool (subjects, rows, columns), disjoint: the subject's tokens in the scene. A subject with none has
            no part in this scene.
        places, sources: for each subject, what `reposition` gives; the sources are its tokens of the portrait that
            the scene sees, and they are empty for a subject with no tokens.
    """

    targets: Tensor
    places: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]

    @classmethod
    def of(cls, references: Tensor, targets: Tensor, settings: IRSettings) -> Layout:
        """From token masks (subjects, rows, columns) in the portraits and, as drawn, in the scene."""
        targets = disjoint(targets)
        places, sources = [], []
        for reference, target in zip(references, targets, strict=True):
            nothing = reference.flatten()[:0].nonzero()[:, 0]
            if not (reference.any() and target.any()):
                moved = nothing, nothing
            elif settings.reposition:
                moved = reposition(reference, target, settings.keep_aspect)
            else:
                moved = (reference.flatten().nonzero()[:, 0],) * 2
            places.append(moved[0])
            sources.append(moved[1])
        return cls(targets, tuple(places), tuple(sources))

    def isolated(self, exempt_border: bool = False) -> Tensor:
        """int64 (tokens,): the subject that a token belongs to and that sees no other one, or -1."""
        owned = self.targets
        if exempt_border:
            near = F.max_pool2d(owned.float(), 3, 1, 1) > 0
            touched = near.sum(0) > 1
            owned = owned & ~touched
        return _owner(owned.flatten(1))

    def readers(self, chance: float, generator: torch.Generator) -> Tensor:
        """int64 (tokens,): the subject whose portrait a token sees in this step, or -1."""
        return _owner(torch.stack([drop_queries(mask, chance, generator) for mask in self.targets.flatten(1)]))


def stack_tokens(masks: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Pixel masks as token masks (subjects, rows, columns)."""
    return torch.stack([token_mask(mask, *grid) for mask in masks])


def _owner(masks: Tensor) -> Tensor:
    """The number of the disjoint mask (subjects, tokens) that holds each token, or -1."""
    numbers = torch.arange(1, len(masks) + 1, device=masks.device)[:, None]
    return (masks * numbers).sum(0) + NOBODY


@dataclass(frozen=True)
class Group:
    """Tokens of a scene that see the same keys.

    Attributes:
        queries: int64 indices of these tokens.
        keys: int64 indices of the scene's tokens that they see, or None for all.
        subject: whose portrait they see, or None.
        sources: int64 indices of that portrait's tokens, one for each key.
    """

    queries: Tensor
    keys: Tensor | None
    subject: int | None
    sources: Tensor | None

    def to(self, device: torch.device) -> Group:
        """The same indices on a device."""
        return Group(
            self.queries.to(device),
            None if self.keys is None else self.keys.to(device),
            self.subject,
            None if self.sources is None else self.sources.to(device),
        )


def groups(layout: Layout, isolated: Tensor, readers: Tensor) -> list[Group]:
    """All tokens that see something else than the whole scene and nothing but it, by what they see.

    isolated, readers: int64 (tokens,), as `Layout.isolated` and `Layout.readers` give them; all -1 for none.
    """
    found = []
    for owner, reader in torch.stack([isolated, readers], 1).unique(dim=0).tolist():
        hidden = (isolated != NOBODY) & (isolated != owner)
        keys = (~hidden).nonzero()[:, 0] if owner != NOBODY and bool(hidden.any()) else None
        sources = layout.sources[reader] if reader != NOBODY else None
        if sources is not None and len(sources) == 0:
            sources = None
        if keys is None and sources is None:
            continue
        queries = ((isolated == owner) & (readers == reader)).nonzero()[:, 0]
        found.append(Group(queries, keys, None if sources is None else reader, sources))
    return found


def attend_in_groups(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, scene: int, members: Sequence[Group], ref_bias: float = 0.0
) -> None:
    """Writes the attention of each group into `out`; other tokens keep what is there.

    Args:
        out, query, key, value: (halves, images, heads, tokens, head_dim); the halves are those of classifier-free
            guidance, the images the portraits, in the subjects' order, and then the scenes.
        scene: index of the scene among the images.
        members: its groups.
        ref_bias: added to the logits of portrait keys.
    """
    for group in members:
        parts = [(scene, group.keys)]
        if group.subject is not None:
            parts.append((group.subject, group.sources))
        keys, values = (
            torch.cat([_picked(states[:, image], tokens) for image, tokens in parts], 2) for states in (key, value)
        )
        bias = None
        if ref_bias != 0 and group.sources is not None:
            bias = query.new_zeros(1, 1, 1, keys.shape[2])
            bias[..., -len(group.sources) :] = ref_bias
        seen = scaled_dot_product_attention(_picked(query[:, scene], group.queries), keys, values, attn_mask=bias)
        out[:, scene].index_copy_(2, group.queries, seen)


def _picked(states: Tensor, tokens: Tensor | None) -> Tensor:
    return states if tokens is None else states.index_select(2, tokens)
