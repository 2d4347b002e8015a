"""Which key blocks SpargeAttn keeps for each query block: scores and similarities of pooled blocks, and the selection.

Source: arXiv 2502.18137, sections 3.2 and 3.3, and its released code at bfd980b, get_block_map_meansim.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnproc.errors import SettingsError
from attnproc.kernels.block_mask import count_blocks
from attnproc.kernels.scores import pool_blocks, token_mean
from attnproc.kernels.selection import largest

JUDGE_OFF = -0.1  # any negative similarity does
CHUNK_BYTES = 1 << 26  # of scratch memory for the scores of a few heads
PAIR_BYTES = 12  # scratch for each pair of blocks: two scores, bool maps; a CPU, which sorts, takes twice that

PerHead = float | tuple[float, ...]


class HeadThresholds(NamedTuple):
    """float32 (heads,) each, as the settings of the same names; None as there."""

    density: Tensor | None
    cdf: Tensor | None
    similarity: Tensor
    skip: Tensor | None = None

    @classmethod
    def of(
        cls,
        heads: int,
        device: torch.device,
        *,
        density: PerHead | Tensor | None,
        cdf_threshold: PerHead | Tensor | None,
        similarity_threshold: PerHead | Tensor,
        skip_threshold: PerHead | Tensor | None = None,
    ) -> "HeadThresholds":
        """One number for each head of settings that may be one for all."""
        if (density is None) == (cdf_threshold is None):
            raise SettingsError(
                f"density={density!r} and cdf_threshold={cdf_threshold!r}; expected exactly one of them, give one."
            )
        return cls(
            None if density is None else _per_head("density", density, heads, device),
            None if cdf_threshold is None else _per_head("cdf_threshold", cdf_threshold, heads, device),
            _per_head("similarity_threshold", similarity_threshold, heads, device),
            None if skip_threshold is None else _per_head("skip_threshold", skip_threshold, heads, device),
        )

    def some(self, heads: slice) -> "HeadThresholds":
        """Those of some heads."""
        return HeadThresholds._make(x if x is None else x[heads] for x in self)


class BlockScores(NamedTuple):
    """What selection knows of a call; blocks without a similarity (tail, a zero token) have -inf."""

    scores: Tensor  # float32 (batch, heads, query blocks, key blocks), of the means, scaled
    query_similarity: Tensor  # float32 (batch, heads, query blocks)
    key_similarity: Tensor  # float32 (batch, heads, key blocks)


def predict_blocks(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    density: float | Tensor | None = None,
    cdf_threshold: float | Tensor | None = None,
    similarity_threshold: float | Tensor = JUDGE_OFF,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    text_start: int | None = None,
    attention_sink: bool = False,
    token_order: Tensor | None = None,
) -> Tensor:
    """The block mask of SpargeAttn for a self-attention call (arXiv 2502.18137, section 3.2, algorithm 1).

    query, key: (batch, heads, tokens, head_dim), keys not smoothed.
    block_size: (query block, key block) in tokens.
    density, cdf_threshold, similarity_threshold, attention_sink: as in `SpargeAttnProcessor`, exactly one of the first
        two; a number, or float32 (heads,).
    scale: of the scores, head_dim ** -0.5 by default.
    key_valid: integers (batch,) or (1,), valid tokens of each sample, a prefix. The mask of a padded sample is that of
        the sample without padding.
    text_start: first text token; text stands at the end. None: no text.
    token_order: integers (1, tokens), position p of the blocks is token token_order[0, p]. Text must stay in place.

    Returns bool (batch, heads, query blocks, key blocks). Every query block keeps at least one key block, if there is
    a valid key.
    """
    batch, heads, tokens, _ = query.shape
    grid = [count_blocks(tokens, size) for size in block_size]
    thresholds = HeadThresholds.of(
        heads,
        query.device,
        density=density,
        cdf_threshold=cdf_threshold,
        similarity_threshold=similarity_threshold,
    )
    always = always_kept(tokens, block_size, text_start, attention_sink, query.device)
    real = real_keys(tokens, block_size[1], key_valid, query.device)
    blocks = torch.empty(batch, heads, *grid, dtype=torch.bool, device=query.device)
    for part in head_chunks(query, block_size, ordered=token_order is not None):
        queries, keys = query[:, part], key[:, part]
        if token_order is not None:
            queries, keys = (x.index_select(2, token_order[0]) for x in (queries, keys))
        found = score_blocks(queries, keys, block_size, scale=scale, key_valid=key_valid)
        blocks[:, part] = (select_blocks(found, thresholds.some(part), real) | always) & real
    return blocks


def score_blocks(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
) -> BlockScores:
    """Scores and similarities of the blocks of a call; arguments as in `predict_blocks`."""
    # A shift of all keys changes no softmax, but a large common part would make every block of keys look alike.
    # Keys with NaN or infinity stay where they are, so that only their own blocks suffer.
    shift = token_mean(key, key_valid).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    queries = pool_blocks(query, block_size[0], valid=key_valid)
    keys = pool_blocks(key, block_size[1], valid=key_valid, shift=shift)
    scores = queries.mean @ keys.mean.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    query_similarity, key_similarity = (x.similarity.masked_fill(~x.regular, -torch.inf) for x in (queries, keys))
    return BlockScores(scores, query_similarity, key_similarity)


def select_blocks(found: BlockScores, thresholds: HeadThresholds, real: Tensor) -> Tensor:
    """bool (batch, heads, query blocks, key blocks): blocks kept by rank, and those that cannot be judged.

    real: bool (batch or 1, 1, 1, key blocks), key blocks that hold a valid key; only these count in a density.
    """
    alike_queries = found.query_similarity > thresholds.similarity[:, None]
    alike_keys = found.key_similarity > thresholds.similarity[:, None]
    scores = found.scores.masked_fill(~alike_keys[:, :, None], -torch.inf)
    if thresholds.density is not None:
        # A product in float32, where 0.29 * 100 is 29.
        kept = largest(scores, count=(thresholds.density[:, None] * real.sum(-1)).int().clamp(min=1))
    else:
        assert thresholds.cdf is not None
        kept = largest(scores, share=thresholds.cdf[:, None])
    return kept | ~alike_keys[:, :, None] | ~alike_queries[..., None]


def always_kept(
    tokens: int, block_size: tuple[int, int], text_start: int | None, attention_sink: bool, device: torch.device
) -> Tensor:
    """bool (query blocks, key blocks): what text and sink keep; arguments as in `predict_blocks`."""
    blocks = torch.zeros(*(count_blocks(tokens, size) for size in block_size), dtype=torch.bool, device=device)
    if text_start is not None:
        blocks[text_start // block_size[0] :] = True
        blocks[:, text_start // block_size[1] :] = True
    if attention_sink:
        blocks[:, 0] = True
    return blocks


def real_keys(tokens: int, key_size: int, key_valid: Tensor | None, device: torch.device) -> Tensor:
    """bool (batch or 1, 1, 1, key blocks): key blocks that hold a valid key."""
    starts = torch.arange(0, tokens, key_size, device=device)
    valid = torch.full((1,), tokens, device=device) if key_valid is None else key_valid.to(device)
    return starts < valid.view(-1, 1, 1, 1)


def head_chunks(query: Tensor, block_size: tuple[int, int], *, ordered: bool) -> Iterator[slice]:
    """Slices of the heads, so many at a time that scratch memory stays small; ordered: queries and keys are copied."""
    batch, heads, tokens, head_dim = query.shape
    pairs = count_blocks(tokens, block_size[0]) * count_blocks(tokens, block_size[1])
    copies = 2 * tokens * head_dim * query.element_size() if ordered else 0
    each = batch * (pairs * PAIR_BYTES + copies)
    step = max(CHUNK_BYTES // each, 1)
    return (slice(start, min(start + step, heads)) for start in range(0, heads, step))


def _per_head(name: str, value: PerHead | Tensor, heads: int, device: torch.device) -> Tensor:
    numbers = torch.as_tensor(value, dtype=torch.float32, device=device)
    if numbers.ndim == 1 and len(numbers) != heads:
        raise SettingsError(
            f"{name}={value!r} has {len(numbers)} entries and the call {heads} heads; give one number for each head, "
            "or one for all. Under context parallelism a device has only some of the heads."
        )
    return numbers.expand(heads)
