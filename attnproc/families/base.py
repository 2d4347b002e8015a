"""What all model families share: the processor that sits on one attention module, and what a family must say."""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnproc import compat
from attnproc.errors import AttnProcError, SettingsError, UnsupportedError
from attnproc.kernels import block_sparse_attention, choose_backend
from attnproc.layout import AttentionCall, Grid, TokenLayout
from attnproc.processor import Dense

if TYPE_CHECKING:
    from attnproc.context import RunContext, Site


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
        copied = type(self)()  # the copied context binds it
        copied._attention_backend, copied._parallel_config = self._attention_backend, self._parallel_config
        return copied

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
        if self.context is not None:
            query, key, value = autocast(query, key, value)
            if torch.compiler.is_compiling():
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
        def dense() -> Tensor:
            return self._dense(query, key, value, attention_mask, text_valid, text_tokens)

        if self.context is None:
            return dense()
        obstacle = ""
        if attention_mask is not None and text_valid is None:
            obstacle = "the model passes an attention mask that is not text padding"
        elif self._ranks() > 1 and (text_tokens or not compat.ulysses(self._parallel_config)):
            obstacle = "context parallelism is supported as Ulysses on video-only attention"
        tokens = query.shape[2] * self._ranks()
        layout = self._layout(query, key, value, tokens, text_tokens, text_valid, obstacle)
        return self._answer(query, key, value, layout, text_first, dense)

    def _layout(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: int,
        text_tokens: int,
        text_valid: Tensor | None,
        obstacle: str,
    ) -> TokenLayout | Dense:
        """The layout to plan for, or why this call is dense before the method is asked."""
        assert self.context is not None
        processor, step = self.context.processor, self.context.step
        grid = self._grid(tokens)
        reason = obstacle
        if not reason and grid is None:
            reason = f"where video and text tokens of a {self.context.family.name} sit is not known"
        elif not reason and math.prod(grid) + text_tokens != tokens:  # type: ignore[arg-type]
            reason = (
                f"the latent grid {grid} has {math.prod(grid)} tokens and the text {text_tokens}, "  # type: ignore[arg-type]
                f"but attention has {tokens}"
            )
        elif not reason and processor.quantization and _need_gradients(query, key, value):
            reason = f"gradients are on and quantization={processor.quantization!r} has no backward pass"
        elif not reason and compat.score_skip_active():
            reason = "a guider replaces the attention scores"
        if reason and step.total is None:
            return Dense("" if processor.is_dense_layer(self.layer) else reason)
        dense_step = processor.is_dense_step(step)
        asked_for = dense_step or processor.is_dense_layer(self.layer)
        if reason:
            told_early = processor.strict and step.index == 0  # not only when the dense first steps are over
            return Dense("" if asked_for and not (dense_step and told_early) else reason)
        layout = TokenLayout(grid, text_tokens, text_valid)  # type: ignore[arg-type]
        if step.index == 0:
            if processor.strict and (reason := processor.dense_reason(layout)):
                return Dense(reason)
            processor.check(layout)
            if self.layer == 0:
                processor.check_model(layout, self.context.denoiser, query.shape[1] // self._ranks(), query.shape[3])
            self._check_backend(query, layout)
        return Dense() if asked_for else layout

    def _check_backend(self, query: Tensor, layout: TokenLayout) -> None:
        """Finds out as a run starts, not when its dense steps are over, whether the backend can take the masks."""
        assert self.context is not None
        processor = self.context.processor
        mask = processor.mask(layout) if self.layer == 0 else None
        if mask is None or processor.predicted_density(layout) == 1.0:
            return
        if self._ranks() > 1:  # as it will be when the ranks have exchanged tokens for heads
            query = query[:, : query.shape[1] // self._ranks(), :1].expand(-1, -1, layout.tokens, -1)
        try:
            choose_backend(query, query, query, mask, processor.backend, quantization=processor.quantization)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout | Dense,
        text_first: bool,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """Runs a call: sparse if there is a layout and the method wants it, else `dense`."""
        assert self.context is not None
        site = self.context.sites[self.layer]
        out: Tensor | Dense
        with torch.autocast(query.device.type, enabled=False):  # statistics and sums are float32
            if isinstance(layout, Dense):
                out = layout
            elif self._ranks() > 1:
                out = self._ulysses(query, key, value, layout, site)
            elif text_first:
                q, k, v = (_text_last(t, layout.text_tokens) for t in (query, key, value))
                out = self._sparse(q, k, v, layout, site)
                out = out if isinstance(out, Dense) else _text_first(out, layout.text_tokens)
            else:
                out = self._sparse(query, key, value, layout, site)
        if not isinstance(out, Dense):
            return out
        self._count_dense(site, out)
        with site.stats.timed("attention", query.device):
            return dense()

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, site: "Site") -> Tensor | Dense:
        """Plans and runs a call on whole sequences in the order [video | text]."""
        assert self.context is not None
        context = self.context
        call = AttentionCall(
            query,
            key,
            value,
            layout,
            context.step,
            self.layer,
            context.denoiser,
            context.cache,
            context.state(self.layer),
        )
        # What a method keeps must also serve a training step, which cannot save tensors made in inference mode.
        with site.stats.timed("planning", query.device), torch.inference_mode(False), torch.no_grad():
            plan = context.processor.plan(call)
        if isinstance(plan, Dense):
            return plan
        if plan.skip_threshold is not None and _need_gradients(query, key, value):
            return Dense("gradients are on and skipping blocks in the kernel has no backward pass")
        site.stats.sparse_calls += 1
        site.stats.add_density(plan.mask)
        with site.stats.timed("attention", query.device):
            out, lse = block_sparse_attention(
                query,
                key,
                value,
                plan.mask,
                return_lse=True,
                token_order=plan.token_order,
                skip_threshold=plan.skip_threshold,
                quantization=context.processor.quantization,
                backend=context.processor.backend,
            )
        if context.processor.check_finite:
            self._check_finite(out, query, key, value, site)
        if plan.after is not None:
            with site.stats.timed("planning", query.device), torch.inference_mode(False), torch.no_grad():
                plan.after(lse)
        return out

    def _check_finite(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, site: "Site") -> None:
        if bool(out.isfinite().all()):
            return
        assert self.context is not None
        inputs = {"query": query, "key": key, "value": value}
        bad = [name for name, tensor in inputs.items() if not bool(tensor.isfinite().all())]
        step = self.context.step
        raise AttnProcError(
            f"{site.name} at step {step.index}, branch {step.branch}, gave values that are not finite; its "
            + (f"{' and '.join(bad)} had some already. " if bad else "inputs were finite. ")
            + "Expected finite numbers. Look for the fault before attention, or try float32 and quantization=None."
        )

    def _ulysses(self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, site: "Site") -> Tensor:
        """As `_sparse`; each rank plans for the whole sequence of its heads."""

        def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = self._sparse(query, key, value, layout, site)
            if not isinstance(out, Dense):
                return out
            self._count_dense(site, out)
            with site.stats.timed("attention", query.device):
                return F.scaled_dot_product_attention(query, key, value)

        return compat.run_ulysses(query, key, value, self._parallel_config, whole)

    def _count_dense(self, site: "Site", decision: Dense) -> None:
        assert self.context is not None
        if decision.reason:
            self.context.fall_back(site, decision.reason)
        site.stats.dense_calls += 1

    def _dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        text_valid: Tensor | None,
        text_tokens: int,
    ) -> Tensor:
        """Full attention as the stock processor of the family computes it."""
        return compat.dense_attention(query, key, value, attention_mask, self._attention_backend, self._parallel_config)

    def _grid(self, tokens: int) -> Grid | None:
        """Latent grid of a call with this many tokens."""
        assert self.context is not None
        return self.context.step.grid

    def _ranks(self) -> int:
        return compat.parallel_degree(self._parallel_config)


