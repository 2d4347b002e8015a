"""The Triton kernel against the float64 definition: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from attnproc.kernels import BlockMask, block_sparse_attention, choose_backend, oracle

forward = pytest.importorskip("attnproc.kernels.triton_forward")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter computes bfloat16 wrongly, so that is tested on a GPU only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_float64_definition(shape, dtype, make_case, close, poisoned_memory):
    case = make_case(shape, dtype, DEVICE)
    out, lse = block_sparse_attention(case.query, case.key, case.value, case.mask, backend="triton", return_lse=True)
    assert out.dtype == dtype and out.stride() == torch.empty_like(case.query).stride()
    close(out, lse, *oracle.attention(case.query, case.key, case.value, case.mask))


def test_published_numbers(p1_blocks, p1_answer, check_p1_answer):
    tensors, rows, total = p1_answer
    mask = BlockMask.from_blocks(p1_blocks, 2560, 2560, (128, 128)).to(DEVICE)
    tensors = [tensor.float().to(DEVICE) for tensor in tensors]
    out, lse = block_sparse_attention(*tensors, mask, backend="triton", return_lse=True)
    check_p1_answer(out, lse, rows, total, 2e-6)


@pytest.mark.parametrize("poison", [1e4, float("nan")], ids=str)
def test_keys_nobody_sees_do_not_matter(poison, make_case, new_shape):
    case = make_case(new_shape(batch=2, queries=60, keys=70, key_valid=(70, 21), density=0.15), device=DEVICE)
    before = block_sparse_attention(case.query, case.key, case.value, case.mask, backend="triton")
    unseen = ~case.mask.token_mask().any(2)[:, 0]
    assert unseen.any()
    key, value = case.key.clone(), case.value.clone()
    key.transpose(1, 2)[unseen] = poison
    value.transpose(1, 2)[unseen] = poison
    after = block_sparse_attention(case.query, key, value, case.mask, backend="triton")
    assert torch.equal(before, after)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("block_size", [(16, 16), (32, 128), (64, 64), (128, 64), (128, 128)], ids=str)
def test_tiles_divide_the_blocks_and_fit_a_small_gpu(block_size, padded_dim, dtype):
    query = torch.empty(0, dtype=dtype)
    query_tile, key_tile, warps, stages = forward.launch_shape(query, padded_dim, block_size)
    assert block_size[0] % query_tile == 0 and block_size[1] % key_tile == 0
    assert min(query_tile, key_tile) >= 16 and warps in (4, 8) and stages >= 1
    assert (query_tile + 2 * stages * key_tile) * padded_dim * query.element_size() <= forward.SMALL_SHARED_MEMORY


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnproc.kernels import triton_forward

kernel = triton_forward.forward_kernel
query_tile, key_tile, warps, stages = triton_forward.launch_shape(torch.empty(0, dtype=torch.bfloat16), 128, (128, 64))
constants = dict(QUERY_BLOCK=128, KEY_BLOCK=64, QUERY_TILE=query_tile, KEY_TILE=key_tile, HEAD_DIM=128,
                 PADDED_DIM=128, RAGGED=True, PRECISION=None)
pointers = dict.fromkeys(("query", "key", "value", "out"), "*bf16") | {"lse": "*fp32", "scale": "fp32"}
pointers |= dict.fromkeys(("order", "counts", "indices", "key_valid"), "*i32")
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
           if name in pointers and name != "scale" or name.split("_")[0] in ("query", "key", "value", "out")
           and name.split("_")[-1] in ("batch", "head", "token")}
constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
assert "wgmma" in compiled.asm["ptx"] and compiled.metadata.shared <= triton_forward.SMALL_SHARED_MEMORY
print("compiled")
"""


@pytest.mark.skipif(ON_GPU, reason="the other tests compile it for the GPU here")
def test_compiles_for_a_gpu_that_is_not_here():
    """The interpreter takes more than the compiler does: this one builds machine code for sm_90, with tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr


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
