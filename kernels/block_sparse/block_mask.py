"""BlockMask: which key blocks each query block sees, as a count and an ascending list per query block.

Rows of the mask are query blocks, columns are key blocks. Memory grows with the number of blocks kept, never with
the square of the sequence. The meaning of a kept block is that of a full block in torch FlexAttention's BlockMask:
every query of the query block sees every valid key of the key block.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import bad_argument

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


def count_blocks(length: int, block: int) -> int:
    """Blocks needed to cover `length` tokens; the last one may be a tail."""
    return -(-length // block)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A block-sparse attention mask. Treat its tensors as read-only: backends keep what they derive from them.

    counts: int32 (Bm, Hm, Nq), key blocks listed for each query block. Bm is 1 or the batch size, Hm is 1 or the
        number of heads; 1 means shared by all.
    indices: int32 (Bm, Hm, Nq, M), ascending key block ids. Entries at and past the count are 0 and never read.
    query_length, key_length: true lengths in tokens; they need not be multiples of the block.
    block_size: (query block, key block) in tokens.
    key_valid: int32 (B,) or (1,), valid keys of each sample (a prefix: the rest is padding); None means all of them.

    The constructor checks shapes and dtypes; `validate()` also checks the values. `from_blocks` is the usual way in.
    """

    counts: Tensor
    indices: Tensor
    query_length: int
    key_length: int
    block_size: tuple[int, int]
    key_valid: Tensor | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.query_length, self.key_length, self.block_size)
        rows = count_blocks(self.query_length, self.block_size[0])
        for name, tensor, rank in (("counts", self.counts, 3), ("indices", self.indices, 4)):
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
        if self.indices.shape[:3] != self.counts.shape:
            raise bad_argument(
                "indices",
                f"shape {tuple(self.indices.shape)}",
                f"shape {(*self.counts.shape, 'M')}, as counts",
                "Give both the same mask batch, mask heads and rows.",
            )
        if self.indices.device != self.counts.device:
            raise bad_argument(
                "indices",
                f"device {self.indices.device}",
                f"device {self.counts.device}, as counts",
                "Move the mask with mask.to(device).",
            )
        if self.key_valid is not None:
            self._check_key_valid(self.key_valid)

    # Ways to build one

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        query_length: int,
        key_length: int,
        block_size: tuple[int, int],
        key_valid: Tensor | None = None,
    ) -> "BlockMask":
        """The mask that keeps block (i, j) where `blocks` is True.

        blocks: bool (Nq, Nk) or (Bm, Hm, Nq, Nk), Nq and Nk the lengths in blocks, tails included.
        key_valid: as in `with_key_valid`.
        """
        _check_lengths(query_length, key_length, block_size)
        if blocks.ndim == 2:
            blocks = blocks[None, None]
        grid = (count_blocks(query_length, block_size[0]), count_blocks(key_length, block_size[1]))
        if blocks.dtype != torch.bool or blocks.ndim != 4 or tuple(blocks.shape[-2:]) != grid:
            raise bad_argument(
                "blocks",
                f"{blocks.dtype} of shape {tuple(blocks.shape)}",
                f"bool of shape {grid} or (mask batch, mask heads, {grid[0]}, {grid[1]})",
                "The last two sizes are the lengths in blocks, rounded up.",
            )
        counts = blocks.sum(-1, dtype=torch.int32)
        width = max(int(counts.max()), 1) if counts.numel() else 1
        columns = blocks.reshape(-1).nonzero().squeeze(-1) % grid[1]
        listed = torch.arange(width, device=blocks.device) < counts[..., None]
        indices = torch.zeros(listed.shape, dtype=torch.int32, device=blocks.device)
        # Both sides run row by row, so every list comes out ascending.
        indices.masked_scatter_(listed, columns.int())
        return cls(counts, indices, query_length, key_length, block_size).with_key_valid(key_valid)

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
            return replace(self, key_valid=None)
        if key_valid.is_floating_point() or key_valid.is_complex() or key_valid.dtype == torch.bool:
            raise bad_argument(
                "key_valid",
                str(key_valid.dtype),
                "integers, one number of keys per sample",
                "For a boolean padding mask with a valid prefix pass padding.sum(-1).",
            )
        if key_valid.numel() and not 0 <= int(key_valid.min()) <= int(key_valid.max()) <= self.key_length:
            raise bad_argument(
                "key_valid",
                f"values from {int(key_valid.min())} to {int(key_valid.max())}",
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
        """The same mask for `torch.nn.attention.flex_attention`, tails and padding hidden by its mask_mod."""
        from .flex import to_flex

        return to_flex(self)

    def to(self, device: torch.device | str) -> "BlockMask":
        """The mask with its tensors on `device`."""
        valid = None if self.key_valid is None else self.key_valid.to(device)
        return replace(self, counts=self.counts.to(device), indices=self.indices.to(device), key_valid=valid)

    # What it says

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @property
    def batch(self) -> int:
        """Samples the mask tells apart: 1 if it is shared by the batch."""
        return max(self.counts.shape[0], 1 if self.key_valid is None else self.key_valid.shape[0])

    @property
    def heads(self) -> int:
        """Heads the mask tells apart: 1 if it is shared by all heads."""
        return self.counts.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """(query blocks, key blocks), tails included."""
        return self.counts.shape[2], count_blocks(self.key_length, self.block_size[1])

    @property
    def row_counts(self) -> Tensor:
        """int32 (Bm, Hm, Nq): key blocks listed for each query block."""
        return self.counts

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors; a list shared by several rows is counted once."""
        tensors = [self.counts, self.indices] + ([] if self.key_valid is None else [self.key_valid])
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @cached_property
    def visible_counts(self) -> Tensor:
        """int32 (batch, Hm, Nq): listed key blocks that hold at least one valid key. They are the first ones."""
        if self.key_valid is None:
            return self.counts
        starts = self.indices * self.block_size[1]
        listed = torch.arange(self.indices.shape[-1], device=self.device) < self.counts[..., None]
        return ((starts < self.key_valid.view(-1, 1, 1, 1)) & listed).sum(-1, dtype=torch.int32)

    @cached_property
    def row_order(self) -> Tensor:
        """int32 (batch, Hm, Nq): query blocks by the length of their visible list, longest first."""
        return self.visible_counts.argsort(dim=-1, descending=True, stable=True).int()

    @cached_property
    def visible_keys(self) -> Tensor:
        """int32 (batch, Hm, Nq): valid keys each query of the block sees.

        Lists ascend and valid keys are a prefix, so only the last visible block of a row can be cut.
        """
        counts = self.visible_counts
        last = self.indices.expand(counts.shape[0], -1, -1, -1)
        last = last.gather(-1, (counts - 1).clamp(min=0)[..., None].long()).squeeze(-1)
        valid = self.key_length if self.key_valid is None else self.key_valid.view(-1, 1, 1)
        cut = ((last + 1) * self.block_size[1] - valid).clamp(min=0)
        return torch.where(counts > 0, counts * self.block_size[1] - cut, 0).int()

    @cached_property
    def density(self) -> float:
        """Kept (query, key) token pairs over query_length * key_length; the mean over samples and heads.

        Exact with tail blocks. Padding keys count as not kept, so a ragged batch is below 1.0 even under a full mask.
        """
        queries = torch.full((self.grid[0],), self.block_size[0], device=self.device)
        queries[-1] = self.query_length - (self.grid[0] - 1) * self.block_size[0]
        pairs = int((self.visible_keys.long() * queries).sum())
        maps = self.visible_keys.shape[0] * self.heads
        return pairs / (maps * self.query_length * self.key_length)

    def to_blocks(self) -> Tensor:
        """bool (Bm, Hm, Nq, Nk): the inverse of `from_blocks`."""
        columns = self.grid[1]
        blocks = torch.zeros(*self.counts.shape, columns, dtype=torch.bool, device=self.device)
        listed = torch.arange(self.indices.shape[-1], device=self.device) < self.counts[..., None]
        row, slot = listed.flatten(0, 2).nonzero(as_tuple=True)
        blocks.view(-1)[row * columns + self.indices.flatten(0, 2)[row, slot]] = True
        return blocks

    def token_mask(self) -> Tensor:
        """bool (batch, Hm, query_length, key_length), True where a query sees a key.

        This is S x S: for tests, pictures and the oracle on short sequences only.
        """
        blocks = self.to_blocks().repeat_interleave(self.block_size[0], dim=2)[:, :, : self.query_length]
        tokens = blocks.repeat_interleave(self.block_size[1], dim=3)[..., : self.key_length]
        if self.key_valid is None:
            return tokens
        return tokens & (torch.arange(self.key_length, device=self.device) < self.key_valid.view(-1, 1, 1, 1))

    def validate(self) -> "BlockMask":
        """Checks the values too and returns the mask: counts in range, lists ascending, in range, 0 past the count."""
        width, columns = self.indices.shape[-1], self.grid[1]
        if self.counts.numel() and not 0 <= int(self.counts.min()) <= int(self.counts.max()) <= width:
            raise bad_argument(
                "counts",
                f"values from {int(self.counts.min())} to {int(self.counts.max())}",
                f"values from 0 to {width}, the width of indices",
                "Count only listed key blocks.",
            )
        listed = torch.arange(width, device=self.device) < self.counts[..., None]
        ascending = (self.indices[..., 1:] > self.indices[..., :-1]) | ~listed[..., 1:]
        in_range = (self.indices >= 0) & (self.indices < columns)
        if not bool(ascending.all() and in_range.all() and ((self.indices == 0) | listed).all()):
            raise bad_argument(
                "indices",
                "a list that does not ascend, leaves the range, or is not 0 past its count",
                f"ascending key block ids in 0..{columns - 1}, then zeros",
                "Build the mask with BlockMask.from_blocks.",
            )
        self.with_key_valid(self.key_valid)
        return self

    def _check_key_valid(self, key_valid: Tensor) -> None:
        if key_valid.dtype != torch.int32 or key_valid.ndim != 1 or key_valid.device != self.device:
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
