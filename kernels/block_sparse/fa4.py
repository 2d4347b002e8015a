"""FlashAttention 4 as a backend: the CuTe kernels of the package flash-attn-4, for Hopper and Blackwell.

Their full-block lists mean what ours mean. They walk a list from its end and mask only the first block they take for
the end of the keys, which an ascending list allows. Some released kernels were known to ignore lists without a mask
function (Dao-AILab/flash-attention#2506, pytorch/pytorch#188322), so each kind of call is compared with the Triton
kernel once before its results are used.
"""

import functools

import torch
from torch import Tensor

from .block_mask import BlockMask
from .request import Request

ARCHITECTURES = (9, 10, 11)  # major compute capabilities with block sparsity
HEAD_DIM = 128  # above it the key tile is not a power of two
KEY_BLOCK = 128  # a key block is a multiple of the kernel's tile
CHECKED_BLOCKS = 5  # query and key blocks of the comparison
TOLERANCE = 2e-2  # bfloat16 results of unit-variance values; ignored lists differ by far more


def problem(request: Request) -> str | None:
    """What a call would need and does not have, or None."""
    query, mask = request.query, request.mask
    if query.device.type != "cuda":
        return f"CUDA tensors, not {query.device.type}"
    major = torch.cuda.get_device_capability(query.device)[0]
    if major not in ARCHITECTURES:
        return f"a Hopper or Blackwell GPU, not compute capability {major}.x"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16 tensors, not {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > HEAD_DIM:
        return f"a head_dim that is a multiple of 8 up to {HEAD_DIM}, not {query.shape[-1]}"
    query_block = 128 if major == 9 else 256
    if mask.block_size[0] % query_block or mask.block_size[1] % KEY_BLOCK:
        return f"blocks that are multiples of ({query_block}, {KEY_BLOCK}) tokens, not {mask.block_size}"
    if mask.key_valid is not None:
        return "keys without padding"
    return _result_problem(query.device, query.dtype, query.shape[-1], mask.block_size)


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq), all 0."""
    out, lse = _attention(request.query, request.key, request.value, request.mask, request.scale)
    skipped = torch.zeros(*out.shape[:2], request.mask.grid[0], dtype=torch.int32, device=out.device)
    return out, lse, skipped


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    fields = {
        "mask_block_cnt": torch.zeros_like(mask.counts),
        "mask_block_idx": torch.zeros_like(mask.indices[..., :1]),
        "full_block_cnt": mask.counts,
        "full_block_idx": mask.indices.contiguous(),
        "block_size": mask.block_size,
    }
    # Releases before the field was added take the block sizes from the shapes.
    known = {name: tensor for name, tensor in fields.items() if name in BlockSparseTensorsTorch._fields}
    out, lse = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        softmax_scale=scale,
        block_sparse_tensors=BlockSparseTensorsTorch(**known),
        return_lse=True,
    )
    return out.transpose(1, 2), lse


@functools.cache
def _result_problem(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]) -> str | None:
    """None if the installed kernels obey lists with a tail, an empty row and rows of several lengths."""
    from . import triton_backend

    generator = torch.Generator(device).manual_seed(0)
    queries, keys = ((CHECKED_BLOCKS - 1) * size + 17 for size in block_size)
    query, key, value = (
        torch.randn(1, 2, tokens, head_dim, generator=generator, device=device, dtype=dtype)
        for tokens in (queries, keys, keys)
    )
    kept = torch.rand(1, 2, CHECKED_BLOCKS, CHECKED_BLOCKS, generator=generator, device=device) < 0.5
    kept[:, :, 0], kept[:, :, 1] = False, True
    mask = BlockMask.from_blocks(kept, queries, keys, block_size)
    scale = head_dim**-0.5
    try:
        out, lse = _attention(query, key, value, mask, scale)
    except Exception as error:  # what a pre-release raises is not known; another backend takes the call
        return f"an installation that runs: flash-attn-4 raised {type(error).__name__}: {error}"
    expected, expected_lse, _ = triton_backend.forward(Request(query, key, value, mask, scale))
    close = torch.allclose(out.float(), expected.float(), atol=TOLERANCE, rtol=TOLERANCE)
    if close and torch.allclose(lse, expected_lse, atol=TOLERANCE, rtol=TOLERANCE):
        return None
    return "an installation that obeys block lists: its result differs from the Triton kernel's"
