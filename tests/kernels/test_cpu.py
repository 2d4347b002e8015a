"""The CPU backend with every option, alone and together, against the float64 definitions."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnproc.kernels import (
    BlockMask,
    ChunkBits,
    Quantization,
    Ranges,
    block_sparse_attention,
    cpu,
    cpu_flash,
    cpu_plan,
    oracle,
    quantize_oracle,
)
from attnproc.kernels.cpu_tiles import Tiles
from attnproc.kernels.request import Request

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Gradients: rounding of out, of the inputs and of the gradients themselves.
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Options:
    """A row of the table of options. Pairs are (samples, heads)."""

    batch: int = 2
    heads: int = 2
    length: int = 83
    head_dim: int = 12
    block_size: tuple[int, int] = (16, 8)
    density: float = 0.4
    mask_lists: tuple[int, int] = (1, 1)
    key_valid: tuple[int, ...] | None = None
    ragged: bool = False
    axes: int = 0
    bits: tuple[int, int] | None = None
    key_bias: tuple[int, int] | None = None
    token_order: int | None = None


OPTIONS = {
    "plain": Options(key_valid=(83, 41), mask_lists=(1, 2)),
    "bias": Options(key_bias=(2, 2)),
    "shared bias, padding": Options(key_bias=(1, 1), key_valid=(83, 30), mask_lists=(2, 1)),
    "one order": Options(token_order=1, mask_lists=(1, 2)),
    "order per head, padding": Options(token_order=2, key_valid=(1, 60)),
    "ranges on 1 axis": Options(axes=1, length=80, block_size=(16, 16)),
    "ranges on 3 axes, padding": Options(axes=3, key_valid=(0, 50), mask_lists=(2, 2)),
    "bits": Options(bits=(1, 1)),
    "bits per sample and head": Options(bits=(2, 2), key_valid=(83, 41)),
    "nothing but partial blocks": Options(bits=(1, 2), density=0.0),
    "ragged blocks": Options(ragged=True, mask_lists=(2, 2)),
    "ragged blocks of any size": Options(ragged=True, block_size=(7, 31), key_valid=(17, 83), heads=1),
    "all, ranges": Options(
        axes=2, ragged=True, key_bias=(1, 2), token_order=2, key_valid=(70, 83), mask_lists=(2, 2), density=0.3
    ),
    "all, bits": Options(bits=(2, 1), ragged=True, key_bias=(2, 1), token_order=1, key_valid=(83, 0), density=0.2),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def random_offsets(length: int, size: int) -> torch.Tensor:
    """Blocks of 1 to `size` tokens."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(bounds[-1] + int(torch.randint(1, size + 1, ())), length))
    return torch.tensor(bounds, dtype=torch.int32)


def make_request(options: Options, dtype: torch.dtype = torch.float32, **more) -> Request:
    length = options.length
    offsets = [random_offsets(length, size) if options.ragged else None for size in options.block_size]
    grid = [
        -(-length // size) if x is None else len(x) - 1 for x, size in zip(offsets, options.block_size, strict=True)
    ]
    rule = None
    if options.axes:
        low = torch.randint(-1, 5, (length, options.axes), dtype=torch.int32)
        rule = Ranges(torch.randint(-1, 6, (length, options.axes), dtype=torch.int32), low, low + 3)
    elif options.bits:
        chunks = torch.randint(0, 40, (grid[1],)).sort().values.int()
        rule = ChunkBits.from_selection(torch.rand(*options.bits, length, 40) < 0.4, chunks)
    mask = BlockMask.from_blocks(
        torch.rand(*options.mask_lists, *grid) < options.density,
        length,
        length,
        options.block_size,
        None if options.key_valid is None else torch.tensor(options.key_valid),
        partial=None if rule is None else torch.rand(*options.mask_lists, *grid) < 0.5,
        rule=rule,
        query_offsets=offsets[0],
        key_offsets=offsets[1],
    )
    shape = (options.batch, length, options.heads, options.head_dim)
    tensors = [torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3)]
    order = None
    if options.token_order is not None:
        order = torch.stack([torch.randperm(length) for _ in range(options.token_order)])
    bias = None if options.key_bias is None else torch.randn(*options.key_bias, grid[1])
    return Request(*tensors, mask, 0.4, bias, order, **more)


