"""shapes-image: its training code trains what the pipeline runs, and its captions are whole words to the tokenizer."""

import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from attnproc.demos.shapes import shapes_image_path
from attnproc.demos.shapes.detect import detect
from attnproc.demos.shapes.evaluate import score
from attnproc.demos.shapes.evaluate_pictures import draw, inversion_psnr, picture_cases, sheet
from attnproc.demos.shapes.latent_pool import PicturePool
from attnproc.demos.shapes.picture_sizes import PICTURES, PictureSize
from attnproc.demos.shapes.picture_text import TEXT_LENGTH, build_clip_text_encoder, build_clip_tokenizer
from attnproc.demos.shapes.render import render
from attnproc.demos.shapes.scene import Look, Object, Scene, caption, is_held_out, parse, sample_scene, vocabulary
from attnproc.demos.shapes.train_autoencoder import to_model
from attnproc.demos.shapes.train_picture_autoencoder import (
    build_picture_autoencoder,
    random_pictures,
    standardise,
    train_picture_autoencoder,
)
from attnproc.demos.shapes.train_unet import build_scheduler, build_unet, train_unet, velocity_loss

TINY = PictureSize(
    pixels=32,
    autoencoder_channels=(8, 8, 8),
    autoencoder_batch=4,
    unet_channels=(8, 8, 16),
    heads=2,
    text_width=32,
    text_layers=1,
    batch=4,
)


