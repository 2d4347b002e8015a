"""Ours together with what diffusers, PEFT and accelerate do to a model: caches, guiders, compilation, LoRA, offload."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.hooks import apply_layer_skip
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, LayerSkipConfig
from torch._dynamo.testing import CompileCounterWithBackend

import attnproc
from attnproc import AttnProcWarning, DenseAttnProcessor
from attnproc.context import context_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# -- caches and guiders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False])
def test_first_block_cache(wan, generate, recording, ours_first):
    pipe, inputs = wan
    config = diffusers.FirstBlockCacheConfig(threshold=1e9)  # every block but the first is skipped once it can be
    processor = recording()
    if ours_first:
        pipe.attn_processor = processor
    pipe.transformer.enable_cache(config)
    expected = None if ours_first else generate(pipe, inputs, steps=4)
    if not ours_first:
        pipe.attn_processor = processor
    out = generate(pipe, inputs, steps=4)
    assert processor.trace == [(step, branch) for step in range(4) for branch in ("cond", "uncond")]
    assert [site.dense_calls for site in attnproc.report(pipe).sites] == [8, 2]
    assert expected is None or torch.equal(out, expected)
    pipe.transformer.disable_cache()
    generate(pipe, inputs, steps=4)
    assert [site.dense_calls for site in attnproc.report(pipe).sites] == [8, 8]


def test_pyramid_attention_broadcast(wan, generate, recording):
    pipe, inputs = wan
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: pipe._current_timestep,
    )
    pipe.transformer.enable_cache(config)
    expected = generate(pipe, inputs, steps=4)
    pipe.attn_processor = recording()
    assert torch.equal(generate(pipe, inputs, steps=4), expected)
    assert attnproc.report(pipe).sites[0].dense_calls < 8, "attention is left out, and nobody counts calls"
    assert context_of(pipe.transformer).step.index == 3


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan15", "cog"])
def test_layer_skip_of_attention(name, tiny_models, run, random_mask):
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    fqn = "blocks" if name == "wan" else "transformer_blocks"
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=fqn, skip_attention=True, skip_ff=False))
    assert not torch.equal(run(model, inputs), expected)
    assert [site.sparse_calls for site in attnproc.report(model).sites] == [1, 2]


@pytest.mark.parametrize("name", ["wan", "mochi", "ltx", "sd3"])
def test_perturbed_attention_is_obeyed(name, tiny_models, run, random_mask):
    """A guider replaces attention scores by a function mode; sparse attention would pass it by."""
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(1)
    with AttentionScoreSkipFunctionMode():
        expected = run(model, inputs)
    attnproc.install(model, random_mask(density=0.4))
    with AttentionScoreSkipFunctionMode(), pytest.warns(AttnProcWarning, match="guider"):
        assert torch.equal(run(model, inputs), expected)


# -- attention backends ------------------------------------------------------------------------------------------------


@pytest.fixture
def restore_backend():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx", "flux"])
def test_the_users_attention_backend_is_used(name, tiny_models, run, ours_first, monkeypatch, restore_backend):
    from diffusers.models import attention_dispatch

    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(1)
    if ours_first:
        attnproc.install(model, DenseAttnProcessor())
    model.set_attention_backend("_native_math")
    if not ours_first:
        attnproc.install(model, DenseAttnProcessor())
    seen = []
    stock = attention_dispatch._AttentionBackendRegistry._backends["_native_math"]
    monkeypatch.setitem(
        attention_dispatch._AttentionBackendRegistry._backends,
        attention_dispatch.AttentionBackendName("_native_math"),
        lambda *args, **kwargs: seen.append(1) or stock(*args, **kwargs),
    )
    run(model, inputs)
    assert len(seen) >= tiny.sites
    assert attnproc.report(model).sites[0].dense_calls == 1


def test_a_backend_that_cannot_be_intercepted_is_told(tiny_models, run, random_mask, restore_backend):
    from diffusers.models import attention_dispatch as dispatch

    tiny = tiny_models["flux"]
    model, inputs = tiny.model(), tiny.inputs(1)
    model.set_attention_backend("_native_math")
    stock = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName("_native_math")]
    attnproc.install(model, random_mask())
    plain = torch.ops.aten._scaled_dot_product_attention_math

    def other_kernel(query, key, value, attn_mask=None, **kwargs):
        return plain(*(t.transpose(1, 2) for t in (query, key, value)))[0].transpose(1, 2)

    dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName("_native_math")] = other_kernel
    try:
        with pytest.warns(AttnProcWarning, match="attention backend in use"):
            run(model, inputs)
    finally:
        dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName("_native_math")] = stock


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan15", "ltx"])
def test_compiled_blocks_are_one_graph_for_all_layers_and_steps(name, tiny_models, run, random_mask):
    tiny = tiny_models[name]
    layers = 12 if name == "wan" else 9
    model, inputs = tiny.model(num_layers=layers), tiny.inputs(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    attnproc.install(model, random_mask(density=0.4, dense_steps=1), scheduler=scheduler)
    calls = [{**inputs, "timestep": t[None].to(inputs["timestep"].dtype)} for t in scheduler.timesteps]
    expected = [run(model, call) for call in calls]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    out = [run(model, call) for call in calls]
    for ours, plain in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    kinds = {"wan": 1, "hunyuan": 2, "hunyuan15": 1, "ltx": 1}[name]
    repeated = [g for g in counter.graphs if any("attnproc" in str(node.target) for node in g.graph.nodes)]
    assert len(repeated) == kinds
    assert {(s.dense_calls, s.sparse_calls) for s in attnproc.report(model).sites} == {(1, 2)}
    torch._dynamo.reset()


def test_a_whole_compiled_model_is_one_graph_for_all_steps(tiny_models, run, random_mask):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(num_layers=12), tiny.inputs(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    attnproc.install(model, random_mask(density=0.4, dense_steps=1), scheduler=scheduler)
    calls = [{**inputs, "timestep": t[None].to(inputs["timestep"].dtype)} for t in scheduler.timesteps]
    expected = [run(model, call) for call in calls]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    out = [run(compiled, call) for call in calls]
    for ours, plain in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2
    assert {(s.dense_calls, s.sparse_calls) for s in attnproc.report(model).sites} == {(1, 2)}
    torch._dynamo.reset()


def test_generic_sites_run_under_compile_without_fullgraph(tiny_models, run, random_mask):
    tiny = tiny_models["flux"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert {site.sparse_calls for site in attnproc.report(model).sites} == {2}
    torch._dynamo.reset()


# -- training and adapters ---------------------------------------------------------------------------------------------


def gradients_of(model, inputs):
    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_runs_sparse(video_family, checkpointing, random_mask):
    """Every parameter gets a gradient: with all blocks kept that of dense attention, with fewer another one."""
    model, inputs = video_family.model(), video_family.inputs(1)
    if checkpointing:
        model.enable_gradient_checkpointing()
    expected = gradients_of(model, inputs)
    attnproc.install(model, random_mask(density=1.0))
    full = gradients_of(model, inputs)
    attnproc.install(model, random_mask(density=0.4))
    sparse = gradients_of(model, inputs)
    assert all(site.sparse_calls and not site.dense_calls for site in attnproc.report(model).sites)
    assert full.keys() == expected.keys() == sparse.keys()
    for name in expected:
        torch.testing.assert_close(full[name], expected[name], atol=1e-6, rtol=1e-4)
    assert any((sparse[name] - expected[name]).abs().max() > 1e-5 for name in expected)


def test_what_has_no_backward_pass_runs_dense_and_says_so(video_family, random_mask):
    model, inputs = video_family.model(), video_family.inputs(1)
    expected = gradients_of(model, inputs)
    attnproc.install(model, random_mask(density=0.4, quantization="int8"))
    with pytest.warns(AttnProcWarning, match="gradients are on and quantization='int8' has no backward pass"):
        out = gradients_of(model, inputs)
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cog", "mochi", "ltx", "flux"])
def test_lora_and_its_scale(name, tiny_models, run, random_mask):
    peft = pytest.importorskip("peft")
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(1)
    plain = tiny.model()
    model.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    scale_name = "joint_attention_kwargs" if name == "flux" else "attention_kwargs"

    def at(scale):
        return run(model, {**inputs, scale_name: {"scale": scale}})

    dense = at(0.5)
    attnproc.install(model, DenseAttnProcessor())
    assert torch.equal(at(0.5), dense)
    attnproc.install(model, random_mask(density=0.4))
    attnproc.install(plain, random_mask(density=0.4))
    without = run(plain, inputs)
    torch.testing.assert_close(at(0.0), without, atol=1e-6, rtol=1e-5)
    assert (at(1.0) - without).abs().max() > 1e-3 and not torch.equal(at(0.5), at(1.0))


def test_ip_adapter_like_rebuilding_in_a_pipeline(tiny_pipelines, generate, random_mask):
    pipe, inputs = tiny_pipelines["sd"]()
    pipe.attn_processor = random_mask(density=0.3)
    expected = generate(pipe, inputs)
    pipe.unet.set_attn_processor({name: type(p)() for name, p in pipe.unet.attn_processors.items()})
    assert torch.equal(generate(pipe, inputs), expected)
    assert all(site.sparse_calls == 3 for site in attnproc.report(pipe).sites)


def test_cross_attention_kwargs_still_reach_the_stock_processor(tiny_models, run):
    """Attention modules drop arguments that a processor's signature does not name."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    seen = []

    class Probe(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, probe=None):
            seen.append(probe)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    tiny = tiny_models["unet"]
    model, inputs = tiny.model(), tiny.inputs(1)
    model.set_attn_processor(Probe())
    attnproc.install(model, DenseAttnProcessor())
    run(model, {**inputs, "cross_attention_kwargs": {"probe": 7}})
    assert seen and set(seen) == {7}


