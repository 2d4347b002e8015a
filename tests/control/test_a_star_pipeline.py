"""A-STAR on tiny Stable Diffusion pipelines of every version: what it computes, costs, refuses and restores."""

import random

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import PipelineCallback
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig

import attnproc
from attnproc.control.a_star import AStarSettings
from attnproc.control.a_star_controller import AStarController
from attnproc.control.attention_maps import MapRecorder, _Capture, captured_maps, layer_grids, layers_at
from attnproc.control.unet import attention_layers
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.pipelines.a_star import AStarPipeline

PROMPT = "a red circle and a blue star on a navy background"
CONCEPTS = ["red circle", "star"]
LONG = "a red circle and a blue star and a green cross on a navy background"


@pytest.fixture(autouse=True)
def seed():
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def sd(make_pipe):
    return make_pipe("sd1")


def call(pipe, *args, seed=0, steps=2, settings=None, **arguments):
    """Latents of an A-STAR call, or with no concepts of the plain pipeline."""
    arguments = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **arguments,
    }
    args = args or ([] if "prompt_embeds" in arguments else [PROMPT])
    if "concepts" not in arguments:
        return pipe(*args, **arguments).images
    return AStarPipeline(pipe)(*args, settings=settings, **arguments).images


class Calls:
    """Counts forward passes of a U-Net that begin, and that reach the last up block."""

    def __init__(self, unet):
        self.begun, self.ended = 0, 0
        unet.conv_in.register_forward_hook(lambda *_: setattr(self, "begun", self.begun + 1))
        unet.up_blocks[-1].register_forward_hook(lambda *_: setattr(self, "ended", self.ended + 1))


# -- which layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "size", "count"),
    [("sd1", (16, 16), 5), ("sd2", (16, 24), 5), ("sdxl", (16, 16), 60), ("sdxl", (7, 9), 60)],
)
def test_the_layers_at_a_quarter_are_those_of_the_specification(make_pipe, version, size, count):
    unet = make_pipe(version).unet
    quarter = tuple(-(-side // 4) for side in size)
    layers = layers_at(unet, *size, quarter)
    assert len(layers) == count
    stages = {name.split(".attentions")[0] for name in layers}
    assert stages == (
        {"down_blocks.2", "mid_block", "up_blocks.0"} if count == 60 else {"down_blocks.2", "up_blocks.1"}
    )


@pytest.mark.parametrize(("version", "size"), [("sd1", (9, 14)), ("sd1", (5, 20)), ("sdxl", (7, 9))])
def test_grids_and_their_order_are_what_a_pass_shows(make_pipe, version, size):
    unet = make_pipe(version).unet
    seen = {}
    for name, module in attention_layers(unet, "attn2").items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].shape[1]))
    with torch.no_grad():
        unet(torch.randn(1, 4, *size), 3, **conditions(unet, 1))
    grids = layer_grids(unet, *size)
    assert list(grids) == list(seen)
    assert {name: rows * columns for name, (rows, columns) in grids.items()} == seen


