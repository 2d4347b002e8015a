"""Every sparse method on every video family: ragged text, batches, both guidance styles, two models in one process."""

import copy

import pytest
import torch

import attnproc
from attnproc.context import context_of
from attnproc.families.base import SiteProcessor

VIDEO = ("wan", "hunyuan", "hunyuan15", "cog", "mochi", "ltx")
WITH_TEXT = ("hunyuan", "hunyuan15", "cog", "mochi")
# Guidance in calls of its own for each branch: wan, hunyuan-true-cfg, hunyuan15; in one batch: cog, mochi, ltx.
PIPELINES = (*VIDEO, "hunyuan-true-cfg")
TIMES = (900, 500, 100)
OTHER = {"radial": "sparge", "sparge": "adaspa", "adaspa": "vmoba", "vmoba": "paro", "paro": "radial"}
DENSER = {
    "radial": {"adjacent_half_width": 0.5},
    **{method: {"density": 0.6} for method in ("sparge", "adaspa", "vmoba", "paro")},
}


@pytest.fixture(params=VIDEO)
def name(request):
    """Each video family."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    value = torch.seed() % 100_000
    torch.manual_seed(value)
    print(f"seed {value}")


@pytest.fixture(scope="session")
def built(tiny_models):
    """One model of each family, made once."""
    return {name: tiny_models[name].model() for name in VIDEO}


@pytest.fixture
def model(built, name):
    """The model of the family, as it comes."""
    yield built[name]
    attnproc.uninstall(built[name])


@pytest.fixture
def inputs(tiny_models, name):
    """Two samples; the second has less text where the family says how much there is."""
    return tiny_models[name].inputs(2)


def sample(inputs, n):
    return {
        key: value[n : n + 1] if isinstance(value, torch.Tensor) and value.ndim and key != "image_rotary_emb" else value
        for key, value in inputs.items()
    }


def times(name):
    return TIMES[::-1] if name == "mochi" else TIMES  # Mochi's rise


def step(model, inputs, time, branch="cond"):
    """One denoiser call as pipelines make it."""
    with torch.no_grad(), model.cache_context(branch):
        return model(**{**inputs, "timestep": torch.full_like(inputs["timestep"], time)}, return_dict=False)[0]


def walk(model, inputs, name, branch="cond"):
    """The outputs of the three steps of a run."""
    return torch.stack([step(model, inputs, time, branch) for time in times(name)])


def assert_sparse(model, method):
    """Every site ran sparse wherever the method could; AdaSpa's search is a dense call."""
    report = attnproc.report(model)
    assert not report.fallbacks
    for site in report.sites:
        searches = site.dense_calls if method == "adaspa" else 0
        assert site.sparse_calls > 0 and site.dense_calls == searches < site.sparse_calls
        # Every query of VMoBA selects for itself, and all that one query of a block selects is computed.
        assert site.density_mean < 1.0 or method == "vmoba"


def test_runs_sparse_and_both_guidance_styles_agree(method, name, methods, model, inputs):
    """Branches in one batch or in a call each, with ragged text: no sample or branch touches another."""
    stock = walk(model, inputs, name)
    attnproc.install(model, methods.on(method, name))
    together = walk(model, inputs, name, "cond_uncond")
    assert_sparse(model, method)
    assert together.isfinite().all() and (together[-1] - stock[-1]).abs().max() > 1e-4, "the mask must matter"
    apart = []
    for time in times(name):
        pair = [step(model, sample(inputs, n), time, branch) for n, branch in enumerate(("cond", "uncond"))]
        apart.append(torch.cat(pair))
    assert_sparse(model, method)
    torch.testing.assert_close(torch.stack(apart), together, atol=2e-5, rtol=2e-5)
    alone = walk(model, sample(inputs, 1), name, "uncond")
    assert torch.equal(alone, torch.stack(apart)[:, 1:]), "a branch does not know whether there is another"


def test_models_interleaved_give_what_each_gives_alone(method, name, methods, model, inputs):
    """Another model under another method, and a third under the same method with other settings."""
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    with torch.no_grad():
        for each in models[1:]:
            for parameter in each.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    attnproc.install(models[0], methods.on(method, name))
    attnproc.install(models[1], methods.on(OTHER[method], name))
    attnproc.install(models[2], methods.on(method, name, **DENSER[method]))
    alone = [walk(each, inputs, name) for each in models]
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], alone[2])
    turns = [[step(each, inputs, time) for each in models] for time in times(name)]
    for n in range(3):
        assert torch.equal(torch.stack([turn[n] for turn in turns]), alone[n])


