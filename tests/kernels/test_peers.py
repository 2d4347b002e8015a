"""FlashAttention 4 behind our masks, with a stand-in for the package: what it is given, and that it is not trusted."""

import sys
import types
from typing import NamedTuple

import pytest
import torch

from attnproc.kernels import BlockMask, available_backends, choose_backend, oracle

pytest.importorskip("attnproc.kernels.triton_forward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Tensors(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def obedient(query, key, value, *, softmax_scale, block_sparse_tensors, return_lse):
    """What flash_attn_func promises, computed by the definition: (batch, tokens, heads, head_dim) in and out."""
    lists = block_sparse_tensors
    assert return_lse and not lists.mask_block_cnt.any()
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    lengths = query.shape[2], key.shape[2]
    mask = BlockMask(lists.full_block_cnt, lists.full_block_idx, *lengths, lists.block_size).validate()
    out, lse = oracle.attention(query, key, value, mask, softmax_scale)
    return out.transpose(1, 2).to(query.dtype), lse.float()


def deaf(query, key, value, *, softmax_scale, block_sparse_tensors, return_lse):
    """As a release that ignores block lists."""
    full = BlockMask.full(query.shape[1], key.shape[1], (128, 128), device=query.device)
    swapped = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    out, lse = oracle.attention(*swapped, full, softmax_scale)
    return out.transpose(1, 2).to(query.dtype), lse.float()


def broken(*_, **__):
    raise RuntimeError("no kernel image")


@pytest.fixture
def fa4(monkeypatch):
    """fa4(function): the backend's module with that function in the place of the package."""
    from attnproc.kernels import fa4 as module

    def use(function):
        package, cute, sparsity = (types.ModuleType(f"flash_attn{name}") for name in ("", ".cute", ".cute.s"))
        cute.flash_attn_func, sparsity.BlockSparseTensorsTorch = function, Tensors
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
        monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparsity)
        module._result_problem.cache_clear()
        return module

    yield use
    module._result_problem.cache_clear()


def test_lists_and_scale_reach_the_package(fa4, seed):
    query, key, value = (torch.randn(2, 3, n, 16, device=DEVICE, dtype=torch.float16) for n in (300, 401, 401))
    kept = torch.rand(1, 3, 3, 4, device=DEVICE) < 0.5
    mask = BlockMask.from_blocks(kept, 300, 401, (128, 128))
    out, lse = fa4(obedient)._attention(query, key, value, mask, 0.3)
    expected, expected_lse = oracle.attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "function, problem",
    [(obedient, None), (deaf, "obeys block lists"), (broken, "raised RuntimeError: no kernel image")],
)
def test_an_installation_is_used_only_if_its_result_is_right(function, problem, fa4):
    found = fa4(function)._result_problem(torch.device(DEVICE), torch.float16, 16, (128, 128))
    assert (found is None) if problem is None else (problem in found)


def test_what_it_cannot_take_is_said(monkeypatch):
    query = torch.randn(1, 1, 16, 16)
    monkeypatch.setattr("attnproc.kernels.backends._fa4_problem", lambda: None)
    with pytest.raises(ValueError, match="CUDA tensors, not cpu"):
        choose_backend(query, query, query, BlockMask.full(16, 16, (16, 16)), "fa4")


def test_it_is_not_needed(monkeypatch):
    from attnproc.kernels import backends

    backends._fa4_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "not installed" in available_backends()["fa4"]
    backends._fa4_problem.cache_clear()
