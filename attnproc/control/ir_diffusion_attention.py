"""IR-Diffusion in a U-Net: the processors of one run, and what they share.

A batch holds the portraits, in the subjects' order, and then the scenes; with classifier-free guidance twice, the
unconditional half first. Everything about portraits is computed as without this method.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnproc.control.ir_diffusion import (
    NOBODY,
    Group,
    IRSettings,
    Layout,
    attend_in_groups,
    disjoint,
    groups,
    stack_tokens,
)
from attnproc.control.ir_diffusion_words import WordMaps
from attnproc.control.unet import attention_layers, finish, project
from attnproc.errors import AttnProcWarning, SettingsError

SDXL_EXTENDED_FROM = "up_blocks.0.attentions.0.transformer_blocks.2"
EXTENDED_FROM = "up_blocks"
# Levels whose sides are a smaller part of the latent grid's are too coarse to part subjects: the 8x8 of SD 1.x.
COARSEST_ISOLATED = 4

Grid = tuple[int, int]
Words = tuple[int, ...]  # indices of text tokens


@dataclass(frozen=True)
class SceneMasks:
    """Where the subjects are, one entry for each.

    Attributes:
        references: in its portrait: bool (height, width) in pixels, or the tokens of the portrait's prompt that name
            the subject.
        targets: in the scene: the same of the scene's prompt, or None for a subject that is not in this scene.
    """

    references: tuple[Tensor | Words, ...]
    targets: tuple[Tensor | Words | None, ...]

    @property
    def drawn(self) -> bool:
        """Whether no place is read from attention."""
        return not any(isinstance(place, tuple) for place in (*self.references, *self.targets))


@dataclass(frozen=True)
class Given:
    """A portrait that is a picture: clean latents and the noise added to them, both (channels, rows, columns)."""

    latents: Tensor
    noise: Tensor


@dataclass(frozen=True)
class LayerRules:
    """The self-attention layers that see portraits, those that isolate, and how far each level is below the latents."""

    extended: frozenset[str]
    isolated: frozenset[str]
    divisors: dict[str, int]

    @classmethod
    def of(cls, unet: nn.Module, settings: IRSettings, sdxl: bool) -> LayerRules:
        """Raises: SettingsError: a name in the settings is the beginning of no layer's."""
        names = list(attention_layers(unet, "attn1"))
        divisors = {name: _divisor(name, len(unet.config.block_out_channels)) for name in names}  # type: ignore[union-attr, arg-type]
        start = settings.extended_from or (SDXL_EXTENDED_FROM if sdxl else EXTENDED_FROM)
        first = names.index(_named(names, start, "extended_from")[0])
        if settings.isolation_layers is None:
            isolated = [name for name in names if divisors[name] <= COARSEST_ISOLATED]
        else:
            isolated = [n for start in settings.isolation_layers for n in _named(names, start, "isolation_layers")]
        return cls(frozenset(names[first:]), frozenset(isolated), divisors)

    def grid(self, name: str, size: Grid) -> Grid:
        """The grid of the layer, whose name may end in attn1 or attn2, for latents of this size."""
        divisor = self.divisors[_self_name(name)]
        return size[0] // divisor, size[1] // divisor

    def grids(self, size: Grid) -> list[Grid]:
        """The grids of all layers, each once."""
        return list(dict.fromkeys(self.grid(name, size) for name in self.divisors))


def _self_name(name: str) -> str:
    return name.removesuffix("attn2") + "attn1" if name.endswith("attn2") else name


def _divisor(name: str, levels: int) -> int:
    """How many times smaller than the latent grid's the sides of a layer's grid are."""
    stage, _, rest = name.partition(".")
    level = levels - 1
    if stage == "down_blocks":
        level = int(rest.partition(".")[0])
    elif stage == "up_blocks":
        level -= int(rest.partition(".")[0])
    return 2**level


def _named(names: Sequence[str], start: str, what: str) -> list[str]:
    """Names that are `start` or begin with it and a dot."""
    found = [name for name in names if name == start or name.startswith(start + ".")]
    if not found:
        raise SettingsError(
            f"{what} has {start!r}, with which no self-attention layer of this U-Net begins; expected for example "
            f"{names[0]!r} or 'up_blocks'. Name one of its layers or blocks."
        )
    return found


