"""Every model family: dense is the stock model, sparse is the stock model under the mask, nothing else is touched."""

import copy
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import attnproc
from attnproc import DenseAttnProcessor
from attnproc.compat import attention_modules
from attnproc.context import context_of


@pytest.fixture(autouse=True)
def seed(request):
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")


def processors(model):
    return {name: module.processor for name, module in attention_modules(model)}


class MaskedStock(TorchFunctionMode):
    """The definition in place of the kernels: every attention over video tokens with a mask of tokens x tokens.

    Masks are for the order [video | text]; where a model puts text first they are turned round. Mochi calls attention
    once per sample, with the sample's own length, so its calls count per `samples`.
    """

    def __init__(self, processor, video_tokens, text_first, samples=1):
        super().__init__()
        self.processor, self.video_tokens, self.text_first, self.samples = processor, video_tokens, text_first, samples
        self.calls = count()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = (call[name].double() for name in names[:3])
        tokens, given = query.shape[2], call.get("attn_mask")
        if tokens != key.shape[2] or (self.video_tokens and tokens < self.video_tokens):
            return func(*args, **kwargs)
        layer = self.order[next(self.calls) // self.samples]
        full = tokens if self.samples == 1 else self.tokens_with_text
        mask = self.processor.kept(layer, full).token_mask()[0, 0, :tokens, :tokens]
        if self.text_first:
            turned = torch.arange(tokens).roll(tokens - self.video_tokens)
            mask = mask[turned][:, turned]
        if given is not None:
            mask = mask & given.bool()
            mask = mask | ~mask.any(-1, keepdim=True)  # rows of padding: anything finite
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).float()


def test_dense_is_the_stock_model_to_the_last_bit(variant, run):
    model, inputs = variant.model(), variant.inputs(2)
    expected = run(model, inputs)
    attnproc.install(model, DenseAttnProcessor())
    assert torch.equal(run(model, inputs), expected)
    report = attnproc.report(model)
    assert not report.fallbacks and report.density == 1.0
    assert all(site.dense_calls == 1 and site.sparse_calls == 0 for site in report.sites)


def test_full_mask_is_dense(variant, run, random_mask):
    model, inputs = variant.model(), variant.inputs(2)
    expected = run(model, inputs)
    attnproc.install(model, random_mask(density=1.0))
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert all(site.sparse_calls == 1 and site.dense_calls == 0 for site in attnproc.report(model).sites)


@pytest.mark.parametrize("block_size", [16, 24])
def test_sparse_is_the_stock_model_under_the_mask(variant, run, random_mask, block_size):
    processor = random_mask(density=0.4, block_size=block_size)
    model, inputs = variant.model(), variant.inputs(2)
    mochi = variant.model_class.startswith("Mochi")
    text_first = variant.model_class.startswith(("Cog", "Flux"))
    attnproc.install(model, processor)
    out = run(model, inputs)
    grid = context_of(model).step.grid
    attnproc.uninstall(model)
    video = 0 if variant.model_class.startswith("UNet") else grid[0] * grid[1] * grid[2]
    with MaskedStock(processor, video, text_first, samples=2 if mochi else 1) as definition:
        definition.tokens_with_text = video + 7
        definition.order = processor.layers
        expected = run(model, inputs)
    assert next(definition.calls) == variant.sites * definition.samples
    assert (out - run(model, inputs)).abs().max() > 1e-3, "the mask must matter"
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_uninstall_restores_everything_by_identity(variant, random_mask):
    model = variant.model()
    before, keys, attributes = processors(model), list(model.state_dict()), set(vars(model))
    attnproc.install(model, random_mask())
    assert list(model.state_dict()) == keys
    assert "_attnproc" not in str(dict(model.config))
    replaced = [name for name, processor in processors(model).items() if processor is not before[name]]
    assert len(before) == variant.attentions and len(replaced) == variant.sites
    assert model.forward == type(model).forward.__get__(model)
    attnproc.uninstall(model)
    after = processors(model)
    assert all(after[name] is before[name] for name in before)
    assert set(vars(model)) == attributes and not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    assert attnproc.installed(model) is None


