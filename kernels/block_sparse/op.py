"""The torch operator behind `block_sparse_attention`: one opaque node for torch.compile, with a gradient.

A BlockMask is not a tensor, so it travels as its tensors and comes back as the living object they belong to, with
whatever backends derived from it; where there is none (a mask made inside compiled code) it is put together again.
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import backends
from .block_mask import FIELDS, BlockMask, living
from .quantize import Quantization
from .request import Request
from .rules import ChunkBits, Ranges

RULES = (Ranges, ChunkBits)


def call(request: Request, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a checked request on a backend by name: out, lse and the number of skipped blocks."""
    mask, quantization = request.mask, request.quantization
    if not torch.compiler.is_compiling():
        # A short-lived mask of the same tensors, or a copy, may have taken or cleared its place.
        living[tuple(id(tensor) for tensor in mask.tensors)] = mask
    return torch.ops.attnproc.block_sparse_attention(
        request.query,
        request.key,
        request.value,
        request.key_bias,
        request.token_order,
        request.skip_threshold,
        mask.tensors,
        [mask.query_length, mask.key_length, *mask.block_size, RULES.index(type(mask.rule)) if mask.rule else -1],
        request.scale,
        "" if quantization is None else json.dumps(asdict(quantization)),
        backend,
    )


@torch.library.custom_op("attnproc::block_sparse_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    token_order: Tensor | None,
    skip_threshold: Tensor | None,
    mask_tensors: Sequence[Tensor | None],
    mask_sizes: Sequence[int],
    scale: float,
    quantization: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    request = Request(
        query.detach(),
        key.detach(),
        value.detach(),
        _mask_of(mask_tensors, mask_sizes),
        scale,
        key_bias,
        token_order,
        skip_threshold,
        Quantization(**json.loads(quantization)) if quantization else None,
    )
    with torch.autocast(query.device.type, enabled=False):  # dtypes are those of the inputs
        out, lse, skipped = module(backends.choose(request, backend)[0]).forward(request)
    return _laid_out_as(query, out), lse.contiguous(), skipped.contiguous()


@_forward.register_fake
def _(query, key, value, key_bias, token_order, skip_threshold, mask_tensors, mask_sizes, scale, quantization, backend):
    batch, heads, tokens, _ = query.shape
    lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    rows = mask_tensors[0].shape[2]
    return torch.empty_like(query), lse, query.new_empty(batch, heads, rows, dtype=torch.int32)


@torch.library.custom_op("attnproc::block_sparse_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    token_order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_gradient: Tensor,
    lse_gradient: Tensor,
    mask_tensors: Sequence[Tensor | None],
    mask_sizes: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    request = Request(query, key, value, _mask_of(mask_tensors, mask_sizes), scale, key_bias, token_order)
    with torch.autocast(query.device.type, enabled=False):
        gradients = module(backends.choose(request, backend, gradient=True)[0]).backward(
            request, out, lse, out_gradient, lse_gradient
        )
    of_query, of_key, of_value = map(_laid_out_as, (query, key, value), gradients)
    return of_query, of_key, of_value


@_backward.register_fake
def _(query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx, inputs, output) -> None:
    query, key, value, key_bias, token_order, _, mask_tensors, mask_sizes, scale, _, backend = inputs
    out, lse, skipped = output
    ctx.mark_non_differentiable(skipped)
    ctx.save_for_backward(query, key, value, key_bias, token_order, out, lse, *mask_tensors)
    ctx.mask_sizes, ctx.scale, ctx.backend = mask_sizes, scale, backend


def _gradient(ctx, out_gradient, lse_gradient, _):
    query, key, value, key_bias, token_order, out, lse, *mask_tensors = ctx.saved_tensors
    gradients = torch.ops.attnproc.block_sparse_attention_backward(
        query,
        key,
        value,
        key_bias,
        token_order,
        out,
        lse,
        out_gradient,
        lse_gradient,
        mask_tensors,
        ctx.mask_sizes,
        ctx.scale,
        ctx.backend,
    )
    # torch takes a list for a structure only if all in it are tensors.
    no_mask = None if any(tensor is None for tensor in mask_tensors) else [None] * len(mask_tensors)
    return *gradients, None, None, None, no_mask, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)


def _laid_out_as(given: Tensor, result: Tensor) -> Tensor:
    """`result` with the strides that compiled code expects: those the fake results above have."""
    if result.stride() == torch.empty_like(given, device="meta").stride():
        return result
    return torch.empty_like(given).copy_(result)


def module(backend: str) -> Any:
    """The module of a backend; imported here, because Triton and others must not be imported before they are used."""
    names = {"triton": "triton_backend", "oracle": "oracle_backend"}
    return importlib.import_module(f".{names.get(backend, backend)}", __package__)


def _mask_of(tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> BlockMask:
    query_length, key_length, query_block, key_block, rule = sizes
    mask = living.get(tuple(id(tensor) for tensor in tensors))
    # An id may belong to a new tensor by now, so the tensors themselves are compared.
    if (
        mask is not None
        and all(a is b for a, b in zip(mask.tensors, tensors, strict=True))
        and (mask.query_length, mask.key_length, *mask.block_size) == (query_length, key_length, query_block, key_block)
    ):
        return mask
    fields = dict(zip(FIELDS, tensors, strict=False))
    return BlockMask(
        query_length=query_length,
        key_length=key_length,
        block_size=(query_block, key_block),
        rule=None if rule < 0 else RULES[rule](*tensors[len(FIELDS) :]),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )
