"""block_sparse_attention on the CPU backends against the float64 definition."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnproc.kernels import BlockMask, available_backends, block_sparse_attention, choose_backend, oracle

CPU_BACKENDS = ("cpu", "flex", "oracle")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("cpu", torch.float32),
        ("cpu", torch.float16),
        ("cpu", torch.bfloat16),
        ("cpu", torch.float64),
        ("flex", torch.float32),
        ("flex", torch.float16),
    ],
    ids=str,
)
def test_equals_the_float64_definition(shape, backend, dtype, make_case, close, poisoned_memory):
    case = make_case(shape, dtype)
    out, lse = block_sparse_attention(case.query, case.key, case.value, case.mask, backend=backend, return_lse=True)
    assert out.dtype == dtype
    close(out, lse, *oracle.attention(case.query, case.key, case.value, case.mask))


def test_the_definition_is_softmax_over_the_token_mask(make_case, new_shape):
    """The oracle itself, on the two things torch can say independently: dense attention, and a boolean mask."""
    case = make_case(new_shape(batch=2, queries=50, keys=70, density=0.9), torch.float64)
    tokens = case.mask.token_mask()
    expected = torch.nn.functional.scaled_dot_product_attention(case.query, case.key, case.value, attn_mask=tokens)
    out, lse = oracle.attention(case.query, case.key, case.value, case.mask)
    seen = tokens.any(-1).expand(2, 2, 50)
    torch.testing.assert_close(out[seen], expected[seen])
    scores = case.query @ case.key.transpose(-1, -2) / 4.0
    torch.testing.assert_close(lse, scores.masked_fill(~tokens, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_published_numbers(backend, p1_blocks, p1_answer, check_p1_answer):
    tensors, rows, total = p1_answer
    mask = BlockMask.from_blocks(p1_blocks, 2560, 2560, (128, 128))
    assert mask.density == 378 / 400
    out, lse = block_sparse_attention(*tensors, mask, backend=backend, return_lse=True)
    check_p1_answer(out, lse, rows, total, 2e-8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scale_is_applied_to_the_scores(backend, make_case, new_shape, close):
    case = make_case(new_shape(queries=40, keys=40))
    for scale in (0.0, -0.3, 2.0):
        out, lse = block_sparse_attention(
            case.query, case.key, case.value, case.mask, scale=scale, backend=backend, return_lse=True
        )
        close(out, lse, *oracle.attention(case.query, case.key, case.value, case.mask, scale))


@pytest.mark.parametrize("blocks", [(1, 1), (5, 7), (100, 3)], ids=str)
def test_cpu_takes_any_block_size(blocks, make_case, new_shape, close):
    case = make_case(new_shape(queries=37, keys=29, block_size=blocks, mask_heads=True))
    out, lse = block_sparse_attention(case.query, case.key, case.value, case.mask, return_lse=True)
    close(out, lse, *oracle.attention(case.query, case.key, case.value, case.mask))


@pytest.mark.parametrize("backend", ["cpu", "oracle"])
@pytest.mark.parametrize("poison", [1e4, float("nan"), float("inf")], ids=str)
def test_keys_nobody_sees_do_not_matter(backend, poison, make_case, new_shape):
    case = make_case(new_shape(batch=2, queries=60, keys=70, key_valid=(70, 21), density=0.15))
    before = block_sparse_attention(case.query, case.key, case.value, case.mask, backend=backend)
    unseen = ~case.mask.token_mask().any(2)[:, 0]  # (batch, keys)
    assert unseen.any()
    key, value = case.key.clone(), case.value.clone()
    key.transpose(1, 2)[unseen] = poison
    value.transpose(1, 2)[unseen] = poison
    after = block_sparse_attention(case.query, key, value, case.mask, backend=backend)
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_query_is_not_changed_by_keys_only_others_see(backend, make_case, new_shape):
    case = make_case(new_shape(heads=1, queries=64, keys=64, density=0.5))
    before = block_sparse_attention(case.query, case.key, case.value, case.mask, backend=backend)
    for row in range(4):
        unseen = ~case.mask.token_mask()[0, 0, row * 16]
        key, value = case.key.clone(), case.value.clone()
        key[:, :, unseen] = value[:, :, unseen] = 1e4
        after = block_sparse_attention(case.query, key, value, case.mask, backend=backend)
        assert torch.equal(before[:, :, row * 16 : row * 16 + 16], after[:, :, row * 16 : row * 16 + 16])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_samples_equal_two_calls(backend, make_case, new_shape):
    case = make_case(new_shape(batch=2, queries=60, keys=50, key_valid=(50, 31), mask_batch=True, mask_heads=True))
    both, lse = block_sparse_attention(case.query, case.key, case.value, case.mask, backend=backend, return_lse=True)
    for i in range(2):
        one = slice(i, i + 1)
        mask = BlockMask.from_blocks(case.blocks[one], 60, 50, (16, 16), torch.tensor([(50, 31)[i]]))
        out, log_sum = block_sparse_attention(
            case.query[one], case.key[one], case.value[one], mask, backend=backend, return_lse=True
        )
        torch.testing.assert_close(both[one], out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse[one], log_sum, rtol=1e-6, atol=1e-6)


def test_key_heads_are_shared_by_groups_of_query_heads(make_case, new_shape):
    case = make_case(new_shape(heads=6, queries=50, keys=60, mask_heads=True))
    query, key, value = case.query, case.key[:, :2].clone().requires_grad_(), case.value[:, :2]
    out = block_sparse_attention(query, key, value, case.mask, backend="oracle")
    whole = [x.detach().repeat_interleave(3, dim=1) for x in (key, value)]
    assert torch.equal(out, block_sparse_attention(query, *whole, case.mask, backend="oracle"))
    (gradient,) = torch.autograd.grad(out.sum(), key)
    assert gradient.shape == key.shape and gradient.abs().sum() > 0


@pytest.mark.parametrize("options", ["plain", "token_order", "int8"])
def test_autocast_changes_nothing(options, make_case, new_shape):
    case = make_case(new_shape(queries=50, keys=50))
    more = {"token_order": {"token_order": torch.randperm(50)[None]}, "int8": {"quantization": "int8"}}.get(options, {})
    expected = block_sparse_attention(case.query, case.key, case.value, case.mask, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(case.query, case.key, case.value, case.mask, **more)
    assert torch.equal(out, expected)


def test_one_mask_serves_other_batches_heads_and_dtypes(make_case, new_shape, close):
    """What the CPU path keeps about a mask must not leak from one call's shape into another's."""
    mask = make_case(new_shape(queries=50, keys=60)).mask
    for batch, heads, head_dim, dtype in (
        (1, 1, 8, torch.float32),
        (2, 3, 8, torch.float16),
        (1, 2, 32, torch.float64),
    ):
        query, key, value = (torch.randn(batch, heads, n, head_dim).to(dtype) for n in (50, 60, 60))
        out, lse = block_sparse_attention(query, key, value, mask, return_lse=True)
        close(out, lse, *oracle.attention(query, key, value, mask))


def test_a_split_over_keys_merges_by_lse(make_case, new_shape):
    """Attention over two disjoint masks, weighted by their log-sum-exps, is attention over the union."""
    case = make_case(new_shape(queries=64, keys=64, density=1.0))
    first = torch.rand(4, 4) < 0.5
    parts = []
    for blocks in (first, ~first, torch.ones(4, 4, dtype=torch.bool)):
        mask = BlockMask.from_blocks(blocks, 64, 64, (16, 16))
        parts.append(block_sparse_attention(case.query, case.key, case.value, mask, return_lse=True))
    (a, lse_a), (b, lse_b), (whole, lse) = parts
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    merged = a * (lse_a - lse).exp()[..., None] + b * (lse_b - lse).exp()[..., None]
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_cpu_memory_grows_with_tokens_not_their_square():
    tokens, head_dim = 16384, 16
    blocks = torch.eye(tokens // 64, dtype=torch.bool)
    blocks[:, :2] = True
    query, key, value = (torch.randn(1, 1, tokens, head_dim) for _ in range(3))
    with LargestTensor() as largest:
        mask = BlockMask.from_blocks(blocks, tokens, tokens, (64, 64))
        block_sparse_attention(query, key, value, mask)
    assert 0 < largest.elements <= 8 * tokens * head_dim < tokens * tokens / 100


def test_backends_are_listed_and_chosen_with_a_reason(make_case, new_shape):
    backends = available_backends()
    assert set(backends) == {"triton", "fa4", "flex", "cpu", "oracle"}
    assert backends["cpu"] is None and backends["oracle"] is None
    case = make_case(new_shape())
    assert choose_backend(case.query, case.key, case.value, case.mask) == ("cpu", "CPU tensors")
    assert choose_backend(case.query, case.key, case.value, case.mask, "oracle") == ("oracle", "asked for")
