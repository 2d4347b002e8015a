"""PAROAttention: axis orders, how one is chosen, which blocks are kept, slots over time, and what attention gives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attnproc.errors import SettingsError
from attnproc.kernels import BlockMask, block_sparse_attention
from attnproc.kernels.oracle import put_back, take
from attnproc.layout import TokenLayout
from attnproc.sparse.bits import pack_blocks, unpack_blocks
from attnproc.sparse.paro import (
    ORDERS,
    axis_order,
    slot_count,
    slot_of,
    text_blocks,
    token_order,
)
from attnproc.sparse.paro_calibration import (
    PAROCalibrationProcessor,
    choose_blocks,
    effective_eps,
    first_smallest,
    kept_mass,
    mean_mass,
    most_kept,
    nearest_slots,
    order_scores,
    spread,
    tile_statistics,
    token_density,
)


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


def axis_head(grid, axes, logit):
    """Queries and keys (1, 1, tokens, groups): scaled scores `logit` between tokens that agree on `axes`, else 0."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    group = torch.zeros(places.shape[1], dtype=torch.long)
    for axis in axes:
        group = group * grid["FHW".index(axis)] + places["FHW".index(axis)]
    groups = int(group.max()) + 1
    return (F.one_hot(group, groups).double() * (logit * groups**0.5) ** 0.5)[None, None]


def exact_lse(query, key):
    return (query.double() @ key.double().mT * query.shape[-1] ** -0.5).logsumexp(-1)


