"""The Triton kernel against the float64 definition: on a GPU where there is one, else in Triton's interpreter."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnproc.kernels import (
    BlockMask,
    ChunkBits,
    Quantization,
    Ranges,
    block_sparse_attention,
    choose_backend,
    launch,
    oracle,
)
from attnproc.kernels.block_mask import make_lists

forward = pytest.importorskip("attnproc.kernels.triton_forward")
triton_lists = pytest.importorskip("attnproc.kernels.triton_lists")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter is slow, and computes bfloat16 wrongly: shapes are tested in one dtype there, options in the other.
SHAPE_DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32]
OPTION_DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
# A row without a maximum is -inf - -inf in places whose result is not used; NumPy, in the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice encountered")


@pytest.mark.parametrize("dtype", SHAPE_DTYPES, ids=str)
def test_equals_the_float64_definition(shape, dtype, make_case, close, poisoned_memory):
    case = make_case(shape, dtype, DEVICE)
    out, lse = block_sparse_attention(case.query, case.key, case.value, case.mask, backend="triton", return_lse=True)
    assert out.dtype == dtype and out.stride() == torch.empty_like(case.query).stride()
    close(out, lse, *oracle.attention(case.query, case.key, case.value, case.mask))


def test_published_numbers(p1_blocks, p1_answer, check_p1_answer):
    tensors, rows, total = p1_answer
    mask = BlockMask.from_blocks(p1_blocks, 2560, 2560, (128, 128)).to(DEVICE)
    tensors = [tensor.float().to(DEVICE) for tensor in tensors]
    # Few large tiles: the interpreter takes as long for a small one.
    out, lse, _ = forward.forward(forward.Request(*tensors, mask, 0.25), launch.LaunchShape(128, 128, 8, 1))
    check_p1_answer(out, lse, rows, total, 2e-6)


@pytest.mark.parametrize("options", [{}, {"skip_threshold": 4.0}], ids=str)
def test_a_bias_can_hide_key_blocks(options, make_case, new_shape, close):
    """A bias of -inf, in the first tiles of a list and, for one head, in all of them."""
    case = make_case(new_shape(queries=64, keys=96, density=1.0), OPTION_DTYPES[0], DEVICE)
    bias = torch.randn(1, 2, 6, device=DEVICE)
    bias[..., :3] = bias[:, 0] = -torch.inf
    arguments = {"key_bias": bias, **options}
    out, lse = block_sparse_attention(
        case.query, case.key, case.value, case.mask, backend="triton", return_lse=True, **arguments
    )
    expected = oracle.attention(case.query, case.key, case.value, case.mask, **arguments)
    close(out, lse, *expected)
    assert (lse[0, 0] == -torch.inf).all() and lse[0, 1].isfinite().all() and not out[0, 0].any()


def test_two_samples_equal_two_calls(make_case, new_shape):
    case = make_case(new_shape(batch=2, queries=60, keys=50, key_valid=(50, 31), mask_heads=True), device=DEVICE)
    both = block_sparse_attention(case.query, case.key, case.value, case.mask, backend="triton")
    for i in range(2):
        one = slice(i, i + 1)
        mask = case.mask.with_key_valid(case.mask.key_valid[one])
        out = block_sparse_attention(case.query[one], case.key[one], case.value[one], mask, backend="triton")
        assert torch.equal(both[one], out)


def test_scores_of_any_size_stay_finite(make_case, new_shape, close):
    """Large scores overflow exp without the running maximum; float32 must also not lose digits to TF32."""
    case = make_case(new_shape(queries=40, keys=64, head_dim=32), device=DEVICE)
    query = case.query * 100
    out, lse = block_sparse_attention(query, case.key, case.value, case.mask, backend="triton", return_lse=True)
    expected, expected_lse = oracle.attention(query, case.key, case.value, case.mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


RAGGED = {"query_offsets": (0, 9, 25, 26, 42, 58, 61), "key_offsets": (0, 16, 17, 33, 40, 50, 61)}  # blocks of 1 to 16


def ranges(queries: int, keys: int, axes: int) -> Ranges:
    """Random windows on a latent grid of up to 6 per axis; one key in five is text, on one axis or on all."""
    place = torch.randint(0, 6, (keys, axes), dtype=torch.int32)
    place[torch.rand(keys) < 0.1] = -1
    place[torch.rand(keys, axes) < 0.1] = -1
    low = torch.randint(-1, 5, (queries, axes), dtype=torch.int32)
    return Ranges(place, low, low + torch.randint(1, 5, low.shape, dtype=torch.int32))


def chunk_bits(batch: int, heads: int, queries: int, key_blocks: int) -> ChunkBits:
    """Random selections among 35 chunks, so that two words are needed and sign bits count."""
    selection = torch.rand(batch, heads, queries, 35) < 0.4
    return ChunkBits.from_selection(selection, torch.randint(0, 35, (key_blocks,)).int())


def random_call(name: str, dtype=torch.float32, *, batch=2, heads=2, head_dim=20, tokens=61, block_size=(16, 16)):
    """Random tensors, mask and options for a call with the features that `name` lists."""
    features = name.split(" + ")
    offsets = {k: torch.tensor(v, dtype=torch.int32) for k, v in RAGGED.items()} if "ragged" in features else {}
    grid = [
        len(offsets[f"{side}_offsets"]) - 1 if offsets else -(-tokens // size)
        for side, size in zip(("query", "key"), block_size, strict=True)
    ]
    lists = (batch, heads) if "lists per head" in features else (1, 1)
    partial = {}
    if rule := next((word for word in features if word.startswith(("ranges", "chunks"))), None):
        partial["partial"] = torch.rand(*lists, *grid) < 0.5
        partial["rule"] = (
            ranges(tokens, tokens, int(rule[-1]))
            if rule.startswith("ranges")
            else chunk_bits(*((batch, heads) if rule == "chunks per head" else (1, 1)), tokens, grid[1])
        )
    blocks = torch.rand(*lists, *grid) < (0.3 if partial else 0.6)
    valid = torch.tensor([tokens, 37])[:batch] if "padding" in features else None
    mask = BlockMask.from_blocks(blocks, tokens, tokens, block_size, valid, **partial, **offsets).validate()
    tensors = [torch.randn(batch, heads, tokens, head_dim).to(dtype).to(DEVICE) for _ in range(3)]
    options = {}
    if "key bias" in features:
        options["key_bias"] = torch.randn(1, heads, grid[1], device=DEVICE) * 2
    if "order" in features:
        options["token_order"] = torch.stack([torch.randperm(tokens) for _ in range(heads)]).to(DEVICE)
    if "skip" in features:  # keys of some blocks matter less than the rest
        small = (torch.rand(1, heads, tokens // 16 + 1, 1) < 0.6).repeat_interleave(16, 2)[:, :, :tokens]
        tensors[1] = torch.where(small.to(DEVICE), 0.1, 3.0).to(dtype) * tensors[1]
        options["skip_threshold"] = torch.tensor([0.5, 4.0][:heads], device=DEVICE)
    return tensors, mask.to(DEVICE), options


FEATURES = (
    "padding",
    "ranges 1",
    "ranges 3 + padding + lists per head",
    "chunks",
    "chunks per head + padding",
    "ragged",
    "ragged + padding + lists per head",
    "key bias",
    "order",
    "skip",
    "skip + padding + lists per head",
    "ragged + chunks per head + key bias + order",
    "ranges 2 + key bias + order + skip + padding",
    "ragged + ranges 2 + skip + lists per head + order",
)


@pytest.mark.parametrize("dtype", OPTION_DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_options_equal_the_float64_definition(features, dtype, seed, close, poisoned_memory):
    tensors, mask, options = random_call(features, dtype)
    out, lse, skipped = block_sparse_attention(
        *tensors, mask, **options, backend="triton", return_lse=True, return_skipped=True
    )
    close(out, lse, *oracle.attention(*tensors, mask, **options))
    expected = block_sparse_attention(*tensors, mask, **options, backend="oracle", return_skipped=True)[1]
    assert torch.equal(skipped, expected)


def test_blocks_far_below_the_maximum_are_skipped_and_counted(seed):
    """Scores are 12 log2 units in the first block and 2 to 4 in the others: all but the first lie 8 or more below."""
    query, value = torch.ones(1, 1, 40, 16, device=DEVICE), torch.randn(1, 1, 70, 16, device=DEVICE)
    height = torch.full((70, 1), 2.0) + 2 * torch.rand(70, 1)
    height[:16] = 12.0
    key = (height / 16 * math.log(2.0)).expand(1, 1, 70, 16).to(DEVICE)
    mask = BlockMask.full(40, 70, (16, 16), device=DEVICE)
    for threshold, count in ((7.0, 4), (math.inf, 0), (11.0, 0)):
        out, skipped = block_sparse_attention(
            query, key, value, mask, scale=1.0, skip_threshold=threshold, backend="triton", return_skipped=True
        )
        assert (skipped == count).all()
    out, lse = block_sparse_attention(
        query, key, value, mask, scale=1.0, skip_threshold=7.0, backend="triton", return_lse=True
    )
    torch.testing.assert_close(out, value[:, :, :16].mean(2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, 12 * math.log(2.0) + math.log(16.0)))


@pytest.mark.parametrize("poison", [1e4, float("nan")], ids=str)
@pytest.mark.parametrize("features", ["padding", "ranges 2 + padding + order", "chunks + padding", "ragged + padding"])
def test_keys_nobody_sees_do_not_matter(features, poison, seed):
    tensors, mask, options = random_call(features)
    unseen = ~mask.token_mask().any(dim=(1, 2)).expand(2, -1)  # (batch, positions)
    if "order" in features:
        options["token_order"] = torch.randperm(61, device=DEVICE)[None]  # one for both heads: the tensors share keys
        unseen = unseen[:, options["token_order"][0].argsort()]
    assert unseen.any()
    before = block_sparse_attention(*tensors, mask, **options, backend="triton")
    for tensor in tensors[1:]:
        tensor.transpose(1, 2)[unseen] = poison
    assert torch.equal(before, block_sparse_attention(*tensors, mask, **options, backend="triton"))


def test_nan_in_a_seen_key_is_never_a_number_in_the_result(seed):
    tensors, mask, _ = random_call("padding")
    tensors[1][:] = torch.nan
    out, lse = block_sparse_attention(*tensors, mask, backend="triton", return_lse=True)
    seen = mask.token_mask().any(-1).expand(lse.shape)
    assert out[seen].isnan().all() and lse[seen].isnan().all() and not out[~seen].any()


def test_windows_equal_the_float64_definition(seed, close):
    """Where each token sees itself, values need no protection from what hidden keys hold; the kernel leaves it out."""
    position = torch.arange(70, dtype=torch.int32)[:, None]
    rule = Ranges(position, position - 9, position + 20)
    near = torch.ones(5, 5, dtype=torch.bool).tril(2).triu(-1)
    mask = BlockMask.from_blocks(torch.zeros_like(near), 70, 70, (16, 16), partial=near, rule=rule).to(DEVICE)
    assert forward._every_key_is_seen(mask)
    apart = near & ~torch.eye(5, dtype=torch.bool)
    apart = BlockMask.from_blocks(torch.zeros_like(near), 70, 70, (16, 16), partial=apart, rule=rule).to(DEVICE)
    assert not forward._every_key_is_seen(apart)
    tensors = [torch.randn(1, 2, 70, 24, device=DEVICE) for _ in range(3)]
    out, lse = block_sparse_attention(*tensors, mask, backend="triton", return_lse=True)
    close(out, lse, *oracle.attention(*tensors, mask))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_may_be_negative_or_zero(scale, seed, close):
    tensors, mask, _ = random_call("padding")
    out, lse = block_sparse_attention(*tensors, mask, scale=scale, backend="triton", return_lse=True)
    close(out, lse, *oracle.attention(*tensors, mask, scale))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("quantization", [Quantization(), Quantization(group="block", pv="int8")], ids=lambda q: q.name)
def test_scale_may_be_negative_or_zero_with_quantization(quantization, scale, seed):
    tensors, mask, _ = random_call("padding", torch.float16)
    options = {"quantization": quantization, "scale": scale, "return_lse": True}
    out, lse = block_sparse_attention(*tensors, mask, **options, backend="triton")
    expected, expected_lse = block_sparse_attention(*tensors, mask, **options, backend="oracle")
    assert (out.double() - expected.double()).abs().sum() < 5e-3 * expected.double().abs().sum()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_sums_of_eight_bit_products_do_not_overflow_in_long_blocks():
    """With skipping a tile is a whole block: here 512 weights of 127 times values of 127."""
    query, value = torch.zeros(1, 1, 512, 16, device=DEVICE), torch.ones(1, 1, 512, 16, device=DEVICE)
    mask = BlockMask.full(512, 512, (16, 512), device=DEVICE)
    options = {"quantization": "int8+int8", "skip_threshold": 5.0, "backend": "triton"}
    out = block_sparse_attention(query, query, value, mask, **options)
    torch.testing.assert_close(out, value)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, every third element in memory; the others would give wrong answers."""
    room = torch.full((*tensor.shape[:-1], 3 * tensor.shape[-1]), 1, dtype=tensor.dtype, device=tensor.device)
    room[..., ::3] = tensor
    return room[..., ::3]


