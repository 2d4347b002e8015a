"""Quantization: published integers and errors, hand cases, the definition of quantized attention, Triton kernels."""

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

from attnproc.kernels import BlockMask, block_sparse_attention, oracle, quantize
from attnproc.kernels.quantize import (
    Quantization,
    device_problem,
    key_mean,
    quantize_inputs,
    quantize_rows,
    quantize_values,
    round_half_away,
)
from attnproc.kernels.quantize_oracle import attend, forward, simulate
from attnproc.kernels.request import Request
from attnproc.kernels.rules import ChunkBits, Ranges
from benchmarks.quantization_errors import BLOCK_SIZE, HEAD_DIM, TOKENS, make_inputs, output_errors, report_errors

triton_quantize = pytest.importorskip("attnproc.kernels.triton_quantize")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SCALE = HEAD_DIM**-0.5
PER_BLOCK = Quantization(group="block")
UNSMOOTHED = Quantization(group="block", smooth_key=False)
FULL = BlockMask.full(TOKENS, TOKENS, BLOCK_SIZE)
EVERY_KIND = [
    Quantization(qk=qk, group=group, pv=pv)
    for qk in ("int8", "int4")
    for group in ("token", "block")
    for pv in (None, "fp8", "int8")
]


def name(quantization):
    return f"{quantization.name} per {quantization.group}"


# Rounding and scales


def test_halves_are_rounded_away_from_zero():
    given = torch.tensor([2.5, -2.5, 0.5, -0.5, 0.0, 1.49, -1.51, 126.5])
    assert round_half_away(given).tolist() == [3, -3, 1, -1, 0, 1, -2, 127]


def test_a_block_of_two_tokens_by_hand():
    integers, scale = quantize_rows(torch.tensor([[[[1.0, -2.0], [0.5, 3.0]]]]), 2)
    assert integers.flatten().tolist() == [42, -85, 21, 127]
    assert scale.item() == pytest.approx(3 / 127 + 1e-7, rel=1e-6)


def test_each_token_by_hand():
    integers, scale = quantize_rows(torch.tensor([[[[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]]]]), 1)
    assert integers.flatten().tolist() == [63, -127, 21, 127, 0, 0]
    torch.testing.assert_close(scale.flatten(), torch.tensor([2 / 127 + 1e-7, 3 / 127 + 1e-7, 1e-7]))


def test_four_bits_by_hand():
    integers, scale = quantize_rows(torch.tensor([[[[7.0, -3.6], [1.4, 0.1]]]]), 2, bits=4)
    assert integers.flatten().tolist() == [7, -4, 1, 0] and scale.item() == pytest.approx(1.0)


def test_ragged_groups_have_their_own_scales():
    x = torch.tensor([1.0, -2.0, 4.0, 8.0, 3.0]).view(1, 1, 5, 1)
    integers, scale = quantize_rows(x, 4, torch.tensor([0, 1, 4, 5], dtype=torch.int32))
    assert integers.flatten().tolist() == [127, -32, 63, 127, 127]
    torch.testing.assert_close(scale.flatten(), torch.tensor([1.0, 8.0, 3.0]) / 127 + 1e-7)


@pytest.mark.parametrize("kind, largest", [("int8", 127.0), ("fp8", 448.0)])
def test_values_by_hand(kind, largest):
    value = torch.tensor([[1.0, 0.0, -3.0], [-0.5, 0.0, 3.0], [99.0, 99.0, 99.0]])[None, None]
    values, scale = quantize_values(value, kind, torch.tensor([2]))
    assert scale.flatten().tolist() == pytest.approx([1 / largest, 1.0, 3 / largest])
    half = -64.0 if kind == "int8" else -224.0
    assert values.float().tolist() == [[[[largest, 0.0, -largest], [half, 0.0, largest], [0.0, 0.0, 0.0]]]]


def published_inputs():
    """Query and key (1, 2, 1024, 64) of SpargeAttn's test input W1: blocks with a common direction and a key bias."""
    generator = torch.Generator().manual_seed(1111)

    def draw(tokens, random=torch.randn, dim=64):
        return random(1, 2, tokens, dim, generator=generator)

    query_centre, key_centre = 1.6 * draw(8), 1.6 * draw(16)
    query_noise, key_noise = 1.5 * draw(8, torch.rand, 1), 1.5 * draw(16, torch.rand, 1)
    query, key, bias = draw(1024), draw(1024), 2 * draw(1)
    query = query_centre.repeat_interleave(128, 2) + query_noise.repeat_interleave(128, 2) * query
    return query, key_centre.repeat_interleave(64, 2) + key_noise.repeat_interleave(64, 2) * key + bias


