"""The float64 definition as a backend: runs everything, on every device, slowly."""

import torch
from torch import Tensor

from . import oracle
from .request import Request


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq)."""
    query, mask = request.query, request.mask
    if request.quantization is not None:
        from . import quantize_oracle

        out, lse, skipped = quantize_oracle.forward(request)
        return out.to(query.dtype), lse.float(), skipped
    skipped = torch.zeros(*query.shape[:2], mask.grid[0], dtype=torch.int32, device=query.device)
    out, lse = oracle.attention(
        query,
        request.key,
        request.value,
        mask,
        request.scale,
        key_bias=request.key_bias,
        token_order=request.token_order,
        skip_threshold=request.skip_threshold,
    )
    if request.skip_threshold is not None:
        query, key = query, request.key
        if request.token_order is not None:
            query, key = (oracle.take(tensor, request.token_order) for tensor in (query, key))
        blocks = oracle.skipped_blocks(
            query, key, mask, request.scale, request.skip_threshold, key_bias=request.key_bias
        )
        skipped = blocks.sum(-1, dtype=torch.int32)
    return out.to(query.dtype), lse.float(), skipped


def backward(
    request: Request, out: Tensor, lse: Tensor, out_gradient: Tensor, lse_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtype."""
    found = oracle.gradients(
        request.query,
        request.key,
        request.value,
        request.mask,
        request.scale,
        out_gradient,
        lse_gradient,
        key_bias=request.key_bias,
        token_order=request.token_order,
    )
    query, key, value = (gradient.to(request.query.dtype) for gradient in found)
    return query, key, value
