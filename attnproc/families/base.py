"""What all model families share: the processor that sits on one attention module, and what a family must say."""

import functools
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from attnproc import compat
from attnproc.kernels import block_sparse_attention
from attnproc.layout import AttentionCall, Grid, TokenLayout
from attnproc.processor import Dense, Plan

if TYPE_CHECKING:
    from attnproc.context import RunContext


class SiteProcessor:
    """The processor on one attention module: the stock projections of its family around `attend`.

    Holds no weights and no settings, and is made without arguments, because diffusers rebuilds processors that way;
    the run context binds it. Unbound it is the stock processor.
    """

    # diffusers sets these two on processors that have them: set_attention_backend, enable_parallelism.
    _attention_backend: Any = None
    _parallel_config: Any = None

    _bound: ClassVar[weakref.WeakValueDictionary[int, "SiteProcessor"]] = weakref.WeakValueDictionary()
    _ids: ClassVar[itertools.count] = itertools.count()

    def __init__(self) -> None:
        self.context: RunContext | None = None
        self.layer = -1
        # A tensor, so that a compiled block is not specialised on the number and compiled again for each layer.
        self.key = torch.tensor(next(self._ids))
        self._bound[int(self.key)] = self

    def __deepcopy__(self, memo: dict) -> "SiteProcessor":
        return type(self)()

    def bind(self, context: "RunContext", layer: int) -> None:
        """Connects to the run context of the denoiser as its `layer`-th site."""
        self.context, self.layer = context, layer

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attention_mask: Tensor | None = None,
        text_tokens: int = 0,
        text_first: bool = False,
        text_valid: Tensor | None = None,
    ) -> Tensor:
        """Answers one attention call, dense or sparse.

        Args:
            query, key, value: (batch, heads, tokens, head_dim) in the token order of the model.
            attention_mask: what the stock processor passes on; used by dense calls.
            text_tokens: text tokens in the sequence, padding included.
            text_first: whether they come before the video tokens.
            text_valid: int (batch,), valid text tokens of each sample; says all that `attention_mask` says.

        Returns:
            (batch, heads, tokens, head_dim).
        """
        if self.context is not None and torch.compiler.is_compiling():
            return torch.ops.attnproc.attend(
                query, key, value, attention_mask, text_valid, text_tokens, text_first, self.key
            )
        return self._attend(query, key, value, attention_mask, text_valid, text_tokens, text_first)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        text_valid: Tensor | None,
        text_tokens: int,
        text_first: bool,
    ) -> Tensor:
        if self.context is None:
            return self._dense(query, key, value, attention_mask)
        site = self.context.sites[self.layer]
        ordered: tuple[Tensor, ...] = (query, key, value)
        decision: Plan | Dense | TokenLayout = self._before_planning(
            query, key, value, attention_mask, text_valid, text_tokens
        )
        if isinstance(decision, TokenLayout):
            if text_first:
                ordered = tuple(_text_last(t, text_tokens) for t in ordered)
            with site.stats.timed("planning", query.device):
                decision = self.context.processor.plan(self._call(ordered, decision))
        if isinstance(decision, Dense):
            if decision.reason:
                self.context.fall_back(site, decision.reason)
            site.stats.dense_calls += 1
            with site.stats.timed("attention", query.device):
                return self._dense(query, key, value, attention_mask)
        assert isinstance(decision, Plan)
        site.stats.sparse_calls += 1
        site.stats.densities.append(decision.mask.density)
        with site.stats.timed("attention", query.device):
            out = self._sparse(*ordered, decision)
        return _text_first(out, text_tokens) if text_first else out

    def _before_planning(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        text_valid: Tensor | None,
        text_tokens: int,
    ) -> Dense | TokenLayout:
        """The layout to plan for, or why this call is dense before the method is asked."""
        assert self.context is not None
        processor, step = self.context.processor, self.context.step
        tokens = query.shape[2] * self._ranks()
        reason = ""
        if step.grid is None:
            reason = f"the latent grid of family {self.context.family.name!r} is not known"
        elif math.prod(step.grid) + text_tokens != tokens:
            reason = (
                f"the latent grid {step.grid} has {math.prod(step.grid)} tokens and the text {text_tokens}, "
                f"but attention has {tokens}"
            )
        elif attention_mask is not None and text_valid is None:
            reason = "the model passes an attention mask that is not text padding"
        elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            reason = "gradients are on and the sparse kernels have no backward yet"
        elif compat.score_skip_active():
            reason = "a guider replaces the attention scores"
        elif self._ranks() > 1 and (text_tokens or not compat.ulysses(self._parallel_config)):
            reason = "context parallelism is supported as Ulysses on video-only attention"
        dense_step = processor.is_dense_step(step)
        if reason:
            asked_for = dense_step and not (processor.strict and step.index == 0)
            return Dense("" if asked_for or processor.is_dense_layer(self.layer) else reason)
        layout = TokenLayout(step.grid, text_tokens, text_valid)  # type: ignore[arg-type]
        if step.index == 0:
            processor.check(layout)  # not only when the dense first steps are over
        return Dense() if dense_step or processor.is_dense_layer(self.layer) else layout

    def _call(self, ordered: tuple[Tensor, ...], layout: TokenLayout) -> AttentionCall:
        assert self.context is not None
        query, key, _ = ordered
        context = self.context
        return AttentionCall(query, key, layout, context.step, self.layer, context.cache, context.state(self.layer))

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        return compat.dense_attention(query, key, value, attention_mask, self._attention_backend, self._parallel_config)

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Tensor:
        assert self.context is not None
        attention = functools.partial(block_sparse_attention, mask=plan.mask, backend=self.context.processor.backend)
        if self._ranks() > 1:
            return compat.run_ulysses(query, key, value, self._parallel_config, attention)
        return attention(query, key, value)

    def _ranks(self) -> int:
        return 1 if self._parallel_config is None else compat.parallel_degree(self._parallel_config)


