"""Wrong arguments are refused with what came, what was expected and what to do."""

import pytest
import torch

from attnproc.kernels import BlockMask, ChunkBits, Ranges, available_backends, block_sparse_attention, choose_backend


def good():
    return {
        "query": torch.randn(2, 2, 40, 16),
        "key": torch.randn(2, 2, 50, 16),
        "value": torch.randn(2, 2, 50, 16),
        "mask": BlockMask.full(40, 50, (16, 16)),
    }


def square():
    return {
        **{name: torch.randn(2, 2, 40, 16) for name in ("query", "key", "value")},
        "mask": BlockMask.full(40, 40, (16, 16)),
    }


WRONG = {
    "rank": ({"query": torch.randn(2, 40, 16)}, "query"),
    "not a tensor": ({"value": None}, "value"),
    "integers": ({"query": torch.ones(2, 2, 40, 16, dtype=torch.int32)}, "query"),
    "8-bit floats": ({"query": torch.ones(2, 2, 40, 16).to(torch.float8_e4m3fn)}, "query"),
    "dtypes differ": ({"key": torch.randn(2, 2, 50, 16).half()}, "key"),
    "devices differ": ({"value": torch.randn(2, 2, 50, 16, device="meta")}, "value"),
    "no samples": (
        {name: torch.randn(0, 2, n, 16) for name, n in (("query", 40), ("key", 50), ("value", 50))},
        "query",
    ),
    "key heads that do not divide": ({name: torch.randn(2, 3, 50, 16) for name in ("key", "value")}, "key"),
    "fewer key heads than value heads": ({"key": torch.randn(2, 1, 50, 16)}, "value"),
    "batch differs": ({"key": torch.randn(1, 2, 50, 16)}, "key"),
    "value shorter than key": ({"value": torch.randn(2, 2, 49, 16)}, "value"),
    "value head_dim": ({"value": torch.randn(2, 2, 50, 8)}, "value"),
    "head_dim too large": (
        {name: torch.randn(2, 2, n, 257) for name, n in (("query", 40), ("key", 50), ("value", 50))},
        "query",
    ),
    "not a mask": ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask"),
    "mask of other queries": ({"mask": BlockMask.full(41, 50, (16, 16))}, "mask"),
    "mask of other keys": ({"mask": BlockMask.full(40, 64, (16, 16))}, "mask"),
    "mask batch": ({"mask": BlockMask.from_blocks(torch.ones(3, 1, 3, 4).bool(), 40, 50, (16, 16))}, "mask"),
    "mask heads": ({"mask": BlockMask.from_blocks(torch.ones(1, 3, 3, 4).bool(), 40, 50, (16, 16))}, "mask"),
    "padding of three samples": ({"mask": BlockMask.full(40, 50, (16, 16), torch.tensor([1, 2, 3]))}, "mask"),
    "mask elsewhere": ({"mask": BlockMask.full(40, 50, (16, 16), device="meta")}, "mask"),
    "scale": ({"scale": float("nan")}, "scale"),
    "unknown backend": ({"backend": "cuda"}, "backend"),
    "bias of other blocks": ({"key_bias": torch.zeros(1, 1, 5)}, "key_bias"),
    "bias of other heads": ({"key_bias": torch.zeros(1, 3, 4)}, "key_bias"),
    "half-precision bias": ({"key_bias": torch.zeros(1, 1, 4).half()}, "key_bias"),
    "order of cross-attention": ({"token_order": torch.arange(40)[None]}, "token_order"),
    "order of floats": ({**square(), "token_order": torch.arange(40.0)[None]}, "token_order"),
    "order of other tokens": ({**square(), "token_order": torch.arange(41)[None]}, "token_order"),
    "threshold 0": ({"skip_threshold": 0.0}, "skip_threshold"),
    "threshold NaN": ({"skip_threshold": float("nan")}, "skip_threshold"),
    "thresholds of other heads": ({"skip_threshold": torch.ones(3)}, "skip_threshold"),
    "unknown quantization": ({"quantization": "int5"}, "quantization"),
}


