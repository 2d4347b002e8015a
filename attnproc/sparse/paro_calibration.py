"""The calibration of PAROAttention: an axis order for each head, then a static block mask for each slot of the run.

Source: arXiv 2506.16054, and what it leaves open:

- Which order. The paper scores each order by its sparse blocks and its incoherence. Its printed formula adds a share
  that should be large to a ratio that should be small and takes the minimum; `order_scores` turns the share round. The
  default criterion is another one, `kept_mass`: the attention mass that a mask of the wanted density keeps in that
  order. A thin diagonal through a block leaves most of its entries small, so the score calls blocks sparse that cannot
  be dropped.
- Which blocks. Blocks are ranked by their mass over all heads of a layer, so heads that need little leave their share
  to the others. Text and the largest block of each row are always in.

No map of tokens x tokens is ever held: statistics are taken tile by tile, masks from sums over blocks. The sums take
slots x layers x heads x blocks^2 x 4 bytes of main memory: 4 GB for CogVideoX-5B at 480x720 with 49 frames.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnproc.calibration import Calibration, CalibrationProcessor
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.kernels.oracle import take
from attnproc.kernels.scores import block_mass, dense_lse
from attnproc.layout import AttentionCall, TokenLayout
from attnproc.sparse.bits import pack_blocks
from attnproc.sparse.paro import (
    DENSITIES,
    ORDERS,
    SLOT_POLICIES,
    axis_order,
    check_density,
    slot_count,
    slot_of,
    text_blocks,
    token_order,
)

CRITERIA = ("kept_mass", "score")
SCOPES = ("layer", "head")
# Orders whose kept mass is this near to the best are told apart by their incoherence.
KEPT_MASS_TIE = 0.005
# From this many video tokens on the paper's absolute threshold means what it meant there, at 17550 tokens.
PAPER_TOKENS, RESCALED_BELOW = 17_550, 4096
# A head whose video tokens give the video less than this share of their attention is called empty.
EMPTY_MASS = 0.01
TILE_ENTRIES = 1 << 24  # entries of the map held at a time


@dataclass(kw_only=True)
class PAROCalibrationProcessor(CalibrationProcessor):
    """Watches dense runs and makes the calibration of `PAROAttnProcessor`.

    Beside the settings of `AttnProcessor`:

    Args:
        density: kept share of blocks, text included; None is 0.5, 0.3 or 0.2 by quality.
        criterion: how axis orders are compared: "kept_mass", or "score" as in the paper.
        scope: "layer" ranks the blocks of all heads of a layer together, "head" each head's on its own.
        slot_policy: "half_shared" has `slots` slots in the first half of the run and one for the second; "uniform" has
            `slots` slots in the whole run.
        slots: see there. 5 suits 30 steps, 8 suits 50.
        query_blocks: query blocks, evenly spread, that axis orders are compared on; None is all of them.
        eps, sigma, alpha: a block is sparse if a share `sigma` of its weights is below `eps`; `alpha` weighs that
            against incoherence in the score. Below 4096 video tokens eps grows as weights do: eps * 17550 / tokens.
        block_size: tokens of a query and key block; None is 64, as in the paper.
    """

    name: ClassVar[str] = "paro-calibration"
    method: ClassVar[str] = "paro"
    rounds: ClassVar[tuple[str, ...]] = ("orders", "masks")
    dial: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        quality: {"density": density, "block_size": 64} for quality, density in DENSITIES.items()
    }

    density: float | None = None
    criterion: str = "kept_mass"
    scope: str = "layer"
    slot_policy: str = "half_shared"
    slots: int = 5
    query_blocks: int | None = 64
    eps: float = 1e-3
    sigma: float = 0.9
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        for name, value, known in (
            ("criterion", self.criterion, CRITERIA),
            ("scope", self.scope, SCOPES),
            ("slot_policy", self.slot_policy, SLOT_POLICIES),
        ):
            if value not in known:
                raise SettingsError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")
        for name, count in (("slots", self.slots), ("query_blocks", self.query_blocks)):
            all_of_them = name == "query_blocks" and count is None
            if not all_of_them and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise SettingsError(f"{name}={count!r} must be an int of at least 1.")
        for name, share in (("eps", self.eps), ("sigma", self.sigma), ("alpha", self.alpha)):
            if not isinstance(share, int | float) or isinstance(share, bool) or not 0.0 <= share <= 1.0:
                raise SettingsError(f"{name}={share!r} must be a number from 0.0 to 1.0.")

    @property
    def size(self) -> int:
        """Tokens of a block."""
        assert self.block_size is not None
        return self.block_size

    # -- looking at calls --------------------------------------------------------------------------------------------

    def observe(self, component: str, call: AttentionCall) -> None:
        if self.round == "orders":
            self._observe_orders(component, call)
        else:
            self._observe_masks(component, call)

    def _observe_orders(self, component: str, call: AttentionCall) -> None:
        """Sums over samples of (sparse blocks, incoherence, kept mass), float64 (heads, orders, 3)."""
        video = call.layout.video_tokens
        query, key = (_on_known_device(tensor)[:, :, :video] for tensor in (call.query, call.key))
        lse = dense_lse(query, key)
        rows = spread(-(-video // self.size), self.query_blocks).to(query.device)
        found = []
        for name in ORDERS:
            order = axis_order(call.layout.grid, name).to(query.device)
            tiles = tile_statistics(query, key, lse, order, rows, self.size, effective_eps(self.eps, video))
            found.append(torch.stack([*tiles.metrics(self.sigma), self._kept_mass(tiles)], dim=-1).sum(0))
        self.accumulator.add(f"{component}.orders.{call.layer}", torch.stack(found, dim=1).double())
        self.accumulator.add(f"{component}.samples.{call.layer}", torch.tensor(len(query)))

    def _kept_mass(self, tiles: "Tiles") -> Tensor:
        assert self.density is not None
        mass = tiles.total / tiles.rows[:, None]
        return torch.stack([kept_mass(sample, self.density) for sample in mass])

    def _observe_masks(self, component: str, call: AttentionCall) -> None:
        """Sum over samples of the mass of each block, float32 (heads, N, N), for the slot of the step."""
        slot = slot_of(call.step.index, call.step.total, self.slot_policy, self.slots)
        layout, valid = call.layout, call.layout.key_valid
        query, key = (_on_known_device(tensor) for tensor in (call.query, call.key))
        valid = None if valid is None else valid.to(query.device)
        orders = [ORDERS[n] for n in self.accumulator.sums[f"{component}.order"][call.layer]]
        order = token_order(layout.grid, orders, layout.text_tokens).to(query.device)
        mass = mean_mass(take(query, order), take(key, order), self.size, valid)
        self.accumulator.add(f"{component}.mass.{slot}.{call.layer}", mass.sum(0))
        self.accumulator.add(f"{component}.samples.{slot}.{call.layer}", torch.tensor(len(query)))

    # -- conclusions -------------------------------------------------------------------------------------------------

    def conclude_round(self) -> None:
        if self.round != "orders":
            return
        sums, found = self.accumulator.sums, {}
        for name, component in self.accumulator.components.items():
            layers = range(component.layers)
            means = [sums[f"{name}.orders.{n}"] / sums[f"{name}.samples.{n}"] for n in layers]
            found[f"{name}.order"] = torch.stack([self.pick(*mean.unbind(-1)) for mean in means]).to(torch.uint8)
        self.accumulator.sums = found

    def pick(self, sparse: Tensor, incoherence: Tensor, kept: Tensor) -> Tensor:
        """int64 (heads,): the best order of each head by the criterion; arguments (heads, orders), means of samples."""
        if self.criterion == "score":
            return first_smallest(order_scores(sparse, incoherence, self.alpha))
        return most_kept(kept, incoherence)

    def finish(self, about: Mapping[str, Any] | None = None) -> Calibration:
        """The calibration; warns where text and the largest block of each row alone are more than `density`."""
        if not self.done:
            raise SettingsError(
                f"the calibration is in round {self.round!r}; expected all of {', '.join(self.rounds)} to have ended. "
                "Run the prompts of each round and call end_round()."
            )
        header, share = self.header(about), 0.0
        tensors: dict[str, Tensor] = {}
        for name, facts in header["components"].items():
            layout = TokenLayout(tuple(facts["grid"]), facts["text_tokens"])
            seen = self._seen_slots(name, facts["layers"])
            made = [self._slot(name, slot, layout, facts["layers"]) for slot in seen]
            facts["order"] = [[ORDERS[n] for n in layer] for layer in self.accumulator.sums[f"{name}.order"]]
            facts["slots"] = nearest_slots(seen, slot_count(self.slot_policy, self.slots))
            facts["density"] = [[mask.density for mask in masks] for masks in made]
            facts["eps"] = effective_eps(self.eps, layout.video_tokens)
            for slot, masks in enumerate(made):
                tensors |= {f"{name}.mask.{slot}.{layer}": mask.packed for layer, mask in enumerate(masks)}
            video = torch.stack([torch.stack([mask.video_mass for mask in masks]) for masks in made]).mean(0)
            tensors[f"{name}.empty"] = (video < EMPTY_MASS).to(torch.uint8)
            share = max(share, *(mask.excess for masks in made for mask in masks))
        self._warn_of_forced_blocks(share)
        return Calibration(self.method, header, tensors)

    def _seen_slots(self, component: str, layers: int) -> list[int]:
        sums, slots = self.accumulator.sums, range(slot_count(self.slot_policy, self.slots))
        return [slot for slot in slots if all(f"{component}.mass.{slot}.{n}" in sums for n in range(layers))]

    def _slot(self, component: str, slot: int, layout: TokenLayout, layers: int) -> list["LayerMask"]:
        """The masks of all layers in a slot."""
        assert self.density is not None
        sums, text = self.accumulator.sums, text_blocks(layout, self.size)
        made = []
        for layer in range(layers):
            mass = sums[f"{component}.mass.{slot}.{layer}"] / sums[f"{component}.samples.{slot}.{layer}"]
            if not mass.isfinite().all():
                raise UnsupportedError(
                    f"layer {layer} of {component} gave attention that is NaN or infinite; expected numbers. Run the "
                    "model in bfloat16 or float32, or find the prompt that breaks it."
                )
            blocks = choose_blocks(mass, self.density, text, self.scope)
            # Without rows of video alone nothing can be said of a head, so it is not empty.
            rows = mass.masked_fill(text, 0.0)[:, ~text.all(1)]
            video = rows.sum(-1).mean(-1) if rows.shape[1] else torch.ones(len(mass))
            density = token_density(blocks, layout.tokens, self.size)
            # Ranking keeps the wanted share to half a block of each head; what is above that was forced.
            share = float(blocks.double().mean())
            excess = share if share > self.density + 0.5 / blocks[0].numel() + 1e-9 else 0.0
            made.append(LayerMask(pack_blocks(blocks), density, video, excess))
        return made

    def _warn_of_forced_blocks(self, share: float) -> None:
        if not share:
            return
        warnings.warn(
            f"the masks keep up to {share:.3f} of the blocks where density={self.density} was asked for: text and the "
            "largest block of each row are always kept. Use a larger density or smaller blocks to have what you ask "
            "for.",
            AttnProcWarning,
            stacklevel=3,
        )


class LayerMask(NamedTuple):
    """The mask of one layer in one slot."""

    packed: Tensor  # uint8 (heads, N, ceil(N / 8))
    density: float  # kept share of token pairs
    video_mass: Tensor  # float32 (heads,): share of their attention that video queries give to the video
    excess: float  # kept share of the blocks where forced ones alone are more than was asked for, else 0


# -- which order -------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Statistics of the tiles of an attention map, (B, H, rows, columns) each; rows may be some of the query blocks."""

    total: Tensor  # sum of the weights
    largest: Tensor
    small: Tensor  # weights below eps
    rows: Tensor  # (rows,) queries of each row of tiles
    columns: Tensor  # (columns,) keys of each column

    def metrics(self, sigma: float) -> tuple[Tensor, Tensor]:
        """(B, H) each: the share of sparse tiles, and the mean incoherence max / mean (1 for a tile of zeros)."""
        entries = self.rows[:, None] * self.columns
        sparse = self.small / entries >= sigma
        incoherence = torch.where(self.total > 0.0, self.largest * entries / self.total, 1.0)
        return sparse.to(self.total.dtype).mean((-1, -2)), incoherence.mean((-1, -2))


