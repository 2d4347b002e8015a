"""Who takes part in a story and where: regions as users give them, and those that a segmenter finds in rehearsals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from attnproc.control.ir_diffusion import IRSettings, crop_bottom, grow_small
from attnproc.control.ir_diffusion_attention import SceneMasks
from attnproc.control.masks import Region, as_box, bounding_box, mask_values, region_mask
from attnproc.control.words import find_tokens
from attnproc.errors import SettingsError

Segmenter = Callable[[Image.Image, list[str]], Sequence[Region | None]]

REHEARSALS = 20  # as in the released code
CLOSING = 1 / 6  # side of the closing kernel by the picture's short side: 128 of 768 pixels in the released code


@dataclass(frozen=True, eq=False)
class Subject:
    """A character, and the portrait it is taken from.

    Attributes:
        prompt: of the portrait; also the words that the subject's tokens in scenes listen to.
        region: where the subject is in its portrait: a box or mask, as `attnproc.control.masks.region_mask` takes;
            not all of the picture.
        word: in place of a region, the words of the prompt (or indices of its tokens) by whose attention the subject
            is found; for a segmenter, what to look for.
        image: a picture to use as the portrait in place of a generated one; resized to the scene's size, whose aspect
            ratio it must have.
        latents: noise of the portrait, (1, channels, rows, columns), in place of the generator's.
    """

    prompt: str
    region: Region | None = None
    word: str | Sequence[int] | None = None
    image: Image.Image | None = None
    latents: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture of a story.

    Attributes:
        prompt: of the whole scene.
        regions: for each subject where it is: a box, a mask, words of the prompt by whose attention it is found, or
            None for a subject that is not in this scene. None for all: the segmenter finds them, or where there is
            none, each subject's own `word` in this prompt. Where regions overlap, the smaller subject keeps the token,
            at equal size the earlier one. A region may cover the whole picture, which leaves no background.
        latents: noise of the scene, (1, channels, rows, columns), in place of the generator's.
    """

    prompt: str
    regions: Sequence[Region | str | None] | None = None
    latents: Tensor | None = None


