"""Time of block-sparse attention beside dense attention and its peers: `python -m benchmarks.attention`.

All contenders run on the same tensors in one run, in turn; the table gives medians. Dense is the fastest of torch's
dense kernels. The limit is 1 / density: what skipping alone can give; "of limit" is the share of it that is reached.
A peer whose result differs from ours is not timed.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnproc.kernels import BlockMask, available_backends, block_sparse_attention, choose_backend
from benchmarks import machine, timing

DENSITIES = (0.1, 0.2, 0.3, 0.5)
MASKS = ("random", "random per head", "band")
GPU_MASKS = ("random per head", "band")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Workload:
    name: str
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    block: int = 128


CPU_WORKLOADS = [Workload(f"{n} tokens", 8, n, 64, torch.float32) for n in (2048, 4096, 8192)]
CPU_WORKLOADS.append(Workload("8192 tokens, 16 bits", 8, 8192, 64, torch.bfloat16))
CPU_WORKLOADS.append(Workload("16384 tokens", 2, 16384, 128, torch.float32))
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
    dense_kernel: str
    dense_ms: float
    peers_ms: dict[str, float | None]
    ours_backend: str
    ours_ms: float
    ours_spread_ms: tuple[float, float]  # quartiles
    ours_to_dense: float
    speedup: float
    limit: float
    of_limit: float


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


def dense_calls(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable]:
    """torch's dense kernels that take these tensors."""
    if not query.is_cuda:
        return {"SDPA": lambda: scaled_dot_product_attention(query, key, value)}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    @contextmanager
    def only(backend):
        with sdpa_kernel([backend]):
            yield

    def run(backend):
        with only(backend):
            return scaled_dot_product_attention(query, key, value)

    named = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION}
    calls = {name: lambda backend=backend: run(backend) for name, backend in named.items()}
    return {name: call for name, call in calls.items() if not timing.why_not(call)}


