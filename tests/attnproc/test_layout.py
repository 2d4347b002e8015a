"""Text lengths are read from the device once for all layers of a forward, and never stale."""

import gc
import weakref

import pytest
import torch

import attnproc
from attnproc.kernels.once import _known, once
from attnproc.layout import TokenLayout


def test_the_same_tensor_is_worked_out_known_and_afresh_when_changed():
    seen = []

    def total(tensor, factor):
        seen.append(factor)
        return int(tensor.sum()) * factor

    tensor = torch.tensor([1, 2])
    assert [once(tensor, total, 2), once(tensor, total, 2), once(tensor, total, 3)] == [6, 6, 9] and seen == [2, 3]
    tensor[0] = 5
    assert once(tensor, total, 2) == 14
    assert once(torch.tensor([1, 2]), total, 2) == 6
    with torch.inference_mode():
        inner = torch.tensor([1, 1])
        assert once(inner, total, 2) == 4
        inner[0] = 2
        assert once(inner, total, 2) == 6


def test_nothing_keeps_the_tensor_alive():
    gc.collect()  # what other tests left behind is not counted
    tensor = torch.tensor([3, 1])
    assert TokenLayout((1, 2, 2), 4, tensor).text_lengths == (3, 1)
    gone, before = weakref.ref(tensor), len(_known)
    del tensor
    gc.collect()
    assert gone() is None and len(_known) == before - 1


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "mochi"])
def test_layers_of_a_forward_share_their_padding(name, tiny_models, run, random_mask, monkeypatch):
    if name not in tiny_models:
        pytest.skip(f"no tiny model {name}")
    tiny, read = tiny_models[name], []
    monkeypatch.setattr("attnproc.layout._lengths", lambda valid: read.append(valid) or tuple(valid.tolist()))
    processor = random_mask(density=0.5)
    plan = processor.plan

    def reading(call):
        assert len(call.layout.text_lengths) == 2
        return plan(call)

    processor.plan = reading
    model = tiny.model()
    attnproc.install(model, processor)
    run(model, tiny.inputs(2))
    assert len(attnproc.report(model).sites) > 1 and len(read) == 1
