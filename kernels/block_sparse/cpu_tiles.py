"""What the CPU backend's forward and backward pass share: tokens laid out in blocks, and the scores of one step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_mask import BlockMask
from .cpu_plan import Batch, Step, key_lengths, plan


@dataclass(frozen=True, eq=False)
class Layout:
    """Where tokens (B, H, S) lie in blocks (B * H * N, size). Blocks that end early are filled up with zeros."""

    size: int
    tokens: Tensor | None = None  # int64 (B * H * N * size,), the token at each place; None: as they are
    places: Tensor | None = None  # int64 (B * H * S,), the place of each token
    filled: Tensor | None = None  # bool (B * H * N * size, 1), False where there is no valid token

    @classmethod
    def of(
        cls, bounds: Tensor, lengths: Tensor, size: int, batch: int, heads: int, token_order: Tensor | None
    ) -> "Layout":
        """bounds (N + 1,) of the blocks; lengths (B or 1, N), valid tokens of each; token_order as in `Request`."""
        if token_order is None and bool((lengths == size).all()):
            return cls(size)
        length = int(bounds[-1])
        position = bounds[:-1, None] + torch.arange(size)
        exists = (position < bounds[1:, None]).reshape(-1)
        position = position.clamp(max=length - 1).reshape(-1).long()
        order = torch.arange(length).expand(heads, -1) if token_order is None else token_order.long().expand(heads, -1)
        head = torch.arange(batch * heads).view(batch, heads, 1)
        tokens = order[:, position] + head * length
        places = exists.nonzero().squeeze(-1)[order.argsort(-1)] + head * len(position)
        filled = torch.arange(size) < lengths[:, None, :, None]
        filled = filled.expand(batch, heads, -1, -1).reshape(-1, 1)
        return cls(size, tokens.reshape(-1), places.reshape(-1), filled)

    def to_blocks(self, tensor: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """(B, H, S, D) as (B * H * N, size, D)."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        if self.tokens is not None and self.filled is not None:
            rows = rows[self.tokens].masked_fill_(~self.filled, fill)
        return rows.to(dtype).view(-1, self.size, tensor.shape[-1])

    def to_tokens(self, blocks: Tensor, batch: int, heads: int) -> Tensor:
        """(B * H * N, size, ...) as (B, H, S, ...), the places without a token left out."""
        rows = blocks.flatten(0, 1)
        if self.places is not None:
            rows = rows[self.places]
        return rows.view(batch, heads, -1, *blocks.shape[2:])