def all_tiles(head, grid, block_size, eps):
    """Tile statistics of a head in each order."""
    lse, rows = exact_lse(head, head), torch.arange(-(-head.shape[2] // block_size))
    return [tile_statistics(head, head, lse, axis_order(grid, name), rows, block_size, eps) for name in ORDERS]


def metrics(tiles, sigma=0.9):
    """Sparse share and incoherence, (1, orders) each."""
    found = [tile.metrics(sigma) for tile in tiles]
    return tuple(torch.stack([pair[n][0] for pair in found], dim=1) for n in (0, 1))


def kept(tiles, density):
    """Kept mass, (1, orders)."""
    return torch.stack([kept_mass((tile.total / tile.rows[:, None])[0], density) for tile in tiles], dim=1)


# -- axis orders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "tokens"),
    [
        ("FHW", range(12)),
        ("FWH", [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]),
        ("HWF", [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]),
        ("HFW", [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]),
        ("WHF", [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]),
        ("WFH", [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]),
    ],
)
def test_an_axis_order_walks_its_last_axis_fastest(order, tokens):
    assert axis_order((2, 2, 3), order).tolist() == list(tokens)


def test_the_inverse_of_an_order_is_not_the_order_of_inverse_name():
    assert axis_order((2, 2, 3), "HWF").argsort().tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert axis_order((2, 2, 3), "HWF").argsort().tolist() != axis_order((2, 2, 3), "WFH").tolist()


@pytest.mark.parametrize("grid", [(2, 3, 4), (5, 1, 3), (1, 4, 7), (3, 2, 2), (1, 1, 1)], ids=str)
def test_every_order_is_a_permutation_and_can_be_put_back(grid):
    orders = token_order(grid, ORDERS, 5)
    tokens = math.prod(grid) + 5
    assert orders.shape == (6, tokens) and orders.dtype == torch.int32
    assert torch.equal(orders[:, -5:], torch.arange(tokens - 5, tokens).int().expand(6, 5)), "text stays where it is"
    x = torch.randn(2, 6, tokens, 3)
    assert torch.equal(put_back(take(x, orders), orders), x)
    assert torch.equal(orders.sort(-1).values, torch.arange(tokens).int().expand(6, -1))


def test_an_unknown_order_is_refused():
    with pytest.raises(SettingsError, match=r"'THW'.*FHW, FWH"):
        axis_order((2, 2, 3), "THW")


@pytest.mark.parametrize("text", [0, 1, 7])
@pytest.mark.parametrize("order", ORDERS)
def test_the_permutation_never_leaks_out(order, text):
    grid, heads = (3, 2, 5), 2
    tokens = math.prod(grid) + text
    query, key, value = torch.randn(3, 2, heads, tokens, 8, dtype=torch.float64)
    found = block_sparse_attention(
        query,
        key,
        value,
        BlockMask.full(tokens, tokens, (16, 16)),
        token_order=token_order(grid, [order] * heads, text),
        backend="oracle",
    )
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_axes_of_input_and_order_may_be_renamed_together():
    grid, names = (2, 3, 4), "FHW"
    query, key, value = torch.randn(3, 1, 1, 24, 8, dtype=torch.float64)
    blocks = torch.rand(3, 3) < 0.5
    blocks |= torch.eye(3, dtype=torch.bool)
    mask = BlockMask.from_blocks(blocks, 24, 24, (8, 8))

    def attend(tensors, grid, order):
        return block_sparse_attention(*tensors, mask, token_order=token_order(grid, [order]), backend="oracle")

    for order in ORDERS:
        expected = attend((query, key, value), grid, order)
        for axes in ((1, 0, 2), (2, 0, 1), (0, 2, 1)):  # new axis n is old axis axes[n]
            turned = torch.arange(24).view(grid).permute(axes).reshape(-1)
            renamed = "".join(names[axes.index(names.index(letter))] for letter in order)
            inputs = [x[:, :, turned] for x in (query, key, value)]
            found = attend(inputs, tuple(grid[axis] for axis in axes), renamed)
            torch.testing.assert_close(found, expected[:, :, turned], atol=1e-12, rtol=0)


# -- which order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "axes", "block_size", "pick", "sparse", "incoherence"),
    [
        ((4, 4, 4), "HW", 4, "HWF", [0.75, 0.75, 0.9375, 0.75, 0.9375, 0.75], [1.749, 1.749, 1, 1.749, 1, 1.749]),
        ((4, 4, 4), "F", 4, "FHW", [0.75, 0.75, 0, 0.75, 0, 0.75], [1, 1, 3.996, 1, 3.996, 1]),
        ((4, 4, 4), "FH", 4, "FHW", None, None),
        ((4, 4, 4), "FW", 4, "FWH", None, None),
        (
            (2, 3, 4),
            "HW",
            6,
            "HWF",
            [0.5, None, 0.75, 0.625, None, None],
            [3.495, None, 1.4995, 7.1698, None, None],
        ),
    ],
    ids=["temporal", "frame", "row", "column", "odd sizes"],
)
def test_the_score_finds_the_order_of_simple_heads(grid, axes, block_size, pick, sparse, incoherence):
    found = metrics(all_tiles(axis_head(grid, axes, 8.0), grid, block_size, 1e-3))
    assert ORDERS[first_smallest(order_scores(*found, 0.5))] == pick
    for numbers, expected in zip(found, (sparse, incoherence), strict=True):
        for number, wanted in zip(numbers[0].tolist(), expected or [], strict=bool(expected)):
            assert wanted is None or number == pytest.approx(wanted, abs=5e-5)


def test_the_formula_as_printed_would_choose_the_worst_order():
    sparse, incoherence = metrics(all_tiles(axis_head((4, 4, 4), "F", 8.0), (4, 4, 4), 4, 1e-3))
    printed = 0.5 * sparse / sparse.sum() + 0.5 * incoherence / incoherence.sum()
    assert printed[0, 0].item() == pytest.approx(0.1667, abs=5e-5)
    assert printed[0, 2].item() == pytest.approx(0.1666, abs=5e-5)
    assert ORDERS[printed.argmin()] == "HWF"
    scores = order_scores(sparse, incoherence, 0.5)
    assert scores[0, [0, 2]].tolist() == pytest.approx([0.0834, 0.3333], abs=5e-5)
    assert ORDERS[first_smallest(scores)] == "FHW"


def test_kept_mass_sees_what_the_score_cannot():
    tiles = all_tiles(axis_head((4, 6, 8), "FW", 12.0), (4, 6, 8), 16, 1e-3)
    found = kept(tiles, 1 / 6)
    by_score = first_smallest(order_scores(*metrics(tiles), 0.5)).item()
    by_mass = most_kept(found, metrics(tiles)[1]).item()
    assert (ORDERS[by_score], ORDERS[by_mass]) == ("HWF", "FWH")
    assert found[0, [by_score, by_mass]].tolist() == pytest.approx([0.333, 0.972], abs=5e-4)


