"""What each part of the kernels costs beside the plain sparse forward: `python -m benchmarks.kernels`.

One table per question, all on random tensors and the same mask: block shapes, options (partial blocks, token order,
ragged blocks, skipping), quantization with its error, the backward pass, and planning: scores, selection, lists.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from attnproc.kernels import (
    BlockMask,
    ChunkBits,
    Quantization,
    Ranges,
    block_sparse_attention,
    oracle,
    scores,
    selection,
)
from benchmarks import machine, timing
from benchmarks.attention import to_markdown

DENSITY = 0.3
BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64))
QUANTIZATIONS = (
    Quantization(group="block"),
    Quantization(),
    Quantization(pv="int8"),
    Quantization(group="block", pv="fp8"),
    Quantization(pv="fp8"),
)
HEADER = ("part", "case", "ms", "beside", "ratio", "note")


@dataclass(frozen=True)
class Workload:
    name: str
    heads: int
    grid: tuple[int, int, int]
    head_dim: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


CPU_WORKLOAD = Workload("8 x 32 x 32 latent grid", 4, (8, 32, 32), 64, torch.float32)
GPU_WORKLOAD = Workload("Wan 14B, 720p, 81 frames", 40, (21, 45, 80), 128, torch.bfloat16)
QUICK_WORKLOAD = Workload("4 x 8 x 8 latent grid", 2, (4, 8, 8), 32, torch.float32)


@dataclass
class Bench:
    """Tensors, a clock, and the rows of the table."""

    work: Workload
    device: str
    repeats: int
    clock: timing.Clock

    def __post_init__(self) -> None:
        shape = (1, self.work.heads, self.work.tokens, self.work.head_dim)
        self.query, self.key, self.value = (
            torch.randn(shape, dtype=self.work.dtype, device=self.device) for _ in range(3)
        )
        self.rows: list[dict] = []

    def blocks(self, size: tuple[int, int]) -> Tensor:
        """Random blocks of each head at the density of the benchmark, the diagonal kept."""
        rows, columns = (-(-self.work.tokens // n) for n in size)
        kept = torch.rand(1, self.work.heads, rows, columns, device=self.device) < DENSITY
        first = torch.arange(rows, device=self.device) * size[0] // size[1]
        return kept.scatter_(3, first.view(1, 1, -1, 1).expand(1, self.work.heads, -1, 1), True)

    def mask(self, size: tuple[int, int] = (128, 128)) -> BlockMask:
        return BlockMask.from_blocks(self.blocks(size), self.work.tokens, self.work.tokens, size)

    def sparse(self, mask: BlockMask, **options) -> Callable:
        return lambda: block_sparse_attention(self.query, self.key, self.value, mask, **options)

    def compare(self, part: str, base: tuple[str, Callable], cases: dict[str, tuple[Callable, str]]) -> None:
        """Rows of `cases`, each a call and a note, with the ratio of its time to that of `base`."""
        problems = {name: timing.why_not(call) for name, (call, _) in cases.items()}
        calls = {name: call for name, (call, _) in cases.items() if not problems[name]}
        times = timing.in_turn({base[0]: base[1], **calls}, self.repeats, self.clock)
        middle = {name: statistics.median(values) for name, values in times.items()}
        self.rows.append({"part": part, "case": base[0], "ms": middle[base[0]], "beside": "", "ratio": 1.0, "note": ""})
        for name, (_, note) in cases.items():
            ms = middle.get(name)
            self.rows.append(
                {
                    "part": part,
                    "case": name,
                    "ms": ms,
                    "beside": base[0],
                    "ratio": None if ms is None else ms / middle[base[0]],
                    "note": problems[name] or note,
                }
            )


def block_shapes(bench: Bench) -> None:
    masks = {size: bench.mask(size) for size in BLOCKS}
    cases = {
        f"{size[0]} x {size[1]} blocks": (bench.sparse(mask), f"density {mask.density:.3f}")
        for size, mask in masks.items()
        if size != BLOCKS[0]
    }
    bench.compare("block shape", ("128 x 128 blocks", bench.sparse(masks[BLOCKS[0]])), cases)


def options(bench: Bench) -> None:
    """The same listed blocks every time, so that a ratio above 1 is what the option itself costs."""
    size, tokens, heads, device = (128, 64), bench.work.tokens, bench.work.heads, bench.device
    blocks = bench.blocks(size)
    plain = BlockMask.from_blocks(blocks, tokens, tokens, size)
    frames, rows, columns = bench.work.grid
    place = torch.stack(
        torch.meshgrid(*(torch.arange(n, device=device) for n in (frames, rows, columns)), indexing="ij"), -1
    )
    place = place.reshape(tokens, 3).int()
    half = torch.tensor((frames, rows // 2 + 1, columns // 2 + 1), device=device, dtype=torch.int32)
    window = Ranges(place, place - half, place + half + 1)
    chunk = (torch.arange(plain.grid[1], device=device) // 4).int()
    chosen = torch.rand(1, heads, tokens, int(chunk[-1]) + 1, device=device) < 0.5
    partial = torch.rand(blocks.shape, device=device) < 0.25

    def with_rule(rule) -> BlockMask:
        kept = {"partial": blocks & partial, "rule": rule}
        return BlockMask.from_blocks(blocks & ~partial, tokens, tokens, size, **kept)

    offsets = torch.arange(0, plain.grid[1] + 1, device=device, dtype=torch.int32) * size[1]
    ragged = BlockMask.from_blocks(blocks, tokens, tokens, size, key_offsets=offsets.clamp(max=tokens))
    order = torch.stack([torch.randperm(tokens, device=device) for _ in range(heads)]).int()
    bias = torch.rand(1, heads, plain.grid[1], device=device)
    bench.compare(
        "option",
        ("plain 128 x 64", bench.sparse(plain)),
        {
            "a quarter partial, window": (bench.sparse(with_rule(window)), "ranges on (t, h, w)"),
            "a quarter partial, chunk bits": (bench.sparse(with_rule(ChunkBits.from_selection(chosen, chunk))), ""),
            "ragged blocks": (bench.sparse(ragged), "every tile masked"),
            "token order per head": (bench.sparse(plain, token_order=order), "random order: the worst for memory"),
            "token order by copying": (lambda: by_copying(bench, plain, order), "q, k, v and out permuted"),
            "key bias": (bench.sparse(plain, key_bias=bias), ""),
            "scores 20 times as large": (bench.sparse(plain, scale=20 * bench.work.head_dim**-0.5), "a sharp softmax"),
            "skip threshold 8": (bench.sparse(plain, skip_threshold=8.0), skipped_note(bench, plain, 8.0)),
        },
    )


def by_copying(bench: Bench, mask: BlockMask, order: Tensor) -> Tensor:
    """What the kernel's token order replaces."""
    moved = [oracle.take(tensor, order) for tensor in (bench.query, bench.key, bench.value)]
    return oracle.put_back(block_sparse_attention(*moved, mask), order)


