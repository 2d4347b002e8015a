"""shapes-video: its training code trains what the pipeline runs, and the shipped model loads and generates."""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

from attnproc.demos.shapes import shapes_video_path
from attnproc.demos.shapes.evaluate import generate, held_out_cases, score, summary
from attnproc.demos.shapes.latent_pool import TEXT_LENGTH, LatentPool
from attnproc.demos.shapes.render import render
from attnproc.demos.shapes.scene import FRAMES, caption, is_held_out, sample_scene, vocabulary
from attnproc.demos.shapes.sizes import SIZES, Stage
from attnproc.demos.shapes.text import UNKNOWN, build_text_encoder, build_tokenizer
from attnproc.demos.shapes.train_autoencoder import (
    build_autoencoder,
    sample_clips,
    to_model,
    to_pixels,
    train_autoencoder,
)
from attnproc.demos.shapes.train_transformer import (
    build_transformer,
    encode_text,
    flow_loss,
    train_transformer,
    use_short_text,
)
from attnproc.demos.shapes.training import Average, Checkpoint, Optimizers, Shards, learning_rate


@pytest.fixture(scope="module")
def shipped():
    pipe = WanPipeline.from_pretrained(shapes_video_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_shipped_pipeline_is_small_and_generates(shipped):
    folder = shapes_video_path()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12 * 2**20
    assert isinstance(shipped.vae, AutoencoderKLWan)
    frames = shipped(
        "a striped red and white circle moving left on a navy background",
        height=64,
        width=64,
        num_frames=FRAMES,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert frames.shape == (1, FRAMES, 64, 64, 3)
    assert np.isfinite(frames).all() and frames.min() >= 0 and frames.max() <= 1


def test_the_shipped_autoencoder_gives_clips_back(shipped):
    video = np.stack([render(sample_scene(random.Random(k), 1)) for k in range(4)])
    with torch.no_grad():
        latents = shipped.vae.encode(to_model(video)).latent_dist.mode()
        decoded = to_pixels(shipped.vae.decode(latents).sample)
    assert latents.shape == (4, SIZES["cpu"].latent_channels, *SIZES["cpu"].grid)
    assert np.abs(decoded.astype(int) - video).mean() < 8


@pytest.mark.parametrize("name", SIZES)
def test_token_grid_of_each_size(name):
    grid = SIZES[name].grid
    assert grid[0] == 5 and min(grid[1:]) >= 8


def test_the_tokenizer_knows_every_word_and_ignores_case_and_punctuation():
    tokenizer = build_tokenizer()
    words = tokenizer(" ".join(vocabulary())).input_ids
    assert tokenizer.unk_token_id not in words and len(set(words)) == len(vocabulary()) + 1
    assert tokenizer("A red, STAR!").input_ids == tokenizer("a red star").input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a zebra").input_ids)[1] == UNKNOWN


def test_training_sees_the_text_exactly_as_the_pipeline_gives_it():
    size = SIZES["cpu"]
    torch.manual_seed(0)
    transformer, encoder, tokenizer = build_transformer(size), build_text_encoder(size.text_dim, 2), build_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=build_autoencoder(size),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    prompts = [caption(sample_scene(random.Random(1), 3)), ""]
    latents, timestep = torch.randn(2, size.latent_channels, 2, 4, 4), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        padded, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        expected = transformer(latents, timestep, padded).sample
        tokens = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
        use_short_text(transformer, True)
        actual = transformer(latents, timestep, encode_text(encoder, tokens, tokenizer.pad_token_id)).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_autoencoder_treats_frames_one_by_one():
    model = build_autoencoder(SIZES["cpu"]).eval()
    clip = torch.rand(1, 3, 1, 32, 32).expand(-1, -1, 5, -1, -1) * 2 - 1
    with torch.no_grad():
        single = model.encode(clip[:, :, :1]).latent_dist.mode()
        whole = model.encode(clip).latent_dist.mode()
    torch.testing.assert_close(whole[:, :, :1], single)
    assert whole.shape[2] == 2


def test_sample_clips_crops_and_cuts():
    clips = sample_clips(random.Random(0), SIZES["cpu"], Stage(1.0, 2, 9, 48))
    assert clips.shape == (2, 3, 9, 48, 48) and clips.min() >= -1 and clips.max() <= 1


def test_shards_sum_to_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    module, batch = torch.nn.Linear(5, 3), torch.randn(7, 5)
    module(batch).square().mean().backward()
    expected = module.weight.grad.clone()
    module.zero_grad()
    shards = Shards((module,), torch.device("cpu"))

    def work(modules, part, generator):
        return (modules[0](part).square().mean(),)

    [loss] = shards.gradient(work, (batch,), 0)
    torch.set_num_threads(threads)
    torch.testing.assert_close(module.weight.grad, expected)
    assert loss == pytest.approx(module(batch).square().mean().item())


def test_a_checkpoint_brings_back_weights_average_and_optimizer(tmp_path):
    size = SIZES["cpu"]

    def fresh():
        torch.manual_seed(0)
        modules = {"transformer": build_transformer(size), "text_encoder": build_text_encoder(size.text_dim, 1)}
        optimizers = Optimizers(tuple(modules.values()), lambda name: name.startswith("blocks."))
        return modules, optimizers, Checkpoint(tmp_path / "state.pt", Average(modules, 0.9), optimizers)

    def train(modules, optimizers, checkpoint, seed):
        tokens = torch.tensor([[3, 1, 0], [1, 0, 0]])
        latents = torch.randn(2, size.latent_channels, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        text = encode_text(modules["text_encoder"], tokens, 0)
        loss = flow_loss(modules["transformer"], text, latents, torch.Generator().manual_seed(seed))
        loss.backward()
        optimizers.step(1.0)
        checkpoint.average.update(seed)
        return loss.item()

    straight = fresh()
    first = train(*straight, 0)
    straight[2].save(1)
    second = train(*straight, 1)
    resumed = fresh()
    assert resumed[2].load() == 1
    assert train(*resumed, 1) == pytest.approx(second, rel=1e-5)
    assert first != second
    for key, value in straight[2].average.shadow["transformer"].items():
        torch.testing.assert_close(resumed[2].average.shadow["transformer"][key], value)


def test_the_average_is_applied_and_taken_back():
    module = torch.nn.Linear(2, 2)
    average = Average({"it": module}, 0.5)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    average.update(1000)
    with average.applied():
        torch.testing.assert_close(module.weight, before + 0.5)
    torch.testing.assert_close(module.weight, before + 1)


def test_the_learning_rate_warms_up_holds_and_falls():
    rates = [learning_rate(step, 1000, 1.0, warmup=100, hold=0.5) for step in range(1000)]
    assert rates[0] == 0.01 and rates[100] == rates[500] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[500:]))
    assert math.isclose(rates[-1], 0.02, abs_tol=1e-3)


def test_a_latent_pool_is_normalised_repeatable_and_keeps_its_chunks(tmp_path):
    size, vae, tokenizer = SIZES["cpu"], build_autoencoder(SIZES["cpu"]), build_tokenizer()
    threads = torch.get_num_threads()
    pools = [LatentPool(tmp_path / name, size, vae, tokenizer, 5, torch.device("cpu")) for name in ("a", "b")]
    for pool in pools:
        pool.grow(1, clips=4)
    torch.set_num_threads(threads)
    torch.testing.assert_close(pools[0].latents[0], pools[1].latents[0])
    latents, tokens = pools[0].batch(random.Random(0), 6)
    assert latents.shape == (6, size.latent_channels, *size.grid) and tokens.shape == (6, TEXT_LENGTH)
    assert len(pools[0]) == 4 and (tmp_path / "a" / "0000.pt").exists()


def test_evaluation_cases_are_held_out_and_fixed():
    cases = held_out_cases(6)
    assert cases == held_out_cases(10)[:6]
    assert [len(case.scene.objects) for case in cases] == [1, 2, 1, 2, 1, 2]
    assert all(is_held_out(look) for case in cases for look in case.scene.looks)


def test_a_clean_render_scores_one_and_a_missing_object_does_not():
    from attnproc.demos.shapes.detect import detect

    scene = sample_scene(random.Random(4), 2)
    found = detect(render(scene))
    assert set(score(scene.looks, found).values()) == {1.0}
    less = score(scene.looks, found[:1])
    assert less["all"] == 0.0 and less["count"] == 0.0 and less["shape"] == 0.5
    assert summary([score(scene.looks, found), less])["shape"] == 0.75


def test_each_case_depends_on_its_own_seed_alone(shipped):
    settings = {"pixels": 64, "frames": 5, "steps": 1, "guidance": 1.0}
    cases = held_out_cases(2)
    together = generate(shipped, cases, **settings)
    alone = generate(shipped, cases[1:], **settings)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1


def test_the_published_result_names_its_setting():
    path = shapes_video_path().parents[3] / "benchmarks" / "results" / "shapes-video.json"
    if not path.exists():
        pytest.skip("an installed package has no benchmarks folder")
    result = json.loads(path.read_text())
    assert result["hardware"] and result["versions"]["torch"]
    assert result["one object"]["clips"] + result["two objects"]["clips"] == result["settings"]["cases"]


def test_training_both_halves_gives_a_pipeline_and_resumes(tmp_path):
    size = replace(
        SIZES["cpu"],
        pixels=32,
        encoder_dim=8,
        decoder_dim=8,
        stages=(Stage(0.5, 2, 1, 32), Stage(0.5, 1, 5, 32)),
        heads=2,
        head_dim=12,
        layers=1,
        ffn_dim=16,
        text_dim=64,
        text_layers=1,
        batch=2,
    )
    arguments = {"resume": True, "seed": 0, "device": torch.device("cpu"), "save_every": 2}
    threads = torch.get_num_threads()
    try:
        train_autoencoder(size, 2, tmp_path, **arguments)
        train_transformer(size, 2, tmp_path, **arguments)
        pipe = train_transformer(size, 3, tmp_path, **arguments)
    finally:
        torch.set_num_threads(threads)
    assert isinstance(pipe, WanPipeline)
    assert torch.load(tmp_path / "transformer.pt", weights_only=True)["step"] == 3
    assert "from step 2" in (tmp_path / "transformer.log").read_text()
