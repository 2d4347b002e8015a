"""`PrimeComposerPipeline` on tiny models: what stays of the background, what is restored, and what is refused."""

import random

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from attnproc.control.prime_composer import PrimeComposerSettings
from attnproc.control.unet import attention_layers
from attnproc.demos.shapes import shapes_image_path
from attnproc.demos.shapes.render import render
from attnproc.demos.shapes.scene import sample_scene
from attnproc.errors import AttnProcError, AttnProcWarning, SettingsError, UnsupportedError
from attnproc.pipelines import prime_composer
from attnproc.pipelines.inversion import decode, encode_pictures
from attnproc.pipelines.prime_composer import PrimeComposerPipeline

PROMPT = "a plain red star on a navy background"
BOX = (35, 20, 101, 90)  # in 128 x 128 pixels: latent rows 2 to 12, columns 4 to 13
INSIDE = (slice(2, 12), slice(4, 13))
STEPS = 3


def noise_picture(width=128, height=128):
    return Image.fromarray(np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8))


def silhouette(width=60, height=40):
    mask = np.zeros((height, width), bool)
    mask[5:-5, 8:-8] = True
    return mask


@pytest.fixture
def given():
    """Arguments of a call: fresh pictures, a fixed seed of the noise."""
    return {
        "background": noise_picture(),
        "object_image": noise_picture(60, 40),
        "object_mask": silhouette(),
        "target": BOX,
        "subject": "red star",
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


@pytest.fixture
def compose(given):
    """compose(pipe, **changes): one call at a fixed seed."""

    def call(pipe, prompt=PROMPT, **changes):
        arguments = {"generator": torch.Generator().manual_seed(5), **given, **changes}
        return PrimeComposerPipeline.from_pipe(pipe)(prompt, **arguments)

    return call


@pytest.fixture(params=["sd1", "sd2"])
def either(request, make_pipe):
    return make_pipe(request.param)


@pytest.fixture
def pipe(make_pipe):
    return make_pipe("sd2")


def pointed_at(told):
    """Files of the lines that our warnings name."""
    return {warning.filename for warning in told if warning.category is AttnProcWarning}


def outside(latents):
    kept = torch.ones(latents.shape[-2:], dtype=torch.bool)
    kept[INSIDE] = False
    return latents[..., kept]


# -- the background ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["same", "cross"])
@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_background_latents_outside_the_box_are_untouched_to_the_bit(either, compose, given, domain, solver):
    out = compose(either, domain=domain, settings=PrimeComposerSettings(solver=solver))
    with torch.no_grad():
        kept = out.pastes[0] if domain == "same" else given["background"]
        wanted = encode_pictures(either, [kept])
    assert torch.equal(outside(out.images), outside(out.background_latents))
    torch.testing.assert_close(out.background_latents, wanted)
    assert out.images.isfinite().all()
    assert not torch.allclose(out.images[..., *INSIDE], wanted[..., *INSIDE], atol=1e-2)


def test_published_schedule_leaves_the_last_steps_free(pipe, compose):
    out = compose(pipe, settings=PrimeComposerSettings(tau_b=0.8, blend_last=False, schedule="release"))
    assert not torch.equal(outside(out.images), outside(out.background_latents))


def test_every_blended_evaluation_sees_the_inverted_background(pipe, compose, monkeypatch):
    """What the generator is given outside the box is the background's own latent of that noise level."""
    background, seen = [], []
    inversion = prime_composer.invert_latents

    def invert(*arguments):
        latents = inversion(*arguments)
        background.extend(latents[::-1])
        return latents

    predict = prime_composer._Generator._predict

    def watch(self, infuse, timestep, latents):
        seen.append(latents.clone())
        return predict(self, infuse, timestep, latents)

    monkeypatch.setattr(prime_composer, "invert_latents", invert)
    monkeypatch.setattr(prime_composer._Generator, "_predict", watch)
    compose(pipe, num_inference_steps=4)
    blended = [torch.equal(outside(a), outside(b[:1])) for a, b in zip(seen, background, strict=False)]
    assert blended == [True] * 3 + [False]  # k = 0 starts there; tau_b = 1 blends before k < 3


def test_a_paste_sets_the_object_back_to_its_reference(pipe, compose, monkeypatch):
    trajectory, seen = [], []
    inversion, predict = prime_composer.invert_latents, prime_composer._Generator._predict

    def invert(*arguments):
        trajectory.extend(inversion(*arguments)[::-1])
        return trajectory[::-1]

    def watch(self, infuse, timestep, latents):
        seen.append(latents.clone())
        return predict(self, infuse, timestep, latents)

    monkeypatch.setattr(prime_composer, "invert_latents", invert)
    monkeypatch.setattr(prime_composer._Generator, "_predict", watch)
    settings = PrimeComposerSettings(tau_c=0.75, tau_a=0.5, reset_history_on_paste=True)
    compose(pipe, settings=settings, domain="cross", num_inference_steps=8)
    for k in (2, 3, 4):  # int(0.75 * 8 + 1 - 2) = 5
        composite = torch.where(seen[k] == trajectory[k][:1], trajectory[k][:1], trajectory[k][1:])
        assert torch.equal(seen[k], composite)
        assert (seen[k] == trajectory[k][1:]).any() and torch.equal(outside(seen[k]), outside(trajectory[k][:1]))


def test_start_is_background_object_and_fresh_noise(pipe, compose, monkeypatch):
    starts = {}
    run = prime_composer._Generator.run

    def watch(self, latents, callback):
        starts[len(starts)] = (latents, self)
        return run(self, latents, callback)

    monkeypatch.setattr(prime_composer._Generator, "run", watch)
    noise = torch.randn(1, 4, 16, 16)
    for domain in ("same", "cross"):
        compose(pipe, domain=domain, latents=noise)
    for k, source in enumerate(("background", "reference")):
        start, generator = starts[k]
        expected = torch.where(generator.box, noise, generator.background[0])
        expected = torch.where(generator.mask, getattr(generator, source)[0], expected)
        assert torch.equal(start, expected)
        assert torch.equal(outside(start), outside(generator.background[0]))


def shapes_image():
    try:
        return shapes_image_path()
    except FileNotFoundError:
        return None


@pytest.mark.skipif(shapes_image() is None, reason="shapes-image is not there")
def test_pixels_outside_the_box_stay_within_the_error_of_the_autoencoder(compose):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(shapes_image())
    pipe.set_progress_bar_config(disable=True)
    scene = sample_scene(random.Random(3), 1, held_out=True, still=True)
    background = np.full((128, 128, 3), (16, 20, 78), np.uint8)
    drawn = compose(
        pipe,
        "a plain red star on a navy background",
        background=background,
        object_image=render(scene, 128, 1)[0],
        object_mask=render(scene, 128, 1)[0].max(-1) > 127,
        target=(32, 40, 80, 88),
        num_inference_steps=6,
        output_type="np",
    )
    with torch.no_grad():
        coded = pipe.image_processor.postprocess(decode(pipe, drawn.background_latents), output_type="np")
    far = np.ones((128, 128), bool)
    far[40 - 8 : 88 + 8, 32 - 8 : 80 + 8] = False  # the decoder looks two latent cells around
    error, least = (np.abs(picture[0] - background / 255)[far].mean() for picture in (drawn.images, coded))
    assert error < 1.5 * least


# -- the method is live ------------------------------------------------------------------------------------------------


CHANGES = {
    "domain": {"domain": "cross"},
    "cd_query": {"settings": PrimeComposerSettings(cd_query="object")},
    "tau_a": {"settings": PrimeComposerSettings(tau_a=1.0)},
    "extended guidance": {"settings": PrimeComposerSettings(extended_guidance=3.0)},
    "inversion prompt": {"settings": PrimeComposerSettings(inversion_prompt="a blue circle")},
    "subject by indices": {"subject": [2, 3, 4]},
    "guidance": {"guidance_scale": 5.0},
    "negative prompt": {"negative_prompt": "a green circle"},
    "seed": {"generator": torch.Generator().manual_seed(6)},
}


def test_every_setting_changes_the_picture(pipe, compose):
    base = compose(pipe, num_inference_steps=4).images
    changed = {name: compose(pipe, num_inference_steps=4, **change).images for name, change in CHANGES.items()}
    assert [name for name, images in changed.items() if torch.allclose(images, base, atol=1e-6)] == []


def test_infusion_and_word_regions_are_live(either, compose, monkeypatch):
    base = compose(either).images
    with pytest.warns(AttnProcWarning, match="subject=None") as told:
        free = compose(either, subject=None).images
    assert pointed_at(told) == {__file__}
    assert not torch.allclose(base, free, atol=1e-6)
    monkeypatch.setattr(prime_composer._Generator, "_capture", lambda *_: None)
    assert not torch.allclose(base, compose(either).images, atol=1e-6)


def test_extended_guidance_costs_one_row_of_infused_evaluations_alone(pipe, compose):
    def rows(**changes):
        seen = []
        hook = pipe.unet.register_forward_pre_hook(
            lambda module, given, named: seen.append(len(given[0])), with_kwargs=True
        )
        compose(pipe, num_inference_steps=5, **changes)
        hook.remove()
        return seen

    plain = [2] * 5 + [2, 2] * 2 + [2] * 3  # inversion; two infused evaluations with their capture; the others
    assert rows() == plain
    extended = PrimeComposerSettings(extended_guidance=2.0)
    assert rows(settings=extended) == [2] * 5 + [2, 3] * 2 + [2] * 3
    assert rows(guidance_scale=1.0) == [2] * 5 + [2, 1] * 2 + [1] * 3


def test_the_correlation_diffuser_leaves_the_solver_alone(pipe, compose, monkeypatch):
    capture = prime_composer._Generator._capture
    calls = []

    def watch(self, *arguments):
        before = dict(self.scheduler.__dict__), list(getattr(self.scheduler, "model_outputs", []))
        capture(self, *arguments)
        after = dict(self.scheduler.__dict__), list(getattr(self.scheduler, "model_outputs", []))
        calls.append(all(after[0][name] is value for name, value in before[0].items()))
        calls.append(all(a is b for a, b in zip(after[1], before[1], strict=True)))

    monkeypatch.setattr(prime_composer._Generator, "_capture", watch)
    compose(pipe)
    assert calls and all(calls)


def test_markers_name_the_subject(pipe, compose):
    marked = compose(pipe, "a plain <ref> red star <ref> on a navy background", subject=None)
    assert torch.equal(marked.images, compose(pipe).images)


def test_two_calls_are_the_same_and_the_scheduler_is_left_alone(pipe, compose):
    pipe.scheduler.set_timesteps(7)
    before = (dict(pipe.scheduler.config), pipe.scheduler.timesteps.clone(), pipe.scheduler)
    assert torch.equal(compose(pipe).images, compose(pipe).images)
    assert pipe.scheduler is before[2]
    assert dict(pipe.scheduler.config) == before[0] and torch.equal(pipe.scheduler.timesteps, before[1])


# -- lists, sizes, types -----------------------------------------------------------------------------------------------


def test_a_list_of_prompts_gives_what_each_gives_alone(pipe, compose, given):
    second = {"prompt": "a blue circle and a green star on a black background", "subject": "blue circle"}
    second |= {"target": (60, 64, 120, 120), "background": noise_picture()}
    alone = [compose(pipe), compose(pipe, **second)]
    both = compose(
        pipe,
        prompt=[PROMPT, second["prompt"]],
        subject=["red star", "blue circle"],
        target=[BOX, second["target"]],
        background=[given["background"], second["background"]],
        generator=[torch.Generator().manual_seed(5) for _ in range(2)],
    )
    assert torch.equal(both.images, torch.cat([out.images for out in alone]))
    assert len(both.pastes) == 2 and both.background_latents.shape == (2, 4, 16, 16)


@pytest.mark.parametrize(("width", "height"), [(192, 128), (64, 192)])
def test_other_shapes_than_square(pipe, compose, width, height):
    out = compose(
        pipe,
        background=noise_picture(width * 3, height * 3),
        target=(0.25, 0.25, 0.75, 0.9),
        width=width,
        height=height,
        output_type="pil",
    )
    assert out.images[0].size == out.pastes[0].size == (width, height)


@pytest.mark.parametrize(("output_type", "kind"), [("pil", Image.Image), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_output_types(pipe, compose, output_type, kind):
    images = compose(pipe, output_type=output_type).images
    assert len(images) == 1 and isinstance(images[0], kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_the_background(either, compose, dtype):
    out = compose(either.to(dtype), settings=PrimeComposerSettings(tau_a=0.8, extended_guidance=1.0))
    assert out.images.dtype == torch.float32 and out.images.isfinite().all()
    assert torch.equal(outside(out.images), outside(out.background_latents))


def test_object_pixels_over_the_border_fall_away(pipe, compose):
    with pytest.warns(AttnProcWarning, match="cut at the border") as told:
        assert compose(pipe, target=(80, 80, 150, 150)).images.isfinite().all()
    assert pointed_at(told) == {__file__}


def test_with_lora_weights(pipe, compose):
    peft = pytest.importorskip("peft")
    base = compose(pipe).images
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "style"
    )
    assert not torch.allclose(base, compose(pipe).images, atol=1e-6)


def test_offloaded_weights_do_not_matter(pipe, compose):
    """Sequential offload: weights on the meta device between the calls of their modules."""
    from accelerate import cpu_offload

    base = compose(pipe).images
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, "cpu", offload_buffers=True)
    assert pipe.unet.conv_in.weight.is_meta
    assert torch.equal(compose(pipe).images, base)


# -- the user's callback, interruption, restoring ----------------------------------------------------------------------


def test_callback_gets_every_step_and_may_change_the_latents(pipe, compose):
    seen = []

    def note(given_pipe, step, timestep, tensors):
        seen.append((given_pipe is pipe, step, sorted(tensors), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else tensors

    names = ["latents", "prompt_embeds"]
    out = compose(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert seen == [(True, step, ["latents", "prompt_embeds"], (1, 4, 16, 16)) for step in range(STEPS)]
    assert out.images[..., *INSIDE].eq(0).all()


def test_official_callbacks_work(pipe, compose):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    compose(pipe, num_inference_steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    hook.remove()
    assert rows == [2] * 4 + [2, 2] * 2 + [2, 1]


def test_interrupting_ends_the_steps(pipe, compose):
    seen = []

    def stop(given_pipe, step, timestep, tensors):
        seen.append(step)
        given_pipe._interrupt = step == 1
        return tensors

    assert compose(pipe, callback_on_step_end=stop).images.isfinite().all()
    assert seen == [0, 1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_is_restored_after_an_exception(pipe, compose, error, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    before = {name: pipe.unet.get_submodule(name).processor for name in _layers(pipe)}

    def fail(*_):
        assert all(pipe.unet.get_submodule(name).processor is not before[name] for name in before)
        raise error

    with pytest.raises(error):
        compose(pipe, callback_on_step_end=fail)
    assert all(pipe.unet.get_submodule(name).processor is before[name] for name in before)
    assert freed and not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_processors_are_restored_after_a_call(either, compose):
    before = {name: either.unet.get_submodule(name).processor for name in _layers(either)}
    compose(either)
    assert all(either.unet.get_submodule(name).processor is before[name] for name in before)


def _layers(pipe):
    return [*attention_layers(pipe.unet, "attn1"), *attention_layers(pipe.unet, "attn2")]


def test_the_subject_is_found_behind_a_word_of_several_vectors(make_pipe, compose, monkeypatch):
    pipe = make_pipe("sd1")
    pipe.load_textual_inversion({"<thing>": torch.randn(3, 16)}, token="<thing>")
    seen, steering = [], prime_composer.Steering

    def listening(*arguments):
        seen.append(arguments[2])
        return steering(*arguments)

    monkeypatch.setattr(prime_composer, "Steering", listening)
    compose(pipe, prompt="a <thing> and a blue star", subject="blue star")
    assert seen == [(7, 8)]


# -- refused before the model runs -------------------------------------------------------------------------------------

BAD_CALLS = {
    "subject not in the prompt": ({"subject": "green star"}, "not in the prompt"),
    "subject of no tokens": ({"subject": ""}, "no tokens"),
    "prompt too long": ({"prompt": "a red star and " * 20}, "tokens"),
    "negative prompt too long": ({"negative_prompt": "red " * 60}, "negative_prompt"),
    "inversion prompt too long": (
        {"settings": PrimeComposerSettings(inversion_prompt="red " * 60)},
        "inversion_prompt",
    ),
    "empty prompts": ({"prompt": []}, "at least one"),
    "one marker": ({"prompt": "a <ref> red star", "subject": None}, "two around"),
    "markers and subject": ({"prompt": "a <ref> red <ref> star"}, "no subject"),
    "unknown domain": ({"domain": "photo"}, "same, cross"),
    "settings of another kind": ({"settings": {"tau_a": 0.3}}, "PrimeComposerSettings"),
    "box outside": ({"target": (130, 0, 160, 40)}, "inside the picture"),
    "empty mask": ({"object_mask": np.zeros((40, 60))}, "empty mask"),
    "mask over everything": ({"object_mask": np.ones((40, 60))}, "covers the whole"),
    "mask of another shape": ({"object_mask": np.ones((60, 40))}, "aspect ratio"),
    "picture that is none": ({"background": "b.png"}, "PIL image"),
    "odd size": ({"height": 100}, "multiple of 64"),
    "too few steps": ({"num_inference_steps": 1}, "at least 2"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents have the shape"),
    "lists of other lengths": ({"prompt": [PROMPT] * 2, "subject": ["red star"] * 3}, "equally long"),
    "list for one prompt": ({"background": [noise_picture()]}, "equally long"),
    "guidance that is no number": ({"guidance_scale": "high"}, "guidance_scale"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "noise_pred"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_refused_before_the_model_runs(make_pipe, compose, change, message):
    pipe = make_pipe("sd1")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the U-Net ran"))
    pipe.vae.register_forward_pre_hook(lambda *_: pytest.fail("the autoencoder ran"))
    with pytest.raises(SettingsError, match=message):
        compose(pipe, **change)


def test_schedulers_that_add_noise_are_refused(make_pipe, compose):
    pipe = make_pipe("sd1")
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(SettingsError, match="adds noise"):
        compose(pipe)


def test_other_models_and_processors_are_refused(make_pipe, compose):
    with pytest.raises(UnsupportedError, match="StableDiffusionXLPipeline"):
        PrimeComposerPipeline(make_pipe("sdxl"))
    pipe = make_pipe("sd1")
    name = _layers(pipe)[0]
    pipe.unet.get_submodule(name).processor = foreign = diffusers.models.attention_processor.SlicedAttnProcessor(1)
    with pytest.raises(UnsupportedError, match="SlicedAttnProcessor"):
        compose(pipe)
    assert pipe.unet.get_submodule(name).processor is foreign


def test_inpainting_models_are_refused(make_pipe, compose):
    pipe = make_pipe("sd1")
    pipe.register_modules(unet=diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9))
    with pytest.raises(UnsupportedError, match="9 input channels"):
        compose(pipe)


def test_not_finite_scores_are_an_error_with_the_layers_name(make_pipe, compose):
    pipe = make_pipe("sd1")
    name = next(iter(attention_layers(pipe.unet, "attn1")))
    torch.nn.init.constant_(pipe.unet.get_submodule(name).to_q.weight, torch.inf)
    with pytest.raises(AttnProcError, match=name):
        compose(pipe)
