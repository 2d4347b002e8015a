"""What the benchmarks on shapes-image read from pictures: rendered scenes are perfect, spoiled ones are not."""

from dataclasses import replace

import pytest
from PIL import Image

from attnproc.demos.shapes.render import render
from attnproc.demos.shapes.scene import WORLD, Look, Object, Scene
from benchmarks import a_star_shapes, ir_diffusion_shapes, prime_composer_shapes

STAR = Object(Look("star", "red", "striped", "white", "rest"), 18.0, 40.0, 10.0, 0.0)
CIRCLE = Object(Look("circle", "blue", "checkered", "yellow", "rest"), 46.0, 20.0, 10.0, 0.0)
SCENE = Scene((STAR, CIRCLE), "gray", "gray")


def picture(*objects):
    return render(replace(SCENE, objects=objects), 128, 1)[0]


def recolored(item, **changes):
    return replace(item, look=replace(item.look, **changes))


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ((STAR, CIRCLE), (1.0, 1.0, 1.0, 1.0, 1.0)),
        ((STAR,), (0.5, 0.0, 0.0, 0.0, 0.5)),
        ((STAR, recolored(CIRCLE, shape="square")), (1.0, 1.0, 0.0, 0.0, 1.0)),
        ((STAR, recolored(CIRCLE, texture="striped")), (1.0, 1.0, 1.0, 0.0, 1.0)),
        ((STAR, CIRCLE, replace(CIRCLE, x=46.0, y=48.0)), (1.0, 1.0, 1.0, 0.0, 1.0)),
        ((replace(STAR, x=46.0), replace(CIRCLE, x=18.0)), (1.0, 1.0, 1.0, 1.0, 0.0)),
    ],
)
def test_a_star_counts_objects_their_looks_and_their_places(drawn, expected):
    found = a_star_shapes.score(SCENE, picture(*drawn))
    assert tuple(found.values()) == expected


def test_the_disks_of_a_star_hold_the_objects_and_little_else():
    drawn = picture(STAR).max(-1).astype(int) - picture().max(-1) > 30
    disk = a_star_shapes.disk(STAR).repeat(2, 0).repeat(2, 1)
    assert (drawn & disk).sum() > 0.98 * drawn.sum() > 0.2 * disk.sum()


def test_ir_diffusion_measures_looks_against_portraits():
    looks = (STAR.look, CIRCLE.look)
    centered = [picture(replace(item, x=WORLD / 2, y=WORLD / 2)) for item in (STAR, CIRCLE)]
    portraits = [ir_diffusion_shapes.largest(one) for one in centered]

    def measured(*objects):
        return ir_diffusion_shapes.measure(looks, portraits, picture(*objects))

    right = measured(STAR, CIRCLE)
    assert right["colour distance"] < 0.05 and right["picture distance"] < 0.12
    assert (right["leakage"], right["look right"], right["present"]) == (0.0, 1.0, 1.0)
    leaking = measured(STAR, recolored(CIRCLE, second_color="white", texture="striped"))
    assert leaking["leakage"] == 0.5 and leaking["texture right"] == 0.5
    assert leaking["colour distance"] > right["colour distance"] + 0.1
    alone = measured(STAR)
    assert alone["present"] == 0.5 and alone["colour distance"] > 0.45


def test_prime_composer_compares_with_the_rendered_scene():
    case = next(c for c in map(prime_composer_shapes.make_case, range(1, 20, 2)) if len(c.scene.objects) == 2)
    whole = Image.fromarray(render(case.scene, prime_composer_shapes.PIXELS, 1)[0])
    right = prime_composer_shapes.score(case, whole, 1.0)
    assert right.identity and right.prompt and right.object_psnr == right.box_psnr == 99.0
    assert right.background_psnr > 60.0
    missing = prime_composer_shapes.score(case, case.background, 1.0)
    assert not missing.identity and not missing.prompt and missing.object_psnr < 25.0
    assert missing.background_psnr == 99.0
    pasted = prime_composer_shapes.score(case, prime_composer_shapes.paste(case), 1.0)
    assert pasted.background_psnr > 60.0 and missing.object_psnr < pasted.object_psnr < 99.0
