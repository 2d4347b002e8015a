"""Gradients of block_sparse_attention against autograd through the float64 definition."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from attnproc.kernels import BlockMask, block_sparse_attention, oracle
from attnproc.kernels.op import module
from attnproc.kernels.request import Request
from attnproc.kernels.rules import ChunkBits, Ranges

ON_GPU = torch.cuda.is_available()


def has_backward(backend: str) -> bool:
    try:
        return hasattr(module(backend), "backward")
    except ImportError:
        return False


BACKENDS = [name for name in ("oracle", "cpu", "triton") if has_backward(name)]
DEVICE = {"oracle": "cpu", "cpu": "cpu", "triton": "cuda" if ON_GPU else "cpu"}
# Rounding of out, of the weights and of the gradients themselves, against sums of about 64 terms of size 1.
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def gradients(call, case, **options):
    """Gradients of query, key and value for one fixed loss of out and lse."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    out, lse = call(*tensors, case.mask, **options)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out.shape, generator=generator).to(out.device)
    log_weights = torch.randn(lse.shape, generator=generator).to(out.device)
    seen = lse > -torch.inf
    loss = (out.double() * weights).sum() + (lse.double()[seen] * log_weights[seen]).sum()
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_autograd_of_the_definition(shape, backend, make_case, poisoned_memory):
    case = make_case(shape, torch.float32, DEVICE[backend])
    expected = gradients(oracle.attention, case)
    found = gradients(block_sparse_attention, case, backend=backend, return_lse=True)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == case.query.dtype
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_definition(make_case, new_shape):
    case = make_case(new_shape(heads=1, queries=12, keys=20, head_dim=3, block_size=(4, 8), density=0.6), torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    assert torch.autograd.gradcheck(lambda *qkv: oracle.attention(*qkv, case.mask)[0], tensors)


# Every feature of a request, by the backward pass alone


@dataclass(frozen=True)
class Features:
    """A row of the table of features. Sizes of options are (samples, heads); None leaves the option out."""

    batch: int = 2
    heads: int = 2
    length: int = 45
    head_dim: int = 16
    block_size: tuple[int, int] = (16, 32)
    key_bias: tuple[int, int] | None = None
    token_order: int | None = None
    ranges: int = 0  # axes
    bits: tuple[int, int] | None = None
    chunks: int = 5
    ragged: bool = False
    key_valid: tuple[int, ...] | None = None
    mask_lists: tuple[int, int] = (1, 1)
    density: float = 0.3


FEATURES = {
    "bias per head and sample": Features(key_bias=(2, 2), mask_lists=(1, 2)),
    "shared bias": Features(key_bias=(1, 1), mask_lists=(2, 1)),
    "one order": Features(token_order=1),
    "order per head": Features(token_order=2, key_valid=(45, 26)),
    "ranges on 1 axis": Features(ranges=1, mask_lists=(2, 2)),
    "ranges on 3 axes, padding": Features(ranges=3, key_valid=(33, 45)),
    "shared bits": Features(bits=(1, 1)),
    "bits per sample and head": Features(bits=(2, 2), mask_lists=(1, 2), key_valid=(17, 45)),
    "more chunks than a word has bits": Features(bits=(1, 2), length=90, chunks=40, block_size=(32, 16), batch=1),
    "ragged blocks": Features(ragged=True, mask_lists=(1, 2), density=0.6, key_valid=(45, 20)),
    "ragged blocks and bits": Features(ragged=True, bits=(2, 1)),
    "everything, ranges": Features(
        key_bias=(2, 1), token_order=2, ranges=2, ragged=True, key_valid=(40, 0), mask_lists=(2, 2), head_dim=20
    ),
    "everything, bits": Features(
        key_bias=(1, 2), token_order=1, bits=(1, 2), ragged=True, key_valid=(30, 45), head_dim=33, block_size=(32, 16)
    ),
}


def random_offsets(length: int, block: int) -> torch.Tensor:
    """Blocks of 1 to `block` tokens."""
    lengths = []
    while sum(lengths) < length:
        lengths.append(min(int(torch.randint(1, block + 1, ())), length - sum(lengths)))
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random_rule(case: Features, rows: int, columns: int):
    if case.ranges:
        place = torch.randint(-1, 6, (case.length, case.ranges)).int()
        low = torch.randint(0, 5, (case.length, case.ranges)).int()
        return Ranges(place, low, low + torch.randint(0, 4, low.shape).int())
    if case.bits:
        chunk = torch.randint(case.chunks, (columns,)).sort().values
        return ChunkBits.from_selection(torch.rand(*case.bits, case.length, case.chunks) < 0.4, chunk)
    return None


def random_request(case: Features, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Request:
    offsets = [random_offsets(case.length, size) if case.ragged else None for size in case.block_size]
    grid = [-(-case.length // size) for size in case.block_size]
    rows, columns = (n if x is None else len(x) - 1 for n, x in zip(grid, offsets, strict=True))
    rule = random_rule(case, rows, columns)
    blocks, partial = (torch.rand(*case.mask_lists, rows, columns) < density for density in (case.density, 0.6))
    mask = BlockMask.from_blocks(
        blocks,
        case.length,
        case.length,
        case.block_size,
        None if case.key_valid is None else torch.tensor(case.key_valid),
        partial=None if rule is None else partial,
        rule=rule,
        query_offsets=offsets[0],
        key_offsets=offsets[1],
    )
    shape = (case.batch, case.length, case.heads, case.head_dim)
    query, key, value = (torch.randn(shape).to(device, dtype).transpose(1, 2) for _ in range(3))
    order = None
    if case.token_order is not None:
        order = torch.stack([torch.randperm(case.length) for _ in range(case.token_order)]).to(device)
    bias = None if case.key_bias is None else torch.randn(*case.key_bias, columns, device=device)
    return Request(query, key, value, mask.to(device), 0.3, bias, order)


def forward_and_upstream(request: Request) -> list[torch.Tensor]:
    """out and lse as a forward pass gives them, and random gradients of both."""
    out, lse = module("oracle").forward(request)[:2]
    return [out, lse, torch.randn_like(out), torch.randn_like(lse)]


def expected_gradients(request: Request, out_gradient: torch.Tensor, lse_gradient: torch.Tensor):
    """By autograd through the definition."""
    tensors = [x.detach().double().requires_grad_() for x in (request.query, request.key, request.value)]
    options = {"key_bias": request.key_bias, "token_order": request.token_order}
    out, lse = oracle.attention(*tensors, request.mask, request.scale, **options)
    seen = lse > -torch.inf
    loss = (out * out_gradient).sum() + (lse[seen] * lse_gradient[seen]).sum()
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_feature_has_its_gradient(case, backend, seed, poisoned_memory):
    request = random_request(case, device=DEVICE[backend])
    out, lse, *upstream = forward_and_upstream(request)
    found = module(backend).backward(request, out, lse, *upstream)
    for ours, wanted in zip(found, expected_gradients(request, *upstream), strict=True):
        assert ours.dtype == request.query.dtype and ours.shape == wanted.shape
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_and_offsets_may_have_any_strides(backend, seed):
    request = random_request(FEATURES["ragged blocks and bits"], device=DEVICE[backend])

    def spread(x):
        return torch.stack((x, x + 1, x), -1).flatten(-2)[..., ::3]

    fields = ("counts", "partial_counts", "query_offsets", "key_offsets")
    mask = replace(request.mask, **{name: spread(getattr(request.mask, name)) for name in fields})
    given = forward_and_upstream(request)
    expected, found = (module(backend).backward(r, *given) for r in (request, replace(request, mask=mask)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16] + ([torch.bfloat16] if ON_GPU else []), ids=str)
@pytest.mark.parametrize("name", ["order per head", "everything, ranges", "everything, bits"])
def test_half_precision_is_accumulated_in_float32(name, dtype, seed, poisoned_memory):
    pytest.importorskip("triton")
    request = random_request(FEATURES[name], dtype, DEVICE["triton"])
    out, lse, *upstream = forward_and_upstream(request)
    found = module("triton").backward(request, out, lse, *upstream)
    for ours, wanted in zip(found, expected_gradients(request, *upstream), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=ALLOWED[dtype], atol=ALLOWED[dtype])


def hidden_tokens(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (B, H, S): queries that see no key, and keys that nobody sees."""
    tokens = request.mask.token_mask().expand(*request.query.shape[:2], -1, -1)
    hidden = ~tokens.any(3), ~tokens.any(2)
    if request.token_order is None:
        return hidden
    blind, unseen = (oracle.put_back(x[..., None], request.token_order).squeeze(-1) for x in hidden)
    return blind, unseen


def sparse_request(name: str, device: str) -> Request:
    """A request in which some keys are seen by nobody and, if it has a rule, some queries see nothing."""
    case = replace(FEATURES[name], key_valid=(17, 40))
    request = random_request(replace(case, density=0.0 if case.ranges or case.bits else 0.3), device=device)
    if isinstance(request.mask.rule, Ranges):
        request.mask.rule.key_coordinates[3::7] = 100  # in no range
    return request


@pytest.mark.parametrize("name", ["ranges on 1 axis", "bits per sample and head", "order per head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_nobody_sees_do_not_matter(name, backend, seed):
    request = sparse_request(name, DEVICE[backend])
    out, lse, *upstream = forward_and_upstream(request)
    unseen = hidden_tokens(request)[1]
    assert unseen.any()
    key, value = request.key.clone(), request.value.clone()
    key[unseen] = value[unseen] = torch.nan
    before = module(backend).backward(request, out, lse, *upstream)
    after = module(backend).backward(replace(request, key=key, value=value), out, lse, *upstream)
    assert all(torch.equal(clean, found) for clean, found in zip(before, after, strict=True))
    assert not after[1][unseen].any() and not after[2][unseen].any()


@pytest.mark.parametrize("name", ["ranges on 1 axis", "bits per sample and head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_see_nothing_do_not_matter(name, backend, seed):
    # One random mask in many leaves no query blind.
    drawn = (sparse_request(name, DEVICE[backend]) for _ in range(20))
    request = next(request for request in drawn if hidden_tokens(request)[0].any())
    out, lse, out_gradient, lse_gradient = forward_and_upstream(request)
    blind = hidden_tokens(request)[0]
    before = module(backend).backward(request, out, lse, out_gradient, lse_gradient)
    query = request.query.clone()
    query[blind] = out_gradient[blind] = torch.nan
    lse_gradient[blind] = torch.nan
    after = module(backend).backward(replace(request, query=query), out, lse, out_gradient, lse_gradient)
    assert all(torch.equal(clean, found) for clean, found in zip(before, after, strict=True))
    assert not after[0][blind].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_of_out_alone_needs_no_gradient_of_the_log_sum_exp(backend, make_case, new_shape):
    case = make_case(new_shape(heads=1, queries=20, keys=40), device=DEVICE[backend])
    tensors = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    upstream = torch.randn_like(case.query)
    found = torch.autograd.grad(block_sparse_attention(*tensors, case.mask, backend=backend), tensors, upstream)
    expected = torch.autograd.grad(oracle.attention(*tensors, case.mask)[0], tensors, upstream.double())
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="one thread is always deterministic")
def test_gradients_are_the_same_every_time(make_case, new_shape):
    case = make_case(new_shape(batch=2, heads=8, queries=2000, keys=2000, head_dim=64), torch.bfloat16, "cuda")
    first, second = (gradients(block_sparse_attention, case, backend="triton", return_lse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(ON_GPU, reason="the other tests compile it for the GPU here")
def test_compiles_for_hopper_without_spilling_registers():
    pytest.importorskip("triton")
    calls = [f"90, bf16 D128 128x128, {kernel}" for kernel in ("query_kernel", "key_kernel")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_backward.py")
    done = subprocess.run(
        [sys.executable, script], input="\n".join(calls), env=environment, capture_output=True, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2, done.stderr
    for kernel in found:
        assert kernel["HGMMA"] > 0 and kernel["stack"] == 0 and kernel["shared"] <= 227 * 1024