def conditions(unet, batch):
    """Random text for a U-Net."""
    text = {"encoder_hidden_states": torch.randn(batch, 7, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type == "text_time":
        text["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 16), "time_ids": torch.ones(batch, 6)}
    return text


# -- one capture pass --------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "upcast": {"upcast_attention": True},
    "residual": {"residual_connection": True, "rescale_output_factor": 2.0},
    "norms": {"norm_num_groups": 2, "cross_attention_norm": "layer_norm", "qk_norm": "layer_norm"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_the_capture_processor_is_the_stock_one_with_rows_that_sum_to_one(variant, masked, image):
    attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4, **VARIANTS[variant])
    hidden = torch.randn(2, 8, 3, 4) if image else torch.randn(2, 12, 8)
    text = torch.randn(2, 5, 6)
    hidden_words = (torch.rand(2, 1, 5) < 0.4) & (torch.arange(5) > 0)
    mask = torch.where(hidden_words, -1e4, 0.0) if masked else None
    recorder = MapRecorder(["one"], (3, 4))
    got = _Capture(recorder, early_exit=False)(attn, hidden, text, mask)
    torch.testing.assert_close(got, AttnProcessor2_0()(attn, hidden, text, mask), atol=1e-5, rtol=0)
    assert recorder.maps().shape == (2, 3, 4, 5)
    torch.testing.assert_close(recorder.maps().sum(-1), torch.ones(2, 3, 4))
    if masked:
        assert (recorder.maps()[hidden_words[:, None].expand(2, 3, 4, 5)] < 1e-6).all()


def gradient(unet, latents, arguments, **options):
    """Gradient of some loss of the maps, and the maps."""
    latents = latents.clone().requires_grad_()
    grid = tuple(side // 4 for side in latents.shape[-2:])
    layers = layers_at(unet, *latents.shape[-2:], grid)
    weights = torch.linspace(-1, 1, 7 * grid[0] * grid[1]).sin().view(*grid, 7)
    with captured_maps(unet, layers, grid, latents, 500, arguments, **options) as maps:
        [got] = torch.autograd.grad((weights * maps).sum(), latents)
    return got, maps.detach()


@pytest.mark.parametrize("version", ["sd1", "sd2", "sdxl"])
def test_ending_early_changes_no_bit_and_skips_the_upper_blocks(make_pipe, version):
    unet = make_pipe(version).unet
    calls, arguments, latents = Calls(unet), conditions(unet, 2), torch.randn(2, 4, 16, 16)
    early = gradient(unet, latents, arguments)
    assert (calls.begun, calls.ended) == (1, 0)
    whole = gradient(unet, latents, arguments, early_exit=False)
    assert (calls.begun, calls.ended) == (2, 1)
    assert early[0].any()
    for a, b in zip(early, whole, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_gradient_checkpointing_changes_no_bit(sd):
    arguments, latents = conditions(sd.unet, 1), torch.randn(1, 4, 16, 16)
    expected = gradient(sd.unet, latents, arguments)
    sd.unet.enable_gradient_checkpointing()
    sd.unet.train()
    for a, b in zip(gradient(sd.unet, latents, arguments), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize(("kind", "most"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_gradients_in_half_precision_are_close(sd, kind, most):
    images, grid = 4, (4, 4)
    latents, text = torch.randn(images, 4, 16, 16).to(kind), torch.randn(images, 7, 16).to(kind)
    layers = layers_at(sd.unet, 16, 16, grid)
    gradients = []
    for one in (kind, torch.float32):
        sd.unet.to(one)

        def attend(z, one=one):
            z.register_hook(lambda gradient: gradients.append(gradient.float()))
            return captured_maps(sd.unet, layers, grid, z, 500, {"encoder_hidden_states": text.to(one)})

        control = AStarController([[(1, 2), (4,)]] * images, AStarSettings(), grid, 7)
        control.update(latents.to(one), 0, 9, attend)
    half, exact = gradients
    assert exact.any() and ((half - exact).norm() / exact.norm()).item() < most


# -- the whole call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(
    "idle",
    [
        {"scale_factor": 0.0},
        {"update_window": (0.0, 0.0)},
        {"lambda_seg": 0.0, "lambda_ret": 0.0},
        {"scale_factor": 0.0, "mask_source": "denoise"},
    ],
    ids=str,
)
def test_with_nothing_to_do_every_bit_is_that_of_the_plain_pipeline(make_pipe, version, idle):
    pipe = make_pipe(version)
    assert torch.equal(call(pipe, concepts=CONCEPTS, settings=AStarSettings(**idle)), call(pipe))


def explicit_loop(pipe, settings, steps, guidance=7.5, seed=0):
    """A-STAR written out as a loop, for one prompt."""
    grid, batch = (4, 4), 1
    cond, uncond, *pooled = pipe.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    text, added = torch.cat([uncond, cond]), None
    if pooled:
        ids = torch.tensor([[128, 128, 0, 0, 128, 128]], dtype=torch.float32).repeat(2, 1)
        added = {"text_embeds": torch.cat(pooled[::-1]), "time_ids": ids}
    pipe.scheduler.set_timesteps(steps)
    latents = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    latents = latents * pipe.scheduler.init_noise_sigma
    layers = layers_at(pipe.unet, 16, 16, grid)
    words = [(2, 3), (7,)]
    control = AStarController([words], settings, grid, text.shape[1])
    for step, t in enumerate(pipe.scheduler.timesteps):

        def attend(z, t=t):
            half = None if added is None else {name: value[1:] for name, value in added.items()}
            given = {"encoder_hidden_states": cond, "added_cond_kwargs": half}
            return captured_maps(pipe.unet, layers, grid, pipe.scheduler.scale_model_input(z, t), t, given)

        latents = control.update(latents, step, steps, attend)
        with torch.no_grad():
            model_input = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            if settings.mask_source == "denoise":
                with attend(latents) as maps:
                    control.see(maps)
            noise = pipe.unet(model_input, t, text, added_cond_kwargs=added).sample
            noise = noise[:1] + guidance * (noise[1:] - noise[:1])
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents, control.log


@pytest.mark.parametrize(
    ("version", "source"), [("sd1", "grad"), ("sd2", "grad"), ("sdxl", "grad"), ("sd1", "denoise")]
)
def test_the_pipeline_is_the_explicit_loop(make_pipe, version, source):
    pipe = make_pipe(version)
    settings = AStarSettings(scale_factor=50.0, mask_source=source)
    with torch.no_grad():
        expected, log = explicit_loop(pipe, settings, 3)
    output = AStarPipeline(pipe)(
        PROMPT,
        concepts=CONCEPTS,
        settings=settings,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    assert [step.step for step in output.log] == [0, 1, 2]
    assert not torch.equal(output.images, call(pipe, steps=3, guidance_scale=7.5))
    if source == "grad":
        assert torch.equal(output.images, expected)
        assert [step.loss for step in output.log] == [step.loss for step in log]
    else:  # one batch of two against two passes
        torch.testing.assert_close(output.images, expected, atol=1e-5, rtol=1e-5)


def test_each_optimised_step_takes_one_shortened_pass(sd):
    calls = Calls(sd.unet)
    call(sd, concepts=CONCEPTS, steps=6, settings=AStarSettings(update_window=(0.0, 0.5)))
    assert (calls.begun, calls.ended) == (6 + 3, 6)


@pytest.mark.parametrize("version", ["sd1", "sdxl"])
def test_a_batch_is_each_prompt_alone(make_pipe, version):
    pipe, noise = make_pipe(version), torch.randn(2, 4, 16, 16)
    prompts, concepts = [PROMPT, LONG], [CONCEPTS, ["circle", "blue star", "cross"]]
    together = call(pipe, prompts, concepts=concepts, latents=noise, guidance_scale=2.0)
    scale = together.abs().max()  # Euler's latents are large
    for k in range(2):
        alone = call(pipe, prompts[k], concepts=concepts[k], latents=noise[k : k + 1], guidance_scale=2.0)
        torch.testing.assert_close(together[k : k + 1] / scale, alone / scale, atol=1e-5, rtol=0.0)


def test_several_pictures_per_prompt_share_its_concepts(sd):
    pipe = sd
    noise = torch.randn(4, 4, 16, 16)
    prompts, concepts = [PROMPT, LONG], [CONCEPTS, ["circle", "blue star", "cross"]]
    settings = AStarSettings(scale_factor=50.0)
    together = call(pipe, prompts, concepts=concepts, latents=noise, num_images_per_prompt=2, settings=settings)
    again = call(
        pipe,
        [prompts[0]] * 2 + [prompts[1]] * 2,
        concepts=[concepts[0]] * 2 + [concepts[1]] * 2,
        latents=noise,
        settings=settings,
    )
    torch.testing.assert_close(together, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", ["sd1", "sdxl"])
def test_embeddings_with_indices_are_the_prompt_with_words(make_pipe, version):
    pipe = make_pipe(version)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    encoded = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    embeds = {name: value.detach() for name, value in zip(names, encoded, strict=False)}
    expected = call(pipe, concepts=CONCEPTS, steps=1)
    assert torch.equal(call(pipe, **embeds, concepts=[[[2, 3], [7]]], steps=1), expected)
    assert torch.equal(call(pipe, concepts=[[2, 3], "star"], steps=1), expected)


def test_pictures_come_in_the_form_asked_for(sd):
    output = AStarPipeline(sd)(PROMPT, concepts=CONCEPTS, height=96, width=128, num_inference_steps=2)
    assert output.images[0].size == (128, 96) and len(output.log) == 2 and output.nsfw_content_detected is None
    output = AStarPipeline(sd)(PROMPT, concepts=CONCEPTS, num_inference_steps=1, output_type="np")
    assert output.images.shape == (1, 128, 128, 3)


@pytest.mark.parametrize(("version", "size"), [("sd1", (128, 192)), ("sd2", (160, 96)), ("sdxl", (72, 136))])
def test_any_size_that_the_pipeline_makes(make_pipe, version, size):
    pipe = make_pipe(version)
    shape = {"height": size[0], "width": size[1]}
    got = call(pipe, concepts=CONCEPTS, settings=AStarSettings(scale_factor=50.0), **shape)
    assert got.isfinite().all() and not torch.equal(got, call(pipe, **shape))


def test_one_side_alone_leaves_the_other_at_the_models_own(sd):
    assert call(sd, concepts=CONCEPTS, height=64).shape[-2:] == (8, 16)
    assert call(sd, concepts=CONCEPTS, width=192).shape[-2:] == (16, 24)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_without_guidance_and_with_one_step(sd, guidance, steps):
    settings = AStarSettings(scale_factor=50.0, mask_source=random.choice(["grad", "denoise"]))
    got = call(sd, concepts=CONCEPTS, guidance_scale=guidance, steps=steps, settings=settings)
    assert got.isfinite().all() and not torch.equal(got, call(sd, guidance_scale=guidance, steps=steps))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, PNDMScheduler])
def test_other_schedulers(sd, kind):
    sd.scheduler = kind.from_config(sd.scheduler.config)
    output = AStarPipeline(sd)(PROMPT, concepts=CONCEPTS, num_inference_steps=4, output_type="latent")
    assert output.images.isfinite().all() and len(output.log) == len(sd.scheduler.timesteps)
    assert [step.timestep for step in output.log] == [float(t) for t in sd.scheduler.timesteps]


def test_attend_and_excite_runs_on_the_same_pipeline(sd):
    for softmax in ("tokens", "words"):
        settings = AStarSettings(objective="attend_and_excite", token_softmax=softmax)
        output = AStarPipeline(sd)(PROMPT, concepts=CONCEPTS, settings=settings, num_inference_steps=2)
        assert all(0 < step.loss[0] < 1 for step in output.log)


def test_a_step_lowers_the_loss(sd):
    settings = AStarSettings(scale_factor=5.0, log_loss_change=True)
    output = AStarPipeline(sd)(PROMPT, concepts=CONCEPTS, settings=settings, num_inference_steps=2)
    assert all(step.loss_change[0] > 0 for step in output.log)


def test_another_resolution_of_maps(sd):
    settings = AStarSettings(attention_resolution=(8, 8))
    assert not torch.equal(call(sd, concepts=CONCEPTS, settings=settings), call(sd, concepts=CONCEPTS))


def test_indices_are_those_of_the_prompt(sd):
    assert AStarPipeline(sd).get_indices("a red star") == dict(
        enumerate(["<|startoftext|>", "a</w>", "red</w>", "star</w>", "<|endoftext|>"])
    )


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_a_layout_is_the_same_as_box_picture_mask_and_map_mask(sd):
    pixels = np.zeros((128, 128), bool)
    pixels[:64, 32:96] = True
    small = torch.zeros(4, 4)
    small[:2, 1:3] = 1
    settings = AStarSettings(scale_factor=50.0)
    regions = [(32, 0, 96, 64), (0.25, 0.0, 0.75, 0.5), pixels, small]
    made = [call(sd, concepts=CONCEPTS, layout_masks={"star": region}, settings=settings) for region in regions]
    assert all(torch.equal(made[0], other) for other in made[1:])
    by_index = call(sd, concepts=["red circle", [7]], layout_masks={(7,): small}, settings=settings)
    assert torch.equal(made[0], by_index)
    assert not torch.equal(made[0], call(sd, concepts=CONCEPTS, settings=settings))


def test_layouts_of_a_batch_and_maps_of_an_odd_size(sd):
    mask = torch.zeros(3, 4)  # the maps' resolution for 80 x 128 pixels, though not their aspect ratio
    mask[1] = 1
    noise = torch.randn(2, 4, 10, 16)
    size = {"height": 80, "width": 128, "guidance_scale": 2.0}
    layouts = [{"red circle": mask}, None]
    together = call(sd, [PROMPT] * 2, concepts=[CONCEPTS] * 2, layout_masks=layouts, latents=noise, **size)
    one = call(sd, concepts=CONCEPTS, layout_masks={"red circle": mask}, latents=noise[:1], **size)
    other = call(sd, concepts=CONCEPTS, latents=noise[1:], **size)
    torch.testing.assert_close(together, torch.cat([one, other]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"blue": (0, 0, 64, 64)}, "not among the concepts"),
        ({"star": (0, 0, 0, 64)}, "box"),
        ({"star": (0, 0, 200, 64)}, "inside the picture"),
        ({"star": np.zeros((128, 128))}, "empty mask"),
        ({"star": np.ones((128, 128))}, "whole picture"),
        ({"star": np.ones((1, 128, 128))}, "two dimensions"),
        ({"star": np.ones((128, 64))}, "aspect ratio"),
        ([{"star": (0, 0, 64, 64)}, None], "is a list; expected a dictionary of regions"),
        ({"star": (0, 0, 64, 64), "red circle": (40, 40, 128, 128)}, "overlap in 1 of 16 places"),
    ],
    ids=str,
)
def test_impossible_layouts_are_refused_before_any_denoising(sd, layout, message):
    calls = Calls(sd.unet)
    with pytest.raises(SettingsError, match=message):
        call(sd, concepts=CONCEPTS, layout_masks=layout)
    assert calls.begun == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "at least one word"),
        (["red circle", "dog"], "not in the prompt.*2 red"),
        ([""], "no tokens"),
        (["red circle", "circle"], "only where another one already is"),
        (["red circle", [3]], "came before"),
        ([[2], [2]], "came before"),
        ([[0]], "token indices from 1"),
        ([[12]], "token indices from 1"),
        ([[39]], "token indices from 1"),
        ([[]], "token indices from 1"),
        ([3, 4], "list of at least one word"),
        ("red circle", "list of at least one word"),
    ],
    ids=str,
)
def test_impossible_concepts_are_refused_before_any_denoising(sd, concepts, message):
    calls = Calls(sd.unet)
    with pytest.raises(SettingsError, match=message):
        call(sd, concepts=concepts)
    assert calls.begun == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(2, 40, 16), "concepts": [[[1], [2]]]}, "for 2 prompts"),
        ({"prompt_embeds": torch.zeros(1, 40, 16), "concepts": [["circle", "star"]]}, "words cannot be looked up"),
        ({"prompt_embeds": torch.zeros(1, 40, 16), "concepts": [[[1], [39]]]}, "from 1 to 38"),
        ({"prompt_embeds": torch.zeros(1, 40, 16), "concepts": [[[1], [1]]]}, "twice"),
    ],
    ids=str,
)
def test_impossible_embeddings_are_refused(sd, arguments, message):
    with pytest.raises(SettingsError, match=message):
        call(sd, **arguments)


