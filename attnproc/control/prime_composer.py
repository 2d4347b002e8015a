"""PrimeComposer: an object composed into a picture by steering the attention of the model that draws it.

Source: "PrimeComposer: Faster Progressively Combined Diffusion for Image Composition with Attention Steering" (ACM MM
2024, arXiv 2403.05053). Where paper and released code differ, this follows the paper: in the released code the
region-constrained cross-attention is never active and the correlation diffuser asks with the wrong queries.

At each of the first steps the model runs a second time, on the object inside the background (the composite) and on the
object alone (the canvas). There every position attends to the object's tokens only, and the scaled scores of that
attention, L (tokens, object tokens), are kept. The next evaluation of the conditional row then takes L for its own
scores against object keys, and L transposed for the scores of object queries; its values stay its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc.control.masks import token_mask
from attnproc.control.prime_composer_geometry import Placement
from attnproc.control.unet import attention_layers, finish, grid_of, project
from attnproc.errors import AttnProcError, SettingsError
from attnproc.kernels import BlockMask, block_sparse_attention, merge_attention

CD_QUERIES = ("composite", "object")
SCHEDULES = ("full", "release")
BLOCK_SIZE = (64, 64)  # of the attention of the other tokens among themselves, which is dense
# Published settings by what the object, a photo, is put into.
PRESETS: dict[str, dict[str, Any]] = {
    "photo": {"tau_a": 0.3, "tau_c": 0.1},
    "painting": {"tau_a": 0.3, "tau_c": 0.2},
    "sketch": {"tau_a": 0.6, "tau_c": 0.3},
    "cartoon": {"tau_a": 0.4, "tau_c": 0.3},
}


@dataclass(frozen=True, kw_only=True)
class PrimeComposerSettings:
    """How PrimeComposer steers.

    Args:
        tau_a: share of the evaluations into which the object's correlations are infused (alpha in the paper).
        tau_b: share of the evaluations before which everything outside the box is set back to the background at that
            noise level. The published value is 0.8, which leaves the last steps free; with 1.0, the default, and
            `blend_last` the background stays as it was.
        tau_c: share of the evaluations before which the object itself is set back to its reference; at most tau_b.
        blend_last: sets the final latents outside the box to the encoded background, to the last bit.
        extended_guidance: weight w of a third guidance term, the infused prediction minus the one without infusion;
            costs one more row in each infused evaluation. 0 is off.
        cd_query: which stream of the correlation diffuser asks: "composite" as in the paper, or "object" as in the
            released code.
        schedule: "full" also blends before the second evaluation of a solver of order two; "release" does not.
        solver: "dpm" (DPM-Solver++(2M)) or "ddim", for inversion and generation alike.
        reset_history_on_paste: a multistep solver forgets its earlier predictions where the object is set back.
        inversion_prompt: condition of the inversion; None is TF-ICON's exceptional prompt where the vocabulary has
            its token, else the empty prompt.
    """

    tau_a: float = 0.3
    tau_b: float = 1.0
    tau_c: float = 0.1
    blend_last: bool = True
    extended_guidance: float = 0.0
    cd_query: str = "composite"
    schedule: str = "full"
    solver: str = "dpm"
    reset_history_on_paste: bool = False
    inversion_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("tau_a", "tau_b", "tau_c"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise SettingsError(f"{name}={value!r}; expected a share of the steps from 0 to 1. Choose one.")
        if self.tau_c > self.tau_b:
            raise SettingsError(
                f"tau_c={self.tau_c} is above tau_b={self.tau_b}; expected at most tau_b, as a paste also blends. "
                "Lower tau_c."
            )
        if not _is_number(self.extended_guidance) or self.extended_guidance < 0:
            raise SettingsError(
                f"extended_guidance={self.extended_guidance!r}; expected a number of at least 0. The guidance scale is "
                "a good value to try."
            )
        for name, known in (("cd_query", CD_QUERIES), ("schedule", SCHEDULES), ("solver", ("dpm", "ddim"))):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(known)}. Choose one.")
        for name in ("blend_last", "reset_history_on_paste"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name}={getattr(self, name)!r}; expected True or False. Choose one.")
        if not isinstance(self.inversion_prompt, str | None):
            raise SettingsError(f"inversion_prompt={self.inversion_prompt!r}; expected a text or None. Pass one.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Published settings for an object put into a "photo", "painting", "sketch" or "cartoon"."""
        if name not in PRESETS:
            raise SettingsError(f"preset {name!r} is not known; expected one of {', '.join(PRESETS)}. Choose one.")
        return cls(**{**PRESETS[name], **overrides})


