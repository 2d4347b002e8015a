"""Quantization of query, key and value before attention: 8-bit integers with scales, in plain PyTorch.

Follows SageAttention (arXiv 2410.02367): keys lose their mean over the tokens, which softmax does not see, and query
and key are rounded to integers with one scale per token or per block of tokens. Their products are summed exactly in
32-bit integers; one multiplication by both scales gives the score. Values are rounded per channel, if at all.
`triton_quantize` has the same functions for CUDA tensors; `quantize_oracle` defines the attention that follows.
"""

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from .block_mask import BlockMask
from .errors import bad_argument

NAMES = ("int8", "int8+fp8", "int8+int8", "int4", "int4+fp8", "int4+int8")
LARGEST = {8: 127, 4: 7}  # integer of the largest magnitude, by bits
SMALLEST_SCALE = 1e-7  # added to every scale, so that a group of zeros has one
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
FP8_CAPABILITY = (8, 9)  # of NVIDIA GPUs, from which 8-bit floats can be multiplied
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Quantization:
    """What is computed in low precision.

    qk: integers of query and key. "int4" (levels -7..7) is simulated on the CPU, for quality studies.
    group: what shares a scale: "token" (the most accurate: one outlier token spoils no other) or "block", the blocks
        of the mask (as SpargeAttn and SageAttention do).
    pv: None leaves weights and value in value's own dtype; "fp8" is E4M3 (NVIDIA GPUs from capability 8.9, other
        devices simulate it only on the CPU); "int8" rounds the weights relative to the largest of each key block.
    smooth_key: subtract the mean key first. Exact, log-sum-exp included, and vital where keys share an offset, as those
        of diffusion transformers do.
    """

    qk: Literal["int8", "int4"] = "int8"
    group: Literal["token", "block"] = "token"
    pv: Literal["fp8", "int8"] | None = None
    smooth_key: bool = True

    def __post_init__(self) -> None:
        choices = {"qk": ("int8", "int4"), "group": ("token", "block"), "pv": (None, "fp8", "int8")}
        for name, allowed in {**choices, "smooth_key": (True, False)}.items():
            if getattr(self, name) not in allowed:
                raise bad_argument(
                    f"quantization.{name}",
                    repr(getattr(self, name)),
                    f"one of {', '.join(map(repr, allowed))}",
                    "Quantization() is INT8 scores with exact weights and values.",
                )

    @classmethod
    def parse(cls, given: "str | Quantization | None") -> "Quantization | None":
        """The quantization of a name such as "int8+fp8" (integers of query and key, then of weights and value).

        None and a Quantization are returned as they are. Anything else raises ValueError.
        """
        if given is None or isinstance(given, cls):
            return given
        if given not in NAMES:
            raise bad_argument(
                "quantization",
                repr(given),
                f"None, a Quantization or one of {', '.join(map(repr, NAMES))}",
                "'int8' is safe wherever quantization is; 'int8+fp8' is the fastest.",
            )
        qk, _, pv = given.partition("+")
        return cls(qk=qk, pv=pv or None)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name that `parse` takes."""
        return self.qk if self.pv is None else f"{self.qk}+{self.pv}"

    @property
    def bits(self) -> int:
        return 8 if self.qk == "int8" else 4


@dataclass(frozen=True, eq=False)
class QuantizedInputs:
    """What the attention kernel reads. Base-2 score of query i and key j: (q_int8[i] . k_int8[j]) q_scale k_scale.

    q_int8, k_int8: int8 (B, H, Sq, D) and (B, H, Sk, D), contiguous, 0 in padding. Keys have lost their mean.
    q_scale, k_scale: float32 (B, H, groups), one group per token or per block of the mask. The softmax scale and
        log2(e) are folded into q_scale: scores come out in base 2 and need no further factor.
    values: value as it came, or float8_e4m3fn or int8 (B, H, Sk, D), contiguous, 0 in padding.
    value_scale: float32 (B, H, 1, D), multiplies the output, None where values are as they came.
    lse_correction: float32 (B, H, Sq), to be added to the natural-log log-sum-exp, None without smoothing.
    """

    q_int8: Tensor
    k_int8: Tensor
    q_scale: Tensor
    k_scale: Tensor
    values: Tensor
    value_scale: Tensor | None
    lse_correction: Tensor | None


def quantize_inputs(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, quantization: Quantization
) -> QuantizedInputs:
    """Quantizes the inputs of one attention call: by Triton kernels for CUDA tensors, else by this file's functions.

    query (B, H, Sq, D), key and value (B, H, Sk, D) of a floating dtype, any strides, in the token order of the mask;
    they are left as they are. Key padding (mask.key_valid) counts for no mean and no scale, whatever it holds.
    scale: the softmax scale.
    A group of tokens or a value channel that holds NaN or infinity gets zeros and an infinite scale, so what is
    computed from it is NaN and never a wrong number. Forward only: inputs that require a gradient raise
    NotImplementedError while gradients are enabled. What the device cannot do raises ValueError.
    """
    check_inputs(query, key, value, quantization)
    kernels = _kernels(query.device)
    mean = kernels.key_mean(key, mask.key_valid) if quantization.smooth_key else None
    query_group, key_group = (1, 1) if quantization.group == "token" else mask.block_size
    bits = quantization.bits
    q_int8, q_scale = kernels.quantize_rows(query, query_group, mask.query_offsets, bits=bits)
    k_int8, k_scale = kernels.quantize_rows(key, key_group, mask.key_offsets, mask.key_valid, mean, bits)
    values, value_scale = value, None
    if quantization.pv is not None:
        values, value_scale = kernels.quantize_values(value, quantization.pv, mask.key_valid)
    correction = None if mean is None else kernels.lse_correction(query, mean, scale)
    q_scale = q_scale * (scale * math.log2(math.e))
    return QuantizedInputs(q_int8, k_int8, q_scale, k_scale, values, value_scale, correction)


def _kernels(device: torch.device) -> ModuleType:
    """The module whose functions suit the device: Triton's or this one."""
    if device.type == "cuda":
        from . import triton_quantize

        return triton_quantize
    return sys.modules[__name__]


