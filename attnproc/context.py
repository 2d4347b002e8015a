"""The run context: one hook on a denoiser that knows step, branch and latent grid of every call."""

import inspect
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnproc.compat import BaseState, ModelHook, StateManager, registry_of
from attnproc.errors import AttnProcWarning, UnsupportedError
from attnproc.layout import Grid, Step
from attnproc.processor import AttnProcessor
from attnproc.reports import SiteStats

if TYPE_CHECKING:
    from attnproc.families.base import Family, SiteProcessor

HOOK_NAME = "attnproc_context"
# Guiders name their branches after their own inputs; methods see the two names every pipeline uses.
BRANCHES = {"pred_cond": "cond", "pred_uncond": "uncond"}
# Timesteps run from 1000 to 0 and may reach the model rounded to bfloat16.
TIMESTEP_TOLERANCE = 10.0


@dataclass(eq=False)
class Site:
    """One attention module that a processor was set on."""

    name: str
    module: nn.Module
    original: Any
    processor: "SiteProcessor"
    stats: SiteStats


class RunContext(ModelHook):
    """Hook on the root of one denoiser; all its sites read from here, and nobody counts calls.

    A run starts when the step index falls, when step 0 of a branch is seen again, or when the scheduler got new
    timesteps, whatever ended the run before it (completion, an exception, an interrupt).
    """

    _is_stateful = True

    def __init__(self, processor: AttnProcessor, family: "Family", scheduler: Callable[[], Any]):
        super().__init__()
        self.processor = processor
        self.family = family
        self.scheduler = scheduler
        self.sites: list[Site] = []
        self.step = Step(0, None, "call0", None)
        self.cache: dict[Any, Any] = {}
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # diffusers delivers its CacheContext to state managers of hooks
        self._states: dict[tuple[int, str], dict[Any, Any]] = {}
        self._warned: set[str] = set()
        self._start_over()

    # -- what the sites use ------------------------------------------------------------------------------------------

    def state(self, layer: int) -> dict[Any, Any]:
        """The method's memory for a layer in the branch that is running."""
        return self._states.setdefault((layer, self.step.branch), {})

    def fall_back(self, site: Site, reason: str) -> None:
        """Notes that a site runs dense although the settings wanted it sparse."""
        if self.processor.strict:
            raise UnsupportedError(f"{site.name}: {reason}. strict=True forbids dense attention in its place.")
        site.stats.fallbacks[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{type(self.processor).__name__} runs dense attention: {reason}. "
                "attnproc.report() counts how often; strict=True makes this an error.",
                AttnProcWarning,
                stacklevel=2,
            )

    # -- hook --------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.bind()
        arguments = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
        self._advance(self.family.timestep(arguments), self.family.grid(module, arguments))
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when a pipeline call ends: what methods remember is freed, the report stays."""
        self._states.clear()
        self._ended = True
        return module

    def bind(self) -> None:
        """Gives every site of ours its context; sites that diffusers rebuilt (IP-Adapter) are found here."""
        for layer, site in enumerate(self.sites):
            current = site.module.processor
            if isinstance(current, self.family.site):
                site.processor = current
                if current.context is not self:
                    current.bind(self, layer)
            elif not site.stats.replaced:
                site.stats.replaced = True
                warnings.warn(
                    f"{site.name} now has a {type(current).__name__} set by something else (fuse_qkv_projections, "
                    "attention slicing, an adapter); it runs without attnproc. Set the processor again to change that.",
                    AttnProcWarning,
                    stacklevel=2,
                )

    # -- step tracking -----------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        self._states.clear()
        self._index = -1
        self._seen: set[str] = set()
        self._value: float | None = None
        self._timesteps: Tensor | None = None
        self._ended = False
        for site in self.sites:
            site.stats.clear()

    def _advance(self, timestep: Tensor | None, grid: Grid | None) -> None:
        named = self.contexts._context
        timesteps = getattr(self.scheduler(), "timesteps", None)
        fresh = self._ended or (self._timesteps is not None and timesteps is not self._timesteps)
        value = total = None
        if named is not None and named.step_index is not None:
            index, total = int(named.step_index), named.num_inference_steps
        elif timestep is None:
            raise UnsupportedError(
                f"{self.family.name} was called without a timestep, so the step of the run is not known; "
                "pass `timestep` to the model as diffusers' pipelines do."
            )
        else:
            value = float(timestep.float().max())  # tokens that are given (TI2V) have timestep 0
            place = _position(value, timesteps)
            if place is None:  # bare model: calls with one timestep are one step, a larger one starts a new run
                last = self._value
                again = last is None or value > last
                fresh = fresh or again
                index = 0 if again else self._index + int(value != last)
            else:  # image- and video-to-video start in the middle of the schedule
                begin = getattr(self.scheduler(), "begin_index", None) or 0
                index, total = max(0, place - begin), len(timesteps) - begin  # type: ignore[arg-type]
        branch = None if named is None else BRANCHES.get(named.name, named.name)
        if fresh or index < self._index or (index == self._index == 0 and branch in self._seen):
            self._start_over()
        if index != self._index:
            self._seen.clear()
        if branch is None:
            branch = f"call{len(self._seen)}"
        if grid != self.step.grid:
            self._states.clear()
        self._index, self._value, self._timesteps = index, value, timesteps
        self._seen.add(branch)
        self.step = Step(index, total, branch, grid)


def context_of(model: nn.Module) -> RunContext | None:
    """The run context that is installed on a denoiser, or None."""
    return registry_of(model).get_hook(HOOK_NAME)  # type: ignore[return-value]


def scheduler_of(owner: Any) -> Callable[[], Any]:
    """Returns a function that gives the scheduler of a pipeline at the time, without keeping the pipeline alive."""
    reference = weakref.ref(owner)
    return lambda: getattr(reference(), "scheduler", None)


def _position(value: float, timesteps: Tensor | None) -> int | None:
    """Index of a timestep in the schedule, or None if it is not in there."""
    if timesteps is None or len(timesteps) == 0:
        return None
    distance = (timesteps.detach().float().cpu() - value).abs()
    nearest = int(distance.argmin())
    return nearest if float(distance[nearest]) <= TIMESTEP_TOLERANCE else None


def _parameters(model_class: Any) -> list[str]:
    return list(inspect.signature(model_class.forward).parameters)[1:]
