"""Block scores: what the rows and columns of an attention map hold, block by block, without the map itself.

Methods choose blocks from these: pooled blocks and their self-similarity (SpargeAttn), the exact mass of every block
(AdaSpa), antidiagonal estimates of it (XAttention). `recall` tells how good a choice was. Statistics are float32
whatever the dtype of the tensors. Blocks are `block_size` tokens each with a tail, or lie between given offsets.
Padding is left out by index: what it holds, NaN included, never matters. No gradients.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import DTYPES, MAX_HEAD_DIM, block_sparse_attention
from .backends import available_backends
from .block_mask import BlockMask, _bounds, _check_offsets
from .errors import bad_argument
from .oracle import take

SCORE_BACKENDS = ("triton", "cpu")
EXPONENT_LIMIT = 30.0  # of 2: a log-sum-exp that is far too low must not make infinities
CHUNK_SCORES = 1 << 19  # scores the CPU path holds at a time: they should stay in cache


class Pooled(NamedTuple):
    """What `pool_blocks` finds in each block."""

    mean: Tensor  # float32 (B, H, N, D)
    similarity: Tensor  # float32 (B, H, N), 0 to 1
    regular: Tensor  # bool (B, H, N)


@torch.no_grad()
def token_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """float32 (B, H, 1, D): the mean of x (B, H, S, D) over the first `valid` tokens of each sample, all by default.

    0 where a sample has no valid token. valid: integers (B,) or (1,).
    """
    _check_tensor("x", x)
    if valid is None:
        return x.mean(2, keepdim=True, dtype=torch.float32)
    count = _samples("valid", valid, x, x.shape[2]).view(-1, 1, 1, 1)
    real = torch.arange(x.shape[2], device=x.device)[:, None] < count
    return x.masked_fill(~real, 0.0).sum(2, keepdim=True, dtype=torch.float32) / count.clamp(min=1)


@torch.no_grad()
def pool_blocks(
    x: Tensor,
    block_size: int,
    *,
    offsets: Tensor | None = None,
    valid: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Pooled:
    """Mean and self-similarity of each block of tokens (SpargeAttn, section 3.2 of arXiv 2502.18137).

    x: (B, H, S, D), queries or keys. block_size: tokens of a block.
    offsets: int32 (N + 1,), first token of each block and S at the end, blocks of 1 to block_size tokens.
    valid: integers (B,) or (1,), valid tokens of each sample, a prefix; the others do not count.
    shift: (B, H, 1, D), subtracted from every token first: `token_mean` of the keys smooths them.
    backend: "auto" ("triton" for CUDA tensors, "cpu" for CPU tensors), or one of `SCORE_BACKENDS`.

    Returns, over the valid tokens x_t of each block,
        mean: their mean; similarity: |mean of x_t / |x_t||^2, which is the mean cosine over all pairs, at most 1;
        regular: False where a block holds fewer than block_size valid tokens, or a token of norm 0 or with NaN or
        infinity in it: such a block has no similarity to speak of.
    A block without valid tokens has mean 0 and similarity 0. NaN and infinity appear in the mean and give
    similarity 0. Bad arguments raise ValueError.
    """
    _check_tensor("x", x)
    _check_blocks("block_size", (block_size,))
    _check_bounds("offsets", offsets, x.shape[2], block_size)
    if shift is not None and (shift.shape != (*x.shape[:2], 1, x.shape[3]) or shift.device != x.device):
        raise bad_argument(
            "shift",
            f"shape {tuple(shift.shape)} on {shift.device}",
            f"shape {(*x.shape[:2], 1, x.shape[3])} on {x.device}",
            "token_mean gives one.",
        )
    bounds = _bounds(x.shape[2], block_size, offsets, x.device)
    count = _samples("valid", valid, x, x.shape[2])
    if choose_backend_for(x, backend) == "triton":
        from . import triton_scores

        return Pooled(*triton_scores.pool_blocks(x, block_size, bounds, count, shift))
    return _pool_blocks(x, block_size, bounds, count, shift)


@torch.no_grad()
def dense_lse(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """float32 (B, H, Sq): log-sum-exp of the scaled scores of each query over all valid keys, natural log.

    query (B, H, Sq, D), key (B, H, Sk, D); the rest as in `block_mass`. -inf where there is no valid key.
    """
    _check_pair(query, key)
    scale = _scale(query, scale)
    keys = _samples("key_valid", key_valid, key, key.shape[2])
    if choose_backend_for(query, backend) == "triton":
        from . import triton_scores

        queries = torch.full_like(keys, query.shape[2])
        return triton_scores.dense_lse(query, key, scale, queries, keys)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    queries = torch.full_like(keys, query.shape[2])
    rows, columns = _Blocks.uniform(query, 1, queries), _Blocks.uniform(key, 1, keys)
    for sample in range(query.shape[0]):
        for heads, tokens, scores in _scores(rows, columns, sample, scale):
            lse[sample, heads, tokens] = scores.logsumexp(-1)
    return lse


@torch.no_grad()
def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention mass of every block, from a log-sum-exp that may be stale (AdaSpa, equation 13 of arXiv 2502.21079).

    query (B, H, Sq, D), key (B, H, Sk, D) of one dtype and device, D from 1 to 256, any strides.
    lse: float32 (B, H, Sq), natural log of the sum of exp of the scaled scores, of now or of an earlier step.
    block_size: (query block, key block) in tokens.
    scale: multiplies the scores, D ** -0.5 by default.
    query_offsets, key_offsets: int32 (Nq + 1,), (Nk + 1,), first token of each block and the length at the end, for
        blocks of 1 to block_size tokens.
    query_valid, key_valid: integers (B,) or (1,), valid queries and keys of each sample, a prefix; the others add 0.
    backend: as in `pool_blocks`.

    Returns
        mass: float32 (B, H, Nq, Nk), the sum of P_ij = exp(score_ij - lse_i) over the block. With the exact lse the
            row of query block p sums to the number of its valid queries. P is capped at 2 ** 30.
        new_lse: float32 (B, H, Sq), lse + log(sum over j of P_ij): the exact log-sum-exp of now, unless the cap was
            reached. -inf for queries that are not valid, see no key or had -inf before.
    new_lse - lse is how far each query has drifted. Bad arguments raise ValueError.
    """
    _check_pair(query, key)
    _check_blocks("block_size", block_size)
    if lse.shape != query.shape[:3] or lse.dtype != torch.float32 or lse.device != query.device:
        raise bad_argument(
            "lse",
            f"{lse.dtype} of shape {tuple(lse.shape)} on {lse.device}",
            f"float32 of shape {tuple(query.shape[:3])} on {query.device}",
            "block_sparse_attention(..., return_lse=True) and dense_lse give one.",
        )
    scale = _scale(query, scale)
    _check_bounds("query_offsets", query_offsets, query.shape[2], block_size[0])
    _check_bounds("key_offsets", key_offsets, key.shape[2], block_size[1])
    rows = _bounds(query.shape[2], block_size[0], query_offsets, query.device)
    columns = _bounds(key.shape[2], block_size[1], key_offsets, key.device)
    queries = _samples("query_valid", query_valid, query, query.shape[2])
    keys = _samples("key_valid", key_valid, key, key.shape[2])
    if choose_backend_for(query, backend) == "triton":
        from . import triton_scores

        return triton_scores.block_mass(query, key, lse, block_size, rows, columns, scale, queries, keys)
    query_rows = _Blocks(query, rows, block_size[0], queries)
    key_rows = _Blocks(key, columns, block_size[1], keys)
    return _block_mass(query_rows, key_rows, lse, scale)