def skipped_note(bench: Bench, mask: BlockMask, threshold: float) -> str:
    _, skipped = block_sparse_attention(
        bench.query, bench.key, bench.value, mask, skip_threshold=threshold, return_skipped=True
    )
    return f"{int(skipped.sum()) / max(int(mask.counts.sum()), 1):.3f} of the blocks skipped"


def quantization(bench: Bench) -> None:
    """Time beside the 16- or 32-bit kernel, error beside float64 on a piece small enough for it."""
    mask = bench.mask()
    few = min(bench.work.tokens, 2048)
    query, key, value = (x[:, :1, :few].contiguous() for x in (bench.query, bench.key, bench.value))
    small = BlockMask.full(few, few, (128, 128), device=bench.device)
    exact = oracle.attention(query, key, value, small)[0]

    def error(**options) -> str:
        try:
            out = block_sparse_attention(query, key, value, small, **options).double()
        except ValueError as problem:
            return str(problem)
        return f"relative L1 error {float((out - exact).abs().sum() / exact.abs().sum()):.5f}"

    cases = {
        f"{mode.name}, one scale per {mode.group}": (bench.sparse(mask, quantization=mode), error(quantization=mode))
        for mode in QUANTIZATIONS
    }
    name = str(bench.work.dtype).removeprefix("torch.")
    bench.compare("quantization", (name, bench.sparse(mask)), cases)
    bench.rows[-len(cases) - 1]["note"] = error()