# -- where weights live ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False])
def test_hooks_of_accelerate_come_and_go(tiny_models, run, random_mask, ours_first):
    """Model offloading puts its hook on `forward` and renews it after every pipeline call."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    calls = []

    class Offload(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    if ours_first:
        attnproc.install(model, random_mask(density=0.4))
    add_hook_to_module(model, Offload())
    if not ours_first:
        attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    remove_hook_from_module(model)
    add_hook_to_module(model, Offload())
    assert torch.equal(run(model, {**inputs, "timestep": torch.tensor([100])}) * 0 + expected, expected)
    assert context_of(model).step.index == 1, "ours still sees every call"
    attnproc.uninstall(model)
    run(model, inputs)
    assert len(calls) == 3, "taking ours off leaves theirs"


def test_sequential_offload_with_weights_on_the_meta_device(tiny_models, run, random_mask):
    from accelerate import cpu_offload

    tiny = tiny_models["hunyuan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)
    assert next(model.transformer_blocks[0].attn.to_q.parameters()).device.type == "meta"
    assert torch.equal(run(model, inputs), expected)
    assert {site.sparse_calls for site in attnproc.report(model).sites} == {2}


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(tiny_models, run, random_mask, offload_type):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    try:
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1,
        )
    except ValueError as error:  # diffusers may ask for an accelerator
        pytest.skip(f"group offloading does not run here: {error}")
    assert torch.equal(run(model, inputs), expected)
    assert {site.sparse_calls for site in attnproc.report(model).sites} == {2}


def test_layerwise_casting(tiny_models, run, random_mask):
    tiny = tiny_models["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stock = run(model, inputs)
    attnproc.install(model, random_mask(density=1.0))
    torch.testing.assert_close(run(model, inputs), stock, atol=1e-5, rtol=1e-5)


def test_a_deep_copied_pipeline_runs_on_its_own(wan, generate, random_mask):
    pipe, inputs = wan
    pipe.attn_processor = random_mask(density=0.3)
    expected = generate(pipe, inputs)
    copied = copy.deepcopy(pipe)
    pipe.attn_processor = None
    assert copied.attn_processor is not None
    assert torch.equal(generate(copied, inputs), expected)
    assert attnproc.report(copied).sites[0].sparse_calls == 6


# -- context parallelism -----------------------------------------------------------------------------------------------


def test_ulysses_on_two_ranks_is_one_process(tiny_models, run, random_mask, methods, tmp_path):
    tiny = tiny_models["wan"]
    inputs = {**tiny.inputs(1), "hidden_states": torch.randn(1, 4, 4, 8, 8)}
    expected = {}
    for name, processor in (("dense", DenseAttnProcessor()), ("sparse", random_mask(density=0.4))):
        model = tiny.model()
        attnproc.install(model, processor)
        expected[name] = run(model, inputs)
    for name in ("radial", "sparge", "adaspa", "vmoba"):
        processor = methods.make(name, **({"head_adaptive": False} if name == "adaspa" else {}))
        processor.save(tmp_path / f"{name}.json")
        attnproc.install(model, processor)
        expected[name] = torch.cat([run(model, {**inputs, "timestep": torch.tensor([t])}) for t in (900, 500)])
    torch.save({"config": tiny.config, "state": model.state_dict(), "inputs": inputs}, tmp_path / "model.pt")
    blocks = [random_mask(density=0.4).kept(layer, 64).to_blocks()[0, 0] for layer in range(2)]
    torch.save(blocks, tmp_path / "blocks.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("ulysses_rank.py"), str(rank), tmp_path], env=ENVIRONMENT
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for order in ("before", "after"):
        out = torch.load(tmp_path / f"{order}.pt")
        for name in expected:
            torch.testing.assert_close(out[name], expected[name], atol=1e-5, rtol=1e-5)
        assert out["fallbacks"] == {}
        assert out["sparse_calls"] == [1, 1] and out["full_tokens"] == [64, 64]
    assert not torch.equal(expected["dense"], expected["sparse"])
    assert not any(torch.equal(expected["dense"][0], expected[name][-1]) for name in expected if name != "dense")