def test_keeping_everything_is_dense(method, name, methods, model, inputs):
    expected = walk(model, inputs, name)
    attnproc.install(model, methods.on(method, name, **methods.all_kept(method)))
    torch.testing.assert_close(walk(model, inputs, name), expected, atol=1e-5, rtol=1e-5)
    assert not attnproc.report(model).fallbacks


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_rows_are_those_of_dense_attention(method, name, methods, model, inputs, monkeypatch):
    """In the same call; padding aside. Video rows are not."""
    sparse = SiteProcessor._sparse
    video_differs = []

    def checked(self, query, key, value, layout, site):
        out = sparse(self, query, key, value, layout, site)
        if isinstance(out, torch.Tensor):
            first = layout.video_tokens
            for n in range(len(query)):
                end = layout.tokens if layout.key_valid is None else int(layout.key_valid[n])
                q, k, v = (x[n, :, :end].double() for x in (query, key, value))
                dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
                torch.testing.assert_close(out[n, :, first:end].double(), dense[:, first:], atol=1e-5, rtol=1e-5)
                video_differs.append((out[n, :, :first] - dense[:, :first]).abs().max() > 1e-4)
        return out

    monkeypatch.setattr(SiteProcessor, "_sparse", checked)
    attnproc.install(model, methods.on(method, name))
    walk(model, inputs, name)
    assert video_differs and all(video_differs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_finite_and_near(method, name, methods, model, inputs, dtype):
    attnproc.install(model, methods.on(method, name))
    expected = walk(model, inputs, name)
    half = copy.deepcopy(model).to(dtype)
    floats = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    out = walk(half, floats, name)
    assert_sparse(half, method)
    assert out.dtype == dtype and out.isfinite().all()
    assert (out.float() - expected).norm() < 0.2 * expected.norm()


@pytest.fixture(scope="session")
def built_pipelines(tiny_pipelines):
    """One pipeline of each kind and its inputs, made once."""
    return {name: tiny_pipelines[name]() for name in PIPELINES}


@pytest.fixture
def pipelines(built_pipelines):
    """All of them, as they come."""
    yield built_pipelines
    for pipe, _ in built_pipelines.values():
        pipe.attn_processor = None


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_sparse_repeats_and_is_restored(method, name, methods, pipelines, generate):
    pipe, inputs = pipelines[name]
    stock = generate(pipe, inputs)
    pipe.attn_processor = methods.on(method, name.removesuffix("-true-cfg"))
    first = generate(pipe, inputs)
    assert_sparse(pipe, method)
    assert first.isfinite().all() and not torch.equal(first, stock)
    assert not context_of(pipe.transformer)._states, "what a run remembered is freed"
    assert torch.equal(generate(pipe, inputs), first)
    pipe.attn_processor = None
    assert torch.equal(generate(pipe, inputs), stock)


def test_a_pipeline_that_runs_inside_a_step_of_another_changes_nothing(method, methods, pipelines, generate):
    (outer, outer_inputs), (inner, inner_inputs) = pipelines["wan"], pipelines["hunyuan-true-cfg"]
    outer.attn_processor, inner.attn_processor = methods.on(method, "wan"), methods.on(OTHER[method], "hunyuan")
    alone = generate(outer, outer_inputs), generate(inner, inner_inputs)
    nested = []

    def run_inner(*args):
        nested.append(generate(inner, inner_inputs))
        return {}

    assert torch.equal(generate(outer, outer_inputs, callback_on_step_end=run_inner), alone[0])
    assert len(nested) == 3 and all(torch.equal(out, alone[1]) for out in nested)


@pytest.mark.parametrize("method", ["radial", "sparge", "adaspa", "vmoba"])
@pytest.mark.parametrize("name", ["wan", "hunyuan-true-cfg", "ltx"])
def test_size_and_steps_may_change_between_runs(method, name, methods, pipelines, generate):
    pipe, inputs = pipelines[name]
    wider = {**inputs, "width": inputs["width"] + 32}
    turned = {**inputs, "height": inputs["width"], "width": inputs["height"]}  # as many tokens
    alone = {}
    for key, (call, steps) in {"wider": (wider, 3), "turned": (turned, 3), "more steps": (inputs, 5)}.items():
        pipe.attn_processor = methods.on(method, name)
        alone[key] = generate(pipe, call, steps=steps)
    pipe.attn_processor = methods.on(method, name)
    first = generate(pipe, inputs)
    assert torch.equal(generate(pipe, wider), alone["wider"])
    assert torch.equal(generate(pipe, turned), alone["turned"])
    assert torch.equal(generate(pipe, inputs, steps=5), alone["more steps"])
    assert torch.equal(generate(pipe, inputs), first)
    assert_sparse(pipe, method)


def test_two_experts_run_sparse(method, methods, tiny_pipelines, generate):
    pipe, inputs = tiny_pipelines["wan"](two_experts=True)
    pipe.attn_processor = methods.on(method, "wan")
    first = generate(pipe, inputs, steps=6)
    assert first.isfinite().all() and torch.equal(generate(pipe, inputs, steps=6), first)
    report = attnproc.report(pipe)
    assert not report.fallbacks and {site.denoiser for site in report.sites} == {"transformer", "transformer_2"}
    assert all(site.sparse_calls > 0 for site in report.sites)


VARIANTS = ("wan-i2v", "vace", "animate", "skyreels", "chronoedit", "hunyuan-i2v", "cog-2b", "cog-1.5")


@pytest.mark.parametrize("name", VARIANTS)
def test_image_to_video_and_other_variants_run_sparse(method, name, methods, tiny_models):
    tiny = tiny_models[name]
    model, inputs = tiny.model(), tiny.inputs(2)
    stock = walk(model, inputs, name)
    attnproc.install(model, methods.on(method, name))
    out = walk(model, inputs, name)
    assert_sparse(model, method)
    assert out.isfinite().all() and not torch.equal(out[-1], stock[-1])
    assert torch.equal(walk(model, inputs, name), out)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cog"])  # Hunyuan hands out queries and values of two dtypes
def test_autocast_rounds_the_inputs_of_attention_and_nothing_else(method, name, methods, model, inputs, monkeypatch):
    processor = methods.on(method, name)
    plan, plans = processor.plan, []
    processor.plan = lambda call: plans.append(plan(call)) or plans[-1]
    attnproc.install(model, processor)
    exact = walk(model, inputs, name)
    sparse, dtypes = SiteProcessor._sparse, set()

    def checked(self, query, key, value, layout, site):
        assert not torch.is_autocast_enabled("cpu")
        dtypes.update(x.dtype for x in (query, key, value))
        return sparse(self, query, key, value, layout, site)

    monkeypatch.setattr(SiteProcessor, "_sparse", checked)
    with torch.autocast("cpu", torch.bfloat16):
        chosen = len(plans)
        rounded = walk(model, inputs, name)
        assert_sparse(model, method)
        assert dtypes == {torch.bfloat16} and len(plans) == 2 * chosen > 0
        made = iter(plans[:chosen])
        processor.plan = lambda call: next(made)
        same_blocks = walk(model, inputs, name)
        attnproc.uninstall(model)
        stock = walk(model, inputs, name)
        attnproc.install(model, attnproc.DenseAttnProcessor())
        assert torch.equal(walk(model, inputs, name), stock)
    assert (same_blocks - exact).abs().max() < 0.05 * exact.abs().max()
    # Rounded queries may choose another block, which moves a few tokens far: the whole is what must stay close.
    assert (rounded - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_a_model_trains_after_sampling_in_inference_mode(method, name, methods, model, inputs):
    model.requires_grad_(True)
    attnproc.install(model, methods.on(method, name))
    with torch.inference_mode():
        walk(model, inputs, name)
    first = next(model.parameters())
    gradients = []
    for _ in range(2):
        for time in times(name):
            model.zero_grad()
            with model.cache_context("cond"):
                out = model(**{**inputs, "timestep": torch.full_like(inputs["timestep"], time)}, return_dict=False)[0]
            out.square().sum().backward()
        gradients.append(first.grad.clone())
        attnproc.install(model, methods.on(method, name))  # the second time nothing was sampled before
    assert gradients[0].isfinite().all() and torch.equal(*gradients)


def test_autocast_on_a_model_whose_attention_is_intercepted(tiny_models, methods):
    """The interception comes before autocast would have made one dtype of two."""
    model, inputs = tiny_models["sd3"].model(), tiny_models["sd3"].inputs(2)
    attnproc.install(model, methods.on("sparge", "sd3"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, return_dict=False)[0]
    assert out.isfinite().all() and sum(site.sparse_calls for site in attnproc.report(model).sites) > 0