@pytest.mark.parametrize("kernels", [quantize, triton_quantize], ids=["torch", "triton"])
def test_published_integers(kernels):
    query, key = (x.to(DEVICE if kernels is triton_quantize else "cpu") for x in published_inputs())
    assert query.sum().item() == pytest.approx(-12720.0629, abs=0.01)
    assert key.sum().item() == pytest.approx(11348.6472, abs=0.01)
    q_int8, q_scale = kernels.quantize_rows(query, 128)
    k_int8, k_scale = kernels.quantize_rows(key, 64, shift=kernels.key_mean(key))
    q_expected = [0.0633645, 0.0495904, 0.0432552, 0.0598713, 0.0593606, 0.0437987, 0.0369588, 0.0458770]
    assert q_scale[0, 0].tolist() == pytest.approx(q_expected, abs=1e-7)
    assert k_scale[0, 0, :4].tolist() == pytest.approx([0.0337335, 0.0419821, 0.0354233, 0.0554083], abs=1e-7)
    digests = (
        "1e4603a8d4253216012a1b910cd115e283c243a0b58fa79c8df78ff9060e976b",
        "11ed7316d55802590ae919c80fb57833cbc5ed623629bd57259b20224adab330",
    )
    for integers, digest, total, magnitude in zip(
        (q_int8, k_int8), digests, (-259798, -16460), (3909676, 4100434), strict=True
    ):
        # Where the mean is summed in another order, isolated integers may differ by one: at most 0.01 %.
        allowed = 1e-4 * integers.numel()
        assert abs(int(integers.sum()) - total) <= allowed
        assert abs(int(integers.int().abs().sum()) - magnitude) <= allowed
        if kernels is quantize and int(integers.sum()) == total:
            assert hashlib.sha256(integers.numpy().tobytes()).hexdigest() == digest


# Published errors, accepted within 10 %


@pytest.mark.parametrize(
    "recipe, quantization, expected, cosine",
    [
        ("gauss", PER_BLOCK, 0.0130, 0.999914),
        ("gauss", Quantization(), 0.0092, 0.999956),
        ("kbias", PER_BLOCK, 0.0130, 0.999914),
        ("kbias", UNSMOOTHED, 0.0559, 0.998414),
        ("qkbias", PER_BLOCK, 0.0273, 0.999543),
        ("qkbias", UNSMOOTHED, 0.1729, 0.984699),
        ("qkbias", Quantization(), 0.0237, None),
        ("tokout", PER_BLOCK, 0.1047, None),
        ("tokout", Quantization(), 0.0118, None),
        ("gauss", Quantization(group="block", pv="fp8"), 0.0381, 0.99928),
    ],
)
def test_published_errors(recipe, quantization, expected, cosine):
    inputs = make_inputs(recipe, 0)
    out, _ = simulate(*inputs, FULL, SCALE, quantization)
    relative_l1, found, _ = output_errors(out, oracle.attention(*inputs, FULL)[0])
    assert relative_l1 == pytest.approx(expected, rel=0.1)
    if cosine is not None:
        assert 1 - found == pytest.approx(1 - cosine, rel=0.2)


@pytest.mark.parametrize(
    "recipe, kind, expected",
    [
        ("gauss", torch.float16, 0.0003),
        ("gauss", torch.bfloat16, 0.0022),
        ("gauss", "fp8", 0.0354),
        ("gauss", "int8", 0.0136),
        ("diffuse", "fp8", 0.0369),
        ("diffuse", "int8", 0.0086),
        ("vmean", "fp8", 0.00197),
    ],
    ids=str,
)
def test_published_errors_of_weights_and_values(recipe, kind, expected):
    query, key, value = make_inputs(recipe, 1)
    exact, exact_lse = oracle.attention(query, key, value, FULL)
    scores = query.double() @ key.double().transpose(-1, -2) * SCALE * math.log2(math.e)
    values = (value.to(kind), None) if isinstance(kind, torch.dtype) else quantize_values(value, kind)
    out, lse, _ = attend(lambda keys: scores[..., keys], *values, FULL)
    assert output_errors(out, exact)[0] == pytest.approx(expected, rel=0.1)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "recipe, quantization, published",
    [("gauss", PER_BLOCK, 0.0036), ("gauss", Quantization(), 0.0027), ("qkbias", PER_BLOCK, 0.114)],
)
def test_the_log_sum_exp_is_that_of_the_true_keys(recipe, quantization, published):
    inputs = make_inputs(recipe, 0)
    _, lse = simulate(*inputs, FULL, SCALE, quantization)
    assert float((lse - oracle.attention(*inputs, FULL)[1]).abs().max()) < 2 * published


def test_smoothing_takes_away_what_all_keys_share():
    smoothed = [simulate(*make_inputs(recipe, 0), FULL, SCALE, PER_BLOCK)[0] for recipe in ("gauss", "kbias")]
    assert output_errors(*smoothed)[0] < 1e-3
    errors = [output_errors(out, oracle.attention(*make_inputs("gauss", 0), FULL)[0])[0] for out in smoothed]
    assert errors[0] == pytest.approx(errors[1], abs=5e-5)


