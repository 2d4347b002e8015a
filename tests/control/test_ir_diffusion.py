"""IR-Diffusion's mathematics against the definition, written out pair by pair in float64."""

import itertools
import random

import pytest
import torch

from attnproc.control.ir_diffusion import (
    NOBODY,
    IRSettings,
    Layout,
    attend_in_groups,
    crop_bottom,
    disjoint,
    drop_queries,
    groups,
    grow_small,
    reposition,
    stack_tokens,
)
from attnproc.control.ir_diffusion_words import WordMaps, otsu, spread, word_columns
from attnproc.errors import SettingsError

PLAIN = IRSettings(query_dropout=0.0)


@pytest.fixture
def seed():
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def grid(text):
    """A boolean mask from rows of 0 and 1 between bars."""
    return torch.tensor([[letter == "1" for letter in row] for row in text.split("|")])


M = torch.stack([grid("1110|1110|0000|0000"), grid("0000|0001|0011|0011")])
R = torch.stack([grid("0000|0110|0010|0000"), grid("1110|1111|0000|0000")])
TOY = Layout.of(R, M, PLAIN)
SUBJECT = (M[0].flatten(), M[1].flatten(), ~M.any(0).flatten())


def visible(layout, isolated=True, extended=True, drawn=None):
    """The definition: which key of [portrait 1, ..., portrait S, scene] each scene token sees, bool (N, (S + 1) N).

    Portrait keys are placed in the scene, as the method says: key k of block i reads the source moved to place k.
    """
    owners = layout.targets.flatten(1)
    count, tokens = owners.shape
    drawn = owners if drawn is None else drawn
    seen = torch.zeros(tokens, (count + 1) * tokens, dtype=torch.bool)
    for query, key in itertools.product(range(tokens), repeat=2):
        pairs = ((owners[i, query], owners[j, key]) for i, j in itertools.permutations(range(count), 2))
        blocked = isolated and any(bool(a and b) for a, b in pairs)
        seen[query, count * tokens + key] = not blocked
    for subject in range(count) if extended else ():
        for query, key in itertools.product(range(tokens), layout.places[subject].tolist()):
            seen[query, subject * tokens + key] = drawn[subject, query]
    return seen


def by_definition(layout, query, key, value, ref_bias=0.0, **rules):
    """One masked softmax over all blocks. query, key, value: (images, tokens, head_dim), the scene last; float64."""
    count, tokens = len(layout.targets), query.shape[1]
    keys, values = [], []
    for subject in range(count):
        for blocks, states in ((keys, key), (values, value)):
            canvas = torch.zeros_like(states[subject])
            canvas[layout.places[subject]] = states[subject, layout.sources[subject]]
            blocks.append(canvas)
    keys, values = (torch.cat([*blocks, states[-1]]) for blocks, states in ((keys, key), (values, value)))
    logits = query[-1] @ keys.T * query.shape[-1] ** -0.5
    logits[:, : count * tokens] += ref_bias
    return logits.masked_fill(~visible(layout, **rules), -torch.inf).softmax(-1) @ values


