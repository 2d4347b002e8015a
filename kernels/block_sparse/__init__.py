"""Functions of tensors: block masks and block-sparse attention. Knows nothing of diffusers, models or steps."""

from . import oracle, scores, selection
from .attention import block_sparse_attention, choose_backend
from .backends import BACKENDS, FEATURES, available_backends
from .block_mask import BlockMask
from .merge import merge_attention
from .quantize import Quantization
from .rules import ChunkBits, Ranges

__all__ = [
    "BACKENDS",
    "FEATURES",
    "BlockMask",
    "ChunkBits",
    "Quantization",
    "Ranges",
    "available_backends",
    "block_sparse_attention",
    "choose_backend",
    "merge_attention",
    "oracle",
    "scores",
    "selection",
]
