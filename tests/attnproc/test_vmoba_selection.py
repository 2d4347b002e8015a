"""VMoBA's chunks and selection: worked examples, and the definition in float64 loops beside the fast code."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from attnproc.errors import SettingsError
from attnproc.kernels.selection import largest
from attnproc.sparse import vmoba_selection
from attnproc.sparse.vmoba_chunks import PUBLISHED_CHUNKS, Blocks, Partition, choose_chunk, count_chunks
from attnproc.sparse.vmoba_selection import (
    chunk_means,
    pair_density,
    select_chunks,
    take_by_histogram,
    take_sorted,
)

# (grid, chunk size): all kinds, whole chunks and ragged ones, one frame, one row, chunks as large as the grid.
CUTS = {
    "1D": ((4, 2, 3), (2,)),
    "1D ragged": ((5, 2, 3), (2,)),
    "2D": ((2, 4, 6), (2, 3)),
    "2D ragged": ((3, 5, 7), (2, 3)),
    "3D": ((4, 4, 6), (2, 2, 3)),
    "3D ragged": ((5, 3, 4), (2, 2, 3)),
    "one row": ((6, 1, 5), (4, 1, 2)),
    "chunks of one token": ((2, 2, 3), (1, 1, 1)),
    "more than 32 chunks": ((5, 3, 3), (1, 1, 1)),
}
WAYS = {
    "topk query_head": {"mode": "topk", "scope": "query_head", "topk": 2},
    "topk head_global": {"mode": "topk", "scope": "head_global", "topk": 2},
    "topk overall": {"mode": "topk", "scope": "overall", "topk": 2},
    "threshold query_head": {"mode": "threshold", "scope": "query_head", "threshold": 0.4},
    "threshold head_global": {"mode": "threshold", "scope": "head_global", "threshold": 0.25},
    "threshold overall": {"mode": "threshold", "scope": "overall", "threshold": 0.25},
    "threshold block": {"mode": "threshold", "scope": "block", "threshold": 0.25},
}


@pytest.fixture
def seed():
    value = int(torch.randint(2**31, ()))
    print(f"seed {value}")
    return value


@pytest.fixture(params=CUTS)
def cut(request):
    return CUTS[request.param]


@pytest.fixture(params=WAYS)
def how(request):
    return WAYS[request.param]


def draw(seed, grid, batch=2, heads=2, channels=8):
    """query, key and value (B, H, S, D), drawn as (B, S, H, D)."""
    random = np.random.RandomState(seed)
    shape = (batch, math.prod(grid), heads, channels)
    return [torch.from_numpy(random.standard_normal(shape).astype(np.float32)).transpose(1, 2) for _ in range(3)]


def chunk_table(grid, spec):
    """The chunk of each token, one token at a time."""
    frames, rows, columns = grid
    table = []
    for t in range(frames):
        for y in range(rows):
            for x in range(columns):
                if len(spec) == 1:
                    table.append(t // spec[0])
                    continue
                ct, ch, cw = (frames, *spec) if len(spec) == 2 else spec
                table.append(((t // ct) * math.ceil(rows / ch) + y // ch) * math.ceil(columns / cw) + x // cw)
    return table


def groups_of(scope, heads, tokens, chunks):
    """Lists of the (head, token, chunk) that compete, each in row-major order."""
    pairs = [(h, i, c) for h in range(heads) for i in range(tokens) for c in range(chunks)]
    name = {
        "query_head": lambda h, i, c: (h, i),
        "head_global": lambda h, i, c: h,
        "overall": lambda h, i, c: 0,
        "block": lambda h, i, c: c,
    }[scope]
    groups = {}
    for pair in pairs:
        groups.setdefault(name(*pair), []).append(pair)
    return groups.values()


def definition(query, key, grid, spec, *, mode, scope, topk=1, threshold=0.0):
    """The selection as the paper and the released code describe it, pair by pair in float64, and its margin.

    The margin is the smallest distance from a tie of any comparison that decided.
    """
    chunk = chunk_table(grid, spec)
    chunks = max(chunk) + 1
    batch, heads, tokens, _ = query.shape
    selected = np.zeros((batch, heads, tokens, chunks), dtype=bool)
    margins = [math.inf]
    for b in range(batch):
        q, k = query[b].double().numpy(), key[b].double().numpy()
        means = np.stack([k[:, np.array(chunk) == c].mean(1) for c in range(chunks)], axis=1)
        score = np.einsum("hid,hcd->hic", q, means)
        for group in groups_of(scope, heads, tokens, chunks):
            own = [pair for pair in group if chunk[pair[1]] == pair[2]]
            others = [pair for pair in group if chunk[pair[1]] != pair[2]]
            if mode == "topk":
                weight = {p: score[p] for p in group}
                count = len(group) * min(topk, chunks) // chunks - len(own)
            else:
                low, high = min(score[p] for p in group), max(score[p] for p in group)
                weight = {p: (score[p] - low) / (high - low) if high - low > 1e-6 else 1.0 for p in group}
            ranked = sorted(others, key=lambda pair: -weight[pair])
            if mode == "threshold" and threshold >= 1.0:
                count = len(others)
            elif mode == "threshold":
                total = sum(weight.values()) + 1e-6
                need = max(0.0, threshold - sum(weight[p] for p in own) / total)
                count, share = 0, 0.0
                for pair in ranked:
                    count += 1
                    share += weight[pair] / total
                    if count < len(ranked):
                        margins.append(abs(share - need) * total / 10)  # sums round more than scores do
                    if share >= need:
                        break
            if 0 < count < len(ranked):
                margins.append(weight[ranked[count - 1]] - weight[ranked[count]])
            for pair in own + ranked[:count]:
                selected[(b, *pair)] = True
    return torch.from_numpy(selected), min(margins)


def draw_and_define(seed, grid, spec, **how):
    """query and key whose selection does not hang on the rounding of float32, and their selection."""
    while True:
        query, key, _ = draw(seed, grid)
        expected, margin = definition(query, key, grid, spec, **how)
        if margin > 1e-5:
            return query, key, expected
        seed += 1


# -- worked examples ---------------------------------------------------------------------------------------------------

EXAMPLES = {
    "E1": {
        "draw": (101, (4, 2, 3), 1, 2, 4),
        "spec": (1,),
        "how": {"mode": "topk", "scope": "query_head", "topk": 2},
        "pairs": 96,
        "density": 0.5,
        "sha": "562d657010f750c522dc65f9afc13f2678ac73ee00fc5221853448352839d157",
        "heads": ["01 02 01 02 03 03", "03 03 01 03 01 03"],
        "out": (0.53144, -0.59608, 0.86812, -0.47944),
    },
    "E2": {
        "draw": (202, (2, 4, 6), 1, 2, 8),
        "spec": (2, 3),
        "how": {"mode": "threshold", "scope": "query_head", "threshold": 0.5},
        "pairs": 209,
        "density": 0.544271,
        "sha": "12e4f827574ba79c939c43e0662da2e2d11dacde6da5bbf2df2b2a9e012b23af",
        "heads": ["02 01 02 12 12 12", "02 02 02 13 13 01"],
        "out": (-0.03352, -0.28787, -0.18920, -0.14186),
    },
    "E3": {
        "draw": (303, (4, 4, 6), 1, 2, 8),
        "spec": (2, 2, 3),
        "how": {"mode": "threshold", "scope": "head_global", "threshold": 0.25},
        "pairs": 319,
        "density": 0.207682,
        "sha": "838d6c59c73b5ab0f4563df878ecbc31a3d3b44ce287b702ce06e6e789a2bba3",
        "heads": ["0 0 0 1 1 157 0 0 0 15", "013 0123 0 01 15 1 0 02 0 1236"],
        "out": (-0.90545, 0.50997, 0.43834, 0.85849),
    },
    "E4": {
        "draw": (404, (5, 2, 3), 2, 3, 16),
        "spec": (2,),
        "how": {"mode": "topk", "scope": "head_global", "topk": 2},
        "pairs": 360,
        "density": 0.685556,
        "sha": "1790f1222b041b3447417329b276932cedb5edb4d00f816de718fe933a333fdf",
        "heads": ["02 02 02 0 01 012"],
        "out": (-0.13067, 0.22432, 0.25712, -0.09299),
    },
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_examples_select_as_the_released_code(name):
    example = EXAMPLES[name]
    grid = example["draw"][1]
    query, key, value = draw(*example["draw"])
    partition = Partition.of(grid, example["spec"])
    mask = select_chunks(query, key, partition, **example["how"])
    assert int(mask.sum()) == example["pairs"]
    assert pair_density(mask, partition) == pytest.approx(example["density"], abs=5e-7)
    for head, queries in enumerate(example["heads"]):
        for token, expected in enumerate(queries.split()):
            assert "".join(str(c) for c in mask[0, head, token].nonzero().flatten().tolist()) == expected
    if name == "E3":
        assert mask[0, 0].sum(-1).bincount().tolist() == [0, 57, 23, 15, 0, 1]
    packed = np.packbits(mask.numpy().reshape(-1), bitorder="big")
    assert hashlib.sha256(packed.tobytes()).hexdigest() == example["sha"]
    seen = mask[..., partition.chunk]
    weights = (query.double() @ key.double().mT / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights @ value.double())[0, 0, 0, :4]
    torch.testing.assert_close(out, torch.tensor(example["out"], dtype=torch.float64), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("query", "threshold", "chunks"), [(1.0, 0.25, [0, 2]), (1.0, 0.8, [0, 1, 2]), (-1.0, 0.25, [0, 1])]
)
def test_the_hand_example(query, threshold, chunks):
    key = torch.tensor([1.0, 1.0, 2.0, 2.0, 4.0, 4.0]).view(1, 1, 6, 1)
    mask = select_chunks(
        torch.full_like(key, query),
        key,
        Partition.of((3, 1, 2), (1,)),
        mode="threshold",
        scope="query_head",
        threshold=threshold,
    )
    assert mask[0, 0, 0].nonzero().flatten().tolist() == chunks


def test_gate_and_top_k_of_moba():
    """MoBA is causal: chunks of the future are out. The chunk means and the ranking are the same."""
    random = np.random.RandomState(21)
    query, key, value = (
        torch.from_numpy(random.standard_normal((14, 2, 4)).astype(np.float32)).transpose(0, 1) for _ in range(3)
    )
    partition = Partition.of((14, 1, 1), (4,))
    gate = query @ chunk_means(key, partition).mT
    own, chunks = partition.chunk[:, None], torch.arange(4)
    gate = gate.masked_fill(chunks > own, -torch.inf).masked_fill(chunks == own, torch.inf)
    mask = largest(gate, count=2)
    read = [[mask[head, token].nonzero().flatten().tolist() for token in (9, 11, 13)] for head in range(2)]
    assert read == [[[1, 2], [0, 2], [1, 3]], [[1, 2], [0, 2], [0, 3]]]
    seen = mask[0, 13, partition.chunk]
    out = ((query[0, 13] @ key[0].T / 2).masked_fill(~seen, -torch.inf).softmax(-1)) @ value[0]
    torch.testing.assert_close(out, torch.tensor([0.293410, -0.326241, -0.376097, -0.731163]), atol=1e-6, rtol=0)


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_tokens_are_in_the_chunk_of_their_place(cut):
    grid, spec = cut
    partition = Partition.of(grid, spec)
    table = torch.tensor(chunk_table(grid, spec))
    assert torch.equal(partition.chunk, table)
    assert partition.chunks == count_chunks(grid, spec) == int(table.max()) + 1
    assert torch.equal(partition.lengths, table.bincount())
    assert torch.equal(table[partition.order], table.sort().values)


def test_cutting_and_its_inverse_change_nothing(cut, seed):
    grid, spec = cut
    tokens = torch.randn(math.prod(grid), 3, generator=torch.Generator().manual_seed(seed))
    order = Partition.of(grid, spec).order
    assert torch.equal(tokens[order][order.argsort()], tokens)


@pytest.mark.parametrize("text", [0, 1, 13])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_blocks_never_cross_chunks_or_mix_video_and_text(cut, text, size):
    grid, spec = cut
    video = math.prod(grid)
    partition = Partition.of(grid, spec)
    blocks = Blocks.of(partition, text, size)
    order = blocks.token_order[0].tolist()
    assert sorted(order) == list(range(video + text)) and order[video:] == list(range(video, video + text))
    bounds = blocks.offsets.tolist()
    assert (bounds[0], bounds[-1]) == (0, video + text) and len(blocks.chunk) == len(bounds) - 1
    lengths = {}
    for block, (start, end) in enumerate(itertools.pairwise(bounds)):
        assert 1 <= end - start <= size
        held = order[start:end]
        homes = {int(partition.chunk[token]) if token < video else "text" for token in held}
        assert len(homes) == 1
        lengths.setdefault(homes.pop(), []).append(end - start)
        if start < video:
            assert int(blocks.chunk[block]) == int(partition.chunk[held[0]])
            assert set(blocks.members[block].tolist()) == set(held)
    for home, sizes in lengths.items():
        whole = text if home == "text" else int(partition.lengths[home])
        assert len(sizes) == -(-whole // size), "no more blocks than needed"
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("grid", "specs", "counts"),
    [
        ((21, 30, 52), [(3,), (6, 7), (7, 5, 13)], [7, 40, 72]),
        ((21, 45, 80), [(3,), (9, 10), (7, 15, 10)], [7, 40, 72]),
        ((24, 36, 64), [(3,), (9, 8), (8, 12, 8)], [8, 32, 72]),
        ((33, 45, 80), [(4,), (9, 10), (11, 15, 10)], [9, 40, 72]),
        ((20, 28, 52), [(3,), (7, 6), (10, 7, 6)], [7, 36, 72]),
        ((28, 30, 53), [(4,), (6, 7), (7, 10, 10)], [7, 40, 72]),
        ((1, 8, 8), [(1,), (2, 2), (1, 2, 2)], [1, 16, 16]),
        ((5, 1, 8), [(1,), (1, 2), (2, 1, 2)], [5, 4, 12]),
    ],
)
def test_the_chooser_of_chunk_sizes(grid, specs, counts):
    assert [choose_chunk(grid, kind) for kind in ("1d", "2d", "3d")] == specs
    assert [count_chunks(grid, spec) for spec in specs] == counts


def test_published_chunk_sizes_have_the_published_counts():
    counts = {grid: [count_chunks(grid, spec) for spec in specs] for grid, specs in PUBLISHED_CHUNKS.items()}
    assert counts == {
        (21, 30, 52): [7, 24, 72],
        (21, 45, 80): [7, 40, 36],
        (24, 36, 64): [8, 48, 72],
        (36, 30, 52): [12, 24, 36],
    }


# -- selection ---------------------------------------------------------------------------------------------------------


def test_the_selection_is_its_definition(cut, how, seed):
    grid, spec = cut
    query, key, expected = draw_and_define(seed, grid, spec, **how)
    assert torch.equal(select_chunks(query, key, Partition.of(grid, spec), **how), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("scope", vmoba_selection.SCOPES)
def test_thresholds_from_end_to_end_are_their_definition(scope, threshold, seed):
    grid, spec = CUTS["3D ragged"]
    how = {"mode": "threshold", "scope": scope, "threshold": threshold}
    query, key, expected = draw_and_define(seed, grid, spec, **how)
    assert torch.equal(select_chunks(query, key, Partition.of(grid, spec), **how), expected)


def test_every_query_reads_its_own_chunk(cut, how, seed):
    grid, spec = cut
    query, key, _ = draw(seed, grid)
    partition = Partition.of(grid, spec)
    mask = select_chunks(query, key, partition, **how)
    own = partition.chunk.expand(*mask.shape[:3])[..., None]
    assert mask.gather(-1, own).all()


def test_some_other_pair_is_selected_in_every_group_even_at_threshold_zero(seed):
    grid, spec = CUTS["3D"]
    query, key, _ = draw(seed, grid)
    partition = Partition.of(grid, spec)
    for scope, groups in (("query_head", 2 * 2 * 96), ("head_global", 2 * 2), ("overall", 2), ("block", 2 * 8)):
        mask = select_chunks(query, key, partition, mode="threshold", scope=scope, threshold=0.0)
        assert int(mask.sum()) == 2 * 2 * 96 + groups


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 9])
def test_top_k_keeps_to_its_budget(topk, seed):
    grid, spec = CUTS["3D"]
    query, key, _ = draw(seed, grid)
    partition = Partition.of(grid, spec)
    within = min(topk, 8)
    per_query = select_chunks(query, key, partition, mode="topk", scope="query_head", topk=topk)
    assert (per_query.sum(-1) == within).all()
    per_head = select_chunks(query, key, partition, mode="topk", scope="head_global", topk=topk)
    assert (per_head.sum((-1, -2)) == within * 96).all()
    per_sample = select_chunks(query, key, partition, mode="topk", scope="overall", topk=topk)
    assert (per_sample.sum((-1, -2, -3)) == within * 96 * 2).all()


@pytest.mark.parametrize("scope", ["query_head", "head_global"])
@pytest.mark.parametrize("setting", [("topk", "topk", range(1, 9)), ("threshold", "threshold", np.linspace(0, 1, 9))])
def test_a_larger_budget_keeps_what_a_smaller_one_has(scope, setting, seed):
    mode, name, values = setting
    grid, spec = CUTS["3D"]
    query, key, _ = draw(seed, grid)
    partition = Partition.of(grid, spec)
    masks = [select_chunks(query, key, partition, mode=mode, scope=scope, **{name: value}) for value in values]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
    assert masks[-1].all() and not masks[0].all()


def test_samples_do_not_influence_one_another(how, seed):
    grid, spec = CUTS["3D ragged"]
    partition = Partition.of(grid, spec)
    query, key, _ = draw(seed, grid, batch=3, heads=3)
    both = select_chunks(query, key, partition, **how)
    for sample in range(3):
        one = slice(sample, sample + 1)
        assert torch.equal(select_chunks(query[one], key[one], partition, **how), both[one])


def test_heads_taken_in_parts_change_nothing(how, seed, monkeypatch):
    grid, spec = CUTS["3D ragged"]
    query, key, _ = draw(seed, grid, heads=5)
    expected = select_chunks(query, key, Partition.of(grid, spec), **how)
    monkeypatch.setattr(vmoba_selection, "GATE_SIZE", 2 * math.prod(grid) * expected.shape[-1])
    assert torch.equal(select_chunks(query, key, Partition.of(grid, spec), **how), expected)


@pytest.mark.parametrize("scope", ["query_head", "head_global"])
@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_scaling_a_head_changes_nothing(mode, scope, seed):
    """Powers of two, so that no rounding differs."""
    grid, spec = CUTS["2D ragged"]
    partition = Partition.of(grid, spec)
    query, key, _ = draw(seed, grid)
    how = {"mode": mode, "scope": scope, "topk": 2, "threshold": 0.3}
    expected = select_chunks(query, key, partition, **how)
    head = torch.tensor([0.25, 8.0]).view(1, 2, 1, 1)
    assert torch.equal(select_chunks(query * head, key, partition, **how), expected)
    assert torch.equal(select_chunks(query, key * head, partition, **how), expected)


def test_a_common_part_of_all_keys_matters_only_across_queries(seed):
    grid, spec = CUTS["3D"]
    partition = Partition.of(grid, spec)
    query, key, _ = draw(seed, grid)
    common = torch.full((8,), 4.0)
    for mode in ("topk", "threshold"):
        how = {"mode": mode, "topk": 2, "threshold": 0.3}
        local = select_chunks(query, key, partition, scope="query_head", **how)
        moved = select_chunks(query, key + common, partition, scope="query_head", **how)
        assert (local != moved).float().mean() < 1e-2, "only where rounding decides"
        local = select_chunks(query, key, partition, scope="head_global", **how)
        moved = select_chunks(query, key + common, partition, scope="head_global", **how)
        assert (local != moved).float().mean() > 5e-2


def test_the_order_of_tokens_inside_a_chunk_does_not_matter(how, seed):
    grid, spec = CUTS["2D"]
    partition = Partition.of(grid, spec)
    query, key, _ = draw(seed, grid)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.empty_like(partition.order)
    for chunk in range(partition.chunks):
        inside = (partition.chunk == chunk).nonzero().flatten()
        shuffled[inside] = inside[torch.randperm(len(inside), generator=generator)]
    mask = select_chunks(query, key[:, :, shuffled], partition, **how)
    differing = (mask != select_chunks(query, key, partition, **how)).float().mean()
    assert differing < 1e-2, "only where rounding decides"


def test_equal_scores_are_taken_in_index_order():
    """Zero queries: every weight is 1, so a threshold takes its share of the pairs and top-k the first chunks."""
    grid, spec = (4, 1, 2), (1,)
    zero = torch.zeros(1, 2, 8, 4)
    partition = Partition.of(grid, spec)
    per_query = select_chunks(zero, zero, partition, mode="topk", scope="query_head", topk=2)
    assert per_query[0, 0].nonzero()[:, 1].view(8, 2).tolist() == [[0, 1]] * 4 + [[0, 2]] * 2 + [[0, 3]] * 2
    share = select_chunks(zero, zero, partition, mode="threshold", scope="query_head", threshold=0.7)
    assert share[0, 1].sum(-1).tolist() == [3] * 8 and share[0, 1, 7].tolist() == [True, True, False, True]
    whole = select_chunks(zero, zero, partition, mode="threshold", scope="head_global", threshold=0.45)
    # 0.45 of 32 pairs are 15: 8 own ones and the first 7 of the others.
    assert whole[0, 0].sum(-1).tolist() == [4, 4, 2, 1, 1, 1, 1, 1]


def test_all_kept_at_threshold_one_although_one_weight_is_zero(seed):
    grid, spec = CUTS["3D"]
    query, key, _ = draw(seed, grid)
    for scope in vmoba_selection.SCOPES:
        assert select_chunks(query, key, Partition.of(grid, spec), mode="threshold", scope=scope, threshold=1.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_gate_is_float32_whatever_comes(dtype, how, seed):
    grid, spec = CUTS["3D ragged"]
    query, key, _ = (tensor.to(dtype) for tensor in draw(seed, grid, batch=1))
    partition = Partition.of(grid, spec)
    expected = select_chunks(query.float(), key.float(), partition, **how)
    assert torch.equal(select_chunks(query, key, partition, **how), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_chunks(query.float(), key.float(), partition, **how), expected)


def test_float16_keys_do_not_overflow_in_the_mean():
    key = torch.full((1, 4096, 2), 1000.0, dtype=torch.float16)
    assert chunk_means(key, Partition.of((1, 64, 64), (64, 32))).tolist() == [[[1000.0, 1000.0]] * 2]


def test_no_gradient_is_recorded(seed):
    query, key, _ = (tensor.requires_grad_() for tensor in draw(seed, (4, 4, 6)))
    mask = select_chunks(query, key, Partition.of((4, 4, 6), (2, 2, 3)), mode="topk", scope="query_head", topk=2)
    assert not mask.requires_grad and mask.dtype == torch.bool


@pytest.mark.parametrize("bad", [{"mode": "best"}, {"scope": "local"}, {"mode": "topk", "scope": "block"}], ids=str)
def test_bad_ways_to_select_are_named(bad):
    zero = torch.zeros(1, 1, 4, 2)
    with pytest.raises(SettingsError, match=next(iter(bad))):
        select_chunks(zero, zero, Partition.of((4, 1, 1), (1,)), **{"mode": "topk", "scope": "query_head", **bad})


def test_a_selection_for_another_grid_names_both_numbers():
    zero = torch.zeros(1, 1, 4, 2)
    with pytest.raises(SettingsError, match=r"4 tokens.*for 6"):
        select_chunks(zero, zero, Partition.of((6, 1, 1), (1,)), mode="topk", scope="query_head")


# -- ranking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["normal", "few different", "weights", "zeros of both signs", "all the same"])
@pytest.mark.parametrize("size", [1, 7, 3000])
def test_the_histogram_takes_what_sorting_takes(values, size, seed):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randn(6, size, generator=generator)
    order = {
        "normal": order,
        "few different": order.round(),
        "weights": order.sigmoid(),
        "zeros of both signs": order.sign() * torch.tensor([0.0, 1.0])[torch.randint(2, order.shape)],
        "all the same": torch.full_like(order, -2.5),
    }[values]
    # Amounts that follow from the score, as weights do.
    for amount in (torch.ones_like(order, dtype=torch.int32), (order.clamp(min=0) * 1000).round().int()):
        total = amount.sum(1, keepdim=True).double()
        for share in (-0.5, 0.0, 0.03, 0.5, 0.999, 1.0, 1.5):
            expected = take_sorted(order, amount, share * total)
            assert torch.equal(take_by_histogram(order, amount, share * total), expected)
            assert expected.any(1).all()


def test_top_k_of_a_row_is_that_of_a_stable_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    for order in (torch.randn(50, 37, generator=generator), torch.randint(4, (50, 37), generator=generator).float()):
        order[:, 5] = torch.inf
        for count in (1, 2, 18, 37):
            need = torch.full((50, 1), float(count), dtype=torch.float64)
            expected = take_sorted(order, torch.ones_like(order, dtype=torch.int32), need)
            assert torch.equal(largest(order, count=count), expected)


def test_large_groups_are_ranked_by_histogram_with_the_same_result(how, seed, monkeypatch):
    grid, spec = CUTS["2D ragged"]
    query, key, _ = draw(seed, grid)
    expected = select_chunks(query, key, Partition.of(grid, spec), **how)
    monkeypatch.setattr(vmoba_selection, "SORTED_SIZE", 0)
    assert torch.equal(select_chunks(query, key, Partition.of(grid, spec), **how), expected)
