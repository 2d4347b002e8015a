"""The block masks of Radial Attention: against published masks, and against the definition on random geometries."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnproc import kernels
from attnproc.errors import SettingsError
from attnproc.sparse.radial import half_width, radial_blocks

WAN, HUNYUAN = 1, 0  # sink frames of the two released variants
property_test = settings(max_examples=80, deadline=None)


# -- the definition, token by token ----------------------------------------------------------------------------------


def token_mask(frames, s, block, decay, sink, adjacent=1.0, limit=128):
    """bool (V, V): the rule as it is written, one pair of frames at a time."""
    position = np.arange(s)
    distance = abs(position[:, None] - position)
    mask = np.zeros((frames, s, frames, s), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            length = Fraction(2 ** s.bit_length(), 2 ** d.bit_length())
            kept = length >= limit or d % int(limit / length) == 0
            half = [s, adjacent * s, max(block, length * Fraction(decay))][min(d, 2)]
            mask[i, :, j] = kept and distance <= int(half)
            if j < sink:
                mask[i, :, j] = True
    return mask.reshape(frames * s, frames * s)


def strict_shrink(tokens, rows):
    """Whether to keep a block, from its part of the token mask (queries, keys), rated against `rows` queries."""
    queries = tokens.sum(0)
    dense, touched = int((3 * queries > rows).sum()), int((queries > 0).sum())
    return 5 * dense > 3 * touched


def reference_definition(frames, s, block, *rule):
    """Every pair of frames on a canvas of its own, shrunk block by block, then joined."""
    tokens = token_mask(frames, s, block, *rule).reshape(frames, s, frames, s)
    total, side = frames * s // block, -(-s // block)
    blocks = np.zeros((total, total), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            row, column = i * s % block, j * s % block
            canvas = np.zeros((row + s + block, column + s + block), dtype=bool)
            canvas[row : row + s, column : column + s] = tokens[i, :, j]
            for r in range(side):
                for c in range(side):
                    part = canvas[r * block : (r + 1) * block, c * block : (c + 1) * block]
                    if strict_shrink(part, block):
                        blocks[i * s // block + r, j * s // block + c] = True
    return blocks


def global_definition(frames, s, block, *rule):
    """The whole token mask shrunk block by block, tails counted by the tokens they have."""
    tokens = token_mask(frames, s, block, *rule)
    starts = range(0, frames * s, block)
    blocks = np.zeros((len(starts), len(starts)), dtype=bool)
    for r, row in enumerate(starts):
        for c, column in enumerate(starts):
            part = tokens[row : row + block, column : column + block]
            blocks[r, c] = r == c or strict_shrink(part, len(part))
    return blocks


def closed_form(frames, s, block, decay, sink):
    """For frames in whole blocks: blocks within K of the diagonal of each kept pair of frames."""
    slack = max(u for u in range(block) if 5 * (block - block // 3 - u) > 3 * (block - u))
    n = s // block
    index = np.arange(n)
    blocks = np.zeros((frames, n, frames, n), dtype=bool)
    for i in range(frames):
        for j in range(frames):
            half = s if j < sink else half_width(abs(i - j), s, block, decay)
            if half is not None:
                blocks[i, :, j] = abs(index[:, None] - index) <= (half + slack) // block
    return blocks.reshape(frames * n, frames * n)


def blocks_of(frames, s, block, decay, sink, adjacent=1.0, limit=128, text=0, alignment="global"):
    return radial_blocks(
        frames,
        s,
        text,
        block_size=block,
        decay_factor=decay,
        alignment=alignment,
        sink_frames=sink,
        adjacent_half_width=adjacent,
        band_limit=limit,
    ).numpy()


blocks_st = st.sampled_from([1, 3, 6, 12, 16, 24, 32, 48, 64])  # multiples of 3 hit "more than a third" exactly
decays = st.one_of(st.sampled_from([0.01, 0.2, 0.5, 0.8, 0.95, 1.0, 2.0]), st.floats(0.01, 5.0))
rules = st.tuples(decays, st.integers(0, 2), st.sampled_from([1.0, 0.5, 0.3]), st.sampled_from([4, 16, 50, 128]))


@property_test
@given(frames=st.integers(1, 9), s=st.integers(1, 150), block=blocks_st, rule=rules)
def test_global_is_its_definition_for_any_size(frames, s, block, rule):
    block = max(block, frames * s // 100)  # the definition is slow with thousands of blocks
    np.testing.assert_array_equal(blocks_of(frames, s, block, *rule), global_definition(frames, s, block, *rule))


@st.composite
def whole_blocks(draw):
    """Frames, tokens per frame and block with V in whole blocks, though a frame need not be."""
    block, share = draw(st.sampled_from([16, 24, 32, 64])), draw(st.sampled_from([1, 2, 4, 8]))
    per_frame = draw(st.integers(1, 10)) * block // share
    most = max(1, 1500 // (share * per_frame))
    return draw(st.integers(1, min(most, 12 // min(share, 4)))) * share, per_frame, block


@property_test
@given(geometry=whole_blocks(), rule=rules)
def test_reference_is_its_definition_where_frames_straddle(geometry, rule):
    np.testing.assert_array_equal(
        blocks_of(*geometry, *rule, alignment="reference"), reference_definition(*geometry, *rule)
    )


@property_test
@given(
    frames=st.integers(1, 30),
    n=st.integers(1, 12),
    block=st.sampled_from([16, 32, 64, 128, 256]),
    decay=decays,
    sink=st.integers(0, 2),
)
def test_frames_of_whole_blocks_have_a_closed_form(frames, n, block, decay, sink):
    expected = closed_form(frames, n * block, block, decay, sink)
    for alignment in ("global", "reference"):
        found = blocks_of(frames, n * block, block, decay, sink, alignment=alignment)
        np.testing.assert_array_equal(found, expected)


# -- published masks -------------------------------------------------------------------------------------------------

# frames, tokens per frame, block, decay, sink, text -> kept blocks, sha256, row counts (first, middle, last four)
PUBLISHED = {
    "P1": (
        (5, 512, 128, 1.0, WAN, 0),
        378,
        "3e4f0c1caf269c1a5ca64eba9e004ae3e6486b5e72ccf25797502ce571e16d94",
        "16 19 19 16 18 20 20 18 19 20 20 19 19 20 20 19 18 20 20 18",
    ),
    "P2": (
        (17, 256, 128, 0.5, WAN, 0),
        772,
        "3983950fea9c3c752627a378e5f19d84318f03ce88d19aee57e0b41529a7c885",
        "18 18 18 18 20 20 22 22 24 24 24 24 24 24 26 26 26 26 26 26 26 26 24 24 24 24 24 24 22 22 20 20 18 18",
    ),
    "P3": (
        (18, 3840, 128, 0.2, WAN, 0),
        83728,
        "d3be0934422c67f5d79f7e190dfe8550ca1a2f0b42f07ba9381560b611d54926",
        "92 108 108 108 | 148 162 162 162 | 135 135 135 120",
    ),
    "P4": (
        (20, 3840, 64, 0.8, WAN, 0),
        502720,
        "cf6dbca5c7a9c4cbb15943a97c8a47eca13b3696c7e195374ea3fb4ab3d1def5",
        "214 232 246 260 | 364 380 396 412 | 317 303 289 272",
    ),
    "P5": (
        (30, 3840, 128, 0.95, HUNYUAN, 256),
        226056,
        "fbec622ebb2c6d40de8c395bdd12e74802f7d19c47d49cd324a93fcb39fdd9ff",
        "146 174 188 194 | 201 228 255 267 | 194 188 174 146",
    ),
    "P6": (
        (32, 3600, 128, 0.95, HUNYUAN, 256),
        226588,
        "b46e63b11793a4e116048bae63b6b134b80e731ae660bcc28d660b118f41a196",
        "154 172 179 185 | 213 242 256 268 | 185 179 172 154",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mask(name):
    (frames, s, block, decay, sink, text), kept, sha256, counts = PUBLISHED[name]
    mask = blocks_of(frames, s, block, decay, sink, text=text, alignment="reference")
    assert mask.sum() == kept
    assert hashlib.sha256(mask.astype(np.uint8).tobytes()).hexdigest() == sha256
    video = frames * s // block
    rows = mask.sum(1)
    groups = [" ".join(map(str, rows[start : start + 4])) for start in (0, video // 2, video - 4)]
    assert counts in (" | ".join(groups), " ".join(map(str, rows)))
    assert (rows[video:] == len(mask)).all()


def test_global_drops_blocks_that_reference_keeps_by_halves():
    """P6 has frames of 28 blocks and an eighth: only there do the two alignments differ."""
    rule = (32, 3600, 128, 0.95, HUNYUAN)
    reference, ours = blocks_of(*rule, alignment="reference"), blocks_of(*rule)
    assert reference.sum() - ours.sum() == 270
    assert not (ours & ~reference).any()
    assert f"{ours.mean():.6f}" == "0.274956"


P1_PICTURE = """
###########.###.##..  ###################.  ################.###  ########.###.###..##
###############.###.  ####################  ####################  ############.###.###
###################.  ####################  ####################  ################.###
#######.############  ####################  ####################  ####.###############
#######.###.########  ####################  ####################  ####.###.###########
"""
P2_PICTURE = """
#####.#.#...#...#  ######.#.#...#...  #######.#.#...#..  ########.#.#...#.  #########.#.#...#  ##########.#.#...
#.#########.#.#..  ##.#########.#.#.  #.#.#########.#.#  ##.#.#########.#.  #.#.#.#########.#  #..#.#.#########.
#...#.#.#########  ##...#.#.########  #.#...#.#.#######  #..#...#.#.######  #...#...#.#.#####
"""


def picture_of(mask):
    return ["".join("#" if kept else "." for kept in row) for row in mask]


def test_published_pictures():
    assert picture_of(blocks_of(5, 512, 128, 1.0, WAN)) == P1_PICTURE.split()
    mask = blocks_of(17, 256, 128, 0.5, WAN)
    assert picture_of(mask[::2, ::2]) == P2_PICTURE.split()
    np.testing.assert_array_equal(mask, mask[::2, ::2].repeat(2, 0).repeat(2, 1))  # only whole frames come and go


# frames, tokens per frame, block, sink, alignment -> {decay: density as published}
DENSITIES = [
    (
        18,
        3840,
        128,
        WAN,
        "reference",
        {0.1: 0.2871, 0.2: 0.2871, 0.3: 0.2987, 0.5: 0.3389, 0.8: 0.3768, 1.0: 0.4309, 2.0: 0.5861},
    ),
    (20, 3840, 64, WAN, "reference", {0.2: 0.2409, 0.8: 0.3491, 1.0: 0.3939}),
    (30, 3840, 128, HUNYUAN, "reference", {0.5: 0.2215, 0.95: 0.2746, 1.0: 0.2932}),
    (32, 3600, 128, HUNYUAN, "reference", {0.5: 0.2046, 0.95: 0.2753, 1.0: 0.2795}),
    (32, 3600, 128, WAN, "reference", {0.95: 0.3009, 1.0: 0.3050}),
    (64, 3600, 128, HUNYUAN, "reference", {0.95: 0.1750, 1.0: 0.1776}),
    (64, 3600, 128, WAN, "reference", {1.0: 0.1917}),
    (128, 3600, 128, HUNYUAN, "reference", {0.95: 0.1074, 1.0: 0.1088}),
    (128, 3600, 128, WAN, "reference", {1.0: 0.1163}),
    (21, 3600, 128, WAN, "global", {0.2: 0.2615, 0.8: 0.3584, 1.0: 0.3957}),
    (21, 1560, 128, WAN, "global", {0.2: 0.3368, 1.0: 0.4429}),
    (21, 1560, 64, WAN, "global", {0.2: 0.2682, 1.0: 0.4252}),
    (41, 3600, 128, WAN, "global", {0.2: 0.1755, 1.0: 0.2594}),
    (31, 880, 128, WAN, "global", {1.0: 0.3365}),
    (31, 880, 64, WAN, "global", {0.2: 0.2221, 1.0: 0.2922}),
    (33, 3600, 128, HUNYUAN, "global", {0.95: 0.2696, 1.0: 0.2738}),
    (33, 2040, 128, HUNYUAN, "global", {0.95: 0.2568, 1.0: 0.2597}),
    (13, 1350, 128, WAN, "global", {0.5: 0.4862, 1.0: 0.6069}),
    (11, 4080, 128, WAN, "global", {0.5: 0.4449, 1.0: 0.5418}),
    (28, 1590, 128, WAN, "global", {1.0: 0.3689}),
    (56, 1590, 128, WAN, "global", {1.0: 0.2351}),
    (112, 1590, 128, WAN, "global", {1.0: 0.1436}),
]


@pytest.mark.parametrize(("frames", "s", "block", "sink", "alignment", "expected"), DENSITIES)
def test_published_densities(frames, s, block, sink, alignment, expected):
    found = {d: blocks_of(frames, s, block, d, sink, alignment=alignment).mean() for d in expected}
    assert found == pytest.approx(expected, abs=5.1e-5)


def test_wan_rule_of_before_november_2025():
    found = {d: blocks_of(18, 3840, 128, d, WAN, 0.5, alignment="reference").mean() for d in (0.1, 0.2, 1.0)}
    assert found == pytest.approx({0.1: 0.2634, 0.2: 0.2634, 1.0: 0.4072}, abs=5.1e-5)
    assert 1 - found[0.2] == pytest.approx(0.7366324, abs=5e-8)


def test_density_grows_like_the_logarithm_of_the_frames():
    frames = (8, 16, 32, 64, 128)
    cost = [f * blocks_of(f, 3840, 128, 1.0, WAN).mean() for f in frames]
    assert cost == pytest.approx([5.272, 7.361, 9.827, 12.649, 15.637], abs=5e-4)
    assert all(c <= 4 * (1 + np.log2(f)) for c, f in zip(cost, frames, strict=True))


def test_published_attention_values():
    """Rows and log-sum-exp of attention under the P1 mask, float64."""
    n, c = torch.arange(2560.0, dtype=torch.float64)[:, None], torch.arange(16.0, dtype=torch.float64)
    q, k = torch.sin(0.01 * (n + 1) + 0.7 * c), torch.cos(0.013 * (n + 2) - 0.5 * c)
    v = torch.sin(0.02 * n + 0.3 * c)
    mask = kernels.BlockMask.from_blocks(torch.from_numpy(blocks_of(5, 512, 128, 1.0, WAN)), 2560, 2560, (128, 128))
    expected = {
        0: (0.11859712, 0.14300282, 0.1546345, 7.80681176),
        700: (0.03670668, 0.02834847, 0.01745798, 8.21138026),
        1500: (0.04665093, 0.05830107, 0.06474336, 8.10152164),
        2559: (0.04671721, 0.04232727, 0.03415636, 8.15354424),
    }
    for backend, tolerance in (("oracle", 1e-8), ("cpu", 1e-6)):
        q4, k4, v4 = (x[None, None] for x in (q, k, v))
        out, lse = kernels.block_sparse_attention(q4, k4, v4, mask, scale=0.25, return_lse=True, backend=backend)
        for row, values in expected.items():
            found = (*out[0, 0, row, :3].tolist(), float(lse[0, 0, row]))
            assert found[:3] == pytest.approx(values[:3], abs=tolerance)
            assert found[3] == pytest.approx(values[3], abs=1e-6)  # LSE is float32
        assert float(out.sum()) == pytest.approx(-16.42403920549384, abs=1e3 * tolerance)


# -- what holds for every mask ---------------------------------------------------------------------------------------


@property_test
@given(f=st.integers(2, 24), n=st.integers(1, 10), block=st.sampled_from([32, 64, 128]), decay=decays)
def test_masks_of_whole_blocks(f, n, block, decay):
    s = n * block
    wan, hunyuan = blocks_of(f, s, block, decay, WAN), blocks_of(f, s, block, decay, HUNYUAN)
    for mask in (wan, hunyuan):
        assert mask.diagonal().all()
        if s >= 128:
            frame = np.arange(f * n) // n
            assert mask[abs(frame[:, None] - frame) <= 1].all()
    assert wan[:, :n].all()
    assert (hunyuan == hunyuan.T).all()
    assert (wan[n:, n:] == wan[n:, n:].T).all()
    assert blocks_of(f + 1, s, block, decay, WAN).sum() >= wan.sum()
    assert blocks_of(f, s, block, decay * 1.3, WAN).sum() >= wan.sum()


@property_test
@given(f=st.integers(2, 24), s=st.integers(128, 700), block=st.sampled_from([32, 64, 128]), decay=decays)
def test_masks_of_any_size(f, s, block, decay):
    wan = blocks_of(f, s, block, decay, WAN)
    assert wan.shape == (-(-f * s // block),) * 2
    assert wan.diagonal().all()
    assert wan[:, : s // block].all()
    assert blocks_of(f + 1, s, block, decay, WAN).sum() >= wan.sum()
    start = np.arange(len(wan)) * block
    inside = start // s == np.minimum(start + block - 1, f * s - 1) // s
    near = abs((start // s)[:, None] - start // s) <= 1
    assert wan[near & inside[:, None] & inside].all()


@property_test
@given(f=st.integers(1, 8), s=st.integers(1, 200), text=st.integers(1, 200), decay=decays)
def test_text_tokens_are_never_dropped(f, s, text, decay):
    with_text, video = blocks_of(f, s, 32, decay, WAN, text=text), blocks_of(f, s, 32, decay, WAN)
    first = f * s // 32
    assert with_text.shape == (-(-(f * s + text) // 32),) * 2
    assert with_text[first:].all() and with_text[:, first:].all()
    np.testing.assert_array_equal(with_text[:first, :first], video[:first, :first])


def test_reference_may_lose_what_global_keeps():
    """Known gaps of the released way of making blocks, kept for parity."""
    assert not blocks_of(32, 246, 64, 0.2, HUNYUAN, alignment="reference").diagonal().all()
    assert not blocks_of(32, 151, 32, 0.5, WAN, alignment="reference")[:, : 151 // 32].all()
    assert blocks_of(32, 246, 64, 0.2, HUNYUAN).diagonal().all()
    assert blocks_of(32, 151, 32, 0.5, WAN)[:, : 151 // 32].all()


def test_frames_smaller_than_the_band_limit_lose_their_neighbours():
    np.testing.assert_array_equal(blocks_of(4, 64, 64, 1.0, HUNYUAN), np.eye(4, dtype=bool))
    assert blocks_of(4, 64, 64, 1.0, HUNYUAN, limit=16).all()


def test_decay_does_not_change_which_frames_are_kept():
    kept = [[half_width(d, 3600, 128, decay) is not None for d in range(200)] for decay in (0.01, 0.5, 1.0, 4.0)]
    assert kept[0] == kept[1] == kept[2] == kept[3]
    assert not all(kept[0])


def test_reference_names_the_nearest_legal_sizes():
    with pytest.raises(SettingsError, match=r"V=32760.*B=128.*16 or 32 latent frames.*block_size=8.*'global'"):
        blocks_of(21, 1560, 128, 1.0, WAN, alignment="reference")
    assert blocks_of(16, 1560, 128, 1.0, WAN, alignment="reference").shape == (195, 195)
    assert blocks_of(32, 1560, 128, 1.0, WAN, alignment="reference").shape == (390, 390)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"frames": 0}, "frames"),
        ({"tokens_per_frame": 0}, "tokens_per_frame"),
        ({"text_tokens": -1}, "text_tokens"),
        ({"block_size": 0}, "block_size"),
        ({"frames": 2.5}, "frames"),
        ({"decay_factor": float("nan")}, "decay_factor"),
        ({"alignment": "local"}, "alignment"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(SettingsError, match=named):
        radial_blocks(**{"frames": 4, "tokens_per_frame": 64, "block_size": 16, **arguments})
