"""What the CPU backend's forward and backward pass share: tokens laid out in blocks, and the scores of one step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_mask import BlockMask
from .cpu_plan import Batch, Step, key_lengths, plan

# exp(88) is the largest float32, and exp(-87) the smallest that is computed fast: below that numbers are subnormal.
RANGE = 80.0
SMALL = 40.0  # scores of this size: their weights, weights times values and ratios of weights are none of both
LEAST_NORM = 2e-18  # where squares vanish in float32 a norm may come out as 0


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
    keep_keys: those of a step are needed besides its scores and values.
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
        keep_keys: bool = False,
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
        self.has_bias = key_bias is not None
        self._bias = self._make_bias(key_bias)
        # Fresh memory for every step would cost as much in page faults as the copying itself.
        most = max((len(step.columns) for part in self.batches for step in part.steps), default=0)
        self._scores = self.query.new_empty(most * sizes[0] * sizes[1])
        self._keys = self.key.new_empty(most, *self.key.shape[1:])
        self._values = torch.empty_like(self._keys) if keep_keys else self._keys
        self._queries = torch.empty_like(self.query[: max((len(part.rows) for part in self.batches), default=0)])
        self._rooms: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def queries(self, batch: Batch) -> Tensor:
        """(R, queries, D): those of a batch; the next batch overwrites them."""
        return torch.index_select(self.query, 0, batch.rows, out=self._queries[: len(batch.rows)])

    def small_rows(self) -> Tensor:
        """bool (B * H * Nq,): query blocks whose weights, and sums of them with values, need no shift in float32.

        By norms of the query block and of the key blocks that it lists, so that no other key has a say. A token that is
        not finite does not count: what sees it has NaN or no weight, with a shift or without.
        """
        query, key, value = (_largest_norms(x) for x in (self.query, self.key, self.value))
        bias = torch.zeros_like(key)
        if self.has_bias and self._bias is not None:
            bias = self._bias.masked_fill(~self._bias.isfinite(), 0.0).abs().amax(1)
        of_keys = torch.stack((key, value, bias))
        most = of_keys.amax(1, keepdim=True)
        if not self._are_small(query.max(), most).all():
            most = of_keys.new_zeros(3, len(query))
            for batch in self.batches:
                for step in batch.steps:
                    rows = batch.rows[: step.active]
                    listed = of_keys[:, step.columns].view(3, step.active, -1).amax(-1)
                    most[:, rows] = torch.maximum(most[:, rows], listed)
        return self._are_small(query, most)

    def _are_small(self, query: Tensor, of_keys: Tensor) -> Tensor:
        """For norms of queries, and norms of keys and of values and sizes of biases of the keys that they list."""
        key, value, bias = of_keys
        largest = query * key * abs(self.scale) + bias
        sums = self.mask.key_length * value.clamp(min=1.0)
        return (largest < SMALL) & (largest + sums.log() < RANGE)

    def step(self, batch: Batch, step: Step, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (R, queries, keys), keys and values (R, keys, D) of a step; the next step overwrites all three.

        queries (at least R, queries, D): those of the batch; the first R, which are active in this step, count.

        Scores are biased, and -inf where the query does not see the key. Keys of partial blocks that no
        query of the block sees are zeros, whatever they hold. Unless keys are kept, their memory holds the values.
        """
        scores, key_blocks, keys, value_blocks, values = self._room(step.active, step.positions)
        if step.active < len(queries):
            queries = queries[: step.active]
        torch.index_select(self.key, 0, step.columns, out=key_blocks)
        # With beta 0 what the first argument holds does not count.
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=self.scale, out=scores)
        if self._bias is not None and (step.cut or self.has_bias):
            scores += self._bias[step.columns].view(step.active, 1, -1)
        torch.index_select(self.value, 0, step.columns, out=value_blocks)
        if step.partial is not None:
            seen = self._seen(batch, step)
            scores.view(*scores.shape[:2], step.positions, -1).masked_fill_(~seen, -torch.inf)
            unseen = ~seen.any(1)[..., None]
            for tokens in (keys, values):  # the same twice if keys are not kept
                tokens.view(step.active, step.positions, *self.key.shape[1:]).masked_fill_(unseen, 0.0)
        return scores, keys, values

    def _room(self, active: int, positions: int) -> tuple[Tensor, ...]:
        """Views of the memory of a step: scores, key blocks, keys, value blocks and values.

        Few sizes are used, and making a view takes time too.
        """
        if (active, positions) not in self._rooms:
            count = active * positions
            scores = self._scores[: count * self.rows.size * self.columns.size].view(active, self.rows.size, -1)
            blocks = (memory[:count] for memory in (self._keys, self._values))
            views = (x for memory in blocks for x in (memory, memory.view(active, -1, memory.shape[-1])))
            self._rooms[active, positions] = scores, *views
        return self._rooms[active, positions]

    def _seen(self, batch: Batch, step: Step) -> Tensor:
        """bool, broadcasts to (R, queries, key blocks, keys): what the rule shows, and all of whole blocks."""
        mask, rows = self.mask, batch.rows[: step.active].view(-1, 1, 1, 1)
        assert mask.rule is not None and step.partial is not None
        row, column = rows % mask.grid[0], (step.columns % mask.grid[1]).view(step.active, 1, -1, 1)
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


def exponentials(scores: Tensor, hidden: bool) -> Tensor:
    """exp(scores) in place, for scores up to 0; hidden: some may be -inf, which gives 0.

    Without subnormal results, with which everything is many times as slow: exp(-80) is as good as 0 here.
    """
    scores = torch.threshold_(scores, -RANGE, -torch.inf) if hidden else scores.clamp_(min=-RANGE)
    return scores.exp_()


def _largest_norms(blocks: Tensor) -> Tensor:
    """(blocks,): the largest Euclidean norm of a finite token of each, or a little more."""
    tokens = blocks.flatten(0, 1)
    norms = torch.linalg.vector_norm(tokens, dim=-1)
    if not norms.max().isfinite():
        norms.masked_fill_(~tokens.isfinite().all(-1), 0.0)
    return norms.view(blocks.shape[:2]).amax(1).clamp_(min=LEAST_NORM)
