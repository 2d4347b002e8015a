"""A-STAR: the latents are nudged at each step so that the concepts' attention maps part and stay where they were.

Source: "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis" (ICCV 2023), sections 3
and 5. The step sizes, the smoothing and the second objective are those of "Attend-and-Excite" (arXiv 2301.13826), on
whose protocol the paper builds; how maps are normalised and masks made is chosen here, as the paper does not say.

A concept's map is the mean attention that its tokens get at each place of the latent grid. Two maps overlap by
pair(a, b) = sum min(a, b) / sum (a + b), from 0 (disjoint) to 0.5 (equal). The segregation loss is the sum of pair
over all pairs of concepts; the retention loss is the sum of 1 - pair(map, mask of one step earlier).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc.errors import SettingsError

EPSILON = 1e-6
FLAT = 1e-6  # a map whose values span no more than this shows nothing
OBJECTIVES = ("a_star", "attend_and_excite")
MAP_NORMS = ("minmax", "none")
MASK_SOURCES = ("grad", "denoise")
TOKEN_SOFTMAX = ("off", "tokens", "words")


@dataclass(frozen=True, kw_only=True)
class AStarSettings:
    """How the latents are updated. `scale_factor` is what needs tuning for a model: 20, 50, 100 and more.

    Args:
        objective: "a_star", or "attend_and_excite" as a baseline: the most neglected concept's peak is raised.
        lambda_seg, lambda_ret: weights of the segregation and retention loss, at least 0.
        scale_factor: step size at the first step, at least 0. Watch `log_loss_change`; 2 to 10 percent per step suit.
        scale_range: from the first to the last step the step size is scale_factor * sqrt of a line between these two.
        update_window: fractions of the steps from and up to which latents are updated; (0.0, 0.5) is cheaper.
        map_norm: "minmax" stretches each map to 0 to 1, which strengthens weak concepts; "none" is the paper's text.
        smoothing: smooth maps with a 3 x 3 Gaussian.
        tau: places of a map stretched to 0 to 1 from here on are its mask for the next step.
        max_rel_step: RMS of an update at most this multiple of the latents' RMS; None for no limit.
        mask_source: masks from the pass with gradients ("grad") or from the ordinary one ("denoise").
        refine: {step: (target, most)}: at this step repeat the update, at most so often, while the mean pair overlap
            (for attend_and_excite the loss) is above the target.
        attention_resolution: (rows, columns) of the layers whose maps are read; None is the latents' size / 4,
            rounded up.
        token_softmax: "off"; "tokens" sharpens the maps by a softmax over all tokens but the first and last of the
            sequence, "words" also leaves out all from the end-of-text token on, as suits SD 2.1. None is "off" for
            a_star (it would hide overlap) and "tokens" for attend_and_excite.
        log_loss_change: also measure how much each update lowers the loss, by one more pass per step.

    Raises:
        SettingsError: a value is out of its range.
    """

    objective: str = "a_star"
    lambda_seg: float = 1.0
    lambda_ret: float = 1.0
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)
    update_window: tuple[float, float] = (0.0, 1.0)
    map_norm: str = "minmax"
    smoothing: bool = True
    tau: float = 0.5
    max_rel_step: float | None = 0.25
    mask_source: str = "grad"
    refine: Mapping[int, tuple[float, int]] = field(default_factory=dict)
    attention_resolution: tuple[int, int] | None = None
    token_softmax: str | None = None
    log_loss_change: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("objective", OBJECTIVES),
            ("map_norm", MAP_NORMS),
            ("mask_source", MASK_SOURCES),
            ("token_softmax", (None, *TOKEN_SOFTMAX)),
        ):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name}={getattr(self, name)!r}; expected one of {known}. Choose one of these.")
        for name in ("lambda_seg", "lambda_ret", "scale_factor"):
            if not _in_range(getattr(self, name), 0.0, math.inf):
                raise SettingsError(f"{name}={getattr(self, name)!r}; expected a number of at least 0. Change it.")
        if not _is_pair(self.scale_range) or not all(_in_range(v, 0.0, math.inf) for v in self.scale_range):
            raise SettingsError(f"scale_range={self.scale_range!r}; expected two numbers of at least 0, (1.0, 0.5).")
        window = self.update_window
        if not _is_pair(window) or not all(_in_range(v, 0.0, 1.0) for v in window) or window[0] > window[1]:
            raise SettingsError(
                f"update_window={window!r}; expected fractions of the steps, 0.0 <= start <= stop <= 1.0; "
                "(0.0, 0.5) is the first half. Change it."
            )
        if not _in_range(self.tau, 0.0, 1.0) or self.tau == 0:
            raise SettingsError(f"tau={self.tau!r}; expected a number above 0 and up to 1. 0.5 is the default.")
        if self.max_rel_step is not None and (not _in_range(self.max_rel_step, 0.0, math.inf) or not self.max_rel_step):
            raise SettingsError(f"max_rel_step={self.max_rel_step!r}; expected a number above 0, or None for no limit.")
        for step, goal in self.refine.items():
            possible = _is_pair(goal) and _in_range(goal[0], 0.0, math.inf) and _is_count(goal[1], 1)
            if not possible or not _is_count(step, 0):
                raise SettingsError(
                    f"refine has {step!r}: {goal!r}; expected step: (target of at least 0, most repeats, at least 1). "
                    "Write it as in {0: (0.1, 5)}."
                )
        size = self.attention_resolution
        if size is not None and not (_is_pair(size) and all(_is_count(v, 1) for v in size)):
            raise SettingsError(f"attention_resolution={size!r}; expected (rows, columns) or None, which is a quarter.")

    @property
    def softmax(self) -> str:
        """`token_softmax` with its default filled in."""
        return self.token_softmax or ("off" if self.objective == "a_star" else "tokens")

    def step_size(self, step: int, steps: int) -> float:
        """alpha of step `step` of `steps`."""
        first, last = self.scale_range
        return self.scale_factor * math.sqrt(first + (last - first) * step / max(steps - 1, 1))

    def updates(self, step: int, steps: int) -> bool:
        """Whether latents are updated at this step."""
        start, stop = (math.ceil(fraction * steps - 1e-9) for fraction in self.update_window)
        return start <= step < stop


def pair(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of maps (..., rows, columns) of values from 0 on: 0 if disjoint, 0.5 if equal. Paper, equation 2."""
    return torch.minimum(a, b).sum((-2, -1)) / ((a + b).sum((-2, -1)) + EPSILON)