class Family:
    """What is particular to a model family: its models, where its processors go, and the latent grid of a call."""

    name: ClassVar[str]
    #: class names of the models, so that nothing of diffusers is imported to recognise them
    models: ClassVar[tuple[str, ...]] = ()
    #: processor for the attention modules of `sites`
    site: ClassVar[type[SiteProcessor]]
    #: whether timesteps grow from step to step, as they do in Mochi alone
    timesteps_rise: ClassVar[bool] = False

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Names and modules of the self- or joint attentions over all video tokens, in the order of the model."""
        raise NotImplementedError

    def site_for(self, model: nn.Module, module: Any) -> SiteProcessor:
        """A fresh, unbound processor for one of the modules of `sites`."""
        site = self.site()
        site._attention_backend = getattr(module.processor, "_attention_backend", None)
        site._parallel_config = getattr(model, "_parallel_config", None)
        return site

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid | None:
        """Latent grid (T, H, W) after patching of a call with these arguments, or None if it is not known."""
        raise NotImplementedError

    def timestep(self, arguments: Mapping[str, Any]) -> Any:
        """The timestep of a call on the scale of the scheduler, a tensor or number."""
        return arguments.get("timestep")


# What happens inside changes from step to step, so a CUDA graph must not replay it.
@torch.library.custom_op("attnproc::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
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


@_attend_op.register_autograd
def _(ctx, gradient):
    raise UnsupportedError(
        "attention under torch.compile got a gradient; expected inference. Train uncompiled, where sparse attention is "
        "differentiable, or take the processor off with attnproc.uninstall."
    )


def _need_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as autocast hands them to the stock attention: all in its dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _text_last(tensor: Tensor, text_tokens: int) -> Tensor:
    return torch.cat([tensor[:, :, text_tokens:], tensor[:, :, :text_tokens]], dim=2)


def _text_first(tensor: Tensor, text_tokens: int) -> Tensor:
    video = tensor.shape[2] - text_tokens
    return torch.cat([tensor[:, :, video:], tensor[:, :, :video]], dim=2)