def definition(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle.attention(
        request.query,
        request.key,
        request.value,
        request.mask,
        request.scale,
        key_bias=request.key_bias,
        token_order=request.token_order,
        skip_threshold=request.skip_threshold,
    )


@pytest.fixture
def small_steps(monkeypatch):
    """A step of so few key blocks that short lists take several; one of 16 has more than one query block in it."""

    def shrink(mask: BlockMask, blocks: int = 2) -> None:
        monkeypatch.setattr(cpu_plan, "SCORES", blocks * mask.block_size[0] * mask.block_size[1])
        monkeypatch.setattr(cpu_plan, "KEYS", 4 * mask.block_size[1])

    return shrink


@every_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_float64_definition(options, dtype, close, seed, poisoned_memory):
    request = make_request(options, dtype)
    out, lse, skipped = cpu.forward(request)
    assert out.dtype == dtype and not skipped.any()
    assert skipped.shape == (*request.query.shape[:2], request.mask.grid[0]) and skipped.dtype == torch.int32
    close(out, lse, *definition(request))


@every_option
@pytest.mark.parametrize("blocks", [2, 16])
def test_a_list_cut_into_steps_gives_the_same(options, blocks, close, seed, small_steps, poisoned_memory):
    def takes_several(request):
        small_steps(request.mask, blocks)
        plan = cpu_plan.plan(request.mask, options.batch, options.heads, options.head_dim)
        return max(len(batch.steps) for batch in plan) > 1

    # The lists of a random mask may all fit into one step.
    request = next(filter(takes_several, (make_request(options) for _ in range(100))))
    out, lse, _ = cpu.forward(request)
    close(out, lse, *definition(request))


def test_neighbouring_key_blocks_need_no_gathering(seed, close, monkeypatch, poisoned_memory):
    """A row alone whose list is a run reads the keys where they are: any run, of any sample and head, tails too."""
    monkeypatch.setattr(cpu_flash, "GATHER_BYTES", 1)
    first, last = torch.randint(0, 7, (2, 2, 3, 5)).sort(0).values
    blocks = (torch.arange(7) >= first[..., None]) & (torch.arange(7) < last[..., None])
    mask = BlockMask.from_blocks(blocks, 37, 51, (8, 8), torch.tensor([51, 29]))
    request = Request(*(torch.randn(2, 3, n, 16).half() for n in (37, 51, 51)), mask, 0.25)
    out, lse, _ = cpu.forward(request)
    close(out, lse, *definition(request))
    # No run: the first and the last block of three.
    ends = BlockMask.from_blocks(torch.tensor([[True, False, True]]), 8, 24, (8, 8))
    request = Request(*(torch.randn(1, 1, n, 16).half() for n in (8, 24, 24)), ends, 0.25)
    close(*cpu.forward(request)[:2], *definition(request))


@pytest.mark.parametrize(
    ("largest", "values", "small"),
    [
        (10.0, 1.0, True),
        (38.0, 1.0, True),
        (38.0, 1e-18, True),
        (90.0, 1.0, False),
        (1e4, 1.0, False),
        (30.0, 1e33, False),
    ],
)
@pytest.mark.parametrize("name", ["plain", "all, ranges"])
def test_scores_and_values_of_any_size(name, largest, values, small, seed, poisoned_memory):
    """Plain exponentials where all stay in range, the online softmax elsewhere; -`largest` is as good as `largest`."""
    given = make_request(OPTIONS[name])
    norms = [x.norm(dim=-1).max() for x in (given.query, given.key)]
    query, bias = given.query * (largest / (norms[0] * norms[1] * given.scale)), given.key_bias
    if bias is not None:
        query, bias = query / 2, bias * (largest / 2 / bias.abs().max())
    for sign in (1, -1):
        request = replace(given, query=sign * query, value=given.value * values, key_bias=bias)
        tiles = Tiles(request.query, request.key, request.value, request.mask, request.scale, key_bias=bias)
        assert tiles.small_rows().all() == small
        out, lse, _ = cpu.forward(request)
        expected, expected_lse = definition(request)
        # A score of 10,000 is known to some 1e-3 in float32.
        allowed = max(largest, 1.0) * 5e-6
        torch.testing.assert_close(out.double(), expected, rtol=allowed, atol=allowed * values)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=allowed, atol=allowed)