def backward(bench: Bench) -> None:
    mask = bench.mask()
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (bench.query, bench.key, bench.value)]
    out = block_sparse_attention(*tensors, mask)
    gradient = torch.randn_like(out)

    def run() -> None:
        torch.autograd.grad(out, tensors, gradient, retain_graph=True)

    bench.compare("backward", ("forward", bench.sparse(mask)), {"backward": (run, "target 2.6 x forward")})


def planning(bench: Bench) -> None:
    """Pooled scores, choice of the heaviest blocks and their lists, beside the attention they are for."""
    mask, size = bench.mask(), 128

    def plan() -> BlockMask:
        query = scores.pool_blocks(bench.query, size).mean
        key = scores.pool_blocks(bench.key, size).mean
        pooled = query @ key.transpose(-1, -2)
        kept = selection.largest(pooled, count=max(int(DENSITY * pooled.shape[-1]), 1))
        return BlockMask.from_blocks(kept, *mask_lengths(bench), (size, size))

    log_sum = oracle_free_lse(bench)
    cases: dict[str, tuple[Callable, str]] = {
        "pool, choose, list": (plan, peak_note(bench, plan)),
        "block mass with known log-sum-exp": (
            lambda: scores.block_mass(bench.query, bench.key, log_sum, (size, size)),
            "one pass over q and k (AdaSpa)",
        ),
        "recall of the mask": (lambda: scores.recall(bench.query, bench.key, mask), ""),
    }
    bench.compare("planning", (f"sparse attention at {DENSITY}", bench.sparse(mask)), cases)


def mask_lengths(bench: Bench) -> tuple[int, int]:
    return bench.work.tokens, bench.work.tokens


def oracle_free_lse(bench: Bench) -> Tensor:
    full = BlockMask.full(*mask_lengths(bench), (128, 128), device=bench.device)
    return block_sparse_attention(bench.query, bench.key, bench.value, full, return_lse=True)[1]


def peak_note(bench: Bench, call: Callable) -> str:
    """Extra memory at the peak, as a share of q, k and v; known on a GPU."""
    if bench.device != "cuda":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    extra = torch.cuda.max_memory_allocated() - before
    inputs = sum(tensor.nbytes for tensor in (bench.query, bench.key, bench.value))
    return f"peak extra memory {100 * extra / inputs:.2f} % of q, k and v, lists included"


PARTS = (block_shapes, options, quantization, backward, planning)


def cells(row: dict) -> list[str]:
    ms, ratio = row["ms"], row["ratio"]
    return [
        row["part"],
        row["case"],
        "n/a" if ms is None else f"{ms:.2f}",
        row["beside"],
        "n/a" if ratio is None else f"{ratio:.3f}",
        row["note"].replace("|", "/"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny workload, few repeats: does it run at all")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each contender (default 5)")
    parser.add_argument("--busy", action="store_true", help="CPU time of one thread, not wall time: for a busy machine")
    parser.add_argument("--output", type=Path, default=machine.RESULTS, help="folder for the JSON and Markdown files")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.busy and device == "cuda":
        parser.error("--busy measures CPU time, which says nothing about a GPU")
    if options.busy:
        torch.set_num_threads(1)
    work = QUICK_WORKLOAD if options.quick else GPU_WORKLOAD if device == "cuda" else CPU_WORKLOAD
    bench = Bench(work, device, 3 if options.quick else max(options.repeats, 3), timing.clock(device, options.busy))
    console = Console()
    for part in PARTS:
        done = len(bench.rows)
        part(bench)
        for row in bench.rows[done:]:
            console.print("  ".join(cells(row)))
    about = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    dtype = str(work.dtype).removeprefix("torch.")
    notes = [
        f"{about['device']}; {about['threads']} CPU threads; {versions}; {about['date']}",
        f"{work.name}: {work.heads} heads, {work.tokens} tokens, head_dim {work.head_dim}, {dtype}; "
        f"masks of density {DENSITY}.",
        "CPU time of one thread, as the machine was busy." if options.busy else "Wall time.",
        f"Medians of {bench.repeats} interleaved calls on random tensors.",
    ]
    if device == "cpu":
        notes.append("On a CPU quantization is simulated, for its error alone.")
    markdown = to_markdown("Parts of the kernels", HEADER, [cells(row) for row in bench.rows], notes)
    path = machine.save(
        "kernels", {**about, "repeats": bench.repeats, "notes": notes[1:], "rows": bench.rows}, markdown, options.output
    )
    console.print(f"Saved {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
