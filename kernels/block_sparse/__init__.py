"""Functions of tensors: block masks and block-sparse attention. Knows nothing of diffusers, models or steps."""

from . import oracle
from .attention import available_backends, block_sparse_attention, choose_backend
from .block_mask import BlockMask

__all__ = ["BlockMask", "available_backends", "block_sparse_attention", "choose_backend", "oracle"]
