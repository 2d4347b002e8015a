"""VMoBA's selection: which chunks each query token reads (arXiv 2506.23858, section 3). Pure functions of tensors."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnproc.errors import SettingsError
from attnproc.kernels.selection import largest
from attnproc.sparse.vmoba_chunks import Partition

MODES = ("topk", "threshold")
# Which (query, chunk) pairs compete with one another: those of one query and head, of one head, all, of one chunk.
SCOPES = ("query_head", "head_global", "overall", "block")

# Weights are summed as integers of this unit: float32 weights below 1 are no finer, and sums come out the same in
# every order, so on every device and for both ways of ranking.
UNIT = 2.0**-24
SORTED_SIZE = 2**16  # larger groups are ranked by histogram
HISTOGRAM_LEVELS = ((20, 12), (8, 12), (0, 8))  # (shift, bits): the digits of a 32-bit score, the highest first
GATE_SIZE = 2**25  # scores held at a time, where heads do not compete


@torch.no_grad()
def select_chunks(
    query: Tensor, key: Tensor, partition: Partition, *, mode: str, scope: str, topk: int = 1, threshold: float = 0.0
) -> Tensor:
    """Which chunks each query token reads: bool (B, H, S, C), its own always among them.

    query, key: (B, H, S, D) of the video tokens in raster order, any floating dtype; the gate is float32. Samples do
    not influence one another.
    mode, scope, topk, threshold: as in `VMoBAAttnProcessor`; a top-k above C selects all C.

    Raises:
        SettingsError: a mode or scope that is not known, top-k over the candidates of one chunk, or other tokens than
            those of the partition.
    """
    check_selection(mode, scope)
    if query.shape[2] != len(partition.order) or key.shape[2] != query.shape[2]:
        raise SettingsError(
            f"query has {query.shape[2]} tokens and key {key.shape[2]}, but the partition is for "
            f"{len(partition.order)}; give the video tokens of its latent grid, without text."
        )
    how = {"mode": mode, "scope": scope, "topk": topk, "threshold": threshold}
    chosen = [selected for selected, _ in selections(query, key, partition, **how)]
    return torch.cat(chosen).unflatten(0, query.shape[:2])


def pair_density(selection: Tensor, partition: Partition) -> float:
    """Share of the query-key pairs of the video that a selection (B, H, S, C) holds."""
    pairs = (selection.sum((0, 1, 2)) * partition.lengths).sum()
    return int(pairs) / (selection[..., 0].numel() * len(partition.order))


def chunk_means(key: Tensor, partition: Partition) -> Tensor:
    """Mean key of each chunk: float32 (H, C, D) for key (H, S, D)."""
    tokens = key[:, partition.members.flatten()].float().unflatten(1, partition.members.shape)
    real = torch.arange(partition.members.shape[1], device=key.device) < partition.lengths[:, None]
    return tokens.masked_fill(~real[..., None], 0.0).sum(2) / partition.lengths[:, None]


def choose_pairs(gate: Tensor, own: Tensor, *, mode: str, scope: str, topk: int, threshold: float) -> Tensor:
    """The selection of one sample: bool (H, S, C) for the gate float32 (H, S, C).

    own: bool (S, C), True for the chunk of each query; these pairs are always selected and count into the budget.
    """
    chunks = gate.shape[2]
    own = own.expand(gate.shape)
    if topk >= chunks if mode == "topk" else threshold >= 1.0:  # rounding must not leave out the lowest pair
        return torch.ones_like(own)
    if mode == "topk" and scope == "query_head":
        return own | largest(gate.masked_fill(own, torch.inf), count=topk)
    scores, own_pairs = _grouped(gate, scope), _grouped(own, scope)
    if mode == "topk":
        order, amount = scores.masked_fill(own_pairs, torch.inf), torch.ones_like(own_pairs, dtype=torch.int32)
        need = torch.full((len(scores), 1), topk * scores.shape[1] / chunks, dtype=torch.float64, device=gate.device)
    else:
        weight = _weights(scores)
        order, amount = weight.masked_fill(own_pairs, -1.0), (weight / UNIT).round().int()
        total, of_own = amount.sum(1, keepdim=True), amount.masked_fill(~own_pairs, 0).sum(1, keepdim=True)
        need = threshold * (total.double() + 1e-6 / UNIT) - of_own
        amount = amount.masked_fill(own_pairs, 0)
    take = take_sorted if scores.shape[1] <= SORTED_SIZE else take_by_histogram
    return own | _ungrouped(take(order, amount, need), scope, gate.shape)


def take_sorted(order: Tensor, amount: Tensor, need: Tensor) -> Tensor:
    """The largest of each group until their amounts reach what is needed, and at least one: bool (G, N).

    order: float32 (G, N), amount: int32 (G, N), equal where order is, need: float64 (G, 1). Of equals the first win.
    """
    ranked = order.argsort(dim=1, descending=True, stable=True)
    amount = amount.gather(1, ranked)
    taken = amount.cumsum(1) - amount < need  # while those before it are not enough
    taken[:, 0] = True
    return torch.zeros_like(taken).scatter_(1, ranked, taken)


def take_by_histogram(order: Tensor, amount: Tensor, need: Tensor) -> Tensor:
    """As `take_sorted`, bit by bit, for groups too large to sort: finds the score of the last one digit by digit."""
    # The bits of a float as an integer in the same order. Adding 0 makes one zero of two.
    bits = (order + 0.0).view(torch.int32).long()
    code = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2**31
    groups, device = len(order), order.device
    cut, before = (torch.zeros(groups, 1, dtype=torch.int64, device=device) for _ in range(2))
    for shift, width in HISTOGRAM_LEVELS:
        bins = 2**width
        digit = (code >> shift) - (cut << width)
        digit = torch.where((digit >= 0) & (digit < bins), digit, bins)  # a spare bin for what is above or below
        histogram = torch.zeros(2, groups, bins + 1, dtype=torch.int64, device=device)
        histogram[0].scatter_add_(1, digit, amount.long())
        histogram[1].scatter_add_(1, digit, torch.ones_like(digit))
        sums, filled = histogram[0, :, :bins], histogram[1, :, :bins] > 0
        larger = before + sums.flip(1).cumsum(1).flip(1) - sums
        wanted = filled & (larger < need)
        highest = (filled * torch.arange(bins, device=device)).argmax(1, keepdim=True)
        last = torch.where(wanted.any(1, keepdim=True), wanted.int().argmax(1, keepdim=True), highest)
        cut, before = (cut << width) + last, larger.gather(1, last)
    equal = code == cut
    rank = equal.cumsum(1)
    each = amount.masked_fill(~equal, 0).amax(1, keepdim=True)
    return (code > cut) | (equal & ((before + (rank - 1) * each < need) | (rank == 1)))


def selections(query: Tensor, key: Tensor, partition: Partition, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """bool (heads, S, C) and whether the gate is finite, a few heads of one sample at a time, in order.

    What is computed together does not depend on the batch, so neither does rounding.
    """
    heads, queries = query.shape[1:3]
    own = partition.chunk[:, None] == torch.arange(partition.chunks, device=query.device)
    at_once = heads
    if how["scope"] in ("query_head", "head_global"):
        at_once = min(heads, max(1, GATE_SIZE // (queries * partition.chunks)))
    for sample in range(len(query)):
        for head in range(0, heads, at_once):
            some = slice(head, head + at_once)
            with torch.autocast(query.device.type, enabled=False):  # it would make the product bfloat16
                gate = query[sample, some].float() @ chunk_means(key[sample, some], partition).mT
            yield choose_pairs(gate, own, **how), gate.isfinite().all()


def _weights(scores: Tensor) -> Tensor:
    """Scores of each group from 0 (its smallest) to 1 (its largest); 1 where all are the same."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    spread = high - low
    flat = spread <= 1e-6
    return torch.where(flat, 1.0, (scores - low) / torch.where(flat, 1.0, spread))


def _grouped(pairs: Tensor, scope: str) -> Tensor:
    """(H, S, C) as (groups, candidates)."""
    if scope == "block":
        return pairs.permute(2, 0, 1).flatten(1)
    if scope == "overall":
        return pairs.reshape(1, -1)
    return pairs.flatten(1) if scope == "head_global" else pairs.flatten(0, 1)


def _ungrouped(groups: Tensor, scope: str, shape: torch.Size) -> Tensor:
    """The inverse of `_grouped`."""
    heads, queries, chunks = shape
    if scope == "block":
        return groups.view(chunks, heads, queries).permute(1, 2, 0)
    return groups.view(shape)


def check_selection(mode: str, scope: str) -> None:
    for name, value, known in (("mode", mode, MODES), ("scope", scope, SCOPES)):
        if value not in known:
            raise SettingsError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")
    if mode == "topk" and scope == "block":
        raise SettingsError(
            "scope='block' came with mode='topk', which has no budget there; use mode='threshold' or another scope."
        )
