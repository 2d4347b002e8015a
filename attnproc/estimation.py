"""What to expect before a run: tokens, attention's share of the FLOPs, density, and the ceiling of the speed-up.

FLOPs, not time: attention often runs at a lower rate than matrix products, then its share of the time, and with it
the speed-up, is larger; norms, the autoencoder, the text encoder and planning make the speed-up smaller.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnproc.errors import SettingsError
from attnproc.layout import Grid, TokenLayout
from attnproc.model_facts import model_facts, read_configs
from attnproc.processor import AttnProcessor

if TYPE_CHECKING:
    from rich.table import Table


# Below this ceiling, planning and the cost of sparse kernels are likely to eat what could be gained.
WORTHWHILE = 1.3
# Warm-up is worth a word when it keeps the ceiling below this part of what it would be without.
WARM_UP_COST = 0.75


@dataclass(frozen=True)
class Estimate:
    """Result of `attnproc.estimate`. Printing it gives a table; `to_dict` gives plain data.

    Attributes:
        model, method: what was estimated.
        height, width, num_frames, steps, batch: of the run; pixels, frames, steps, samples.
        grid: latent grid (T, H, W) after patching.
        text_tokens: text tokens inside the attention, padding included.
        attention_share: of the FLOPs of a dense denoiser call, from 0.0 to 1.0.
        petaflops: 10**15 FLOPs of one dense denoiser call over the batch.
        density: kept share of query-key pairs in sparse calls; 1.0 if the method would run dense.
        dense_step_share: share of the steps that warm-up settings keep dense.
        dense_layer_share: share of the layers that the settings keep dense.
        ceiling: upper limit of the speed-up of all denoiser calls together, by FLOPs.
        ceiling_without_warm_up: the same with no dense steps and layers.
        plan_bytes: kept-block lists (int32) of one mask, which serves all heads and layers of a fixed pattern; counted
            from the mask itself where the method has a fixed pattern, else for even rows. 0 if nothing is sparse.
        plan_bytes_per_layer: the same where every sample and head of a layer has its own.
        advice: what to do, in a sentence.
    """

    model: str
    method: str
    height: int
    width: int
    num_frames: int
    steps: int
    batch: int
    grid: Grid
    text_tokens: int
    attention_share: float
    petaflops: float
    density: float
    dense_step_share: float
    dense_layer_share: float
    ceiling: float
    ceiling_without_warm_up: float
    plan_bytes: int
    plan_bytes_per_layer: int
    advice: str

    @property
    def tokens(self) -> int:
        """Tokens that one attention call sees, text included."""
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "grid": list(self.grid), "tokens": self.tokens}

    def table(self) -> "Table":
        """The estimate as a rich table."""
        from rich.table import Table

        table = Table(title=f"{self.method} on {self.model}, before the run", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        text = f" + {self.text_tokens} text" if self.text_tokens else ""
        frames, rows, columns = self.grid
        for name, value in (
            ("video", f"{self.height} x {self.width} pixels, {self.num_frames} frames, {self.steps} steps"),
            ("latent grid", f"{frames} x {rows} x {columns} (frames, rows, columns)"),
            ("tokens", f"{self.tokens - self.text_tokens:,}{text}"),
            ("attention share of FLOPs", f"{self.attention_share:.1%}"),
            ("one dense denoiser call", _flops(self.petaflops)),
            ("density of sparse calls", f"{self.density:.3f}"),
            ("dense steps, dense layers", f"{self.dense_step_share:.0%}, {self.dense_layer_share:.0%}"),
            ("ceiling of the speed-up", f"{self.ceiling:.2f}x ({self.ceiling_without_warm_up:.2f}x without warm-up)"),
            (
                "memory of the plan",
                f"{_size(self.plan_bytes)} for one mask, {_size(self.plan_bytes_per_layer)} a layer if heads differ",
            ),
            ("advice", self.advice),
        ):
            table.add_row(name, value)
        return table

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def estimate(
    target: Any,
    *,
    processor: AttnProcessor,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    batch: int = 1,
) -> Estimate:
    """Says before a run what a processor can gain on a model. Reads configurations only, never weights.

    Args:
        target: a pipeline, a model, a known name such as "wan2.1-14b", a local folder, or a Hugging Face id.
        processor: the method with its settings.
        height, width: pixels; num_frames: frames; steps: denoising steps. None is the model's default.
        batch: samples of one denoiser call (2 where both classifier-free guidance branches are one call).

    Raises:
        SettingsError: the model is not known, cannot make this size, or the settings do not fit the run.
    """
    facts = model_facts(read_configs(target))
    height, width, num_frames = (
        default if asked is None else asked
        for asked, default in zip((height, width, num_frames), facts.size, strict=True)
    )
    steps = facts.steps if steps is None else steps
    for name, number in (("steps", steps), ("batch", batch)):
        if number < 1:
            raise SettingsError(f"{name}={number} is not possible; expected at least 1. Give a positive number.")
    layout = TokenLayout(facts.grid(height, width, num_frames), facts.text_tokens)
    processor.check(layout)
    density = processor.predicted_density(layout)
    share = attention_share(layout.tokens, facts.half_length)
    dense_steps = min(steps, sum(processor.dense_step_count(steps))) / steps
    dense_layers = sum(processor.is_dense_layer(layer) for layer in range(facts.layers)) / facts.layers
    attention_flops = 4.0 * layout.tokens**2 * facts.width * facts.layers * batch
    one_mask = _mask_bytes(processor, layout, density)
    ceiling = speed_up_ceiling(share, density, dense_steps, dense_layers)
    free = speed_up_ceiling(share, density)
    return Estimate(
        model=facts.name,
        method=processor.name,
        height=height,
        width=width,
        num_frames=num_frames,
        steps=steps,
        batch=batch,
        grid=layout.grid,
        text_tokens=layout.text_tokens,
        attention_share=share,
        petaflops=attention_flops / share / 1e15,
        density=density,
        dense_step_share=dense_steps,
        dense_layer_share=dense_layers,
        ceiling=ceiling,
        ceiling_without_warm_up=free,
        plan_bytes=one_mask,
        plan_bytes_per_layer=one_mask * facts.heads * batch,
        advice=_advice(processor, density, ceiling, free),
    )


def attention_share(tokens: int, half_length: int) -> float:
    """Self-attention's share of the FLOPs of a denoiser call; one half at `half_length` tokens."""
    return tokens / (tokens + half_length)


