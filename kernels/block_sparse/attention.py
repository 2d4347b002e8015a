"""block_sparse_attention: checks its arguments, chooses a backend, runs it."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import backends, op
from .block_mask import BlockMask
from .errors import bad_argument
from .quantize import Quantization
from .request import Request

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
    return_skipped: Literal[False] = ...,
    key_bias: Tensor | None = ...,
    token_order: Tensor | None = ...,
    skip_threshold: float | Tensor | None = ...,
    quantization: Quantization | str | None = ...,
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
    return_lse: bool = ...,
    return_skipped: bool = ...,
    key_bias: Tensor | None = ...,
    token_order: Tensor | None = ...,
    skip_threshold: float | Tensor | None = ...,
    quantization: Quantization | str | None = ...,
    backend: str = ...,
) -> tuple[Tensor, ...]: ...
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    return_skipped: bool = False,
    key_bias: Tensor | None = None,
    token_order: Tensor | None = None,
    skip_threshold: float | Tensor | None = None,
    quantization: Quantization | str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention over the key blocks that `mask` keeps for each query block.

    query: (B, H, Sq, D) with D from 1 to 256, any strides; key, value: (B, H, Sk, D) of the same dtype and device.
        With fewer heads, of which H is a multiple, each serves a group of query heads (a repeated copy is made).
    mask: lengths Sq and Sk; shared by the batch or the heads where its own sizes are 1.
    scale: multiplies the scores, D ** -0.5 by default.
    key_bias: float32 (B or 1, H or 1, Nk), added to the scaled scores of each key block, natural log: log n makes a
        key count as n equal ones. -inf hides a block, though it is computed: what it holds must be finite.
    token_order: integers (H or 1, S), a permutation for each head: position p of the mask is token token_order[h, p].
        Needs as many queries as keys. Results come in the order of the inputs.
    skip_threshold: leave out listed blocks whose scores stay this far below the running maximum of every row of the
        query block, in powers of 2 (SpargeAttn, second stage): above 0, one for all heads or float32 (H,); infinity
        never skips. A skipped block changes a row by less than block size * 2 ** -skip_threshold of its maximum.
    quantization: compute in 8 bits, see `Quantization`; a string such as "int8" or "int8+fp8" is parsed.
    backend: "auto" takes the fastest that can run the call, or one of `BACKENDS` by name.

    Returns out (B, H, Sq, D) in the dtype of query; if asked, the log-sum-exp of the scaled scores, float32
    (B, H, Sq), natural log; and if asked, the number of skipped key blocks, int32 (B, H, Nq). A query that sees no
    key gets zeros and -inf. Differentiable in query, key and value, through out and log-sum-exp, unless blocks are
    skipped or scores quantized. Bad arguments raise ValueError.
    """
    request = make_request(
        query,
        key,
        value,
        mask,
        scale=scale,
        key_bias=key_bias,
        token_order=token_order,
        skip_threshold=skip_threshold,
        quantization=quantization,
    )
    # What is installed is no matter for a graph: compiled code chooses when it runs.
    name = backend if torch.compiler.is_compiling() else backends.choose(request, backend)[0]
    out, lse, skipped = op.call(request, name)
    more = [*([lse] if return_lse else []), *([skipped] if return_skipped else [])]
    return (out, *more) if more else out


def choose_backend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, backend: str = "auto", **options
) -> tuple[str, str]:
    """The backend that `block_sparse_attention` would use for these arguments, and why, in words.

    Raises ValueError where the call would.
    """
    return backends.choose(make_request(query, key, value, mask, **options), backend)


def make_request(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    token_order: Tensor | None = None,
    skip_threshold: float | Tensor | None = None,
    quantization: Quantization | str | None = None,
) -> Request:
    """The arguments of `block_sparse_attention`, checked."""
    _check_tensors(query, key, value)
    _check_mask(query, key, mask)
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not abs(scale) <= torch.finfo(torch.float32).max:  # NaN neither
        raise bad_argument("scale", str(scale), "a finite number", "Leave it out for head_dim ** -0.5.")
    batch, heads, tokens, _ = query.shape
    if key_bias is not None:
        _check_option("key_bias", key_bias, query, ((1, batch), (1, heads), (mask.grid[1],)), (torch.float32,))
    if token_order is not None:
        if key.shape[2] != tokens:
            raise bad_argument(
                "token_order",
                f"{tokens} queries and {key.shape[2]} keys",
                "as many queries as keys",
                "One order is for both; leave it out for cross-attention.",
            )
        _check_option("token_order", token_order, query, ((1, heads), (tokens,)), (torch.int32, torch.int64))
    threshold = None
    if skip_threshold is not None:
        threshold = _threshold(skip_threshold, query)
    found = Quantization.parse(quantization)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        for name, given in (("skip_threshold", threshold), ("quantization", found)):
            if given is not None:
                raise bad_argument(
                    name,
                    "inputs that require a gradient",
                    "inference: there is no backward pass with it",
                    f"Call it under torch.no_grad(), or leave {name} out.",
                )
    return Request(query, key, value, mask, float(scale), key_bias, token_order, threshold, found)


def _threshold(given: float | Tensor, query: Tensor) -> Tensor:
    heads = query.shape[1]
    if isinstance(given, Tensor):
        _check_option("skip_threshold", given, query, ((heads,),), (torch.float32,))
        return given
    if not given > 0.0:
        raise bad_argument("skip_threshold", str(given), "a number above 0", "3 to 15 skips; None never does.")
    return torch.full((heads,), float(given), dtype=torch.float32, device=query.device)


def _check_option(
    name: str, tensor: Tensor, query: Tensor, sizes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    fits = len(tensor.shape) == len(sizes) and all(n in allowed for n, allowed in zip(tensor.shape, sizes, strict=True))
    if not fits or tensor.dtype not in dtypes or tensor.device != query.device:
        shape = ", ".join(" or ".join(str(n) for n in sorted(set(allowed))) for allowed in sizes)
        raise bad_argument(
            name,
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}",
            f"{' or '.join(map(str, dtypes))} of shape ({shape}) on {query.device}",
            "A size of 1 is shared.",
        )


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
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise bad_argument(
            "key",
            f"{key.shape[1]} heads",
            f"{heads} heads, as query, or a divisor of it (grouped-query attention)",
            "Give query head i the key head i * key heads // heads.",
        )
    for name, tensor in (("key", key), ("value", value)):
        expected = (batch, key.shape[1], key.shape[2], head_dim)
        if tuple(tensor.shape) != expected:
            raise bad_argument(
                name,
                f"shape {tuple(tensor.shape)}",
                f"shape {expected}",
                "Batch and head_dim follow query; value has the heads and tokens of key.",
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
