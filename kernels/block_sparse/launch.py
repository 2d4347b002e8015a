"""How the forward kernel is launched: tile sizes, warps and pipeline stages for a call on a GPU.

The choices come from what the compiler reports for each class of GPU (registers, spills in the loops, instructions per
key, shared memory). Measured ones take precedence: a JSON file {GPU class: {workload: [query tile, key tile, warps,
stages]}}, `launch_shapes.json` beside this file or the one that the variable ATTNPROC_LAUNCH_SHAPES names.
"""

import functools
import json
import os
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import bad_argument
from .request import Request

SMALL_SHARED_MEMORY = 99 * 1024  # bytes per program on consumer GPUs
# Classes of GPUs: A100 and other large ones before Hopper, small ones of any age (RTX, L4, L40), Hopper, Blackwell.
SHARED_MEMORY = {"sm80": 163 * 1024, "sm89": SMALL_SHARED_MEMORY, "sm90": 227 * 1024, "sm100": 227 * 1024}
TABLE = Path(__file__).with_name("launch_shapes.json")


class LaunchShape(NamedTuple):
    """Tiles in tokens, warps per program, and pipeline stages: tiles of keys and values that are on their way."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int


class Workload(NamedTuple):
    """What of a call decides its launch shape. element, value_element: bytes per number of query and key, of value."""

    gpu: str
    padded_dim: int
    element: int
    value_element: int
    query_block: int
    key_block: int
    skips: bool = False
    masked: bool = False  # by a rule, or because blocks are ragged

    @property
    def name(self) -> str:
        """Its key in a table of measured shapes."""
        options = "".join(f", {name}" for name in ("skips", "masked") if getattr(self, name))
        bits = f"{8 * self.element} and {8 * self.value_element} bit"
        return f"head_dim {self.padded_dim}, {bits}, blocks {self.query_block}x{self.key_block}{options}"


def workload(request: Request) -> Workload:
    """The workload of a call on the GPU of its tensors; without one, on a small GPU."""
    mask, element = request.mask, request.query.element_size()
    value_element = element
    if request.quantization is not None:
        element, value_element = 1, 1 if request.quantization.pv else element
    return Workload(
        gpu_class(request.query),
        max(_next_power_of_2(request.query.shape[-1]), 32 if element == 1 else 16),  # what tensor cores multiply
        element,
        value_element,
        *mask.block_size,
        skips=request.skip_threshold is not None,
        masked=mask.rule is not None or mask.key_offsets is not None,
    )


def launch_shape(work: Workload) -> LaunchShape:
    """The measured shape of a workload where there is one, else the one that suits the GPU by what the compiler says.

    Raises ValueError if the blocks are too large for the GPU, which can be only where tiles must be whole blocks.
    """
    measured = _measured().get(work.gpu, {}).get(work.name)
    if measured is not None:
        return LaunchShape(*measured)
    shape = _preferred(work)
    while shape.stages > 1 and not fits(work, shape):
        shape = shape._replace(stages=shape.stages - 1)
    if not fits(work, shape):
        raise bad_argument(
            "mask.block_size",
            f"{(work.query_block, work.key_block)} with skip_threshold and head_dim up to {work.padded_dim}",
            f"blocks that fit in {SHARED_MEMORY[work.gpu] // 1024} KiB of shared memory",
            "Use smaller blocks or 16-bit tensors, or leave skip_threshold out.",
        )
    return shape


def candidates(work: Workload) -> list[LaunchShape]:
    """The shapes worth trying for a workload: legal, within shared memory, and the preferred one among them."""
    preferred = launch_shape(work)
    query_tiles = [n for n in (64, 128) if n <= work.query_block] or [work.query_block]
    key_tiles = [n for n in (32, 64, 128) if n <= work.key_block] or [preferred.key_tile]
    if work.skips:
        query_tiles, key_tiles = [preferred.query_tile], [preferred.key_tile]
    shapes = [LaunchShape(*numbers) for numbers in product(query_tiles, key_tiles, (4, 8), (2, 3, 4))]
    # Each warp multiplies at least 16 rows; scores and output must stay in registers, with few to spare.
    usable = [
        shape
        for shape in shapes
        if fits(work, shape)
        and shape.query_tile >= 16 * shape.warps
        and shape.query_tile * (shape.key_tile + work.padded_dim) <= 32 * shape.warps * 144
    ]
    return [preferred, *(shape for shape in usable if shape != preferred)]


def fits(work: Workload, shape: LaunchShape) -> bool:
    """Whether the tiles, one of queries and one of keys and of values per stage, fit in shared memory."""
    keys = shape.stages * shape.key_tile * (work.element + work.value_element)
    return (shape.query_tile * work.element + keys) * work.padded_dim <= SHARED_MEMORY[work.gpu]


def _preferred(work: Workload) -> LaunchShape:
    """Before it is known to fit in shared memory."""
    large = work.gpu in ("sm90", "sm100")
    if work.value_element == 4:  # full precision runs without tensor cores: registers are the limit
        query_tile, key_tile, warps, stages = (64, 32, 8, 2) if work.padded_dim <= 64 else (32, 16, 8, 2)
    elif work.padded_dim > 128:
        wide = large and work.value_element > 1  # 8-bit products need a second set of accumulators
        query_tile, key_tile, warps, stages = (128, 32, 8, 3) if wide else (64, 32, 8, 2)
    elif work.padded_dim > 64:
        # Rescaling the output costs the same for any key tile, so a long one takes a quarter fewer instructions per
        # key; on large GPUs it fits in registers as long as nothing is masked token by token.
        long = large and not work.masked and work.query_block >= 128
        query_tile, key_tile, warps, stages = 128, 128 if long else 64, 8, 3
    else:
        # With 8 warps two programs run at a time on large GPUs: one multiplies while the other takes exponentials.
        query_tile, key_tile, warps, stages = 128, 64, 8 if large else 4, 3
    query_tile, key_tile = min(query_tile, work.query_block), min(key_tile, work.key_block)
    if work.skips:  # all rows and keys of a block decide together
        query_tile, key_tile = work.query_block, work.key_block
    if query_tile <= 64 and work.value_element != 4 and work.padded_dim <= 128:
        warps = 4
    if work.value_element == 1:  # tensor cores multiply no fewer 8-bit weights
        key_tile = max(key_tile, 32)
    return LaunchShape(query_tile, key_tile, warps, stages)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def gpu_class(tensor: Tensor) -> str:
    """The class of the GPU that holds a tensor, by its shared memory and its tensor cores."""
    if not tensor.is_cuda or shared_memory(tensor.device.index) < SHARED_MEMORY["sm80"]:
        return "sm89"
    major = torch.cuda.get_device_capability(tensor.device)[0]
    return {8: "sm80", 9: "sm90"}.get(major, "sm100")


@functools.cache
def shared_memory(device: int) -> int:
    """Shared memory in bytes that one program can have; asking the driver is too slow for every call."""
    import triton

    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


@functools.cache
def _measured() -> dict[str, dict[str, list[int]]]:
    path = Path(os.environ.get("ATTNPROC_LAUNCH_SHAPES", TABLE))
    return json.loads(path.read_text()) if path.exists() else {}
