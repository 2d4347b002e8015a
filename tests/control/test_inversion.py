"""Inversion: the solver pairs, the regression figures of the specification, and the public way there and back."""

import random

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from attnproc.demos.shapes import shapes_image_path
from attnproc.demos.shapes.render import render
from attnproc.demos.shapes.scene import sample_scene
from attnproc.errors import SettingsError, UnsupportedError
from attnproc.pipelines.inversion import (
    EXCEPTIONAL_TOKEN,
    as_picture,
    encode_pictures,
    inversion_condition,
    invert,
    invert_latents,
    reconstruct,
    solver_pair,
    working_size,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(kind=diffusers.DDIMScheduler, **settings):
    return kind(**BETAS, **settings)


def there_and_back(predict, clean, pair):
    forward, inverse = pair
    noise = invert_latents(predict, clean, inverse)[-1]
    back = noise
    for timestep in forward.timesteps:
        back = forward.step(predict(back, timestep), timestep, back).prev_sample
    return noise, back


def alpha_sigma(timestep):
    betas = torch.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2
    kept = (1 - betas).cumprod(0)[timestep]
    return kept.sqrt(), (1 - kept).sqrt()


def gaussian_denoiser(x, timestep):
    """The exact noise prediction for data of mean 0.5 and deviation 0.3."""
    alpha, sigma = alpha_sigma(timestep)
    return sigma * (x - alpha * 0.5) / (alpha**2 * 0.09 + sigma**2)


REGRESSION = {
    "dpm": ([-0.807182, 0.034728, 1.157274, 2.279819], [0.207635, 0.499994, 0.889806, 1.279617]),
    "ddim": ([-0.783022, 0.144330, 1.380799, 2.617268], [0.291385, 0.524744, 0.835890, 1.147035]),
}


@pytest.mark.parametrize("solver", REGRESSION)
def test_regression_of_the_specification(solver):
    clean = torch.tensor([[0.2, 0.5, 0.9, 1.3]])
    noise, back = there_and_back(gaussian_denoiser, clean, solver_pair(scheduler(), solver, 20))
    wanted_noise, wanted_back = (torch.tensor([values]) for values in REGRESSION[solver])
    torch.testing.assert_close(noise, wanted_noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(back, wanted_back, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_round_trip_is_exact_where_the_predicted_picture_never_changes(prediction, steps):
    constant, clean = torch.randn(2, 1, 4, 8, 8).unbind(0)

    def predict(x, timestep):
        alpha, sigma = alpha_sigma(timestep)
        noise = (x - alpha * constant) / sigma
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * constant, "sample": constant}[prediction]

    _, back = there_and_back(predict, clean, solver_pair(scheduler(prediction_type=prediction), "dpm", steps))
    torch.testing.assert_close(back, clean, atol=1e-4, rtol=0)  # noise of 14.6 deviations: rounding grows


@pytest.mark.parametrize("steps", [2, 3, 13, 20, 50, 100])
def test_timesteps_mirror(steps):
    forward, inverse = solver_pair(scheduler(), "dpm", steps)
    assert forward.timesteps.tolist() == [*inverse.timesteps.tolist()[1:], 999][::-1]
    torch.testing.assert_close(forward.sigmas, inverse.sigmas.flip(0), rtol=1e-5, atol=1e-6)
    forward, inverse = solver_pair(scheduler(), "ddim", steps)
    assert forward.timesteps.tolist() == inverse.timesteps.tolist()[::-1]


def test_levels_of_twenty_steps_are_those_of_the_release():
    forward, inverse = solver_pair(scheduler(), "dpm", 20)
    assert forward.timesteps.tolist() == [*range(999, 548, -50), 500, *range(450, 49, -50)]
    assert inverse.timesteps.tolist() == [*range(0, 501, 50), *range(549, 950, 50)]
    assert [round(float(sigma), 4) for sigma in forward.sigmas[[0, -1]]] == [14.6146, 0.0292]


def test_the_pipelines_own_scheduler_gives_noise_levels_alone():
    given = scheduler(diffusers.EulerDiscreteScheduler, timestep_spacing="trailing", use_karras_sigmas=True)
    given.set_timesteps(5)
    before = given.timesteps.clone()
    forward, _ = solver_pair(given, "dpm", 20)
    assert forward.timesteps.tolist() == solver_pair(scheduler(), "dpm", 20)[0].timesteps.tolist()
    assert torch.equal(given.timesteps, before)


BAD_SOLVERS = {
    "unknown solver": (lambda: scheduler(), "euler", 20, "dpm, ddim"),
    "fewer steps than the order": (lambda: scheduler(), "dpm", 1, "at least 2"),
    "no steps": (lambda: scheduler(), "ddim", 0, "at least 1"),
    "half a step": (lambda: scheduler(), "ddim", 2.5, "integer"),
    "too many steps": (lambda: scheduler(), "ddim", 1001, "at most"),
    "ancestral": (lambda: scheduler(diffusers.EulerAncestralDiscreteScheduler), "dpm", 20, "adds noise"),
    "ddpm": (lambda: scheduler(diffusers.DDPMScheduler), "dpm", 20, "adds noise"),
    "sde": (
        lambda: scheduler(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
        "dpm",
        20,
        "adds noise",
    ),
    "flow": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "dpm", 20, "beta schedule"),
    "no signal at the end": (lambda: scheduler(rescale_betas_zero_snr=True), "ddim", 20, "cannot be inverted"),
}


@pytest.mark.parametrize(("make", "solver", "steps", "message"), BAD_SOLVERS.values(), ids=BAD_SOLVERS)
def test_what_cannot_be_inverted_is_refused(make, solver, steps, message):
    with pytest.raises(SettingsError, match=message):
        solver_pair(make(), solver, steps)


# -- the exceptional prompt --------------------------------------------------------------------------------------------


def with_vocabulary(pipe, size):
    """The same pipeline with a text encoder of that many tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {**pipe.text_encoder.config.to_dict(), "vocab_size": size}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**config)).eval()
    return pipe


def test_exceptional_prompt_is_one_token_at_no_position(make_pipe):
    pipe = with_vocabulary(make_pipe("sd1"), EXCEPTIONAL_TOKEN + 1)
    ids = torch.full((1, 40), EXCEPTIONAL_TOKEN)
    with torch.no_grad():
        before = pipe.text_encoder(ids)[0]
        found = inversion_condition(pipe, None)
        assert torch.equal(pipe.text_encoder(ids)[0], before)  # positions are back
        table = next(p for name, p in pipe.text_encoder.named_parameters() if "position_embedding" in name)
        table.zero_()
        torch.testing.assert_close(found, pipe.text_encoder(ids)[0])
    assert not torch.allclose(found, before)


def test_positions_come_back_after_an_error(make_pipe, monkeypatch):
    pipe = with_vocabulary(make_pipe("sd1"), EXCEPTIONAL_TOKEN + 1)
    hook = pipe.text_encoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        inversion_condition(pipe, None)
    hook.remove()
    assert not any(module._forward_hooks for module in pipe.text_encoder.modules())


def test_a_small_vocabulary_takes_the_empty_prompt(make_pipe):
    pipe = make_pipe("sd1")
    with torch.no_grad():
        assert torch.equal(inversion_condition(pipe, None), inversion_condition(pipe, ""))
        assert not torch.equal(inversion_condition(pipe, None), inversion_condition(pipe, "a red star"))


# -- there and back in public ------------------------------------------------------------------------------------------


def noise_picture(width=128, height=128):
    return Image.fromarray(np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_every_latent_is_kept_from_the_picture_to_noise(make_pipe, kind):
    pipe = make_pipe(kind)
    pictures = [noise_picture(), np.asarray(noise_picture()), np.random.default_rng().random((64, 64, 3))]
    found = invert(pipe, pictures, "a red star", steps=4)
    assert found.latents.shape == (5, 3, 4, 16, 16) and found.latents.dtype == torch.float32
    with torch.no_grad():
        alone = encode_pictures(pipe, [pictures[0]])
    torch.testing.assert_close(found.latents[0, :1], alone)
    assert len(reconstruct(pipe, found)) == 3
    again = reconstruct(pipe, found, output_type="latent")
    assert torch.equal(again, reconstruct(pipe, found, output_type="latent"))


def test_a_picture_keeps_its_shape(make_pipe):
    pipe = make_pipe("sd1")
    found = invert(pipe, noise_picture(256, 64), steps=2)
    assert found.latents.shape[-2:] == (8, 32)
    assert reconstruct(pipe, found)[0].size == (256, 64)
    assert invert(pipe, noise_picture(), steps=2, height=64, width=192).latents.shape[-2:] == (8, 24)


def test_working_size_is_near_the_native_area(make_pipe):
    pipe = make_pipe("sd1")  # native 128 x 128 in multiples of 64
    assert working_size(pipe, (512, 512)) == (128, 128)
    assert working_size(pipe, (1000, 250)) == (64, 256)
    assert working_size(pipe, (5000, 10)) == (64, 2880)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_every_mode_of_8_bits_become_rgb(mode):
    assert as_picture(noise_picture().convert(mode), "image").mode == "RGB"


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_pictures_of_more_bits_are_refused(mode):
    with pytest.raises(SettingsError, match=f"image has pixels of mode '{mode}'; expected 8 bits"):
        as_picture(Image.new(mode, (8, 8), 40_000), "image")


BAD_PICTURES = {
    "path": "b.png",
    "two dimensions": np.zeros((4, 4)),
    "channels first": np.zeros((3, 4, 4)),
    "floats beyond 1": np.full((4, 4, 3), 2.0),
    "integers": np.zeros((4, 4, 3), int),
    "nothing": None,
    "no pixels": np.zeros((0, 4, 3), np.uint8),
}


@pytest.mark.parametrize("picture", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_other_pictures_are_refused(picture):
    with pytest.raises(SettingsError, match=r"background is .*expected a PIL image"):
        as_picture(picture, "background")


def test_other_sizes_pipelines_and_prompts_are_refused(make_pipe):
    pipe = make_pipe("sd1")
    with pytest.raises(SettingsError, match="multiple of 64"):
        invert(pipe, noise_picture(), steps=2, height=100)
    with pytest.raises(SettingsError, match="empty list"):
        invert(pipe, [], steps=2)
    with pytest.raises(SettingsError, match="tokens"):
        invert(pipe, noise_picture(), "a red star and " * 20, steps=2)
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline"):
        invert(make_pipe("sdxl"), noise_picture(), steps=2)


def shapes_image():
    try:
        return shapes_image_path()
    except FileNotFoundError:
        return None


@pytest.mark.skipif(shapes_image() is None, reason="shapes-image is not there")
def test_a_picture_comes_back_from_its_noise_in_the_trained_model():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(shapes_image())
    pipe.set_progress_bar_config(disable=True)
    pictures = [render(sample_scene(random.Random(k), held_out=True, still=True), 128, 1)[0] for k in range(4)]
    drawn = reconstruct(pipe, invert(pipe, pictures), output_type="np")
    errors = ((drawn - np.stack(pictures) / 255) ** 2).mean((1, 2, 3))
    assert (-10 * np.log10(errors)).mean() >= 25
