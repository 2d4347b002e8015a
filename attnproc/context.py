"""The run context: what every attention site of one denoiser knows about step, branch and latent grid of a call."""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnproc.errors import AttnProcWarning, UnsupportedError
from attnproc.layout import Denoiser, Grid, Step
from attnproc.processor import AttnProcessor
from attnproc.reports import SiteStats

if TYPE_CHECKING:
    from attnproc.families.base import Family, SiteProcessor

ATTRIBUTE = "_attnproc_context"
# Guiders name their branches after their own inputs; methods see the two names every pipeline uses.
BRANCHES = {"pred_cond": "cond", "pred_uncond": "uncond"}
# A timestep may reach the model rounded to bfloat16, which keeps 8 binary digits.
TIMESTEP_TOLERANCE = 2.0**-7


@dataclass(eq=False)
class Site:
    """One attention module that a processor was set on."""

    name: str
    module: Any
    original: Any
    processor: "SiteProcessor"
    stats: SiteStats


class Constants(dict[Any, Any]):
    """What follows from sizes and settings, by key; the latest alone, as a service may see ever new sizes."""

    MOST = 64

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        while len(self) > self.MOST:
            del self[next(iter(self))]


class Loop:
    """A walk through a schedule. The denoisers that take part in it (two experts) count from the same start."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._place = 0

    def index(self, place: int) -> int:
        """Step of this walk at a place in the schedule. Image- and video-to-video start in its middle."""
        if self.first is None or place < self._place:  # the next window of a long video starts over
            self.first = place
        self._place = place
        return place - self.first


class RunContext:
    """Watches the calls of one denoiser; all its sites read from here, and nobody counts calls.

    It listens with a forward pre-hook of the module and to `cache_context`, in which pipelines name the branch. Both
    survive what offloading does to `forward`, and a deep copy of the model gets a context of its own.

    A pipeline says when its denoising loop begins and ends. Where there is no pipeline, a run starts when the step
    index falls, when step 0 of a branch is seen again, or when the scheduler got new timesteps.
    """

    def __init__(self, processor: AttnProcessor, family: "Family", scheduler: Callable[[], Any], denoiser: Denoiser):
        self.processor = processor
        self.denoiser = denoiser
        self.family = family
        self.scheduler = scheduler
        self.sites: list[Site] = []
        self.step = Step(0, None, "call0", None)
        self.cache = Constants()
        self._states: dict[tuple[int, str], dict[Any, Any]] = {}
        self._warned: set[str] = set()
        self._named: tuple[str, dict[str, Any]] | None = None
        self._loop: Loop | None = None  # of the pipeline that is running
        self._walk = Loop()  # where no pipeline is
        self._start_over()
        self._ended = True

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

    # -- listening to a model ----------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Starts listening to a denoiser."""
        setattr(model, ATTRIBUTE, self)
        self._hook = model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        if hasattr(model, "cache_context"):
            self._model_cache_context: Any = model.cache_context
            model.cache_context = self.cache_context  # type: ignore[assignment]

    def detach(self, model: nn.Module) -> None:
        """Stops listening; the model is as it was before `attach`."""
        self._hook.remove()
        vars(model).pop("cache_context", None)
        delattr(model, ATTRIBUTE)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Stands before the model's own `cache_context`, to learn the branch and, in some pipelines, the step."""
        self._named = name, kwargs
        try:
            with self._model_cache_context(name, **kwargs):
                yield
        finally:
            self._named = None

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Brings step, branch and grid up to date for a call of the denoiser."""
        self.bind()
        arguments = {**dict(zip(_parameters(type(module)), args, strict=False)), **kwargs}
        self._advance(self.family.timestep(arguments), self.family.grid(module, arguments))

    def bind(self) -> None:
        """Gives every site of ours its context; sites that diffusers rebuilt (IP-Adapter) are found here."""
        for layer, site in enumerate(self.sites):
            current = site.module.processor
            if isinstance(current, self.family.site):
                site.processor, site.stats.replaced = current, False
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

    # -- runs and steps ----------------------------------------------------------------------------------------------

    def begin(self, loop: Loop, scheduler: Callable[[], Any]) -> None:
        """A pipeline enters a denoising loop."""
        self._start_over()
        self.scheduler = scheduler
        self._loop, self._ended = loop, True

    def end(self, loop: Loop) -> None:
        """A pipeline left a denoising loop, whatever the cause: what methods remember is freed, the report stays."""
        if self._loop is loop:  # a loop that was given up may be noticed as late as in the next one
            self._states.clear()
            self._loop, self._ended = None, True

    def _start_over(self) -> None:
        self._states.clear()
        self._index = -1
        self._seen: set[str] = set()
        self._value: float | None = None
        self._timesteps: Tensor | None = None
        self._ended = False
        for site in self.sites:
            site.stats = SiteStats(replaced=site.stats.replaced)

    def _advance(self, timestep: Any, grid: Grid | None) -> None:
        name, facts = self._named or (None, {})
        scheduler = self.scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        fresh = self._ended or (self._timesteps is not None and timesteps is not self._timesteps)
        value = total = None
        if facts.get("step_index") is not None:
            index, total = int(facts["step_index"]), facts.get("num_inference_steps")
        elif timestep is None:
            raise UnsupportedError(
                f"{self.family.name} was called without a timestep, so the step of the run is not known; "
                "pass `timestep` to the model as diffusers' pipelines do."
            )
        else:
            value = float(torch.as_tensor(timestep).float().max())  # tokens that are given (TI2V) have timestep 0
            # Exact, where pipelines round timesteps to bfloat16; None before the first step of a run.
            place = None if self._loop is None else getattr(scheduler, "step_index", None)
            place = _position(value, timesteps) if place is None else int(place)
            if place is None:
                index, fresh = self._count(value, fresh)
                total = None if self._loop is None or timesteps is None else len(timesteps)
            else:
                if fresh:
                    self._walk = Loop()
                walk = self._loop or self._walk
                index = walk.index(place)
                total = len(timesteps) - (walk.first or 0)  # type: ignore[arg-type]
        branch = None if name is None else BRANCHES.get(name, name)
        repeated = index == self._index == 0 and branch in self._seen and self._loop is None
        if fresh or index < self._index or repeated:
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

    def _count(self, value: float, fresh: bool) -> tuple[int, bool]:
        """Step and whether a run starts, for a model whose timesteps are not those of the scheduler.

        Calls with one timestep are one step. Without a pipeline to tell, a timestep further back starts a new run.
        """
        last = None if fresh else self._value
        if last is None:
            return 0, True
        back = value < last if self.family.timesteps_rise else value > last
        if back and self._loop is None:
            return 0, True
        return self._index + int(value != last), fresh


def context_of(model: nn.Module) -> RunContext | None:
    """The run context that is installed on a denoiser, or None."""
    return vars(model).get(ATTRIBUTE)


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
    return nearest if float(distance[nearest]) <= TIMESTEP_TOLERANCE * abs(value) else None


def _parameters(model_class: Any) -> list[str]:
    return list(inspect.signature(model_class.forward).parameters)[1:]
