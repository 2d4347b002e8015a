"""PAROAttention: every head sees the video in its own axis order, in which its attention is a few dense blocks.

Source: "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation
Models" (arXiv 2506.16054). Orders and block masks are found once, offline (`paro_calibration`), for one model at one
size; a run only looks them up. Video tokens travel with their positions: the permutation comes after the rotary
embedding and never leaves the attention. Text keeps its place behind the video and is never dropped.

Ours, as the paper leaves it open: masks live on the exact grid of the run with a ragged last block, slots over time are
looked up by the share of the run that is done, and steps at either end may stay dense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attnproc.calibration import Calibration
from attnproc.errors import SettingsError
from attnproc.kernels import BlockMask
from attnproc.layout import AttentionCall, Denoiser, Grid, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.bits import unpack_blocks

#: axis orders, the last letter fastest; where two are as good as each other, the first of this list is taken
ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
SLOT_POLICIES = ("half_shared", "uniform")
#: density of each quality: what the paper's benchmarks call safe, balanced and fast
DENSITIES = {"high": 0.5, "balanced": 0.3, "fast": 0.2}
# Expanded masks of a whole slot are kept up to this size; beyond it each call expands its own.
CACHED_MASK_BYTES = 512 * 2**20


@dataclass(kw_only=True)
class PAROAttnProcessor(AttnProcessor):
    """PAROAttention as a processor: axis order and static block mask of each head from a calibration file.

    Beside the settings of `AttnProcessor`:

    Args:
        calibration: the file that `attnproc calibrate` made for this model and size. Without one the processor can
            say what density to expect, and nothing else.
        density: kept share of query-key pairs the file must have been made for; None takes any.
        block_size: tokens of a block the file must have been made with; None takes any.
        drop_empty_heads: let the video tokens of heads that the calibration found to look at text only see nothing
            but text.
        min_tokens: run dense below this number of video tokens, where little could be gained.

    Raises SettingsError as a run starts if the file does not fit model, size or settings.
    """

    name: ClassVar[str] = "paro"
    needs_calibration: ClassVar[bool] = True
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "high": {"dense_steps": (0.1, 1)},
        "balanced": {"dense_steps": (0, 0)},
        "fast": {"dense_steps": (0, 0)},
    }

    calibration: str | None = None
    density: float | None = None
    drop_empty_heads: bool = False
    min_tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.calibration, Path):
            self.calibration = str(self.calibration)
        if self.calibration is not None and not isinstance(self.calibration, str):
            raise SettingsError(
                f"calibration={self.calibration!r} is not a path; give the file that `attnproc calibrate` made."
            )
        if self.density is not None:
            check_density(self.density)
        if not isinstance(self.drop_empty_heads, bool):
            raise SettingsError(f"drop_empty_heads={self.drop_empty_heads!r} must be True or False.")
        if not isinstance(self.min_tokens, int) or isinstance(self.min_tokens, bool) or self.min_tokens < 0:
            raise SettingsError(f"min_tokens={self.min_tokens!r} must be an int of at least 0; 0 never runs dense.")

    def plan(self, call: AttentionCall) -> Plan | Dense:
        """Mask and token order of this layer at this step. Reads no tensor data, only the valid text tokens."""
        if reason := self.dense_reason(call.layout):
            return Dense(reason)
        file, component = self._file(call)
        facts = file.header["components"][component]
        slot = facts["slots"][slot_of(call.step.index, call.step.total, **_policy(file))]
        shelf, lengths = self._shelf(call, file, slot), call.layout.text_lengths
        key = (call.layer, None if lengths is None else call.step.branch)
        known = shelf.get(key)
        if known is not None and known[0] == lengths:
            return known[1]
        # Of another padding, or of another batch: its lists take the place of the old ones.
        shelf.pop(key, None)
        mask, order = self._expand(file, component, slot, call)
        planned = Plan(mask.with_key_valid(call.layout.key_valid), token_order=order)
        if mask.nbytes + sum(plan.mask.nbytes for _, plan in shelf.values()) <= CACHED_MASK_BYTES:
            shelf[key] = lengths, planned
        return planned

    def check(self, layout: TokenLayout) -> None:
        # Without a file an estimate can still be made; a run is refused by `check_model`.
        if self.calibration is not None and not self.dense_reason(layout):
            self._open().require(method=self.name, layout=layout, **self._made_with())

    def check_model(self, layout: TokenLayout, denoiser: Denoiser, heads: int, head_dim: int) -> None:
        if not self.dense_reason(layout):
            facts = {"denoiser": denoiser, "heads": heads, "head_dim": head_dim, **self._made_with()}
            self._open().require(method=self.name, layout=layout, **facts)

    def kernel_features(self) -> frozenset[str]:
        return frozenset(("token_order",))

    def predicted_density(self, layout: TokenLayout) -> float:
        """The mean over layers and slots of the file's density; without a file what `density` or `quality` asks for."""
        if self.dense_reason(layout):
            return 1.0
        if self.calibration is None:
            return DENSITIES[self.quality] if self.density is None else self.density
        file = self._open()
        component = file.require(method=self.name, layout=layout, **self._made_with())
        facts = file.header["components"][component]
        # Slots that a calibration did not see are another one's masks.
        return float(np.mean([facts["density"][slot] for slot in facts["slots"]]))

    def dense_reason(self, layout: TokenLayout) -> str:
        if layout.video_tokens >= self.min_tokens:
            return ""
        return (
            f"{layout.video_tokens} video tokens; PAROAttention expects at least min_tokens={self.min_tokens}, "
            "use a larger size or a smaller min_tokens"
        )

    def _made_with(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "density": self.density}

    def _open(self) -> Calibration:
        if self.calibration is None:
            raise SettingsError(
                "PAROAttnProcessor got no calibration; expected the file of this model and size. Make one with "
                "`attnproc calibrate --attention paro --model MODEL --prompts prompts.txt --output plan.safetensors` "
                "and give calibration='plan.safetensors' (--plan on the command line)."
            )
        return Calibration.load(self.calibration)

    def _file(self, call: AttentionCall) -> tuple[Calibration, str]:
        """The calibration and the component of a call, checked once for each size."""
        heads, head_dim = call.query.shape[1], call.query.shape[3]
        layout = call.layout
        made_with = self._made_with()
        key = (self.name, self.calibration, heads, head_dim, layout.grid, layout.text_tokens, *made_with.values())
        stamp, known = Calibration.stamp(self.calibration or ""), call.cache.get(key)
        if known is None or stamp not in (None, known[0]):
            file = self._open()
            component = file.require(
                method=self.name,
                layout=layout,
                denoiser=call.denoiser,
                heads=heads,
                head_dim=head_dim,
                **made_with,
            )
            known = call.cache[key] = stamp, file, component
        return known[1:]

    def _shelf(self, call: AttentionCall, file: Calibration, slot: int) -> dict[Any, tuple[Any, Plan]]:
        """Plans and their padding, of one slot of one file: steps move on and do not come back in a run."""
        layout = call.layout
        place = (layout.grid, layout.text_tokens, str(call.query.device))
        content = (file, slot, self.drop_empty_heads, *place)
        known, shelf = call.cache.get((self.name, "masks"), (None, {}))
        if known != content:
            shelf = {}
            call.cache[self.name, "masks"] = content, shelf
        return shelf

    def _expand(self, file: Calibration, component: str, slot: int, call: AttentionCall) -> tuple[BlockMask, Tensor]:
        facts, device, layout = file.header["components"][component], call.query.device, call.layout
        size = file.header["settings"]["block_size"]
        columns = -(-layout.tokens // size)
        blocks = unpack_blocks(file.tensors[f"{component}.mask.{slot}.{call.layer}"].to(device), columns)
        if self.drop_empty_heads:
            empty = file.tensors[f"{component}.empty"][call.layer].bool().to(device)
            blocks = blocks & ~empty[:, None, None] | text_blocks(layout, size).to(device)
        order = token_order(layout.grid, facts["order"][call.layer], layout.text_tokens).to(device)
        return BlockMask.from_blocks(blocks[None], layout.tokens, layout.tokens, (size, size)), order


# -- axis orders -------------------------------------------------------------------------------------------------------


def axis_order(grid: Grid, order: str) -> Tensor:
    """int64 (F * H * W,): the token at each position when the axes are walked in `order`, the last one fastest."""
    if order not in ORDERS:
        raise SettingsError(f"axis order {order!r} is not known; expected one of {', '.join(ORDERS)}. Spell it so.")
    tokens = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    return tokens.permute(*("FHW".index(axis) for axis in order)).reshape(-1)


def token_order(grid: Grid, orders: Sequence[str], text_tokens: int = 0) -> Tensor:
    """int32 (heads, tokens): the video in each head's axis order, then the text as it is."""
    video = grid[0] * grid[1] * grid[2]
    by_name = {order: axis_order(grid, order) for order in set(orders)}
    text = torch.arange(video, video + text_tokens)
    return torch.stack([torch.cat([by_name[order], text]) for order in orders]).int()


# -- slots over time ---------------------------------------------------------------------------------------------------


def slot_count(policy: str, slots: int) -> int:
    """Slots that a run has in all."""
    return slots + 1 if policy == "half_shared" else slots


def slot_of(step: int, total: int | None, policy: str, slots: int) -> int:
    """The slot of a step of a run of `total` steps.

    "half_shared": the first half of the run in `slots` equal parts, and one slot for the whole second half, in which
    masks change little (paper, section on timesteps). "uniform": the whole run in `slots` equal parts.
    """
    if slot_count(policy, slots) == 1:
        return 0
    if total is None:
        raise SettingsError(
            f"slot_policy={policy!r} with slots={slots} needs the number of steps, which a bare model does not tell; "
            "give attnproc.install(..., scheduler=scheduler), or calibrate with slot_policy='uniform', slots=1."
        )
    if policy == "uniform":
        return step * slots // total
    return step * 2 * slots // total if 2 * step < total else slots


def _policy(file: Calibration) -> dict[str, Any]:
    settings = file.header["settings"]
    return {"policy": settings["slot_policy"], "slots": settings["slots"]}


# -- masks -------------------------------------------------------------------------------------------------------------


def text_blocks(layout: TokenLayout, block_size: int) -> Tensor:
    """bool (N, N) on the CPU: the blocks in whose rows or columns stands at least one text token."""
    blocks = -(-layout.tokens // block_size)
    first = layout.video_tokens // block_size if layout.text_tokens else blocks
    has_text = torch.arange(blocks) >= first
    return has_text[:, None] | has_text


def check_density(density: Any) -> None:
    """Raises SettingsError unless it is a kept share above 0 and up to 1."""
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if not number or not 0.0 < density <= 1.0:
        raise SettingsError(
            f"density={density!r} must be a kept share above 0.0 and up to 1.0; 0.5 is safe and 0.2 fast."
        )