def test_identity_wins_where_nothing_is_gained():
    tiles = all_tiles(torch.zeros(1, 1, 24, 4), (2, 3, 4), 8, 1e-3)
    sparse, incoherence = metrics(tiles)
    assert first_smallest(order_scores(sparse, incoherence, 0.5)).item() == 0
    assert most_kept(kept(tiles, 0.5), incoherence).item() == 0
    assert order_scores(torch.ones(1, 6), torch.ones(1, 6), 0.5).isfinite().all(), "all sparse in every order"


def test_a_single_frame_needs_two_orders_only():
    image = all_tiles(axis_head((1, 6, 8), "W", 12.0), (1, 6, 8), 6, 1e-3)
    assert ORDERS[most_kept(kept(image, 0.2), metrics(image)[1])] == "FWH"
    assert {tuple(axis_order((1, 6, 8), order).tolist()) for order in ORDERS} == {
        tuple(axis_order((1, 6, 8), order).tolist()) for order in ("FHW", "FWH")
    }


@pytest.mark.parametrize("axis", "FHW")
@pytest.mark.parametrize(("grid", "block_size"), [((4, 4, 4), 4), ((4, 6, 8), 24), ((4, 4, 4), 16), ((6, 6, 6), 6)])
def test_kept_mass_recovers_the_axis_a_head_attends_along(grid, block_size, axis):
    """Blocks that hold whole groups, or groups that hold whole blocks: the right order keeps nearly everything."""
    length = grid["FHW".index(axis)]
    assert block_size % length == 0 or length % block_size == 0
    others = "FHW".replace(axis, "")
    tiles = all_tiles(axis_head(grid, others, 16.0), grid, block_size, effective_eps(1e-3, math.prod(grid)))
    found = kept(tiles, 1 / length)
    pick = most_kept(found, metrics(tiles)[1]).item()
    assert found[0, pick] > 0.99
    whole_groups_elsewhere = [found[0, n].item() > 0.99 for n, order in enumerate(ORDERS) if order[-1] != axis]
    assert ORDERS[pick][-1] == axis or any(whole_groups_elsewhere)


def test_blocks_that_fit_no_group_still_keep_the_best_mass():
    tiles = all_tiles(axis_head((4, 3, 4), "HW", 16.0), (4, 3, 4), 6, 1e-3)
    found = kept(tiles, 1 / 4)
    assert ORDERS[most_kept(found, metrics(tiles)[1])] == "WFH"
    assert found.max() - found[0, ORDERS.index("WFH")] < 0.01


