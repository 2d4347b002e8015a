"""Maps of blocks as bits, on their device: an eighth of the memory of booleans."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_blocks(blocks: Tensor) -> Tensor:
    """uint8 (..., ceil(N / 8)) of bool (..., N), eight blocks to a byte, the first one highest, as `numpy.packbits`."""
    padded = F.pad(blocks, (0, -blocks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded.to(torch.uint8) << _shifts(blocks)).sum(-1, dtype=torch.uint8)


def unpack_blocks(packed: Tensor, columns: int) -> Tensor:
    """bool (..., columns): the inverse of `pack_blocks`."""
    return ((packed[..., None] >> _shifts(packed)) & 1).bool().flatten(-2)[..., :columns]


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
