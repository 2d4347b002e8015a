"""attnproc image, story and compose: what they write is what the pipelines make; bad input costs no denoising."""

import json
import os
import re
import types
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from attnproc.control.a_star import AStarSettings
from attnproc.control.ir_diffusion import IRSettings
from attnproc.control.prime_composer import PrimeComposerSettings
from attnproc.demos.shapes import MODELS
from attnproc.errors import AttnProcWarning, SettingsError
from attnproc.pipelines import cli, picture_input, picture_job
from attnproc.pipelines.a_star import AStarPipeline
from attnproc.pipelines.ir_diffusion import IRDiffusionPipeline, Scene, Subject
from attnproc.pipelines.prime_composer import PrimeComposerPipeline
from attnproc.pipelines.settings import PictureSettings

PROMPT = "a plain red circle and a striped blue star on a navy background"
COMMANDS = ("image", "story", "compose")
SAVED = {}
EXAMPLE = MODELS.parent / "examples" / "story.yaml"
STORY = """\
subjects:
  - prompt: a striped red star on a navy background
    region: [0.25, 0.25, 0.5, 0.5]
  - prompt: a plain green circle on a black background
    word: circle
    image: portrait.png
scenes:
  - prompt: a striped red star and a plain green circle on a gray background
    regions: [[0, 32, 64, 64], mask.png]
  - prompt: a plain green circle on a gray background
    regions: [null, [64, 64, 48, 48]]
"""


