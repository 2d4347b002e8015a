"""Time of block-sparse attention beside dense attention and FlexAttention: `python -m benchmarks.attention`.

All contenders run on the same tensors in one run, in turn, so that whatever else the machine does hits each alike;
the table gives medians. The limit is 1 / density: what skipping alone can give.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnproc.kernels import BlockMask, block_sparse_attention, choose_backend
from benchmarks import machine

DENSITIES = (0.1, 0.2, 0.3, 0.5)
MASKS = ("random", "random per head", "band")


@dataclass(frozen=True)
class Workload:
    name: str
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    block: int = 128


CPU_WORKLOADS = [Workload(f"{n} tokens", 8, n, 64, torch.float32) for n in (2048, 4096, 8192)]
GPU_WORKLOADS = [
    Workload("Wan 1.3B, 480p, 81 frames", 12, 32760, 128, torch.bfloat16),
    Workload("Wan 14B, 720p, 81 frames", 40, 75600, 128, torch.bfloat16),
    Workload("HunyuanVideo, 720p, 129 frames", 24, 118800, 128, torch.bfloat16),
]
QUICK_WORKLOADS = [Workload("1024 tokens", 2, 1024, 64, torch.float32)]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, None where a contender did not run."""

    workload: str
    heads: int
    tokens: int
    head_dim: int
    dtype: str
    block: int
    mask: str
    density: float
    dense_ms: float
    flex_ms: float | None
    ours_ms: float
    ours_spread_ms: tuple[float, float]  # quartiles
    ours_to_dense: float
    speedup: float
    limit: float