def tile_statistics(
    query: Tensor, key: Tensor, lse: Tensor, order: Tensor, rows: Tensor, block_size: int, eps: float
) -> Tiles:
    """Statistics of the map softmax(query key^T / sqrt(D)), both sides in `order`, in tiles of block_size squared.

    query, key (B, H, S, D); lse (B, H, S), natural log, of the scaled scores; order int64 (S,), a permutation; rows
    int64, ascending, the query blocks to look at. Computed in float32, or float64 for float64 tensors.
    """
    batch, heads, tokens, head_dim = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lengths = block_lengths(tokens, block_size, query.device)
    shape = (batch, heads, len(rows), len(lengths))
    total, largest, small = (torch.zeros(shape, dtype=dtype, device=query.device) for _ in range(3))
    # The last block may be short: places past the end hold no weight, and no row or column counts them.
    places = rows[:, None] * block_size + torch.arange(block_size, device=query.device)
    there = places < tokens
    ids = order[places.clamp(max=tokens - 1)]
    padding = len(lengths) * block_size - tokens
    for sample, head, part in _parts(batch, heads, len(rows), block_size * tokens):
        chosen = ids[part].flatten()
        scores = query[sample, head, chosen].to(dtype) @ key[sample, head, order].to(dtype).mT * head_dim**-0.5
        weights = (scores - lse[sample, head, chosen, None].to(dtype)).exp()
        hidden = ~there[part].flatten()[:, None]
        for found, values in ((total, weights), (largest, weights), (small, (weights < eps).to(dtype))):
            values = torch.nn.functional.pad(values.masked_fill(hidden, 0.0), (0, padding))
            tiles = values.view(-1, block_size, len(lengths), block_size)
            found[sample, head, part] = tiles.amax((1, 3)) if found is largest else tiles.sum((1, 3))
    return Tiles(total, largest, small, lengths[rows].to(dtype), lengths.to(dtype))