@dataclass(eq=False)
class IRRun:
    """What the processors of one run share: who stands where, the step, and which portraits are pictures.

    `watch` is a forward pre-hook of the U-Net, with keyword arguments.

    Args:
        scenes: the masks of every scene of the batch; the number of portraits is that of their entries.
        size: rows and columns of the latents.
        dropout: for each scene the generator of its query dropout.
        given: by portrait, the pictures that take the place of a generated one.
        scheduler: of the pipeline: it adds noise to those and knows the timesteps.
        first_scene: which scene of the story the first one is, for messages; counted from 0.

    Warns (`AttnProcWarning`) once of each subject that smaller ones cover wholly on some grid.
    """

    settings: IRSettings
    rules: LayerRules
    scenes: Sequence[SceneMasks]
    size: Grid
    dropout: Sequence[torch.Generator]
    given: dict[int, Given]
    scheduler: Any
    first_scene: int = 0
    step: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.subjects = len(self.scenes[0].references) if self.scenes else 0
        self.images = self.subjects + len(self.scenes)
        self._timestep: float | None = None
        self._steps = 1
        self._layouts: dict[tuple[int, Grid], Layout] = {}
        self._readers: dict[tuple[int, Grid], Tensor] = {}
        self._groups: dict[tuple[int, Grid, bool, bool], list[Group]] = {}
        self._owned: dict[tuple[int, Grid], list[Tensor]] = {}
        self._same_negative: bool | None = None
        wanted: dict[int, dict[int, Words]] = {}
        for number, scene in enumerate(self.scenes):
            for subject, (reference, target) in enumerate(zip(scene.references, scene.targets, strict=True)):
                if isinstance(reference, tuple):
                    wanted.setdefault(subject, {})[subject] = reference
                if isinstance(target, tuple):
                    wanted.setdefault(self.subjects + number, {})[subject] = target
        self.words = WordMaps(wanted) if wanted else None
        self._found: dict[tuple[int, int], dict[Grid, Tensor]] = {}
        for number, scene in enumerate(self.scenes, self.first_scene):
            self._warn_of_losses(number, scene)

    # -- the step ------------------------------------------------------------------------------------------------------

    def watch(self, unet: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Before each call of the U-Net: begins a step if the timestep changed, and puts noised pictures in."""
        sample, timestep, *rest = arguments
        if float(timestep) != self._timestep:  # solvers of higher order call more than once in a step
            self._timestep = float(timestep)
            self._begin_step()
        if self.given:
            sample = sample.clone()
            halves = sample.unflatten(0, (-1, self.images))
            for portrait, picture in self.given.items():
                latents, noise = (
                    part.to(sample.device, sample.dtype)[None] for part in (picture.latents, picture.noise)
                )
                noised = self.scheduler.add_noise(latents, noise, torch.as_tensor(timestep).reshape(1))
                halves[:, portrait] = self.scheduler.scale_model_input(noised, timestep).to(sample.dtype)
        return (sample, timestep, *rest), keywords

    def _begin_step(self) -> None:
        self.step += 1
        self._steps = len(set(self.scheduler.timesteps.tolist()))
        self._readers.clear()
        self._groups.clear()
        self._owned.clear()
        if self.words is not None:
            self._found = self.words.masks(self.rules.grids(self.size))
            drawn = {number for number, scene in enumerate(self.scenes) if scene.drawn}
            self._layouts = {key: layout for key, layout in self._layouts.items() if key[0] in drawn}

    def _now(self, part: tuple[float, float]) -> bool:
        """Whether this step is in a part of the run."""
        return part[0] <= self.step / self._steps < part[1]

    # -- who stands where ----------------------------------------------------------------------------------------------

    def layout(self, scene: int, grid: Grid) -> Layout:
        """Of a scene in this step. A subject whose place in the scene is not read yet is not there."""
        key = scene, grid
        if key not in self._layouts:
            masks = self.scenes[scene]
            references = [
                self._tokens(place, (number, number), grid, unknown=True)
                for number, place in enumerate(masks.references)
            ]
            targets = [
                self._tokens(place, (self.subjects + scene, number), grid, unknown=False)
                for number, place in enumerate(masks.targets)
            ]
            self._layouts[key] = Layout.of(torch.stack(references), torch.stack(targets), self.settings)
        return self._layouts[key]

    def _tokens(self, place: Tensor | Words | None, found: tuple[int, int], grid: Grid, unknown: bool) -> Tensor:
        if place is None:
            return torch.zeros(grid, dtype=torch.bool)
        if isinstance(place, Tensor):
            return stack_tokens([place], grid)[0]
        if found not in self._found:
            return torch.full(grid, unknown)
        return self._found[found][grid]

    def _warn_of_losses(self, number: int, scene: SceneMasks) -> None:
        # Drawn masks alone: subjects that are found by words can only take more.
        drawn = {subject: place for subject, place in enumerate(scene.targets) if isinstance(place, Tensor)}
        lost: dict[int, list[str]] = {}
        for grid in self.rules.grids(self.size) if drawn else ():
            kept = disjoint(stack_tokens(list(drawn.values()), grid))
            for subject, tokens in zip(drawn, kept, strict=True):
                if not tokens.any():
                    lost.setdefault(subject, []).append(f"{grid[0]} x {grid[1]}")
        for subject, grids in lost.items():
            warnings.warn(
                f"subject {subject + 1} of scene {number + 1} has no tokens left on grids of {', '.join(grids)}, as "
                "smaller subjects cover it; it has no part there. Draw its mask beside theirs.",
                AttnProcWarning,
                stacklevel=2,
            )

    def _members(self, scene: int, name: str, device: torch.device) -> list[Group]:
        """The groups of a scene in a layer in this step."""
        extended = name in self.rules.extended and self._now(self.settings.extended_steps)
        isolated = name in self.rules.isolated and self._now(self.settings.isolation_steps)
        grid = self.rules.grid(name, self.size)
        key = scene, grid, extended, isolated
        if key not in self._groups:
            layout = self.layout(scene, grid)
            nobody = torch.full((grid[0] * grid[1],), NOBODY)
            owners = layout.isolated(self.settings.exempt_border) if isolated else nobody
            readers = self._drawn_readers(scene, grid) if extended else nobody
            self._groups[key] = [group.to(device) for group in groups(layout, owners, readers)]
        return self._groups[key]

    def _tokens_of_subjects(self, scene: int, grid: Grid, device: torch.device) -> list[Tensor]:
        """int64 indices of every subject's tokens in a scene in this step."""
        key = scene, grid
        if key not in self._owned:
            targets = self.layout(scene, grid).targets.flatten(1)
            self._owned[key] = [mask.nonzero()[:, 0].to(device) for mask in targets]
        return self._owned[key]

    def _drawn_readers(self, scene: int, grid: Grid) -> Tensor:
        """One draw for all layers of a step on a grid."""
        key = scene, grid
        if key not in self._readers:
            layout = self.layout(scene, grid)
            self._readers[key] = layout.readers(self.settings.query_dropout, self.dropout[scene])
        return self._readers[key]

    # -- attention -----------------------------------------------------------------------------------------------------

    def self_attention(self, name: str, out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Rewrites scene rows of plain attention `out`; all (batch, heads, tokens, head_dim)."""
        out, query, key, value = (states.unflatten(0, (-1, self.images)) for states in (out, query, key, value))
        for scene in range(len(self.scenes)):
            members = self._members(scene, name, query.device)
            attend_in_groups(out, query, key, value, self.subjects + scene, members, self.settings.ref_bias)
        if self.words is not None:
            self.words.watch_self(query[-1], key[-1])

    def cross_attention(
        self, name: str, out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> None:
        """Blends the text of portraits into scene rows of plain attention `out`; all (batch, heads, ., head_dim).

        The released code blends after the output projection, which for an affine map is the same.
        """
        out, query, key, value = (states.unflatten(0, (-1, self.images)) for states in (out, query, key, value))
        mask = None if mask is None else mask.unflatten(0, (-1, self.images))
        grid = self.rules.grid(name, self.size)
        if self.words is not None:
            self.words.watch_cross(query[-1], key[-1], grid)
        if self._same_negative is None:
            self._same_negative = len(key) > 1 and all(torch.equal(key[0, 0], other) for other in key[0, 1:])
        if self._same_negative:  # nothing to blend in the unconditional half
            out, query, key, value = (states[1:] for states in (out, query, key, value))
            mask = None if mask is None else mask[1:]
        lam = self.settings.lam if self._now(self.settings.text_steps) else 0.0
        for number in range(len(self.scenes)) if lam > 0 else ():
            scene = self.subjects + number
            for subject, tokens in enumerate(self._tokens_of_subjects(number, grid, query.device)):
                if len(tokens) == 0:
                    continue
                portrait = scaled_dot_product_attention(
                    query[:, scene].index_select(2, tokens),
                    key[:, subject],
                    value[:, subject],
                    attn_mask=None if mask is None else mask[:, subject],
                )
                own = out[:, scene].index_select(2, tokens)
                out[:, scene].index_copy_(2, tokens, (1 - lam) * own + lam * portrait)


@dataclass(eq=False)
class IRSelfAttnProcessor:
    """Of one self-attention layer in one run."""

    run: IRRun
    name: str

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        seen = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        out = scaled_dot_product_attention(seen.query, seen.key, seen.value, attn_mask=seen.mask)
        self.run.self_attention(self.name, out, seen.query, seen.key, seen.value)
        return finish(attn, out, seen)


@dataclass(eq=False)
class IRCrossAttnProcessor:
    """Of one cross-attention layer in one run."""

    run: IRRun
    name: str

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        seen = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        out = scaled_dot_product_attention(seen.query, seen.key, seen.value, attn_mask=seen.mask)
        self.run.cross_attention(self.name, out, seen.query, seen.key, seen.value, seen.mask)
        return finish(attn, out, seen)


def ir_processors(unet: nn.Module, run: IRRun) -> dict[str, Any]:
    """A processor for every layer that needs one: cross-attention only if it blends or words are located."""
    result: dict[str, Any] = {name: IRSelfAttnProcessor(run, name) for name in attention_layers(unet, "attn1")}
    if run.settings.lam > 0 or run.words is not None:
        result |= {name: IRCrossAttnProcessor(run, name) for name in attention_layers(unet, "attn2")}
    return result
