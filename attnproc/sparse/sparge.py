"""SpargeAttn: every call predicts from pooled blocks which key blocks matter, for each sample and head. No training.

Source: "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference" (arXiv 2502.18137), sections 3.2 to
3.5, and its released code at bfd980b, whose similarity and selection rules published settings were tuned with (see
`sparge_prediction`).

A block of tokens that are alike is well spoken for by its mean. So the means of the query blocks attend to those of
the key blocks, and each query block keeps the key blocks that this small attention map ranks first. Blocks whose
tokens are not alike cannot be judged by their mean and stay: such query blocks see, and such key blocks are seen by,
everything. Hilbert order brings tokens that are alike together. Inside the kernel a second filter leaves out key
blocks that turn out too weak to matter. Text is never dropped.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnproc.calibration import Calibration
from attnproc.errors import SettingsError
from attnproc.kernels import BlockMask
from attnproc.kernels.block_mask import count_blocks
from attnproc.layout import AttentionCall, Denoiser, TokenLayout
from attnproc.processor import AttnProcessor, Dense, Plan
from attnproc.sparse.sparge_prediction import JUDGE_OFF, HeadThresholds, PerHead, predict_blocks
from attnproc.sparse.token_orders import TOKEN_ORDERS, token_order

BLOCK_SIZE = (128, 64)  # query block, key block: the published kernels' on most devices

#: setting -> what is valid, in words and as a test
THRESHOLDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "density": ("above 0.0 and up to 1.0", lambda x: 0.0 < x <= 1.0),
    "cdf_threshold": ("from 0.0 to 1.0", lambda x: 0.0 <= x <= 1.0),
    "similarity_threshold": ("up to 1.0, negative to judge none", lambda x: -math.inf < x <= 1.0),
    "skip_threshold": ("above 0 (in powers of 2)", lambda x: x > 0.0),
}


@dataclass(kw_only=True)
class SpargeAttnProcessor(AttnProcessor):
    """SpargeAttn as a processor. Remembers nothing between calls; every sample and head gets a mask of its own.

    Beside the settings of `AttnProcessor`; at most one of density, cdf_threshold and calibration is given:

    Args:
        density: kept fraction of the key blocks of each query block, above 0.0 to 1.0, rounded down to blocks, one at
            least. Blocks that are always kept (text, tail, not alike) may come on top. "topk" in the released code.
        cdf_threshold: keep key blocks by falling score while their shares add up to no more than this, 0.0 to 1.0
            (tau in the paper); 0.9 to 0.99 is usual.
        calibration: path of a file with thresholds tuned for each layer and head, made by `attnproc calibrate`. It
            takes the place of density and the three thresholds, and must have been made with the other settings here.
        similarity_threshold: query blocks whose tokens have a mean cosine of no more than this see all, key blocks
            like that are seen by all; up to 1.0 (theta in the paper). A negative value, the default, judges none; the
            paper has 0.6 with cdf_threshold=0.98.
        skip_threshold: leave out a kept block in the kernel when its scores stay 2**this below the largest of every
            query of the block; above 0, 3 to 15 is useful. None never does.
        attention_sink: keep the first key block for every query.
        token_order: "hilbert", "row-major" (the order of the model), "column-major" or "time-major"; blocks are made
            in this order.
        min_tokens: calls with fewer tokens run dense.
        block_size: None is 128 for queries and 64 for keys; a number is for both.

    density, cdf_threshold, similarity_threshold and skip_threshold may be a tuple with one number for each head.
    """

    name: ClassVar[str] = "sparge"
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "high": {"density": 0.5, "similarity_threshold": JUDGE_OFF, "dense_steps": 0, "dense_layers": 2},
        "balanced": {"density": 0.4, "similarity_threshold": JUDGE_OFF, "dense_steps": 0, "dense_layers": 1},
        "fast": {"density": 0.3, "similarity_threshold": JUDGE_OFF, "dense_steps": 0, "dense_layers": 0},
    }

    density: PerHead | None = None
    cdf_threshold: PerHead | None = None
    calibration: str | None = None
    similarity_threshold: PerHead | None = None
    skip_threshold: PerHead | None = None
    attention_sink: bool = False
    token_order: str = "hilbert"
    min_tokens: int = 1024

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in THRESHOLDS if getattr(self, name) is not None}
        if self.calibration is not None:
            self.calibration = str(self.calibration)
            if given:
                raise SettingsError(
                    f"calibration={self.calibration!r} and {', '.join(given)} came together; a calibration holds them "
                    "all for each layer and head. Give one or the other."
                )
            Calibration.load(self.calibration)
        if "density" in given and "cdf_threshold" in given:
            raise SettingsError(
                f"density={self.density!r} and cdf_threshold={self.cdf_threshold!r} came together; give one of them: "
                "a fixed share of the blocks, or as many blocks as hold a share of the attention."
            )
        super().__post_init__()
        if self.calibration is not None:
            self.density = self.similarity_threshold = None
        elif self.cdf_threshold is not None:
            self.density = None
        for name, (expected, fits) in THRESHOLDS.items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if value == () or not all(_is_number(x) and fits(x) for x in numbers):
                raise SettingsError(
                    f"{name}={value!r} is not valid; expected a number {expected}; give one, or a tuple with one for "
                    "each head."
                )
        check_block_settings(self.attention_sink, self.token_order)
        if not isinstance(self.min_tokens, int) or isinstance(self.min_tokens, bool) or self.min_tokens < 0:
            raise SettingsError(f"min_tokens={self.min_tokens!r} must be an int of at least 0; 0 is no minimum.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Makes a processor with published settings; what says otherwise which blocks to keep takes their place."""
        replaced: list[str] = []
        if overrides.get("calibration") is not None:
            replaced = list(THRESHOLDS)
        elif overrides.get("cdf_threshold") is not None or overrides.get("density") is not None:
            replaced = ["density", "cdf_threshold"]
        return super().from_preset(name, **{**dict.fromkeys(replaced), **overrides})

    def dense_reason(self, layout: TokenLayout) -> str:
        if layout.tokens >= self.min_tokens:
            return ""
        return (
            f"{layout.tokens} tokens; SpargeAttn expects at least min_tokens={self.min_tokens}, "
            "use a larger video or a smaller min_tokens"
        )

    def check(self, layout: TokenLayout) -> None:
        if self.calibration is not None and layout.tokens >= self.min_tokens:
            self._require(Calibration.load(self.calibration), layout)

    def check_model(self, layout: TokenLayout, denoiser: Denoiser, heads: int, head_dim: int) -> None:
        if self.calibration is not None and layout.tokens >= self.min_tokens:
            facts = {"denoiser": denoiser, "heads": heads, "head_dim": head_dim}
            self._require(Calibration.load(self.calibration), layout, **facts)

    def plan(self, call: AttentionCall) -> Plan | Dense:
        layout = call.layout
        if reason := self.dense_reason(layout):
            return Dense(reason)
        heads = self._tuned(call) if self.calibration else self._thresholds(call)
        if isinstance(heads, Dense):
            return heads
        order = order_of(self.token_order, call)
        blocks = predict_blocks(
            call.query,
            call.key,
            self._block_size,
            density=heads.density,
            cdf_threshold=heads.cdf,
            similarity_threshold=heads.similarity,
            key_valid=layout.key_valid,
            text_start=layout.video_tokens if layout.text_tokens else None,
            attention_sink=self.attention_sink,
            token_order=order,
        )
        mask = BlockMask.from_blocks(blocks, layout.tokens, layout.tokens, self._block_size, layout.key_valid)
        return Plan(mask, order, heads.skip)

    def kernel_features(self) -> frozenset[str]:
        order = () if self.token_order == "row-major" else ("token_order",)
        # A calibration may hold thresholds.
        skip = self.skip_threshold is not None or self.calibration is not None
        return frozenset((*order, *(("skip_threshold",) if skip else ())))

    def predicted_density(self, layout: TokenLayout) -> float:
        """Kept share of the blocks: exact for `density` without text, else an upper bound.

        Text blocks come on top only where their rank does not keep them. Blocks that hold a share of the attention
        are at most that share of all blocks, as the largest come first. Blocks kept because their tokens are not
        alike are not known without data and left out. With a calibration: the mean over the calls it tuned; runs keep
        somewhat more, as they use the most careful thresholds of all calls.
        """
        if layout.tokens < self.min_tokens:
            return 1.0
        if self.calibration is not None:
            calibration = Calibration.load(self.calibration)
            self._require(calibration, layout)
            found = [component["density"] for component in calibration.header["components"].values()]
            return sum(found) / len(found)
        query_size, key_size = self._block_size
        rows, columns = count_blocks(layout.tokens, query_size), count_blocks(layout.tokens, key_size)
        video = layout.video_tokens if layout.text_tokens else layout.tokens
        whole_rows, whole_columns = video // query_size, video // key_size
        share = self.density if self.density is not None else self.cdf_threshold
        shares = share if isinstance(share, tuple) else (share,)
        counts = (torch.tensor(shares, dtype=torch.float32) * columns).int().clamp(min=1)
        kept = float((counts + columns - whole_columns).clamp(max=columns).float().mean())
        return (whole_rows * kept + (rows - whole_rows) * columns) / (rows * columns)

    @property
    def _block_size(self) -> tuple[int, int]:
        return block_size_of(self.block_size)

    def _thresholds(self, call: AttentionCall) -> HeadThresholds:
        """The settings as one number for each head on the device of the call."""
        heads, device = call.query.shape[1], call.query.device
        values = {name: getattr(self, name) for name in THRESHOLDS}
        key = (self.name, "thresholds", *values.values(), heads, str(device))
        if key not in call.cache:
            call.cache[key] = HeadThresholds.of(heads, device, **values)
        return call.cache[key]

    def _tuned(self, call: AttentionCall) -> HeadThresholds | Dense:
        """What the calibration says for a layer; Dense where it leaves every head dense."""
        layout, device = call.layout, call.query.device
        made_with = tuple(self._made_with().values())
        key = (
            self.name,
            "tuned",
            self.calibration,
            call.layer,
            layout.grid,
            layout.text_tokens,
            made_with,
            str(device),
        )
        assert self.calibration is not None
        stamp, known = Calibration.stamp(self.calibration), call.cache.get(key)
        if known is None or stamp not in (None, known[0]):
            calibration = Calibration.load(self.calibration)
            facts = {"denoiser": call.denoiser, "heads": call.query.shape[1], "head_dim": call.query.shape[3]}
            component = self._require(calibration, layout, **facts)
            cdf, similarity, skip = (
                calibration.tensors[f"{component}.{name}"][call.layer] for name in list(THRESHOLDS)[1:]
            )
            skips = bool(skip.isfinite().any())
            found = HeadThresholds(None, cdf.to(device), similarity.to(device), skip.to(device) if skips else None)
            known = call.cache[key] = stamp, found if skips or bool((cdf < 1.0).any()) else Dense()
        return known[1]

    def _require(self, calibration: Calibration, layout: TokenLayout, **facts: Any) -> str:
        return calibration.require(method=self.name, layout=layout, **facts, **self._made_with())

    def _made_with(self) -> dict[str, Any]:
        """What a calibration must have been made with."""
        query_block, key_block = self._block_size
        return {
            "query_block": query_block,
            "key_block": key_block,
            "attention_sink": self.attention_sink,
            "token_order": self.token_order,
            "quantization": self.quantization,
        }


def block_size_of(block_size: int | None) -> tuple[int, int]:
    """(query block, key block) that a `block_size` setting stands for."""
    return BLOCK_SIZE if block_size is None else (block_size, block_size)


def order_of(name: str, call: AttentionCall) -> Tensor | None:
    """int32 (1, tokens) on the device of the call, or None for the order of the model."""
    if name == "row-major":
        return None
    layout, device = call.layout, call.query.device
    key = ("token order", name, layout.grid, layout.text_tokens, str(device))
    if key not in call.cache:
        call.cache[key] = token_order(name, layout).to(device)[None]
    return call.cache[key]


def check_block_settings(attention_sink: Any, token_order: Any) -> None:
    if not isinstance(attention_sink, bool):
        raise SettingsError(f"attention_sink={attention_sink!r} must be True or False; False is the default.")
    if token_order not in TOKEN_ORDERS:
        raise SettingsError(f"token_order={token_order!r} is not known; choose one of {', '.join(TOKEN_ORDERS)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