def speed_up_ceiling(share: float, density: float, dense_steps: float = 0.0, dense_layers: float = 0.0) -> float:
    """Dense FLOPs over sparse FLOPs of a whole run.

    share: attention's part of the FLOPs; density: of sparse calls; dense_steps, dense_layers: shares that stay dense.
    """
    sparse_step = 1.0 - share * (1.0 - dense_layers) * (1.0 - density)
    return 1.0 / (dense_steps + (1.0 - dense_steps) * sparse_step)


def plan_bytes(tokens: int, density: float, block_size: tuple[int, int], maps: int = 1) -> int:
    """Bytes of the int32 lists of kept key blocks for `maps` masks (heads times samples) with even rows."""
    pairs = -(-tokens // block_size[0]) * -(-tokens // block_size[1])
    return round(4 * maps * pairs * density)


def _mask_bytes(processor: AttnProcessor, layout: TokenLayout, density: float) -> int:
    if density >= 1.0:
        return 0
    mask = processor.mask(layout)
    if mask is not None:  # uneven rows are stored at the length of the longest, so count the real thing
        return mask.nbytes
    block = processor.block_size or 128
    return plan_bytes(layout.tokens, density, (block, block))


def _advice(processor: AttnProcessor, density: float, ceiling: float, free: float) -> str:
    if processor.name == "dense":
        return "this is the dense baseline; choose a sparse method to see what it could gain"
    if density >= 1.0:
        return f"run dense: {processor.name} keeps everything at this size; use a longer or larger video"
    if ceiling < WORTHWHILE:
        if free >= WORTHWHILE:
            return f"run dense, or fewer dense steps or layers: warm-up leaves a ceiling of {ceiling:.2f}x"
        return f"run dense: the ceiling is {ceiling:.2f}x, and planning may eat it"
    if ceiling < WARM_UP_COST * free:
        return f"worth it; warm-up costs most: without it the ceiling would be {free:.2f}x instead of {ceiling:.2f}x"
    return f"worth it: up to {ceiling:.2f}x by FLOPs"


def _flops(petaflops: float) -> str:
    for unit, scale in (("PFLOP", 1.0), ("TFLOP", 1e3)):
        if petaflops * scale >= 0.1:
            return f"{petaflops * scale:.3g} {unit}"
    return f"{petaflops * 1e6:.3g} GFLOP"


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.3g} GiB"