def test_the_report_has_every_mode_of_a_recipe():
    lines = report_errors(("kbias",))
    found = {(line.quantization, line.group, line.smooth_key): line.relative_l1 for line in lines}
    assert found["int8", "token", True] == pytest.approx(0.0092, rel=0.1)
    assert found["int8", "block", False] == pytest.approx(0.0559, rel=0.1)
    assert found["int8", "token", True] < found["int8+int8", "token", True] < found["int8+fp8", "token", True]
    assert all(0 < line.rmse < 0.1 and line.cosine > 0.99 and line.lse > 0 for line in lines)


@pytest.mark.parametrize("pv, low, high", [(None, -0.7455, -0.7435), ("fp8", -0.753, -0.743), ("int8", -0.775, -0.715)])
def test_weights_beside_a_sink_are_not_rounded_away(pv, low, high):
    """One key 300 times heavier than each of 2047 others, and first: exact output -0.744354."""
    scores = torch.zeros(1, 1, 1, 2048, dtype=torch.float64)
    scores[..., 0] = math.log2(300)
    value = torch.full((1, 1, 2048, 1), -1.0)
    value[:, :, 0] = 1.0
    values, scale = (value.half(), None) if pv is None else quantize_values(value, pv)
    out, lse, _ = attend(lambda keys: scores[..., keys], values, scale, BlockMask.full(1, 2048, (64, 64)))
    assert low < out.item() < high
    assert lse.item() == pytest.approx(math.log(2347))


# The definition


