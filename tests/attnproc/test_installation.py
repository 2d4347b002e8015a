"""Setting a processor on a pipeline or model: what it touches, what it shares, how it goes away."""

import json

import diffusers
import pytest
import torch

import attnproc
from attnproc import AttnProcWarning, DenseAttnProcessor, SettingsError
from attnproc.compat import attention_modules
from attnproc.context import context_of


def processors(model):
    return {name: module.processor for name, module in attention_modules(model)}


def test_the_property_sets_reads_and_takes_off(wan, generate, random_mask):
    pipe, inputs = wan
    stock, before = generate(pipe, inputs), processors(pipe.transformer)
    assert pipe.attn_processor is None
    pipe.attn_processor = processor = random_mask(density=0.3)
    assert pipe.attn_processor is processor is attnproc.installed(pipe) is attnproc.installed(pipe.transformer)
    assert not torch.equal(generate(pipe, inputs), stock)
    pipe.attn_processor = None
    assert pipe.attn_processor is None
    after = processors(pipe.transformer)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(generate(pipe, inputs), stock)
    pipe.attn_processor = None  # nothing to take off is no error


def test_a_new_processor_replaces_the_old_one(wan, generate, random_mask):
    pipe, inputs = wan
    stock = generate(pipe, inputs)
    pipe.attn_processor = random_mask(density=0.3)
    pipe.attn_processor = DenseAttnProcessor()
    assert torch.equal(generate(pipe, inputs), stock)
    pipe.attn_processor = None
    assert torch.equal(generate(pipe, inputs), stock)


def test_two_pipelines_with_different_settings_do_not_mix(tiny_pipelines, generate, random_mask):
    (one, inputs), (two, _) = tiny_pipelines["wan"](), tiny_pipelines["wan"]()
    one.attn_processor, two.attn_processor = random_mask(density=0.2), random_mask(density=0.8, block_size=24)
    alone = generate(one, inputs), generate(two, inputs)
    assert not torch.equal(*alone)
    together = []
    # The second pipeline runs completely inside a step of the first.
    first = generate(one, inputs, callback_on_step_end=lambda *args: together.append(generate(two, inputs)) or {})
    assert torch.equal(first, alone[0]) and all(torch.equal(out, alone[1]) for out in together)
    assert attnproc.report(one).sites[0].sparse_calls == attnproc.report(two).sites[0].sparse_calls == 6


def test_one_processor_object_may_serve_two_pipelines(tiny_pipelines, generate, random_mask):
    (one, inputs), (two, _) = tiny_pipelines["wan"](), tiny_pipelines["wan"]()
    one.attn_processor = two.attn_processor = random_mask(density=0.3)
    expected = generate(one, inputs)
    assert torch.equal(generate(two, inputs), expected)
    one.attn_processor = None
    assert torch.equal(generate(two, inputs), expected)
    assert context_of(one.transformer) is None and context_of(two.transformer) is not None


def test_from_pipe_shares_the_processor_and_follows_its_own_scheduler(tiny_pipelines, generate, recording):
    pipe, inputs = tiny_pipelines["sd"]()
    pipe.attn_processor = processor = recording()
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.attn_processor is processor
    other.scheduler = diffusers.EulerDiscreteScheduler()
    other.vae = diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
    )
    text = {name: value for name, value in inputs.items() if "embeds" in name}
    for _ in range(2):
        processor.calls.clear()
        generate(other, text, steps=4, image=torch.zeros(1, 4, 16, 12), strength=0.5)
        assert processor.trace == [(0, "call0"), (1, "call0")]
        processor.calls.clear()
        generate(pipe, inputs, steps=3)
        assert processor.trace == [(step, "call0") for step in range(3)]
    other.attn_processor = None
    assert pipe.attn_processor is None


def test_using_nests_and_restores_also_after_an_error(wan, generate, random_mask):
    pipe, inputs = wan
    before, stock = processors(pipe.transformer), generate(pipe, inputs)
    outer, inner = random_mask(density=0.3), random_mask(density=0.6)
    with attnproc.using(pipe, outer):
        expected = generate(pipe, inputs)
        with pytest.raises(KeyboardInterrupt), attnproc.using(pipe, inner):
            assert pipe.attn_processor is inner
            assert not torch.equal(generate(pipe, inputs), expected)
            raise KeyboardInterrupt
        assert pipe.attn_processor is outer
        assert torch.equal(generate(pipe, inputs), expected)
        with pytest.raises(SettingsError), attnproc.using(pipe, "radial"):
            pass
        assert pipe.attn_processor is outer
    after = processors(pipe.transformer)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(generate(pipe, inputs), stock)