class Tiles:
    """One call's tensors in blocks, and the scores of its steps. All in float32, or in float64 where query is.

    query: (B * H * Nq, queries, D); key, value: (B * H * Nk, keys, D).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask,
        scale: float,
        *,
        key_bias: Tensor | None = None,
        token_order: Tensor | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.mask, self.scale = mask, scale
        self.batch, self.heads, _, head_dim = query.shape
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.batches = plan(mask, self.batch, self.heads, head_dim, one_by_one=one_by_one)
        sizes, bounds = mask.block_size, (mask.query_bounds, mask.key_bounds)
        lengths = (mask.query_bounds.diff()[None], key_lengths(mask))
        self.rows, self.columns = (
            Layout.of(bounds[i], lengths[i], sizes[i], self.batch, self.heads, token_order) for i in range(2)
        )
        self.query = self.rows.to_blocks(query, self.dtype)
        self.key = self.columns.to_blocks(key, self.dtype)
        self.value = self.columns.to_blocks(value, self.dtype)
        self._has_bias = key_bias is not None
        self._bias = self._make_bias(key_bias)
        # Fresh memory for every step would cost as much in page faults as the copying itself.
        most = max((step.columns.numel() for part in self.batches for step in part.steps), default=0)
        self._gathered = tuple(blocks.new_empty(most, *blocks.shape[1:]) for blocks in (self.key, self.value))
        self._scores = self.query.new_empty(most * sizes[0] * sizes[1])
        self._rooms: dict[torch.Size, tuple[Tensor, ...]] = {}

    def step(self, batch: Batch, step: Step, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (R, queries, keys), keys and values (R, keys, D) of a step; the next step overwrites all three.

        queries (R, queries, D): those of the batch that are active in this step, scaled.

        Scores are biased, and -inf where the query does not see the key. Keys of partial blocks that no
        query of the block sees are zeros, whatever they hold.
        """
        scores, *rooms = self._room(step)
        keys = self._gather(self.key, step, *rooms[:2])
        multiply(queries, keys.transpose(1, 2), out=scores)
        if self._bias is not None and (step.cut or self._has_bias):
            scores += self._bias[step.columns].view(step.active, 1, -1)
        values = self._gather(self.value, step, *rooms[2:])
        if step.partial is not None:
            seen = self._seen(batch, step)
            by_block = (step.active, -1, *self.key.shape[1:])
            scores.view(*scores.shape[:2], step.columns.shape[1], -1).masked_fill_(~seen, -torch.inf)
            unseen = ~seen.any(1)[..., None]
            keys, values = (tensor.view(by_block).masked_fill_(unseen, 0.0).flatten(1, 2) for tensor in (keys, values))
        return scores, keys, values

    def _room(self, step: Step) -> tuple[Tensor, ...]:
        """Views of the memory for scores, keys and values; few sizes are used, and making a view takes time too."""
        sizes = step.columns.shape
        if sizes not in self._rooms:
            active, count = sizes[0], sizes.numel()
            keys, values = (memory[:count] for memory in self._gathered)
            shape = (active, self.rows.size, sizes[1] * self.columns.size)
            scores = self._scores[: shape[0] * shape[1] * shape[2]].view(shape)
            lists = (memory.view(active, shape[2], -1) for memory in (keys, values))
            self._rooms[sizes] = (scores, *(x for pair in zip((keys, values), lists, strict=True) for x in pair))
        return self._rooms[sizes]

    def _gather(self, blocks: Tensor, step: Step, room: Tensor, lists: Tensor) -> Tensor:
        if step.run is not None:
            return blocks[step.run].view(1, -1, blocks.shape[-1])
        torch.index_select(blocks, 0, step.columns.view(-1), out=room)
        return lists

    def _seen(self, batch: Batch, step: Step) -> Tensor:
        """bool, broadcasts to (R, queries, key blocks, keys): what the rule shows, and all of whole blocks."""
        mask, rows = self.mask, batch.rows[: step.active].view(-1, 1, 1, 1)
        assert mask.rule is not None and step.partial is not None
        row, column = rows % mask.grid[0], (step.columns % mask.grid[1])[:, None, :, None]
        query = mask.query_bounds[row] + torch.arange(self.rows.size).view(-1, 1, 1)
        key = mask.key_bounds[column] + torch.arange(self.columns.size)
        head = rows // mask.grid[0]
        there = query < mask.query_bounds[row + 1]  # past the end of a ragged block are the queries of the next
        shown = mask.rule.visible(
            head // self.heads,
            head % self.heads,
            query.clamp_(max=mask.query_length - 1),
            key.clamp_(max=mask.key_length - 1),
            column,
        )
        return (shown & there) | ~step.partial[:, None, :, None]

    def _make_bias(self, key_bias: Tensor | None) -> Tensor | None:
        """(B * H * Nk, keys): the bias of each key block, -inf where there is no valid key. None: 0 everywhere."""
        if key_bias is None and self.columns.filled is None:
            return None
        bias = self.key.new_zeros(self.key.shape[:2])
        if key_bias is not None:
            bias += key_bias.expand(self.batch, self.heads, -1).reshape(-1, 1)
        if self.columns.filled is not None:
            bias.masked_fill_(~self.columns.filled.view(bias.shape), -torch.inf)
        return bias


def rows_of(blocks: Tensor, batch: Batch) -> Tensor:
    """(R, ...): the query blocks of a batch."""
    if len(batch.rows) == 1:
        row = int(batch.rows)
        return blocks[row : row + 1]  # nothing to copy
    return blocks.index_select(0, batch.rows)


def multiply(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix products (R, ...) of a batch. The BLAS library's plain product is faster for a single one."""
    if len(first) > 1:
        return torch.bmm(first, second, out=out)
    return torch.mm(first[0], second[0], out=None if out is None else out[0]).unsqueeze(0)