def test_other_impossible_calls_are_refused(sd, make_pipe):
    pipe = AStarPipeline(sd)
    with pytest.raises(SettingsError, match="neither prompt nor prompt_embeds"):
        pipe(concepts=[CONCEPTS])
    with pytest.raises(SettingsError, match="for 2 prompts"):
        pipe([PROMPT, PROMPT], concepts=CONCEPTS[:1])
    with pytest.raises(SettingsError, match="has 42 tokens"):
        pipe("red " * 40, concepts=[[2], [3]])
    for negative in ("red " * 40, ["red " * 40]):
        with pytest.raises(SettingsError, match=r"negative_prompt.* has 42 tokens"):
            pipe(PROMPT, concepts=CONCEPTS, negative_prompt=negative)
    with pytest.raises(SettingsError, match="prompt is an empty list"):
        pipe([], concepts=[])
    with pytest.raises(SettingsError, match="num_images_per_prompt=0"):
        pipe(PROMPT, concepts=CONCEPTS, num_images_per_prompt=0)
    with pytest.raises(SettingsError, match=r"\(16, 16\).*\(8, 8\).*\(4, 4\) with 16 queries"):
        pipe(PROMPT, concepts=CONCEPTS, settings=AStarSettings(attention_resolution=(5, 5)))
    with pytest.raises(SettingsError, match="prompt_2"):
        AStarPipeline(make_pipe("sdxl"))(PROMPT, concepts=CONCEPTS, prompt_2="a cat")
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="inference_mode"):
        pipe(PROMPT, concepts=CONCEPTS)
    sd.scheduler = HeunDiscreteScheduler.from_config(sd.scheduler.config)
    with pytest.raises(SettingsError, match="order 2"):
        pipe(PROMPT, concepts=CONCEPTS)


