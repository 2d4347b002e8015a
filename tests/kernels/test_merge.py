"""merge_attention: what is computed over parts of the keys equals one call over all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnproc.kernels import BlockMask, block_sparse_attention, oracle
from attnproc.kernels.merge import merge_attention


def random_parts(parts: int, dtype: torch.dtype = torch.float64):
    """Tensors, disjoint masks, each key block in one of them or in none, and the mask of their union."""
    tensors = [torch.randn(2, 3, n, 8).to(dtype) for n in (37, 50, 50)]
    part_of = torch.randint(-1, parts, (2, 3, 5, 7))
    part_of[:, :, 1] = -1  # the second query block sees nothing
    blocks = [*(part_of == i for i in range(parts)), part_of >= 0]
    *masks, union = (BlockMask.from_blocks(kept, 37, 50, (8, 8)) for kept in blocks)
    return tensors, masks, union


@settings(max_examples=30, deadline=None)
@given(parts=st.integers(1, 5), dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 2**31))
def test_parts_merge_to_attention_over_the_union(parts, dtype, seed):
    torch.manual_seed(seed)
    tensors, masks, union = random_parts(parts, dtype)
    out, lse = merge_attention(*(block_sparse_attention(*tensors, mask, return_lse=True) for mask in masks))
    expected, expected_lse = oracle.attention(*tensors, union)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_taken_in_float32(dtype, seed):
    """Rounded once, at the end: merging 64 equal parts gives the parts back to the bit."""
    out, lse = torch.randn(1, 2, 9, 4).to(dtype), torch.randn(1, 2, 9)
    merged, log_sum = merge_attention(*[(out, lse)] * 64)
    assert merged.dtype == dtype and torch.equal(merged, out)
    torch.testing.assert_close(log_sum, lse + torch.tensor(64.0).log())


def test_gradients_through_the_merge_are_those_of_one_call(seed):
    tensors, masks, union = random_parts(3)
    weights = torch.randn(2, 3, 37, 8, dtype=torch.float64), torch.randn(2, 3, 37)
    found = []
    for merged in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        if merged:
            out, lse = merge_attention(*(block_sparse_attention(*leaves, mask, return_lse=True) for mask in masks))
        else:
            out, lse = oracle.attention(*leaves, union)
        seen = lse > -torch.inf
        loss = (out * weights[0]).sum() + (lse[seen] * weights[1][seen]).sum()
        found.append(torch.autograd.grad(loss, leaves))
    for ours, expected in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradcheck(seed):
    parts = [(torch.randn(1, 1, 3, 2).double(), torch.randn(1, 1, 3).double()) for _ in range(3)]
    parts[0][1][0, 0, 0] = parts[1][1][0, 0, 1] = -torch.inf
    flat = [tensor.requires_grad_() for part in parts for tensor in part]

    def merge(*tensors):
        return merge_attention(*zip(tensors[::2], tensors[1::2], strict=True))

    # Finite differences cannot step from -inf, so the -inf entries are set inside.
    seen = [torch.isfinite(tensor.detach()) for tensor in flat]
    finite = [torch.where(ok, x.detach(), 0.0).requires_grad_() for ok, x in zip(seen, flat, strict=True)]
    assert torch.autograd.gradcheck(
        lambda *xs: merge(*(torch.where(ok, x, -torch.inf) for ok, x in zip(seen, xs, strict=True))), finite
    )


@pytest.mark.parametrize("junk", [0.0, float("nan"), float("inf")], ids=str)
def test_a_part_without_keys_is_left_out_whatever_it_holds(junk, seed):
    out, lse = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5)
    empty = torch.full_like(out, junk), torch.full_like(lse, -torch.inf)
    merged, log_sum = merge_attention(empty, (out, lse), empty)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(log_sum, lse)
    nothing, none = merge_attention(empty, empty)
    assert torch.equal(nothing, torch.zeros_like(out)) and torch.equal(none, empty[1])


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_scores_of_any_size_stay_finite(shift, seed):
    parts = [(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5)) for _ in range(3)]
    out, lse = merge_attention(*parts)
    moved, log_sum = merge_attention(*((part, x + shift) for part, x in parts))
    torch.testing.assert_close(moved, out, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(log_sum - shift, lse, rtol=5e-3, atol=5e-3)


def test_nan_is_not_hidden(seed):
    out, lse = torch.randn(1, 1, 2, 4), torch.tensor([[[float("nan"), 0.0]]])
    merged, log_sum = merge_attention((out, lse), (out, torch.zeros(1, 1, 2)))
    assert merged[0, 0, 0].isnan().all() and log_sum[0, 0, 0].isnan()
    torch.testing.assert_close(merged[0, 0, 1], out[0, 0, 1])


OUT, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
WRONG = {
    "none": ((), "parts"),
    "not a pair": (((OUT,),), r"parts\[0\]"),
    "a tensor": ((OUT,), r"parts\[0\]"),
    "lse of another length": (((OUT, LSE[..., :2]),), r"parts\[0\]"),
    "lse with a head_dim": (((OUT, OUT),), r"parts\[0\]"),
    "other queries": (((OUT, LSE), (OUT[:, :1], LSE[:, :1])), r"parts\[1\]"),
    "other dtype": (((OUT, LSE), (OUT.half(), LSE)), r"parts\[1\]"),
    "other lse dtype": (((OUT, LSE), (OUT, LSE.double())), r"parts\[1\]"),
    "other device": (((OUT, LSE), (OUT, LSE.to("meta"))), r"parts\[1\]"),
    "integers": (((OUT.int(), LSE),), r"parts\[0\]"),
}


@pytest.mark.parametrize("parts, name", WRONG.values(), ids=WRONG.keys())
def test_wrong_parts_are_refused(parts, name):
    with pytest.raises(ValueError, match=rf"^{name}: got .+; expected .+\. .+\.$"):
        merge_attention(*parts)
