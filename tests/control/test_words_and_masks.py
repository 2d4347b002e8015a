"""Words of prompts become token indices, and boxes and masks become grids of tokens; what makes no sense is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from attnproc.control.masks import as_box, bounding_box, region_mask, token_mask
from attnproc.control.prime_composer_geometry import place
from attnproc.control.words import check_length, find_tokens, get_indices
from attnproc.demos.shapes.picture_text import build_clip_tokenizer
from attnproc.errors import SettingsError

PROMPT = "a red circle and a red star on a navy background"


@pytest.fixture(scope="module")
def tokenizer():
    return build_clip_tokenizer()


def test_indices_count_from_the_start_token(tokenizer):
    tokens = get_indices(tokenizer, PROMPT)
    assert tokens[0] == "<|startoftext|>" and tokens[2] == "red</w>" and tokens[len(tokens) - 1] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("phrase", "taken", "expected"),
    [
        ("red", (), (2,)),
        ("red", (2,), (6,)),
        ("red star", (), (6, 7)),
        ("Navy Background", (), (10, 11)),
        ([2, 3], (), (2, 3)),
    ],
)
def test_a_phrase_is_its_first_free_place(tokenizer, phrase, taken, expected):
    assert find_tokens(tokenizer, PROMPT, phrase, taken) == expected


def test_a_word_of_several_pieces_is_found_whole(tokenizer):
    prompt = "a frog and a crown"
    found = find_tokens(tokenizer, prompt, "crown")
    assert "".join(get_indices(tokenizer, prompt)[i] for i in found) == "crown</w>" and len(found) > 1


@pytest.mark.parametrize(
    ("phrase", "taken", "message"),
    [
        ("blue", (), "not in the prompt"),
        ("circle red", (), "not in the prompt"),
        ("", (), "no tokens"),
        ("star", (7,), "where another one already is"),
        ([0], (), "from 1 to 11"),
        ([12], (), "from 1 to 11"),
        ([], (), "from 1 to 11"),
        ([True], (), "from 1 to 11"),
        ([2, 2], (), "each token once"),
        ([2], (2,), "each token once"),
    ],
)
def test_what_is_no_word_of_the_prompt_is_refused_with_its_tokens(tokenizer, phrase, taken, message):
    with pytest.raises(SettingsError, match=message) as error:
        find_tokens(tokenizer, PROMPT, phrase, taken)
    assert "7 star</w>" in str(error.value)


def test_a_phrase_behind_the_encoders_end_is_refused(tokenizer):
    prompt = "a red circle and " * 10 + "a blue star"
    with pytest.raises(SettingsError, match="lies beyond the 40 tokens"):
        find_tokens(tokenizer, prompt, "star")
    with pytest.raises(SettingsError, match="at most 40"):
        check_length(tokenizer, prompt)
    check_length(tokenizer, PROMPT)


@pytest.mark.parametrize("box", [(4, 2, 12, 8), (0.25, 0.25, 0.75, 1.0)])
def test_a_box_is_half_open_in_pixels_or_fractions(box):
    assert bounding_box(region_mask(box, 8, 16, "box")) == (2, 8, 4, 12)


BOX = (4, 2, 12, 8)
BOXES = {
    "list": [4, 2, 12, 8],
    "numpy integers": tuple(np.int64(v) for v in BOX),
    "array": np.array(BOX),
    "array of fractions": np.array([0.25, 0.25, 0.75, 1.0], np.float32),
    "tensor": torch.tensor(BOX),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_a_box_may_be_any_four_numbers(box):
    assert {type(v) for v in as_box(box)} <= {int, float}
    assert bounding_box(region_mask(box, 8, 16, "box")) == (2, 8, 4, 12)
    placed, _ = place(Image.new("RGB", (8, 8)), (2, 2, 6, 6), box, (16, 8), 8, 16)
    assert placed.box == BOX


@pytest.mark.parametrize("region", [(0, 0, 1), (True, False, True, True), "0000", np.zeros((2, 2)), None])
def test_anything_else_is_no_box(region):
    assert as_box(region) is None


CUT_OUT = np.zeros((6, 12, 4), np.uint8)
CUT_OUT[1:4, 2:5, 3] = 255  # black on nothing


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "P"])
@pytest.mark.parametrize("ink", [0, 255], ids=["black", "white"])
def test_the_mask_of_a_cut_out_is_what_is_opaque(mode, ink):
    drawn = CUT_OUT.copy()
    drawn[..., :3] = ink
    picture = Image.fromarray(drawn)
    if mode == "P":
        picture = Image.fromarray(drawn[..., 3] // 255).convert("P")
        picture.putpalette([ink] * 6)
        picture.info["transparency"] = 0
    else:
        picture = picture.convert(mode)
    assert bounding_box(region_mask(picture, 6, 12, "mask")) == (1, 4, 2, 5)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_where_alpha_is_the_same_everywhere_the_mask_is_what_is_white(alpha):
    drawn = np.zeros((6, 12, 4), np.uint8)
    drawn[1:4, 2:5] = 255
    drawn[..., 3] = alpha
    assert bounding_box(region_mask(Image.fromarray(drawn), 6, 12, "mask")) == (1, 4, 2, 5)


def test_a_mask_may_be_a_flipped_view():
    drawn = np.zeros((6, 12), bool)
    drawn[1:4, 2:5] = True
    assert bounding_box(region_mask(drawn[::-1], 6, 12, "mask")) == (2, 5, 2, 5)


@pytest.mark.parametrize("kind", ["pil", "numpy", "bool", "float", "large"])
def test_a_mask_may_come_in_many_forms(kind):
    drawn = np.zeros((6, 12), np.uint8)
    drawn[1:4, 2:5] = 255
    region = {
        "pil": Image.fromarray(drawn),
        "numpy": drawn,
        "bool": torch.from_numpy(drawn > 0),
        "float": drawn / 255,
        "large": np.kron(drawn, np.ones((2, 2), np.uint8)),
    }[kind]
    mask = region_mask(region, 6, 12, "mask")
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), drawn > 0)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((0, 0, 17, 8), "inside the picture of 16 x 8"),
        ((4, 4, 4, 8), "x0 < x1"),
        ((-1, 0, 4, 4), "inside the picture"),
        ((0.0, 0.0, 1.5, 1.0), "fractions"),
        (np.zeros((8, 16)), "empty mask"),
        (np.ones((8, 15)), "aspect ratio"),
        (np.ones((2, 8, 16)), "two dimensions"),
        (np.full((8, 16), 3.0), "values from 3"),
        (np.full((8, 16), np.nan), "values from nan"),
        (Image.new("I;16", (16, 8), 65535), "the region has pixels of mode 'I;16'; expected 8 bits"),
        (Image.new("F", (16, 8), 1), "mode 'F'"),
        ("mask.png", "the region is a str; expected a box"),
        (None, "is a NoneType; expected a box"),
        ({}, "is a dict; expected a box"),
        ([[1, 0], [1]], "is a list; expected a box"),
        (np.array(["a", "b"]), "is a ndarray; expected a box"),
        ((True, False, True, True), "two dimensions"),
        (torch.tensor([0, 0, 17, 8]), "is the box .0, 0, 17, 8.; .* inside the picture"),
    ],
)
def test_a_region_that_makes_no_sense_is_refused(region, message):
    with pytest.raises(SettingsError, match=message):
        region_mask(region, 8, 16, "the region")


def test_a_token_counts_when_more_than_half_is_covered():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:6, 2:5] = True
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1] = True
    assert torch.equal(token_mask(mask, 4, 4), expected)


def test_a_small_mask_keeps_one_token():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[9, 13] = True
    tokens = token_mask(mask, 4, 4)
    assert tokens.sum() == 1 and tokens[2, 3]
    assert not token_mask(torch.zeros(16, 16, dtype=torch.bool), 4, 4).any()
