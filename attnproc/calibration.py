"""Calibrations: what a method learned offline about one model at one size, and how it is gathered and kept on disk.

A calibration file is a safetensors file with a JSON header in its metadata; nothing in it is ever executed. It is
written whole or not at all. A processor that reads one names it in its setting `calibration` and asks `require` before
it uses anything: a file of another model, size or setting raises an error that names every difference.

A `CalibrationProcessor` gathers the file. It is set on a pipeline like any processor, and the calls of the pipeline
run dense under its eyes:

    pipe.attn_processor = processor = PAROCalibrationProcessor(density=0.3)
    while not processor.done:
        for prompt in prompts[processor.prompts :]:
            pipe(prompt)
            processor.end_prompt()
            processor.state().save("partial.safetensors")  # restore() goes on from here
        processor.end_round()
    processor.finish().save("plan.safetensors")
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from attnproc.errors import SettingsError, UnsupportedError
from attnproc.files import replacing
from attnproc.layout import AttentionCall, Denoiser, TokenLayout
from attnproc.processor import AttnProcessor, Dense

FORMAT = 1
METADATA = "attnproc-calibration"
MAKE_ONE = "Make one with `attnproc calibrate`."


@dataclass(frozen=True)
class Component:
    """The facts of a denoiser that a calibration depends on; the latent grid is (T, H, W) after patching."""

    model: str
    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    text_tokens: int

    @classmethod
    def of(cls, call: AttentionCall) -> "Component":
        """The facts of the denoiser that a call belongs to."""
        heads, head_dim = call.query.shape[1], call.query.shape[3]
        layout, denoiser = call.layout, call.denoiser
        return cls(denoiser.model, denoiser.layers, heads, head_dim, layout.grid, layout.text_tokens)

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> "Component":
        """The facts as a header has them; KeyError, TypeError or ValueError where it does not."""
        facts = {f.name: header[f.name] for f in fields(cls)}
        frames, rows, columns = facts["grid"]
        return cls(**{**facts, "grid": (frames, rows, columns)})


def component_name(denoiser: Denoiser) -> str:
    """What a calibration calls a denoiser: its place in the pipeline, "model" for a bare one."""
    return denoiser.name or "model"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a method learned about one model at one size.

    Attributes:
        method: name of the method, such as "paro".
        header: plain data. `components` holds the facts of each denoiser (see `Component`) and what the method adds to
            them; `settings` those the file was made with; `made_with` the versions; `about` what the maker says.
        tensors: by name; read from the file one at a time where the calibration was loaded.
    """

    method: str
    header: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        from safetensors.torch import save_file

        header = {"format": FORMAT, "method": self.method, **self.header}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={METADATA: json.dumps(header)})
        except OSError as error:
            raise SettingsError(
                f"calibration {path} cannot be written: {error}; expected a file in a folder that exists. "
                "Choose another path."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Opens a file written by `save`; tensors are read when they are asked for.

        Raises:
            SettingsError: there is no such file, it is no calibration, or one of another format version.
        """
        header = _read_header(Path(path))
        found = header.pop("format", None)
        if found != FORMAT:
            raise SettingsError(
                f"calibration {path} has format version {found!r}; expected {FORMAT}. "
                "Make it again with `attnproc calibrate` of this version."
            )
        try:
            method = header.pop("method")
            components = [Component.read(facts) for facts in header["components"].values()]
            if not components:
                raise ValueError("no components")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SettingsError(
                f"calibration {path} has an incomplete header ({error!r}); expected one written by save(). {MAKE_ONE}"
            ) from error
        return cls(method, header, _FileTensors(Path(path)))

    @staticmethod
    def stamp(path: str | Path) -> tuple[int, ...] | None:
        """What changes when the file is replaced, so that nobody mixes an old header with new tensors; None if gone."""
        try:
            found = Path(path).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def component(self, denoiser: Denoiser | None = None) -> str | None:
        """The name that the file has for a denoiser, the first for None; None if it is not in there.

        A bare model does not know its place in a pipeline, so it takes the only component there is, and the other way
        round.
        """
        names = list(self.header["components"])
        if denoiser is None or component_name(denoiser) in names:
            return names[0] if denoiser is None else component_name(denoiser)
        return names[0] if len(names) == 1 and (not denoiser.name or names == ["model"]) else None

    def require(
        self,
        *,
        method: str,
        layout: TokenLayout,
        denoiser: Denoiser | None = None,
        heads: int | None = None,
        head_dim: int | None = None,
        **settings: Any,
    ) -> str:
        """The name of the component that this is about; raises SettingsError that names every difference.

        Args:
            method: the method that wants to use the calibration.
            layout: latent grid and text tokens it wants to use it for.
            denoiser, heads, head_dim: the same, where they are known already.
            settings: values that the file must have been made with; None takes any.
        """
        unfinished = self.header.get("unfinished")
        found = self.component(denoiser)
        name = next(iter(self.header["components"])) if found is None else found
        facts = Component.read(self.header["components"][name])
        made = self.header.get("settings", {})
        compared = [
            ("method", method, self.method),
            ("finished", True, unfinished is None),
            ("latent grid", tuple(layout.grid), facts.grid),
            ("text tokens", layout.text_tokens, facts.text_tokens),
            ("heads", heads, facts.heads),
            ("head_dim", head_dim, facts.head_dim),
            *((key, value, made.get(key)) for key, value in settings.items()),
        ]
        if denoiser is not None:
            if found is None:
                compared.append(("component", component_name(denoiser), ", ".join(self.header["components"])))
            compared += [("model", denoiser.model, facts.model), ("layers", denoiser.layers, facts.layers)]
        different = [f"{what} {ours}, not {theirs}" for what, theirs, ours in compared if theirs not in (None, ours)]
        if different:
            raise SettingsError(
                f"the calibration does not fit: it has {'; '.join(different)}. A calibration is for one model at one "
                "size; make another with `attnproc calibrate`, or use the model, size and settings it was made for."
            )
        return name


class _FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read one at a time: plans of large models are gigabytes."""

    def __init__(self, path: Path):
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        with _open(self.path) as file:
            if name not in set(file.keys()):
                raise KeyError(name)
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        with _open(self.path) as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise SettingsError(
            f"calibration {path} cannot be read: {error}; expected a calibration file. {MAKE_ONE}"
        ) from error
    except SafetensorError as error:
        raise SettingsError(
            f"calibration {path} is not a safetensors file ({error}); pickles and other formats are never opened. "
            f"{MAKE_ONE}"
        ) from error


def _read_header(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        header = json.loads(text or "")
    except (TypeError, ValueError):
        header = None
    if not isinstance(header, dict):
        raise SettingsError(f"{path} is a safetensors file, but expected was a calibration with its header. {MAKE_ONE}")
    return header


# -- gathering one -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Accumulator:
    """What a calibration has seen so far: sums on the CPU, and the facts of each component.

    `calls` counts those of this round by component and layer, as "transformer.7".
    """

    round: int = 0
    prompts: int = 0
    components: dict[str, Component] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Adds to a sum of that name, which starts at 0 and has the shape and dtype of the value."""
        value = value.detach().cpu()
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.clone()

    def meet(self, call: AttentionCall) -> str:
        """The name of the call's component; raises UnsupportedError if its facts differ from those of earlier calls."""
        name, facts = component_name(call.denoiser), Component.of(call)
        if self.round and name not in self.components:
            raise UnsupportedError(
                f"{name} was called first in round {self.round + 1}; expected the components of round 1. "
                "Run the same prompts in every round."
            )
        known = self.components.setdefault(name, facts)
        if known != facts:
            raise UnsupportedError(
                f"layer {call.layer} of {name} has {facts}, but calls before had {known}; expected one size in all "
                "layers and prompts. Calibrate each size on its own; models whose layers differ are not supported."
            )
        return name


@dataclass(kw_only=True)
class CalibrationProcessor(AttnProcessor):
    """Base of processors that watch dense runs to make a calibration.

    A subclass looks at each call in `observe` and adds to `accumulator`; `finish` makes the file of its sums. What
    needs two walks through the prompts, the second built on the first, has two `rounds`. The accumulator belongs to
    the object, not to its settings: one object makes one calibration.
    """

    #: the method that uses the calibration
    method: ClassVar[str]
    #: one word for each walk through the prompts
    rounds: ClassVar[tuple[str, ...]] = ("statistics",)

    accumulator: Accumulator = field(default_factory=Accumulator, init=False, repr=False, compare=False)

    # -- what a subclass defines -------------------------------------------------------------------------------------

    def observe(self, component: str, call: AttentionCall) -> None:
        """Adds what one call shows to `accumulator`. The call runs dense afterwards."""
        raise NotImplementedError

    def conclude_round(self) -> None:
        """Turns the sums of a round that ended into what the next one needs. The last round has no such need."""

    def finish(self, about: Mapping[str, Any] | None = None) -> Calibration:
        """The calibration, when all rounds are done. `about`: plain data for the header, such as model and prompts."""
        raise NotImplementedError

    # -- walking through the prompts ---------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all rounds have ended."""
        return self.accumulator.round == len(self.rounds)

    @property
    def round(self) -> str:
        """The word of the round that is on; "finished" when all have ended."""
        return "finished" if self.done else self.rounds[self.accumulator.round]

    @property
    def prompts(self) -> int:
        """Prompts that were seen whole in this round."""
        return self.accumulator.prompts

    def end_prompt(self) -> None:
        """Says that a prompt was run from first to last step."""
        self.accumulator.prompts += 1

    def end_round(self) -> None:
        """Says that all prompts were run; the next round may walk through the same ones again."""
        if self.done or not self.prompts:
            raise SettingsError(
                f"round {self.round!r} of the {self.method} calibration cannot end after {self.prompts} prompts; "
                "expected at least one. Run the pipeline and call end_prompt() first."
            )
        for name, component in self.accumulator.components.items():
            missing = [n for n in range(component.layers) if f"{name}.{n}" not in self.accumulator.calls]
            if missing:
                raise UnsupportedError(
                    f"layers {', '.join(map(str, missing))} of {name} were never seen in round {self.round!r}; "
                    "expected all of them. They may run dense for a reason that attnproc.report() tells."
                )
        self.conclude_round()
        self.accumulator.calls.clear()
        self.accumulator.round += 1
        self.accumulator.prompts = 0

    # -- as a processor ----------------------------------------------------------------------------------------------

    def plan(self, call: AttentionCall) -> Dense:
        """Looks at the call and leaves it dense."""
        if not self.done:
            name = self.accumulator.meet(call)
            self.observe(name, call)
            place = f"{name}.{call.layer}"
            self.accumulator.calls[place] = self.accumulator.calls.get(place, 0) + 1
        return Dense()

    def predicted_density(self, layout: TokenLayout) -> float:
        return 1.0

    # -- interruptions -----------------------------------------------------------------------------------------------

    def state(self) -> Calibration:
        """All that was seen so far, to be saved after a prompt. No processor takes it for a finished calibration."""
        seen = self.accumulator
        unfinished = {"round": seen.round, "prompts": seen.prompts, "calls": dict(seen.calls)}
        return Calibration(self.method, {**self.header(), "unfinished": unfinished}, seen.sums)

    def restore(self, state: Calibration) -> None:
        """Goes on from what `state` gave; raises SettingsError if it was gathered with other settings."""
        unfinished, settings = state.header.get("unfinished"), state.header.get("settings")
        ours = self.header()["settings"]
        if state.method != self.method or unfinished is None or settings != ours:
            came = f"{state.method} with settings {settings}" if unfinished else "a finished calibration"
            raise SettingsError(
                f"the state to go on from is {came}; expected {self.method} with settings {ours}. "
                "Delete the partial file to start afresh, or use its settings."
            )
        components = {name: Component.read(facts) for name, facts in state.header["components"].items()}
        sums = {name: state.tensors[name].clone() for name in state.tensors}
        self.accumulator = Accumulator(**unfinished, components=components, sums=sums)

    def header(self, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The header that every calibration has."""
        settings = json.loads(json.dumps(self.to_dict()["settings"]))  # tuples become the lists that a file gives back
        return {
            "settings": settings,
            "components": {name: asdict(facts) for name, facts in self.accumulator.components.items()},
            "made_with": {name: version(name) for name in ("torch", "diffusers")},
            "about": dict(about or {}),
        }
