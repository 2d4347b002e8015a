"""Token orders: permutations that bring neighbours in space and time together."""

import pytest
import torch

from attnproc.errors import SettingsError
from attnproc.kernels.scores import pool_blocks
from attnproc.layout import TokenLayout
from attnproc.sparse.token_orders import TOKEN_ORDERS, token_order


def order_of(name, *grid, text=0):
    return token_order(name, TokenLayout(grid, text)).long()


def steps_of(order, grid):
    """Distances on the grid between tokens that follow each other."""
    frames = order // (grid[1] * grid[2])
    places = torch.stack([frames, order // grid[2] % grid[1], order % grid[2]])
    return places.diff(dim=1).abs().sum(0)


@pytest.mark.parametrize("name", TOKEN_ORDERS)
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 3), (3, 5, 7), (5, 8, 8), (9, 2, 1)])
def test_every_order_is_a_permutation_that_leaves_text_at_the_end(name, grid):
    video = grid[0] * grid[1] * grid[2]
    order = order_of(name, *grid, text=4)
    assert torch.equal(order.sort().values, torch.arange(video + 4))
    assert order[video:].tolist() == [video, video + 1, video + 2, video + 3]
    assert token_order(name, TokenLayout(grid)).dtype == torch.int32


def test_sorted_orders_worked_out_by_hand():
    assert order_of("row-major", 2, 2, 3).tolist() == list(range(12))
    assert order_of("column-major", 2, 2, 3).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert order_of("time-major", 2, 2, 3).tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


def test_hilbert_orders_worked_out_by_hand():
    assert order_of("hilbert", 2, 2, 2).tolist() == [0b000, 0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100]
    assert order_of("hilbert", 1, 4, 4).tolist() == [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 9, 13, 12, 8]


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_the_hilbert_curve_of_a_cube_makes_unit_steps(side):
    grid = (side, side, side)
    assert (steps_of(order_of("hilbert", *grid), grid) == 1).all()


def test_on_other_grids_few_steps_of_the_hilbert_curve_are_longer():
    grid = (21, 30, 52)
    steps = steps_of(order_of("hilbert", *grid), grid)
    assert len(steps) == 32759 and int((steps > 1).sum()) == 344


def test_blocks_of_a_smooth_video_are_most_alike_in_hilbert_order():
    """The paper's comparison, on a random field that is smooth in space and time."""
    grid, generator = (16, 24, 32), torch.Generator().manual_seed(7)
    field = torch.randn(1, 32, 4, 6, 8, generator=generator)
    field = torch.nn.functional.interpolate(field, grid, mode="trilinear").flatten(2).transpose(1, 2)[None]
    field = field + 0.3 * torch.randn(field.shape, generator=generator)
    orders = {name: order_of(name, *grid) for name in TOKEN_ORDERS}
    orders["random"] = torch.randperm(field.shape[2], generator=generator)
    alike = {name: float(pool_blocks(field[:, :, order], 128).similarity.mean()) for name, order in orders.items()}
    assert alike["hilbert"] > max(alike["column-major"], alike["time-major"]) + 0.1
    assert min(alike["column-major"], alike["time-major"]) > alike["row-major"] > alike["random"] + 0.1


def test_an_unknown_order_is_named():
    with pytest.raises(SettingsError, match=r"token_order='zigzag'.*hilbert"):
        token_order("zigzag", TokenLayout((2, 2, 2)))