def test_processors_the_user_had_set_come_back(wan, generate):
    pipe, _ = wan

    class Mine(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
        pass

    pipe.transformer.set_attn_processor(mine := Mine())
    pipe.attn_processor = DenseAttnProcessor()
    pipe.attn_processor = None
    assert all(processor is mine for processor in processors(pipe.transformer).values())


def test_what_others_set_since_is_left_alone(wan, generate, random_mask):
    pipe, inputs = wan
    pipe.attn_processor = random_mask()
    theirs = diffusers.models.transformers.transformer_wan.WanAttnProcessor()
    pipe.transformer.blocks[0].attn1.set_processor(theirs)
    with pytest.warns(AttnProcWarning, match=r"blocks.0.attn1 now has a WanAttnProcessor"):
        generate(pipe, inputs)
    assert [site.replaced for site in attnproc.report(pipe).sites] == [True, False]
    pipe.attn_processor = None
    assert pipe.transformer.blocks[0].attn1.processor is theirs


def test_nothing_of_ours_is_saved(wan, generate, random_mask, tmp_path):
    pipe, inputs = wan
    stock = generate(pipe, inputs)
    pipe.transformer.save_pretrained(tmp_path / "before")
    pipe.attn_processor = random_mask()
    generate(pipe, inputs)
    pipe.transformer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    assert len(list((tmp_path / "after").iterdir())) == len(list((tmp_path / "before").iterdir()))
    assert "attn_processor" not in json.dumps(dict(pipe.config), default=str)
    assert "attn_processor" not in pipe.components
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "after")
    assert attnproc.installed(loaded) is None
    pipe.transformer = loaded.eval()
    assert pipe.attn_processor is None, "a denoiser put in later is stock, and the property says so"
    assert torch.equal(generate(pipe, inputs), stock)


def test_a_compiled_denoiser_is_looked_through(tiny_models, random_mask):
    model = tiny_models["wan"].model()
    attnproc.install(torch.compile(model, backend="eager"), random_mask())
    assert attnproc.installed(model) is not None
    attnproc.uninstall(torch.compile(model, backend="eager"))
    assert attnproc.installed(model) is None


def test_a_modular_pipeline_has_the_property(tiny_models, recording):
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=tiny_models["wan"].model(in_channels=16, out_channels=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    torch.manual_seed(0)
    inputs = {
        "prompt_embeds": torch.randn(1, 7, 16),
        "negative_prompt_embeds": torch.randn(1, 7, 16),
        "height": 80,
        "width": 112,
        "num_frames": 9,
        "num_inference_steps": 3,
        "output": "latents",
    }

    def generate():
        return pipe(**inputs, generator=torch.Generator().manual_seed(0))

    expected = generate()
    pipe.attn_processor = processor = recording()
    assert pipe.attn_processor is processor
    for _ in range(2):
        processor.calls.clear()
        assert torch.equal(generate(), expected)
        steps = [step for step, _ in processor.trace]
        assert steps == sorted(steps) and set(steps) == {0, 1, 2} and len(set(processor.trace)) == len(steps)
        assert not context_of(pipe.transformer)._states
    pipe.attn_processor = None
    assert pipe.attn_processor is None


@pytest.mark.parametrize(
    ("target", "message"),
    [(object(), "has no denoiser"), (torch.nn.Linear(1, 1), "without self-attention")],
)
def test_a_target_that_cannot_take_a_processor_is_refused(target, message):
    with pytest.raises(SettingsError, match=message):
        attnproc.install(target, DenseAttnProcessor())


def test_a_processor_must_be_one_of_ours(wan):
    pipe, _ = wan
    with pytest.raises(SettingsError, match="str; expected an attnproc processor"):
        pipe.attn_processor = "radial"


def test_dense_layers_must_exist(wan, random_mask):
    pipe, _ = wan
    with pytest.raises(SettingsError, match="names layer 2, but WanTransformer3DModel has 2"):
        pipe.attn_processor = random_mask(dense_layers=[0, 2])
    assert pipe.attn_processor is None


def test_a_refused_processor_leaves_the_old_one(wan, random_mask):
    pipe, _ = wan
    pipe.attn_processor = kept = random_mask()
    with pytest.raises(SettingsError):
        pipe.attn_processor = random_mask(dense_layers=9)
    assert pipe.attn_processor is kept


def test_no_report_without_a_processor(wan):
    with pytest.raises(SettingsError, match="nothing to report"):
        attnproc.report(wan[0])


def test_the_report_is_plain_data_and_prints(wan, generate, random_mask):
    pipe, inputs = wan
    pipe.attn_processor = random_mask(density=0.3, dense_steps=1)
    generate(pipe, inputs)
    report = attnproc.report(pipe)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["settings"]["transformer"]["settings"]["density"] == 0.3
    mask = pipe.attn_processor.kept(0, 105)
    assert report.sites[0].density_mean == report.sites[0].density_min == pytest.approx(mask.density)
    sparse = [site.density_mean for site in report.sites]
    assert report.sparse_density == pytest.approx(sum(sparse) / 2)
    assert report.density == pytest.approx((1 + 2 * sum(sparse) / 2) / 3)
    assert report.attention_seconds > 0
    text = repr(report)
    assert "transformer.blocks.0.attn1" in text and "random-mask" in text and f"{report.density:.3f}" in text