class Family:
    """What is particular to a model family: its models, where its processors go, and the latent grid of a call."""

    name: ClassVar[str]
    #: class names of the models, so that nothing of diffusers is imported to recognise them
    models: ClassVar[tuple[str, ...]]
    #: processor for the attention modules of `sites`
    site: ClassVar[type[SiteProcessor]]

    def sites(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of the self- or joint attentions over all video tokens, in the order they run."""
        raise NotImplementedError

    def site_for(self, module: nn.Module) -> SiteProcessor:
        """A fresh, unbound processor for one of the modules of `sites`."""
        return self.site()

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid | None:
        """Latent grid (T, H, W) after patching of a call with these arguments."""
        raise NotImplementedError

    def timestep(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """The timestep of a call on the scale of the scheduler."""
        return arguments.get("timestep")


@torch.library.custom_op("attnproc::attend", mutates_args=())
def _attend_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    text_valid: Tensor | None,
    text_tokens: int,
    text_first: bool,
    site: Tensor,
) -> Tensor:
    """One opaque op for torch.compile: whether a call is dense, and all that planning needs, is decided inside."""
    processor = SiteProcessor._bound[int(site)]
    out = processor._attend(query, key, value, attention_mask, text_valid, text_tokens, text_first)
    return out.contiguous()


@_attend_op.register_fake
def _(query, key, value, attention_mask, text_valid, text_tokens, text_first, site):
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _text_last(tensor: Tensor, text_tokens: int) -> Tensor:
    return torch.cat([tensor[:, :, text_tokens:], tensor[:, :, :text_tokens]], dim=2)


def _text_first(tensor: Tensor, text_tokens: int) -> Tensor:
    video = tensor.shape[2] - text_tokens
    return torch.cat([tensor[:, :, video:], tensor[:, :, :video]], dim=2)
