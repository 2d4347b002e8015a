"""What a run is asked to do: flags over a YAML file over defaults, checked and named."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from attnproc.errors import SettingsError
from attnproc.kernels import available_backends
from attnproc.methods import method_class
from attnproc.processor import AttnProcessor

EMBEDDED = "shapes-video"
EMBEDDED_PICTURES = "shapes-image"
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every command that runs a model can be asked; the names are those of the flags.

    None stands for the model's own default, as far as the field allows it. `set` holds settings of the method.
    """

    model: str
    set: Mapping[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    output: str
    compare: bool = False

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name, choices in (("dtype", DTYPES), ("offload", OFFLOADS)):
            value = getattr(self, name)
            if value not in choices:
                raise SettingsError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}.")
        for name, least in (("steps", 1), ("num_videos", 1), ("num_images", 1), ("seed", 0), ("guidance", 0)):
            value = getattr(self, name, None)
            if value is not None and not least <= value < 2**63:
                raise SettingsError(f"{name}={value} is not possible; expected at least {least}. Give another number.")


@dataclass(frozen=True, kw_only=True)
class PictureSettings(CommonSettings):
    """Settings of `attnproc image`, `story` and `compose`; `num_images` is of `image` alone."""

    model: str = EMBEDDED_PICTURES
    output: str = "picture.png"
    num_images: int = 1
    report: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSettings(CommonSettings):
    """Settings of `attnproc generate`; the names are those of its flags and of the keys of a YAML file.

    `plan` is a calibration file of `attnproc calibrate`.
    """

    prompt: str = ""
    model: str = EMBEDDED
    attention: str = "radial"
    preset: str | None = None
    quality: str | None = None
    plan: str | None = None
    strict: bool = False
    frames: int | None = None
    num_videos: int = 1
    output: str = "video.mp4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise SettingsError(
                "the prompt is empty; expected a description of the video. Write one, such as "
                "'a red star moving right on a navy background'."
            )
        if self.preset is not None and self.quality is not None:
            raise SettingsError(
                f"preset={self.preset!r} and quality={self.quality!r} came together; expected one of them, as a preset "
                "fixes what quality stands for. Leave one out."
            )

    @classmethod
    def from_sources(cls, config: Path | None, flags: Mapping[str, Any]) -> Self:
        """Merges a YAML file and flags; a flag that is None was not given. `set` is merged key by key."""
        data = {} if config is None else read_yaml(config, "config")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                match = difflib.get_close_matches(str(key), known, n=1)
                raise SettingsError(
                    f"{config} has the unknown key {key!r}; expected {', '.join(known)}."
                    + (f" Did you mean {match[0]!r}?" if match else " Remove it.")
                )
        given = {key: value for key, value in flags.items() if value is not None}
        if isinstance(data.get("set"), Mapping):
            given["set"] = {**data["set"], **given.get("set", {})}
        return cls(**{**data, **given})

    def processor(self) -> AttnProcessor:
        """The processor that is asked for.

        Raises:
            SettingsError: method, preset, quality, a setting or the backend is not valid.
        """
        cls = method_class(self.attention)
        settings = typed_settings(cls, self.set)
        if self.plan is not None:
            if "calibration" not in {f.name for f in dataclasses.fields(cls)}:
                raise SettingsError(
                    f"plan={self.plan!r} was given, but {self.attention} takes none; expected paro or sparge. "
                    "Leave it out, or choose --attention."
                )
            settings["calibration"] = self.plan
        if self.strict:
            settings["strict"] = True
        if self.quality is not None:
            settings["quality"] = self.quality
        preset = self.preset
        if preset is None and self.model == EMBEDDED and EMBEDDED in cls.presets():
            if self.quality is None:
                preset = EMBEDDED
            else:  # the preset's sizes without what quality stands for
                own = cls.presets()[EMBEDDED]["settings"]
                dial = {**cls.dial.get(self.quality, {}), **settings}
                settings |= {key: value for key, value in own.items() if key not in dial}
        processor = cls.from_settings(settings) if preset is None else cls.from_preset(preset, **settings)
        _check_backend(processor.backend)
        return processor


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """Turns "key=value" texts into a dictionary."""
    found = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise SettingsError(
                f"--set {text!r} is not an assignment; expected key=value. Write it like --set decay_factor=0.5."
            )
        found[key.strip()] = value.strip()
    return found


def typed_settings(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turns texts into the types that the method's settings have; other values stay as they are."""
    hints = typing.get_type_hints(cls)
    return {
        key: _typed(key, value, hints[key]) if isinstance(value, str) and key in hints else value
        for key, value in settings.items()
    }


def _typed(key: str, text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    if text.lower() in ("none", "null") and types.NoneType in kinds | {None if hint is Any else hint}:
        return None
    if any(typing.get_origin(kind) is Mapping for kind in kinds):
        raise SettingsError(f"{key}={text!r} holds several values by name; expected it in Python. Leave it out here.")
    if any(typing.get_args(kind)[:1] == (str,) and typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        several = any(typing.get_origin(kind) is tuple for kind in kinds)
        if hint is Any or several:  # a number, or several: dense_steps=0.25,1
            numbers = [_number(part) for part in text.strip("()[] ").split(",") if part.strip()]
            return numbers[0] if len(numbers) == 1 and "," not in text else tuple(numbers)
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
    except (ValueError, KeyError) as error:
        expected = "a number, or several with commas"
        if not (hint is Any or several):
            expected = " or ".join(sorted(map(_kind_name, kinds)))
        raise SettingsError(f"{key}={text!r} has the wrong type; expected {expected}. Correct the value.") from error
    return text


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _kinds(hint: Any) -> "set[Any]":
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


def _kind_name(kind: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "none"}
    return names.get(kind, "settings (key: value)")


def _check_type(name: str, value: Any, hint: Any) -> None:
    kinds = _kinds(hint)
    allowed = tuple(Mapping if typing.get_origin(kind) is Mapping else kind for kind in kinds)
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = isinstance(value, allowed) and not (isinstance(value, bool) and bool not in kinds)
    if not fits and not (whole and float in kinds):
        expected = " or ".join(sorted(map(_kind_name, kinds)))
        raise SettingsError(f"{name}={value!r} has the wrong type; expected {expected}. Correct the value.")


def _check_backend(name: str) -> None:
    backends = available_backends()
    if name == "auto":
        return
    if backends[name] is not None:
        raise SettingsError(
            f"backend={name!r} cannot be used here: {backends[name]}; expected one that can. "
            "Leave it at 'auto', or see `attnproc doctor`."
        )


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file; an empty file has none.

    Raises:
        SettingsError: the file cannot be read, is not YAML, or holds something else than keys and values.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{what} {path} cannot be read ({reason}); expected a YAML file. Correct it.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingsError(f"{what} {path} holds a {type(data).__name__}; expected keys and values. Correct it.")
    return data