def test_a_batch_is_its_samples(family, run, random_mask):
    model, inputs = family.model(), family.inputs(2)
    attnproc.install(model, random_mask(density=0.4))
    both = run(model, inputs)
    shared = ("img_ids", "txt_ids", "image_rotary_emb")
    for sample in range(2):
        one = {
            name: value[sample : sample + 1]
            if isinstance(value, torch.Tensor) and value.ndim and name not in shared
            else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(run(model, one), both[sample : sample + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan-i2v", "hunyuan15", "mochi"])
def test_padded_text_never_reaches_the_video(name, tiny_models, run, random_mask):
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(2)
    attnproc.install(model, random_mask(density=0.4))
    out = run(model, inputs)
    text, mask = inputs[tiny.text_argument].clone(), inputs[tiny.mask_argument].bool()
    text[~mask] = torch.randn_like(text[~mask]) * 5
    assert torch.equal(run(model, {**inputs, tiny.text_argument: text}), out)
    text[mask] = torch.randn_like(text[mask])
    assert not torch.equal(run(model, {**inputs, tiny.text_argument: text}), out)


@pytest.mark.parametrize("name", ["wan", "vace", "skyreels", "ltx", "hunyuan", "flux"])
def test_fused_projections_change_nothing(name, tiny_models, run, random_mask):
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(2)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-6, rtol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), expected)
    assert not any(site.replaced for site in attnproc.report(model).sites)


def test_fusing_legacy_attention_drops_ours_with_a_warning(tiny_models, run, random_mask):
    tiny = tiny_models["cog"]
    model, inputs = tiny.model(), tiny.inputs(2)
    stock = run(model, inputs)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    model.fuse_qkv_projections()
    with pytest.warns(attnproc.AttnProcWarning, match="FusedCogVideoXAttnProcessor2_0"):
        torch.testing.assert_close(run(model, inputs), stock, atol=1e-6, rtol=1e-5)
    report = attnproc.report(model)
    assert all(site.replaced for site in report.sites) and "replaced by something else" in repr(report)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), expected)
    assert not any(site.replaced for site in attnproc.report(model).sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_its_dtype_and_near(video_family, run, random_mask, dtype):
    model, inputs = video_family.model(), video_family.inputs(1)
    attnproc.install(model, random_mask(density=0.5))
    expected = run(model, inputs)
    model.to(dtype)
    floats = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    out = run(model, floats)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


def test_skyreels_causal_blocks_run_dense_and_say_so(tiny_models, run, random_mask):
    tiny = tiny_models["skyreels"]
    model, inputs = tiny.model(), tiny.inputs(1)
    model._set_ar_attention(3)
    expected = run(model, inputs)
    attnproc.install(model, random_mask())
    with pytest.warns(attnproc.AttnProcWarning, match="mask that is not text padding"):
        assert torch.equal(run(model, inputs), expected)
    assert attnproc.report(model).fallbacks == {"the model passes an attention mask that is not text padding": 2}
    attnproc.install(model, random_mask(strict=True))
    with pytest.raises(attnproc.UnsupportedError, match="strict=True"):
        run(model, inputs)


def test_ltx_without_frame_sizes_runs_dense_and_says_so(tiny_models, run, random_mask):
    tiny = tiny_models["ltx"]
    model, inputs = tiny.model(), tiny.inputs(1)
    grid = [inputs.pop(name) for name in ("num_frames", "height", "width")]
    inputs["video_coords"] = (
        torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)[None].float()
    )
    expected = run(model, inputs)
    attnproc.install(model, random_mask())
    with pytest.warns(attnproc.AttnProcWarning, match="not known"):
        assert torch.equal(run(model, inputs), expected)


def test_flux_with_a_reference_image_runs_dense_and_says_so(tiny_models, run, random_mask):
    tiny = tiny_models["flux"]
    model, inputs = tiny.model(), tiny.inputs(1)
    reference = inputs["img_ids"].clone()
    reference[:, 0] = 1
    inputs["img_ids"] = torch.cat([inputs["img_ids"], reference])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"]] * 2, dim=1)
    expected = run(model, inputs)
    attnproc.install(model, random_mask())
    with pytest.warns(attnproc.AttnProcWarning, match="not known"):
        assert torch.equal(run(model, inputs), expected)


def test_an_unknown_model_is_exact_and_says_why_it_is_dense(run, random_mask):
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "timestep": torch.full((2,), 500),
        "attention_mask": torch.ones(2, 2, 8, 8),
    }
    expected = run(model, inputs)
    attnproc.install(model, random_mask(dense_steps=(0.25, 1)))  # fractions of a run whose length is not known
    with pytest.warns(attnproc.AttnProcWarning):
        assert torch.equal(run(model, inputs), expected)
    assert list(attnproc.report(model).fallbacks.values()) == [1]


def test_a_model_without_attention_is_refused():
    with pytest.raises(attnproc.SettingsError, match="without self-attention"):
        attnproc.install(torch.nn.Linear(2, 2), DenseAttnProcessor())


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux", "unet"])
def test_a_deep_copy_stands_on_its_own(name, tiny_models, run, random_mask):
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(1)
    stock = run(model, inputs)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(copied, inputs), expected)
    assert context_of(copied) is not context_of(model)
    assert {site.module for site in context_of(copied).sites} <= set(copied.modules())
    attnproc.uninstall(copied)
    assert torch.equal(run(copied, inputs), stock)
    assert attnproc.installed(model) is not None


def test_rebuilt_processors_are_bound_again(family, run, random_mask):
    """Loading an IP-Adapter makes new processors with `type(processor)()`."""
    model, inputs = family.model(), family.inputs(1)
    attnproc.install(model, random_mask(density=0.4))
    expected = run(model, inputs)
    for _, module in attention_modules(model):
        module.processor = type(module.processor)()
    assert torch.equal(run(model, inputs), expected)
    assert all(site.sparse_calls == 2 for site in attnproc.report(model).sites)