def check_inputs(query: Tensor, key: Tensor, value: Tensor, quantization: Quantization) -> None:
    """Raises if these tensors cannot be quantized so on their device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in DTYPES:
            raise bad_argument(name, str(tensor.dtype), "float32, float16, bfloat16 or float64", "Cast it first.")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        raise NotImplementedError(
            "quantization: got inputs that require a gradient; quantized attention computes the forward pass only. "
            "Call it under torch.no_grad(), or leave quantization out."
        )
    problem = device_problem(quantization, query.device)
    if problem is not None:
        raise bad_argument("quantization", f"{quantization.name!r} on {query.device}", *problem)


def device_problem(quantization: Quantization, device: torch.device) -> tuple[str, str] | None:
    """What this quantization needs and the device is not, and what to use instead; None if all is well.

    On the CPU everything is simulated: exact, and slower than no quantization.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "CUDA or CPU tensors", "Leave quantization out on this device."
    if quantization.qk == "int4":
        return "CPU tensors: 4-bit integers are only simulated", "Use 'int8', 'int8+fp8' or 'int8+int8'."
    capability = torch.cuda.get_device_capability(device)
    if quantization.pv == "fp8" and capability < FP8_CAPABILITY:
        came = ".".join(map(str, capability))
        return f"a GPU of capability 8.9 or later, this one has {came}", "Use 'int8' or 'int8+int8'."
    return None