@pytest.mark.parametrize("change, argument", WRONG.values(), ids=WRONG.keys())
def test_attention_refuses(change, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; expected .+\. .+\.$"):
        block_sparse_attention(**{**good(), **change})


BLOCKS, SQUARE = torch.ones(3, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
COUNTS, INDICES = torch.ones(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 1, dtype=torch.int32)
RANGES = Ranges(torch.zeros(50, 2).int(), torch.zeros(40, 2).int(), torch.ones(40, 2).int())


def with_bits(lists, bits, key_valid=None):
    """A mask whose lists and whose chunk bits are for so many samples and heads."""
    blocks, rule = torch.ones(*lists, 3, 4).bool(), ChunkBits(torch.zeros(*bits, 40, 1).int(), torch.zeros(4).int())
    return BlockMask.from_blocks(~blocks, 40, 50, (16, 16), key_valid, partial=blocks, rule=rule)


WRONG_MASKS = {
    "blocks dtype": (lambda: BlockMask.from_blocks(BLOCKS.int(), 40, 50, (16, 16)), "blocks"),
    "blocks grid": (lambda: BlockMask.from_blocks(BLOCKS, 40, 65, (16, 16)), "blocks"),
    "blocks rank": (lambda: BlockMask.from_blocks(BLOCKS[None], 40, 50, (16, 16)), "blocks"),
    "no queries": (lambda: BlockMask.full(0, 50, (16, 16)), "query_length"),
    "block of 0": (lambda: BlockMask.full(40, 50, (16, 0)), "block_size"),
    "fractional padding": (lambda: BlockMask.full(40, 50, (16, 16), torch.tensor([3.0])), "key_valid"),
    "boolean padding": (lambda: BlockMask.full(40, 50, (16, 16), torch.ones(50).bool()), "key_valid"),
    "too many keys": (lambda: BlockMask.full(40, 50, (16, 16), torch.tensor([51])), "key_valid"),
    "negative keys": (lambda: BlockMask.full(40, 50, (16, 16), torch.tensor([-1])), "key_valid"),
    "padding rank": (lambda: BlockMask.full(40, 50, (16, 16), torch.tensor([[5]])), "key_valid"),
    "padding of other samples": (
        lambda: BlockMask.from_blocks(torch.ones(2, 1, 3, 4).bool(), 40, 50, (16, 16), torch.tensor([1, 2, 3])),
        "key_valid",
    ),
    "counts dtype": (lambda: BlockMask(COUNTS.long(), INDICES, 40, 50, (16, 16)), "counts"),
    "counts rows": (lambda: BlockMask(COUNTS, INDICES, 60, 50, (16, 16)), "counts"),
    "indices rank": (lambda: BlockMask(COUNTS, INDICES[0], 40, 50, (16, 16)), "indices"),
    "indices heads": (lambda: BlockMask(COUNTS, INDICES.repeat(1, 2, 1, 1), 40, 50, (16, 16)), "indices"),
    "indices of no width": (lambda: BlockMask(COUNTS, INDICES[..., :0], 40, 50, (16, 16)), "indices"),
    "partial blocks without a rule": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), partial=BLOCKS),
        "partial_counts",
    ),
    "a rule without partial blocks": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), rule=RANGES),
        "partial_counts",
    ),
    "a rule for other queries": (
        lambda: BlockMask.from_blocks(SQUARE, 50, 50, (16, 16), partial=SQUARE, rule=RANGES),
        "rule.low",
    ),
    "bits for other key blocks": (
        lambda: BlockMask.from_blocks(
            BLOCKS,
            40,
            50,
            (16, 16),
            partial=BLOCKS,
            rule=ChunkBits(torch.zeros(1, 1, 40, 1).int(), torch.zeros(5).int()),
        ),
        "rule.key_chunk",
    ),
    "offsets that do not end": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), query_offsets=torch.tensor([0, 16, 32, 39]).int()),
        "query_offsets",
    ),
    "offsets of long blocks": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), key_offsets=torch.tensor([0, 17, 30, 40, 50]).int()),
        "key_offsets",
    ),
    "offsets of empty blocks": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), key_offsets=torch.tensor([0, 16, 16, 34, 50]).int()),
        "key_offsets",
    ),
    "64-bit offsets": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), key_offsets=torch.tensor([0, 16, 32, 48, 50])),
        "key_offsets",
    ),
    "ranges of four axes": (lambda: Ranges(*[torch.zeros(5, 4).int()] * 3), "key_coordinates"),
    "ranges of floats": (lambda: Ranges(*[torch.zeros(5, 2)] * 3), "rule.key_coordinates"),
    "padding of no samples": (lambda: BlockMask.full(40, 50, (16, 16), torch.zeros(0).int()), "key_valid"),
    "partial blocks of another grid": (
        lambda: BlockMask.from_blocks(BLOCKS, 40, 50, (16, 16), partial=BLOCKS[:2], rule=RANGES),
        "partial",
    ),
    "blocks of floats beside partial ones": (
        lambda: BlockMask.from_blocks(BLOCKS.float(), 40, 50, (16, 16), partial=BLOCKS, rule=RANGES),
        "blocks",
    ),
    "bits of other samples": (lambda: with_bits((2, 1), (3, 1)), "rule"),
    "bits of other heads": (lambda: with_bits((1, 4), (1, 2)), "rule"),
    "bits of other samples than padding": (lambda: with_bits((1, 1), (3, 1), torch.tensor([1, 2])), "rule"),
    "indices elsewhere": (lambda: BlockMask(COUNTS, INDICES.to("meta"), 40, 50, (16, 16)), "indices"),
}


