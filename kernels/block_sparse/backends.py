"""Which backend takes a call, and why."""

import functools
import importlib.util

import torch

from .errors import bad_argument
from .quantize import device_problem
from .request import Request

BACKENDS = ("triton", "fa4", "flex", "cpu", "oracle")

# What each backend can do beyond whole, equally large blocks (see `Request.features`).
FEATURES: dict[str, frozenset[str]] = {
    "triton": frozenset(
        ("key_bias", "token_order", "skip_threshold", "quantization", "partial blocks", "ragged blocks")
    ),
    "fa4": frozenset(),
    "flex": frozenset(("partial blocks",)),
    "cpu": frozenset(("key_bias", "token_order", "skip_threshold", "quantization", "partial blocks", "ragged blocks")),
    "oracle": frozenset(
        ("key_bias", "token_order", "skip_threshold", "quantization", "partial blocks", "ragged blocks")
    ),
}
# Backends that have a backward pass.
DIFFERENTIABLE = ("triton", "cpu", "oracle")


def available_backends() -> dict[str, str | None]:
    """For each backend None if it can run on this machine, else the reason why not."""
    return {
        "triton": _triton_problem(),
        "fa4": _fa4_problem(),
        "flex": _flex_problem(),
        "cpu": None,
        "oracle": None,
    }


def choose(request: Request, backend: str = "auto", *, gradient: bool = False) -> tuple[str, str]:
    """The backend a call would use and why, in words. Raises ValueError if the one asked for cannot take the call.

    gradient: the call needs a backward pass, whatever its tensors say.
    """
    if backend not in (*BACKENDS, "auto"):
        raise bad_argument("backend", repr(backend), f"'auto' or one of {BACKENDS}", "'auto' suits the device.")
    query = request.query
    device = query.device.type
    if request.quantization is not None and (lacks := device_problem(request.quantization, query.device)):
        raise bad_argument("quantization", f"{request.quantization.name!r} on {query.device}", *lacks)
    gradient |= torch.is_grad_enabled() and any(x.requires_grad for x in (query, request.key, request.value))
    if backend == "auto":
        if device not in ("cuda", "cpu"):
            raise bad_argument(
                "query",
                f"a tensor on {query.device}",
                "one on CUDA or CPU",
                "Move the tensors, or ask for backend='flex' or 'oracle'.",
            )
        name, reason = ("cpu", "CPU tensors") if device == "cpu" else ("triton", "CUDA tensors")
        if device == "cuda":
            # FlashAttention 4 is the fastest where it runs, so it is asked first.
            problem = _problem("fa4", request, gradient)
            if problem is None:
                return "fa4", "CUDA tensors, and flash-attn-4 takes this call"
            reason = f"CUDA tensors; fa4 needs {problem}"
    else:
        name, reason = backend, "asked for"
    problem = _problem(name, request, gradient)
    if problem is not None:
        others = "'flex' or 'oracle'" if device == "cuda" else "'cpu', 'flex' or 'oracle'"
        raise bad_argument("backend", f"{name!r} ({reason})", problem, f"Otherwise ask for {others}.")
    return name, reason


def _problem(name: str, request: Request, gradient: bool) -> str | None:
    """What the backend would need and does not get, or None."""
    missing = request.features - FEATURES[name]
    if missing:
        return f"a call without {', '.join(sorted(missing))}"
    if gradient and name not in DIFFERENTIABLE:
        return "inputs that need no gradient (call it under torch.no_grad()): it computes the forward pass only"
    query, mask, device = request.query, request.mask, request.query.device.type
    if name == "cpu":
        return None if device == "cpu" else f"CPU tensors, not {device}"
    if name == "flex":
        problem = _flex_problem()
        return problem and f"torch with FlexAttention: {problem}"
    if name == "fa4":
        if problem := _fa4_problem():
            return problem
        from . import fa4

        return fa4.problem(request)
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


@functools.cache
def _fa4_problem() -> str | None:
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        return "the package flash-attn-4, which is not installed"
    if not torch.cuda.is_available():
        return "a CUDA device"
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
