"""What one attention call looks like: where video and text tokens sit, and which step of the run it is."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnproc.kernels.once import once

Grid = tuple[int, int, int]


def _lengths(valid: Tensor) -> tuple[int, ...]:
    return tuple(valid.tolist())


def _keys(valid: Tensor, video: int) -> Tensor:
    return (valid + video).int()


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Tokens of one self- or joint attention, in the order [video | text].

    Families whose model puts text first are brought into this order before a method sees them.

    Attributes:
        grid: latent grid (T, H, W) after patching; token = (t * H + y) * W + x.
        text_tokens: text tokens behind the video tokens, padding included.
        text_valid: int tensor (batch,), valid text tokens of each sample (a prefix of the text), or None for all.
    """

    grid: Grid
    text_tokens: int = 0
    text_valid: Tensor | None = None

    @property
    def video_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def text_lengths(self) -> tuple[int, ...] | None:
        """Valid text tokens of each sample as numbers, None for all; waits for the device once in a model's forward."""
        return None if self.text_valid is None else once(self.text_valid, _lengths)

    @property
    def key_valid(self) -> Tensor | None:
        """Valid keys of each sample, int32 (batch,), or None when every key is valid."""
        return None if self.text_valid is None else once(self.text_valid, _keys, self.video_tokens)


@dataclass(frozen=True)
class Step:
    """Where in the run a denoiser call is.

    Attributes:
        index: 0-based index over the scheduler's steps, counted over the whole run (also across two experts).
        total: steps of the run, or None when nothing tells it.
        branch: classifier-free guidance branch: "cond", "uncond", or "cond_uncond" for both in one batch; models that
            name none count their calls within a step ("call0", "call1").
        grid: latent grid of the call, or None when the family does not know it.
    """

    index: int
    total: int | None
    branch: str
    grid: Grid | None


@dataclass(frozen=True)
class Denoiser:
    """The model a call belongs to.

    Attributes:
        name: its place in the pipeline: "transformer", "transformer_2" or "unet"; empty for a bare model.
        model: class name, such as "WanTransformer3DModel".
        layers: attention sites.
    """

    name: str
    model: str
    layers: int


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """All that a method may use to plan one attention call.

    Attributes:
        query, key, value: (batch, heads, tokens, head_dim) after normalisation and rotary embedding, order
            [video | text].
        layout: where video and text are.
        step: step and branch.
        layer: index of the attention site in the order of the model.
        denoiser: whose call it is.
        cache: constants of this denoiser, keyed by value (grid, settings, device); lives until uninstalled.
        state: what the method remembers for this (layer, branch); emptied when a run starts and when it ends.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    step: Step
    layer: int
    denoiser: Denoiser
    cache: dict[Any, Any] = field(repr=False)
    state: dict[Any, Any] = field(repr=False)