@pytest.mark.parametrize(("grid", "block_size"), [((3, 4, 5), 16), ((2, 3, 4), 6), ((4, 4, 4), 64), ((3, 3, 3), 10)])
def test_tile_statistics_are_those_of_the_map(grid, block_size):
    tokens, eps = math.prod(grid), 0.02
    query, key = torch.randn(2, 2, 3, tokens, 8)
    order = axis_order(grid, "WHF")
    rows = torch.arange(-(-tokens // block_size))[::2]
    tiles = tile_statistics(query, key, exact_lse(query, key).float(), order, rows, block_size, eps)
    weights = (query.double() @ key.double().mT / 8**0.5).softmax(-1)[:, :, order][..., order]
    for i, row in enumerate(rows.tolist()):
        for j in range(-(-tokens // block_size)):
            tile = weights[..., row * block_size :, j * block_size :][..., :block_size, :block_size].flatten(2)
            torch.testing.assert_close(tiles.total[..., i, j].double(), tile.sum(-1), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tiles.largest[..., i, j].double(), tile.amax(-1), atol=1e-5, rtol=1e-5)
            assert torch.equal(tiles.small[..., i, j].double(), (tile < eps).double().sum(-1))
            assert tiles.rows[i] * tiles.columns[j] == tile.shape[-1]
    torch.testing.assert_close(tiles.total.sum(-1), tiles.rows.expand(2, 3, -1), atol=1e-4, rtol=0)


def test_a_tile_of_zeros_is_coherent_and_sparse():
    query = torch.zeros(1, 1, 8, 2)
    tiles = tile_statistics(
        query, query, torch.full((1, 1, 8), torch.inf), torch.arange(8), torch.arange(2), 4, eps=1e-3
    )
    assert [number.item() for number in tiles.metrics(0.9)] == [1.0, 1.0]


def test_the_threshold_grows_as_uniform_weights_do():
    assert effective_eps(1e-3, 17_550) == effective_eps(1e-3, 4096) == 1e-3
    assert effective_eps(1e-3, 64) == pytest.approx(1e-3 * 17550 / 64)


def test_sampled_query_blocks_are_spread_over_all():
    assert spread(5, None).tolist() == spread(5, 64).tolist() == [0, 1, 2, 3, 4]
    found = spread(278, 64)
    assert len(found) == 64 and found[0] == 2 and found[-1] == 275
    assert set(found.diff().tolist()) == {4, 5}
    assert spread(7, 1).tolist() == [3]


# -- which blocks ------------------------------------------------------------------------------------------------------

MASS = torch.tensor([[0.50, 0.20, 0.05, 0.25], [0.10, 0.60, 0.25, 0.05], [0.05, 0.15, 0.70, 0.10], [0.25] * 4])


@pytest.mark.parametrize(
    ("density", "rows"),
    [
        (0.25, "1000 0100 0010 1000"),
        (0.5, "1001 0110 0010 1110"),
        (0.75, "1101 1110 0110 1111"),
        (1.0, " ".join(["1111"] * 4)),
    ],
)
def test_blocks_are_kept_by_rank(density, rows):
    assert as_text(choose_blocks(MASS[None], density)[0]) == rows


def as_text(blocks):
    return " ".join("".join("01"[int(kept)] for kept in row) for row in blocks)


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("text", [0, 3])
def test_the_density_is_met_and_text_and_row_maxima_are_in(scope, text):
    mass = torch.rand(4, 10, 10).pow(6)
    mass /= mass.sum(-1, keepdim=True)
    forced = torch.zeros(10, 10, dtype=torch.bool)
    forced[10 - text :] = True
    forced[:, 10 - text :] = True
    for density in (0.05, 0.6, 0.8, 1.0):
        blocks = choose_blocks(mass, density, forced, scope)
        largest = F.one_hot(mass.argmax(-1), 10).bool()
        assert blocks[:, forced].all() and blocks[largest].all()
        always = forced | largest
        per_head = scope == "head"
        wanted = [round(density * 100)] * 4 if per_head else [round(density * 400)]
        least = always.flatten(1).sum(-1).tolist() if per_head else [int(always.sum())]
        counts = blocks.flatten(1).sum(-1).tolist() if per_head else [int(blocks.sum())]
        assert counts == [max(pair) for pair in zip(wanted, least, strict=True)]
        dropped, added = mass[~blocks], mass[blocks & ~always]
        if not per_head and len(added) and len(dropped):
            assert added.min() >= dropped.max()


def test_sparse_heads_give_their_share_to_dense_ones():
    peaked = torch.full((8, 8), 1e-4) + torch.eye(8)
    mass = torch.stack([peaked, torch.full((8, 8), 0.125)])
    assert choose_blocks(mass, 0.5).flatten(1).sum(-1).tolist() == [8, 56]
    assert choose_blocks(mass, 0.5, scope="head").flatten(1).sum(-1).tolist() == [32, 32]


@pytest.mark.parametrize("valid", [None, [57, 41]])
def test_mass_is_the_softmax_over_valid_keys_by_block(valid):
    query, key = torch.randn(2, 2, 3, 57, 8)
    lengths = None if valid is None else torch.tensor(valid)
    mass = mean_mass(query, key, 16, lengths)
    ends = valid or [57, 57]
    for sample, end in enumerate(ends):
        weights = (query[sample].double() @ key[sample, :, :end].double().mT / 8**0.5).softmax(-1)
        for i in range(4):
            for j in range(4):
                tile = weights[:, 16 * i : min(16 * i + 16, end), 16 * j : 16 * j + 16].sum(-1)
                expected = tile.mean(-1) if tile.numel() else torch.zeros(3).double()
                torch.testing.assert_close(mass[sample, :, i, j].double(), expected, atol=1e-5, rtol=0)


def test_only_blocks_with_text_are_forced():
    assert not text_blocks(TokenLayout((2, 5, 5)), 16).any()
    assert as_text(text_blocks(TokenLayout((2, 4, 4), 5), 16)) == "001 001 111"
    assert as_text(text_blocks(TokenLayout((2, 4, 5), 5), 16)) == "001 001 111", "one block holds video and text"
    assert text_blocks(TokenLayout((1, 3, 3), 5), 16).all()


def test_density_counts_tokens():
    blocks = torch.rand(3, 4, 4) < 0.5
    mask = BlockMask.from_blocks(blocks[None], 57, 57, (16, 16))
    assert token_density(blocks, 57, 16) == pytest.approx(mask.density, abs=1e-12)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 20, 278])
def test_packed_masks_come_back(columns):
    blocks = torch.rand(3, 5, columns) < 0.5
    packed = pack_blocks(blocks)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, -(-columns // 8))
    assert torch.equal(unpack_blocks(packed, columns), blocks)
    assert packed.tolist() == np.packbits(blocks.numpy(), axis=-1).tolist()
    assert pack_blocks(torch.tensor([[True] + [False] * 8])).tolist() == [[128, 0]], "the first bit is the highest"


# -- slots -------------------------------------------------------------------------------------------------------------


def test_slots_follow_the_share_of_the_run():
    assert [slot_of(s, 30, "uniform", 10) for s in range(30)] == [n for n in range(10) for _ in range(3)]
    assert [slot_of(s, 30, "half_shared", 5) for s in range(30)] == [n for n in range(5) for _ in range(3)] + [5] * 15
    assert slot_of(29, 50, "uniform", 50) == 29, "floats would be off by one"
    assert (slot_count("uniform", 10), slot_count("half_shared", 5)) == (10, 6)


@pytest.mark.parametrize("policy", ["uniform", "half_shared"])
@pytest.mark.parametrize("total", [1, 2, 4, 7, 50])
def test_slots_never_go_back_and_stay_in_range(policy, total):
    slots = [slot_of(step, total, policy, 5) for step in range(total)]
    assert slots == sorted(slots) and slots[0] == 0
    assert slots[-1] < slot_count(policy, 5)


def test_a_run_of_unknown_length_has_one_slot_or_none():
    assert slot_of(3, None, "uniform", 1) == 0
    with pytest.raises(SettingsError, match="number of steps"):
        slot_of(3, None, "half_shared", 5)


def test_slots_that_were_not_seen_take_the_nearest():
    assert nearest_slots([0, 3], 6) == [0, 0, 1, 1, 1, 1]
    assert nearest_slots([4], 6) == [0] * 6
    assert nearest_slots([0, 2], 3) == [0, 0, 1], "the earlier of two as near"


# -- a worked example: 3 x 4 x 5 video tokens in the order WHF behind 4 text tokens, blocks of 16 ----------------------


def lcg(seed):
    found, u = [], seed
    for _ in range(64 * 8):
        u = (u * 1103515245 + 12345) & 0x7FFFFFFF
        found.append(u / 2**31 * 2 - 1)
    return torch.tensor(found, dtype=torch.float64).view(1, 1, 64, 8)


@pytest.fixture
def example():
    order = torch.cat([torch.arange(4), 4 + axis_order((3, 4, 5), "WHF")])[None]
    return 2 * lcg(1), 2 * lcg(2), lcg(3), order


def example_blocks(example, *forced):
    query, key, _, order = example
    mass = mean_mass(take(query, order), take(key, order), 16)[0]
    band = torch.zeros(4, dtype=torch.bool)
    band[list(forced)] = True
    return mass, choose_blocks(mass, 0.5, band[:, None] | band)


def example_out(example, blocks):
    query, key, value, order = example
    mask = BlockMask.from_blocks(blocks[None], 64, 64, (16, 16))
    return block_sparse_attention(query, key, value, mask, token_order=order, backend="oracle")[0, 0]


def test_the_worked_example(example):
    mass, blocks = example_blocks(example, 0, 3)
    assert mass[0, 0].tolist() == pytest.approx([0.2383, 0.3090, 0.2177, 0.2350], abs=5e-5)
    assert as_text(blocks[0]) == "1111 1101 1001 1111", "forced blocks alone are more than half"
    out = example_out(example, blocks)
    assert out.sum().item() == pytest.approx(-25.8072044, abs=1e-6)
    for row, expected in {
        0: [-0.136062, -0.111219, 0.283312],
        31: [-0.150171, -0.034475, -0.204989],
        63: [-0.147117, 0.096723, -0.242512],
    }.items():
        assert out[row, :3].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_worked_example_without_forcing_the_tail(example):
    _, blocks = example_blocks(example, 0)
    assert as_text(blocks[0]) == "1111 1100 1000 1100"
    assert example_out(example, blocks).sum().item() == pytest.approx(-18.9150002, abs=1e-6)


# -- quantization by its definition, in float64 ------------------------------------------------------------------------


def integers(x, dims, largest=127):
    """Integers and scale of groups that span `dims`; halves go to even."""
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-7) / largest
    return (x / scale).round(), scale


def groups_of(x, size):
    """Rows of (S, D) in groups of `size` consecutive ones, rounded to 8 bits and back."""
    whole, scale = integers(x.unflatten(0, (-1, size)), (1, 2))
    return (whole * scale).flatten(0, 1)


@pytest.mark.parametrize(
    ("row", "expected", "scale"),
    [
        ([0.5, -1, 0.25, 0.1], [64, -127, 32, 13], 1 / 127),
        ([0.02, 0, -0.04, 0.01], [64, 0, -127, 32], 0.04 / 127),
        ([0.0, 0, 0, 0], [0, 0, 0, 0], 1e-7 / 127),
    ],
)
def test_a_group_is_rounded_relative_to_its_largest(row, expected, scale):
    whole, found = integers(torch.tensor(row, dtype=torch.float64), (0,))
    assert whole.tolist() == expected and found.item() == pytest.approx(scale)
    kernels_own, kernels_scale = quantized_by_kernel(row)
    assert (kernels_own - whole).abs().max() <= 1, "the kernel adds a smallest scale, so halves may fall otherwise"
    assert kernels_scale.isfinite() and kernels_scale.item() == pytest.approx(scale, abs=1.1e-7)


def quantized_by_kernel(row):
    from attnproc.kernels.quantize import quantize_rows

    whole, scale = quantize_rows(torch.tensor(row).view(1, 1, 1, 4), 1)
    return whole.flatten().double(), scale.flatten()[0].double()


def test_int8_scores_of_the_worked_example(example):
    _, blocks = example_blocks(example, 0, 3)
    query, key, value, order = example
    q, k = take(query, order)[0, 0], take(key, order)[0, 0]
    rounded = put_back(torch.stack([groups_of(q, 8), groups_of(k, 16)])[:, None], order)
    out = example_out((rounded[:1], rounded[1:], value, order), blocks)
    assert out.sum().item() == pytest.approx(-25.8094280, abs=1e-6)
    assert (out - example_out(example, blocks)).abs().max().item() == pytest.approx(0.005268, abs=1e-6)


@pytest.mark.parametrize(("largest", "total", "change"), [(127, -25.7740738, 0.010771), (7, -26.3082435, 0.097661)])
def test_rounded_weights_and_values_of_the_worked_example(example, largest, total, change):
    _, blocks = example_blocks(example, 0, 3)
    query, key, value, order = example
    q, k, v = (take(x, order)[0, 0] for x in (query, key, value))
    out = torch.zeros(64, 8, dtype=torch.float64)
    for i in range(4):
        rows = slice(16 * i, 16 * i + 16)
        running, denominator, sums = torch.full((16, 1), -torch.inf), torch.zeros(16, 1), torch.zeros(16, 8)
        for j in blocks[0, i].nonzero().flatten().tolist():
            keys = slice(16 * j, 16 * j + 16)
            scores = q[rows] @ k[keys].mT * 8**-0.5
            higher = torch.maximum(running, scores.amax(-1, keepdim=True))
            decay, weights = (running - higher).exp(), (scores - higher).exp()
            whole_weights, weight_scale = integers(weights, (0, 1), largest)
            whole_values, value_scale = integers(v[keys], (0,), largest)
            denominator = denominator * decay + weights.sum(-1, keepdim=True)
            sums = sums * decay + whole_weights @ whole_values * weight_scale * value_scale
            running = higher
        out[rows] = sums / denominator
    out = put_back(out[None, None], order)[0, 0]
    assert out.sum().item() == pytest.approx(total, abs=1e-5)
    assert (out - example_out(example, blocks)).abs().max().item() == pytest.approx(change, abs=1e-6)


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.02), ("int4", 0.4)])
def test_the_kernels_quantize_in_the_permuted_order(example, quantization, error):
    _, blocks = example_blocks(example, 0, 3)
    query, key, value, order = (x.float() if x.is_floating_point() else x for x in example)
    mask = BlockMask.from_blocks(blocks[None], 64, 64, (16, 16))
    found = block_sparse_attention(
        query, key, value, mask, token_order=order, quantization=quantization, backend="oracle"
    )
    change = (found[0, 0] - example_out(example, blocks)).abs().max().item()
    assert 0.0 < change < error


