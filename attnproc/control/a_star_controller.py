"""The running part of A-STAR: maps of concepts, the losses of a batch of images, their masks and their log."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor

from attnproc.control.a_star import AStarSettings, capped, minmax, pair, rms, smooth
from attnproc.errors import AttnProcWarning, SettingsError

SHARPNESS = 100.0  # of the softmax over tokens
# Keeps small float16 gradients from becoming zero. A power of two: other types give the same bits with and without it.
LOSS_SCALE = 1024.0

Concept = tuple[int, ...]  # token indices
Attend = Callable[[Tensor], AbstractContextManager[Tensor]]  # latents -> attention (batch, rows, columns, text tokens)


@dataclass(frozen=True)
class AStarStep:
    """What one step did, a value per image of the batch in the outer tuples; NaN where a term did not count.

    Attributes:
        step, timestep: index from 0, and the scheduler's timestep.
        loss, segregation, retention: before the update. Attend-and-excite has a loss only.
        pairs: overlap of each pair of the image's concepts, in the order (0, 1), (0, 2), (1, 2).
        concepts: each concept's term: 1 - overlap with its mask; for attend-and-excite what its peak lacks to 1.
        peaks: each concept's largest attention before normalisation; close to nothing means that the model does not
            see the word, and its map is noise.
        step_rms: root mean square of the update.
        refinements: further updates done at this step.
        loss_change: share of the loss that the first update took away; None unless it is measured.
    """

    step: int
    timestep: float
    loss: tuple[float, ...]
    segregation: tuple[float, ...]
    retention: tuple[float, ...]
    pairs: tuple[tuple[float, ...], ...]
    concepts: tuple[tuple[float, ...], ...]
    peaks: tuple[tuple[float, ...], ...]
    step_rms: tuple[float, ...]
    refinements: tuple[int, ...]
    loss_change: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Maps:
    """Concept maps (batch, concepts, rows, columns): raw, stretched to 0 to 1, and which of these show something."""

    raw: Tensor
    stretched: Tensor
    shows: Tensor


@dataclass(frozen=True)
class _Losses:
    """Losses per image (batch,), their terms, and which terms count."""

    total: Tensor
    segregation: Tensor
    retention: Tensor
    pairs: Tensor
    pairs_count: Tensor
    concepts: Tensor
    concepts_count: Tensor
    depends: Tensor  # whether the total depends on the maps
    progress: Tensor  # what `refine` compares with its target


Record = TypeVar("Record", _Maps, _Losses)


@dataclass(frozen=True)
class _Taken:
    """One capture pass and the update that followed, all detached."""

    maps: _Maps
    losses: _Losses
    step_rms: Tensor


class AStarController:
    """Masks and log of one run of a batch of images; pure tensor work, knows no model.

    Args:
        concepts: for each image of the batch its concepts, each as token indices; counts may differ.
        settings: the method's settings.
        grid: rows and columns of the maps.
        tokens: of the text, with padding.
        device: of the latents.
        ends: for each image the index of its end-of-text token; read for token_softmax="words" only.
        layout: for each image its concepts' fixed masks (rows, columns), boolean, or None.

    Raises:
        SettingsError: the grid is too small to be smoothed.
    """

    def __init__(
        self,
        concepts: Sequence[Sequence[Concept]],
        settings: AStarSettings,
        grid: tuple[int, int],
        tokens: int,
        device: torch.device | str = "cpu",
        ends: Sequence[int] | None = None,
        layout: Sequence[Sequence[Tensor | None]] | None = None,
    ):
        if settings.smoothing and min(grid) < 2:
            raise SettingsError(
                f"attention maps are {grid[0]} x {grid[1]}; expected at least 2 x 2 to smooth them. Take a larger "
                "attention_resolution or picture, or smoothing=False."
            )
        self.concepts = concepts
        self.settings = settings
        self.log: list[AStarStep] = []
        self._warned = False
        # Images with fewer concepts than others are padded with concepts that are not real.
        images, most = len(concepts), max(map(len, concepts))
        weights = torch.zeros(images, most, tokens)
        masks = torch.zeros(images, most, *grid, dtype=torch.bool)
        fixed = torch.zeros(images, most, dtype=torch.bool)
        sharing = torch.zeros(images, tokens, dtype=torch.bool)
        for image, its_concepts in enumerate(concepts):
            for number, concept in enumerate(its_concepts):
                weights[image, number, list(concept)] = 1.0
                mask = None if layout is None else layout[image][number]
                if mask is not None:
                    masks[image, number], fixed[image, number] = mask, True
            sharing[image, 1 : ends[image] if settings.softmax == "words" and ends is not None else tokens - 1] = True
        self._weights, self._masks, self._fixed, self._sharing = (
            tensor.to(device) for tensor in (weights, masks, fixed, sharing)
        )
        self._real = self._weights.any(-1)
        self._masked = self._fixed
        ordered = list(combinations(range(most), 2))
        self._pairs = [one for one, _ in ordered], [other for _, other in ordered]

    def update(self, latents: Tensor, step: int, steps: int, attend: Attend, timestep: float = math.nan) -> Tensor:
        """The latents of step `step` of `steps` after the update; masks are then those of this step's maps.

        Args:
            latents: (batch, channels, height, width), any floating type.
            attend: gives the attention probabilities (batch, rows, columns, text tokens) of latents, with gradients.
            timestep: for the log.
        """
        if not self.settings.updates(step, steps):
            return latents
        alpha = self.settings.step_size(step, steps)
        everyone = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        updated, taken = self._descend(latents, alpha, attend, everyone)
        change = self._loss_change(updated, taken, attend) if self.settings.log_loss_change else None
        first, repeats = taken, torch.zeros_like(everyone, dtype=torch.long)
        target, most = self.settings.refine.get(step, (math.inf, 0))
        for _ in range(most):
            wanted = taken.losses.progress > target
            if not wanted.any():
                break
            updated, newer = self._descend(updated, alpha, attend, wanted)
            taken = _Taken(
                _chosen(wanted, newer.maps, taken.maps), _chosen(wanted, newer.losses, taken.losses), newer.step_rms
            )
            repeats += wanted
        if self.settings.mask_source == "grad":
            self._keep_masks(taken.maps)
        self._note(step, timestep, first, repeats, change)
        return updated

    def see(self, attention: Tensor) -> None:
        """Takes the masks from the attention (batch, rows, columns, text tokens) of an ordinary pass."""
        self._keep_masks(self._maps(attention))

    # -- one capture pass ---------------------------------------------------------------------------------------------

    def _descend(self, latents: Tensor, alpha: float, attend: Attend, wanted: Tensor) -> tuple[Tensor, _Taken]:
        """A gradient step for the wanted images."""
        with torch.enable_grad():
            given = latents.detach().requires_grad_()
            with attend(given) as attention, torch.autocast(latents.device.type, enabled=False):
                maps = self._maps(attention)
                losses = self._losses(maps)
                wanted = wanted & losses.depends
                gradient = torch.zeros_like(latents)
                if alpha > 0 and wanted.any():
                    [gradient] = torch.autograd.grad(LOSS_SCALE * losses.total.sum(), given)
        exact = latents.to(torch.promote_types(latents.dtype, torch.float32))
        change = alpha * (gradient.to(exact.dtype) / LOSS_SCALE)
        finite = change.isfinite().flatten(1).all(1)
        if not finite.all():
            self._warn_once()
        keep = (wanted & finite).view(-1, *[1] * (latents.ndim - 1))
        change = capped(torch.where(keep, change, 0.0), exact, self.settings.max_rel_step)
        return (exact - change).to(latents.dtype), _Taken(_detached(maps), _detached(losses), rms(change))

    def _maps(self, attention: Tensor) -> _Maps:
        if self.settings.softmax != "off":
            attention = (SHARPNESS * attention).masked_fill(~self._sharing[:, None, None], -math.inf).softmax(-1)
        weights = self._weights.to(attention.dtype)
        summed = (attention.flatten(1, 2) @ weights.mT).mT
        raw = (summed / weights.sum(-1, keepdim=True).clamp_min(1)).unflatten(2, attention.shape[1:3])
        raw = smooth(raw) if self.settings.smoothing else raw
        stretched, shows = minmax(raw)
        return _Maps(raw, stretched, shows & self._real)

    def _losses(self, maps: _Maps) -> _Losses:
        if self.settings.objective == "attend_and_excite":
            return self._excitation(maps)
        # As they are, flat maps count too; stretched, they would only show noise.
        values, counts = (maps.raw, self._real) if self.settings.map_norm == "none" else (maps.stretched, maps.shows)
        first, second = self._pairs
        pairs_count = counts[:, first] & counts[:, second]
        pairs = torch.where(pairs_count, pair(values[:, first], values[:, second]), 0.0)
        concepts_count = counts & self._masked
        concepts = torch.where(concepts_count, 1 - pair(values, self._masks.to(values.dtype)), 0.0)
        segregation, retention = pairs.sum(1), concepts.sum(1)
        weights = self.settings.lambda_seg, self.settings.lambda_ret
        depends = (pairs_count.any(1) & (weights[0] > 0)) | (concepts_count.any(1) & (weights[1] > 0))
        total = weights[0] * segregation + weights[1] * retention
        progress = segregation / pairs_count.sum(1).clamp_min(1)
        return _Losses(total, segregation, retention, pairs, pairs_count, concepts, concepts_count, depends, progress)

    def _excitation(self, maps: _Maps) -> _Losses:
        """The largest lack of any concept's peak. Attend-and-Excite, section 3.2."""
        lacks = (1 - maps.raw.amax((-2, -1))).clamp_min(0.0)
        lacks = torch.where(self._real, lacks, 0.0)
        total = lacks.amax(1)
        nothing = torch.full_like(total, math.nan)
        no_pairs = lacks.new_zeros(len(lacks), len(self._pairs[0]))
        return _Losses(total, nothing, nothing, no_pairs, no_pairs.bool(), lacks, self._real, total.detach() > 0, total)

    # -- state --------------------------------------------------------------------------------------------------------

    def _keep_masks(self, maps: _Maps) -> None:
        fresh = (maps.stretched.detach() >= self.settings.tau) & maps.shows[..., None, None]
        self._masks = torch.where(self._fixed[..., None, None], self._masks, fresh)
        self._masked = self._fixed | maps.shows

    # -- what is told -------------------------------------------------------------------------------------------------

    def _loss_change(self, updated: Tensor, taken: _Taken, attend: Attend) -> tuple[float, ...]:
        with torch.no_grad(), attend(updated) as attention, torch.autocast(updated.device.type, enabled=False):
            after = self._losses(self._maps(attention)).total
        return tuple(((taken.losses.total - after) / taken.losses.total).tolist())

    def _note(
        self, step: int, timestep: float, taken: _Taken, repeats: Tensor, change: tuple[float, ...] | None
    ) -> None:
        losses = taken.losses
        pairs = losses.pairs.masked_fill(~losses.pairs_count, math.nan).tolist()
        concepts = losses.concepts.masked_fill(~losses.concepts_count, math.nan).tolist()
        peaks = taken.maps.raw.amax((-2, -1)).tolist()
        counts = [len(concepts) for concepts in self.concepts]
        order = list(zip(*self._pairs, strict=True))
        self.log.append(
            AStarStep(
                step=step,
                timestep=timestep,
                loss=tuple(losses.total.tolist()),
                segregation=tuple(losses.segregation.tolist()),
                retention=tuple(losses.retention.tolist()),
                pairs=tuple(
                    tuple(v for v, (_, last) in zip(row, order, strict=True) if last < count)
                    for row, count in zip(pairs, counts, strict=True)
                ),
                concepts=tuple(tuple(row[:count]) for row, count in zip(concepts, counts, strict=True)),
                peaks=tuple(tuple(row[:count]) for row, count in zip(peaks, counts, strict=True)),
                step_rms=tuple(taken.step_rms.tolist()),
                refinements=tuple(repeats.tolist()),
                loss_change=change,
            )
        )

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "A-STAR got a gradient that is not finite; expected finite numbers, so that image's latents stay as "
                "they are at such steps. Run the U-Net in float32 or bfloat16.",
                AttnProcWarning,
                stacklevel=4,
            )


def _detached(record: Record) -> Record:
    return type(record)(**{name: value.detach() for name, value in vars(record).items()})


def _chosen(wanted: Tensor, newer: Record, older: Record) -> Record:
    """The wanted images' values from one record, the others' from another."""
    values = {
        name: torch.where(wanted.view(-1, *[1] * (value.ndim - 1)), value, getattr(older, name))
        for name, value in vars(newer).items()
    }
    return type(newer)(**values)