def in_groups(layout, query, key, value, isolated=True, extended=True, readers=None, ref_bias=0.0, images=None):
    """The fast path, with the same arguments and result."""
    tokens = layout.targets[0].numel()
    nobody = torch.full((tokens,), NOBODY)
    if readers is None:
        readers = layout.readers(0.0, torch.Generator()) if extended else nobody
    members = groups(layout, layout.isolated() if isolated else nobody, readers)
    query, key, value = (states[None, :, None] for states in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    attend_in_groups(out, query, key, value, query.shape[1] - 1, members, ref_bias)
    return out[0, -1, 0]


def toy_values():
    tokens = torch.arange(16, dtype=torch.float64)
    value = torch.stack([100 + tokens, 200 + tokens, tokens])[..., None]
    return torch.zeros_like(value), torch.zeros_like(value), value


# -- worked examples ---------------------------------------------------------------------------------------------------


def test_portraits_move_as_in_the_worked_example():
    canvas = torch.full((2, 16), -1)
    for subject in range(2):
        canvas[subject, TOY.places[subject]] = 100 * (subject + 1) + TOY.sources[subject]
    first = [105, 105, 106, -1, -1, -1, 110, -1] + [-1] * 8
    second = [-1] * 4 + [-1, -1, 200, 202] * 2 + [-1, -1, 204, 206]
    assert canvas.tolist() == [first, second]


def test_visible_pairs_are_counted_as_in_the_worked_example():
    seen = visible(TOY)
    blocks = seen.unflatten(1, (3, 16)).sum((0, 2))
    assert blocks.tolist() == [24, 30, 196]
    assert [seen[rows].sum(1).unique().tolist() for rows in SUBJECT] == [[15], [16], [16]]
    assert 256 - int(blocks[2]) == 2 * 6 * 5


@pytest.mark.parametrize(
    ("extended", "means"), [(True, (32.6, 82.25, 7.5)), (False, (5.727273, 10.2, 7.5))], ids=["extended", "isolated"]
)
@pytest.mark.parametrize("attention", [by_definition, in_groups])
def test_equal_logits_give_the_mean_of_what_is_visible(attention, extended, means):
    out = attention(TOY, *toy_values(), extended=extended)[:, 0]
    for rows, mean in zip(SUBJECT, means, strict=True):
        torch.testing.assert_close(out[rows], torch.full_like(out[rows], mean), atol=1e-6, rtol=0)


def test_dropped_queries_see_no_portrait_as_in_the_worked_example():
    readers = torch.full((16,), NOBODY)
    readers[[0, 5]] = 0
    readers[SUBJECT[1]] = 1
    out = in_groups(TOY, *toy_values(), readers=readers)[:, 0]
    expected = torch.full((16,), 7.5, dtype=torch.float64)
    expected[SUBJECT[0]], expected[SUBJECT[1]] = 5.7272727, 82.25
    expected[[0, 5]] = 32.6
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", [by_definition, in_groups])
def test_numbers_of_the_worked_example_with_real_logits(attention):
    n, c = torch.arange(16, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)

    def wave(*phases):
        return torch.stack([torch.sin(0.7 * (4 * n + c) + phase) for phase in phases])

    out = attention(TOY, wave(0.1, 0.1, 0.1), wave(0.2, 0.3, 0.4), wave(0.5, 0.6, 0.7))
    expected = {
        0: [0.180356, 0.373440, 0.390889, 0.224497],
        3: [0.213276, -0.073141, -0.325158, -0.424249],
        15: [-0.421219, -0.228410, 0.071824, 0.338278],
    }
    for row, values in expected.items():
        torch.testing.assert_close(out[row], torch.tensor(values, dtype=torch.float64), atol=1e-6, rtol=0)
    assert abs(float(out.sum()) - 1.556789) < 1e-6


def test_the_smaller_subject_keeps_a_contested_token():
    a, b, c = grid("1111|1111|1111|0000"), grid("0000|0110|0110|0000"), grid("0000|0000|0011|0011")
    expected = torch.stack([grid("1111|1001|1000|0000"), b, grid("0000|0000|0001|0011")])
    assert torch.equal(disjoint(torch.stack([a, b, c])), expected)


def test_the_second_of_two_equal_masks_is_left_empty():
    first, second = disjoint(torch.stack([M[0], M[0]]))
    assert torch.equal(first, M[0])
    assert not second.any()


def test_tokens_need_more_than_half_their_area():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:6, 2:5] = True
    assert torch.equal(stack_tokens([mask], (4, 4))[0], grid("0000|0100|0100|0000"))


def test_a_subject_smaller_than_half_a_token_is_one_token():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[33:36, 50:52] = True
    tokens = stack_tokens([mask], (4, 4))[0]
    assert tokens.nonzero().tolist() == [[2, 3]]


# -- invariants --------------------------------------------------------------------------------------------------------


def random_layout(subjects, rows, columns, settings=PLAIN):
    """Random masks that overlap and are ragged; some are empty."""
    share = torch.rand(2, subjects, 1, 1)
    references, targets = torch.rand(2, subjects, rows, columns) < share * 0.7
    targets[torch.rand(subjects) < 0.2] = False
    return Layout.of(references, targets, settings)


@pytest.mark.parametrize(
    ("subjects", "rows", "columns"), [(1, 5, 7), (2, 4, 4), (3, 3, 9), (4, 7, 5)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "not isolated"])
