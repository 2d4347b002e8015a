"""How the CPU backend walks a BlockMask: which query blocks it takes together, and how it cuts their lists.

What one step computes must fit the second-level cache of a core. Query blocks with lists of one length form batches
of that size; a list too long for one step is cut into equal parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .block_mask import BlockMask, count_blocks

# Per thread and step: with more, less is lost in calls; with less, less falls out of the cache.
SCORES = 1 << 18
KEY_ELEMENTS = 1 << 18
# Query blocks of a batch, unless it is one alone: single products are faster than a few together.
GROUPED = 4


@dataclass(frozen=True)
class Step:
    """Some positions in the lists of the first `active` query blocks of a batch."""

    columns: Tensor  # int64 (active, positions), key blocks, counted over batch * heads * blocks
    first: bool  # no query block of the batch has had a step before
    cut: bool  # some of the key blocks end early
    partial: Tensor | None  # bool (active, positions): where the rule decides; None: nowhere
    run: slice | None  # the key blocks where all are neighbours in memory: nothing to gather

    @property
    def active(self) -> int:
        return self.columns.shape[0]


@dataclass(frozen=True)
class Batch:
    """Query blocks taken together, longest list first."""

    rows: Tensor  # int64 (R,), query blocks, counted over batch * heads * blocks
    steps: list[Step]


# Masks are used by every layer and step, so what they boil down to is kept as long as they live.
_plans: WeakKeyDictionary[BlockMask, dict[tuple, list[Batch]]] = WeakKeyDictionary()


def plan(mask: BlockMask, batch: int, heads: int, head_dim: int, *, one_by_one: bool = False) -> list[Batch]:
    """Every query block that sees a key, in batches.

    one_by_one: a step is one position of the lists, for what is decided block by block.
    """
    made = _plans.setdefault(mask, {})
    threads = torch.get_num_threads()
    name = (batch, heads, head_dim, threads, one_by_one)
    if name not in made:
        query_block, key_block = mask.block_size
        at_once = threads * min(SCORES // (query_block * key_block), KEY_ELEMENTS // (key_block * head_dim))
        made[name] = _make(mask, batch, heads, max(at_once, 1), one_by_one)
    return made[name]


def key_lengths(mask: BlockMask) -> Tensor:
    """int32 (B or 1, Nk): keys of each key block that exist and are valid."""
    ends = mask.key_bounds[None]
    if mask.key_valid is not None:
        ends = torch.minimum(ends, mask.key_valid[:, None])
    return ends.diff(dim=1)


def _make(mask: BlockMask, batch: int, heads: int, at_once: int, one_by_one: bool) -> list[Batch]:
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
    for rows in _groups(listed, whole, at_once, one_by_one):
        counts, wholes = listed[rows].tolist(), whole[rows, None]
        position = torch.arange(counts[0])
        partial = position >= wholes
        place = torch.where(partial, position - wholes + width, position).clamp_(max=lists.shape[1] - 1)
        columns = lists[list_of[rows, None], place] + first_column[rows, None]
        steps = []
        for first, last in _cuts(counts[0], int(wholes[0]), max(at_once // len(rows), 1), one_by_one):
            active = sum(count > first for count in counts)
            part = columns[:active, first:last].contiguous()
            cut = any_early and bool(ends_early[part].any())
            in_part = partial[:active, first:last] if listed is not whole else None
            if in_part is not None and not bool(in_part.any()):
                in_part = None
            run = None
            if active == 1 and in_part is None and int(part[0, -1] - part[0, 0]) == last - first - 1:
                run = slice(int(part[0, 0]), int(part[0, -1]) + 1)
            steps.append(Step(part, first == 0, cut, in_part, run))
        made.append(Batch(rows, steps))
    return made


def _groups(listed: Tensor, whole: Tensor, at_once: int, one_by_one: bool) -> list[Tensor]:
    """Ids of the query blocks of each batch. Unless one_by_one, all of a batch have lists of the same lengths."""
    kinds = listed.long() * (int(whole.max()) + 1) + whole
    order = kinds.argsort(descending=True, stable=True)[: int((listed > 0).sum())]
    if one_by_one:
        return list(order.split(at_once)) if len(order) else []  # split would give one empty part
    sizes = kinds[order].unique_consecutive(return_counts=True)[1]
    groups: list[Tensor] = []
    for group in order.split(sizes.tolist()):
        fit = at_once // int(listed[group[0]])
        groups += group.split(fit if fit >= GROUPED else 1)
    # One head after the other: its keys and values stay in the last-level cache.
    return sorted(groups, key=lambda rows: int(rows[0]))


def _cuts(listed: int, whole: int, at_once: int, one_by_one: bool) -> Iterator[tuple[int, int]]:
    """Where the steps start and stop: none is half whole and half partial."""
    if one_by_one:
        yield from ((position, position + 1) for position in range(listed))
        return
    for first, last in ((0, whole), (whole, listed)):
        if first < last:
            size = count_blocks(last - first, count_blocks(last - first, at_once))
            yield from ((start, min(start + size, last)) for start in range(first, last, size))