def key_mean(key: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of key (B, H, S, D): float32 (B, H, 1, D), 0 where a sample has no valid token.

    key_valid: integers (B,) or (1,), valid tokens of each sample, a prefix; None means all.
    """
    if key_valid is None:
        return key.mean(2, keepdim=True, dtype=torch.float32)
    kept = key.masked_fill(~_is_valid(key, key_valid), 0.0)
    return kept.sum(2, keepdim=True, dtype=torch.float32) / key_valid.clamp(min=1).view(-1, 1, 1, 1)


def lse_correction(query: Tensor, mean: Tensor, scale: float) -> Tensor:
    """float32 (B, H, Sq), scale * q . mean: what smoothing takes from the log-sum-exp of each query.

    query (B, H, Sq, D), mean float32 (B, H, 1, D) as `key_mean` gives it.
    """
    return (query.float() @ mean.transpose(-1, -2)).squeeze(-1) * scale


def quantize_rows(
    x: Tensor,
    group_size: int,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    shift: Tensor | None = None,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """Rounds x - shift to integers with one scale per group of tokens.

    x: (B, H, S, D). group_size: tokens per group, 1 for a scale per token. offsets: int32 (groups + 1,), first token of
    each group, instead of groups of equal size; not used with group_size 1. valid: integers (B,) or (1,), valid tokens
    of each sample. shift: float32 (B, H, 1, D). bits: 8 or 4.

    Returns int8 (B, H, S, D), contiguous, and float32 (B, H, groups), scale = amax / 127 + 1e-7 (7 with 4 bits). Halves
    are rounded away from zero (SageAttention's quant_per_block). Invalid tokens count for no scale and become 0.
    """
    rows = x.float() if shift is None else x.float() - shift
    if valid is not None:
        rows = rows.masked_fill(~_is_valid(x, valid), 0.0)
    amax = _finite_or_inf(rows.abs().amax(-1))
    if group_size > 1:
        groups = group_of_token(x.shape[2], group_size, offsets, x.device)
        count = -(-x.shape[2] // group_size) if offsets is None else len(offsets) - 1
        grouped = amax.new_zeros(*amax.shape[:2], count)
        amax = grouped.scatter_reduce_(2, groups.expand_as(amax), amax, "amax")
    scale = amax / LARGEST[bits] + SMALLEST_SCALE
    per_token = scale_of_token(scale, x.shape[2], group_size, offsets)
    return _to_int8(rows / per_token[..., None]), scale


def quantize_values(value: Tensor, kind: Literal["fp8", "int8"], valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds value (B, H, S, D) with one scale per channel, such that values * scale is close to value.

    valid: integers (B,) or (1,), valid tokens of each sample; the others count for no scale and become 0.
    Returns float8_e4m3fn or int8 (B, H, S, D), contiguous, and float32 (B, H, 1, D), amax / 448 or amax / 127.
    A channel of zeros has scale 1 and stays exactly 0.
    """
    rows = value.float()
    if valid is not None:
        rows = rows.masked_fill(~_is_valid(value, valid), 0.0)
    scale = channel_scale(rows.abs().amax(2, keepdim=True), kind)
    if kind == "int8":
        return _to_int8(rows / scale), scale
    return (rows / scale).nan_to_num(0.0).clamp(-FP8_LARGEST, FP8_LARGEST).contiguous().to(FP8), scale


def channel_scale(amax: Tensor, kind: Literal["fp8", "int8"]) -> Tensor:
    """The scale of value channels with largest magnitude `amax`: float32 of the same shape."""
    scale = _finite_or_inf(amax) / (FP8_LARGEST if kind == "fp8" else LARGEST[8])
    return torch.where(scale == 0.0, 1.0, scale)


def group_of_token(length: int, group_size: int, offsets: Tensor | None, device: torch.device) -> Tensor:
    """int64 (length,): the group of each token."""
    tokens = torch.arange(length, dtype=torch.int32, device=device)
    groups = tokens // group_size if offsets is None else torch.searchsorted(offsets, tokens, right=True) - 1
    return groups.long()


def scale_of_token(scale: Tensor, length: int, group_size: int, offsets: Tensor | None) -> Tensor:
    """float32 (B, H, length): the scale of each token's group, from (B, H, groups)."""
    return scale if group_size == 1 else scale[..., group_of_token(length, group_size, offsets, scale.device)]


def round_half_away(x: Tensor) -> Tensor:
    """The nearest integer, halves away from zero: 2.5 gives 3 and -0.5 gives -1, unlike torch.round."""
    return (x + 0.5 * x.sign()).trunc()


def _to_int8(x: Tensor) -> Tensor:
    """Contiguous. NaN comes from infinite scales and becomes 0; scales below 1e-38 may be off: clamped."""
    return (
        round_half_away(x)
        .nan_to_num(0.0)
        .clamp(-LARGEST[8], LARGEST[8])
        .to(torch.int8, memory_format=torch.contiguous_format)
    )


def _finite_or_inf(amax: Tensor) -> Tensor:
    return amax.masked_fill(amax.isnan(), torch.inf)


def _is_valid(x: Tensor, valid: Tensor) -> Tensor:
    """bool (B or 1, 1, S, 1): tokens of x (B, H, S, D) before the end of their sample."""
    return torch.arange(x.shape[2], device=x.device).view(1, 1, -1, 1) < valid.view(-1, 1, 1, 1)