@pytest.fixture
def threads():
    """Training sets the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_word_of_a_caption_is_one_token():
    tokenizer = build_clip_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    assert len({tokenizer(word).input_ids[1] for word in vocabulary()}) == len(vocabulary())
    assert tokenizer("A Red STAR").input_ids == tokenizer("a red star").input_ids
    assert len(tokenizer("zebra").input_ids) > 3 and tokenizer.unk_token_id not in tokenizer("zebra").input_ids[1:-1]


@pytest.mark.parametrize("number", range(40))
def test_captions_of_pictures_name_no_motion_are_read_back_and_fit(number):
    scene = sample_scene(random.Random(number), still=True)
    text = caption(scene, random.Random(number), still=True)
    assert parse(text) == (scene.looks, (scene.top, scene.bottom))
    assert all(look.motion == "rest" for look in scene.looks)
    assert len(build_clip_tokenizer()(text).input_ids) <= TEXT_LENGTH - 8


def test_pictures_vary_in_size_and_are_read_back():
    radii = set()
    for number in range(12):
        scene = sample_scene(random.Random(f"size {number}"), 1 + number % 3, still=True)
        radii |= {round(item.radius, 3) for item in scene.objects}
        found = detect(render(scene, PICTURES.pixels, 1)[0])
        assert sorted(str(item.look) for item in found) == sorted(str(look) for look in scene.looks)
    assert len(radii) > 12


def test_standardised_latents_have_mean_zero_deviation_one_and_decode_the_same():
    torch.manual_seed(0)
    model = build_picture_autoencoder(TINY).eval()
    pictures = to_model(random_pictures(TINY, 3, 24)).squeeze(2)
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mode()).sample
        deviation = model.encode(pictures).latent_dist.std
        raw = model.encode(pictures).latent_dist.mode()
        standardise(model, TINY, 2, torch.device("cpu"))
        after = model.encode(pictures).latent_dist
        scale = raw.std((0, 2, 3), keepdim=True) / after.mode().std((0, 2, 3), keepdim=True)
        torch.testing.assert_close(after.std * scale, deviation, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model.decode(after.mode()).sample, before, rtol=1e-4, atol=1e-4)
    values = after.mode().transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.3 and (values.std(1) - 1).abs().max() < 0.3


def test_training_both_halves_gives_a_pipeline_and_resumes(tmp_path, threads):
    arguments = {"resume": True, "seed": 0, "device": torch.device("cpu"), "save_every": 2}
    train_picture_autoencoder(TINY, 2, tmp_path, **arguments)
    train_unet(TINY, 2, tmp_path, **arguments)
    pipe = train_unet(TINY, 3, tmp_path, **arguments)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert torch.load(tmp_path / "unet.pt", weights_only=True)["step"] == 3
    assert "from step 2" in (tmp_path / "unet.log").read_text()
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}


def test_the_loss_is_zero_for_the_true_velocity():
    scheduler, latents = build_scheduler(), torch.randn(4, 4, 8, 8)
    seen = {}

    def oracle(noisy, timesteps, text, return_dict):
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        seen["timesteps"] = timesteps
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,)

    loss = velocity_loss(oracle, scheduler, None, latents, torch.Generator().manual_seed(0))
    assert loss < 1e-6
    assert seen["timesteps"].min() >= 0 and seen["timesteps"].max() < 1000


def test_training_sees_the_text_as_the_pipeline_gives_it():
    tokenizer = build_clip_tokenizer()
    encoder = build_clip_text_encoder(tokenizer, 32, 1).eval()
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=build_picture_autoencoder(TINY),
        unet=build_unet(TINY),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    prompts = ["a red star on a black background", ""]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
        tokens = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        torch.testing.assert_close(encoder(tokens).last_hidden_state, expected)


def test_a_pool_of_pictures_is_repeatable(tmp_path, threads):
    vae, tokenizer = build_picture_autoencoder(TINY), build_clip_tokenizer()
    pools = [PicturePool(tmp_path / name, TINY, vae, tokenizer, 5, torch.device("cpu")) for name in ("a", "b")]
    for pool in pools:
        pool.grow(1, clips=6)
    torch.testing.assert_close(pools[0].latents[0], pools[1].latents[0])
    latents, tokens = pools[0].batch(random.Random(0), 3)
    assert latents.shape == (3, 4, 8, 8) and tokens.shape == (3, TEXT_LENGTH)


def test_evaluation_cases_are_held_out_and_fixed():
    cases = picture_cases(6)
    assert cases == picture_cases(9)[:6]
    assert [len(case.scene.objects) for case in cases] == [1, 2, 3, 1, 2, 3]
    assert all(is_held_out(look) for case in cases for look in case.scene.looks)


def test_a_picture_depends_on_its_own_seed_alone(tmp_path, threads):
    train_picture_autoencoder(TINY, 1, tmp_path, resume=False, seed=0, device=torch.device("cpu"))
    pipe = train_unet(TINY, 1, tmp_path, resume=False, seed=0, device=torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    cases = picture_cases(3)
    together = draw(pipe, cases, steps=2, guidance=2.0)
    alone = draw(pipe, cases[1:2], steps=2, guidance=2.0)
    assert together.shape == (3, 32, 32, 3) and np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert sheet(list(together), columns=2).size == (64, 32)


@pytest.fixture(scope="module")
def shipped():
    pipe = StableDiffusionPipeline.from_pretrained(shapes_image_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_shipped_pipeline_is_small_and_has_the_structure_of_stable_diffusion(shipped):
    size = sum(path.stat().st_size for path in shapes_image_path().rglob("*") if path.is_file())
    assert size <= 12_000_000
    cross = {name.split(".attentions")[0] for name, _ in shipped.unet.named_modules() if name.endswith("attn2")}
    assert cross == {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert shipped.tokenizer.model_max_length == TEXT_LENGTH


def test_the_shipped_model_draws_what_captions_of_one_object_say(shipped):
    cases = [case for case in picture_cases(18) if len(case.scene.objects) == 1]
    pictures = draw(shipped, cases, steps=20, guidance=4.0)
    right = [score(case.scene.looks, detect(picture)) for case, picture in zip(cases, pictures, strict=True)]
    assert sum(r["shape"] for r in right) >= 5 and sum(r["color"] for r in right) >= 4


def test_the_shipped_model_gives_pictures_back_after_inversion(shipped):
    result = inversion_psnr(shipped, 6, 30)
    assert result["mean"] >= 25 and result["pictures"] == 6


def test_the_shipped_model_recolors_a_picture_by_img2img(shipped):
    star = Object(Look("star", "red", "plain", None, "rest"), 32.0, 32.0, 16.0, 0.0)
    picture = Image.fromarray(render(Scene((star,), "navy", "navy"), 128, 1)[0])
    pipe = StableDiffusionImg2ImgPipeline(**shipped.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a plain green star on a navy background"] * 3,
        image=picture,
        strength=0.7,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
    ).images
    found = [detect(np.asarray(image))[0] for image in images]
    assert [one.look.shape for one in found] == ["star"] * 3
    assert sum(one.look.color == "green" for one in found) >= 2
    assert all(np.hypot(one.position[0] - 32, one.position[1] - 32) < 8 for one in found)
