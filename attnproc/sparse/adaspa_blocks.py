"""AdaSpa's choice of blocks: from the attention mass of every block to the blocks that each head keeps.

Source: "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation" (arXiv 2502.21079), sections
4.2 and 4.3. Rows and columns of a mass or a mask are the video blocks, then the text blocks.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnproc.kernels.block_mask import count_blocks
from attnproc.kernels.scores import EXPONENT_LIMIT

SPARSER, BASE, DENSER = range(3)  # tiers of heads


class Segments(NamedTuple):
    """How the tokens [video | text] are cut: blocks of `size`, of which the last of each kind may be shorter."""

    video_tokens: int
    text_tokens: int
    size: int

    @property
    def video_blocks(self) -> int:
        return count_blocks(self.video_tokens, self.size)

    @property
    def blocks(self) -> int:
        return self.video_blocks + count_blocks(self.text_tokens, self.size)

    def bounds(self, device: torch.device) -> Tensor:
        """int32 (blocks + 1,): first token of each block, and the number of tokens at the end."""
        tokens = self.video_tokens + self.text_tokens
        starts = [
            torch.arange(0, self.video_tokens, self.size, dtype=torch.int32, device=device),
            torch.arange(self.video_tokens, tokens, self.size, dtype=torch.int32, device=device),
        ]
        return F.pad(torch.cat(starts), (0, 1), value=tokens)

    @property
    def are_ragged(self) -> bool:
        """Whether a block other than the last one is short."""
        return self.text_tokens > 0 and self.video_tokens % self.size != 0


class Ranking(NamedTuple):
    """The video blocks of every row by falling mass, and what each tier would keep of the attention."""

    columns: Tensor  # int32 (B, H, video blocks, blocks kept by the densest tier)
    recall: Tensor  # float32 (B, H, 3)


def keep_count(density: float, blocks: int) -> int:
    """Video blocks that each video row keeps: the density of them, rounded half up, at least one."""
    # Rounded to 9 decimals first: 0.1 * 15 should count as one and a half, and be 2.
    return min(blocks, max(1, math.floor(round(density * blocks, 9) + 0.5)))


def tier_densities(density: float) -> tuple[float, float, float]:
    """Densities of sparser, unmoved and denser heads (section 4.2); the first and the last have the second as mean."""
    if density > 2.0 / 3.0:
        return 2.0 * density - 1.0, density, 1.0
    return 0.5 * density, density, 1.5 * density


def valid_tokens(bounds: Tensor, valid: Tensor) -> Tensor:
    """int32 (B, N): tokens of each block that are valid. bounds: (N + 1,); valid: (B,), a prefix of the tokens."""
    return torch.minimum(bounds, valid[:, None]).diff(dim=1)


def scale_rows(mass: Tensor, tokens: Tensor) -> Tensor:
    """The mass, each row scaled to sum up to the valid tokens of its block; nothing changes if the LSE was exact.

    mass: float32 (B, H, N, N); tokens: (B, N).
    """
    total = mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    return mass * (tokens[:, None, :, None] / total)


def rank_blocks(mass: Tensor, video_blocks: int, keeps: tuple[int, int, int], force_diagonal: bool = False) -> Ranking:
    """Ranks the video blocks of each video row by mass; of equal ones the first comes first.

    mass: float32 (B, H, N, N), the first video_blocks rows and columns are video.
    keeps: video blocks that a row keeps in each tier. Text rows and columns are kept in all of them.
    force_diagonal: put a row's own block first.
    """
    video = mass[..., :video_blocks, :video_blocks]
    worth = video
    if force_diagonal:
        worth = video.clone()
        worth.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    columns = worth.argsort(dim=-1, descending=True, stable=True)[..., : max(keeps)]
    by_rank = video.gather(-1, columns).sum(-2).cumsum(-1)
    text = mass[..., video_blocks:, :].sum((-2, -1)) + mass[..., :video_blocks, video_blocks:].sum((-2, -1))
    kept = by_rank[..., [keep - 1 for keep in keeps]] + text[..., None]
    return Ranking(columns.int(), kept / mass.sum((-2, -1))[..., None])


def head_tiers(recall: Tensor, threshold: float, guarded: bool = False) -> Tensor:
    """int64 (..., H): SPARSER, BASE or DENSER for each head (section 4.2).

    recall: (..., H, 3), of each head in each tier.
    As many heads as have a base recall above the threshold, half of the heads at most, get sparser: those of the
    largest recall. As many get denser: those of the smallest. Of equal ones the first counts as larger.
    guarded: leave out heads whose recall would not stay above the threshold.
    """
    heads = recall.shape[-2]
    place = recall[..., BASE].argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    moved = (recall[..., BASE] > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    sparser = place < moved
    if guarded:
        sparser &= recall[..., SPARSER] > threshold
        moved = sparser.sum(-1, keepdim=True)
    denser = place >= heads - moved
    return BASE + denser.long() - sparser.long()


def choose_blocks(columns: Tensor, keep: Tensor, tokens: Tensor) -> Tensor:
    """bool (B, H, N, N): blocks kept. Rows and columns of text are full, except where text is all padding.

    columns: (B, H, video blocks, K), as in `Ranking`; keep: (B, H), how many of them; tokens: (B, N), valid ones.
    """
    video_blocks, widest = columns.shape[-2:]
    kept = torch.arange(widest, device=columns.device) < keep[..., None, None]
    blocks = torch.zeros(*columns.shape[:3], video_blocks, dtype=torch.bool, device=columns.device)
    blocks.scatter_(-1, columns.long(), kept.expand(columns.shape))
    text = tokens.shape[1] - video_blocks
    real = tokens > 0
    return F.pad(blocks, (0, text, 0, text), value=True) & real[:, None, :, None] & real[:, None, None, :]


def drift(old: Tensor, new: Tensor, valid: Tensor) -> Tensor:
    """float32 scalar: the mean of |new - old| over heads and valid tokens; NaN if a new one is not to be trusted.

    old, new: float32 (B, H, S), log-sum-exp that `block_mass` took and gave; valid: (B,), a prefix of the tokens.
    Not to be trusted is what is not finite, and what has risen by so much that masses were capped.
    """
    real = torch.arange(old.shape[2], device=old.device) < valid.view(-1, 1, 1)
    rise = torch.where(real, new - old, 0.0)
    rise = rise.masked_fill(~rise.isfinite() | (rise >= EXPONENT_LIMIT * math.log(2.0)), math.nan)
    return rise.abs().sum() / (valid.sum() * old.shape[1])