def smooth(maps: Tensor) -> Tensor:
    """Maps (..., rows, columns) under a 3 x 3 Gaussian of standard deviation 0.7071, reflected at the borders."""
    side = math.exp(-1.0)
    line = maps.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    flat = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(flat, (line[:, None] * line)[None, None]).view(maps.shape)


def minmax(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (..., rows, columns) stretched to 0 to 1 by constants, and which of them show something, (...)."""
    low, high = (ends[..., None, None] for ends in (maps.detach().amin((-2, -1)), maps.detach().amax((-2, -1))))
    shows = high - low > FLAT
    return (maps - low) / torch.where(shows, high - low, 1.0), shows[..., 0, 0]


def capped(step: Tensor, latents: Tensor, limit: float | None) -> Tensor:
    """`step` (batch, ...), scaled down per image to an RMS of `limit` times that of the latents."""
    if limit is None:
        return step
    share = limit * rms(latents) / rms(step).clamp_min(torch.finfo(step.dtype).tiny)
    return step * share.clamp_max(1.0).view(-1, *[1] * (step.ndim - 1))


def rms(values: Tensor) -> Tensor:
    """Root mean square per image, (batch,)."""
    return values.flatten(1).square().mean(1).sqrt()


def _in_range(value: object, low: float, high: float) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and low <= value <= high


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
