"""What this machine can run, why not the rest, and whether what runs is right."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from attnproc.kernels import BlockMask, available_backends, block_sparse_attention, oracle
from attnproc.pipelines.generate import device_name, versions

# (batch, heads, queries, keys, head_dim, (query block, key block), kept share, whether samples are padded)
CASES = [
    (1, 2, 257, 257, 64, (64, 64), 0.4, False),
    (2, 3, 131, 199, 40, (16, 32), 0.5, True),
    (1, 1, 77, 300, 128, (128, 64), 0.3, False),
    (2, 2, 320, 320, 32, (16, 16), 0.2, True),
]
# Largest error of an output of size about 1, from the precision of the dtype and of the accumulation.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Check:
    """The largest error of one backend and dtype over all cases, or why it failed."""

    backend: str
    dtype: torch.dtype
    error: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= TOLERANCES[self.dtype]


def version_table() -> Table:
    """Versions of what results depend on."""
    table = Table(title="versions", show_header=False)
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    return table


def device_table() -> Table:
    """Devices that torch can use."""
    table = Table(title="devices", show_header=False)
    table.add_row("cpu", device_name(torch.device("cpu")))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        table.add_row(f"cuda:{index}", f"{properties.name}, {memory}")
    if torch.cuda.device_count() == 0:
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        table.add_row("cuda", f"none: {built}")
    return table


def backend_table() -> Table:
    """Attention backends, and why one cannot be used."""
    table = Table(title="attention backends", show_header=False)
    for name, problem in available_backends().items():
        table.add_row(name, "usable" if problem is None else f"not usable: {problem}")
    table.add_row("mp4 (libx264)", _encoder_state())
    return table


def selftest(device: torch.device, seed: int) -> list[Check]:
    """Compares every usable backend with the float64 definition on random inputs of odd sizes."""
    other = "triton" if device.type == "cpu" else "cpu"  # made for other devices; interpreted Triton is for tests
    usable = [name for name, problem in available_backends().items() if problem is None]
    backends = [name for name in usable if name not in (other, "oracle")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FlexAttention says that it is slow uncompiled
        return [_check(backend, dtype, device, seed) for backend in backends for dtype in TOLERANCES]


def selftest_table(checks: list[Check], device: torch.device, seed: int) -> Table:
    """Results of `selftest`."""
    table = Table(title=f"largest error against the float64 definition on {device}, seed {seed}")
    for heading in ("backend", "dtype", "error", "allowed", "result"):
        table.add_column(heading, justify="right" if heading in ("error", "allowed") else "left")
    for check in checks:
        result = "right" if check.passed else f"WRONG {check.failure}".strip()
        dtype = str(check.dtype).removeprefix("torch.")
        error = "-" if check.failure else f"{check.error:.1e}"
        table.add_row(check.backend, dtype, error, f"{TOLERANCES[check.dtype]:.0e}", result)
    return table


def _check(backend: str, dtype: torch.dtype, device: torch.device, seed: int) -> Check:
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for case in CASES:
        query, key, value, mask = _inputs(case, dtype, device, generator)
        expected, expected_lse = oracle.attention(query, key, value, mask)
        try:
            out, lse = block_sparse_attention(query, key, value, mask, return_lse=True, backend=backend)
        except Exception as error:  # a backend that cannot run is a finding, not a crash
            return Check(backend, dtype, 0.0, " ".join(f"{type(error).__name__}: {error}".split())[:200])
        for found, right in ((out, expected), (lse, expected_lse)):
            finite = right.isfinite()  # the log-sum-exp of a query without keys is -inf
            if not torch.equal(found.isfinite(), finite) or not torch.equal(found.isinf(), right.isinf()):
                return Check(backend, dtype, 0.0, "values that are not finite")
            worst = max(worst, float((found.double() - right).where(finite, 0.0).abs().max()))
    return Check(backend, dtype, worst)


def _inputs(
    case: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    batch, heads, queries, keys, head_dim, block_size, density, padded = case
    query, key, value = (
        torch.randn(batch, heads, tokens, head_dim, generator=generator).to(device, dtype)
        for tokens in (queries, keys, keys)
    )
    grid = -(-queries // block_size[0]), -(-keys // block_size[1])
    blocks = torch.rand(1, heads, *grid, generator=generator) < density
    valid = torch.randint(1, keys + 1, (batch,), generator=generator) if padded else None
    mask = BlockMask.from_blocks(blocks, queries, keys, block_size, key_valid=valid)
    return query, key, value, mask.to(device)


def _encoder_state() -> str:
    try:
        from av.codec import Codec

        Codec("libx264", "w")
    except Exception as error:  # av or its encoder is missing
        return f"not usable: {error}; write gif or PNG"
    return "usable"