def make_mask(kind: str, density: float, work: Workload, device: str) -> BlockMask:
    """A mask of about `density`; "band" keeps the nearest key blocks, the diagonal is always kept."""
    blocks = -(-work.tokens // work.block)
    if kind == "band":
        width = max(round(density * blocks), 1)
        first = (torch.arange(blocks) - width // 2).clamp(0, blocks - width)[:, None]
        kept = (torch.arange(blocks) >= first) & (torch.arange(blocks) < first + width)
    else:
        heads = work.heads if kind == "random per head" else 1
        kept = (torch.rand(1, heads, blocks, blocks) < density) | torch.eye(blocks, dtype=torch.bool)
    return BlockMask.from_blocks(kept, work.tokens, work.tokens, (work.block, work.block)).to(device)


def compiled_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> tuple[Callable | None, str]:
    """A call of compiled FlexAttention with the same mask, checked once against ours; or None and why not."""
    try:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        flex, compiled = mask.to_flex(), torch.compile(flex_attention, dynamic=False)
        out = compiled(query, key, value, block_mask=flex)
        ours = block_sparse_attention(query, key, value, mask)
        if not torch.allclose(out.float(), ours.float(), atol=2e-2, rtol=2e-2):
            return None, "its result differs from ours"
        return lambda: compiled(query, key, value, block_mask=flex), ""
    except Exception as error:  # whatever the compiler says, the table goes on without it
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"


def seconds(call: Callable, clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started


def gpu_clock() -> float:
    """Wall time once the GPU has done all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(calls: dict[str, Callable], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, interleaved, after one warm-up call of each."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call, clock))
    return times


def measure(
    work: Workload, kind: str, density: float, repeats: int, device: str, clock: Callable[[], float], with_flex: bool
) -> tuple[Row, str]:
    """One row of the table, and why FlexAttention is not in it ("" if it is)."""
    query, key, value = (
        torch.randn(1, work.heads, work.tokens, work.head_dim, dtype=work.dtype, device=device) for _ in range(3)
    )
    mask = make_mask(kind, density, work, device)
    flex, why_not = compiled_flex(query, key, value, mask) if with_flex else (None, "not asked for")
    calls: dict[str, Callable] = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
        "ours": lambda: block_sparse_attention(query, key, value, mask),
    }
    if flex is not None:
        calls["flex"] = flex
    times = in_turn(calls, repeats, clock)
    middle = {name: 1000 * statistics.median(values) for name, values in times.items()}
    quartiles = statistics.quantiles([1000 * t for t in times["ours"]], n=4)
    row = Row(
        work.name,
        work.heads,
        work.tokens,
        work.head_dim,
        str(work.dtype).removeprefix("torch."),
        work.block,
        kind,
        mask.density,
        middle["dense"],
        middle.get("flex"),
        middle["ours"],
        (quartiles[0], quartiles[2]),
        middle["ours"] / middle["dense"],
        middle["dense"] / middle["ours"],
        1 / mask.density,
    )
    return row, why_not


HEADER = (
    "heads",
    "tokens",
    "head_dim",
    "dtype",
    "mask",
    "density",
    "dense ms",
    "FlexAttention ms",
    "ours ms",
    "ours / dense",
    "speed-up",
    "limit",
)


def cells(row: Row) -> list[str]:
    flex = "n/a" if row.flex_ms is None else f"{row.flex_ms:.2f}"
    return [
        *(str(x) for x in (row.heads, row.tokens, row.head_dim, row.dtype, row.mask)),
        f"{row.density:.3f}",
        f"{row.dense_ms:.2f}",
        flex,
        f"{row.ours_ms:.2f}",
        f"{row.ours_to_dense:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.limit:.2f}x",
    ]


def to_markdown(title: str, rows: list[Row], notes: list[str]) -> str:
    lines = [f"# {title}", "", " | ".join(("", *HEADER, "")).strip(), "|" + "---|" * len(HEADER)]
    lines += [" | ".join(("", *cells(row), "")).strip() for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small workload, few repeats: does it run at all")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each contender (default 7)")
    parser.add_argument("--busy", action="store_true", help="CPU time of one thread, not wall time: for a busy machine")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out: compiling takes a while")
    parser.add_argument("--output", type=Path, default=machine.RESULTS, help="folder for the JSON and Markdown files")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.busy and device == "cuda":
        parser.error("--busy measures CPU time, which says nothing about a GPU")
    clock = gpu_clock if device == "cuda" else time.perf_counter
    if options.busy:
        torch.set_num_threads(1)
        clock = time.process_time
    workloads = QUICK_WORKLOADS if options.quick else GPU_WORKLOADS if device == "cuda" else CPU_WORKLOADS
    repeats = 3 if options.quick else max(options.repeats, 3)

    console, rows, reasons = Console(), [], set()
    table = Table(*HEADER, title=f"Attention on {machine.device_name()}")
    for work in workloads:
        for kind in MASKS:
            for density in DENSITIES[1:2] if options.quick else DENSITIES:
                row, why_not = measure(work, kind, density, repeats, device, clock, not options.no_flex)
                rows.append(row)
                reasons.add(why_not)
                table.add_row(*cells(row))
                console.print("  ".join(cells(row)), style="dim")
    console.print(table)

    about = machine.describe()
    example = torch.empty(1, 1, 128, 16, device=device)
    backend = choose_backend(example, example, example, BlockMask.full(128, 128, (128, 128), device=device))[0]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    notes = [f"{about['device']}; {about['threads']} CPU threads; {versions}; {about['date']}"]
    notes.append(f"Ours is the backend {backend!r}; dense is torch's scaled_dot_product_attention; batch 1.")
    notes.append("CPU time of one thread, as the machine was busy." if options.busy else "Wall time.")
    notes.append(f"Medians of {repeats} interleaved calls on random tensors and masks of 128 x 128 blocks.")
    notes += [f"FlexAttention n/a: {reason}" for reason in sorted(reasons - {""})]
    result = {
        **about,
        "backend": backend,
        "repeats": repeats,
        "notes": notes[1:],
        "rows": [asdict(row) for row in rows],
    }
    path = machine.save("attention", result, to_markdown("Attention time", rows, notes), options.output)
    console.print(f"Saved {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
