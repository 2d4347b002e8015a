"""Every other model: the stock processor runs as it is, and its scaled_dot_product_attention call is answered here.

Eager only: `torch.compile` breaks its graph at these processors, and raises with `fullgraph=True`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnproc import compat
from attnproc.families.base import Family, SiteProcessor, autocast
from attnproc.layout import Grid
from attnproc.processor import Dense

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class GenericSite(SiteProcessor):
    """Wraps the stock processor of one attention module. `generic_site` makes the class for each stock class."""

    stock_class: ClassVar[Any]

    @property
    def stock(self) -> Any:
        """The processor that was on the module before."""
        return self.stock_class() if self.context is None else self.context.sites[self.layer].original

    # What diffusers sets goes to the stock processor, and only where that has it.
    @property
    def _attention_backend(self) -> Any:  # type: ignore[override]
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:  # type: ignore[override]
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config

    def __deepcopy__(self, memo: dict) -> "GenericSite":
        return type(self)()

    @torch.compiler.disable
    def run(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the stock processor, with its attention intercepted once there is a run context."""
        if self.context is None:
            return self.stock(attn, *args, **kwargs)
        with _Intercept(self) as intercept:
            out = self.stock(attn, *args, **kwargs)
        if not intercept.calls:
            site = self.context.sites[self.layer]
            self._count_dense(site, Dense("the attention backend in use does not call scaled_dot_product_attention"))
        return out

    def intercepted(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Answers one call of scaled_dot_product_attention."""
        assert self.context is not None
        call = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        query, key, value = autocast(call["query"], call["key"], call["value"])

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(*args, **kwargs)

        if query.shape[2] != key.shape[2]:
            return dense()  # cross-attention
        plain = call.get("attn_mask") is None and not call.get("dropout_p") and not call.get("is_causal")
        obstacle = ""
        if not plain or query.shape != key.shape or call.get("scale") not in (None, query.shape[-1] ** -0.5):
            obstacle = "the model calls attention with a mask, dropout, grouped heads or a scale of its own"
        elif compat.parallel_degree(getattr(self.stock, "_parallel_config", None)) > 1:
            obstacle = f"context parallelism is not supported for a {self.context.family.name}"
        family, tokens = self.context.family, query.shape[2]
        assert isinstance(family, Generic)
        grid = self._grid(tokens)
        text = tokens - grid[0] * grid[1] * grid[2] if grid and family.joint(self.context.sites[self.layer].name) else 0
        layout = self._layout(query, key, value, tokens, max(0, text), None, obstacle)
        return self._answer(query, key, value, layout, family.text_first, dense)

    def _grid(self, tokens: int) -> Grid | None:
        assert self.context is not None and isinstance(self.context.family, Generic)
        grid = super()._grid(tokens)
        return None if grid is None else self.context.family.grid_at(grid, tokens)

    def _ranks(self) -> int:
        return 1  # an intercepted call has whole sequences


class _Intercept(TorchFunctionMode):
    def __init__(self, site: GenericSite):
        super().__init__()
        self.site, self.calls = site, 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.site.intercepted(args, kwargs or {})


@functools.cache
def generic_site(stock_class: type) -> type[GenericSite]:
    """The site class around a stock processor class.

    It has the same call signature, because attention modules drop arguments that a processor does not name.
    """

    @functools.wraps(stock_class.__call__)
    def call(self: GenericSite, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(attn, *args, **kwargs)

    site = type(f"Generic{stock_class.__name__}", (GenericSite,), {"stock_class": stock_class, "__call__": call})
    compat.register_skippable_as(site, stock_class)
    return site


class Generic(Family):
    """A model that no other family describes: exact, and dense, because where its tokens sit is not known."""

    name = "model of this class"
    site = GenericSite
    text_first: ClassVar[bool] = False

    def sites(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in compat.attention_modules(model):
            processor = getattr(module, "processor", None)
            # Processors with weights are part of the model's state; cross-attention is nobody's business here.
            if processor is None or isinstance(processor, nn.Module) or getattr(module, "is_cross_attention", False):
                continue
            yield name, module

    def site_for(self, model: nn.Module, module: Any) -> SiteProcessor:
        return generic_site(type(module.processor))()  # type: ignore[arg-type]

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid | None:
        return None

    def grid_at(self, grid: Grid, tokens: int) -> Grid:
        """Grid of a site whose attention has `tokens` tokens, in a call with this latent grid."""
        return grid

    def joint(self, site: str) -> bool:
        """Whether text tokens sit beside the picture's in this attention."""
        return False