@pytest.mark.parametrize("extended", [True, False], ids=["extended", "not extended"])
@pytest.mark.parametrize("ref_bias", [0.0, -1.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_groups_give_what_the_masked_definition_gives(
    subjects, rows, columns, isolated, extended, ref_bias, dtype, tolerance, seed
):
    generator = torch.Generator().manual_seed(seed)
    for settings in (PLAIN, IRSettings(reposition=False), IRSettings(keep_aspect=True)):
        layout = random_layout(subjects, rows, columns, settings)
        query, key, value = torch.randn(3, subjects + 1, rows * columns, 6, dtype=torch.float64)
        readers = layout.readers(0.5, generator) if extended else torch.full((rows * columns,), NOBODY)
        drawn = torch.stack([readers == number for number in range(subjects)])
        rules = {"isolated": isolated, "ref_bias": ref_bias}
        expected = by_definition(layout, query, key, value, drawn=drawn, **rules)
        states = (states.to(dtype) for states in (query, key, value))
        out = in_groups(layout, *states, readers=readers, **rules)
        torch.testing.assert_close(out, expected.to(dtype), atol=tolerance, rtol=tolerance)


def test_isolation_changes_nothing_for_a_single_subject(seed):
    layout = random_layout(1, 6, 5)
    assert groups(layout, layout.isolated(), torch.full((30,), NOBODY)) == []


def test_blocked_pairs_are_twice_the_product_of_sizes_over_pairs_of_subjects(seed):
    layout = random_layout(4, 7, 6)
    sizes = layout.targets.flatten(1).sum(1).tolist()
    blocked = (~visible(layout)[:, -42:]).sum()
    assert int(blocked) == sum(a * b for a, b in itertools.permutations(sizes, 2))


def test_reposition_onto_itself_is_the_identity(seed):
    mask = torch.rand(9, 7) < 0.4
    places, sources = reposition(mask, mask)
    assert torch.equal(places, sources)
    assert torch.equal(places, mask.flatten().nonzero()[:, 0])


def test_reposition_commutes_with_a_linear_map(seed):
    features, weight = torch.randn(20, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    places, sources = reposition(torch.rand(4, 5) < 0.6, grid("00000|01110|01110|00000"))
    canvas = torch.zeros(20, 6, dtype=torch.float64)
    canvas[places] = features[sources]
    torch.testing.assert_close((canvas @ weight)[places], (features @ weight)[sources])


@pytest.mark.parametrize(("length", "target"), [(2, 82), (1, 9), (7, 3), (128, 127), (5, 1)])
def test_reposition_reads_the_nearest_in_exact_integers(length, target):
    reference, wanted = torch.ones(1, length, dtype=torch.bool), torch.ones(1, target, dtype=torch.bool)
    width = max(length, target)
    padded = [torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in (reference, wanted)]
    _, sources = reposition(*padded)
    assert sources.tolist() == [column * length // target for column in range(target)]


def test_a_ragged_subject_that_shrinks_can_lose_all_its_keys():
    layout = Layout.of(grid("0101|1000|0000|0000")[None], grid("0000|0000|0001|0000")[None], PLAIN)
    assert len(layout.sources[0]) == 0
    query, key, value = torch.randn(3, 2, 16, 4, dtype=torch.float64)
    plain = torch.nn.functional.scaled_dot_product_attention(query[1:], key[1:], value[1:])[0]
    torch.testing.assert_close(in_groups(layout, query, key, value), plain)


def test_keeping_the_aspect_ratio_letterboxes_in_the_target_box():
    reference, target = torch.zeros(2, 8, 8, dtype=torch.bool)
    reference[0:2, 0:4] = True
    target[0:8, 0:8] = True
    places, _ = reposition(reference, target, keep_aspect=True)
    canvas = torch.zeros(64, dtype=torch.bool)
    canvas[places] = True
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6] = True
    assert torch.equal(canvas.view(8, 8), expected)


def test_nothing_leaks_between_subjects(seed):
    layout = random_layout(3, 5, 6)
    owners = layout.targets.flatten(1)
    query, key, value = torch.randn(3, 4, 30, 4, dtype=torch.float64)
    before = in_groups(layout, query, key, value)
    for other in range(3):
        for changed in (key, value):
            changed_before = changed.clone()
            changed[other] = torch.randn(30, 4)
            changed[-1, owners[other]] = torch.randn(int(owners[other].sum()), 4, dtype=torch.float64)
            after = in_groups(layout, query, key, value)
            for subject in {0, 1, 2} - {other}:
                assert torch.equal(before[owners[subject]], after[owners[subject]])
            changed.copy_(changed_before)


def test_the_background_and_other_tokens_see_no_portrait_and_no_portrait_background(seed):
    layout = random_layout(2, 5, 6)
    query, key, value = torch.randn(3, 3, 30, 4, dtype=torch.float64)
    before = in_groups(layout, query, key, value)
    for subject, sources in enumerate(layout.sources):
        unseen = torch.ones(30, dtype=torch.bool)
        unseen[sources] = False
        key[subject, unseen], value[subject, unseen] = torch.nan, torch.nan
    assert torch.equal(before, in_groups(layout, query, key, value))
    key[:2], value[:2] = torch.nan, torch.nan
    background = ~layout.targets.any(0).flatten()
    assert torch.equal(before[background], in_groups(layout, query, key, value)[background])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_token_sees_itself_so_nothing_is_nan(dtype, seed):
    for subjects in (1, 2, 4):
        layout = random_layout(subjects, 4, 5)
        assert visible(layout)[:, -20:].diagonal().all()
        query, key, value = 30 * torch.randn(3, subjects + 1, 20, 8)
        out = in_groups(layout, query.to(dtype), key.to(dtype), value.to(dtype), ref_bias=2.0)
        assert out.isfinite().all()


def test_the_order_of_subjects_does_not_matter(seed):
    references, targets = torch.rand(2, 3, 5, 6) < torch.tensor([0.2, 0.4, 0.8])[:, None, None]
    query, key, value = torch.randn(3, 4, 30, 4, dtype=torch.float64)
    if len(targets.flatten(1).sum(1).unique()) < 3:
        targets = stack_tokens([torch.ones(5, 6) * (torch.arange(6) < n) > 0 for n in (1, 3, 5)], (5, 6))
    order = torch.tensor([2, 0, 1])
    one = in_groups(Layout.of(references, targets, PLAIN), query, key, value)
    rows = torch.cat([order, torch.tensor([3])])
    other = in_groups(
        Layout.of(references[order], targets[order], PLAIN), *(states[rows] for states in (query, key, value))
    )
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_guidance_halves_are_computed_as_if_alone(seed):
    layout = random_layout(2, 5, 6)
    members = groups(layout, layout.isolated(), layout.readers(0.5, torch.Generator().manual_seed(seed)))
    query, key, value = torch.randn(3, 2, 3, 2, 30, 4, dtype=torch.float64)
    out = torch.zeros_like(query)
    attend_in_groups(out, query, key, value, 2, members)
    for half in range(2):
        alone = torch.zeros_like(query[:1])
        attend_in_groups(alone, *(states[half : half + 1] for states in (query, key, value)), 2, members)
        torch.testing.assert_close(out[half], alone[0])


def test_a_mask_over_the_whole_picture_leaves_no_background():
    layout = Layout.of(R[:1], torch.ones(1, 4, 4, dtype=torch.bool), PLAIN)
    [group] = groups(layout, layout.isolated(), layout.readers(0.0, torch.Generator()))
    assert group.keys is None
    assert len(group.queries) == 16


def test_dropout_keeps_a_part_of_the_mask_and_never_none(seed):
    mask = torch.rand(200) < 0.5
    draws = [drop_queries(mask, 0.5, torch.Generator().manual_seed(seed + number % 4)) for number in range(8)]
    for draw in draws:
        assert not (draw & ~mask).any()
        assert draw.any()
    assert torch.equal(draws[0], draws[4])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(drop_queries(mask, 0.0, torch.Generator()), mask)
    single = torch.arange(200) == 7
    assert all(torch.equal(drop_queries(single, 0.99, torch.Generator().manual_seed(n)), single) for n in range(9))


def test_dropout_keeps_the_asked_share(seed):
    mask = torch.ones(40000, dtype=torch.bool)
    kept = drop_queries(mask, 0.3, torch.Generator().manual_seed(seed)).float().mean()
    assert abs(float(kept) - 0.7) < 0.02


def test_tokens_on_the_border_of_two_subjects_can_be_exempt():
    targets = torch.stack([grid("110000|110000"), grid("001100|001100")])
    layout = Layout.of(targets, targets, PLAIN)
    assert layout.isolated().view(2, 6)[0].tolist() == [0, 0, 1, 1, NOBODY, NOBODY]
    assert layout.isolated(exempt_border=True).view(2, 6)[0].tolist() == [0, NOBODY, NOBODY, 1, NOBODY, NOBODY]


# -- pixel masks -------------------------------------------------------------------------------------------------------


def box(height, width, top, bottom, left, right):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_small_masks_grow_to_a_third_of_the_short_side():
    small, thin, large = box(90, 120, 40, 50, 60, 70), box(90, 120, 0, 80, 0, 20), box(90, 120, 10, 70, 70, 120)
    grown = grow_small(torch.stack([small, thin, large]))
    assert torch.equal(grown[1], box(90, 120, 0, 80, 0, 25))  # clipped at the edge
    assert torch.equal(grown[2], large)
    assert torch.equal(grown[0], box(90, 120, 30, 60, 50, 80) & ~large)


def test_the_bottom_of_a_portrait_mask_can_be_cut():
    mask = torch.ones(12, 3, dtype=torch.bool)
    assert crop_bottom(mask, 1 / 6).sum(1).tolist() == [3] * 10 + [0, 0]
    assert torch.equal(crop_bottom(mask, 0.0), mask)


# -- subjects by word --------------------------------------------------------------------------------------------------


def otsu_by_definition(values):
    """Every cut tried, on the bins' centres."""
    low, high = min(values), max(values)
    bins = [min(int((value - low) / (high - low) * 256), 255) for value in values]
    best, cut = -1.0, 0
    for k in range(255):
        lower, upper = [b for b in bins if b <= k], [b for b in bins if b > k]
        if not lower or not upper:
            continue
        means = [sum((b + 0.5) / 256 for b in part) / len(part) for part in (lower, upper)]
        between = len(lower) * len(upper) / len(bins) ** 2 * (means[0] - means[1]) ** 2
        if between > best + 1e-12:
            best, cut = between, k
    return [b > cut for b in bins]


@pytest.mark.parametrize("count", [2, 5, 16, 300])
def test_otsu_is_the_standard_cut(count, seed):
    values = torch.randn(count, dtype=torch.float64) + 3 * (torch.rand(count) < 0.4)
    assert otsu(values).tolist() == otsu_by_definition(values.tolist())


def test_otsu_parts_two_levels_and_finds_nothing_in_a_constant():
    assert otsu(torch.tensor([0.1, 0.9, 0.1, 0.8])).tolist() == [False, True, False, True]
    assert not otsu(torch.full((9,), 0.3)).any()


def test_spreading_equals_explicit_matrix_powers(seed):
    query, key = torch.randn(2, 3, 12, 5, dtype=torch.float64)
    columns = torch.rand(12, 2, dtype=torch.float64)
    matrix = (query @ key.mT * 5**-0.5).softmax(-1).mean(0)
    powers = [torch.linalg.matrix_power(matrix, n) for n in (1, 2, 3, 4)]
    for power in powers:
        torch.testing.assert_close(power.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(spread(query, key, columns), sum(powers) @ columns / 4)


def test_the_published_example_of_spreading():
    # One head whose attention is [[.5, .5], [.2, .8]].
    logits = torch.tensor([[[0.5, 0.5], [0.2, 0.8]]], dtype=torch.float64).log()
    result = spread(logits * 2**0.5, torch.eye(2, dtype=torch.float64)[None], torch.tensor([[0.7], [0.1]]).double())
    torch.testing.assert_close(result[:, 0], torch.tensor([0.3170, 0.2532]).double(), atol=5e-5, rtol=0)


def test_word_maps_are_averaged_over_layers_and_resolutions(seed):
    words = WordMaps({1: {0: (2, 3)}})
    expected = torch.zeros(1, 2, 4, 4)
    for rows in (4, 2, 4):
        attention = torch.randn(2, 2, 3, rows * rows, 5)  # query and key of two images with three heads
        text = torch.randn(2, 3, 9, 5)
        words.watch_self(*attention)
        words.watch_cross(attention[0], text, (rows, rows))
        columns = word_columns(attention[0, 1], text[1], (2, 3))
        maps = spread(attention[0, 1], attention[1, 1], columns).T.reshape(1, 2, rows, rows)
        expected += torch.nn.functional.interpolate(maps, (4, 4), mode="bilinear") / 3
    masks = words.masks([(4, 4)])
    assert list(masks) == [(1, 0)]
    assert torch.equal(masks[1, 0][4, 4], otsu(expected[0].amax(0)))
    assert words.masks([(4, 4)]) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"lam": 1.5},
        {"lam": True},
        {"query_dropout": 1.0},
        {"ref_bottom_crop": -0.1},
        {"ref_bias": float("nan")},
        {"extended_steps": (0.5,)},
        {"isolation_steps": (0.0, 2.0)},
        {"isolation_layers": "up_blocks"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        IRSettings(**wrong)