@every_option
@pytest.mark.parametrize("blocks", [2, 16, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_definition(options, dtype, blocks, seed, small_steps, poisoned_memory):
    request = make_request(options, dtype)
    small_steps(request.mask, blocks)
    out, lse, _ = cpu.forward(request)
    given = torch.randn_like(out), torch.randn_like(lse)
    expected = oracle.gradients(
        request.query,
        request.key,
        request.value,
        request.mask,
        request.scale,
        *given,
        key_bias=request.key_bias,
        token_order=request.token_order,
    )
    allowed = GRADIENT_TOLERANCE[dtype]
    for ours, wanted in zip(cpu.backward(request, out, lse, *given), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=allowed, atol=allowed)


def test_gradients_are_the_same_in_every_run(seed):
    request = make_request(OPTIONS["all, ranges"])
    out, lse, _ = cpu.forward(request)
    given = torch.randn_like(out), torch.randn_like(lse)
    first, second = (cpu.backward(request, out, lse, *given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_bias_can_hide_key_blocks(size, seed, close, small_steps):
    """A bias of -inf, for small scores and for large ones, also where a whole step is hidden."""
    request = make_request(OPTIONS["bias"])
    bias = request.key_bias.clone()
    bias[..., :4] = bias[0, 0] = -torch.inf
    request = replace(request, query=request.query * size, key_bias=bias)
    mask = BlockMask.full(request.mask.query_length, request.mask.key_length, request.mask.block_size)
    request = replace(request, mask=mask)
    small_steps(mask)
    out, lse, _ = cpu.forward(request)
    expected = definition(request)
    allowed = 5e-6 * size  # scores of some 500 are known to some 1e-4 in float32
    torch.testing.assert_close(out.double(), expected[0], rtol=allowed, atol=allowed)
    torch.testing.assert_close(lse.double(), expected[1], rtol=allowed, atol=allowed)
    assert (lse[0, 0] == -torch.inf).all() and lse[0, 1].isfinite().all()


@pytest.mark.parametrize("name", ["ranges on 3 axes, padding", "bits per sample and head", "all, ranges", "all, bits"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_keys_nobody_sees_do_not_matter(name, poison, seed):
    """Neither in padding nor in partial blocks, and not in the gradients of the others."""
    request = make_request(OPTIONS[name])
    visible = request.mask.token_mask().expand(2, 2, -1, -1).any(2)[..., None]
    if request.token_order is not None:
        visible = oracle.put_back(visible, request.token_order)
    assert not visible.all()
    changed = replace(
        request, key=request.key.masked_fill(~visible, poison), value=request.value.masked_fill(~visible, poison)
    )
    before, after = cpu.forward(request), cpu.forward(changed)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    given = torch.randn_like(before[0]), torch.randn_like(before[1])
    gradients = (cpu.backward(x, *found[:2], *given) for x, found in ((request, before), (changed, after)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_the_next_ragged_block_could_see_does_not_matter():
    """By the rule query 1 sees key 1, but its block lists no key, so nobody does; query 0 is in a block of its own."""
    rule = Ranges(torch.tensor([[0], [1]]).int(), torch.zeros(2, 1).int(), torch.tensor([[1], [2]]).int())
    partial, offsets = torch.tensor([[True], [False]]), torch.tensor([0, 1, 2]).int()
    mask = BlockMask.from_blocks(
        torch.zeros_like(partial), 2, 2, (2, 2), partial=partial, rule=rule, query_offsets=offsets
    )
    value = torch.tensor([3.0, torch.nan]).view(1, 1, 2, 1)
    out = block_sparse_attention(torch.ones(1, 1, 2, 1), value, value, mask, backend="cpu")
    assert out.flatten().tolist() == [3.0, 0.0]


@every_option
@pytest.mark.parametrize("threshold", [0.3, 3.0, torch.inf])
def test_skips_the_blocks_that_the_definition_skips(options, threshold, close, seed, poisoned_memory):
    limits = torch.full((options.heads,), threshold)
    limits[-1] += 0.5  # heads have their own
    request = make_request(options, skip_threshold=limits)
    out, lse, skipped = cpu.forward(request)
    tensors = [request.query, request.key]
    if request.token_order is not None:
        tensors = [oracle.take(tensor, request.token_order) for tensor in tensors]
    blocks = oracle.skipped_blocks(*tensors, request.mask, request.scale, limits, key_bias=request.key_bias)
    expected = blocks.sum(-1, dtype=torch.int32)
    assert torch.equal(skipped, expected)
    assert threshold < torch.inf or not skipped.any()
    close(out, lse, *definition(request))


@pytest.mark.parametrize("gap, skips", [(2.9, True), (3.1, False)])
def test_blocks_below_the_threshold_are_skipped_and_counted(gap, skips, seed):
    """Base-2 scores are 3 in the first key block and 0 in the other three."""
    query, key, value = torch.zeros(1, 1, 32, 4), torch.zeros(1, 1, 32, 4), torch.randn(1, 1, 32, 4)
    query[..., 0], key[:, :, :8, 0] = 1.0, 3.0 * math.log(2.0)
    mask = BlockMask.full(32, 32, (8, 8))
    out, lse, skipped = cpu.forward(Request(query, key, value, mask, 1.0, skip_threshold=torch.tensor([gap])))
    assert (skipped == (3 if skips else 0)).all()
    if skips:
        torch.testing.assert_close(out, value[:, :, :8].mean(2, keepdim=True).expand_as(out))
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(8 * 8)))
    else:
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(8 * 8 + 24)))


@pytest.mark.parametrize("listed", [False, True], ids=["no block", "padding alone"])
@pytest.mark.parametrize(
    "option", [{"skip_threshold": 3.0}, {"quantization": "int8"}, {"key_bias": torch.zeros(1, 1, 4)}]
)
def test_where_nobody_sees_a_key_all_is_zero(option, listed, seed, poisoned_memory):
    blocks = torch.full((4, 4), listed)
    mask = BlockMask.from_blocks(blocks, 30, 30, (8, 8), torch.zeros(2).int() if listed else None)
    tensors = [torch.randn(2, 3, 30, 8) for _ in range(3)]
    out, lse, skipped = block_sparse_attention(*tensors, mask, return_lse=True, return_skipped=True, **option)
    assert not out.any() and (lse == -torch.inf).all()
    assert (skipped == (4 if listed and "skip_threshold" in option else 0)).all()


QUANTIZATIONS = [
    Quantization(),
    Quantization(group="block", pv="fp8"),
    Quantization(pv="int8"),
    Quantization("int4", smooth_key=False),
]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda q: f"{q.name} per {q.group}")
@pytest.mark.parametrize("threshold", [None, 2.0], ids=["all blocks", "skipping"])
@pytest.mark.parametrize("name", ["bias", "order per head, padding", "ragged blocks", "all, ranges", "all, bits"])
def test_quantization_follows_its_definition(name, threshold, quantization, seed, poisoned_memory):
    options = OPTIONS[name]
    limits = None if threshold is None else torch.full((options.heads,), threshold)
    request = make_request(options, quantization=quantization, skip_threshold=limits)
    out, lse, skipped = cpu.forward(request)
    expected, expected_lse, expected_skipped = quantize_oracle.forward(request)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(skipped, expected_skipped)
    # A weight next to a rounding boundary may go the other way, by 1/16 of itself.
    allowed = 0.07 * request.value.abs().max().item() if quantization.pv else 2e-5
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=allowed)
    assert float((out - expected).abs().mean()) < (2e-3 if quantization.pv else 2e-6)


class Largest(TorchDispatchMode):
    """Records the largest storage that any operation returned, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


LARGE = {
    "ranges": Options(axes=1, density=0.02),
    "bits, bias": Options(bits=(1, 1), key_bias=(1, 1), density=0.02),
    "ragged, ordered": Options(ragged=True, token_order=1, density=0.05),
    "full": Options(density=1.0),
}


@pytest.mark.parametrize("options", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("more", ["forward", "backward", "skipping", "quantized"])
def test_memory_grows_with_tokens_not_their_square(options, more, seed):
    tokens, head_dim = 4096, 16
    options = replace(options, batch=1, heads=1, length=tokens, head_dim=head_dim, block_size=(128, 128))
    request = make_request(options)
    if more == "skipping":
        request = replace(request, skip_threshold=torch.tensor([4.0]))
    if more == "quantized":
        request = replace(request, quantization=Quantization(pv="int8"))
    with Largest() as largest:
        out, lse, _ = cpu.forward(request)
        if more == "backward":
            cpu.backward(request, out, lse, out, lse)
    assert 0 < largest.bytes <= 4 * 8 * tokens * head_dim < tokens * tokens / 4