class Places:
    """Where the subjects of a call are.

    Args:
        tokenizer: of the pipeline.
        converted: gives a prompt as it is encoded, with the words of textual inversion as their tokens.
        size: height and width of the pictures in pixels.
        rehearse: gives the picture of a prompt, counted portraits first, from noise (1, channels, rows, columns),
            without the method; of a portrait that is a given picture, that picture.

    Raises:
        SettingsError: a region, word or their number does not fit.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        scenes: Sequence[Scene],
        settings: IRSettings,
        segmenter: Segmenter | None,
        *,
        tokenizer: Any,
        converted: Callable[[str], str],
        size: tuple[int, int],
        rehearse: Callable[[int, Tensor], Image.Image],
    ):
        self.subjects, self.scenes, self.settings, self.segmenter = subjects, scenes, settings, segmenter
        self.tokenizer, self.converted, self.rehearse = tokenizer, converted, rehearse
        self.height, self.width = size
        # None where the segmenter has to look.
        self.references = [self._reference(number, subject) for number, subject in enumerate(subjects)]
        self.targets = [self._targets(number, scene) for number, scene in enumerate(scenes)]

    def masks(self, noise: Tensor, seeds: Sequence[int]) -> tuple[list[SceneMasks], Tensor]:
        """Where the subjects are in every scene, and the noise with which they are there."""
        references: list[Any] = list(self.references)
        targets: list[Any] = list(self.targets)
        if self.segmenter is not None:
            for number in [n for n, reference in enumerate(references) if reference is None]:
                references[number] = self._rehearsed_portrait(number, noise)
            for number in [n for n, scene in enumerate(targets) if scene is None]:
                targets[number], row = self._rehearsed_scene(number, noise, seeds[number])
                noise = noise.index_copy(0, torch.tensor([len(self.subjects) + number], device=noise.device), row)
        if self.settings.grow_small_masks:
            targets = [_grown(scene) for scene in targets]
        return [SceneMasks(tuple(references), tuple(scene)) for scene in targets], noise

    # -- as given ------------------------------------------------------------------------------------------------------

    def _reference(self, number: int, subject: Subject) -> Tensor | tuple[int, ...] | None:
        what = f"the region of subject {number + 1} in its portrait"
        if subject.region is not None:
            return self._cropped(region_mask(subject.region, self.height, self.width, what), what)
        if self.segmenter is not None:
            return None
        if subject.word is None:
            raise SettingsError(
                f"subject {number + 1}, {subject.prompt!r}, has no region; expected a box or mask in its portrait, a "
                "word of its prompt, or a segmenter. Give one of these."
            )
        return self._words(subject.prompt, subject.word, f"the word of subject {number + 1}")

    def _words(self, prompt: str, phrase: str | Sequence[int], what: str, taken: Sequence[int] = ()) -> tuple[int, ...]:
        """Token indices of a phrase in a prompt as it is encoded."""
        if isinstance(phrase, str):
            phrase = self.converted(phrase)
        return find_tokens(self.tokenizer, self.converted(prompt), phrase, taken, what)

    def _cropped(self, mask: Tensor, what: str) -> Tensor:
        if mask.all():
            raise SettingsError(
                f"{what} covers the whole picture, so its background would come along; expected a part of it. Draw the "
                "subject alone."
            )
        mask = crop_bottom(mask, self.settings.ref_bottom_crop)
        if not mask.any():
            raise SettingsError(
                f"{what} is empty without the lowest {self.settings.ref_bottom_crop:.0%} of the picture; expected "
                "something above. Lower ref_bottom_crop."
            )
        return mask

    def _targets(self, number: int, scene: Scene) -> list[Any] | None:
        regions = scene.regions
        if regions is None:
            if self.segmenter is not None:
                return None
            for one in self.subjects:
                if not isinstance(one.word, str):
                    raise SettingsError(
                        f"scene {number + 1} has no regions, and subject {one.prompt!r} no word to find it by; "
                        "expected one region for each subject. Give regions, words or a segmenter."
                    )
            regions = [subject.word for subject in self.subjects]
        if isinstance(regions, str) or len(regions) != len(self.subjects):
            raise SettingsError(
                f"scene {number + 1} has {len(regions)} regions for {len(self.subjects)} subjects; expected one for "
                "each, None for a subject that is not in it."
            )
        taken: list[int] = []
        places: list[Any] = []
        for subject, region in enumerate(regions):
            what = f"the region of subject {subject + 1} in scene {number + 1}"
            if region is None:
                places.append(None)
            elif isinstance(region, str):
                places.append(self._words(scene.prompt, region, what, taken))
                taken += places[-1]
            else:
                places.append(region_mask(region, self.height, self.width, what))
        return places

    # -- as rehearsed --------------------------------------------------------------------------------------------------

    def _segment(self, image: Image.Image, phrases: list[str]) -> list[Tensor | None]:
        assert self.segmenter is not None
        found = list(self.segmenter(image, phrases))
        if len(found) != len(phrases):
            raise SettingsError(
                f"the segmenter gave {len(found)} masks for {len(phrases)} phrases; expected one or None for each."
            )
        return [
            None if mask is None else _drawn(mask, self.height, self.width, f"the segmenter's mask of {phrase!r}")
            for mask, phrase in zip(found, phrases, strict=True)
        ]

    def _phrase(self, subject: Subject) -> str:
        return subject.word if isinstance(subject.word, str) else subject.prompt

    def _rehearsed_portrait(self, number: int, noise: Tensor) -> Tensor:
        subject = self.subjects[number]
        [mask] = self._segment(self.rehearse(number, noise[number : number + 1]), [self._phrase(subject)])
        if mask is None:
            raise SettingsError(
                f"the segmenter does not find {self._phrase(subject)!r} in the portrait of subject {number + 1}; "
                "expected a mask. Change the word, the prompt or the generator."
            )
        return self._cropped(mask, f"the segmenter's mask of subject {number + 1} in its portrait")

    def _rehearsed_scene(self, number: int, noise: Tensor, seed: int) -> tuple[list[Tensor], Tensor]:
        """Masks of all subjects, and the noise (1, channels, rows, columns) with which the scene shows them."""
        index = len(self.subjects) + number
        phrases = [self._phrase(subject) for subject in self.subjects]
        row, other = noise[index : index + 1], torch.Generator().manual_seed(seed)
        tries = 1 if self.scenes[number].latents is not None else REHEARSALS
        for _ in range(tries):
            masks = self._segment(self.rehearse(index, row), phrases)
            if all(mask is not None for mask in masks):
                return [_closed(mask) for mask in masks if mask is not None], row
            row = randn_tensor(row.shape, generator=other, device=row.device, dtype=row.dtype)
        missing = [phrase for phrase, mask in zip(phrases, masks, strict=True) if mask is None]
        raise SettingsError(
            f"in {tries} pictures of scene {number + 1} the segmenter did not find all subjects, at last not "
            f"{missing}; expected each. Change the prompt, or draw the regions."
        )


def _drawn(mask: Region, height: int, width: int, what: str) -> Tensor | None:
    """A segmenter's mask; None if it is empty."""
    box = as_box(mask)
    values = mask_values(mask, what) if box is None else torch.tensor(box)
    return region_mask(mask, height, width, what) if values.any() else None


def _closed(mask: Tensor) -> Tensor:
    """The mask (height, width) with gaps closed, inside its bounding box."""
    top, bottom, left, right = bounding_box(mask)
    side = int(min(mask.shape) * CLOSING) | 1
    inside = mask[top:bottom, left:right].float()[None]
    grown = F.max_pool2d(inside, side, 1, side // 2)
    closed = mask.clone()
    closed[top:bottom, left:right] = -F.max_pool2d(-grown, side, 1, side // 2)[0] > 0.5
    return closed


def _grown(places: list[Any]) -> list[Any]:
    """Places in a scene of which the masks are grown where they are small."""
    drawn = [n for n, place in enumerate(places) if isinstance(place, Tensor)]
    if not drawn:
        return places
    for number, mask in zip(drawn, grow_small(torch.stack([places[n] for n in drawn])), strict=True):
        places = [*places[:number], mask, *places[number + 1 :]]
    return places