# -- schedule and guidance ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What happens around one evaluation: `before` is what the latents are set to first, if anything."""

    infuse: bool
    before: str | None  # "paste", "blend"


def steps_of(settings: PrimeComposerSettings, steps: int, order: int) -> list[Step]:
    """The plan of a run, noisiest evaluation first; order is the solver's."""

    def end(tau: float) -> int:
        return int(tau * steps + 1 - order + 1e-9)  # 50 * 0.58 is 28.999...

    first = 1 if settings.schedule == "full" and settings.tau_b > 0 else order
    plan = []
    for k in range(steps):
        before = None
        if order <= k < end(settings.tau_c):
            before = "paste"
        elif first <= k < order or order <= k < end(settings.tau_b):
            before = "blend"
        plan.append(Step(k < order or k < end(settings.tau_a), before))
    return plan


def guided(uncond: Tensor | None, infused: Tensor, cond: Tensor, scale: float, extended: float) -> Tensor:
    """Classifier-free guidance with the extended term: `cond` is the conditional prediction without infusion.

    Works on what the model predicts, noise or velocity. Without an unconditional row the infused one stands alone.
    """
    plain = infused if uncond is None else uncond + scale * (infused - uncond)
    return plain + extended * (infused - cond)


# -- attention ---------------------------------------------------------------------------------------------------------


def correlations(query: Tensor, keys: Tensor) -> Tensor:
    """L: scaled scores, float32, of queries (B, H, N, D) against the object's keys (B, H, m, D), object row-major."""
    return (query.float() @ keys.float().mT) / math.sqrt(query.shape[-1])


def infused_attention(
    query: Tensor, key: Tensor, value: Tensor, logits: Tensor, subject: Tensor, rest: Tensor
) -> Tensor:
    """Attention whose scores against object keys are L, and those of object queries L transposed (which wins).

    Never makes a score for every pair: the other queries merge their own attention to the other keys with L by
    log-sum-exp.

    Args:
        query, key, value: (B, H, N, D).
        logits: L, float32 (B, H, N, m).
        subject: token indices (m,) of the object at the target, ascending, as in the columns of L.
        rest: all other token indices, (N - m,).

    Returns:
        (B, H, N, D) in the dtype of query.
    """
    out = torch.empty_like(query)
    out[:, :, subject] = (logits.mT.softmax(-1) @ value.float()).to(query.dtype)
    if len(rest):
        every = BlockMask.full(len(rest), len(rest), BLOCK_SIZE, device=query.device)
        own = block_sparse_attention(query[:, :, rest], key[:, :, rest], value[:, :, rest], every, return_lse=True)
        given = logits[:, :, rest]
        steered = (given.softmax(-1) @ value[:, :, subject].float()).to(query.dtype)
        out[:, :, rest] = merge_attention(own, (steered, given.logsumexp(-1)))[0]
    return out


def text_mask(inside: Tensor, subject_tokens: tuple[int, ...], text_length: int) -> Tensor:
    """Region-constrained cross-attention: boolean (1, 1, N, text tokens), True where a query may look.

    Only queries inside the object (boolean (N,)) see the tokens of its words.
    """
    allowed = torch.ones(1, 1, len(inside), text_length, dtype=torch.bool, device=inside.device)
    allowed[..., list(subject_tokens)] = inside[:, None]
    return allowed


# -- processors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Of one grid: indices of the object's tokens, of all others, of the box's, and who is inside for the text."""

    subject: Tensor
    rest: Tensor
    box: Tensor
    inside: Tensor


