"""What both training runs share: checkpoints, averaged weights, the learning-rate curve, the log."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

MATRIX_RATE, OTHER_RATE = 2e-3, 1e-3  # peak learning rates of `Optimizers`


def pick_device(name: str) -> torch.device:
    """The named device, or with "auto" the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device, enabled: bool = True) -> contextlib.AbstractContextManager:
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 200, hold: float = 0.0, floor: float = 0.02
) -> float:
    """Linear warm-up, the peak until the fraction `hold` of all steps, then a half cosine to `floor` times the peak.

    A run that holds can be lengthened or shortened as long as it has not begun to fall.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, hold * steps)
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def step_rng(seed: int, step: int) -> random.Random:
    """The randomness of one step: a resumed run draws what an uninterrupted one would have drawn."""
    return random.Random(seed * 1_000_003 + step)


class Shards:
    """Computes the gradient of one batch in parts, one Python thread per CPU core, each over its own copy of the
    modules that shares the parameters.

    For models this small that is several times faster than PyTorch's threads inside single operations, and does not
    collapse when other programs use a core. On a GPU there is one part and no thread.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], device: torch.device):
        self.count = (os.cpu_count() or 1) if device.type == "cpu" else 1
        if self.count > 1:
            torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(self.count, initializer=lambda: torch.set_num_threads(1))
        shared = {id(p): p for module in modules for p in module.parameters()}
        self.copies = [tuple(modules)]
        self.copies += [copy.deepcopy(tuple(modules), dict(shared)) for _ in range(self.count - 1)]

    def map(self, work: Callable[..., Any], parts: Sequence[Sequence[Any]]) -> list[Any]:
        """work(modules, *part) for each of at most `count` parts, side by side."""
        if len(parts) == 1:
            return [work(self.copies[0], *parts[0])]
        return list(self.pool.map(lambda job: work(job[0], *job[1]), zip(self.copies, parts, strict=False)))

    def gradient(
        self, work: Callable[..., tuple[torch.Tensor, ...]], batch: Sequence[torch.Tensor], seed: int
    ) -> list[float]:
        """Adds the gradient of the mean loss over a batch to the parameters.

        `work(modules, *part of the batch, generator)` returns the mean loss of its part and further values to watch,
        all scalars; the generator is its only randomness. Returns the batch's mean of each.
        """

        def one(modules: tuple[torch.nn.Module, ...], *arguments: Any) -> list[float]:
            values = work(modules, *arguments)
            share = len(arguments[0]) / len(batch[0])
            (values[0] * share).backward()
            return [value.item() * share for value in values]

        parts = zip(*(tensor.chunk(self.count) for tensor in batch), strict=True)
        jobs = [(*part, torch.Generator(part[0].device).manual_seed(seed + 7919 * k)) for k, part in enumerate(parts)]
        return [sum(values) for values in zip(*self.map(one, jobs), strict=True)]


class Average:
    """Exponential moving average of parameters, with a shorter memory at the start."""

    def __init__(self, modules: dict[str, torch.nn.Module], decay: float):
        self.modules, self.decay = modules, decay
        self.shadow = {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                kept = self.shadow[name][key]
                if value.is_floating_point():
                    kept.lerp_(value, 1 - decay)
                else:
                    kept.copy_(value)

    @contextlib.contextmanager
    def applied(self):
        """The modules hold the averaged weights inside this block."""
        backup = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in self.modules.items()}
        for name, module in self.modules.items():
            module.load_state_dict(self.shadow[name])
        try:
            yield
        finally:
            for name, module in self.modules.items():
                module.load_state_dict(backup[name])


class Optimizers:
    """Muon for some matrices of the first module, AdamW for everything else, behind one face.

    `is_matrix(name)` picks among the two-dimensional parameters of the first module.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], is_matrix: Callable[[str], bool]):
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in modules[0].named_parameters():
            (matrices if parameter.ndim == 2 and is_matrix(name) else others).append(parameter)
        for module in modules[1:]:
            others += module.parameters()
        self.parameters = matrices + others
        self.parts = [
            (torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), MATRIX_RATE),
            (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01), OTHER_RATE),
        ]

    def step(self, factor: float) -> None:
        """One update with every peak rate times `factor`; forgets the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


class Checkpoint:
    """One file with everything needed to go on: weights, averages, optimizer, step."""

    def __init__(self, path: Path, average: Average, optimizer: Any):
        self.path, self.average, self.optimizer = path, average, optimizer

    def save(self, step: int) -> None:
        state: dict[str, Any] = {
            "step": step,
            "weights": {name: module.state_dict() for name, module in self.average.modules.items()},
            "average": self.average.shadow,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)  # never a half-written checkpoint under the real name

    def load(self) -> int:
        """Restores everything and returns the step to go on with."""
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.average.modules.items():
            module.load_state_dict(state["weights"][name])
            for key, value in state["average"][name].items():
                self.average.shadow[name][key].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]


class Log:
    """Appends lines to a file and prints them; measures the seconds per step between them."""

    def __init__(self, path: Path):
        self.path = path
        self.last: tuple[int, float] | None = None

    def line(self, text: str) -> None:
        stamped = f"{time.strftime('%H:%M:%S')} {text}"
        print(stamped, flush=True)
        with self.path.open("a") as file:
            file.write(stamped + "\n")

    def progress(self, step: int, steps: int, values: Iterable[tuple[str, float]]) -> None:
        now = time.monotonic()
        pace = (now - self.last[1]) / (step - self.last[0]) if self.last and step > self.last[0] else float("nan")
        self.last = (step, now)
        shown = " ".join(f"{name} {value:.4f}" for name, value in values)
        self.line(f"step {step}/{steps} {shown} {pace:.3f} s/step, {pace * (steps - step) / 60:.0f} min left")
