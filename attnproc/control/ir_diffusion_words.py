"""Where a subject stands, read from attention: cross-attention of its words, spread by self-attention.

The fallback of IR-Diffusion's released code for masks that nobody draws. For every layer the map of a word,
T = (S C + S^2 C + S^3 C + S^4 C) / 4, takes C from the cross-attention, head mean, and S from the self-attention
before it. Maps are averaged over layers, and Otsu's threshold parts the subject from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

POWERS = 4
BINS = 256


def otsu(values: Tensor) -> Tensor:
    """Boolean, the shape of `values`: what lies in the upper of the two classes that Otsu's method finds.

    The values are stretched to 0 to 1 and counted in 256 equal bins; of all cuts the lowest one with the largest
    variance between the classes is taken. Where all values are the same, nothing is in the upper class.
    """
    low, high = values.min(), values.max()
    if not bool(high > low):
        return torch.zeros_like(values, dtype=torch.bool)
    bins = ((values - low) / (high - low) * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(bins.flatten(), minlength=BINS).double()
    centers = (torch.arange(BINS, device=values.device) + 0.5) / BINS
    weight = counts.cumsum(0) / counts.sum()
    moment = (counts * centers).cumsum(0) / counts.sum()
    lower, upper = moment / weight, (moment[-1] - moment) / (1 - weight)
    between = (weight * (1 - weight) * (lower - upper).square()).nan_to_num(0.0)
    # The same cut can come out a rounding apart in the empty bins above it.
    cut = int((between >= between.max() * (1 - 1e-12)).nonzero()[0])
    return bins > cut


def spread(query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """(S C + S^2 C + S^3 C + S^4 C) / 4 for the head mean S of a self-attention map, never formed.

    Each product is attention with C as its values.

    Args:
        query, key: (heads, tokens, head_dim) of the self-attention.
        columns: C, (tokens, words).
    """
    total = torch.zeros_like(columns)
    for _ in range(POWERS):
        columns = scaled_dot_product_attention(query, key, columns.expand(len(query), -1, -1)).mean(0)
        total += columns
    return total / POWERS


def word_columns(query: Tensor, key: Tensor, tokens: Sequence[int]) -> Tensor:
    """Head-mean cross-attention (tokens of the picture, words) of some text tokens.

    query: (heads, tokens, head_dim); key: (heads, text tokens, head_dim).
    """
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    return logits.softmax(-1)[..., list(tokens)].mean(0)


class WordMaps:
    """Collects the maps of words over the layers of one step.

    Args:
        wanted: for each image of the batch that has some, text token indices by subject.
    """

    def __init__(self, wanted: Mapping[int, Mapping[int, Sequence[int]]]):
        self.wanted = wanted
        self._self_attention: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[tuple[int, int], dict[tuple[int, int], Tensor]] = {}
        self._layers = 0

    def watch_self(self, query: Tensor, key: Tensor) -> None:
        """Keeps queries and keys (images, heads, tokens, head_dim), conditional half, for the cross-attention next."""
        self._self_attention = {image: (query[image].float(), key[image].float()) for image in self.wanted}

    def watch_cross(self, query: Tensor, key: Tensor, grid: tuple[int, int]) -> None:
        """Adds the maps of a cross-attention layer with this grid."""
        self._layers += 1
        for image, subjects in self.wanted.items():
            spreading = self._self_attention[image]
            for subject, tokens in subjects.items():
                columns = spread(*spreading, word_columns(query[image].float(), key[image].float(), tokens))
                maps = columns.mT.reshape(len(tokens), *grid)
                sums = self._sums.setdefault((image, subject), {})
                sums[grid] = sums[grid] + maps if grid in sums else maps
        self._self_attention = {}

    def masks(self, grids: Sequence[tuple[int, int]]) -> dict[tuple[int, int], dict[tuple[int, int], Tensor]]:
        """Boolean masks on the CPU by (image, subject) and by grid, from what was watched; starts afresh."""
        result: dict[tuple[int, int], dict[tuple[int, int], Tensor]] = {}
        for name, sums in self._sums.items():
            result[name] = {}
            for grid in grids:
                resized = (
                    F.interpolate(maps[None], grid, mode="bilinear", align_corners=False) for maps in sums.values()
                )
                mean = sum(resized, torch.zeros(())) / self._layers
                result[name][grid] = otsu(mean[0].amax(0)).cpu()
        self._sums, self._layers = {}, 0
        return result
