"""block_sparse_attention under torch.compile: one operator in the graph, the same numbers, the same gradients."""

from dataclasses import replace

import pytest
import torch

from attnproc.kernels import BlockMask, block_sparse_attention, oracle
from attnproc.kernels.op import module
from attnproc.kernels.rules import Ranges

TOKENS = 40


class Attention(torch.nn.Module):
    """A linear layer before and after attention under a mask made outside, tokens first as in diffusers."""

    def __init__(self, mask: BlockMask, backend: str = "cpu"):
        super().__init__()
        self.mask, self.backend = mask, backend
        self.project, self.finish = torch.nn.Linear(16, 96), torch.nn.Linear(32, 16)

    def forward(self, x):
        query, key, value = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.project(x).chunk(3, dim=-1))
        out, lse = block_sparse_attention(query, key, value, self.mask, backend=self.backend, return_lse=True)
        return self.finish(out.transpose(1, 2).flatten(2)) + lse.clamp(min=-9.0).mean(1)[..., None]


def random_mask(partial: bool = False) -> BlockMask:
    blocks = torch.rand(1, 2, 3, 3) < 0.5
    blocks |= torch.eye(3, dtype=torch.bool)
    if not partial:
        return BlockMask.from_blocks(blocks, TOKENS, TOKENS, (16, 16), torch.tensor([TOKENS, 35]))
    place = torch.randint(-1, 4, (TOKENS, 1)).int()
    rule = Ranges(place, place.clamp(min=0) - 1, place + 2)
    return BlockMask.from_blocks(~blocks, TOKENS, TOKENS, (16, 16), partial=blocks, rule=rule)


def result_and_gradients(call, model, x):
    out = call(x)
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), [x, *model.parameters()])]


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    # What lies in the usual folder may have been compiled for other instructions.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("partial", [False, True], ids=["whole blocks", "partial blocks"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, partial, seed, fresh_compiler):
    model = Attention(random_mask(partial))
    x = torch.randn(2, TOKENS, 16, requires_grad=True)
    expected = result_and_gradients(model, model, x)
    found = result_and_gradients(torch.compile(model, fullgraph=True, backend=compiler), model, x)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_second_mask_of_the_same_shape_does_not_recompile(seed, fresh_compiler):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model = Attention(random_mask())
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for _ in range(3):
        x = torch.randn(2, TOKENS, 16)
        torch.testing.assert_close(compiled(x), model(x))
        # One more listed block or less changes the width of the lists, and with it the shape.
        blocks = model.mask.to_blocks().flip(1)
        model.mask = BlockMask.from_blocks(blocks, TOKENS, TOKENS, (16, 16), model.mask.key_valid.flip(0))
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_derived_from_a_mask_is_kept_between_calls(compiled, seed, monkeypatch, fresh_compiler):
    """Both passes of every call get the living mask, not one put together again from its tensors."""
    seen, cpu = [], module("cpu")
    for name in ("forward", "backward"):
        run = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda request, *more, run=run: seen.append(request.mask) or run(request, *more))
    model = Attention(random_mask(partial=True).validate())
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(2):
        call(torch.randn(2, TOKENS, 16)).sum().backward()
    assert len(seen) == 4 and all(mask is model.mask for mask in seen)


@pytest.mark.parametrize("use", [lambda mask: mask.to("cpu"), lambda mask: replace(mask)], ids=["moved", "copied"])
def test_a_short_lived_mask_of_the_same_tensors_takes_nothing_away(use, seed, monkeypatch):
    seen, cpu, mask = [], module("cpu"), random_mask()
    run = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda request: seen.append(request.mask) or run(request))
    query = torch.randn(2, 2, TOKENS, 16)
    for _ in range(2):
        use(mask)
        block_sparse_attention(query, query, query, mask, backend="cpu")
    assert all(found is mask for found in seen) and len(seen) == 2
    assert mask.to("cpu") is mask


def operator_arguments(layout: str, partial: bool, backend: str):
    if layout == "tokens first":
        tensors = [torch.randn(2, TOKENS, 2, 24).transpose(1, 2) for _ in range(3)]
    elif layout == "channels before tokens":
        tensors = [torch.randn(2, 2, 24, TOKENS).transpose(2, 3) for _ in range(3)]
    else:
        tensors = [torch.randn(2, 2, TOKENS, 24) for _ in range(3)]
    mask = random_mask(partial)
    sizes = [TOKENS, TOKENS, 16, 16, 0 if partial else -1]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    return *tensors, torch.randn(1, 2, 3), None, None, mask.tensors, sizes, 0.3, "", backend


@pytest.mark.parametrize(
    "backend, partial, layout",
    [
        ("cpu", False, "heads first"),
        ("cpu", False, "tokens first"),
        ("cpu", True, "channels before tokens"),
        ("oracle", False, "tokens first"),
        ("triton", False, "channels before tokens"),
    ],
)
def test_the_operator_does_what_it_tells_the_compiler(backend, partial, layout, seed):
    """Strides and dtypes of its results, no hidden mutation, a registered gradient: torch's own checks."""
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton takes no CPU tensors where there is a GPU")
    arguments = operator_arguments(layout, partial, backend)
    checks = torch.library.opcheck(torch.ops.attnproc.block_sparse_attention.default, arguments)
    assert len(checks) == 4 and set(checks.values()) == {"SUCCESS"}


def test_the_compiled_operator_equals_the_definition(seed, fresh_compiler):
    mask = random_mask()
    query, key, value = (torch.randn(2, 2, TOKENS, 24) for _ in range(3))
    call = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    out, lse = call(query, key, value, mask, return_lse=True)
    expected, expected_lse = oracle.attention(query, key, value, mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