# -- what attention under a plan is ------------------------------------------------------------------------------------


def test_outputs_are_weighted_means_of_values():
    grid, orders = (3, 4, 5), ["WHF", "HFW"]
    query, key, value = torch.randn(3, 1, 2, 60, 8, dtype=torch.float64)
    order = token_order(grid, orders)
    blocks = choose_blocks(mean_mass(take(query, order), take(key, order), 16)[0], 0.5)
    mask = BlockMask.from_blocks(blocks[None], 60, 60, (16, 16))

    def attend(value):
        return block_sparse_attention(query, key, value, mask, token_order=order, backend="oracle")

    out = attend(value)
    assert (out <= value.amax(2, keepdim=True) + 1e-12).all() and (out >= value.amin(2, keepdim=True) - 1e-12).all()
    torch.testing.assert_close(attend(torch.full_like(value, 0.7)), torch.full_like(value, 0.7))


def test_a_larger_density_is_nearer_to_dense_attention():
    query, key, value = 2 * torch.randn(3, 4, 2, 120, 8, dtype=torch.float64)
    order = token_order((4, 5, 6), ["HWF", "FWH"])
    mass = mean_mass(take(query, order), take(key, order), 16).mean(0)
    dense = F.scaled_dot_product_attention(query, key, value)
    errors = []
    for density in (0.2, 0.4, 0.6, 0.8, 1.0):
        mask = BlockMask.from_blocks(choose_blocks(mass, density)[None], 120, 120, (16, 16))
        out = block_sparse_attention(query, key, value, mask, token_order=order, backend="oracle")
        errors.append((out - dense).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-24 < errors[-2]


# -- settings of the calibration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"density": 0.0},
        {"density": 1.1},
        {"density": "0.5"},
        {"density": True},
        {"criterion": "mass"},
        {"scope": "model"},
        {"slot_policy": "half"},
        {"slots": 0},
        {"slots": 2.0},
        {"query_blocks": 0},
        {"eps": -1e-3},
        {"sigma": 1.5},
        {"alpha": None},
    ],
    ids=str,
)
def test_bad_settings_are_named(bad):
    with pytest.raises(SettingsError, match=next(iter(bad))):
        PAROCalibrationProcessor(**bad)


@pytest.mark.parametrize(("quality", "density"), [("high", 0.5), ("balanced", 0.3), ("fast", 0.2)])
def test_quality_is_a_density(quality, density):
    processor = PAROCalibrationProcessor(quality=quality)
    assert (processor.density, processor.block_size) == (density, 64)
    assert PAROCalibrationProcessor(quality=quality, density=0.9).density == 0.9
