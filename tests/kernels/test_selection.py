"""The largest of each row, by number and by share, against the definition in float64 and worked examples."""

import math
import os
import subprocess
import sys

import pytest
import torch

from attnproc.kernels import selection

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["cpu", "triton"])
NAN, INF = math.nan, math.inf


def choose(backend: str, scores: torch.Tensor, **amount) -> torch.Tensor:
    """On the device of the backend; what it does not write comes out wrong."""
    device = DEVICE if backend == "triton" else "cpu"
    amount = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in amount.items()}
    return selection.largest(scores.to(device), backend=backend, **amount).cpu()


def ranking(row: list[float]) -> list[int]:
    """Places in falling order: NaN first, of equal ones the first."""
    return sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))


def shares(row: list[float]) -> list[float]:
    peak = max(row)
    weights = [math.exp(x - peak) for x in row]
    return [x / sum(weights) for x in weights]


@backends
@pytest.mark.parametrize("columns", [1, 7, 64, 130, 1182])
@pytest.mark.parametrize("kind", ["any", "few values", "not finite"])
def test_the_number_asked_for(backend, columns, kind, seed, poisoned_memory):
    scores = torch.randn(2, 3, 5, columns) * 10
    if kind != "any":
        scores = scores.clamp(-3, 3).round()
    if kind == "not finite":
        for value in (NAN, INF, -INF, -0.0):
            scores.masked_fill_(torch.rand_like(scores) < 0.1, value)
    count = torch.randint(0, columns + 3, (2, 1, 5))
    kept = choose(backend, scores, count=count)
    assert kept.shape == scores.shape and kept.dtype == torch.bool
    for row, number, found in zip(
        scores.flatten(0, 2), count.expand(2, 3, 5).flatten(), kept.flatten(0, 2), strict=True
    ):
        assert set(found.nonzero().flatten().tolist()) == set(ranking(row.tolist())[: int(number)])


@backends
@pytest.mark.parametrize("columns", [1, 7, 64, 130, 1182])
@pytest.mark.parametrize("kind", ["any", "few values"])
def test_the_share_asked_for(backend, columns, kind, seed, poisoned_memory):
    """As many as the share allows, where rounding does not decide; always the first of the ranking."""
    scores = torch.randn(2, 3, 5, columns) * 3
    if kind == "few values":
        scores = scores.round()
    share = torch.rand(3, 1)
    kept = choose(backend, scores, share=share)
    limits = share.expand(2, 3, 5).flatten().tolist()
    for row, limit, found in zip(scores.flatten(0, 2).tolist(), limits, kept.flatten(0, 2), strict=True):
        order, weights, number = ranking(row), shares(row), int(found.sum())
        assert set(found.nonzero().flatten().tolist()) == set(order[:number]) and number > 0
        assert number == 1 or sum(weights[i] for i in order[:number]) <= limit + 1e-5
        assert number == columns or sum(weights[i] for i in order[: number + 1]) > limit - 1e-5


@backends
@pytest.mark.parametrize(
    ("row", "share", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0.5, [1, 1, 0, 0]),  # equal shares of a quarter: the first two
        ([0.0, math.log(2.0), 0.0], 0.55, [0, 1, 0]),  # shares 1/4, 1/2, 1/4
        ([0.0, math.log(2.0), 0.0], 0.80, [1, 1, 0]),
        ([1.0, 2.0, 3.0], 1.0, [1, 1, 1]),
        ([1.0, 2.0, 3.0], 0.0, [0, 0, 1]),  # at least one
        ([-INF, 2.0, -INF], 0.99, [0, 1, 0]),
        ([-INF, -INF], 0.7, [1, 0]),  # no softmax
        ([0.0, NAN, INF], 0.9, [0, 1, 0]),
        ([0.0, INF, INF], 0.9, [0, 1, 0]),
        ([0.0, -200.0, -201.0], 0.5, [1, 0, 0]),  # shares that underflow do not tie
    ],
)
def test_worked_examples_of_shares(backend, row, share, expected):
    assert choose(backend, torch.tensor([row]), share=share)[0].int().tolist() == expected


@backends
def test_one_number_serves_all_rows(backend, seed):
    scores = torch.randn(3, 20).T  # any strides
    assert choose(backend, scores, count=2).sum(-1).tolist() == [2] * 20
    assert not choose(backend, scores, count=0).any()
    assert choose(backend, scores, count=5).all() and choose(backend, scores, share=1.0).all()
    assert choose(backend, scores, count=2**70).all() and not choose(backend, scores, count=-(2**70)).any()
    assert choose(backend, torch.zeros(0, 4), count=1).shape == (0, 4)


@backends
@pytest.mark.parametrize("share", [-0.5, -INF, NAN])
def test_no_share_at_all_still_keeps_one(backend, share):
    assert choose(backend, torch.tensor([[3.0, 1.0, 2.0]]), share=share).tolist() == [[True, False, False]]


@backends
def test_shares_are_float32_whatever_is_usual(backend, seed):
    scores = torch.arange(100.0)[None] * 0.1
    expected = choose(backend, scores, share=0.999)
    assert torch.equal(choose(backend, scores, share=torch.tensor(0.999).double()), expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(choose(backend, scores, share=0.999), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_too_long_for_one_program_are_sorted(seed):
    scores = torch.randn(2, selection.ROW_LIMIT + 3)
    for amount in ({"count": 4000}, {"share": 0.4}):
        assert torch.equal(choose("triton", scores, **amount), choose("cpu", scores, **amount))


@pytest.mark.parametrize(
    ("scores", "amount", "name"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), {"count": 1}, "scores"),
        (torch.zeros(2, 0), {"count": 1}, "scores"),
        (torch.zeros(2, 3), {}, "count"),
        (torch.zeros(2, 3), {"count": 1, "share": 0.5}, "count"),
        (torch.zeros(2, 3), {"count": 0.5}, "count"),
        (torch.zeros(2, 3), {"share": True}, "share"),
        (torch.zeros(2, 3), {"share": torch.ones(2, dtype=torch.int32)}, "share"),
        (torch.zeros(2, 3), {"count": True}, "count"),
        (torch.zeros(2, 3), {"count": torch.ones(2, dtype=torch.bool)}, "count"),
        ([[0.0]], {"count": 1}, "scores"),
        (torch.zeros(2, 3), {"count": torch.ones(3, dtype=torch.int32)}, "count"),
        (torch.zeros(2, 3), {"count": 1, "backend": "gpu"}, "backend"),
    ],
)
def test_bad_arguments_are_named(scores, amount, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        selection.largest(scores, **amount)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnproc.kernels.triton_selection import largest_kernel as kernel

pointers = {"scores": "*fp32", "limits": "*fp32", "kept": "*u8", "columns": "i32"}
for capability in (80, 90, 100):
    for by_share in (False, True):
        constants = {"COLUMNS": 2048, "BY_SHARE": by_share}
        signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
        constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]
        assert ".local" not in ptx  # a row of the longest videos stays in registers
print("compiled")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile it for the GPU here")
def test_compiles_for_gpus_that_are_not_here():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