@pytest.mark.parametrize("quantization", EVERY_KIND, ids=name)
def test_products_of_integers_are_those_of_64_bits_in_both_precisions(quantization, seed):
    """The longest rows that fit: all integers at their largest, head_dim 256."""
    query, key = (torch.randn(1, 1, 32, 256).sign() for _ in range(2))
    mask = BlockMask.full(32, 32, (16, 16))
    inputs = quantize_inputs(query, key, key, mask, 1.0, quantization)
    q_int, k_int = inputs.q_int8, inputs.k_int8
    exact = q_int.long() @ k_int.long().transpose(-1, -2)
    assert torch.equal((q_int.float() @ k_int.float().transpose(-1, -2)).long(), exact)
    both = [simulate(query, key, key, mask, 1 / 256, quantization, dtype=x) for x in (torch.float32, torch.float64)]
    torch.testing.assert_close(both[0][0].double(), both[1][0], rtol=0, atol=0.07 if quantization.pv else 1e-5)
    torch.testing.assert_close(both[0][1].double(), both[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [Quantization(), PER_BLOCK, Quantization("int4"), UNSMOOTHED], ids=name)
def test_scores_are_within_the_bound_of_rounding(shape, quantization, make_case):
    """Each score is off by at most scale (|q|_1 ks + |k'|_1 qs + D qs ks / 2) / 2, so log-sum-exps are too."""
    case = make_case(shape)
    query, key, mask, scale = case.query, case.key, case.mask, shape.head_dim**-0.5
    before = [x.clone() for x in (query, key, case.value)]
    out, lse = simulate(query, key, case.value, mask, scale, quantization)
    assert all(torch.equal(x, y) for x, y in zip(before, (query, key, case.value), strict=True))
    inputs = quantize_inputs(query, key, case.value, mask, scale, quantization)
    sizes = (1, 1) if quantization.group == "token" else shape.block_size
    q_step = quantize.scale_of_token(inputs.q_scale, shape.queries, sizes[0], None) / (scale * math.log2(math.e))
    k_step = quantize.scale_of_token(inputs.k_scale, shape.keys, sizes[1], None)
    if quantization.smooth_key:
        key = key - key_mean(key, mask.key_valid)
    q_step, k_step = q_step[..., :, None], k_step[..., None, :]
    bound = scale * (query.abs().sum(-1)[..., :, None] * k_step + key.abs().sum(-1)[..., None, :] * q_step) / 2
    bound = (bound + scale * shape.head_dim * q_step * k_step / 4).masked_fill(~mask.token_mask(), 0.0).amax(-1)
    exact, exact_lse = oracle.attention(query, key, case.value, mask)
    if quantization.smooth_key:
        exact_lse = exact_lse + quantize.lse_correction(query, key_mean(case.key, mask.key_valid), scale)
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and (out[empty] == 0.0).all()
    assert ((lse - exact_lse)[~empty].abs() <= bound[~empty] * 1.001 + 1e-5).all()
    # Weights are off by a factor of at most exp(2 bound), so outputs by that share of the largest value.
    allowed = (bound.double() * 2).expm1() * case.value.abs().max() + 1e-5
    assert ((out - exact).abs() <= allowed[..., None]).all()


def random_request(quantization, *, batch=2, heads=3, options=()):
    """70 queries and keys in ragged blocks, whole, partial and missing ones, the second sample padded."""
    offsets = torch.tensor([0, 16, 21, 37, 53, 69, 70], dtype=torch.int32)
    query, key, value = (torch.randn(batch, 70, heads, 24).transpose(1, 2) for _ in range(3))
    blocks, partial = (torch.rand(batch, heads, 6, 6) < 0.4 for _ in range(2))
    if quantization.group == "token":
        low = torch.randint(0, 9, (70, 1), dtype=torch.int32)
        rule = Ranges(torch.randint(-1, 9, (70, 1), dtype=torch.int32), low, low + 4)
    else:
        chunks = torch.tensor([0, 0, 1, 1, 2, 3])
        rule = ChunkBits.from_selection(torch.rand(batch, heads, 70, 4) < 0.5, chunks)
    mask = BlockMask.from_blocks(
        blocks,
        70,
        70,
        (16, 16),
        torch.tensor([70, 41]),
        partial=partial,
        rule=rule,
        query_offsets=offsets,
        key_offsets=offsets,
    )
    every = {
        "key_bias": torch.randn(1, heads, 6),
        "token_order": torch.stack([torch.randperm(70) for _ in range(heads)]),
        "skip_threshold": torch.tensor([0.5, 2.0, torch.inf]),
    }
    asked = {name: every[name] for name in options}
    return Request(query, key, value, mask, 0.3, quantization=quantization, **asked)


OPTIONS = [(), ("key_bias",), ("token_order",), ("skip_threshold",), ("key_bias", "token_order", "skip_threshold")]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("quantization", [Quantization(), PER_BLOCK], ids=name)
def test_every_option_means_what_it_does_without_quantization(quantization, options, seed):
    """Exact attention on the dequantized queries and keys, with the same options, gives the same to 12 digits."""
    request = random_request(quantization, options=options)
    mask, tensors = request.mask, [request.query, request.key, request.value]
    if request.token_order is not None:
        tensors = [oracle.take(tensor, request.token_order) for tensor in tensors]
    inputs = quantize_inputs(*tensors, mask, request.scale, quantization)
    size = 1 if quantization.group == "token" else 16
    q_scale = quantize.scale_of_token(inputs.q_scale, 70, size, mask.query_offsets).double() * math.log(2)
    k_scale = quantize.scale_of_token(inputs.k_scale, 70, size, mask.key_offsets).double()
    query, key = inputs.q_int8 * q_scale[..., None], inputs.k_int8 * k_scale[..., None]
    limits = {"key_bias": request.key_bias, "skip_threshold": request.skip_threshold}
    expected, expected_lse = oracle.attention(query, key, tensors[2], mask, 1.0, **limits)
    expected_lse = expected_lse + inputs.lse_correction
    if request.token_order is not None:
        expected = oracle.put_back(expected, request.token_order)
        expected_lse = oracle.put_back(expected_lse[..., None], request.token_order).squeeze(-1)
    out, lse, skipped = forward(request)
    # Weights are rounded to the float32 of the values.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    if request.skip_threshold is not None:
        blocks = oracle.skipped_blocks(query, key, mask, 1.0, request.skip_threshold, key_bias=request.key_bias)
        assert torch.equal(skipped, blocks.sum(-1, dtype=torch.int32)) and skipped.any()
    else:
        assert not skipped.any()


@pytest.mark.parametrize("quantization", [Quantization(pv="int8"), Quantization(group="block", pv="fp8")], ids=name)
def test_the_oracle_backend_is_the_definition_with_every_option(quantization, seed):
    request = random_request(quantization, options=OPTIONS[-1])
    found = block_sparse_attention(
        request.query,
        request.key,
        request.value,
        request.mask,
        scale=request.scale,
        return_lse=True,
        return_skipped=True,
        key_bias=request.key_bias,
        token_order=request.token_order,
        skip_threshold=request.skip_threshold,
        quantization=quantization,
        backend="oracle",
    )
    out, lse, skipped = forward(request)
    assert torch.equal(found[0], out.float()) and torch.equal(found[1], lse.float()) and torch.equal(found[2], skipped)


@pytest.mark.parametrize("quantization", EVERY_KIND, ids=name)
def test_the_fast_simulation_follows_the_float64_one(quantization, seed):
    request = random_request(quantization, options=("key_bias",))
    out, lse, _ = forward(request)
    fast, fast_lse, _ = forward(request, dtype=torch.float32)
    assert fast.dtype == fast_lse.dtype == torch.float32
    torch.testing.assert_close(fast_lse.double(), lse, rtol=1e-5, atol=1e-5)
    # A weight next to a rounding boundary may go the other way, by 1/16 of itself.
    allowed = 0.07 if quantization.pv else 1e-5
    torch.testing.assert_close(fast.double(), out, rtol=0, atol=allowed * request.value.abs().max().item())


@pytest.mark.parametrize("pv, allowed", [(None, 1e-9), ("fp8", 0.05), ("int8", 0.03)])
def test_tiles_within_a_block_change_only_rounding(pv, allowed):
    inputs = [x.double() for x in make_inputs("gauss", 0)]
    whole, lse = simulate(*inputs, FULL, SCALE, Quantization(pv=pv))
    tiled, tiled_lse = simulate(*inputs, FULL, SCALE, Quantization(pv=pv), key_tile=24)
    assert output_errors(tiled, whole)[0] < allowed
    torch.testing.assert_close(tiled_lse, lse, rtol=1e-12, atol=1e-12)


# Invariants


@pytest.mark.parametrize("quantization", EVERY_KIND, ids=name)
def test_equal_values_come_back(quantization):
    query, key, _ = make_inputs("gauss", 2)
    constant = torch.linspace(-2, 2, HEAD_DIM).half()
    constant[5] = 0.0
    value = constant.expand(1, 2, TOKENS, HEAD_DIM)
    out, _ = simulate(query, key, value, FULL, SCALE, quantization)
    allowed = {None: 1.5e-4, "fp8": 1e-2, "int8": 2e-2}[quantization.pv]
    torch.testing.assert_close(out, constant.double().expand_as(out), rtol=allowed, atol=0)
    assert (out[..., 5] == 0.0).all()


def test_only_the_product_of_query_and_scale_matters(seed):
    query, key, value = (torch.randn(1, 2, 64, 32) for _ in range(3))
    mask = BlockMask.full(64, 64, (16, 16))
    once = quantize_inputs(query, key, value, mask, 0.2, PER_BLOCK)
    moved = quantize_inputs(query * 8, key, value, mask, 0.2 / 8, PER_BLOCK)
    assert (once.q_int8 - moved.q_int8).abs().max() <= 1
    assert (once.q_int8 != moved.q_int8).float().mean() < 5e-3
    torch.testing.assert_close(once.q_scale, moved.q_scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("quantization", [Quantization(), PER_BLOCK], ids=name)
def test_a_vector_added_to_all_keys_changes_nothing(quantization):
    query, key, value = make_inputs("gauss", 3)
    out, lse = simulate(query, key, value, FULL, SCALE, quantization)
    vector = torch.randn(1, 2, 1, HEAD_DIM)
    moved, moved_lse = simulate(query, key + vector, value, FULL, SCALE, quantization)
    assert output_errors(moved, out)[0] < 1e-3
    shift = (query.double() @ vector.double().transpose(-1, -2)).squeeze(-1) * SCALE
    torch.testing.assert_close(moved_lse, lse + shift, rtol=0, atol=5e-3)


@pytest.mark.parametrize("pv, allowed", [(None, 1e-3), ("fp8", 0.03)])
def test_the_order_of_key_blocks_changes_only_rounding(pv, allowed):
    query, key, value = (x.half() for x in make_inputs("gauss", 4))
    quantization = Quantization(group="block", pv=pv)
    out, _ = simulate(query, key, value, FULL, SCALE, quantization)
    errors = []
    for _ in range(8):  # the mean, as single orders differ by some 0.002 in FP8
        blocks = torch.arange(TOKENS).view(-1, 64)[torch.randperm(TOKENS // 64)].flatten()
        moved, _ = simulate(query, key[:, :, blocks], value[:, :, blocks], FULL, SCALE, quantization)
        errors.append(float(output_errors(moved, out)[0]))
    assert sum(errors) / len(errors) < allowed


@pytest.mark.parametrize("quantization", EVERY_KIND, ids=name)
def test_samples_and_heads_do_not_touch_each_other(quantization, make_case, new_shape):
    shape = new_shape(batch=2, heads=3, queries=60, keys=50, key_valid=(50, 31))
    case = make_case(shape)
    out, lse = simulate(case.query, case.key, case.value, case.mask, 0.25, quantization)
    for sample, head in ((0, 2), (1, 0)):
        mask = case.mask.with_key_valid(case.mask.key_valid[sample : sample + 1])
        one = (x[sample : sample + 1, head : head + 1] for x in (case.query, case.key, case.value))
        alone, alone_lse = simulate(*one, mask, 0.25, quantization)
        torch.testing.assert_close(alone[0, 0], out[sample, head], rtol=1e-9, atol=1e-9)
        # What smoothing took from it is added back in float32.
        torch.testing.assert_close(alone_lse[0, 0], lse[sample, head], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [1e4, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("quantization", EVERY_KIND, ids=name)
def test_what_padding_holds_does_not_matter(quantization, poison, make_case, new_shape):
    case = make_case(new_shape(batch=3, queries=60, keys=70, key_valid=(70, 21, 0), density=1.0))
    before = simulate(case.query, case.key, case.value, case.mask, 0.25, quantization)
    key, value = case.key.clone(), case.value.clone()
    for tensor in (key, value):
        tensor[1, :, 21:] = poison
        tensor[2] = poison
    after = simulate(case.query, key, value, case.mask, 0.25, quantization)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert before[0].isfinite().all()


@pytest.mark.parametrize("bits, pv", [("int8", None), ("int4", "fp8"), ("int8", "int8")])
def test_two_runs_give_the_same_bits(bits, pv, seed):
    request = random_request(Quantization(qk=bits, pv=pv), options=("key_bias", "token_order"))
    first, second = forward(request), forward(request)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_four_bits_are_as_much_worse_as_their_steps_are_larger():
    inputs = make_inputs("gauss", 0)
    exact = oracle.attention(*inputs, FULL)[0]
    eight, four = (
        output_errors(simulate(*inputs, FULL, SCALE, Quantization(qk=qk))[0], exact)[0] for qk in ("int8", "int4")
    )
    assert four / eight == pytest.approx(127 / 7, rel=0.2)


# Edges and bad input


def test_zeros_have_the_smallest_scale_and_stay_zero():
    zeros = torch.zeros(1, 1, 40, 16)
    integers, scale = quantize_rows(zeros, 16)
    assert not integers.any() and torch.equal(scale, torch.full((1, 1, 3), 1e-7))
    mask = BlockMask.full(40, 40, (16, 16))
    for quantization in EVERY_KIND:
        out, lse = simulate(zeros, zeros, zeros, mask, 0.25, quantization)
        assert (out == 0.0).all()
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(40)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_makes_nan_and_only_where_it_is_seen(bad, seed):
    query, key, value = (torch.randn(1, 2, 48, 16) for _ in range(3))
    mask = BlockMask.from_blocks(torch.eye(3, dtype=torch.bool), 48, 48, (16, 16))
    spoilt = query.clone()
    spoilt[0, 0, 5, 3] = bad
    integers, scale = quantize_rows(spoilt, 1)
    assert not integers[0, 0, 5].any() and scale[0, 0, 5] == torch.inf
    out, _ = simulate(spoilt, key, value, mask, 0.25, Quantization())
    assert out[0, 0, 5].isnan().all() and out.isnan().any(-1).sum() == 1
    spoilt = key.clone()
    spoilt[0, 1, 20, 3] = bad
    out, _ = simulate(query, spoilt, value, mask, 0.25, Quantization(smooth_key=False))
    assert out[0, 1, 16:32].isnan().all() and out.isnan().any(-1).sum() == 16
    spoilt = value.clone()
    spoilt[0, 1, 20, 3] = bad
    for pv in ("fp8", "int8"):
        out, _ = simulate(query, key, spoilt, mask, 0.25, Quantization(pv=pv))
        assert out[0, 1, :, 3].isnan().all() and out.isnan().sum() == 48


def test_the_largest_float16_does_not_overflow(seed):
    key = torch.full((1, 1, 40, 16), 6.5e4).half() * torch.randn(1, 1, 40, 1).sign().half()
    integers, scale = quantize_rows(key, 8)
    assert (integers.abs() == 127).all() and scale.isfinite().all()
    values, value_scale = quantize_values(key, "fp8")
    torch.testing.assert_close(values.float() * value_scale, key.float())


@pytest.mark.parametrize("keys", [1, 5, 63])
def test_keys_fewer_than_a_block(keys, seed):
    query, key, value = torch.randn(1, 2, 9, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    mask = BlockMask.full(9, keys, (64, 64))
    expected, _ = oracle.attention(query, key, value, mask)
    for quantization in EVERY_KIND:
        out, _ = simulate(query, key, value, mask, 0.25, quantization)
        assert output_errors(out, expected)[0] < (0.4 if quantization.qk == "int4" else 0.08)


def test_values_keep_their_dtype_without_quantization_of_values(seed):
    tensors = [torch.randn(1, 1, 16, 16).bfloat16() for _ in range(3)]
    inputs = quantize_inputs(*tensors, BlockMask.full(16, 16, (16, 16)), 0.25, Quantization(smooth_key=False))
    assert inputs.values is tensors[2] and inputs.value_scale is None and inputs.lse_correction is None


def test_names_are_parsed_and_given_back():
    for given in ("int8", "int8+fp8", "int8+int8", "int4", "int4+fp8", "int4+int8"):
        assert Quantization.parse(given).name == given
    assert Quantization.parse(None) is None and Quantization.parse(PER_BLOCK) is PER_BLOCK
    assert Quantization.parse("int8") == Quantization("int8", "token", None, True)


@pytest.mark.parametrize("given", ["fp8", "int8+static", "int8+fp16", "INT8", "", 8, True])
def test_unknown_names_are_refused_with_the_known_ones(given):
    with pytest.raises(ValueError, match=r"^quantization: got .+; expected .*'int8\+fp8'.*\. .+\.$"):
        Quantization.parse(given)


@pytest.mark.parametrize(
    "option, given", [("qk", "fp8"), ("group", "warp"), ("pv", "fp16"), ("smooth_key", None)], ids=str
)
def test_unknown_settings_are_refused_with_the_known_ones(option, given):
    with pytest.raises(ValueError, match=rf"^quantization\.{option}: got {given!r}; expected one of .+\. .+\.$"):
        Quantization(**{option: given})


def test_what_a_device_cannot_do_is_refused_with_what_it_can(monkeypatch):
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu = torch.device("cuda", 0)
    came, advice = device_problem(Quantization(pv="fp8"), gpu)
    assert "8.9" in came and "8.6" in came and "'int8+int8'" in advice
    assert device_problem(Quantization(pv="int8"), gpu) is None and device_problem(Quantization(), gpu) is None
    came, advice = device_problem(Quantization(qk="int4"), gpu)
    assert "simulated" in came and "'int8'" in advice
    capability = (8, 9)
    assert device_problem(Quantization(pv="fp8"), gpu) is None
    assert all(device_problem(kind, torch.device("cpu")) is None for kind in EVERY_KIND)
    elsewhere = [torch.randn(1, 1, 16, 16, device="meta")] * 3
    with pytest.raises(ValueError, match=r"^quantization: got 'int8' on meta; expected CUDA or CPU tensors\. .+\.$"):
        quantize_inputs(*elsewhere, BlockMask.full(16, 16, (16, 16), device="meta"), 0.25, Quantization())


def test_gradients_and_integers_are_refused():
    query, mask = torch.randn(1, 1, 16, 16, requires_grad=True), BlockMask.full(16, 16, (16, 16))
    with pytest.raises(NotImplementedError, match="forward pass only"):
        quantize_inputs(query, query, query, mask, 0.25, Quantization())
    with torch.no_grad():
        quantize_inputs(query, query, query, mask, 0.25, Quantization())
    whole = torch.ones(1, 1, 16, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^query: got torch\.int32; expected float32"):
        quantize_inputs(whole, whole, whole, mask, 0.25, Quantization())


# Triton kernels against the functions of PyTorch


# The interpreter reads bfloat16 rightly if it is cast at once, as these kernels do.
OFFSETS = torch.tensor([0, 30, 31, 95, 135], dtype=torch.int32)


def random_rows(layout, dtype, head_dim=24, batch=2, heads=2, tokens=135):
    if layout == "heads first":
        x = torch.randn(batch, heads, tokens, head_dim)
    elif layout == "tokens first":
        x = torch.randn(batch, tokens, heads, head_dim).transpose(1, 2)
    else:
        x = torch.randn(batch, heads, tokens, 2 * head_dim)[..., ::2]
    return (x + 2.0).to(dtype).to(DEVICE)


def same_integers(given, expected):
    """Equal, or off by one in isolated places, where a division ends next to a half."""
    assert given.dtype == expected.dtype and given.is_contiguous() and expected.is_contiguous()
    difference = (given.float() - expected.float()).abs()
    assert difference.max() <= (1 if given.dtype == torch.int8 else 32) and (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize(
    "layout, dtype, head_dim, group, offsets",
    [
        ("heads first", torch.float32, 24, 1, None),
        ("tokens first", torch.bfloat16, 64, 1, None),
        ("strided", torch.float16, 1, 1, None),
        ("tokens first", torch.float32, 128, 32, None),
        ("heads first", torch.bfloat16, 24, 128, None),
        ("strided", torch.float16, 40, 64, OFFSETS),
    ],
    ids=lambda x: None if x is None else "ragged" if x is OFFSETS else str(x),
)
def test_triton_rounds_rows_like_torch(layout, dtype, head_dim, group, offsets, seed, poisoned_memory):
    x, shift = random_rows(layout, dtype, head_dim), torch.randn(2, 2, 1, head_dim, device=DEVICE)
    offsets = None if offsets is None else offsets.to(DEVICE)
    valid = torch.tensor([135, 40], dtype=torch.int32, device=DEVICE)
    for padding, moved in ((None, None), (valid, shift)):
        integers, scale = triton_quantize.quantize_rows(x, group, offsets, padding, moved)
        expected, expected_scale = quantize_rows(x, group, offsets, padding, moved)
        same_integers(integers, expected)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "kind, dtype", [("int8", torch.float16), ("int8", torch.bfloat16), ("fp8", torch.float32), ("fp8", torch.bfloat16)]
)
def test_triton_rounds_values_like_torch(kind, dtype, seed, poisoned_memory):
    if ON_GPU and (problem := device_problem(Quantization(pv=kind), torch.device("cuda", 0))):
        pytest.skip(f"needs {problem[0]}")
    value = random_rows("tokens first", dtype)
    value[:, :, :, 3] = 0.0
    for valid in (None, torch.tensor([99, 0], dtype=torch.int32, device=DEVICE)):
        values, scale = triton_quantize.quantize_values(value, kind, valid)
        expected, expected_scale = quantize_values(value, kind, valid)
        same_integers(values, expected)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens, head_dim", [(1, 1), (65, 40), (1030, 8)])
def test_triton_means_are_those_of_torch(tokens, head_dim, seed, poisoned_memory):
    key = random_rows("tokens first", torch.float16, head_dim, tokens=tokens)
    for valid in (None, torch.tensor([tokens // 2], device=DEVICE)):
        mean = triton_quantize.key_mean(key, valid)
        torch.testing.assert_close(mean, key_mean(key, valid), rtol=1e-5, atol=1e-5)
    correction = triton_quantize.lse_correction(key, mean, 0.3)
    torch.testing.assert_close(correction, quantize.lse_correction(key, mean, 0.3), rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_triton_treats_what_is_not_finite_like_torch(bad, seed):
    x = random_rows("heads first", torch.float32)
    x[0, 1, 70, 5] = bad
    for group in (1, 32):
        pairs = zip(triton_quantize.quantize_rows(x, group), quantize_rows(x, group), strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)
    (values, scale), (expected, expected_scale) = (
        f(x, "int8") for f in (triton_quantize.quantize_values, quantize_values)
    )
    assert torch.equal(values, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize(
    "quantization",
    [Quantization(pv="int8"), Quantization(group="block", pv="fp8"), Quantization(smooth_key=False)],
    ids=name,
)
def test_triton_inputs_are_those_of_torch(quantization, seed, monkeypatch):
    request = random_request(quantization)
    if ON_GPU and (problem := device_problem(quantization, torch.device("cuda", 0))):
        pytest.skip(f"needs {problem[0]}")
    expected = quantize_inputs(request.query, request.key, request.value, request.mask, 0.3, quantization)
    if not ON_GPU:
        monkeypatch.setattr(quantize, "_kernels", lambda device: triton_quantize)
    tensors = (x.to(DEVICE) for x in (request.query, request.key, request.value))
    found = quantize_inputs(*tensors, request.mask.to(DEVICE), 0.3, quantization)
    for field in ("q_int8", "k_int8", "values"):
        if field != "values" or quantization.pv is not None:
            same_integers(getattr(found, field).cpu(), getattr(expected, field))
    for field in ("q_scale", "k_scale", "value_scale", "lse_correction"):
        if (tensor := getattr(expected, field)) is not None:
            torch.testing.assert_close(getattr(found, field).cpu(), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ON_GPU, reason="the GPU's own cast is tested with the values")
def test_the_interpreter_is_helped_to_round_to_fp8_like_torch():
    """All numbers of the format, all midpoints between them, and random ones far beyond both ends."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0).sort().values
    given = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.randn(1536).mul(4).exp(), -torch.randn(1537).exp()])
    # A channel whose scale is 1, so that numbers are rounded as they are.
    given = given.clamp(-448, 448).reshape(1, 1, -1, 1)
    values, scale = triton_quantize.quantize_values(given, "fp8")
    assert scale.item() == 1.0 and torch.equal(values.float(), given.to(torch.float8_e4m3fn).float())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnproc.kernels import triton_quantize as room

sizes = dict(CHUNK=room.CHUNK, ROWS=room.ROWS, GROUP=128, HEAD_DIM=64, PADDED_DIM=64)
flags = dict(RAGGED=True, SHIFT=True, OFFSETS=True, MAGNITUDE=True, TO_FP8=True)
for kernel, out, own in (
    (room.reduce_channels_kernel, "*fp32", {}),
    (room.quantize_rows_kernel, "*i8", dict(PER_TOKEN=True)),
    (room.quantize_rows_kernel, "*i8", dict(PER_TOKEN=False)),
    (room.quantize_channels_kernel, "*fp8e4nv", {}),
    (room.correction_kernel, "*fp32", {}),
):
    constants = {name: value for name, value in {**sizes, **flags, **own}.items() if name in kernel.arg_names}
    types = dict(x="*bf16", out=out, shift="*fp32", mean="*fp32", offsets="*i32", valid="*i32", largest="fp32")
    types["scale"] = "fp32" if kernel is room.correction_kernel else "*fp32"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    if out == "*fp8e4nv":
        assert "e4m3" in compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(ON_GPU, reason="the other tests compile them for the GPU here")
def test_kernels_compile_for_a_gpu_that_is_not_here():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
