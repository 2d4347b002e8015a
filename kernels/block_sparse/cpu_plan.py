"""How the CPU backend walks a BlockMask: which query blocks it takes together, and how it cuts their lists.

What one step computes must fit the second-level cache of each core, and matrix products are fastest when every core
has a few of them. So a batch is several query blocks with lists of nearly one length, and a step takes some positions
of their lists; towards the end those with longer lists go on alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .block_mask import BlockMask, count_blocks

# Per thread and step: with more, less is lost in calls; with less, less falls out of the cache.
SCORES = 1 << 18
ELEMENTS = 1 << 18  # of queries, of keys and of values
KEYS = 512  # of each query block in a step


@dataclass(frozen=True)
class Step:
    """Some positions in the lists of the first `active` query blocks of a batch."""

    active: int
    positions: int
    columns: Tensor  # int64 (active * positions,), key blocks, counted over batch * heads * blocks
    first: bool  # no query block of the batch has had a step before
    cut: bool  # some of the key blocks end early
    partial: Tensor | None  # bool (active, positions): where the rule decides; None: nowhere


@dataclass(frozen=True)
class Batch:
    """Query blocks taken together, longest list first."""

    rows: Tensor  # int64 (R,), query blocks, counted over batch * heads * blocks
    steps: list[Step]


# Masks are used by every layer and step, so what they boil down to is kept as long as they live.
_plans: WeakKeyDictionary[BlockMask, dict[tuple, list[Batch]]] = WeakKeyDictionary()


def plan(mask: BlockMask, batch: int, heads: int, head_dim: int, *, one_by_one: bool = False) -> list[Batch]:
    """Every query block that sees a key, in batches.

    one_by_one: a step is one key block of each list, for what is decided block by block.
    """
    made = _plans.setdefault(mask, {})
    threads = torch.get_num_threads()
    name = (batch, heads, head_dim, threads, one_by_one)
    if name not in made:
        query_block, key_block = mask.block_size
        at_once = threads * min(SCORES // (query_block * key_block), ELEMENTS // (key_block * head_dim))
        most = threads * (ELEMENTS // (query_block * head_dim))
        made[name] = _make(mask, batch, heads, max(at_once, 1), max(most, 1), one_by_one)
    return made[name]


def key_lengths(mask: BlockMask) -> Tensor:
    """int32 (B or 1, Nk): keys of each key block that exist and are valid."""
    ends = mask.key_bounds[None]
    if mask.key_valid is not None:
        ends = torch.minimum(ends, mask.key_valid[:, None])
    return ends.diff(dim=1)


def _make(mask: BlockMask, batch: int, heads: int, at_once: int, most: int, one_by_one: bool) -> list[Batch]:
    whole = mask.visible_counts.expand(batch, heads, -1).reshape(-1)
    listed, lists, width = whole, mask.indices, mask.indices.shape[-1]
    if mask.visible_partial_counts is not None and mask.partial_indices is not None:
        listed = whole + mask.visible_partial_counts.expand(batch, heads, -1).reshape(-1)
        lists = torch.cat((lists, mask.partial_indices), -1)
    lists = lists.reshape(-1, lists.shape[-1])
    # Row r of the expanded mask reads row list_of[r] of the stored lists, shifted to its own head's key blocks.
    list_of = torch.arange(mask.counts.numel()).view(mask.counts.shape).expand(batch, heads, -1).reshape(-1)
    first_column = torch.arange(batch * heads).repeat_interleave(mask.grid[0]) * mask.grid[1]
    ends_early = (key_lengths(mask) < mask.block_size[1])[:, None].expand(batch, heads, -1).reshape(-1)
    any_early = bool(ends_early.any())

    made = []
    for rows in _groups(listed, whole, mask.grid[0], at_once, most, mask.block_size[1], one_by_one):
        counts, wholes = listed[rows].tolist(), whole[rows].tolist()
        place, partial = torch.arange(counts[0])[None], None
        if listed is not whole:
            partial = place >= whole[rows, None]
            place = torch.where(partial, place - whole[rows, None] + width, place).clamp_(max=lists.shape[1] - 1)
        columns = lists[list_of[rows, None], place] + first_column[rows, None]
        steps = []
        for first, last, active in _cuts(counts, {min(wholes), max(wholes)}, at_once, one_by_one):
            part = columns[:active, first:last].reshape(-1)
            cut = any_early and bool(ends_early[part].any())
            by_rule = None if partial is None or last <= min(wholes) else partial[:active, first:last]
            steps.append(Step(active, last - first, part, first == 0, cut, by_rule))
        made.append(Batch(rows, steps))
    return made


def _groups(
    listed: Tensor, whole: Tensor, rows: int, at_once: int, most: int, key_block: int, one_by_one: bool
) -> Iterator[Tensor]:
    """Ids of the query blocks of each batch, the longest lists of a batch first.

    rows: query blocks of a head; most: query blocks of a batch; at_once: key blocks of a step.
    """
    positions = 1 if one_by_one else max(KEYS // key_block, 1)
    # One head after the other, as its keys and values stay in the last-level cache; several if they are short.
    together = rows * count_blocks(8 * max(at_once // positions, 1), rows)
    kinds = whole.long() * (int(listed.max()) + 1) + listed
    for first in range(0, len(kinds), together):
        order = kinds[first : first + together].argsort(descending=True, stable=True) + first
        order = order[listed[order] > 0]
        while len(order):
            size = min(max(at_once // min(positions, int(listed[order[0]])), 1), most)
            group, order = order[:size], order[size:]
            yield group[listed[group].argsort(descending=True, stable=True)]


def _cuts(counts: list[int], wholes: set[int], at_once: int, one_by_one: bool) -> Iterator[tuple[int, int, int]]:
    """First and last position and the query blocks of each step, for descending counts of listed blocks.

    wholes: the first and the last position at which whole blocks end in some list. Only steps between the two mix whole
    and partial blocks.
    """
    active = len(counts)
    for first, last in pairwise(sorted({0, *wholes, *counts})):
        while counts[active - 1] <= first:
            active -= 1
        size = 1 if one_by_one else count_blocks(last - first, count_blocks(last - first, max(at_once // active, 1)))
        yield from ((start, min(start + size, last), active) for start in range(first, last, size))
