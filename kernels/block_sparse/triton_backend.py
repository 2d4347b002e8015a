"""The Triton kernels as a backend."""

from torch import Tensor

from . import triton_forward
from .request import Request


def forward(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out in the dtype of query, lse float32 (B, H, Sq) and skipped blocks int32 (B, H, Nq)."""
    return triton_forward.forward(request)


def backward(
    request: Request, out: Tensor, lse: Tensor, out_gradient: Tensor, lse_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from . import triton_backward

    return triton_backward.backward(request, out, lse, out_gradient, lse_gradient)
