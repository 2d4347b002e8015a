"""What the picture commands read: pictures, boxes, masks, and the YAML file of a story.

A box is written x, y, width, height: in pixels of the picture as whole numbers, or as fractions of it (0.5). Inside the
package a box is (x0, y0, x1, y1), half-open.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from attnproc.control.masks import check_depth, mask_channel
from attnproc.errors import SettingsError
from attnproc.pipelines.ir_diffusion import Scene, Subject
from attnproc.pipelines.settings import read_yaml

Box = tuple[float, float, float, float]
SUBJECT_KEYS = ("prompt", "region", "word", "image")
SCENE_KEYS = ("prompt", "regions")


@dataclass(frozen=True)
class Story:
    """The content of a story file; `data` is the file as it was read."""

    subjects: list[Subject]
    scenes: list[Scene]
    data: dict[str, Any]


def read_picture(path: Path, what: str) -> Image.Image:
    """A picture as RGB, upright as its camera meant it; transparency is dropped.

    Raises:
        SettingsError: the file cannot be read as a picture of 8 bits a channel.
    """
    picture = _open(path, what)
    check_depth(picture, f"{what} {path}")
    return picture.convert("RGB")


def parse_box(text: str, what: str) -> Box:
    """The box of a text "x,y,w,h", as (x0, y0, x1, y1)."""
    try:
        return to_box([float(part) if "." in part else int(part) for part in text.split(",")], what)
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise _no_box(text, what) from error


def to_box(numbers: Sequence[Any], what: str) -> Box:
    """The box of four numbers x, y, w, h, as (x0, y0, x1, y1).

    Raises:
        SettingsError: these are not four numbers, or the box is empty.
    """
    if len(numbers) != 4 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
        raise _no_box(numbers, what)
    x, y, w, h = numbers
    if not (min(w, h) > 0 and math.isfinite(sum(numbers))):
        raise SettingsError(
            f"{what} is the box {x}, {y}, {w}, {h}; expected x and y of its corner, and a width and height above 0. "
            "Correct it."
        )
    if any(isinstance(v, float) for v in numbers):
        # Rounded, so that 0.7 + 0.3 does not leave the picture.
        return float(x), float(y), round(float(x + w), 9), round(float(y + h), 9)
    return x, y, x + w, y + h


def read_region(value: Any, what: str, folder: Path = Path()) -> Box | Image.Image:
    """A box from four numbers, or the mask in a picture file, whose name is relative to `folder`.

    White is inside, or in a picture with transparency what is opaque, as `attnproc.control.masks.region_mask` takes it.
    """
    if isinstance(value, str) and value.strip():
        return mask_channel(_open(folder / value, what), f"{what} {folder / value}")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return to_box(value, what)
    raise SettingsError(
        f"{what} is {value!r}; expected a box [x, y, width, height] or the file name of a mask. Write one of these."
    )


def parse_layout(assignments: Sequence[str], concepts: Sequence[str]) -> dict[str, Box | Image.Image]:
    """The regions of texts CONCEPT=x,y,w,h and CONCEPT=mask.png.

    Raises:
        SettingsError: a text is no such assignment, its concept is none of `concepts` or came before, or its box or
            mask cannot be used.
    """
    regions: dict[str, Box | Image.Image] = {}
    for text in assignments:
        concept, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise SettingsError(
                f"--layout {text!r} is not an assignment; expected CONCEPT=x,y,w,h or CONCEPT=mask.png. Write it like "
                "--layout 'red circle=8,8,48,48'."
            )
        if concept not in concepts:
            raise SettingsError(
                f"--layout {text!r} is for {concept!r}, which is no concept; expected one of {', '.join(concepts)}. "
                "Add it to --concepts, or correct it."
            )
        if concept in regions:
            raise SettingsError(f"--layout came twice for {concept!r}; expected one region a concept. Leave one out.")
        what = f"--layout of {concept!r}"
        is_box = value.replace(",", "").replace(".", "").replace("-", "").replace(" ", "").isdigit()
        regions[concept] = parse_box(value, what) if is_box else read_region(value, what)
    return regions


def read_story(path: Path) -> Story:
    """Reads and checks a story file; names of pictures in it are relative to its folder.

    Raises:
        SettingsError: with the place and key that is missing, unknown or has the wrong kind of value.
    """
    data = read_yaml(path, "story")
    _check_keys(data, ("subjects", "scenes"), ("subjects", "scenes"), f"{path}")
    subjects = [_subject(entry, f"{path}, subject {n}", path.parent) for n, entry in _entries(data, "subjects", path)]
    scenes = [_scene(entry, f"{path}, scene {n}", path.parent, subjects) for n, entry in _entries(data, "scenes", path)]
    return Story(subjects, scenes, data)


def _subject(entry: Any, where: str, folder: Path) -> Subject:
    _check_keys(entry, SUBJECT_KEYS, ("prompt",), where)
    if "region" not in entry and "word" not in entry:
        raise SettingsError(
            f"{where} has neither the key 'region' nor 'word'; expected where the subject is in its portrait, or the "
            "word of its prompt by whose attention it is found. Add one."
        )
    image = _text(entry, "image", where) if "image" in entry else None
    return Subject(
        _text(entry, "prompt", where),
        read_region(entry["region"], f"{where}, key 'region'", folder) if "region" in entry else None,
        _text(entry, "word", where) if "word" in entry else None,
        None if image is None else read_picture(folder / image, f"{where}, key 'image':"),
    )


def _scene(entry: Any, where: str, folder: Path, subjects: Sequence[Subject]) -> Scene:
    _check_keys(entry, SCENE_KEYS, ("prompt",), where)
    prompt = _text(entry, "prompt", where)
    if "regions" not in entry:
        if any(subject.word is None for subject in subjects):
            raise SettingsError(
                f"{where} has no key 'regions', and not every subject has a 'word' to find it by; expected one region "
                "for each subject. Add them."
            )
        return Scene(prompt)
    regions = [
        None if region is None else read_region(region, f"{where}, key 'regions', entry {n}", folder)
        for n, region in _entries(entry, "regions", where)
    ]
    if len(regions) != len(subjects):
        raise SettingsError(
            f"{where} has {len(regions)} entries in its key 'regions'; expected {len(subjects)}, one for each subject "
            "in their order, null for one that is not in this scene. Add or remove some."
        )
    return Scene(prompt, regions)


def _check_keys(entry: Any, known: Sequence[str], needed: Sequence[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise SettingsError(f"{where} is {entry!r}; expected the keys {', '.join(known)}. Write 'key: value' lines.")
    for key in entry:
        if key not in known:
            match = difflib.get_close_matches(str(key), known, n=1)
            raise SettingsError(
                f"{where} has the unknown key {key!r}; expected {', '.join(known)}."
                + (f" Did you mean {match[0]!r}?" if match else " Remove it.")
            )
    for key in needed:
        if key not in entry:
            raise SettingsError(f"{where} has no key {key!r}; expected {', '.join(needed)}. Add it.")


def _entries(entry: Mapping[str, Any], key: str, where: str | Path) -> list[tuple[int, Any]]:
    """The list under a key, numbered from 1."""
    value = entry[key]
    if not isinstance(value, list) or not value:
        raise SettingsError(f"{where}, key {key!r} is {value!r}; expected a list of at least one entry. Write '- ...'.")
    return list(enumerate(value, 1))


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry[key]
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{where}, key {key!r} is {value!r}; expected text. Write some.")
    return value


def _open(path: Path, what: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"{what} {path} cannot be read ({reason}); expected a picture, such as a PNG. Correct the name."
        ) from error


def _no_box(value: Any, what: str) -> SettingsError:
    return SettingsError(
        f"{what} is {value!r}; expected a box of four numbers x, y, width, height. Write it like 8,8,48,48 in pixels, "
        "or 0.1,0.1,0.4,0.4 as fractions."
    )
