"""IR-Diffusion on tiny pipelines with the structure of SD 1.x, SD 2.x and SDXL."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from attnproc.control.ir_diffusion import IRSettings
from attnproc.control.ir_diffusion_attention import IRRun, LayerRules, SceneMasks
from attnproc.control.unet import attention_layers
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.pipelines.ir_diffusion import IRDiffusionPipeline, Scene, Subject, _Call

KNOWN = IRSettings(experimental=True)
STEADY = IRSettings(experimental=True, query_dropout=0.0)
OFF = IRSettings(experimental=True, lam=0.0, extended_steps=(0.0, 0.0), isolation_steps=(0.0, 0.0))
STAR = Subject("a red star", region=(0.2, 0.2, 0.8, 0.8))
CIRCLE = Subject("a blue circle", region=(10, 20, 100, 110))
SCENE = Scene("a red star and a blue circle", [(0, 30, 60, 90), (68, 30, 128, 90)])
RUN = {"num_inference_steps": 2, "output_type": "np"}


def seeds(count):
    return [torch.Generator().manual_seed(number) for number in range(count)]


def tell(pipe, subjects=(STAR, CIRCLE), scene=SCENE, settings=KNOWN, **arguments):
    """One scene; noise from one generator for each picture."""
    arguments = {**RUN, "generator": seeds(len(subjects) + 1), **arguments}
    return IRDiffusionPipeline(pipe)(
        subjects=list(subjects),
        scene_prompt=scene.prompt,
        scene_regions=scene.regions,
        latents=scene.latents,
        settings=settings,
        **arguments,
    )


def plain(pipe, prompts, **arguments):
    return pipe(list(prompts), **{**RUN, "generator": seeds(len(prompts)), **arguments}).images


PROMPTS = (STAR.prompt, CIRCLE.prompt, SCENE.prompt)


def processors(pipe):
    return [module.processor for kind in ("attn1", "attn2") for module in attention_layers(pipe.unet, kind).values()]


def left_alone(pipe, before):
    """The very processors from before, and no hook left."""
    return (
        all(a is b for a, b in zip(processors(pipe), before, strict=True))
        and all(type(p) is AttnProcessor2_0 for p in before)
        and not pipe.unet._forward_pre_hooks
    )


KINDS = pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no guidance", "guidance"])


# -- what is and is not changed ----------------------------------------------------------------------------------------


@KINDS
@GUIDANCE
def test_portraits_are_those_of_a_plain_run_bit_for_bit_and_the_scene_is_not(make_pipe, kind, guidance):
    pipe = make_pipe(kind)
    out = tell(pipe, guidance_scale=guidance)
    expected = plain(pipe, PROMPTS, guidance_scale=guidance)
    for portrait, image in zip(out.references, expected, strict=False):
        assert np.array_equal(portrait, image)
    assert np.isfinite(out.image).all()
    assert not np.allclose(out.image, expected[2], atol=1e-4)


@KINDS
@GUIDANCE
def test_with_everything_off_the_scene_is_the_plain_one(make_pipe, kind, guidance):
    pipe = make_pipe(kind)
    out = tell(pipe, settings=OFF, guidance_scale=guidance)
    expected = plain(pipe, PROMPTS, guidance_scale=guidance)
    np.testing.assert_allclose(out.image, expected[2], atol=1e-5)


def test_with_all_subjects_absent_the_scene_is_the_plain_one(make_pipe):
    pipe = make_pipe("sdxl")
    out = tell(pipe, scene=Scene(SCENE.prompt, [None, None]))
    np.testing.assert_allclose(out.image, plain(pipe, PROMPTS)[2], atol=1e-5)


def test_no_subjects_give_the_plain_picture(make_pipe):
    pipe = make_pipe("sdxl")
    out = tell(pipe, subjects=(), scene=Scene(SCENE.prompt, []))
    assert np.array_equal(out.image, plain(pipe, [SCENE.prompt])[0])
    assert out.references == []


@pytest.mark.parametrize(
    "settings",
    [
        IRSettings(experimental=True, lam=0.0, extended_steps=(0.0, 0.0)),
        IRSettings(experimental=True, lam=0.0, isolation_steps=(0.0, 0.0)),
        IRSettings(experimental=True, extended_steps=(0.0, 0.0), isolation_steps=(0.0, 0.0)),
    ],
    ids=["isolation", "portraits", "text"],
)
def test_each_part_alone_changes_the_scene(make_pipe, settings):
    pipe = make_pipe("sd1")
    assert not np.allclose(tell(pipe, settings=settings).image, plain(pipe, PROMPTS)[2], atol=1e-5)


def test_steps_limit_isolation_extension_and_text(make_pipe):
    pipe = make_pipe("sd1")
    limited = IRSettings(experimental=True, lam=0.0, extended_steps=(0.5, 1.0), isolation_steps=(0.0, 0.5))
    late = IRSettings(experimental=True, lam=0.0, extended_steps=(0.75, 1.0), isolation_steps=(0.75, 1.0))
    told_late = IRSettings(
        experimental=True, extended_steps=(0.0, 0.0), isolation_steps=(0.0, 0.0), text_steps=(0.75, 1.0)
    )

    def states(settings):
        kept = []

        def keep(pipe, step, timestep, arguments):
            kept.append(arguments["latents"][2])
            return arguments

        tell(pipe, settings=settings, callback_on_step_end=keep, num_inference_steps=4)
        return kept

    off, split, end = states(OFF), states(limited), states(late)
    assert not torch.allclose(off[0], split[0], atol=1e-6)
    torch.testing.assert_close(off[2], end[2], atol=1e-6, rtol=0)
    assert not torch.allclose(off[3], end[3], atol=1e-6)
    told = states(told_late)
    torch.testing.assert_close(off[2], told[2], atol=1e-6, rtol=0)
    assert not torch.allclose(off[3], told[3], atol=1e-6)


def test_layers_limit_isolation(make_pipe):
    pipe = make_pipe("sd1")
    base = {"experimental": True, "lam": 0.0, "extended_steps": (0.0, 0.0)}
    images = [
        tell(pipe, settings=IRSettings(**base, isolation_layers=layers)).image
        for layers in (None, ("up_blocks",), ("up_blocks.3.attentions.2", "down_blocks"), ())
    ]
    assert np.allclose(images[3], plain(pipe, PROMPTS)[2], atol=1e-5)
    for one in range(4):
        for other in range(one):
            assert not np.allclose(images[one], images[other], atol=1e-6)


@KINDS
def test_swapping_subjects_leaves_the_scene_unchanged(make_pipe, kind):
    pipe = make_pipe(kind)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(5)).split(1)
    star = Subject(STAR.prompt, STAR.region, latents=noise[0])
    circle = Subject(CIRCLE.prompt, CIRCLE.region, latents=noise[1])
    one = tell(pipe, (star, circle), Scene(SCENE.prompt, SCENE.regions, noise[2]), STEADY)
    other = tell(pipe, (circle, star), Scene(SCENE.prompt, SCENE.regions[::-1], noise[2]), STEADY)
    np.testing.assert_allclose(one.image, other.image, atol=1e-5)


def test_the_same_seed_gives_the_same_picture_and_another_dropout_seed_another(make_pipe):
    pipe = make_pipe("sdxl")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    subjects = [Subject(s.prompt, s.region, latents=noise) for s in (STAR, CIRCLE)]
    scene = Scene(SCENE.prompt, SCENE.regions, noise)
    images = [
        tell(pipe, subjects, scene, generator=torch.Generator().manual_seed(seed), guidance_scale=1.0).image
        for seed in (3, 3, 4)
    ]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_a_single_generator_draws_noise_as_the_plain_pipeline_does(make_pipe):
    pipe = make_pipe("sd1")
    out = tell(pipe, generator=torch.Generator().manual_seed(3))
    expected = plain(pipe, PROMPTS, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(out.references[1], expected[1])


def test_different_negative_prompts_are_blended_too(make_pipe):
    pipe = make_pipe("sd1")
    settings = IRSettings(experimental=True, extended_steps=(0.0, 0.0), isolation_steps=(0.0, 0.0))
    one = tell(pipe, settings=settings, negative_prompt="green", guidance_scale=5.0)
    same = tell(pipe, settings=settings, negative_prompt=["green"] * 3, guidance_scale=5.0)
    assert np.array_equal(one.image, same.image)
    other = tell(pipe, settings=settings, negative_prompt=["white", "pink", "green"], guidance_scale=5.0)
    assert not np.allclose(one.image, other.image, atol=1e-6)


def test_portrait_text_is_blended_with_lam_inside_the_subject_alone(make_pipe):
    pipe = make_pipe("sd1")
    rules = LayerRules.of(pipe.unet, KNOWN, sdxl=False)
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[:64] = True
    run = run_of(pipe, rules, [SceneMasks((mask,), (mask,))], KNOWN)
    run.watch(pipe.unet, (torch.zeros(2, 4, 16, 16), torch.tensor(501)), {})
    name = next(iter(attention_layers(pipe.unet, "attn2")))
    query, key = torch.zeros(2, 1, 256, 4), torch.zeros(2, 1, 3, 4)
    value = torch.stack([torch.full((1, 3, 4), 10.0), torch.full((1, 3, 4), 1.0)])
    out = value[:, :, :1].repeat(1, 1, 256, 1)
    run.cross_attention(name, out, query, key, value, None)
    torch.testing.assert_close(out[1, 0, :128], torch.full((128, 4), 9.1))
    assert torch.equal(out[1, 0, 128:], torch.ones(128, 4))
    assert torch.equal(out[0], torch.full((1, 256, 4), 10.0))


# -- layers and steps --------------------------------------------------------------------------------------------------


def run_of(pipe, rules, scenes, settings, given=None):
    pipe.scheduler.set_timesteps(2)
    generators = [torch.Generator().manual_seed(0) for _ in scenes]
    return IRRun(settings, rules, scenes, (16, 16), generators, given or {}, pipe.scheduler)


def test_sdxl_extends_34_of_70_layers_from_the_published_one(make_pipe):
    rules = LayerRules.of(make_pipe("sdxl").unet, IRSettings(), sdxl=True)
    names = list(attention_layers(make_pipe("sdxl").unet, "attn1"))
    assert len(names) == 70
    assert names[36] == "up_blocks.0.attentions.0.transformer_blocks.2.attn1"
    assert rules.extended == set(names[36:])
    assert sum(name.startswith("up_blocks.0.") for name in rules.extended) == 28
    assert sum(name.startswith("up_blocks.1.") for name in rules.extended) == 6
    assert rules.isolated == set(names)
    assert set(rules.grids((128, 128))) == {(64, 64), (32, 32)}


def test_sd1_extends_all_up_blocks_and_isolates_but_at_the_coarsest_level(make_pipe):
    rules = LayerRules.of(make_pipe("sd1").unet, IRSettings(), sdxl=False)
    assert len(rules.extended) == 9
    assert all(name.startswith("up_blocks") for name in rules.extended)
    assert len(rules.isolated) == 15
    assert not any(name.startswith("mid_block") for name in rules.isolated)
    assert set(rules.grids((64, 64))) == {(64, 64), (32, 32), (16, 16), (8, 8)}


def test_a_layer_name_is_not_taken_for_the_beginning_of_a_longer_number(make_pipe):
    settings = IRSettings(isolation_layers=("up_blocks.0.attentions.0.transformer_blocks.1",))
    rules = LayerRules.of(make_pipe("sdxl").unet, settings, sdxl=True)
    assert rules.isolated == {"up_blocks.0.attentions.0.transformer_blocks.1.attn1"}


def test_one_draw_of_dropout_serves_a_step_and_a_grid(make_pipe):
    pipe = make_pipe("sd1")
    rules = LayerRules.of(pipe.unet, KNOWN, sdxl=False)
    mask = torch.ones(128, 128, dtype=torch.bool)
    run = run_of(pipe, rules, [SceneMasks((mask,), (mask,))], KNOWN)
    sample, device = torch.zeros(2, 4, 16, 16), torch.device("cpu")
    drawn = []
    for timestep in (501, 501, 1):  # a second call of the same step
        run.watch(pipe.unet, (sample, torch.tensor(timestep)), {})
        fine = [name for name in rules.extended if rules.grid(name, (16, 16)) == (16, 16)]
        coarse = [name for name in rules.extended if rules.grid(name, (16, 16)) == (8, 8)]
        queries = [run._members(0, name, device)[0].queries.tolist() for name in fine]
        assert all(tokens == queries[0] for tokens in queries)
        drawn.append((queries[0], run._members(0, coarse[0], device)[0].queries.tolist()))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert run.step == 1


def test_solvers_that_call_twice_in_a_step_are_counted_by_timesteps(make_pipe):
    pipe = make_pipe("sdxl")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = plain(pipe, PROMPTS, num_inference_steps=3)
    late = IRSettings(extended_steps=(0.99, 1.0), isolation_steps=(0.99, 1.0), lam=0.0)
    assert np.array_equal(tell(pipe, settings=late, num_inference_steps=3).image, expected[2])
    last = IRSettings(extended_steps=(0.6, 1.0), isolation_steps=(0.6, 1.0), lam=0.0)
    assert not np.array_equal(tell(pipe, settings=last, num_inference_steps=3).image, expected[2])


# -- a story -----------------------------------------------------------------------------------------------------------


def test_a_story_is_its_scenes_one_by_one(make_pipe):
    pipe = IRDiffusionPipeline(make_pipe("sd1"))
    scenes = [SCENE, Scene("a blue circle", [None, (0, 0, 64, 64)]), Scene("a red star", [(0.0, 0.5, 1.0, 1.0), None])]
    together = pipe.story([STAR, CIRCLE], scenes, settings=KNOWN, generator=seeds(5), **RUN)
    in_parts = pipe.story([STAR, CIRCLE], scenes, settings=KNOWN, generator=seeds(5), scenes_per_batch=2, **RUN)
    assert len(together) == 3
    for number, scene in enumerate(scenes):
        generators = [*seeds(2), torch.Generator().manual_seed(2 + number)]
        alone = tell(pipe.pipe, scene=scene, generator=generators)
        for one in (together[number], in_parts[number]):
            np.testing.assert_allclose(one.image, alone.image, atol=1e-5)
            np.testing.assert_allclose(one.references[1], alone.references[1], atol=1e-5)
    assert not together[1].layouts[16, 16].targets[0].any()


@pytest.mark.parametrize("version", ["sd1", "sdxl"])
def test_negative_prompts_of_a_story_go_with_their_pictures(make_pipe, version):
    pipe = IRDiffusionPipeline(make_pipe(version))
    negative = ["green", "white", "pink", "orange"]
    arguments = {"settings": KNOWN, "negative_prompt": negative, "guidance_scale": 4.0, **RUN}
    if version == "sdxl":
        arguments["negative_prompt_2"] = negative[::-1]
    one = pipe.story([STAR, CIRCLE], [SCENE, SCENE], generator=seeds(4), **arguments)
    other = pipe.story([STAR, CIRCLE], [SCENE, SCENE], generator=seeds(4), scenes_per_batch=1, **arguments)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.image, b.image, atol=1e-5)


# -- where subjects are ------------------------------------------------------------------------------------------------


@KINDS
def test_subjects_are_found_by_words(make_pipe, kind):
    pipe = make_pipe(kind)
    subjects = [Subject(STAR.prompt, word="star"), Subject(CIRCLE.prompt, word="blue circle")]
    arguments = {"guidance_scale": 5.0, "num_inference_steps": 4}
    by_default = tell(pipe, subjects, Scene(SCENE.prompt), **arguments)
    named = tell(pipe, subjects, Scene(SCENE.prompt, ["star", "blue circle"]), **arguments)
    assert np.array_equal(by_default.image, named.image)
    grids = by_default.layouts
    assert any(layout.targets[0].any() for layout in grids.values())
    assert any(layout.targets[1].any() for layout in grids.values())
    assert all((layout.targets.sum(0) <= 1).all() for layout in grids.values())
    expected = plain(pipe, PROMPTS, **arguments)
    assert np.array_equal(by_default.references[0], expected[0])
    assert not np.allclose(by_default.image, expected[2], atol=1e-5)


def test_words_and_masks_mix(make_pipe):
    mask = np.zeros((128, 128), np.uint8)
    mask[20:90, 0:50] = 255
    out = tell(
        make_pipe("sd1"),
        [Subject(STAR.prompt, region=Image.fromarray(mask)), Subject(CIRCLE.prompt, word=[2])],
        Scene(SCENE.prompt, [torch.from_numpy(mask > 0), "circle"]),
    )
    assert out.layouts[16, 16].targets[0].sum() > 0
    assert np.isfinite(out.image).all()


def test_words_are_found_behind_an_embedding_of_several_vectors(make_pipe):
    pipe = make_pipe("sd1")
    pipe.load_textual_inversion({"<thing>": torch.randn(3, 16)}, token="<thing>")
    prompt = "a <thing> and a blue star"
    subjects = [Subject(prompt, word="<thing>"), Subject(prompt, word="blue star")]
    scene = Scene(prompt, ["<thing>", "blue star"])
    places = _Call(IRDiffusionPipeline(pipe), subjects, [scene], KNOWN, None, {}).places
    assert places.references == [(2, 3, 4), (7, 8)]
    assert places.targets == [[(2, 3, 4), (7, 8)]]
    long = "<thing> " * 20  # 62 tokens
    with pytest.raises(SettingsError, match="at most 40"):
        tell(pipe, subjects, Scene(long, [None, None]))


def test_an_sdxl_with_its_second_text_encoder_alone_finds_words(make_pipe):
    full = make_pipe("sdxl")
    # As wide as the second encoder alone.
    unet = UNet2DConditionModel.from_config({**full.unet.config, "cross_attention_dim": 16}).eval()
    parts = {**full.components, "unet": unet, "text_encoder": None, "tokenizer": None}
    pipe = StableDiffusionXLPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    subjects = [Subject(STAR.prompt, word="star"), Subject(CIRCLE.prompt, word="blue circle")]
    assert np.isfinite(tell(pipe, subjects, Scene(SCENE.prompt)).image).all()


class Segmenter:
    """Finds each phrase in a fixed place, but for the first `failures` scenes."""

    def __init__(self, failures=0, place=slice(20, 80)):
        self.failures, self.place, self.seen = failures, place, []

    def __call__(self, image, phrases):
        self.seen.append((np.asarray(image), phrases))
        masks = []
        for number, _ in enumerate(phrases):
            mask = torch.zeros(128, 128)
            mask[self.place, 50 * number : 50 * number + 40] = 1
            masks.append(mask)
        if len(phrases) > 1 and self.failures > 0:
            self.failures -= 1
            masks[1] = None
        return masks


def test_a_segmenter_finds_subjects_in_rehearsals(make_pipe):
    pipe = make_pipe("sd1")
    segmenter = Segmenter()
    subjects = [Subject(STAR.prompt, word="star"), Subject(CIRCLE.prompt)]
    out = tell(pipe, subjects, Scene(SCENE.prompt), segmenter=segmenter)
    assert [phrases for _, phrases in segmenter.seen] == [["star"], [CIRCLE.prompt], ["star", CIRCLE.prompt]]
    expected = plain(pipe, PROMPTS)
    for (image, _), picture in zip(segmenter.seen, expected, strict=True):
        np.testing.assert_allclose(image, picture * 255, atol=1.01)
    boxes = [(0, 20, 40, 80), (50, 20, 90, 80)]
    drawn = tell(
        pipe,
        [Subject(STAR.prompt, region=boxes[0]), Subject(CIRCLE.prompt, region=boxes[0])],
        Scene(SCENE.prompt, boxes),
    )
    np.testing.assert_allclose(out.image, drawn.image, atol=1e-6)


def test_a_scene_that_misses_a_subject_is_rehearsed_with_other_noise(make_pipe):
    pipe = make_pipe("sd1")
    segmenter = Segmenter(failures=2)
    out = tell(pipe, scene=Scene(SCENE.prompt), settings=OFF, segmenter=segmenter)
    pictures = [image for image, phrases in segmenter.seen if len(phrases) == 2]
    assert len(pictures) == 3
    assert not np.array_equal(pictures[0], pictures[1])
    np.testing.assert_allclose(out.image * 255, pictures[2], atol=1.01)
    with pytest.raises(SettingsError, match="in 20 pictures"):
        tell(pipe, scene=Scene(SCENE.prompt), segmenter=Segmenter(failures=99), num_inference_steps=1)


def test_gaps_in_masks_of_rehearsed_scenes_are_closed_in_their_box(make_pipe):
    class Gappy(Segmenter):
        def __call__(self, image, phrases):
            masks = super().__call__(image, phrases)
            for mask in masks:
                mask[46:50] = 0
            return masks

    out = tell(make_pipe("sd1"), scene=Scene(SCENE.prompt), segmenter=Gappy(place=slice(16, 80)))
    target = out.layouts[16, 16].targets[0]
    assert target[2:10, 0:5].all()
    assert int(target.sum()) == 8 * 5


def test_small_masks_in_scenes_grow_when_asked(make_pipe):
    pipe = make_pipe("sd1")
    scene = Scene(SCENE.prompt, [(20, 20, 30, 30), (80, 0, 128, 128)])
    sizes = [
        int(tell(pipe, scene=scene, settings=settings).layouts[16, 16].targets[0].sum())
        for settings in (KNOWN, IRSettings(experimental=True, grow_small_masks=True))
    ]
    assert sizes[0] == 1
    assert sizes[1] >= 25


# -- given portraits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@GUIDANCE
def test_a_given_portrait_is_noised_to_each_step(make_pipe, kind, guidance):
    pipe = make_pipe(kind)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    given = Subject(CIRCLE.prompt, CIRCLE.region, image=picture)
    seen = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    out = tell(pipe, [STAR, given], guidance_scale=guidance)
    hook.remove()
    pixels = pipe.image_processor.preprocess(picture, 128, 128)
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    timesteps = pipe.scheduler.timesteps
    assert len(seen) == len(timesteps)
    for sample, timestep in zip(seen, timesteps, strict=True):
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(2)
        expected = scheduler.scale_model_input(scheduler.add_noise(clean, noise, timestep[None]), timestep)
        for row in sample.unflatten(0, (-1, 3))[:, 1]:
            torch.testing.assert_close(row, expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(out.references[1], np.asarray(picture.resize((128, 128), 1)) / 255, atol=0.02)
    other = tell(pipe, guidance_scale=guidance)
    assert np.array_equal(out.references[0], other.references[0])
    assert not np.allclose(out.image, other.image, atol=1e-6)


# -- surroundings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_half_precision_gives_finite_pictures(make_pipe, kind, dtype):
    pipe = make_pipe(kind).to(dtype=dtype)
    out = tell(pipe, settings=IRSettings(experimental=True, ref_bias=1.0), guidance_scale=5.0, output_type="latent")
    assert out.image.isfinite().all()
    assert out.image.dtype == dtype


def test_a_lora_is_used(make_pipe):
    from peft import LoraConfig

    pipe = make_pipe("sd1")
    before = tell(pipe).image
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    out = tell(pipe)
    assert not np.allclose(out.image, before, atol=1e-6)
    off = tell(pipe, settings=OFF)
    np.testing.assert_allclose(off.image, plain(pipe, PROMPTS)[2], atol=1e-5)


def test_offloading_hooks_do_not_matter(make_pipe):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = make_pipe("sd1")
    before = tell(pipe).image
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        add_hook_to_module(part, AlignDevicesHook(execution_device="cpu"))
    assert np.array_equal(tell(pipe).image, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_processors_and_hooks_are_taken_off_after_an_error(make_pipe, error):
    pipe = make_pipe("sdxl")
    before = processors(pipe)

    def stop(*arguments):
        assert not any(type(p) is AttnProcessor2_0 for p in processors(pipe))
        raise error

    with pytest.raises(error):
        tell(pipe, callback_on_step_end=stop)
    assert left_alone(pipe, before)


def test_a_second_call_of_another_size_is_independent(make_pipe):
    pipe = make_pipe("sd1")
    before = processors(pipe)
    first = tell(pipe)
    boxes = Scene("a red star", [(0, 0, 64, 64), (64, 64, 192, 128)])
    wide = tell(pipe, scene=boxes, width=192)
    assert wide.image.shape == (128, 192, 3)
    assert wide.layouts[16, 24].targets.sum((1, 2)).tolist() == [64, 128]
    assert np.array_equal(tell(pipe).image, first.image)
    assert left_alone(pipe, before)


@pytest.mark.parametrize("side", ["height", "width"])
def test_one_side_given_leaves_the_other_native(make_pipe, side):
    pipe = make_pipe("sd1")
    small = {"height": 128, "width": 128, side: 64}
    scene = Scene(SCENE.prompt, [(0.0, 0.0, 0.5, 1.0), None])
    subjects = [STAR, Subject(CIRCLE.prompt, (0.1, 0.1, 0.9, 0.9))]
    out = tell(pipe, subjects, scene, **{side: 64})
    assert out.image.shape == (small["height"], small["width"], 3)
    assert np.array_equal(out.references[1], plain(pipe, PROMPTS, **small)[1])
    segmented = tell(pipe, [Subject("a red star", word="star")], Scene("a red star"), segmenter=_top, **{side: 64})
    assert segmented.image.shape == out.image.shape


def _top(image, phrases):
    """A segmenter that finds everything in the upper half."""
    assert sorted(image.size) == [64, 128]
    return [(0.0, 0.0, 1.0, 0.5)] * len(phrases)


def test_the_users_callback_sees_all_pictures(make_pipe):
    shapes = []
    tell(make_pipe("sdxl"), callback_on_step_end=lambda p, s, t, a: shapes.append(a["latents"].shape) or a)
    assert shapes == [(3, 4, 16, 16)] * 2


def test_output_types_are_those_of_diffusers(make_pipe):
    pipe = make_pipe("sd1")
    picture = Image.new("RGB", (128, 128), "red")
    subjects = [STAR, Subject(CIRCLE.prompt, CIRCLE.region, image=picture)]
    out = tell(pipe, subjects, output_type="pil")
    assert out.image.size == (128, 128)
    assert all(isinstance(image, Image.Image) for image in out.references)
    latent = tell(pipe, subjects, output_type="latent")
    assert latent.image.shape == latent.references[1].shape == (4, 16, 16)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": Scene(SCENE.prompt, [(0, 0, 9, 9)])}, "1 regions for 2 subjects"),
        ({"scene": Scene(SCENE.prompt, [(0, 0, 9, 9), (100, 0, 140, 9)])}, "inside the picture"),
        ({"scene": Scene(SCENE.prompt, [(0, 0, 9, 9), np.zeros((128, 128))])}, "empty mask"),
        ({"scene": Scene(SCENE.prompt, [(0, 0, 9, 9), np.ones((100, 128))])}, "aspect ratio"),
        ({"scene": Scene(SCENE.prompt, [(0, 0, 9, 9), np.full((128, 128), 3.0)])}, "values from 3"),
        ({"scene": Scene(SCENE.prompt, [(0, 0, 9, 9), "square"])}, "not in the prompt"),
        ({"scene": Scene(SCENE.prompt, ["star", "star"])}, "another one already is"),
        ({"scene": Scene(SCENE.prompt)}, "no regions"),
        ({"scene": Scene("a red star " * 20, SCENE.regions)}, "at most 40"),
        ({"negative_prompt": "a red star " * 20}, "the negative_prompt 'a red star .* at most 40"),
        ({"negative_prompt": ["white", "a red star " * 20, "pink"]}, "the negative_prompt 'a red star .* at most 40"),
        ({"scene": Scene(SCENE.prompt, SCENE.regions, torch.zeros(1, 4, 8, 8))}, "shape"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt)]}, "no region"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt, word="star")]}, "not in the prompt"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt, (0, 0, 9, 9), image=Image.new("L", (9, 8)))]}, "aspect ratio"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt, (0, 0, 9, 9), image="red.png")]}, "PIL"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt, (0, 120, 9, 128))], "settings": IRSettings(ref_bottom_crop=0.2)},
         "ref_bottom_crop"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt, (0.0, 0.0, 1.0, 1.0))]}, "subject 2 in its portrait covers the"),
        ({"subjects": [STAR, Subject(CIRCLE.prompt, np.ones((8, 8)))], "settings": IRSettings(ref_bottom_crop=0.2)},
         "covers the whole picture"),
        ({"settings": IRSettings(extended_from="up_blocks.9")}, "up_blocks.9"),
        ({"settings": IRSettings(isolation_layers=("up",))}, "'up'"),
        ({"height": 120}, "multiple of 64"),
        ({"height": "128"}, "height='128'; expected a positive multiple"),
        ({"width": -64}, "width=-64; expected a positive multiple"),
        ({"num_inference_steps": 0}, "num_inference_steps=0; expected an integer of at least 1"),
        ({"num_inference_steps": 2.0}, "num_inference_steps=2.0; expected an integer"),
        ({"prompt": "a"}, "prompt"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"negative_prompt": ["a"]}, "1 negative prompts"),
        ({"negative_prompt_2": ["a"]}, "1 negative prompts .* as negative_prompt_2"),
        ({"negative_prompt_2": "a red star " * 20}, "the negative_prompt_2 'a red star .* at most 40"),
        ({"generator": seeds(2)}, "2 generators"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_is_refused_before_any_denoising(make_pipe, change, message):
    pipe = make_pipe("sd1")
    pipe.unet.forward = None  # would fail with another error
    with pytest.raises(SettingsError, match=message):
        tell(pipe, **change)


@pytest.mark.parametrize("count", [-1, 0, 1.0, True, "2"])
def test_scenes_per_batch_is_a_count(make_pipe, count):
    with pytest.raises(SettingsError, match=f"scenes_per_batch={count!r}; expected an integer of at least 1"):
        IRDiffusionPipeline(make_pipe("sd1")).story([STAR, CIRCLE], [SCENE], scenes_per_batch=count)


def test_no_scenes_are_refused(make_pipe):
    with pytest.raises(SettingsError, match="no scenes"):
        IRDiffusionPipeline(make_pipe("sd1")).story([STAR], [])


def test_a_subject_under_a_smaller_one_is_warned_of_and_left_out(make_pipe):
    pipe = make_pipe("sdxl")
    same = Scene(SCENE.prompt, [(0, 0, 64, 64), (0, 0, 64, 64)])
    with pytest.warns(
        AttnProcWarning, match="subject 2 of scene 1 has no tokens left on grids of 8 x 8, 4 x 4"
    ) as told:
        out = tell(pipe, scene=same, settings=STEADY)
    assert sum(warning.category is AttnProcWarning for warning in told) == 1
    one = tell(pipe, scene=Scene(SCENE.prompt, [(0, 0, 64, 64), None]), settings=STEADY)
    np.testing.assert_allclose(out.image, one.image, atol=1e-6)


def test_masks_are_compared_also_where_other_places_are_read_from_words(make_pipe):
    pipe = make_pipe("sd1")
    rules = LayerRules.of(pipe.unet, KNOWN, sdxl=False)
    mask = torch.ones(128, 128, dtype=torch.bool)
    for scene in (SceneMasks(((2, 3), mask), (mask, mask)), SceneMasks((mask, mask, mask), (mask, mask, (2,)))):
        with pytest.warns(AttnProcWarning, match="subject 2 of scene 1 has no tokens left") as told:
            run_of(pipe, rules, [scene], KNOWN)
        assert len(told) == 1


def test_a_warning_names_the_scene_of_the_story(make_pipe):
    same = Scene(SCENE.prompt, [(0, 0, 64, 64), (0, 0, 64, 64)])
    pipe = IRDiffusionPipeline(make_pipe("sd1"))
    with pytest.warns(AttnProcWarning, match="subject 2 of scene 2 "):
        pipe.story([STAR, CIRCLE], [SCENE, same], settings=KNOWN, scenes_per_batch=1, **RUN)


def test_other_unets_than_sdxl_are_called_experimental_once(make_pipe):
    with pytest.warns(AttnProcWarning, match="experimental") as caught:
        tell(make_pipe("sd1"), settings=IRSettings())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnProcWarning)
        tell(make_pipe("sd1"), settings=KNOWN)
        tell(make_pipe("sdxl"), settings=IRSettings())


def test_other_processors_are_not_overwritten(make_pipe):
    pipe = make_pipe("sd1")
    cross = attention_layers(pipe.unet, "attn2")

    class Adapter(AttnProcessor2_0):
        pass

    for module in cross.values():
        module.processor = Adapter()
    with pytest.raises(UnsupportedError, match="Adapter"):
        tell(pipe)
    tell(pipe, settings=IRSettings(experimental=True, lam=0.0))  # cross-attention is left alone
    assert all(type(module.processor) is Adapter for module in cross.values())