@pytest.mark.parametrize("name", ["key bias + order + lists per head", "skip + key bias", "ragged + padding"])
def test_options_and_lists_may_have_any_strides(name, seed, close):
    tensors, mask, options = random_call(name)
    fields = ("counts", "indices", "key_valid", "query_offsets", "key_offsets")
    given = {field: getattr(mask, field) for field in fields}
    apart = replace(mask, **{field: spread(x) for field, x in given.items() if x is not None})
    spread_options = {option: spread(x) for option, x in options.items()}
    expected = block_sparse_attention(*tensors, mask, **options, backend="triton", return_lse=True)
    found = block_sparse_attention(*tensors, apart, **spread_options, backend="triton", return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if "skip" not in name:
        close(*found, *oracle.attention(*tensors, mask, **options))


def test_a_bias_and_a_threshold_for_all_may_be_expanded(seed):
    tensors, mask, _ = random_call("skip")
    one = {"key_bias": torch.randn(1, 2, 1, device=DEVICE), "skip_threshold": torch.tensor([1.0], device=DEVICE)}
    options = {
        "key_bias": one["key_bias"].expand(1, 2, mask.grid[1]),
        "skip_threshold": one["skip_threshold"].expand(2),
    }
    found = block_sparse_attention(*tensors, mask, **options, backend="triton")
    options = {name: x.contiguous() for name, x in options.items()}
    assert torch.equal(found, block_sparse_attention(*tensors, mask, **options, backend="triton"))


@pytest.mark.parametrize(
    "group, pv, features",
    [
        ("token", None, "padding"),
        ("block", None, "ragged + ranges 2 + key bias + order + skip"),
        ("token", "fp8", "chunks + order + padding"),
        ("block", "fp8", "ragged + padding"),
        ("token", "int8", "ragged + ranges 2 + key bias + order + skip"),
        ("block", "int8", "padding"),
    ],
)
@pytest.mark.parametrize("dtype", OPTION_DTYPES, ids=str)
def test_quantized_equals_its_definition(dtype, group, pv, features, seed, poisoned_memory):
    """Integers are the same; 8-bit weights may differ in the last bit where float32 and float64 round apart."""
    if pv == "fp8" and ON_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit floats")
    tensors, mask, options = random_call(features, dtype)
    options |= {"quantization": Quantization(group=group, pv=pv), "return_lse": True, "return_skipped": True}
    out, lse, skipped = block_sparse_attention(*tensors, mask, **options, backend="triton")
    expected, expected_lse, expected_skipped = block_sparse_attention(*tensors, mask, **options, backend="oracle")
    difference = (out.double() - expected.double()).abs().sum() / expected.double().abs().sum()
    assert difference < (5e-3 if pv else 3e-3 if dtype == torch.bfloat16 else 1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    assert torch.equal(skipped, expected_skipped)


GPUS = launch.SHARED_MEMORY


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("element, value_element", [(4, 4), (2, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize("block_size", [(16, 16), (32, 128), (64, 64), (128, 64), (128, 128)], ids=str)
def test_launch_shapes_are_legal_and_fit_the_gpu(block_size, element, value_element, gpu):
    for padded_dim in (16, 32, 64, 128, 256):
        work = launch.Workload(gpu, padded_dim, element, value_element, *block_size)
        shapes = launch.candidates(work)
        assert launch.launch_shape(work) in shapes and len(set(shapes)) == len(shapes)
        for query_tile, key_tile, warps, stages in shapes:
            assert block_size[0] % query_tile == 0 and (
                block_size[1] % key_tile == 0 or (value_element, key_tile) == (1, 32)
            )
            assert min(query_tile, key_tile) >= 16 and warps in (4, 8) and stages >= 1
            kept = query_tile * element + stages * key_tile * (element + value_element)
            assert kept * padded_dim <= GPUS[gpu]


def test_with_skipping_tiles_are_whole_blocks_or_refused():
    work = launch.Workload("sm90", 128, 2, 2, 128, 128, skips=True)
    assert {shape[:2] for shape in launch.candidates(work)} == {(128, 128)}
    with pytest.raises(ValueError, match="smaller blocks"):
        launch.launch_shape(launch.Workload("sm89", 256, 4, 4, 128, 128, skips=True))


def test_measured_launch_shapes_come_first(monkeypatch, tmp_path):
    work = launch.Workload("sm90", 128, 2, 2, 128, 64)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"sm90": {work.name: [64, 32, 4, 2]}}))
    monkeypatch.setenv("ATTNPROC_LAUNCH_SHAPES", str(table))
    launch._measured.cache_clear()
    try:
        assert launch.launch_shape(work) == launch.LaunchShape(64, 32, 4, 2)
        assert launch.launch_shape(work._replace(gpu="sm80")) != launch.LaunchShape(64, 32, 4, 2)
    finally:
        launch._measured.cache_clear()


def test_every_launch_shape_gives_the_same_answer(make_case, new_shape, close):
    case = make_case(new_shape(batch=2, queries=90, keys=100, block_size=(64, 64)), device=DEVICE)
    request = forward.Request(case.query, case.key, case.value, case.mask, 0.25)
    expected = oracle.attention(case.query, case.key, case.value, case.mask, 0.25)
    for tiles in ((64, 64), (32, 16), (16, 32)):
        close(*forward.forward(request, launch.LaunchShape(*tiles, 4, 2))[:2], *expected)


@pytest.mark.parametrize("shape", [(1, 1, 3, 40), (2, 3, 5, 7), (1, 2, 1, 1), (1, 1, 0, 4)], ids=str)
def test_lists_equal_those_made_on_the_cpu(shape, seed, monkeypatch, poisoned_memory):
    monkeypatch.setattr(triton_lists, "CHUNK", 16)
    for density in (0.0, 0.4, 1.0):
        blocks = torch.rand(shape) < density
        for kept in (blocks, blocks.transpose(-1, -2)):
            counts, indices = make_lists(kept)
            width = indices.shape[-1]
            for room in (None, width):
                found_counts, found = triton_lists.make_lists(kept.to(DEVICE), room)
                assert torch.equal(found_counts.cpu(), counts)
                assert torch.equal(found.cpu()[..., :width], indices) and not found[..., width:].any()


# Each line: capability, call, and what its machine code must hold.
COMPILED = {
    "90, bf16 D128 128x64": "HGMMA",
    "90, bf16 D64 128x128 ranges order bias": "HGMMA",
    "90, bf16 D128 128x64 int8+fp8 skip": "IGMMA QGMMA",
    "89, bf16 D128 128x64 int8+fp8": "IMMA QMMA",
    "80, bf16 D64 128x64 chunks int8": "IMMA HMMA",
    "100, bf16 D128 64x64 ragged int8+fp8": "UTCQMMA",
}


@pytest.mark.skipif(ON_GPU, reason="the other tests compile for the GPU here")
def test_compiles_to_tensor_core_code_for_gpus_that_are_not_here():
    """The interpreter takes more than the compiler does. Registers that do not suffice are spilled to local memory."""
    command = [sys.executable, str(Path(__file__).with_name("compile_forward.py"))]
    done = subprocess.run(command, input="\n".join(COMPILED), capture_output=True, text=True)
    found = {row["call"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == COMPILED.keys(), done.stderr
    for call, row in found.items():
        assert all(row.get(word, 0) > 0 for word in COMPILED[call].split()), row
        assert row["shared"] <= GPUS[row["gpu"]], row
        assert row["stack"] == 0 and "LDL" not in row and "STL" not in row, row


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_is_the_choice_for_cuda_tensors(make_case, new_shape):
    case = make_case(new_shape(), device=DEVICE)
    assert choose_backend(case.query, case.key, case.value, case.mask) == ("triton", "CUDA tensors")


def test_each_tensor_keeps_its_own_strides_and_the_scale_counts(seed, close):
    fused = torch.randn(2, 50, 3, 2, 24, device=DEVICE)
    query, key = fused[:, :, 0].transpose(1, 2), torch.randn(2, 2, 50, 24, device=DEVICE)
    value = torch.randn(2, 50, 2, 24, device=DEVICE).transpose(1, 2)
    assert len({query.stride(), key.stride(), value.stride()}) == 3
    mask = BlockMask.full(50, 50, (16, 32), device=DEVICE)
    out, lse = block_sparse_attention(query, key, value, mask, scale=0.7, backend="triton", return_lse=True)
    close(out, lse, *oracle.attention(query, key, value, mask, 0.7))