@dataclass
class Steering:
    """What the processors of one composition share.

    Args:
        placement: of the object.
        grid: rows and columns of the latents.
        subject_tokens: of the prompt, for the region-constrained cross-attention; none disables it.
        cd_query: as in `PrimeComposerSettings`.

    The loop sets `rows`, what each row of the batch is, before it calls the model: "composite" and "canvas" for the
    correlation diffuser, which fills `logits`; "infused", "cond" and "uncond" for the generator; nothing for a run
    without steering.
    """

    placement: Placement
    grid: tuple[int, int]
    subject_tokens: tuple[int, ...] = ()
    cd_query: str = "composite"
    rows: tuple[str, ...] = ()
    logits: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = cache(self._tokens)

    def processors(self, unet: Any) -> dict[str, Any]:
        """One processor per attention layer, by the layer's full name."""
        cross = CrossAttnProcessor(self)
        return {name: SelfAttnProcessor(self, name) for name in attention_layers(unet, "attn1")} | dict.fromkeys(
            attention_layers(unet, "attn2"), cross
        )

    def _tokens(self, count: int, device: torch.device) -> Tokens:
        grid = grid_of(count, *self.grid)
        cells = self.placement.object_cells(*grid).flatten()
        box = self.placement.box_cells(*grid).flatten()
        # An object that fills no cell of a coarse grid may still be named in the one that it covers most.
        inside = token_mask(self.placement.silhouette, *grid).flatten()
        subject, rest, area = (part.nonzero().flatten().to(device) for part in (cells, ~cells, box))
        return Tokens(subject, rest, area, inside.to(device))


class SelfAttnProcessor:
    """Self-attention of the generator and of the correlation diffuser."""

    def __init__(self, steering: Steering, name: str):
        self.steering, self.name = steering, name

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        given = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        rows = self.steering.rows
        if "composite" in rows:
            return finish(attn, self._capture(given.query, given.key, given.value), given)
        out = F.scaled_dot_product_attention(given.query, given.key, given.value, attn_mask=given.mask)
        if "infused" in rows and self.name in self.steering.logits:
            tokens = self.steering.tokens(given.query.shape[2], given.query.device)
            row = slice(rows.index("infused"), rows.index("infused") + 1)
            out[row] = infused_attention(
                given.query[row],
                given.key[row],
                given.value[row],
                self.steering.logits[self.name],
                tokens.subject,
                tokens.rest,
            )
        return finish(attn, out, given)

    def _capture(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of both streams to the canvas's object; keeps L."""
        tokens = self.steering.tokens(query.shape[2], query.device)
        if self.steering.cd_query == "object":
            query = query[1:].expand_as(query)
        # Without an object token at a coarse grid the box stands in, and nothing is infused there.
        seen = tokens.subject if len(tokens.subject) else tokens.box
        key, value = key[1:, :, seen], value[1:, :, seen]
        if len(tokens.subject):
            logits = correlations(query[:1], key)
            if not logits.isfinite().all():
                raise AttnProcError(
                    f"{self.name}: the scores of the correlation diffuser are not finite ({query.dtype}); expected "
                    "finite ones. Load the model in bfloat16 or float32."
                )
            self.steering.logits[self.name] = logits
        key, value = (tensor.expand(2, -1, -1, -1) for tensor in (key, value))
        return F.scaled_dot_product_attention(query, key, value)


class CrossAttnProcessor:
    """Cross-attention in which only the object's place sees the object's words, in the conditional rows."""

    def __init__(self, steering: Steering):
        self.steering = steering

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        given = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        rows = self.steering.rows
        bound = [i for i, row in enumerate(rows) if row in ("infused", "cond")] if self.steering.subject_tokens else []
        out = F.scaled_dot_product_attention(given.query, given.key, given.value, attn_mask=given.mask)
        if bound:
            tokens = self.steering.tokens(given.query.shape[2], given.query.device)
            allowed = text_mask(tokens.inside, self.steering.subject_tokens, given.key.shape[2])
            out[bound] = F.scaled_dot_product_attention(
                given.query[bound], given.key[bound], given.value[bound], attn_mask=allowed
            )
        return finish(attn, out, given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
