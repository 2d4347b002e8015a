"""block_sparse_attention: checks its arguments, chooses a backend, runs it."""

import importlib.util
import math
from typing import Literal, overload

import torch
from torch import Tensor

from .block_mask import BlockMask
from .errors import bad_argument

BACKENDS = ("triton", "flex", "cpu", "oracle")
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the key blocks that `mask` keeps for each query block.

    query: (B, H, Sq, D) with D from 1 to 256, any strides; key, value: (B, H, Sk, D) of the same dtype and device.
    mask: lengths Sq and Sk; shared by the batch or the heads where its own sizes are 1.
    scale: multiplies the scores, D ** -0.5 by default.
    backend: "auto" ("triton" for CUDA tensors, "cpu" for CPU tensors), or one of `BACKENDS` by name.

    Returns out (B, H, Sq, D) in the dtype of query and, if asked, the log-sum-exp of the scaled scores, float32
    (B, H, Sq), natural log. A query that sees no key gets zeros and -inf. Forward only: inputs that require a
    gradient raise NotImplementedError while gradients are enabled. Bad arguments raise ValueError.
    """
    _check_tensors(query, key, value)
    _check_mask(query, key, mask)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise bad_argument("scale", str(scale), "a finite number", "Leave it out for head_dim ** -0.5.")
    name, _ = choose_backend(query, mask, backend)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise NotImplementedError(
            f"block_sparse_attention: got inputs that require a gradient; backend {name!r} computes the forward pass "
            "only. Call it under torch.no_grad(), or use dense attention for training."
        )
    out, lse = _run(name, query, key, value, mask, float(scale))
    return (out, lse) if return_lse else out


def available_backends() -> dict[str, str | None]:
    """For each backend None if it can run on this machine, else the reason why not."""
    return {
        "triton": _triton_problem(),
        "flex": _flex_problem(),
        "cpu": None,
        "oracle": None,
    }


def choose_backend(query: Tensor, mask: BlockMask, backend: str = "auto") -> tuple[str, str]:
    """The backend a call would use and why, in words. Raises ValueError if the one asked for cannot take the call."""
    if backend not in (*BACKENDS, "auto"):
        raise bad_argument("backend", repr(backend), f"'auto' or one of {BACKENDS}", "'auto' suits the device.")
    device = query.device.type
    if backend == "auto":
        if device not in ("cuda", "cpu"):
            raise bad_argument(
                "query",
                f"a tensor on {query.device}",
                "one on CUDA or CPU",
                "Move the tensors, or ask for backend='flex' or 'oracle'.",
            )
        name, reason = ("triton", "CUDA tensors") if device == "cuda" else ("cpu", "CPU tensors")
    else:
        name, reason = backend, "asked for"
    problem = _backend_problem(name, query, mask)
    if problem is not None:
        others = "'flex' or 'oracle'" if device == "cuda" else "'cpu', 'flex' or 'oracle'"
        raise bad_argument("backend", f"{name!r} ({reason})", problem, f"Otherwise ask for {others}.")
    return name, reason


def _backend_problem(name: str, query: Tensor, mask: BlockMask) -> str | None:
    """What the backend would need and does not get, or None."""
    device = query.device.type
    if name == "cpu":
        return None if device == "cpu" else f"CPU tensors, not {device}"
    if name == "flex":
        problem = _flex_problem()
        return problem and f"torch with FlexAttention: {problem}"
    if name == "triton":
        if problem := _triton_problem():
            return f"a machine that runs Triton: {problem}"
        if device != "cuda" and not _triton_interpreted():
            return f"CUDA tensors, not {device} (or TRITON_INTERPRET=1, to test)"
        if any(size < 16 or size & (size - 1) for size in mask.block_size):
            return f"a mask whose blocks are powers of two of at least 16 tokens, not {mask.block_size}"
        if query.dtype == torch.bfloat16 and device != "cuda":
            return "float32 or float16 tensors in Triton's interpreter, which computes bfloat16 wrongly"
        if query.dtype == torch.float64:
            return "float32, float16 or bfloat16 tensors, not float64"
    return None


def _triton_problem() -> str | None:
    try:
        interpreted = _triton_interpreted()
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    return None if interpreted or torch.cuda.is_available() else "no CUDA device is available"


def _triton_interpreted() -> bool:
    """True where TRITON_INTERPRET=1 makes Triton kernels run on the CPU, one program after another."""
    from .triton_forward import INTERPRETED

    return INTERPRETED


def _flex_problem() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} has no FlexAttention"
    return None


def _run(name: str, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    if name == "triton":
        from . import triton_forward

        return triton_forward.attention(query, key, value, mask, scale)
    if name == "flex":
        from . import flex

        return flex.attention(query, key, value, mask, scale)
    if name == "cpu":
        from . import cpu

        return cpu.attention(query, key, value, mask, scale)
    from . import oracle

    out, lse = oracle.attention(query, key, value, mask, scale)
    return out.to(query.dtype), lse.float()


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            came = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise bad_argument(
                name, came, "a tensor (batch, heads, tokens, head_dim)", "Diffusers' own order needs .transpose(1, 2)."
            )
        if tensor.dtype not in DTYPES:
            raise bad_argument(name, str(tensor.dtype), "float32, float16, bfloat16 or float64", "Cast it first.")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise bad_argument(
                name,
                f"{tensor.dtype} on {tensor.device}",
                f"{query.dtype} on {query.device}, as query",
                "Give all three the same dtype and device.",
            )
    batch, heads, _, head_dim = query.shape
    if batch == 0 or heads == 0:
        raise bad_argument("query", f"shape {tuple(query.shape)}", "at least one sample and one head", "Skip the call.")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise bad_argument(
            "query", f"head_dim {head_dim}", f"head_dim from 1 to {MAX_HEAD_DIM}", "Use dense attention here."
        )
    if key.shape[1] != heads:
        raise bad_argument(
            "key",
            f"{key.shape[1]} heads",
            f"{heads} heads, as query",
            "Grouped-query attention is not supported: repeat the key and value heads.",
        )
    for name, tensor, tokens in (("key", key, key.shape[2]), ("value", value, key.shape[2])):
        if tuple(tensor.shape) != (batch, heads, tokens, head_dim):
            raise bad_argument(
                name,
                f"shape {tuple(tensor.shape)}",
                f"shape {(batch, heads, tokens, head_dim)}",
                "Batch, heads and head_dim follow query; value has the tokens of key.",
            )


def _check_mask(query: Tensor, key: Tensor, mask: BlockMask) -> None:
    if not isinstance(mask, BlockMask):
        raise bad_argument(
            "mask", type(mask).__name__, "a BlockMask", "Build one with BlockMask.from_blocks or BlockMask.from_flex."
        )
    if (mask.query_length, mask.key_length) != (query.shape[2], key.shape[2]):
        raise bad_argument(
            "mask",
            f"lengths {(mask.query_length, mask.key_length)} (query, key)",
            f"lengths {(query.shape[2], key.shape[2])}, as the tensors",
            "Build the mask for these tokens, text included.",
        )
    if mask.batch not in (1, query.shape[0]) or mask.heads not in (1, query.shape[1]):
        raise bad_argument(
            "mask",
            f"batch {mask.batch} and heads {mask.heads}",
            f"batch 1 or {query.shape[0]} and heads 1 or {query.shape[1]}",
            "A size of 1 is shared.",
        )
    if mask.device != query.device:
        raise bad_argument(
            "mask",
            f"device {mask.device}",
            f"device {query.device}, as query",
            f"Use mask.to({str(query.device)!r}).",
        )
