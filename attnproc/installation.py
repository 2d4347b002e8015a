"""Setting a processor on a pipeline or model and taking it off again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from attnproc.context import Loop, RunContext, Site, context_of, scheduler_of
from attnproc.errors import SettingsError
from attnproc.families import family_of
from attnproc.families.base import Family
from attnproc.layout import Denoiser
from attnproc.processor import AttnProcessor
from attnproc.reports import Report, SiteStats, site_report

DENOISERS = ("transformer", "transformer_2", "unet")


def install(target: Any, processor: AttnProcessor, *, scheduler: Any = None) -> None:
    """Sets a processor on every self- or joint attention of a pipeline's denoisers, or of a bare model.

    A processor that was installed before is replaced. `pipe.attn_processor = processor` does the same.

    Args:
        target: a diffusers pipeline (also modular) or a denoiser model.
        processor: settings; the same object may be installed on several targets.
        scheduler: for a bare model, the scheduler whose `timesteps` tell the steps of a run.

    Raises:
        SettingsError: nothing on `target` can take the processor, or its settings do not fit the model.
    """
    if not isinstance(processor, AttnProcessor):
        raise SettingsError(
            f"processor is a {type(processor).__name__}; expected an attnproc processor such as RadialAttnProcessor(), "
            "or None to take it off."
        )
    denoisers = _denoisers(target)
    prepared = [(name, model, *_prepare(name, model, processor)) for name, model in denoisers.items()]
    schedule = (lambda: scheduler) if isinstance(target, nn.Module) else scheduler_of(target)
    for name, model, family, sites in prepared:
        _uninstall(model)
        context = RunContext(processor, family, schedule, Denoiser(name, type(model).__name__, len(sites)))
        for site_name, module in sites:
            site = family.site_for(model, module)
            context.sites.append(Site(site_name, module, module.processor, site, SiteStats()))
            module.processor = site
        context.bind()
        context.attach(model)


def uninstall(target: Any) -> None:
    """Puts back the processors that were there before `install`. Does nothing where none is installed."""
    for model in _denoisers(target).values():
        _uninstall(model)


@contextmanager
def using(target: Any, processor: AttnProcessor, *, scheduler: Any = None) -> Iterator[None]:
    """Installs a processor for a block of code; afterwards, also after an error, what was there before is back."""
    before = [(model, context_of(model)) for model in _denoisers(target).values()]
    install(target, processor, scheduler=scheduler)
    try:
        yield
    finally:
        for model, context in before:
            _uninstall(model)
            if context is not None:
                install(model, context.processor)
                restored = context_of(model)
                restored.scheduler, restored.denoiser = context.scheduler, context.denoiser  # type: ignore[union-attr]


def installed(target: Any) -> AttnProcessor | None:
    """The processor that is installed on a pipeline or model, or None."""
    contexts = [context_of(model) for model in _denoisers(target).values()]
    return next((context.processor for context in contexts if context is not None), None)


def report(target: Any) -> Report:
    """What attention did in the last run of a pipeline or model: print it, or use `to_dict()`.

    Raises:
        SettingsError: no processor is installed.
    """
    settings, rows = {}, []
    for name, model in _denoisers(target).items():
        context = context_of(model)
        if context is None:
            continue
        context.bind()
        settings[name] = context.processor.to_dict()
        rows += [site_report(name, site.name, context.processor.name, site.stats) for site in context.sites]
    if not rows:
        raise SettingsError(
            f"nothing to report: no attnproc processor is installed on this {type(target).__name__}; "
            "set one with `pipe.attn_processor = RadialAttnProcessor()`."
        )
    return Report(settings, rows)


def _denoisers(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": unwrap_module(target)}
    found = {name: unwrap_module(getattr(target, name, None)) for name in DENOISERS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not models:
        raise SettingsError(
            f"{type(target).__name__} has no denoiser; expected a diffusers pipeline with one of "
            f"{', '.join(DENOISERS)}, or a model."
        )
    return models


def _prepare(name: str, model: nn.Module, processor: AttnProcessor) -> tuple[Family, list[tuple[str, Any]]]:
    family = family_of(model)
    sites = list(family.sites(model))
    if not sites:
        raise SettingsError(
            f"{name or 'the model'} is a {type(model).__name__} without self-attention in diffusers attention modules; "
            "expected a diffusers denoiser such as WanTransformer3DModel. Leave attnproc off for this one."
        )
    highest = (
        processor.dense_layers
        if isinstance(processor.dense_layers, int)
        else max(processor.dense_layers, default=-1) + 1
    )
    if highest > len(sites):
        raise SettingsError(
            f"dense_layers={processor.dense_layers} names layer {highest - 1}, but {type(model).__name__} has "
            f"{len(sites)} attention layers, counted from 0."
        )
    return family, sites


def _uninstall(model: nn.Module) -> None:
    context = context_of(model)
    if context is None:
        return
    context.detach(model)
    for site in context.sites:
        if isinstance(site.module.processor, context.family.site):  # what others set since then is theirs
            site.module.processor = site.original


def add_to_pipelines() -> None:
    """Gives every diffusers pipeline, also modular ones, the property `attn_processor`, and learns when runs end.

    Nothing else tells of a run that ended in an error: diffusers' own clean-up is not reached then. A pipeline on
    which no processor was set is not affected.
    """

    def getter(pipe: Any) -> AttnProcessor | None:
        return installed(pipe) if any(getattr(pipe, name, None) is not None for name in DENOISERS) else None

    def setter(pipe: Any, processor: AttnProcessor | None) -> None:
        if processor is None:
            uninstall(pipe)
        else:
            install(pipe, processor)

    ordinary: Any = DiffusionPipeline
    modular: Any = ModularPipeline
    if not hasattr(ordinary, "attn_processor"):
        documented = property(getter, setter, doc="The attnproc processor of this pipeline; None takes it off.")
        ordinary.attn_processor = modular.attn_processor = documented
        ordinary.progress_bar = _with_loop_bounds(ordinary.progress_bar)
        modular.__call__ = _with_call_bounds(modular.__call__)


def _with_loop_bounds(progress_bar: Any) -> Any:
    """Every denoising loop runs inside the pipeline's progress bar, which is closed on each way out of the loop."""

    @wraps(progress_bar)
    def bounded(pipe: Any, iterable: Any = None, total: int | None = None) -> Any:
        contexts, loop = _contexts(pipe), Loop()
        if not contexts:
            return progress_bar(pipe, iterable, total)
        for context in contexts:
            context.begin(loop, scheduler_of(pipe))

        def end() -> None:
            for context in contexts:
                context.end(loop)

        def close_and_end() -> None:
            del bar.close  # the bar's own again
            bar.close()
            end()

        bar = progress_bar(pipe, None if iterable is None else _Watched(iterable, end), total)
        bar.close = close_and_end
        return bar

    return bounded


class _Watched:
    """An iterable that tells when it was left: a bar that is switched off iterates without closing."""

    def __init__(self, iterable: Any, left: Callable[[], None]):
        self._iterable, self._left = iterable, left

    def __len__(self) -> int:
        return len(self._iterable)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._iterable
        finally:
            self._left()


def _with_call_bounds(call: Any) -> Any:
    @wraps(call)
    def bounded(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        contexts, loop = _contexts(pipe), Loop()
        for context in contexts:
            context.begin(loop, scheduler_of(pipe))
        try:
            return call(pipe, *args, **kwargs)
        finally:
            for context in contexts:
                context.end(loop)

    return bounded


def _contexts(pipe: Any) -> list[RunContext]:
    models = (unwrap_module(getattr(pipe, name, None)) for name in DENOISERS)
    return [context for model in models if isinstance(model, nn.Module) and (context := context_of(model))]
