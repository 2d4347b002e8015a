"""What every method's processor shares: settings, which steps and layers stay dense, saving and loading."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from attnproc.errors import SettingsError
from attnproc.files import write_text
from attnproc.kernels import BACKENDS, FEATURES, BlockMask, Quantization
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout

QUALITIES = ("high", "balanced", "fast")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sparse method decided for one attention call; every backend can run it.

    Attributes:
        mask: the blocks to compute; everything in it counts positions of `token_order` if there is one.
        token_order: int32 (heads or 1, tokens), a permutation for each head, see `block_sparse_attention`.
        skip_threshold: see `block_sparse_attention`.
        after: called with the log-sum-exp of the scores, float32 (batch, heads, tokens), when the call has run.
    """

    mask: BlockMask
    token_order: Tensor | None = None
    skip_threshold: float | Tensor | None = None
    after: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class Dense:
    """A method's decision to leave one call dense. `reason` is empty where the settings ask for it (warm-up)."""

    reason: str = ""


@dataclass(kw_only=True)
class AttnProcessor:
    """Base of all methods. An object holds settings only, so one may be set on several pipelines.

    Settings left at None take the value that `quality` stands for; after construction every field has its value.

    Args:
        quality: "high", "balanced" or "fast": one dial for people who want one.
        dense_steps: (first, last) steps that stay dense; an int counts steps, a float is a fraction of the run
            (at least one step when above 0). A single number means (number, 0).
        dense_layers: the first n layers stay dense (int), or exactly these layers (a collection of ints).
        block_size: tokens of a query and key block; None lets the method choose from the grid.
        quantization: None, or what sparse calls compute in 8 bits: "int8", "int8+fp8" or "int8+int8" as in
            `attnproc.kernels.Quantization`. CPUs simulate it: same rounding, no gain in time.
        backend: "auto", or a backend of `attnproc.kernels.block_sparse_attention`.
        strict: raise `UnsupportedError` where the processor would otherwise run dense with a warning.
        check_finite: raise `AttnProcError` naming layer, step and branch where a sparse call gives NaN or infinity, and
            say whether its inputs had any. Waits for the device at every call: for finding faults.
    """

    name: ClassVar[str] = ""
    #: quality -> settings that the dial stands for
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: whether it runs only with the file of `attnproc calibrate`, its setting `calibration`
    needs_calibration: ClassVar[bool] = False

    quality: str = "balanced"
    dense_steps: Any = None
    dense_layers: Any = None
    block_size: int | None = None
    quantization: str | None = None
    backend: str = "auto"
    strict: bool = False
    check_finite: bool = False

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise SettingsError(f"quality={self.quality!r} is not known; choose one of {', '.join(QUALITIES)}.")
        for key, value in self.dial.get(self.quality, {}).items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        if self.backend not in ("auto", *BACKENDS):
            raise SettingsError(f"backend={self.backend!r} is not known; choose one of auto, {', '.join(BACKENDS)}.")
        try:
            Quantization.parse(self.quantization)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        needed = self.kernel_features() | (frozenset(("quantization",)) if self.quantization else frozenset())
        if missing := needed - FEATURES.get(self.backend, needed):
            fit = [name for name in BACKENDS if needed <= FEATURES[name]]
            raise SettingsError(
                f"backend={self.backend!r} cannot do {', '.join(sorted(missing))}, which these settings of {self.name} "
                f"need; choose one of auto, {', '.join(fit)}."
            )
        for flag in ("strict", "check_finite"):
            if not isinstance(getattr(self, flag), bool):
                raise SettingsError(f"{flag}={getattr(self, flag)!r} must be True or False.")
        self.dense_steps = _dense_steps(self.dense_steps)
        self.dense_layers = _dense_layers(self.dense_layers)
        if self.block_size is not None and (not _is_int(self.block_size) or self.block_size < 1):
            raise SettingsError(f"block_size={self.block_size!r} must be a positive int, or None to let it be chosen.")

    # -- what a method defines ---------------------------------------------------------------------------------------

    def plan(self, call: AttentionCall) -> Plan | Dense:
        """Decides one call that the warm-up settings leave to the method."""
        raise NotImplementedError

    def predicted_density(self, layout: TokenLayout) -> float:
        """Kept share of query-key pairs that `plan` will have on this layout, known without data. 1.0 = dense."""
        raise NotImplementedError

    def dense_reason(self, layout: TokenLayout) -> str:
        """Why calls of this layout would all run dense although the settings want them sparse; "" if they do not."""
        return ""

    def kernel_features(self) -> frozenset[str]:
        """What plans with these settings need of a backend, in the words of `attnproc.kernels.FEATURES`."""
        return frozenset()

    def mask(self, layout: TokenLayout) -> BlockMask | None:
        """The mask of a layout where the pattern is fixed and so known without data, on the CPU; else None."""
        return None

    def check(self, layout: TokenLayout) -> None:
        """Raises SettingsError if these settings cannot be used with a layout. Called as a run starts."""

    def check_model(self, layout: TokenLayout, denoiser: Denoiser, heads: int, head_dim: int) -> None:
        """As `check`, with what is known of the model only when it runs; of `heads` those of one device."""

    # -- warm-up -----------------------------------------------------------------------------------------------------

    def dense_step_count(self, total: int) -> tuple[int, int]:
        """Dense (first, last) steps of a run of `total` steps, as counts."""
        first, last = (n if _is_int(n) else (max(1, round(n * total)) if n > 0 else 0) for n in self.dense_steps)
        if first > total or last > total:
            raise SettingsError(
                f"dense_steps={self.dense_steps} asks for {max(first, last)} dense steps, but the run has {total}; "
                "use fewer, or a fraction such as 0.25."
            )
        return first, last

    def is_dense_step(self, step: Step) -> bool:
        """Whether the warm-up settings keep this step dense."""
        first, last = self.dense_steps
        if step.total is None:
            if last == 0 and _is_int(first):
                return step.index < first
            raise SettingsError(
                f"dense_steps={self.dense_steps} needs the number of steps, which a bare model does not tell; "
                "give attnproc.install(..., scheduler=scheduler), or use dense_steps=(count, 0)."
            )
        first, last = self.dense_step_count(step.total)
        return step.index < first or step.index >= step.total - last

    def is_dense_layer(self, layer: int) -> bool:
        """Whether the settings keep this layer dense."""
        if _is_int(self.dense_layers):
            return layer < self.dense_layers
        return layer in self.dense_layers

    @classmethod
    def at_density(cls, density: float, layout: TokenLayout, settings: Mapping[str, Any] | None = None) -> Self:
        """A processor that keeps about this share of the query-key pairs of a layout, for comparisons.

        settings: other settings. Methods without a density of their own look for the settings that come closest.
        """
        return cls.from_settings({**(settings or {}), "density": density})

    # -- data --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain data: {"method": name, "settings": {...}}."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"method": self.name, "settings": settings}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Makes a processor from plain data, naming unknown settings."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for key in settings:
            if key not in known:
                raise SettingsError(
                    f"{cls.__name__} has no setting {key!r}; it has {', '.join(known)}." + _nearest(key, known)
                )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Published settings by name: {"settings": {...}, "for": what they are for, "source": where from}."""
        text = resources.files("attnproc.sparse").joinpath("presets.json").read_text(encoding="utf-8")
        return json.loads(text).get(cls.name, {})

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Makes a processor with published settings; keyword arguments override single ones."""
        if "quality" in overrides:
            raise SettingsError(
                f"preset {name!r} and quality={overrides['quality']!r} came together; a preset fixes what quality "
                "stands for. Leave one out."
            )
        presets = cls.presets()
        if name not in presets:
            raise SettingsError(
                f"{cls.__name__} has no preset {name!r}; it has {', '.join(presets) or 'none'}."
                + _nearest(name, presets)
            )
        return cls.from_settings({**presets[name]["settings"], **overrides})

    def save(self, path: str | Path) -> None:
        """Writes the settings as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "AttnProcessor":
        """Reads settings written by `save`; the file says which method it is for."""
        from attnproc.methods import method_class

        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            method, settings = data["method"], dict(data["settings"])
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"settings file {path} cannot be read: {error}; give a file written by save()."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"settings file {path} is not a settings file ({error}); expected JSON written by save()."
            ) from error
        found = cls if method == cls.name else method_class(method)  # a method of one's own is on no list
        if not issubclass(found, cls):
            raise SettingsError(
                f"settings file {path} is for {method!r}, not for {cls.name!r}; load it with that class."
            )
        return found.from_settings(settings)


@dataclass(kw_only=True)
class DenseAttnProcessor(AttnProcessor):
    """Full attention through the same path as every method: the identity, and the parity check."""

    name: ClassVar[str] = "dense"
    dense_steps: Any = field(default=0)
    dense_layers: Any = field(default=0)

    def is_dense_step(self, step: Step) -> bool:
        return True  # asked for, so never reported as a fallback

    def plan(self, call: AttentionCall) -> Plan | Dense:
        return Dense()

    def predicted_density(self, layout: TokenLayout) -> float:
        return 1.0


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dense_steps(value: Any) -> tuple[int | float, int | float]:
    pair = (0, 0) if value is None else tuple(value) if isinstance(value, tuple | list) else (value, 0)
    for number in pair:
        count = _is_int(number) and number >= 0
        fraction = isinstance(number, float) and math.isfinite(number) and 0.0 <= number <= 1.0
        if not (count or fraction):
            raise SettingsError(
                f"dense_steps={value!r} is not valid; give (first, last), each an int >= 0 (steps) or a float from "
                "0.0 to 1.0 (fraction of the run)."
            )
    if len(pair) != 2:
        raise SettingsError(f"dense_steps={value!r} has {len(pair)} entries; give (first, last).")
    return pair


def _dense_layers(value: Any) -> int | tuple[int, ...]:
    if value is None:
        return 0
    if _is_int(value) and value >= 0:
        return value
    if isinstance(value, tuple | list | set | frozenset | range) and all(_is_int(n) and n >= 0 for n in value):
        return tuple(sorted(value))
    raise SettingsError(
        f"dense_layers={value!r} is not valid; give an int >= 0 (the first n) or a collection of layers."
    )


def _nearest(word: str, known) -> str:
    import difflib

    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