@torch.no_grad()
def antidiagonal_scores(
    query: Tensor,
    key: Tensor,
    block_size: int,
    stride: int,
    *,
    scale: float | None = None,
    query_valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Estimated attention mass of every block, from antidiagonals (XAttention, section 2 of arXiv 2503.16428).

    Tokens are taken in groups of `stride`. The score of a query group and a key group is the mean of the scaled
    scores on the antidiagonal of their stride x stride tile; a softmax over the key groups follows, and sums over
    the groups of each block.

    query (B, H, Sq, D), key (B, H, Sk, D) of one dtype and device. block_size: tokens of a query and a key block.
    stride: divides block_size. scale, backend: as in `block_mass`.
    query_valid, key_valid: integers (B,) or (1,), valid queries and keys of each sample, a prefix. Groups without a
        valid token are left out; in a group that is cut, the missing tokens count as zeros in the mean.

    Returns float32 (B, H, Nq, Nk). The row of a whole query block sums to block_size / stride, which is also the
    ratio between true mass and estimate. Bad arguments raise ValueError.
    """
    _check_pair(query, key)
    _check_blocks("block_size", (block_size,))
    if stride < 1 or block_size % stride:
        raise bad_argument("stride", str(stride), f"a divisor of block_size = {block_size}", "8 and 16 are usual.")
    scale = _scale(query, scale) / stride
    queries = _samples("query_valid", query_valid, query, query.shape[2])
    keys = _samples("key_valid", key_valid, key, key.shape[2])
    if choose_backend_for(query, backend) == "triton":
        from . import triton_scores

        return triton_scores.antidiagonal_scores(query, key, block_size, stride, scale, queries, keys)
    groups = block_size // stride
    query_rows = _Blocks.uniform(_groups(query, stride, queries).flip(3).flatten(3), groups, _up(queries, stride))
    key_rows = _Blocks.uniform(_groups(key, stride, keys).flatten(3), groups, _up(keys, stride))
    mass, _ = _block_mass(query_rows, key_rows, None, scale)
    return mass


@torch.no_grad()
def recall(
    query: Tensor,
    key: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    token_order: Tensor | None = None,
    query_valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """float32 (B, H): the share of the true attention mass that `mask` keeps, the mean over all queries.

    query (B, H, Sq, D), key (B, H, Sk, D), mask, token_order: as in `block_sparse_attention`.
    lse: float32 (B, H, Sq), the exact log-sum-exp over all valid keys, computed if it is not given.
    query_valid: integers (B,), take the mean over the first so many queries of each sample: a mask may leave padding
        out, where nothing is lost.
    backend: as in `pool_blocks`.

    A query's share is exp(log-sum-exp over the keys it sees - log-sum-exp over all valid keys): 1 under a full mask,
    0 for a query that sees nothing. A sample without valid keys has recall 0.
    """
    if lse is None:
        # In a token order, valid keys are the first ones of that order.
        ordered = key if token_order is None or mask.key_valid is None else take(key, token_order)
        lse = dense_lse(query, ordered, scale=scale, key_valid=mask.key_valid, backend=backend)
    _, seen = block_sparse_attention(
        query, key, key, mask, scale=scale, return_lse=True, token_order=token_order, backend=backend
    )
    shares = (seen - lse.masked_fill(lse == -torch.inf, 0.0)).exp().clamp(max=1.0)
    if query_valid is None:
        return shares.mean(-1)
    valid = query_valid.to(shares.device)[:, None]
    real = torch.arange(shares.shape[2], device=shares.device) < valid[..., None]
    return torch.where(real, shares, 0.0).sum(-1) / valid.clamp(min=1)


# The CPU path: a few rows of the map at a time


class _Blocks(NamedTuple):
    """x (B, H, S, D) cut in blocks of up to `size` tokens at `bounds`; only the first `valid` of each sample count."""

    x: Tensor
    bounds: Tensor
    size: int
    valid: Tensor

    @classmethod
    def uniform(cls, x: Tensor, size: int, valid: Tensor) -> "_Blocks":
        return cls(x, _bounds(x.shape[2], size, None, x.device), size, valid)

    def places(self, sample: int) -> tuple[Tensor, Tensor]:
        """(N, size) token ids of each block, and whether each is in it and valid."""
        tokens = self.bounds[:-1, None] + torch.arange(self.size)
        real = tokens < self.bounds[1:, None].clamp(max=int(self.valid[sample]))
        return tokens.clamp(max=self.x.shape[2] - 1), real

    def places_in_use(self, sample: int) -> tuple[Tensor, Tensor]:
        """`places` of the first blocks only, those that hold a valid token."""
        tokens, real = self.places(sample)
        used = int(real.any(1).sum())
        return tokens[:used], real[:used]


def _scores(query: _Blocks, key: _Blocks, sample: int, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Heads, query blocks and their scaled scores (heads, tokens, keys), part by part; -inf for keys not there.

    Tokens and keys are those of whole blocks in use, so rows of tokens not there hold anything.
    """
    (tokens, _), (columns, there) = query.places_in_use(sample), key.places_in_use(sample)
    if not len(tokens) or not len(columns):
        return
    hidden = None if there.all() else ~there.flatten()
    block = query.size * columns.numel()
    blocks_each = min(max(CHUNK_SCORES // block, 1), len(tokens))
    heads_each = max(CHUNK_SCORES // (block * blocks_each), 1)
    for heads in _slices(query.x.shape[1], heads_each):
        keys = key.x[sample, heads].index_select(1, columns.flatten()).float().transpose(1, 2)
        for blocks in _slices(len(tokens), blocks_each):
            queries = query.x[sample, heads].index_select(1, tokens[blocks].flatten()).float()
            scores = torch.bmm(queries * scale, keys)
            yield heads, blocks, scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _block_mass(query: _Blocks, key: _Blocks, lse: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """As `block_mass`; without an lse the exact one is used."""
    batch, heads, length = query.x.shape[:3]
    mass = query.x.new_zeros(batch, heads, len(query.bounds) - 1, len(key.bounds) - 1, dtype=torch.float32)
    new_lse = query.x.new_full((batch, heads, length), -torch.inf, dtype=torch.float32)
    for sample in range(batch):
        tokens, there = query.places_in_use(sample)
        for part, blocks, scores in _scores(query, key, sample, scale):
            ids, real = tokens[blocks].flatten(), there[blocks].flatten()
            old = scores.logsumexp(-1) if lse is None else lse[sample, part].index_select(1, ids)
            # -inf as the largest negative number: -inf - -inf would be NaN.
            power = scores.sub_(old.clamp(min=torch.finfo(old.dtype).min)[..., None])
            weights = power.clamp_(max=EXPONENT_LIMIT * math.log(2.0)).exp_()
            sums = weights.unflatten(2, (-1, key.size)).sum(3).masked_fill_(~real[:, None], 0.0)
            mass[sample, part, blocks, : sums.shape[2]] = sums.unflatten(1, (-1, query.size)).sum(2)
            total = sums.sum(2)
            new_lse[sample, part, ids[real]] = (old + total.log()).masked_fill(total == 0.0, -torch.inf)[:, real]
    return mass, new_lse


def _pool_blocks(x: Tensor, size: int, bounds: Tensor, valid: Tensor, shift: Tensor | None) -> Pooled:
    batch, heads, _, head_dim = x.shape
    blocks = _Blocks(x, bounds, size, valid)
    mean = x.new_empty(batch, heads, len(bounds) - 1, head_dim, dtype=torch.float32)
    similarity = torch.empty_like(mean[..., 0])
    regular = torch.empty_like(similarity, dtype=torch.bool)
    for sample in range(batch):
        tokens, real = blocks.places(sample)
        count, whole = real.sum(1), bool(real.all())  # nothing to gather if all blocks are
        for part in _slices(heads, max(CHUNK_SCORES // (tokens.numel() * head_dim), 1)):
            found = x[sample, part] if whole else x[sample, part].index_select(1, tokens.flatten())
            found = found.float() if shift is None else found.float() - shift[sample, part]
            if not whole:
                found = found.masked_fill_(~real.reshape(-1, 1), 0.0)
            found = found.reshape(found.shape[0], -1, size, head_dim)
            norm = torch.linalg.vector_norm(found.flatten(0, 2), dim=1).view(found.shape[:3])
            ordinary = (norm > 0.0) & norm.isfinite()
            mean[sample, part] = found.sum(2) / count.clamp(min=1)[:, None]
            unit = (found / norm.masked_fill(norm == 0.0, 1.0)[..., None]).sum(2) / count.clamp(min=1)[:, None]
            similarity[sample, part] = unit.square().sum(2).clamp(max=1.0).nan_to_num(nan=0.0)
            regular[sample, part] = (count == size) & ordinary.all(2)
    return Pooled(mean, similarity, regular)


def _groups(x: Tensor, stride: int, valid: Tensor) -> Tensor:
    """(B, H, groups, stride, D), 0 where a token is not there."""
    real = torch.arange(x.shape[2])[:, None] < valid.view(-1, 1, 1, 1)
    x = x.masked_fill(~real, 0.0)
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % stride))
    return x.unflatten(2, (-1, stride))


def _up(tokens: Tensor, stride: int) -> Tensor:
    """Groups that hold the first `tokens` tokens."""
    return -(-tokens // stride)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


# Checks


def choose_backend_for(x: Tensor, backend: str) -> str:
    """Triton or cpu; raises ValueError if the one asked for cannot take the tensors."""
    device = x.device.type
    if backend not in (*SCORE_BACKENDS, "auto"):
        raise bad_argument("backend", repr(backend), f"'auto' or one of {SCORE_BACKENDS}", "'auto' suits the device.")
    name = backend if backend != "auto" else "triton" if device == "cuda" else "cpu"
    problem = None
    if name == "cpu":
        problem = None if device == "cpu" else f"CPU tensors, not {device}"
    elif reason := available_backends()["triton"]:
        problem = f"a machine that runs Triton: {reason}"
    elif device != "cuda" and not _interpreted():
        problem = f"CUDA tensors, not {device} (or TRITON_INTERPRET=1, to test)"
    elif x.dtype == torch.float64:
        problem = "float32, float16 or bfloat16 tensors, not float64"
    elif x.dtype == torch.bfloat16 and device != "cuda":
        problem = "float32 or float16 tensors in Triton's interpreter, which computes bfloat16 wrongly"
    if problem is not None:
        raise bad_argument("backend", repr(name), problem, "Move the tensors, or ask for the other backend.")
    return name


def _interpreted() -> bool:
    from .triton_scores import INTERPRETED

    return INTERPRETED


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.dtype not in DTYPES or 0 in x.shape:
        came = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise bad_argument(
            name,
            came,
            "a floating point tensor (batch, heads, tokens, head_dim), none of them 0",
            "Diffusers' own order needs .transpose(1, 2).",
        )
    if x.shape[3] > MAX_HEAD_DIM:
        raise bad_argument(
            name, f"head_dim {x.shape[3]}", f"head_dim from 1 to {MAX_HEAD_DIM}", "Use dense attention here."
        )


def _check_pair(query: Tensor, key: Tensor) -> None:
    _check_tensor("query", query)
    _check_tensor("key", key)
    batch, heads, _, head_dim = query.shape
    like = (batch, heads, key.shape[2], head_dim)
    if tuple(key.shape) != like or key.dtype != query.dtype or key.device != query.device:
        raise bad_argument(
            "key",
            f"{key.dtype} of shape {tuple(key.shape)} on {key.device}",
            f"{query.dtype} of shape {like} on {query.device}, as query",
            "Grouped-query attention needs repeated key heads.",
        )


def _check_blocks(name: str, sizes: tuple[int, ...]) -> None:
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise bad_argument(name, str(sizes), "integers of at least 1 token", "64 and 128 are usual.")


def _check_bounds(name: str, offsets: Tensor | None, length: int, size: int) -> None:
    if offsets is not None:
        _check_offsets(name, offsets, length, size)


def _samples(name: str, valid: Tensor | None, x: Tensor, length: int) -> Tensor:
    """int32 (B,) on the device of x: valid tokens of each sample, `length` by default."""
    if valid is None:
        return torch.full((x.shape[0],), length, dtype=torch.int32, device=x.device)
    if valid.dtype not in (torch.int32, torch.int64) or valid.ndim != 1 or len(valid) not in (1, x.shape[0]):
        raise bad_argument(
            name,
            f"{valid.dtype} of shape {tuple(valid.shape)}",
            f"int32 or int64 of shape ({x.shape[0]},) or (1,)",
            "For a boolean padding mask with a valid prefix pass padding.sum(-1).",
        )
    return valid.to(x.device, torch.int32).clamp(0, length).expand(x.shape[0])


def _scale(query: Tensor, scale: float | None) -> float:
    if scale is None:
        return query.shape[3] ** -0.5
    if not math.isfinite(scale):
        raise bad_argument("scale", str(scale), "a finite number", "Leave it out for head_dim ** -0.5.")
    return float(scale)
