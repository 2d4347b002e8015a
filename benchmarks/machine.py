"""What a table was measured on, and where it is saved."""

import datetime
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from attnproc import hardware
from attnproc.files import write_text

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The GPU if there is one, else the CPU, in words."""
    return hardware.device_name("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict[str, Any]:
    """Hardware, versions and date, to be saved with every table."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "not installed"
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def save(name: str, result: dict, markdown: str, folder: Path = RESULTS) -> Path:
    """Writes `<name>-<cpu or gpu>-<device>.json` and the same as Markdown beside it; returns the JSON's path."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = folder / f"{name}-{kind}-{slug}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown)
    return path
