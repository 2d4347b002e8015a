"""What this machine can run, why not the rest, and whether what runs is right."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from attnproc.hardware import device_name
from attnproc.kernels import (
    FEATURES,
    BlockMask,
    Ranges,
    available_backends,
    block_sparse_attention,
    choose_backend,
    oracle,
)
from attnproc.pipelines.generate import versions

# (batch, heads, queries, keys, head_dim, (query block, key block), kept share, whether samples are padded)
CASES = [
    (1, 2, 257, 257, 64, (64, 64), 0.4, False),
    (2, 3, 131, 199, 40, (16, 32), 0.5, True),
    (1, 1, 77, 300, 128, (128, 64), 0.3, False),
    (2, 2, 320, 320, 32, (16, 16), 0.2, True),
]
# The same with every option of a mask and a call at once; an order of the tokens needs as many queries as keys.
OPTION_CASES = [case for case in CASES if case[2] == case[3]]
OPTIONS = frozenset(("partial blocks", "ragged blocks", "token_order", "key_bias"))
# Largest error of an output of size about 1, from the precision of the dtype and of the accumulation.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Check:
    """The largest error of one backend and dtype over the cases it takes, or why it failed."""

    backend: str
    dtype: torch.dtype
    masks: str  # "plain", or "all options": ragged and partial blocks, an order of the tokens, a bias
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
    kinds = {name: ["plain", *(["all options"] if FEATURES[name] >= OPTIONS else [])] for name in backends}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # FlexAttention says that it is slow uncompiled
        checks = [
            _check(backend, dtype, masks, device, seed)
            for backend in backends
            for masks in kinds[backend]
            for dtype in TOLERANCES
        ]
    return [check for check in checks if check is not None]


def selftest_table(checks: list[Check], device: torch.device, seed: int) -> Table:
    """Results of `selftest`."""
    table = Table(title=f"largest error against the float64 definition on {device}, seed {seed}")
    for heading in ("backend", "masks", "dtype", "error", "allowed", "result"):
        table.add_column(heading, justify="right" if heading in ("error", "allowed") else "left")
    for check in checks:
        result = "right" if check.passed else f"WRONG {check.failure}".strip()
        dtype = str(check.dtype).removeprefix("torch.")
        error = "-" if check.failure else f"{check.error:.1e}"
        table.add_row(check.backend, check.masks, dtype, error, f"{TOLERANCES[check.dtype]:.0e}", result)
    return table


def _check(backend: str, dtype: torch.dtype, masks: str, device: torch.device, seed: int) -> Check | None:
    """None if the backend takes none of the cases, such as one that needs large blocks."""
    generator = torch.Generator().manual_seed(seed)
    worst: float | None = None
    for case in CASES if masks == "plain" else OPTION_CASES:
        query, key, value, mask = _inputs(case, dtype, device, generator, masks != "plain")
        options = {} if masks == "plain" else _options(mask, query.shape[1], generator)
        try:
            choose_backend(query, key, value, mask, backend, **options)
        except ValueError:
            continue
        expected, expected_lse = oracle.attention(query, key, value, mask, **options)
        try:
            out, lse = block_sparse_attention(query, key, value, mask, return_lse=True, backend=backend, **options)
        except Exception as error:  # a backend that cannot run is a finding, not a crash
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Check(backend, dtype, masks, 0.0, failure)
        for found, right in ((out, expected), (lse, expected_lse)):
            finite = right.isfinite()  # the log-sum-exp of a query without keys is -inf
            if not torch.equal(found.isfinite(), finite) or not torch.equal(found.isinf(), right.isinf()):
                return Check(backend, dtype, masks, 0.0, "values that are not finite")
            worst = max(worst or 0.0, float((found.double() - right).where(finite, 0.0).abs().max()))
    return None if worst is None else Check(backend, dtype, masks, worst)


def _inputs(
    case: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator, optional: bool
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    batch, heads, queries, keys, head_dim, block_size, density, padded = case
    query, key, value = (
        torch.randn(batch, heads, tokens, head_dim, generator=generator).to(device, dtype)
        for tokens in (queries, keys, keys)
    )
    more: dict[str, Any] = {}
    rows, columns = (-(-n // size) for n, size in zip((queries, keys), block_size, strict=True))
    if optional:
        more["query_offsets"], more["key_offsets"] = (
            _offsets(n, size, generator) for n, size in zip((queries, keys), block_size, strict=True)
        )
        rows, columns = len(more["query_offsets"]) - 1, len(more["key_offsets"]) - 1
        more["partial"] = torch.rand(1, heads, rows, columns, generator=generator) < density
        place = torch.randint(-1, 6, (keys, 2), generator=generator).int()
        low = torch.randint(-1, 5, (queries, 2), generator=generator).int()
        more["rule"] = Ranges(place, low, low + 3)
    blocks = torch.rand(1, heads, rows, columns, generator=generator) < density
    valid = torch.randint(1, keys + 1, (batch,), generator=generator) if padded else None
    mask = BlockMask.from_blocks(blocks, queries, keys, block_size, key_valid=valid, **more)
    return query, key, value, mask.to(device)


def _options(mask: BlockMask, heads: int, generator: torch.Generator) -> dict[str, Tensor]:
    order = torch.stack([torch.randperm(mask.query_length, generator=generator) for _ in range(heads)])
    bias = torch.randn(1, heads, mask.grid[1], generator=generator)
    return {"token_order": order.to(mask.device), "key_bias": bias.to(mask.device)}


def _offsets(length: int, size: int, generator: torch.Generator) -> Tensor:
    """Bounds of blocks of 1 to `size` tokens."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(bounds[-1] + int(torch.randint(1, size + 1, (), generator=generator)), length))
    return torch.tensor(bounds, dtype=torch.int32)


def _encoder_state() -> str:
    try:
        from av.codec import Codec

        Codec("libx264", "w")
    except Exception as error:  # av or its encoder is missing
        return f"not usable: {error}; write gif or PNG"
    return "usable"
