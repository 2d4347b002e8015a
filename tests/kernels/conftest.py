"""Shared by the kernel tests: Triton's interpreter if there is no GPU, fresh seeds, random cases, NaN-filled memory."""

import os
import sys
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Triton reads it when it is imported. Where something imported it before us, the next import must start afresh.
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]

from attnproc.kernels import BlockMask


@dataclass(frozen=True)
class Shape:
    """A row of the table of cases. `mask_batch` and `mask_heads` say whether the mask has its own lists for each."""

    batch: int = 1
    heads: int = 2
    queries: int = 64
    keys: int = 64
    head_dim: int = 16
    block_size: tuple[int, int] = (16, 16)
    density: float = 0.4
    mask_batch: bool = False
    mask_heads: bool = False
    key_valid: tuple[int, ...] | None = None
    layout: str = "heads first"  # or "tokens first" (diffusers' own order) or "strided"


SHAPES = {
    "one block": Shape(heads=1, queries=16, keys=16, density=1.0),
    "all on": Shape(queries=96, keys=96, density=1.0, block_size=(32, 32)),
    "odd lengths": Shape(queries=101, keys=77, head_dim=40, block_size=(32, 16)),
    "shorter than a block": Shape(queries=5, keys=9, density=1.0, block_size=(64, 32)),
    "tail of one token": Shape(heads=1, queries=65, keys=129, head_dim=64, block_size=(64, 64), density=0.6),
    "128 x 64 blocks": Shape(heads=1, queries=200, keys=136, head_dim=80, block_size=(128, 64), density=0.7),
    "64 x 128 blocks": Shape(heads=1, queries=130, keys=260, head_dim=96, block_size=(64, 128), density=0.6),
    "head_dim 128": Shape(queries=150, keys=150, head_dim=128, block_size=(64, 64), density=0.5),
    "head_dim 256": Shape(heads=1, queries=70, keys=90, head_dim=256, block_size=(32, 32), density=0.5),
    "head_dim 1": Shape(heads=1, queries=40, keys=40, head_dim=1),
    "empty rows": Shape(queries=160, keys=64, density=0.12, mask_heads=True),
    "mask per head": Shape(batch=2, heads=3, queries=80, keys=90, head_dim=24, mask_heads=True),
    "mask per sample": Shape(batch=2, queries=80, keys=90, mask_batch=True),
    "mask per sample and head": Shape(batch=2, heads=3, queries=70, keys=50, mask_batch=True, mask_heads=True),
    "ragged keys": Shape(batch=4, queries=40, keys=70, key_valid=(70, 33, 1, 0), density=0.6, mask_heads=True),
    "ragged keys, mask per sample": Shape(batch=2, queries=50, keys=64, key_valid=(48, 17), mask_batch=True),
    "same padding for all": Shape(batch=2, queries=50, keys=64, key_valid=(40,)),
    "tokens first": Shape(batch=2, heads=3, queries=75, keys=85, head_dim=32, layout="tokens first"),
    "strided": Shape(heads=2, queries=50, keys=60, head_dim=20, layout="strided"),
}


P1_ROWS = """
###########.###.##.. ###################. ################.### ########.###.###..##
###############.###. #################### #################### ############.###.###
###################. #################### #################### ################.###
#######.############ #################### #################### ####.###############
#######.###.######## #################### #################### ####.###.###########
"""


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: BlockMask
    blocks: torch.Tensor


def random_blocks(shape: Shape) -> torch.Tensor:
    rows, columns = (-(-n // b) for n, b in zip((shape.queries, shape.keys), shape.block_size, strict=True))
    lists = (shape.batch if shape.mask_batch else 1, shape.heads if shape.mask_heads else 1)
    return torch.rand(*lists, rows, columns) < shape.density


def random_tensor(shape: Shape, tokens: int) -> torch.Tensor:
    if shape.layout == "tokens first":
        return torch.randn(shape.batch, tokens, shape.heads, shape.head_dim).transpose(1, 2)
    if shape.layout == "strided":
        return torch.randn(shape.batch, shape.heads, tokens, 3 * shape.head_dim)[..., ::3]
    return torch.randn(shape.batch, shape.heads, tokens, shape.head_dim)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request) -> Shape:
    return request.param


@pytest.fixture
def make_case(seed):
    """make_case(shape, dtype, device): random tensors and a random mask of that shape."""

    def make(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
        tensors = [random_tensor(shape, n).to(dtype).to(device) for n in (shape.queries, shape.keys, shape.keys)]
        blocks = random_blocks(shape).to(device)
        valid = None if shape.key_valid is None else torch.tensor(shape.key_valid)
        mask = BlockMask.from_blocks(blocks, shape.queries, shape.keys, shape.block_size, valid)
        return Case(*tensors, mask, blocks)

    return make


@pytest.fixture
def new_shape():
    return Shape


@pytest.fixture
def seed() -> int:
    """A fresh seed for every test, set and printed (pytest shows it when the test fails)."""
    value = int.from_bytes(os.urandom(4), "little")
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def poisoned_memory():
    """Fills memory that torch hands out uninitialised with NaN, so that an element never written fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def close():
    """close(out, lse, expected, expected_lse): equal within what the dtype of `out` allows, infinities included."""
    allowed = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

    def compare(out, lse, expected, expected_lse):
        assert out.shape == expected.shape and lse.shape == expected_lse.shape and lse.dtype == torch.float32
        tolerance = allowed[out.dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)

    return compare


@pytest.fixture
def p1_blocks() -> torch.Tensor:
    """A published block mask of Radial Attention: 5 frames of 512 tokens, blocks of 128, 378 of 400 kept."""
    rows = P1_ROWS.split()
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


@pytest.fixture
def p1_answer():
    """Inputs (float64, one head, head_dim 16) and what sparse attention under `p1_blocks` gives at four rows."""
    n, c = torch.arange(2560, dtype=torch.float64)[:, None], torch.arange(16, dtype=torch.float64)
    tensors = (
        torch.sin(0.01 * (n + 1) + 0.7 * c),
        torch.cos(0.013 * (n + 2) - 0.5 * c),
        torch.sin(0.02 * n + 0.3 * c),
    )
    rows = {  # row: first three channels, log-sum-exp
        0: (0.11859712, 0.14300282, 0.1546345, 7.80681176),
        700: (0.03670668, 0.02834847, 0.01745798, 8.21138026),
        1500: (0.04665093, 0.05830107, 0.06474336, 8.10152164),
        2559: (0.04671721, 0.04232727, 0.03415636, 8.15354424),
    }
    return [x[None, None] for x in tensors], rows, -16.42403920549384


def check_p1(out, lse, rows, total, tolerance):
    for row, (*channels, log_sum) in rows.items():
        torch.testing.assert_close(
            out[0, 0, row, :3].double().cpu(), torch.tensor(channels).double(), rtol=0, atol=tolerance
        )
        assert abs(float(lse[0, 0, row]) - log_sum) < 1e-5
    assert abs(float(out.double().sum()) - total) < tolerance * 1000


@pytest.fixture
def check_p1_answer():
    return check_p1
