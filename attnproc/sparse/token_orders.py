"""Orders of the video tokens in which neighbours in space and time fall into the same block.

Attention does not care in which order its tokens come, but blocks do: the more alike the tokens of a block are, the
better their mean speaks for them. An order is a permutation: position p holds token order[p]. Text stays at the end.
"""

import torch
from torch import Tensor

from attnproc.errors import SettingsError
from attnproc.layout import TokenLayout

#: axes of the latent grid (0 time, 1 rows, 2 columns) from the slowest to the fastest
_SORTED = {"row-major": (0, 1, 2), "column-major": (0, 2, 1), "time-major": (1, 2, 0)}
TOKEN_ORDERS = ("hilbert", *_SORTED)


def token_order(name: str, layout: TokenLayout) -> Tensor:
    """int32 (tokens,) on the CPU: the permutation of a layout's video tokens, text tokens behind it in place.

    name: "row-major", the order of the model: along a row, then down the frame, then through time; "column-major",
        down a column first; "time-major", through time first; "hilbert", along a Hilbert curve.

    Raises:
        SettingsError: the name is not known.
    """
    cells = torch.arange(layout.video_tokens, dtype=torch.int32).view(layout.grid)
    if name == "hilbert":
        order = hilbert_index(layout.grid).flatten().argsort()
        video = cells.flatten()[order]
    elif name in _SORTED:
        video = cells.permute(_SORTED[name]).flatten()
    else:
        raise SettingsError(f"token_order={name!r} is not known; choose one of {', '.join(TOKEN_ORDERS)}.")
    return torch.cat([video, torch.arange(layout.video_tokens, layout.tokens, dtype=torch.int32)])


def hilbert_index(grid: tuple[int, int, int]) -> Tensor:
    """int64 (T, H, W): how far along the Hilbert curve of the enclosing cube of side 2**b each cell lies.

    Neighbours on the curve are neighbours in the cube; where the grid does not fill the cube a few steps are longer.
    Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).
    """
    bits = (max(grid) - 1).bit_length()
    axes = list(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    # From the largest cubes to the smallest, turn each so that its curve starts and ends where its neighbours' do.
    for bit in range(bits - 1, 0, -1):
        below = (1 << bit) - 1
        for i, axis in enumerate(axes):
            inverted = (axis >> bit & 1).bool()
            exchanged = torch.where(inverted, 0, (axes[0] ^ axis) & below)
            axes[i] = axis ^ exchanged
            axes[0] = axes[0] ^ torch.where(inverted, below, exchanged)
    # What is left is a Gray code across the axes, the slowest first.
    for i in (1, 2):
        axes[i] = axes[i] ^ axes[i - 1]
    flips = torch.zeros_like(axes[0])
    for bit in range(1, bits):
        flips ^= torch.where((axes[2] >> bit & 1).bool(), (1 << bit) - 1, 0)
    index = torch.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            index = index << 1 | ((axis ^ flips) >> bit & 1)
    return index
