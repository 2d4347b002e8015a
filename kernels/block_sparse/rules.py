"""What decides, token by token, inside the partial blocks of a BlockMask.

A rule is data that every backend can read: index tables, no Python functions. Positions are those of the mask, so of
the token order where one is given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import bad_argument

MAX_AXES = 3


@dataclass(frozen=True, eq=False)
class Ranges:
    """A query sees a key whose coordinates lie in the query's ranges: a token-exact window on the latent grid.

    key_coordinates: int32 (key_length, A), A from 1 to 3 axes, such as (frame, row, column). A key at -1 on an axis
        lies in every range of that axis: text tokens are at -1 on all of them.
    low, high: int32 (query_length, A); the range of an axis is low <= coordinate < high.
    """

    key_coordinates: Tensor
    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        for name in ("key_coordinates", "low", "high"):
            _check_integers(name, getattr(self, name), 2)
            axes = getattr(self, name).shape[1]
            if not 1 <= axes <= MAX_AXES or axes != self.key_coordinates.shape[1]:
                raise bad_argument(name, f"{axes} axes", f"the same 1 to {MAX_AXES} axes in all three", "One per axis.")
        if self.low.shape != self.high.shape:
            raise bad_argument(
                "high", f"shape {tuple(self.high.shape)}", f"{tuple(self.low.shape)}, as low", "One range per query."
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.key_coordinates, self.low, self.high

    def to(self, device: torch.device | str) -> "Ranges":
        return Ranges(*(tensor.to(device) for tensor in self.tensors))

    def check(self, query_length: int, key_length: int, grid: tuple[int, int]) -> None:
        """Raises ValueError if the tables are not for these lengths."""
        for name, length in (("low", query_length), ("high", query_length), ("key_coordinates", key_length)):
            if len(getattr(self, name)) != length:
                raise bad_argument(
                    f"rule.{name}", f"{len(getattr(self, name))} tokens", f"{length}, as the mask", "One row per token."
                )

    def visible(self, sample: Tensor, head: Tensor, query: Tensor, key: Tensor, key_block: Tensor) -> Tensor:
        """bool: whether each query sees each key. The arguments are ids that broadcast against each other."""
        seen = torch.ones((), dtype=torch.bool, device=self.low.device)
        for axis in range(self.low.shape[1]):
            place = self.key_coordinates[:, axis][key]
            inside = (self.low[:, axis][query] <= place) & (place < self.high[:, axis][query])
            seen = seen & (inside | (place < 0))
        return seen


@dataclass(frozen=True, eq=False)
class ChunkBits:
    """A query sees all keys of the chunks whose bits it has: selection per query token (VMoBA).

    bits: int32 (B or 1, H or 1, query_length, words); bit c % 32 of word c // 32 is chunk c.
    key_chunk: int32 (key blocks,), the chunk of each key block. Blocks do not cross chunks: where chunks are not
        multiples of the block, the mask has `key_offsets`.
    """

    bits: Tensor
    key_chunk: Tensor

    def __post_init__(self) -> None:
        _check_integers("bits", self.bits, 4)
        _check_integers("key_chunk", self.key_chunk, 1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.bits, self.key_chunk

    @classmethod
    def from_selection(cls, selection: Tensor, key_chunk: Tensor) -> "ChunkBits":
        """Packs bool (B or 1, H or 1, query_length, chunks) into words."""
        chunks = selection.shape[-1]
        words = -(-chunks // 32)
        padded = torch.nn.functional.pad(selection, (0, words * 32 - chunks)).unflatten(-1, (words, 32))
        weights = torch.ones(32, dtype=torch.int64, device=selection.device) << torch.arange(
            32, device=selection.device
        )
        # Bit 31 is the sign: the sum is taken in 64 bits and wrapped.
        packed = (padded.long() * weights).sum(-1)
        return cls(torch.where(packed >= 2**31, packed - 2**32, packed).int(), key_chunk.int())

    def to(self, device: torch.device | str) -> "ChunkBits":
        return ChunkBits(*(tensor.to(device) for tensor in self.tensors))

    def check(self, query_length: int, key_length: int, grid: tuple[int, int]) -> None:
        """Raises ValueError if the tables are not for these lengths."""
        if self.bits.shape[2] != query_length:
            raise bad_argument(
                "rule.bits", f"{self.bits.shape[2]} queries", f"{query_length}, as the mask", "One row per query."
            )
        if len(self.key_chunk) != grid[1]:
            raise bad_argument(
                "rule.key_chunk", f"{len(self.key_chunk)} key blocks", f"{grid[1]}, as the mask", "One per key block."
            )

    def visible(self, sample: Tensor, head: Tensor, query: Tensor, key: Tensor, key_block: Tensor) -> Tensor:
        """bool: whether each query sees each key. The arguments are ids that broadcast against each other."""
        chunk = self.key_chunk[key_block]
        # A size of 1 is shared: its index is always 0.
        own_sample, own_head = int(self.bits.shape[0] > 1), int(self.bits.shape[1] > 1)
        word = self.bits[sample * own_sample, head * own_head, query, chunk // 32]
        return (word >> (chunk % 32)) & 1 == 1


TokenRule = Ranges | ChunkBits


def _check_integers(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dtype != torch.int32 or tensor.ndim != rank:
        raise bad_argument(
            f"rule.{name}",
            f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            f"int32 with {rank} dimensions",
            "Cast it with .int().",
        )