def peer_calls(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> dict[str, Callable]:
    """Compiled FlexAttention, and on a GPU its FLASH backend, with the same mask."""
    from torch.nn.attention.flex_attention import flex_attention

    flex, compiled = mask.to_flex(), torch.compile(flex_attention, dynamic=False)
    calls = {"FlexAttention": lambda: compiled(query, key, value, block_mask=flex)}
    if query.is_cuda:
        flash = {"BACKEND": "FLASH"}
        calls["FlexAttention FLASH"] = lambda: compiled(query, key, value, block_mask=flex, kernel_options=flash)  # type: ignore[arg-type]
    return calls


def checked(name: str, call: Callable, ours: Tensor) -> str:
    """ "" if a contender gives our result, else why it is not timed."""
    found: list[Tensor] = []
    if problem := timing.why_not(lambda: found.append(call())):
        return f"{name}: {problem}"
    tolerance = TOLERANCE[ours.dtype]
    if not torch.allclose(found[0].float(), ours.float(), atol=tolerance, rtol=tolerance):
        return f"{name}: its result differs from ours"
    return ""


def measure(
    work: Workload, kind: str, density: float, repeats: int, device: str, clock: timing.Clock, with_peers: bool
) -> tuple[Row, list[str]]:
    """One row of the table, and why peers are not in it."""
    query, key, value = (
        torch.randn(1, work.heads, work.tokens, work.head_dim, dtype=work.dtype, device=device) for _ in range(3)
    )
    mask = make_mask(kind, density, work, device)
    backend = choose_backend(query, key, value, mask)[0]
    calls: dict[str, Callable] = {"ours": lambda: block_sparse_attention(query, key, value, mask)}
    ours = block_sparse_attention(query, key, value, mask)
    dense = dense_calls(query, key, value)
    peers: dict[str, Callable] = peer_calls(query, key, value, mask) if with_peers else {}
    for other in ("triton", "fa4"):
        if device == "cuda" and other != backend and available_backends()[other] is None:
            peers[other] = lambda other=other: block_sparse_attention(query, key, value, mask, backend=other)
    problems = [problem for name, call in peers.items() if (problem := checked(name, call, ours))]
    running = {name: call for name, call in peers.items() if not any(p.startswith(f"{name}:") for p in problems)}
    times = timing.in_turn({**calls, **dense, **running}, repeats, clock)
    middle = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(dense, key=lambda name: middle[name])
    quartiles = statistics.quantiles(times["ours"], n=4)
    speedup = middle[fastest] / middle["ours"]
    row = Row(
        work.name,
        work.heads,
        work.tokens,
        work.head_dim,
        str(work.dtype).removeprefix("torch."),
        work.block,
        kind,
        mask.density,
        fastest,
        middle[fastest],
        {name: middle.get(name) for name in peers},
        backend,
        middle["ours"],
        (quartiles[0], quartiles[2]),
        1 / speedup,
        speedup,
        1 / mask.density,
        speedup * mask.density,
    )
    return row, problems


HEADER = (
    "heads",
    "tokens",
    "head_dim",
    "dtype",
    "mask",
    "density",
    "dense ms",
    "peers ms",
    "ours ms",
    "ours / dense",
    "speed-up",
    "limit",
    "of limit",
)
SHOWN = ("tokens", "mask", "density", "dense ms", "peers ms", "ours ms", "speed-up", "of limit")


def cells(row: Row) -> list[str]:
    peers = ", ".join(f"{name} {'n/a' if ms is None else f'{ms:.2f}'}" for name, ms in row.peers_ms.items())
    return [
        *(str(x) for x in (row.heads, row.tokens, row.head_dim, row.dtype, row.mask)),
        f"{row.density:.3f}",
        f"{row.dense_ms:.2f} ({row.dense_kernel})",
        peers or "not run",
        f"{row.ours_ms:.2f} ({row.ours_backend})",
        f"{row.ours_to_dense:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.limit:.2f}x",
        f"{row.of_limit:.2f}",
    ]


def to_markdown(title: str, header: tuple[str, ...], lines: list[list[str]], notes: list[str]) -> str:
    table = [" | ".join(("", *header, "")).strip(), "|" + "---|" * len(header)]
    table += [" | ".join(("", *line, "")).strip() for line in lines]
    return "\n".join([f"# {title}", "", *table, "", *(f"- {note}" for note in notes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small workload, few repeats: does it run at all")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each contender (default 7)")
    parser.add_argument("--busy", action="store_true", help="CPU time of one thread, not wall time: for a busy machine")
    parser.add_argument("--no-peers", action="store_true", help="leave FlexAttention out: compiling takes a while")
    parser.add_argument("--tokens", type=int, help="only the workloads with this many tokens")
    parser.add_argument("--output", type=Path, default=machine.RESULTS, help="folder for the JSON and Markdown files")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.busy and device == "cuda":
        parser.error("--busy measures CPU time, which says nothing about a GPU")
    if options.busy:
        torch.set_num_threads(1)
    clock = timing.clock(device, options.busy)
    workloads = QUICK_WORKLOADS if options.quick else GPU_WORKLOADS if device == "cuda" else CPU_WORKLOADS
    workloads = [work for work in workloads if options.tokens in (None, work.tokens)]
    if not workloads:
        parser.error(f"--tokens {options.tokens} is not one of the workloads")
    repeats = 3 if options.quick else max(options.repeats, 3)
    kinds = GPU_MASKS if device == "cuda" else MASKS
    densities = DENSITIES[1:2] if options.quick else (*DENSITIES, 1.0)

    console, rows, reasons = Console(), [], set()
    shown = [HEADER.index(name) for name in SHOWN]
    table = Table(*SHOWN, title=f"Attention on {machine.device_name()}")
    for work in workloads:
        for kind in kinds:
            torch.compiler.reset()
            for density in densities if kind == kinds[0] else [d for d in densities if d < 1.0]:
                row, problems = measure(work, kind, density, repeats, device, clock, not options.no_peers)
                rows.append(row)
                reasons.update(problems)
                table.add_row(*(cells(row)[i] for i in shown))
                console.print("  ".join(cells(row)), style="dim")
    console.print(table)

    about = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    notes = [f"{about['device']}; {about['threads']} CPU threads; {versions}; {about['date']}"]
    notes.append("Ours is `block_sparse_attention(backend='auto')`; batch 1.")
    notes.append("CPU time of one thread, as the machine was busy." if options.busy else "Wall time.")
    notes.append(f"Medians of {repeats} interleaved calls on random tensors and masks of 128 x 128 blocks.")
    notes += [f"Not timed: {reason}" for reason in sorted(reasons)]
    result = {**about, "repeats": repeats, "notes": notes[1:], "rows": [asdict(row) for row in rows]}
    markdown = to_markdown("Attention time", HEADER, [cells(row) for row in rows], notes)
    path = machine.save("attention", result, markdown, options.output)
    console.print(f"Saved {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