def _parts(batch: int, heads: int, rows: int, entries: int) -> Iterator[tuple[int, int, slice]]:
    step = max(TILE_ENTRIES // entries, 1)
    for sample in range(batch):
        for head in range(heads):
            for start in range(0, rows, step):
                yield sample, head, slice(start, start + step)


def order_scores(sparse: Tensor, incoherence: Tensor, alpha: float) -> Tensor:
    """(heads, orders), smaller is better: shares of blocks that are not sparse, and of incoherence, weighed by alpha.

    Both are taken relative to their sum over the orders, the first is 0 where every block is sparse in every order.
    """
    full = 1.0 - sparse
    shares = full / full.sum(-1, keepdim=True).masked_fill(full.sum(-1, keepdim=True) == 0.0, 1.0)
    return alpha * shares + (1.0 - alpha) * incoherence / incoherence.sum(-1, keepdim=True)


def first_smallest(scores: Tensor) -> Tensor:
    """int64 (heads,): the first of the smallest, compared to 12 decimals."""
    return scores.double().round(decimals=12).argmin(-1)


def most_kept(kept: Tensor, incoherence: Tensor) -> Tensor:
    """int64 (heads,): the order with the smallest incoherence of those that keep nearly the most mass."""
    near = kept >= kept.amax(-1, keepdim=True) - KEPT_MASS_TIE
    return first_smallest(incoherence.masked_fill(~near, torch.inf))


def kept_mass(mass: Tensor, density: float) -> Tensor:
    """(heads,): the mean over rows of the mass that each head's own mask keeps, of mass (heads, rows, columns)."""
    blocks = choose_blocks(mass, density, scope="head")
    return mass.masked_fill(~blocks, 0.0).sum(-1).mean(-1)


def effective_eps(eps: float, tokens: int) -> float:
    """The threshold of a small weight at this number of video tokens; the paper's is for its 17550."""
    return eps if tokens >= RESCALED_BELOW else eps * PAPER_TOKENS / tokens


def spread(blocks: int, most: int | None) -> Tensor:
    """int64, ascending: `most` of the blocks, the middle one of each of as many equal parts; all if they are few."""
    if most is None or blocks <= most:
        return torch.arange(blocks)
    return (2 * torch.arange(most) + 1) * blocks // (2 * most)


# -- which blocks ------------------------------------------------------------------------------------------------------


def mean_mass(query: Tensor, key: Tensor, block_size: int, valid: Tensor | None = None) -> Tensor:
    """float32 (B, H, N, N): the attention mass of each block over the valid queries of its row; rows sum to 1.

    query, key (B, H, S, D) in the order of the mask; valid: int (B,), valid tokens of each sample, a prefix.
    """
    lse = dense_lse(query, key, key_valid=valid)
    sums, _ = block_mass(query, key, lse, (block_size, block_size), query_valid=valid, key_valid=valid)
    tokens = query.shape[2]
    starts = torch.arange(sums.shape[2], device=query.device) * block_size
    ends = torch.full((1,), tokens, device=query.device) if valid is None else valid
    rows = (ends[:, None] - starts).clamp(1, block_size)
    return sums / rows[:, None, :, None]


def choose_blocks(mass: Tensor, density: float, text: Tensor | None = None, scope: str = "layer") -> Tensor:
    """bool (heads, rows, columns): the blocks to keep, by rank of their mass (heads, rows, columns).

    Always in: blocks with `text` (bool, rows x columns) and the first largest of each row. The largest of the others
    are added until round(density * blocks) are kept, over all heads or ("head") in each; of equals the first.
    """
    forced = torch.zeros_like(mass, dtype=torch.bool)
    forced.scatter_(-1, mass.argmax(-1, keepdim=True), True)
    if text is not None:
        forced |= text
    ranked = mass.masked_fill(forced, torch.inf)
    ranked = ranked.flatten(1) if scope == "head" else ranked.reshape(1, -1)
    wanted = round(density * ranked.shape[1])
    by_rank = ranked.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    kept.scatter_(-1, by_rank[:, :wanted], True)
    return kept.view_as(forced) | forced


def token_density(blocks: Tensor, tokens: int, block_size: int) -> float:
    """Kept share of token pairs, the last block at its true length; the mean over heads of bool (heads, N, N)."""
    lengths = block_lengths(tokens, block_size, blocks.device).double()
    return float((blocks.double() @ lengths @ lengths).mean() / tokens**2)


def block_lengths(tokens: int, block_size: int, device: torch.device) -> Tensor:
    """int64 (N,): tokens of each block."""
    starts = torch.arange(0, tokens, block_size, device=device)
    return (tokens - starts).clamp(max=block_size)


def nearest_slots(seen: list[int], count: int) -> list[int]:
    """For each slot the place in `seen` of the nearest that was seen, the earlier of two: experts see part of a run."""
    return [min(range(len(seen)), key=lambda place: (abs(seen[place] - slot), place)) for slot in range(count)]


def _on_known_device(tensor: Tensor) -> Tensor:
    """Score functions run on CUDA and the CPU; a calibration may take its time elsewhere."""
    return tensor if tensor.device.type in ("cuda", "cpu") else tensor.cpu()
