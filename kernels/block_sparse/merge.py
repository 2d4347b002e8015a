"""Attention over a union of keys, from attention over its parts."""

import torch
from torch import Tensor

from .errors import bad_argument


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from (out, lse) of each set, as if computed in one call.

    out: (B, H, S, D) of a floating dtype; lse: (B, H, S), the natural-log log-sum-exp of the scaled scores, -inf where
    a query sees no key of the part (its out is then left out, whatever it holds). All parts have one shape, dtype and
    device. Computed in float32, in float64 for float64 parts.

    Returns out in the dtype of the parts and lse in that of theirs. A query that sees no key in any part gets zeros and
    -inf. Differentiable in all outs and lses. Wrong parts raise ValueError.
    """
    _check(parts)
    dtype = torch.float64 if parts[0][0].dtype == torch.float64 else torch.float32
    outs = torch.stack([out for out, _ in parts]).to(dtype)
    lses = torch.stack([lse for _, lse in parts]).to(dtype)
    seen = lses != -torch.inf
    any_seen = seen.any(0)
    # Where nothing is seen, 0 stands in for -inf: -inf - -inf is NaN, and so would be the gradient.
    lse = torch.where(any_seen, lses, 0.0).logsumexp(0)
    weights = torch.where(seen, lses - lse, -torch.inf).exp()
    out = (weights[..., None] * torch.where(seen[..., None], outs, 0.0)).sum(0)
    return out.to(parts[0][0].dtype), torch.where(any_seen, lse, -torch.inf).to(parts[0][1].dtype)


def _check(parts: tuple[tuple[Tensor, Tensor], ...]) -> None:
    if not parts:
        raise bad_argument("parts", "none", "at least one (out, lse)", "Pass each part as an argument of its own.")
    for i, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2 or not all(isinstance(x, Tensor) for x in part):
            raise bad_argument(
                f"parts[{i}]", type(part).__name__, "a pair of tensors (out, lse)", "Ask attention for return_lse=True."
            )
        out, lse = part
        if out.ndim != 4 or tuple(lse.shape) != tuple(out.shape[:3]) or out.shape != parts[0][0].shape:
            expected = "(batch, heads, tokens, head_dim) and the same without head_dim"
            raise bad_argument(
                f"parts[{i}]",
                f"out of shape {tuple(out.shape)} and lse of shape {tuple(lse.shape)}",
                expected if i == 0 else f"{tuple(parts[0][0].shape)} and {tuple(parts[0][0].shape[:3])}, as parts[0]",
                "All parts are of the same queries.",
            )
        for name, tensor, first in (("out", out, parts[0][0]), ("lse", lse, parts[0][1])):
            if not tensor.is_floating_point() or tensor.dtype != first.dtype or tensor.device != parts[0][0].device:
                raise bad_argument(
                    f"parts[{i}]",
                    f"{name} of {tensor.dtype} on {tensor.device}",
                    f"a floating dtype on {parts[0][0].device}, the same in all parts",
                    "Cast or move it first.",
                )
