"""Gradients of block_sparse_attention against autograd through the float64 definition."""

import pytest
import torch

from attnproc.kernels import block_sparse_attention, oracle


def gradients(call, case, **options):
    """out, lse and the gradients of query, key and value for one fixed loss of both."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    out, lse = call(*tensors, case.mask, **options)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(out.shape, generator=generator).to(out.device)
    log_weights = torch.randn(lse.shape, generator=generator).to(out.device)
    seen = lse > -torch.inf
    loss = (out.double() * weights).sum() + (lse.double()[seen] * log_weights[seen]).sum()
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("backend", ["oracle"])
def test_gradients_equal_autograd_of_the_definition(shape, backend, make_case, poisoned_memory):
    case = make_case(shape, torch.float32)
    expected = gradients(oracle.attention, case)
    found = gradients(block_sparse_attention, case, backend=backend, return_lse=True)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == case.query.dtype
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_definition(make_case, new_shape):
    case = make_case(new_shape(heads=1, queries=12, keys=20, head_dim=3, block_size=(4, 8), density=0.6), torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    assert torch.autograd.gradcheck(lambda *qkv: oracle.attention(*qkv, case.mask)[0], tensors)