def test_models_without_separate_cross_attention_are_refused():
    class FluxPipeline:
        pass

    with pytest.raises(UnsupportedError, match="got a FluxPipeline"):
        AStarPipeline(FluxPipeline())


def test_processors_of_others_are_refused_before_any_denoising(sd):
    class Other:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    calls = Calls(sd.unet)
    before = dict(sd.unet.attn_processors)
    layer = sd.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    layer.processor = Other()
    with pytest.raises(UnsupportedError, match=r"up_blocks\.1.*Other"):
        call(sd, concepts=CONCEPTS, settings=AStarSettings(update_window=(0.5, 1.0)))
    assert calls.begun == 0
    layer.processor = before["up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor"]
    sd.attn_processor = attnproc.RadialAttnProcessor()
    with pytest.raises(UnsupportedError, match="attn_processor = None"):
        call(sd, concepts=CONCEPTS)
    sd.attn_processor = None
    assert call(sd, concepts=CONCEPTS).isfinite().all()


def test_one_concept_is_allowed_with_a_warning(sd):
    with pytest.warns(AttnProcWarning, match="one concept"):
        call(sd, concepts=["star"])


# -- what is left behind -----------------------------------------------------------------------------------------------


def state(pipe):
    """Everything a call could leave changed."""
    modules = list(pipe.unet.modules())
    return (
        [getattr(module, "processor", None) for module in modules],
        [p.requires_grad for p in pipe.unet.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "prepare_latents" in vars(pipe),
        [p.grad for p in pipe.unet.parameters()],
    )


WAYS_OUT = [
    (None, "callback", "grad"),
    (None, "callback", "denoise"),
    (RuntimeError, "callback", "denoise"),
    (RuntimeError, "capture", "grad"),
    (KeyboardInterrupt, "callback", "grad"),
    (KeyboardInterrupt, "capture", "grad"),
    (KeyboardInterrupt, "denoising", "grad"),
    (KeyboardInterrupt, "denoising", "denoise"),
]


@pytest.mark.parametrize(("error", "where", "source"), WAYS_OUT)
def test_everything_is_as_before_after_any_way_out(sd, error, where, source):
    first = next(sd.unet.parameters())
    first.requires_grad_(False)
    before = state(sd)
    passes = 0

    def break_off(*_):
        nonlocal passes
        passes += 1
        if error is not None and passes == 2:
            raise error("on purpose")
        return {}

    arguments = {"settings": AStarSettings(mask_source=source), "concepts": CONCEPTS, "steps": 3}
    hook = None
    if where == "callback":
        arguments["callback_on_step_end"] = break_off
    else:
        layer = sd.unet.up_blocks[1 if where == "capture" else 3].attentions[0].transformer_blocks[0].norm2
        hook = layer.register_forward_pre_hook(lambda *_: (break_off(), None)[1])
    if error is None:
        call(sd, **arguments)
    else:
        with pytest.raises(error):
            call(sd, **arguments)
    assert passes >= 2
    if hook is not None:
        hook.remove()
    after = state(sd)
    assert all(a is b for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]
    assert torch.equal(call(sd), call(sd))


def test_the_users_callback_gets_what_it_asked_for_and_may_replace_latents(sd):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {}

    asked = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    settings = AStarSettings(scale_factor=50.0)
    assert torch.equal(
        call(sd, concepts=CONCEPTS, settings=settings, **asked), call(sd, concepts=CONCEPTS, settings=settings)
    )
    assert seen == [(step, int(t), ["prompt_embeds"]) for step, t in enumerate(sd.scheduler.timesteps)]

    kept = torch.zeros(1, 4, 16, 16)

    class Reset(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": kept}

    got = call(
        sd,
        concepts=CONCEPTS,
        callback_on_step_end=Reset(cutoff_step_ratio=None, cutoff_step_index=99),
        settings=settings,
    )
    assert torch.equal(got, kept) and not kept.any()  # and the update is never written into a tensor of the user's


def test_an_interrupt_ends_the_updates(sd):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    output = AStarPipeline(sd)(PROMPT, concepts=CONCEPTS, num_inference_steps=5, callback_on_step_end=stop)
    assert len(output.log) == 2


def test_given_latents_are_not_written_to(sd):
    noise = torch.randn(1, 4, 16, 16)
    before = noise.clone()
    call(sd, concepts=CONCEPTS, latents=noise, settings=AStarSettings(scale_factor=50.0))
    assert torch.equal(noise, before)


# -- together with other things ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "kind"),
    [("sd1", torch.float16), ("sd2", torch.float16), ("sd2", torch.bfloat16), ("sdxl", torch.bfloat16)],
)
def test_half_precision_pipelines(make_pipe, version, kind):
    pipe = make_pipe(version).to(kind)
    settings = AStarSettings(scale_factor=50.0)
    got = call(pipe, concepts=CONCEPTS, settings=settings)
    assert got.dtype == kind and got.isfinite().all() and not torch.equal(got, call(pipe))


def test_a_lora_is_used_scaled_and_left_as_it_was(sd):
    pipe = sd
    plain = call(pipe, concepts=CONCEPTS)
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")
    )
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before = state(pipe)
    layers = [module for module in pipe.unet.modules() if hasattr(module, "scaling")]
    scales = [dict(module.scaling) for module in layers]
    made = {scale: call(pipe, concepts=CONCEPTS, cross_attention_kwargs={"scale": scale}) for scale in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(made[0.0], plain)
    assert torch.equal(made[1.0], call(pipe, concepts=CONCEPTS)) and not torch.equal(made[1.0], made[0.5])
    assert layers and [dict(module.scaling) for module in layers] == scales
    assert state(pipe)[1:] == before[1:] and any(before[1])


def test_hooks_that_offload_the_unet(sd):
    expected = call(sd, concepts=CONCEPTS)
    _, hook = accelerate.cpu_offload_with_hook(sd.unet, "cpu")
    assert torch.equal(call(sd, concepts=CONCEPTS), expected)
    hook.remove()
    accelerate.cpu_offload(sd.unet, "cpu", offload_buffers=True)
    wanted = [p.requires_grad for p in sd.unet.parameters()]
    assert torch.equal(call(sd, concepts=CONCEPTS), expected)
    assert [p.requires_grad for p in sd.unet.parameters()] == wanted


def test_a_compiled_unet_is_listened_to_where_that_is_possible(sd):
    expected = call(sd, concepts=CONCEPTS)
    unet = sd.unet
    sd.unet = torch.compile(unet, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # compiling takes long, and changes nothing for the hooks
        assert torch.equal(call(sd, concepts=CONCEPTS), expected)
    sd.unet = unet
    unet.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"torch\.compile"):
        call(sd, concepts=CONCEPTS)
