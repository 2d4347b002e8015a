"""Functions of tensors: block masks and block-sparse attention. Knows nothing of diffusers, models or steps."""

from . import oracle
from .attention import BACKENDS, available_backends, block_sparse_attention, choose_backend
from .block_mask import BlockMask

__all__ = ["BACKENDS", "BlockMask", "available_backends", "block_sparse_attention", "choose_backend", "oracle"]
