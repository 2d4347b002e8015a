"""How far quantized attention is from exact attention on random data: `python -m benchmarks.quantization_errors`.

The data imitate what diffusion transformers do to quantization: keys and queries with an offset per channel, single
tokens far larger than the rest, flat or peaked weights, values with large or shifted channels.
"""

from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from torch import Tensor

from attnproc.kernels import BlockMask, Quantization, oracle
from attnproc.kernels.quantize_oracle import simulate
from benchmarks import machine
from benchmarks.attention import to_markdown

RECIPES = ("gauss", "kbias", "qkbias", "tokout", "diffuse", "voutlier", "vmean")
TOKENS, HEAD_DIM = 1024, 128
BLOCK_SIZE = (128, 64)
QUANTIZATIONS = (
    Quantization(),
    Quantization(pv="fp8"),
    Quantization(pv="int8"),
    Quantization(group="block"),
    Quantization(group="block", smooth_key=False),
)


@dataclass(frozen=True)
class OutputError:
    """One line of the table: an output against float64 attention on the same inputs, over all its elements."""

    recipe: str
    quantization: str
    group: str
    smooth_key: bool
    relative_l1: float  # sum |x - y| / sum |y|
    cosine: float
    rmse: float
    lse: float  # largest error of the log-sum-exp


def report_errors(recipes: tuple[str, ...] = RECIPES, seed: int = 0) -> list[OutputError]:
    """The errors of every quantization in `QUANTIZATIONS` on every recipe; takes seconds."""
    mask = BlockMask.full(TOKENS, TOKENS, BLOCK_SIZE)
    lines = []
    for recipe in recipes:
        query, key, value = make_inputs(recipe, seed)
        exact, exact_lse = oracle.attention(query, key, value, mask)
        for quantization in QUANTIZATIONS:
            out, lse = simulate(query, key, value, mask, HEAD_DIM**-0.5, quantization)
            numbers = *output_errors(out, exact), float((lse - exact_lse).abs().max())
            lines.append(OutputError(recipe, quantization.name, quantization.group, quantization.smooth_key, *numbers))
    return lines


def output_errors(out: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """(relative L1, cosine, root mean square error) of an output, computed in float64."""
    out, exact = out.double(), exact.double()
    difference = out - exact
    cosine = (out * exact).sum() / (out.norm() * exact.norm())
    return float(difference.abs().sum() / exact.abs().sum()), float(cosine), float(difference.square().mean().sqrt())


def make_inputs(recipe: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a recipe, each float32 (1, 2, 1024, 128)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> Tensor:
        return torch.randn(1, 2, tokens, HEAD_DIM, generator=generator)

    query, key, value = draw(TOKENS), draw(TOKENS), draw(TOKENS)
    if recipe in ("kbias", "qkbias"):
        key += 8 * draw(1)
    if recipe == "qkbias":
        query += 4 * draw(1)
    if recipe == "tokout":
        query[:, :, ::97] *= 12
        key[:, :, ::89] *= 6
    if recipe == "diffuse":
        query *= 0.2
    if recipe == "voutlier":
        value *= (1.5 * draw(1)).exp()
    if recipe == "vmean":
        value += 4 * draw(1)
    return query, key, value


def cells(line: OutputError) -> list[str]:
    smooth = "yes" if line.smooth_key else "no"
    numbers = (f"{line.relative_l1:.4f}", f"{line.cosine:.6f}", f"{line.rmse:.5f}", f"{line.lse:.4f}")
    return [line.recipe, line.quantization, line.group, smooth, *numbers]


def main() -> None:
    header = (
        "data",
        "quantization",
        "one scale per",
        "key smoothed",
        "relative L1",
        "cosine",
        "RMSE",
        "largest LSE error",
    )
    lines = report_errors()
    about = machine.describe()
    notes = [
        f"{about['device']}; torch {about['versions']['torch']}; {about['date']}.",
        "The float64 definition of the rounding, so the numbers are those of every device.",
        f"1 sample, 2 heads, {TOKENS} tokens, head_dim {HEAD_DIM}, blocks of {BLOCK_SIZE}, full mask.",
    ]
    markdown = to_markdown("Errors of quantized attention", header, [cells(line) for line in lines], notes)
    path = machine.save("quantization-errors", {**about, "rows": [asdict(line) for line in lines]}, markdown)
    Console().print(markdown, f"Saved {path}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
