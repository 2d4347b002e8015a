"""Words of prompts become token indices, and boxes and masks become grids of tokens; what makes no sense is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from attnproc.control.masks import bounding_box, region_mask, token_mask
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
