"""Every private or version-dependent diffusers name this package touches, in one place."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from attnproc.errors import UnsupportedError

try:
    from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_dispatch import (
        _templated_context_parallel_attention,
        dispatch_attention_fn,
    )
    from diffusers.models.attention_processor import Attention, MochiAttention
except ImportError as error:  # pragma: no cover - depends on the installed version
    raise ImportError(
        f"attnproc needs diffusers 0.42.x; the installed diffusers {diffusers.__version__} has no {error.name} as "
        "expected. Install diffusers>=0.42,<0.43."
    ) from error


def attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All attention modules of a model that hold a processor, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Attention | MochiAttention | AttentionModuleMixin):
            yield name, module


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    backend: Any,
    parallel_config: Any,
) -> Tensor:
    """Full attention through diffusers' dispatcher, so that the user's attention backend is honoured.

    Tensors are (batch, heads, tokens, head_dim); the mask is what the stock processor of the family passes.
    """
    out = dispatch_attention_fn(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attention_mask,
        backend=backend,
        parallel_config=parallel_config,
    )
    return out.transpose(1, 2)


def ulysses(parallel_config: Any) -> bool:
    """Whether a context parallel configuration is pure Ulysses (no ring), which sparse attention supports."""
    config = parallel_config.context_parallel_config
    return config.ring_degree == 1 and config.ulysses_degree > 1


def parallel_degree(parallel_config: Any) -> int:
    """Ranks that share the tokens of one sequence."""
    config = None if parallel_config is None else parallel_config.context_parallel_config
    return 1 if config is None else config.ring_degree * config.ulysses_degree


def run_ulysses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parallel_config: Any,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Runs `attention` on full-length tensors of this rank's heads; in and out are this rank's tokens of all heads."""

    def forward(ctx, query, key, value, *args, _save_ctx=True, _parallel_config=None, **kwargs):
        return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    def backward(*args, **kwargs):
        raise UnsupportedError("sparse attention under context parallelism has no backward; train without it.")

    out = _templated_context_parallel_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        forward_op=forward,
        backward_op=backward,
        _parallel_config=parallel_config,
    )
    return out.transpose(1, 2)


def score_skip_active() -> bool:
    """Whether a guider (perturbed attention) replaces attention scores right now; only dense attention can obey it."""
    stack = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in stack)


@functools.cache
def register_skippable(processor: type, skipped_output: Callable[..., Any]) -> None:
    """Tells diffusers' layer skipping what `processor` returns when its attention is skipped."""
    AttentionProcessorRegistry.register(processor, AttentionProcessorMetadata(skip_processor_output_fn=skipped_output))


def register_skippable_as(processor: type, stock: type) -> None:
    """Layer skipping treats `processor` as it treats `stock`; nothing where diffusers does not know `stock` either."""
    try:
        metadata = AttentionProcessorRegistry.get(stock)
    except ValueError:
        return
    AttentionProcessorRegistry.register(processor, metadata)


def skipped_video(attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a skipped self-attention returns."""
    return hidden_states


def skipped_joint(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """What a skipped joint attention over video and text returns."""
    return hidden_states, encoder_hidden_states
