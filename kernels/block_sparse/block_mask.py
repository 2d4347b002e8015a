"""BlockMask: which key blocks each query block sees, as a count and an ascending list per query block.

Rows of the mask are query blocks, columns are key blocks. Memory grows with the number of blocks kept, never with
the square of the sequence. A block in `indices` is a full block in the words of torch FlexAttention: every query of
the query block sees every valid key of the key block. A block in `partial_indices` is a partial one: `rule` decides
token by token.
"""

import importlib.util
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .errors import bad_argument
from .once import once
from .rules import TokenRule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


FIELDS = ("counts", "indices", "key_valid", "partial_counts", "partial_indices", "query_offsets", "key_offsets")

# The masks there are, by the ids of their tensors: those are all that goes through compiled code (see op.py).
living: "WeakValueDictionary[tuple[int, ...], BlockMask]" = WeakValueDictionary()


def count_blocks(length: int, block: int) -> int:
    """Blocks needed to cover `length` tokens; the last one may be a tail."""
    return -(-length // block)


class KeyMajor(NamedTuple):
    """The lists of a mask seen from the keys: for each key block the ascending query blocks that see it."""

    counts: Tensor  # int32 (Bm, Hm, Nk)
    indices: Tensor  # int32 (Bm, Hm, Nk, M)
    partial_counts: Tensor | None
    partial_indices: Tensor | None
    order: Tensor  # int32 (Bm, Hm, Nk): key blocks by the length of their lists, longest first


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A block-sparse attention mask. Treat its tensors as read-only: backends keep what they derive from them.

    counts: int32 (Bm, Hm, Nq), key blocks listed for each query block. Bm is 1 or the batch size, Hm is 1 or the
        number of heads; 1 means shared by all.
    indices: int32 (Bm, Hm, Nq, M), ascending key block ids. Entries at and past the count are 0 and never read.
    query_length, key_length: true lengths in tokens; they need not be multiples of the block.
    block_size: (query block, key block) in tokens.
    key_valid: int32 (B,) or (1,), valid keys of each sample (a prefix: the rest is padding); None means all of them.
    partial_counts, partial_indices: as counts and indices, for the key blocks in which `rule` decides token by token.
        No block is in both lists.
    rule: which tokens see each other in partial blocks.
    query_offsets, key_offsets: int32 (Nq + 1,), (Nk + 1,), first token of each block and the length at the end. With
        them blocks are of 1 to `block_size` tokens each, so that they can end where frames, chunks or text begin.

    The constructor checks shapes and dtypes; `validate()` also checks the values. `from_blocks` is the usual way in.
    """

    counts: Tensor
    indices: Tensor
    query_length: int
    key_length: int
    block_size: tuple[int, int]
    key_valid: Tensor | None = None
    partial_counts: Tensor | None = None
    partial_indices: Tensor | None = None
    rule: TokenRule | None = None
    query_offsets: Tensor | None = None
    key_offsets: Tensor | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.query_length, self.key_length, self.block_size)
        rows = _blocks_of(self.query_length, self.block_size[0], self.query_offsets)
        lists = [("counts", self.counts, "indices", self.indices)]
        given = [x is not None for x in (self.partial_counts, self.partial_indices, self.rule)]
        if any(given) and not all(given):
            raise bad_argument(
                "partial_counts",
                "only some of partial_counts, partial_indices and rule",
                "all three or none",
                "The rule says what is visible in the partial blocks.",
            )
        if self.partial_counts is not None and self.partial_indices is not None:
            lists.append(("partial_counts", self.partial_counts, "partial_indices", self.partial_indices))
        for counts_name, counts, indices_name, indices in lists:
            for name, tensor, rank in ((counts_name, counts, 3), (indices_name, indices, 4)):
                if tensor.dtype != torch.int32 or tensor.ndim != rank:
                    raise bad_argument(
                        name,
                        f"{tensor.dtype} of shape {tuple(tensor.shape)}",
                        f"int32 with {rank} dimensions (mask batch, mask heads, query blocks{', M' * (rank - 3)})",
                        "Build the mask with BlockMask.from_blocks.",
                    )
                if tensor.shape[2] != rows:
                    raise bad_argument(
                        name,
                        f"{tensor.shape[2]} rows",
                        f"{rows} rows, one per block of {self.block_size[0]} of {self.query_length} queries",
                        "Check query_length and block_size.",
                    )
            if indices.shape[:3] != counts.shape or counts.shape != self.counts.shape or indices.shape[3] == 0:
                raise bad_argument(
                    indices_name,
                    f"shape {tuple(indices.shape)}",
                    f"shape {(*self.counts.shape, 'M')} with M at least 1, as counts",
                    "Give both the same mask batch, mask heads and rows.",
                )
        for name, tensor in self._named_tensors():
            if tensor.device != self.counts.device:
                raise bad_argument(
                    name,
                    f"device {tensor.device}",
                    f"device {self.counts.device}, as counts",
                    "Move the mask with mask.to(device).",
                )
        if self.rule is not None:
            self.rule.check(self.query_length, self.key_length, self.grid)
        if self.key_valid is not None:
            self._check_key_valid(self.key_valid)
        self._check_rule_sizes()
        if not torch.compiler.is_compiling():
            living[tuple(id(tensor) for tensor in self.tensors)] = self

    # Ways to build one

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        query_length: int,
        key_length: int,
        block_size: tuple[int, int],
        key_valid: Tensor | None = None,
        *,
        partial: Tensor | None = None,
        rule: TokenRule | None = None,
        query_offsets: Tensor | None = None,
        key_offsets: Tensor | None = None,
    ) -> "BlockMask":
        """The mask that keeps block (i, j) where `blocks` is True.

        blocks: bool (Nq, Nk) or (Bm, Hm, Nq, Nk), Nq and Nk the lengths in blocks, tails included.
        key_valid: as in `with_key_valid`.
        partial: bool, the shape of blocks; True where `rule` decides token by token. A block that is also True in
            `blocks` is visible as a whole.
        query_offsets, key_offsets: bounds of ragged blocks, see the class; checked here.
        """
        _check_lengths(query_length, key_length, block_size)
        for name, offsets, length, size in (
            ("query_offsets", query_offsets, query_length, block_size[0]),
            ("key_offsets", key_offsets, key_length, block_size[1]),
        ):
            if offsets is not None:
                _check_offsets(name, offsets, length, size)
        grid = (
            _blocks_of(query_length, block_size[0], query_offsets),
            _blocks_of(key_length, block_size[1], key_offsets),
        )
        lists: list[Tensor | None] = []
        whole = None
        for name, kept in (("blocks", blocks), ("partial", partial)):
            if kept is None:
                lists += [None, None]
                continue
            kept = kept[None, None] if kept.ndim == 2 else kept
            if kept.dtype != torch.bool or kept.ndim != 4 or tuple(kept.shape[-2:]) != grid:
                raise bad_argument(
                    name,
                    f"{kept.dtype} of shape {tuple(kept.shape)}",
                    f"bool of shape {grid} or (mask batch, mask heads, {grid[0]}, {grid[1]})",
                    "The last two sizes are the lengths in blocks, rounded up.",
                )
            lists += make_lists(kept if whole is None else kept & ~whole)
            whole = kept
        counts, indices, partial_counts, partial_indices = lists
        assert counts is not None and indices is not None
        mask = cls(
            counts,
            indices,
            query_length,
            key_length,
            block_size,
            None,
            partial_counts,
            partial_indices,
            rule,
            query_offsets,
            key_offsets,
        )
        return mask.with_key_valid(key_valid)

    @classmethod
    def full(
        cls,
        query_length: int,
        key_length: int,
        block_size: tuple[int, int],
        key_valid: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "BlockMask":
        """The dense mask: every query block sees every key block. One list is stored and shared by all rows."""
        _check_lengths(query_length, key_length, block_size)
        rows, columns = count_blocks(query_length, block_size[0]), count_blocks(key_length, block_size[1])
        counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
        indices = torch.arange(columns, dtype=torch.int32, device=device).expand(1, 1, rows, columns)
        return cls(counts, indices, query_length, key_length, block_size).with_key_valid(key_valid)

    def with_key_valid(self, key_valid: Tensor | None) -> "BlockMask":
        """The same blocks with other numbers of valid keys: integers (B,) or (1,), each in 0..key_length."""
        if key_valid is None:
            return self if self.key_valid is None else replace(self, key_valid=None)
        if key_valid.is_floating_point() or key_valid.is_complex() or key_valid.dtype == torch.bool:
            raise bad_argument(
                "key_valid",
                str(key_valid.dtype),
                "integers, one number of keys per sample",
                "For a boolean padding mask with a valid prefix pass padding.sum(-1).",
            )
        least, most = once(key_valid, _extremes)
        if not 0 <= least <= most <= self.key_length:
            raise bad_argument(
                "key_valid",
                f"values from {least} to {most}",
                f"values from 0 to key_length = {self.key_length}",
                "Count only keys that exist.",
            )
        return replace(self, key_valid=key_valid.to(self.device, torch.int32, copy=True))

    @classmethod
    def from_flex(cls, flex: "FlexBlockMask", key_valid: Tensor | None = None) -> "BlockMask":
        """The mask of a FlexAttention BlockMask made of whole blocks; see `attnproc.kernels.flex.from_flex`."""
        from .flex import from_flex

        return from_flex(flex, key_valid)

    def to_flex(self) -> "FlexBlockMask":
        """The same mask for `torch.nn.attention.flex_attention`; tails, padding and the rule go into its mask_mod."""
        from .flex import to_flex

        return to_flex(self)

    def to(self, device: torch.device | str) -> "BlockMask":
        """The mask with its tensors on `device`; itself if they are there."""
        if torch.empty(0, device=device).device == self.device:
            return self
        moved: dict[str, Any] = {
            name: tensor.to(device) for name, tensor in self._named_tensors() if not name.startswith("rule.")
        }
        return replace(self, **moved, rule=None if self.rule is None else self.rule.to(device))

    # What it says

    @property
    def tensors(self) -> "list[Tensor | None]":
        """The tensors of `FIELDS`, then those of the rule."""
        return [*(getattr(self, name) for name in FIELDS), *(() if self.rule is None else self.rule.tensors)]

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def batch(self) -> int:
        """Samples the mask tells apart: 1 if it is shared by the batch."""
        padded = 1 if self.key_valid is None else self.key_valid.shape[0]
        return max(self.counts.shape[0], padded, self._rule_sizes()[0])

    @property
    def heads(self) -> int:
        """Heads the mask tells apart: 1 if it is shared by all heads."""
        return max(self.counts.shape[1], self._rule_sizes()[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(query blocks, key blocks), tails included."""
        return self.counts.shape[2], _blocks_of(self.key_length, self.block_size[1], self.key_offsets)

    @property
    def row_counts(self) -> Tensor:
        """int32 (Bm, Hm, Nq): key blocks listed for each query block, partial ones included."""
        return self.counts if self.partial_counts is None else self.counts + self.partial_counts

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors; a list shared by several rows is counted once."""
        return sum(tensor.untyped_storage().nbytes() for _, tensor in self._named_tensors())

    @cached_property
    def query_bounds(self) -> Tensor:
        """int32 (Nq + 1,): first query of each block, and the number of queries at the end."""
        return _bounds(self.query_length, self.block_size[0], self.query_offsets, self.device)

    @cached_property
    def key_bounds(self) -> Tensor:
        """int32 (Nk + 1,): first key of each block, and the number of keys at the end."""
        return _bounds(self.key_length, self.block_size[1], self.key_offsets, self.device)

    @cached_property
    def visible_counts(self) -> Tensor:
        """int32 (batch, Hm, Nq): listed key blocks that hold at least one valid key. They are the first ones."""
        return self._visible_blocks(self.counts, self.indices)

    @cached_property
    def visible_partial_counts(self) -> Tensor | None:
        """As `visible_counts`, for the partial blocks."""
        if self.partial_counts is None or self.partial_indices is None:
            return None
        return self._visible_blocks(self.partial_counts, self.partial_indices)

    @cached_property
    def row_order(self) -> Tensor:
        """int32 (batch, Hm, Nq): query blocks by the length of their visible lists, longest first."""
        partial = self.visible_partial_counts
        lengths = self.visible_counts if partial is None else self.visible_counts + partial
        return lengths.argsort(dim=-1, descending=True, stable=True).int()

    @cached_property
    def visible_keys(self) -> Tensor:
        """int32 (batch, Hm, Nq): valid keys of the listed blocks of each query block, those of partial blocks too."""
        keys = self._keys_of(self.counts, self.indices)
        if self.partial_counts is None or self.partial_indices is None:
            return keys
        return keys + self._keys_of(self.partial_counts, self.partial_indices)

    @cached_property
    def kept_pairs(self) -> Tensor:
        """int64 scalar tensor: (query, key) token pairs in listed blocks, summed over the mask's samples and heads."""
        queries = self.query_bounds.diff()
        return (self.visible_keys.long() * queries).sum()

    @cached_property
    def density(self) -> float:
        """(query, key) token pairs in listed blocks over query_length * key_length; the mean over samples and heads.

        Exact with tail blocks; partial blocks count as a whole, because all of each is computed. Padding keys count
        as not kept, so a ragged batch is below 1.0 even under a full mask. Reading it waits for the device.
        """
        maps = self.visible_keys.shape[0] * self.visible_keys.shape[1]
        return int(self.kept_pairs) / (maps * self.query_length * self.key_length)

    @cached_property
    def by_key(self) -> KeyMajor:
        """The lists seen from the keys, for the backward pass."""
        whole = make_lists(_to_blocks(self.counts, self.indices, self.grid[1]).transpose(-1, -2))
        partial: tuple[Tensor | None, Tensor | None] = (None, None)
        lengths = whole[0]
        if self.partial_counts is not None:
            partial = make_lists(self.partial_blocks().transpose(-1, -2))
            lengths = lengths + partial[0]
        return KeyMajor(*whole, *partial, lengths.argsort(dim=-1, descending=True, stable=True).int())

    def to_blocks(self) -> Tensor:
        """bool (Bm, Hm, Nq, Nk): blocks in either list. Without partial blocks the inverse of `from_blocks`."""
        blocks = _to_blocks(self.counts, self.indices, self.grid[1])
        return blocks if self.partial_counts is None else blocks | self.partial_blocks()

    def partial_blocks(self) -> Tensor:
        """bool (Bm, Hm, Nq, Nk): the partial blocks."""
        if self.partial_counts is None or self.partial_indices is None:
            return torch.zeros(*self.counts.shape, self.grid[1], dtype=torch.bool, device=self.device)
        return _to_blocks(self.partial_counts, self.partial_indices, self.grid[1])

    def token_mask(self) -> Tensor:
        """bool (batch, heads, query_length, key_length) of the mask, True where a query sees a key.

        This is S x S: for tests, pictures and the oracle on short sequences only.
        """
        rows, columns = _block_of_token(self.query_bounds), _block_of_token(self.key_bounds)
        tokens = _to_blocks(self.counts, self.indices, self.grid[1])[:, :, rows][..., columns]
        if self.rule is not None:
            ids = [torch.arange(n, device=self.device) for n in (*self._rule_sizes(), len(rows), len(columns))]
            sample, head, query, key = (x.view([-1 if i == j else 1 for j in range(4)]) for i, x in enumerate(ids))
            seen = self.rule.visible(sample, head, query, key, columns)
            tokens = tokens | (self.partial_blocks()[:, :, rows][..., columns] & seen)
        if self.key_valid is None:
            return tokens
        return tokens & (torch.arange(self.key_length, device=self.device) < self.key_valid.view(-1, 1, 1, 1))

    def validate(self) -> "BlockMask":
        """Checks the values too and returns the mask: counts in range, lists ascending, in range, 0 past the count."""
        columns = self.grid[1]
        for prefix in ("", "partial_"):
            counts, indices = getattr(self, f"{prefix}counts"), getattr(self, f"{prefix}indices")
            if counts is None:
                continue
            width = indices.shape[-1]
            if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= width:
                raise bad_argument(
                    f"{prefix}counts",
                    f"values from {int(counts.min())} to {int(counts.max())}",
                    f"values from 0 to {width}, the width of {prefix}indices",
                    "Count only listed key blocks.",
                )
            listed = torch.arange(width, device=self.device) < counts[..., None]
            ascending = (indices[..., 1:] > indices[..., :-1]) | ~listed[..., 1:]
            in_range = (indices >= 0) & (indices < columns)
            if not bool(ascending.all() and in_range.all() and ((indices == 0) | listed).all()):
                raise bad_argument(
                    f"{prefix}indices",
                    "a list that does not ascend, leaves the range, or is not 0 past its count",
                    f"ascending key block ids in 0..{columns - 1}, then zeros",
                    "Build the mask with BlockMask.from_blocks.",
                )
        if bool((_to_blocks(self.counts, self.indices, columns) & self.partial_blocks()).any()):
            raise bad_argument(
                "partial_indices", "a block that is in indices too", "each block in one list", "Use from_blocks."
            )
        for name, offsets, length, size in (
            ("query_offsets", self.query_offsets, self.query_length, self.block_size[0]),
            ("key_offsets", self.key_offsets, self.key_length, self.block_size[1]),
        ):
            if offsets is not None:
                _check_offsets(name, offsets, length, size)
        if self.key_valid is not None:
            self.with_key_valid(self.key_valid)
        return self

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        found = [(name, getattr(self, name)) for name in FIELDS if getattr(self, name) is not None]
        rule = () if self.rule is None else self.rule.tensors
        return found + [(f"rule.{i}", tensor) for i, tensor in enumerate(rule)]

    def _rule_sizes(self) -> tuple[int, int]:
        """Samples and heads the rule tells apart."""
        bits = getattr(self.rule, "bits", None)
        return (1, 1) if bits is None else (bits.shape[0], bits.shape[1])

    def _visible_blocks(self, counts: Tensor, indices: Tensor) -> Tensor:
        if self.key_valid is None:
            return counts
        starts = self.key_bounds[indices] if self.key_offsets is not None else indices * self.block_size[1]
        listed = torch.arange(indices.shape[-1], device=self.device) < counts[..., None]
        return ((starts < self.key_valid.view(-1, 1, 1, 1)) & listed).sum(-1, dtype=torch.int32)

    def _keys_of(self, counts: Tensor, indices: Tensor) -> Tensor:
        if self.key_offsets is not None:
            return self._ragged_keys_of(counts, indices)
        # Lists ascend and valid keys are a prefix, so only the last visible block of a row can be cut.
        counts = self._visible_blocks(counts, indices)
        last = indices.expand(counts.shape[0], -1, -1, -1)
        last = last.gather(-1, (counts - 1).clamp(min=0)[..., None].long()).squeeze(-1)
        valid = self.key_length if self.key_valid is None else self.key_valid.view(-1, 1, 1)
        cut = ((last + 1) * self.block_size[1] - valid).clamp(min=0)
        return torch.where(counts > 0, counts * self.block_size[1] - cut, 0).int()

    def _ragged_keys_of(self, counts: Tensor, indices: Tensor) -> Tensor:
        ends = self.key_bounds[None]
        if self.key_valid is not None:
            ends = torch.minimum(ends, self.key_valid[:, None])
        lengths = ends.diff(dim=1)  # (samples, Nk)
        listed = torch.arange(indices.shape[-1], device=self.device) < counts[..., None]
        found = lengths[:, indices.long()]  # (samples, Bm, Hm, Nq, M): Bm is 1 or the samples
        found = torch.where(listed, found, 0).sum(-1, dtype=torch.int32)
        if found.shape[1] == 1:
            return found[:, 0]
        return found[0] if found.shape[0] == 1 else found.diagonal().permute(2, 0, 1)

    def _check_rule_sizes(self) -> None:
        samples, heads = self._rule_sizes()
        padded = 1 if self.key_valid is None else self.key_valid.shape[0]
        known = (max(self.counts.shape[0], padded), self.counts.shape[1])
        if any(1 != n != own != 1 for n, own in zip((samples, heads), known, strict=True)):
            allowed = [" or ".join(map(str, sorted({1, n}))) for n in known]
            raise bad_argument(
                "rule",
                f"bits of {samples} samples and {heads} heads",
                f"{allowed[0]} samples and {allowed[1]} heads, as the lists and key_valid have",
                "A size of 1 is shared.",
            )

    def _check_key_valid(self, key_valid: Tensor) -> None:
        if key_valid.dtype != torch.int32 or key_valid.ndim != 1 or not len(key_valid):
            raise bad_argument(
                "key_valid",
                f"{key_valid.dtype} of shape {tuple(key_valid.shape)} on {key_valid.device}",
                f"int32 of shape (batch,) on {self.device}",
                "Use mask.with_key_valid(number_of_valid_keys).",
            )
        if self.counts.shape[0] > 1 and key_valid.shape[0] not in (1, self.counts.shape[0]):
            raise bad_argument(
                "key_valid",
                f"{key_valid.shape[0]} samples",
                f"1 or {self.counts.shape[0]} samples, as the mask",
                "Give one number per sample.",
            )


def make_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 (Bm, Hm, N) and ascending lists int32 (Bm, Hm, N, M) of the True columns of each row."""
    if blocks.is_cuda and importlib.util.find_spec("triton") is not None:
        from . import triton_lists

        return triton_lists.make_lists(blocks)  # does not wait for the device: its lists are as wide as a row
    counts = blocks.sum(-1, dtype=torch.int32)
    width = max(int(counts.max()), 1) if counts.numel() else 1
    columns = blocks.reshape(-1).nonzero().squeeze(-1) % blocks.shape[-1]
    listed = torch.arange(width, device=blocks.device) < counts[..., None]
    indices = torch.zeros(listed.shape, dtype=torch.int32, device=blocks.device)
    # Both sides run row by row, so every list comes out ascending.
    indices.masked_scatter_(listed, columns.int())
    return counts, indices


def _to_blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """bool (Bm, Hm, N, columns): the inverse of `make_lists`."""
    blocks = torch.zeros(*counts.shape, columns, dtype=torch.bool, device=counts.device)
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    row, slot = listed.flatten(0, 2).nonzero(as_tuple=True)
    blocks.view(-1)[row * columns + indices.flatten(0, 2)[row, slot]] = True
    return blocks


def _blocks_of(length: int, block: int, offsets: Tensor | None) -> int:
    return count_blocks(length, block) if offsets is None else len(offsets) - 1


def _bounds(length: int, block: int, offsets: Tensor | None, device: torch.device) -> Tensor:
    if offsets is not None:
        return offsets.contiguous()  # kernels have no stride for them
    starts = torch.arange(count_blocks(length, block) + 1, dtype=torch.int32, device=device) * block
    return starts.clamp(max=length)


def _block_of_token(bounds: Tensor) -> Tensor:
    """int64 (tokens,): the block of each token."""
    return torch.arange(len(bounds) - 1, device=bounds.device).repeat_interleave(bounds.diff())


def _check_lengths(query_length: int, key_length: int, block_size: tuple[int, int]) -> None:
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if length < 1:
            raise bad_argument(name, str(length), "at least 1 token", "An empty sequence needs no mask.")
    if len(block_size) != 2 or not all(isinstance(size, int) and size >= 1 for size in block_size):
        raise bad_argument(
            "block_size",
            str(block_size),
            "(query block, key block), two integers of at least 1 token",
            "Use (128, 128) if in doubt.",
        )


def _extremes(tensor: Tensor) -> tuple[int, int]:
    """Smallest and largest value; (0, 0) if there is none."""
    return (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)


def _check_offsets(name: str, offsets: Tensor, length: int, size: int) -> None:
    problem = once(offsets, _offsets_problem, length, size)
    if problem:
        raise bad_argument(
            name,
            problem,
            f"int32 (blocks + 1,) from 0 to {length}, blocks of 1 to {size} tokens",
            "Give the first token of each block, and the length at the end.",
        )


def _offsets_problem(offsets: Tensor, length: int, size: int) -> str:
    """What is wrong with bounds of blocks, or ""; waits for the device."""
    if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 2:
        return f"{offsets.dtype} of shape {tuple(offsets.shape)}"
    if int(offsets[0]) != 0 or int(offsets[-1]) != length:
        return f"offsets from {int(offsets[0])} to {int(offsets[-1])}"
    least, most = _extremes(offsets.diff())
    return "" if 1 <= least <= most <= size else f"blocks of {least} to {most} tokens"
