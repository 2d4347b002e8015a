"""What a backend is asked to compute: plain data, already checked."""

from dataclasses import dataclass

from torch import Tensor

from .block_mask import BlockMask
from .quantize import Quantization


@dataclass(frozen=True, eq=False)
class Request:
    """One call of `block_sparse_attention`, with its arguments' meaning; `skip_threshold` has one entry per head."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    scale: float
    key_bias: Tensor | None = None
    token_order: Tensor | None = None
    skip_threshold: Tensor | None = None
    quantization: Quantization | None = None

    @property
    def features(self) -> frozenset[str]:
        """What the call needs beyond whole, equally large blocks."""
        asked = {
            "key_bias": self.key_bias is not None,
            "token_order": self.token_order is not None,
            "skip_threshold": self.skip_threshold is not None,
            "quantization": self.quantization is not None,
            "partial blocks": self.mask.rule is not None,
            "ragged blocks": self.mask.query_offsets is not None or self.mask.key_offsets is not None,
        }
        return frozenset(name for name, needed in asked.items() if needed)