@pytest.mark.parametrize("build, argument", WRONG_MASKS.values(), ids=WRONG_MASKS.keys())
def test_block_mask_refuses(build, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got .+; expected .+\. .+\.$"):
        build()


def test_a_gradient_is_refused_rather_than_lost():
    arguments = good()
    arguments["key"].requires_grad_()
    for refused in ({"backend": "flex"}, {"skip_threshold": 5.0}, {"quantization": "int8"}):
        with pytest.raises(ValueError, match="no_grad"):
            block_sparse_attention(**arguments, **refused)
    with torch.no_grad():
        assert block_sparse_attention(**arguments, backend="flex").isfinite().all()


def test_devices_without_a_backend_are_named():
    query, mask = torch.randn(1, 1, 16, 16, device="meta"), BlockMask.full(16, 16, (16, 16), device="meta")
    with pytest.raises(ValueError, match="CUDA or CPU"):
        choose_backend(query, query, query, mask)
    with pytest.raises(ValueError, match="CPU tensors, not meta"):
        choose_backend(query, query, query, mask, "cpu")
    with pytest.raises(ValueError, match=r"^quantization: got 'int8' on meta"):
        choose_backend(query, query, query, mask, "oracle", quantization="int8")


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    forward = pytest.importorskip("attnproc.kernels.triton_forward")
    query, mask = torch.randn(1, 1, 16, 16), BlockMask.full(16, 16, (16, 16))
    monkeypatch.setattr(forward, "INTERPRETED", True)
    assert available_backends()["triton"] is None
    with pytest.raises(ValueError, match=r"powers of two of at least 16 tokens, not \(16, 24\)"):
        choose_backend(query, query, query, BlockMask.full(16, 16, (16, 24)), "triton")
    with pytest.raises(ValueError, match="not float64"):
        choose_backend(*[query.double()] * 3, mask, "triton")
    with pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        choose_backend(*[query.bfloat16()] * 3, mask, "triton")
    monkeypatch.setattr(forward, "INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA"):
        choose_backend(query, query, query, mask, "triton")
