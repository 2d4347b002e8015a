"""Finds the fastest launch shape of each common workload on this GPU: `python -m benchmarks.tune`.

Writes kernels/block_sparse/launch_shapes.json, which the kernels read in place of their built-in choice; entries for
other GPU classes stay as they are. Every shape is checked against the built-in one's result before it counts.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console

from attnproc.files import write_text
from attnproc.kernels import BlockMask, Quantization
from attnproc.kernels.attention import make_request
from attnproc.kernels.request import Request
from benchmarks import attention, timing

HEAD_DIMS = (128, 64)
BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64))
QUANTIZATIONS = (None, Quantization(), Quantization(pv="int8"), Quantization(pv="fp8"))
HEADS, TOKENS, DENSITY = 24, 32768, 0.3


def requests(device: str) -> list[Request]:
    """One request for each workload that is tuned."""
    found = []
    for head_dim in HEAD_DIMS:
        tensors = [torch.randn(1, HEADS, TOKENS, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)]
        for blocks in BLOCKS:
            kept = torch.rand(1, HEADS, TOKENS // blocks[0], TOKENS // blocks[1], device=device) < DENSITY
            mask = BlockMask.from_blocks(kept, TOKENS, TOKENS, blocks)
            found += [make_request(*tensors, mask, quantization=quantization) for quantization in QUANTIZATIONS]
    return found


def tune(request: Request, repeats: int, console: Console) -> tuple[str, str, list[int] | None]:
    """GPU class and name of a workload, and its fastest launch shape; None if nothing beats the built-in one."""
    from attnproc.kernels import launch, triton_forward

    work = launch.workload(request)
    built_in = launch.launch_shape(work)
    expected, _, _ = triton_forward.forward(request, built_in)
    calls = {built_in: lambda: triton_forward.forward(request, built_in)}
    for shape in launch.candidates(work):
        if shape == built_in:
            continue

        def call(shape=shape):
            return triton_forward.forward(request, shape)

        # Where the compiler or the GPU refuses a shape, it takes too many registers or too much shared memory.
        if not attention.checked(str(tuple(shape)), lambda call=call: call()[0], expected):
            calls[shape] = call
    middle = timing.medians({str(tuple(shape)): call for shape, call in calls.items()}, repeats, timing.clock("cuda"))
    best = min(calls, key=lambda shape: middle[str(tuple(shape))])
    console.print(
        f"{work.gpu}  {work.name}: {tuple(built_in)} {middle[str(tuple(built_in))]:.3f} ms -> "
        f"{tuple(best)} {middle[str(tuple(best))]:.3f} ms, of {len(calls)}"
    )
    gained = middle[str(tuple(best))] < 0.98 * middle[str(tuple(built_in))]
    return work.gpu, work.name, list(best) if gained else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="calls of each shape (default 5)")
    parser.add_argument("--seconds", type=float, default=420, help="stop after this time and keep what was found")
    parser.add_argument("--output", type=Path, help="file to write instead of the kernels' own")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and launch shapes are for GPUs")
    from attnproc.kernels import launch

    path = options.output or launch.TABLE
    table: dict[str, dict[str, list[int]]] = json.loads(path.read_text()) if path.exists() else {}
    console, started = Console(), time.perf_counter()
    for request in requests("cuda"):
        if time.perf_counter() - started > options.seconds:
            console.print("out of time; the rest keeps its shape")
            break
        gpu, name, shape = tune(request, options.repeats, console)
        if shape is not None:
            table.setdefault(gpu, {})[name] = shape
            write_text(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
    console.print(f"Saved {path}" if path.exists() else "Nothing beat the built-in choice; no file was written")


if __name__ == "__main__":
    main()