@pytest.fixture
def model(make_pipe, tmp_path_factory):
    """model("sd1" | "sdxl"): the folder of a tiny pipeline."""

    def folder(name):
        if name not in SAVED:
            SAVED[name] = tmp_path_factory.mktemp("models") / name
            make_pipe(name).save_pretrained(SAVED[name])
        return SAVED[name]

    return folder


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An empty folder for results, which the commands run in."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    """A folder of pictures and a story that refers to them."""
    folder = tmp_path / "files"
    folder.mkdir()
    Image.new("RGB", (256, 256), (16, 20, 78)).save(folder / "background.png")
    for name, mode, ground, ink in (("object", "RGB", "white", (225, 35, 35)), ("object-mask", "L", 0, 255)):
        picture = Image.new(mode, (100, 80), ground)
        ImageDraw.Draw(picture).ellipse((20, 10, 80, 70), ink)
        picture.save(folder / f"{name}.png")
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((40, 20, 60, 50), 255)
    mask.save(folder / "mask.png")
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(folder / "portrait.png")
    (folder / "text.png").write_text("not a picture")
    (folder / "story.yaml").write_text(STORY)
    return folder


@pytest.fixture
def no_denoising(monkeypatch):
    """Fails the test when the U-Net is called."""
    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", lambda *a, **k: pytest.fail("denoised"))


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def image(model, *arguments):
    return run("image", PROMPT, "--concepts", "red circle,blue star", "--model", model, "--steps", 2, *arguments)


def compose(model, files, *arguments):
    """Later flags override earlier ones."""
    names = {"background": "background", "object": "object", "mask": "object-mask"}
    given = [part for flag, name in names.items() for part in (f"--{flag}", files / f"{name}.png")]
    box = ("--box", "128,96,96,96", "--subject", "red circle")
    return run("compose", "a red circle on a navy background", *given, *box, "--model", model, "--steps", 3, *arguments)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(picture):
    """uint8 (height, width, 3) of a file, a PIL picture, or floats from 0 to 1."""
    if isinstance(picture, np.ndarray):
        return (picture * 255).round().astype(np.uint8)
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture))


def same(one, other):
    return np.array_equal(pixels(one), pixels(other))


def ok(result):
    assert result.exit_code == 0, result.output
    return result


def refused(result, message, code=2):
    """One line that says why, no traceback."""
    assert result.exit_code == code, result.output
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("warning: "))
    assert line.startswith("error: ")
    assert re.search(message, line), line


def record(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


# -- image -------------------------------------------------------------------------------------------------------------


def test_image_is_that_of_the_pipeline_and_compare_adds_the_plain_one(model, out):
    layout = ("--layout", "red circle=0,32,64,64", "--layout", "blue star=0.5,0.25,0.5,0.5")
    ok(
        image(
            model("sd1"), *layout, "--seed", 3, "--num-images", 2, "--compare", "--report", "--set", "scale_factor=50"
        )
    )
    endings = ("comparison.png", "json", "plain.png", "png")
    assert sorted(os.listdir(out)) == [f"picture-{n}.{ending}" for n in (1, 2) for ending in endings]
    pipe = AStarPipeline.from_pretrained(model("sd1"))
    settings = AStarSettings(scale_factor=50.0)
    for number, seed in ((1, 3), (2, 4)):
        arguments = {"num_inference_steps": 2, "output_type": "np"}
        expected = pipe(
            PROMPT,
            concepts=["red circle", "blue star"],
            layout_masks={"red circle": (0, 32, 64, 96), "blue star": (0.5, 0.25, 1.0, 0.75)},
            settings=settings,
            generator=seeded(seed),
            **arguments,
        )
        plain = pipe.pipe(PROMPT, generator=seeded(seed), **arguments)
        assert same(out / f"picture-{number}.png", expected.images[0])
        assert same(out / f"picture-{number}.plain.png", plain.images[0])
        assert not same(out / f"picture-{number}.png", plain.images[0])
        data = record(out / f"picture-{number}.json")
        assert (data["seed"], data["method"], data["picture"]) == (seed, "A-STAR", f"picture-{number}.png")
        assert data["log"] == json.loads(json.dumps(picture_job.plain_data(expected.log)))
        assert [step["step"] for step in data["log"]] == [0, 1]
        assert data["method_settings"]["scale_factor"] == 50.0
        assert data["request"]["concepts"] == ["red circle", "blue star"]
        assert data["device"] and data["versions"]["diffusers"]
        times = data["timings"]
        assert times["seconds"] >= sum(times["step_seconds"]) > 0 and len(times["step_seconds"]) == 2
        assert times["plain_seconds"] > 0
        assert data["comparison"]["side_by_side"] == f"picture-{number}.comparison.png"


def test_the_comparison_shows_both_pictures_whole(model, out):
    ok(image(model("sd1"), "--compare", "--output", "a.png"))
    sheet = pixels(out / "a.comparison.png")
    for name in ("a.png", "a.plain.png"):
        part = pixels(out / name)
        rows, columns = (range(size - side + 1) for size, side in zip(sheet.shape[:2], part.shape[:2], strict=True))
        corners = ((y, x) for y in rows for x in columns if (sheet[y, x] == part[0, 0]).all())
        assert any(np.array_equal(sheet[y : y + len(part), x : x + part.shape[1]], part) for y, x in corners), name


def test_without_flags_there_is_one_file(model, out):
    ok(image(model("sd1"), "--output", "one.png"))
    assert os.listdir(out) == ["one.png"]


def test_settings_reach_the_method_and_a_step_of_zero_is_the_plain_picture(model, out):
    arguments = ("--guidance", 3, "--negative-prompt", "a white square", "--height", 64, "--width", 192)
    ok(image(model("sd1"), "--set", "scale_factor=0", "--compare", "--report", *arguments))
    assert pixels(out / "picture.png").shape == (64, 192, 3)
    assert same(out / "picture.png", out / "picture.plain.png")
    call = {"guidance_scale": 3.0, "negative_prompt": "a white square", "height": 64, "width": 192}
    assert record(out / "picture.json")["call"] == {"num_inference_steps": 2, **call}


def test_a_mask_file_is_a_layout(model, out, files):
    ok(image(model("sd1"), "--layout", f"blue star={files / 'mask.png'}", "--output", "mask.png"))
    ok(image(model("sd1"), "--layout", "blue star=80,40,42,62", "--output", "box.png"))
    assert same("mask.png", "box.png")


def test_a_folder_gets_numbered_pictures(model, out):
    ok(image(model("sd1"), "--num-images", 2, "--output", "new", "--report"))
    assert sorted(os.listdir(out / "new")) == ["picture-1.json", "picture-1.png", "picture-2.json", "picture-2.png"]


def test_one_side_alone_is_that_of_both_pictures_and_of_the_report(model, out, tmp_path):
    star = "{prompt: a striped red star on a navy background, word: star}"
    (tmp_path / "one.yaml").write_text(
        f"subjects: [{star}]\nscenes: [{{prompt: a striped red star on a gray background}}]"
    )
    ok(image(model("sd1"), "--height", 64, "--compare", "--report"))
    flags = ("--model", model("sd1"), "--steps", 2, "--width", 192, "--compare", "--output", "story.png")
    ok(run("story", tmp_path / "one.yaml", *flags))
    assert {Image.open(out / name).size for name in ("picture.png", "picture.plain.png")} == {(128, 64)}
    data = record(out / "picture.json")
    assert (data["call"]["height"], data["call"]["width"]) == (data["height"], data["width"]) == (64, 128)
    assert {Image.open(out / name).size for name in ("story.png", "story.plain.png")} == {(192, 128)}


def test_shapes_image_is_the_default_and_is_enlarged(model, out, monkeypatch, tmp_path):
    monkeypatch.setattr("attnproc.demos.shapes.MODELS", tmp_path)
    result = run("image", PROMPT, "--concepts", "circle")
    refused(result, "Found no model_index.json")
    (tmp_path / "shapes-image").symlink_to(model("sd1"))
    ok(run("image", PROMPT, "--concepts", "circle,star", "--steps", 2, "--report"))
    small = AStarPipeline.from_pretrained(model("sd1"))(
        PROMPT,
        concepts=["circle", "star"],
        settings=AStarSettings(scale_factor=50.0, update_window=(0.0, 0.15), attention_resolution=(8, 8)),
        generator=seeded(),
        num_inference_steps=2,
        guidance_scale=4.0,
        output_type="np",
    )
    assert np.array_equal(pixels(out / "picture.png"), pixels(small.images[0]).repeat(4, 0).repeat(4, 1))
    data = record(out / "picture.json")
    assert (data["model"], data["upscale"], data["height"]) == ("shapes-image", 4, 128)
    assert data["method_settings"]["attention_resolution"] == [8, 8]
    flags = ("--steps", 2, "--set", "attention_resolution=[4, 4]", "--report", "--output", "told.png")
    ok(run("image", PROMPT, "--concepts", "circle,star", *flags))
    assert record(out / "told.json")["method_settings"]["attention_resolution"] == [4, 4]
    layout = ("--layout", "circle=0,0,64,64", "--layout", "star=64,64,64,64")
    ok(run("image", PROMPT, "--concepts", "circle,star", "--steps", 2, *layout, "--report", "--output", "placed.png"))
    chosen = record(out / "placed.json")["method_settings"]
    assert (chosen["lambda_seg"], chosen["update_window"]) == (0.0, [0.0, 0.5])


def test_steps_guidance_and_settings_that_suit_shapes_image_are_its_own(model, out, monkeypatch, tmp_path):
    monkeypatch.setattr("attnproc.demos.shapes.MODELS", tmp_path)
    (tmp_path / "shapes-image").symlink_to(model("sd1"))
    calls = {command: {"num_inference_steps": 20, "guidance_scale": 4.0} for command in ("image", "story")}
    for command in COMMANDS:
        job = picture_job.prepare(command, PictureSettings(height=64), {})
        assert job.arguments == {**calls.get(command, {}), "height": 64}
        job = picture_job.prepare(command, PictureSettings(guidance=3.0), {})
        assert job.arguments["guidance_scale"] == 3.0
        other = picture_job.prepare(command, PictureSettings(model=str(model("sd1"))), {})
        assert other.arguments == {} and other.options == other.method.settings()
    assert picture_job.prepare("compose", PictureSettings(), {}).options == PrimeComposerSettings(tau_c=0.3)
    told = PictureSettings(set={"lam": "0.5"}), PictureSettings(set={"experimental": "false"})
    options = [picture_job.prepare("story", settings, {}).options for settings in told]
    late = {"text_steps": (0.2, 1.0)}
    assert options == [IRSettings(lam=0.5, experimental=True, **late), IRSettings(experimental=False, **late)]


# -- story -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_story_is_that_of_the_pipeline_and_compare_adds_the_plain_ones(model, out, files, name):
    flags = ("--model", model(name), "--steps", 2, "--seed", 5, "--negative-prompt", "a square", "--set", "lam=0.5")
    ok(run("story", files / "story.yaml", *flags, "--compare", "--report", "--output", "s.png"))
    pictures = [f"s-{n}.{ending}" for n in (1, 2) for ending in ("comparison.png", "json", "plain.png", "png")]
    assert sorted(os.listdir(out)) == sorted([*pictures, "s-portrait-1.png"])  # the second portrait was given
    pipe = IRDiffusionPipeline.from_pretrained(model(name))
    pipe.set_progress_bar_config(disable=True)
    mask = Image.open(files / "mask.png")
    subjects = [
        Subject("a striped red star on a navy background", (0.25, 0.25, 0.75, 0.75)),
        Subject("a plain green circle on a black background", word="circle", image=Image.open(files / "portrait.png")),
    ]
    scenes = [
        Scene("a striped red star and a plain green circle on a gray background", [(0, 32, 64, 96), mask]),
        Scene("a plain green circle on a gray background", [None, (64, 64, 112, 112)]),
    ]
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnProcWarning)
        expected = pipe.story(
            subjects,
            scenes,
            settings=IRSettings(lam=0.5),
            generator=seeded(5),
            negative_prompt="a square",
            **arguments,
        )
    prompts = [one.prompt for one in (*subjects, *scenes)]
    plain = pipe.pipe(prompts, generator=seeded(5), negative_prompt=["a square"] * 4, **arguments)
    assert same(out / "s-portrait-1.png", expected[0].references[0])
    for number in (1, 2):
        assert same(out / f"s-{number}.png", expected[number - 1].image)
        assert same(out / f"s-{number}.plain.png", plain.images[1 + number])
        assert not same(out / f"s-{number}.png", out / f"s-{number}.plain.png")
    data = record(out / "s-2.json")
    assert (data["scene"], data["seed"], data["method_settings"]["lam"]) == (2, 5, 0.5)
    assert data["request"]["scenes"][1]["regions"] == [None, [64, 64, 48, 48]]
    assert all(star == 0 < circle for star, circle in data["log"].values())


def test_the_layers_that_isolate_can_be_named(model, out, files):
    flags = ("--model", model("sd1"), "--steps", 1, "--report", "--output", "s.png")
    ok(run("story", files / "story.yaml", *flags, "--set", "isolation_layers=up_blocks,mid_block"))
    assert record(out / "s-1.json")["method_settings"]["isolation_layers"] == ["up_blocks", "mid_block"]


def test_the_example_and_the_form_in_the_help_are_stories(files, tmp_path):
    story = picture_input.read_story(EXAMPLE)
    assert [subject.word for subject in story.subjects] == ["star", "circle"]
    assert story.subjects[1].region == (0.15, 0.15, 0.85, 0.85)
    assert [scene.regions for scene in story.scenes] == [None, None, [None, (0.1, 0.1, 0.9, 0.9)]]
    shown = CliRunner().invoke(cli.app, ["story", "--help"], env={"COLUMNS": "160"}).output
    lines = [line.rstrip() for line in shown.splitlines()]
    first, last = lines.index(" subjects:"), next(n for n, line in enumerate(lines) if "null  " in line)
    for name in ("circle.png", "circle-mask.png"):
        (tmp_path / name).write_bytes((files / "mask.png").read_bytes())
    (tmp_path / "help.yaml").write_text("\n".join(line[1:] for line in lines[first : last + 1]))
    story = picture_input.read_story(tmp_path / "help.yaml")
    (scene,) = story.scenes
    assert len(story.subjects) == 3 and [type(region).__name__ for region in scene.regions] == [
        "tuple",
        "Image",
        "NoneType",
    ]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (STORY, "", "has no key 'subjects'"),
        (STORY, "- 1", "holds a list; expected keys and values"),
        (STORY, "a: [", "story .* cannot be read"),
        ("scenes:", "pictures:", "unknown key 'pictures'; expected subjects, scenes"),
        ("scenes:", "scene:", "Did you mean 'scenes'"),
        ("    region: [0.25, 0.25, 0.5, 0.5]\n", "", "subject 1 has neither the key 'region' nor 'word'"),
        ("    word: circle\n", "    wort: circle\n", "subject 2 has the unknown key 'wort'.*Did you mean 'word'"),
        ("    word: circle\n", "    word: 3\n", "subject 2, key 'word' is 3; expected text"),
        ("image: portrait.png", "image: none.png", "subject 2, key 'image': .*none.png cannot be read"),
        ("image: portrait.png", "image: text.png", "subject 2, key 'image': .*text.png cannot be read"),
        ("  - prompt: a striped red star on", "  - promt: a star on", "subject 1 has the unknown key 'promt'"),
        ("[0.25, 0.25, 0.5, 0.5]", "[0.25, 0.25, 0.5]", "subject 1, key 'region' is .* expected a box of four"),
        ("[0.25, 0.25, 0.5, 0.5]", "[0.25, 0.25, 0.5, -0.5]", "subject 1, key 'region' is the box .* above 0"),
        ("[0.25, 0.25, 0.5, 0.5]", "[.nan, 0.25, 0.5, 0.5]", "subject 1, key 'region' is the box nan"),
        ("[0.25, 0.25, 0.5, 0.5]", "[true, 0, 8, 8]", "subject 1, key 'region' is .* expected a box of four"),
        ("[0.25, 0.25, 0.5, 0.5]", "5", "subject 1, key 'region' is 5; expected a box"),
        ("[[0, 32, 64, 64], mask.png]", "[mask.png]", "scene 1 has 1 entries in its key 'regions'; expected 2"),
        ("mask.png]", "no.png]", "scene 1, key 'regions', entry 2 .*no.png cannot be read"),
        ("    regions: [[0, 32, 64, 64], mask.png]\n", "", "scene 1 has no key 'regions', and not every subject"),
        ("[[0, 32, 64, 64], mask.png]", "all", "scene 1, key 'regions' is 'all'; expected a list"),
    ],
)
def test_a_bad_story_is_refused_with_the_key(files, out, monkeypatch, before, after, message):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", pytest.fail)
    assert before in STORY
    (files / "story.yaml").write_text(STORY.replace(before, after, 1))
    refused(run("story", files / "story.yaml", "--model", "nowhere"), message)


# -- compose -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("domain", "preset"), [("same", "photo"), ("cross", "painting")])
def test_compose_is_that_of_the_pipeline_and_compare_adds_inpainting(model, out, files, domain, preset):
    ok(compose(model("sd1"), files, "--domain", domain, "--seed", 2, "--compare", "--report", "--set", "tau_a=0.5"))
    expected = PrimeComposerPipeline.from_pretrained(model("sd1"))(
        "a red circle on a navy background",
        background=Image.open(files / "background.png"),
        object_image=Image.open(files / "object.png"),
        object_mask=Image.open(files / "object-mask.png"),
        target=(128, 96, 224, 192),
        subject="red circle",
        domain=domain,
        settings=PrimeComposerSettings.from_preset(preset, tau_a=0.5),
        num_inference_steps=3,
        generator=seeded(2),
        output_type="np",
    )
    assert sorted(os.listdir(out)) == [f"picture.{e}" for e in ("comparison.png", "json", "plain.png", "png")]
    assert same(out / "picture.png", expected.images[0])
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model("sd1"), requires_safety_checker=False)
    mask = Image.new("L", (128, 128))
    mask.paste(255, expected.boxes[0])
    plain = pipe(
        "a red circle on a navy background",
        image=Image.open(files / "background.png").convert("RGB").resize((128, 128)),
        mask_image=mask,
        height=128,
        width=128,
        num_inference_steps=3,
        generator=seeded(2),
        output_type="np",
    )
    assert same(out / "picture.plain.png", plain.images[0])
    with Image.open(out / "picture.comparison.png") as beside:
        assert beside.width >= 3 * 128  # the pasted pixels, PrimeComposer, inpainting
    data = record(out / "picture.json")
    assert data["method_settings"]["tau_c"] == PrimeComposerSettings.from_preset(preset).tau_c
    assert [step["infuse"] for step in data["log"]] == [True, True, False]
    assert data["request"]["background"] == str(files / "background.png")


def test_the_box_counts_the_pixels_of_the_background_file(model, out, files):
    ok(compose(model("sd1"), files, "--output", "pixels.png"))
    ok(compose(model("sd1"), files, "--box", "0.5,0.375,0.375,0.375", "--output", "fractions.png"))
    assert same("pixels.png", "fractions.png")


def test_compose_keeps_the_shape_of_the_background(model, out, files):
    Image.open(files / "background.png").resize((512, 128)).save(files / "background.png")
    ok(compose(model("sd1"), files, "--box", "0.5,0.1,0.4,0.8"))
    assert Image.open(out / "picture.png").size == (256, 64)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--model", "nowhere"], "model 'nowhere' is not known", 2),
        (["--model", "shapes-imag"], "Did you mean 'shapes-image'", 2),
        (["--model", "wan2.1-14b"], "known to `attnproc estimate` only", 2),
        (["--model", "shapes-video"], "is a WanPipeline; A-STAR expects a Stable", 3),
        (["--set", "scale_facto=3"], "has no setting 'scale_facto'.*Did you mean 'scale_factor'", 2),
        (["--set", "scale_factor"], "expected key=value", 2),
        (["--set", "scale_factor=much"], "scale_factor='much' has the wrong type", 2),
        (["--set", "scale_factor=-1"], "scale_factor=-1.0; expected a number of at least 0", 2),
        (["--set", "refine=1"], "refine='1' holds several values by name; expected it in Python", 2),
        (["--steps", 0], "steps=0 is not possible", 2),
        (["--num-images", 0], "num_images=0 is not possible", 2),
        (["--seed", -1], "seed=-1 is not possible", 2),
        (["--dtype", "int8"], "dtype='int8' is not known", 2),
        (["--device", "abacus"], "device 'abacus' cannot be used here", 2),
        (["--offload", "model", "--device", "cpu"], "needs an accelerator", 2),
        (["--output", "p.jpg"], r"ending '\.jpg'; expected \.png", 2),
        (["--output", ""], "has no name", 2),
        (["--output", "missing/p.png"], "is not a folder", 2),
        (["--output", "full"], "is not an empty folder", 2),
        (["--output", "used.png"], r"used\.json is a folder", 2),
        (["--layout", "red circle"], "is not an assignment", 2),
        (["--layout", "circle=1,2,3,4"], "'circle', which is no concept; expected one of red circle, blue star", 2),
        (["--layout", "blue star=0,0,8,8", "--layout", "blue star=0,0,8,8"], "came twice for 'blue star'", 2),
        (["--layout", "blue star=0,0,8"], r"layout of 'blue star' is \[0, 0, 8\]; expected a box of four", 2),
        (["--layout", "blue star=0,0,0,8"], "width and height above 0", 2),
        (["--layout", "blue star=no.png"], "'blue star' no.png cannot be read", 2),
    ],
)
def test_bad_arguments_load_no_weights(out, monkeypatch, arguments, message, code):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", pytest.fail)
    (out / "full").mkdir()
    (out / "full" / "file").touch()
    (out / "used.json").mkdir()
    refused(image("nowhere", *arguments), message, code)
    assert sorted(os.listdir(out)) == ["full", "used.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--box", "1,2,3"], r"--box is \[1, 2, 3\]; expected a box of four"),
        (["--box", "a,b,c,d"], "--box is 'a,b,c,d'; expected a box of four"),
        (["--box", "1,2,0,3"], "--box is the box 1, 2, 0, 3; .* above 0"),
        (["--background", "no.png"], "--background no.png cannot be read"),
        (["--object", "text.png"], "--object text.png cannot be read"),
        (["--object", "deep.png"], "--object deep.png has pixels of mode 'I;16'; expected 8 bits"),
        (["--mask", "no.png"], "--mask no.png cannot be read"),
        (["--mask", "deep.png"], "--mask deep.png has pixels of mode 'I;16'; expected 8 bits"),
        (["--domain", "other"], "domain='other' is not known"),
        (["--set", "tau_a=2"], "tau_a=2.0; expected a share"),
    ],
)
def test_bad_arguments_of_compose_load_no_weights(out, files, monkeypatch, arguments, message):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", pytest.fail)
    monkeypatch.chdir(files)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save("deep.png")
    refused(compose("nowhere", files, *arguments), message)


def test_what_only_the_loaded_model_can_tell_is_refused_before_any_denoising(model, out, files, no_denoising):
    sd1 = model("sd1")
    refused(image(sd1, "--concepts", "red square"), "'red square' is not in the prompt")
    refused(image(sd1, "--layout", "red circle=100,0,64,64"), "inside the picture of 128 x 128")
    refused(compose(sd1, files, "--subject", "dog"), "'dog' is not in the prompt")
    refused(compose(sd1, files, "--box", "300,0,64,64"), "a part inside the picture")
    refused(compose(sd1, files, "--mask", files / "mask.png"), "aspect ratio")
    (files / "story.yaml").write_text(STORY.replace("[64, 64, 48, 48]", "[100, 64, 48, 48]"))
    refused(run("story", files / "story.yaml", "--model", sd1), "subject 2 in scene 2 is the box .* inside the picture")
    (files / "story.yaml").write_text(STORY.replace("word: circle", "word: dog"))
    refused(run("story", files / "story.yaml", "--model", sd1), "'dog' is not in the prompt")
    assert os.listdir(out) == []


def test_compose_refuses_sdxl(model, out, files):
    refused(compose(model("sdxl"), files), "is a StableDiffusionXLPipeline; PrimeComposer expects a StableDiff", code=3)


def test_a_picture_command_lets_generate_refuse_its_model(model, out):
    refused(run("generate", PROMPT, "--model", model("sd1")), "expected a text-to-video pipeline")


# -- failures in the middle --------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """failing(error, at): the U-Net raises at its n-th call."""
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward

    def set_up(error, at):
        calls = []

        def fail(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise error
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "forward", fail)

    return set_up


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; files that were finished are whole"),
        (RuntimeError("out\nof memory"), 1, "error: RuntimeError: out of memory"),
    ],
)
def test_pictures_that_were_finished_stay_and_the_rest_leaves_nothing(model, out, failing, error, code, message):
    failing(error, at=11)  # 2 steps of capture and prediction, 2 plain ones: 6 calls a picture
    result = image(model("sd1"), "--num-images", 3, "--compare", "--output", "new")
    assert result.exit_code == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert sorted(os.listdir(out / "new")) == ["picture-1.comparison.png", "picture-1.plain.png", "picture-1.png"]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_leaves_no_file(model, out, files, failing, command):
    failing(KeyboardInterrupt(), at=2)
    result = {
        "image": lambda: image(model("sd1")),
        "story": lambda: run("story", files / "story.yaml", "--model", model("sd1"), "--steps", 2),
        "compose": lambda: compose(model("sd1"), files),
    }[command]()
    assert result.exit_code == 130
    assert os.listdir(out) == []


def test_a_picture_that_is_not_finite_is_refused(model, out, monkeypatch):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *a, **k: (decode(*a, **k)[0] * float("nan"),))
    refused(image(model("sd1")), "values that are not finite.*--dtype float32", code=1)
    assert os.listdir(out) == []


@pytest.mark.parametrize("flag", [[True], True])
def test_a_picture_that_the_safety_checker_blacked_out_is_announced(flag):
    job = types.SimpleNamespace(arguments={}, device=torch.device("cpu"))
    pipe = types.SimpleNamespace(set_progress_bar_config=lambda **_: None)
    black = types.SimpleNamespace(images=[np.zeros((2, 2, 3))], nsfw_content_detected=flag)
    with pytest.warns(AttnProcWarning, match="safety checker made a picture black"):
        picture_job.call(job, "title", 0, pipe, lambda **_: black)


# -- help, list and plain data -----------------------------------------------------------------------------------------


def test_help_names_a_default_for_every_option_and_the_enlargement():
    for command in COMMANDS:
        text = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert "enlarged to 512" in text
        options = re.findall(r"^│ \*?\s*(--[\w-]+).*$", text, flags=re.MULTILINE)
        assert {"--model", "--steps", "--set", "--compare", "--report", "--offload"} <= set(options)
        for option in set(options) - {"--help"}:
            part = re.split(r"│ \*?\s*--", text.partition(f" {option} ")[2])[0]
            assert "default" in part or "[required]" in part, f"{command} {option}"


def test_list_names_the_control_methods():
    data = json.loads(run("list", "--json").stdout)["control"]
    assert {name: entry["method"] for name, entry in data.items()} == {
        "image": "A-STAR",
        "story": "IR-Diffusion",
        "compose": "PrimeComposer",
    }
    assert data["compose"]["models"] == ["StableDiffusionPipeline"]
    table = run("list").output
    for text in ("attnproc image", "A-STAR", "IR-Diffusion", "PrimeComposer"):
        assert text in table


def test_plain_data_is_json():
    value = {1: (torch.ones(2), np.float32("nan")), "settings": AStarSettings(), "none": None, "type": torch.float32}
    data = json.loads(json.dumps(picture_job.plain_data(value), allow_nan=False))
    assert data["1"] == [[1.0, 1.0], None]
    assert (data["settings"]["scale_range"], data["none"], data["type"]) == ([1.0, 0.5], None, "torch.float32")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("8,16,32,64", (8, 16, 40, 80)),
        ("0.7, 0.1, 0.3, 0.9", (0.7, 0.1, 1.0, 1.0)),
        ("0,0,0.5,1", (0.0, 0.0, 0.5, 1.0)),
        ("-8,0,16,16", (-8, 0, 8, 16)),
    ],
)
def test_a_box_is_a_corner_and_a_size(text, box):
    found = picture_input.parse_box(text, "box")
    assert found == box and [type(v) for v in found] == [type(v) for v in box]


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2,inf,4.0", "1,2,0,4", "1.0,2,3,-4"])
def test_what_is_no_box_is_refused(text):
    with pytest.raises(SettingsError, match="box"):
        picture_input.parse_box(text, "box")


def test_a_mask_file_with_transparency_is_what_is_opaque(files):
    picture = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(picture).rectangle((40, 20, 60, 50), (0, 0, 0, 255))
    picture.save(files / "cut-out.png")
    read = [picture_input.read_region(name, "mask", files) for name in ("cut-out.png", "mask.png")]
    assert same(*read)


def test_a_picture_is_upright_and_rgb(tmp_path):
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    read = picture_input.read_picture(tmp_path / "turned.png", "picture")
    assert (read.mode, read.size, read.getpixel((0, 0))) == ("RGB", (2, 4), (255, 0, 0))
