"""Recording queries, keys and values of a run, so that methods can be compared later without the model.

A recording is a folder: one safetensors file for each recorded call, and `index.json`, which says what they are. It is
written whole or not at all. Calls are as methods see them: (batch, heads, tokens, head_dim), order [video | text].
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

import attnproc
from attnproc.errors import SettingsError
from attnproc.files import new_folder, replacing, write_text
from attnproc.layout import AttentionCall, Denoiser, Step, TokenLayout
from attnproc.processor import AttnProcessor, Dense

if TYPE_CHECKING:
    from attnproc.pipelines.generate import Job

FORMAT = 1
INDEX = "index.json"
TENSORS = ("query", "key", "value")


@dataclass(kw_only=True)
class RecordingProcessor(AttnProcessor):
    """Runs dense and writes queries, keys and values of chosen calls to a folder as they come.

    Args:
        folder: where to.
        steps, layers: which calls, counted from 0.
    """

    name: ClassVar[str] = "record"
    folder: Path
    steps: Sequence[int]
    layers: Sequence[int]
    calls: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)

    def plan(self, call: AttentionCall) -> Dense:
        if call.step.index in self.steps and call.layer in self.layers:
            self._write(call)
        return Dense()

    def predicted_density(self, layout: TokenLayout) -> float:
        return 1.0

    def _write(self, call: AttentionCall) -> None:
        from safetensors.torch import save_file

        name = f"{len(self.calls):04d}.safetensors"
        tensors = {what: getattr(call, what).detach().cpu().contiguous() for what in TENSORS}
        if call.layout.text_valid is not None:
            tensors["text_valid"] = call.layout.text_valid.detach().cpu()
        with replacing(self.folder / name) as temporary:
            save_file(tensors, temporary)
        self.calls.append(
            {
                "file": name,
                "step": asdict(call.step),
                "layer": call.layer,
                "denoiser": asdict(call.denoiser),
                "grid": call.layout.grid,
                "text_tokens": call.layout.text_tokens,
            }
        )


def check_folder(folder: Path) -> None:
    """Raises SettingsError unless `folder` is a new or empty folder in one that exists."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"output {folder} is not empty; expected a new folder. Choose another --output.")
    if not folder.parent.is_dir():
        raise SettingsError(f"the folder {folder.parent} does not exist; make it, or choose another --output.")


def record(
    job: "Job", steps: Sequence[int], layers: Sequence[int], folder: Path, console: Console, messages: Console
) -> None:
    """Runs a job dense once and records the chosen calls."""
    from attnproc.pipelines.generate import run_once, versions
    from attnproc.pipelines.loading import load

    check_folder(folder)
    total = job.arguments["num_inference_steps"]
    if not steps or not all(0 <= step < total for step in steps):
        raise SettingsError(f"steps {tuple(steps)} were asked for; expected some from 0 to {total - 1}.")
    pipe = load(job.source, job.device, job.dtype, job.settings.offload)
    with new_folder(folder) as temporary:
        processor = RecordingProcessor(folder=temporary, steps=steps, layers=layers)
        with attnproc.using(pipe, processor):
            sites = len(attnproc.report(pipe).sites)
            if not layers or not all(0 <= layer < sites for layer in layers):
                raise SettingsError(f"layers {tuple(layers)} were asked for; expected some from 0 to {sites - 1}.")
            run_once(pipe, job, job.settings.seed, "recording", messages)
        index = {
            "format": FORMAT,
            "model": job.source.name,
            "prompt": job.settings.prompt,
            "seed": job.settings.seed,
            "call": job.arguments,
            "versions": versions(),
            "calls": processor.calls,
        }
        write_text(temporary / INDEX, json.dumps(index, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    console.print(f"{folder}: {len(processor.calls)} calls, {size:.1f} MB", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Recording:
    """A recording on disk; calls are read one at a time."""

    folder: Path
    index: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Recording":
        """Raises SettingsError if the folder holds no whole recording."""
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"format version {index['format']}, expected {FORMAT}")
            missing = [call["file"] for call in index["calls"] if not (folder / call["file"]).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{folder} is not a recording ({error}); expected a folder that `attnproc record` wrote."
            ) from error
        if missing:
            raise SettingsError(f"the recording {folder} lacks {', '.join(missing)}; record it again.")
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self.index["calls"])

    def call(self, number: int, cache: dict, state: dict) -> AttentionCall:
        """The recorded call as a method gets it."""
        from safetensors.torch import load_file

        about = self.index["calls"][number]
        tensors = load_file(self.folder / about["file"])
        step = about["step"]
        grid = tuple(about["grid"])
        return AttentionCall(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            TokenLayout(grid, about["text_tokens"], tensors.get("text_valid")),  # type: ignore[arg-type]
            Step(step["index"], step["total"], step["branch"], grid),  # type: ignore[arg-type]
            about["layer"],
            Denoiser(**about["denoiser"]),
            cache,
            state,
        )
