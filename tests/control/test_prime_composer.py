"""The maths of PrimeComposer against its plain definition and the worked examples of its specification."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from attnproc.control.prime_composer import (
    CrossAttnProcessor,
    PrimeComposerSettings,
    SelfAttnProcessor,
    Steering,
    correlations,
    guided,
    infused_attention,
    steps_of,
    text_mask,
)
from attnproc.control.prime_composer_geometry import Placement, check_cells, pasted, place
from attnproc.control.unet import attention_layers, processors_replaced
from attnproc.errors import AttnProcError, AttnProcWarning, SettingsError

OBJECT = [1, 3]


@pytest.fixture(autouse=True)
def seed():
    seed = torch.seed() % 2**32
    print(f"seed {seed}")  # shown where a test fails
    torch.manual_seed(seed)
    return seed


def dense(scores, value, logits, subject):
    """The definition: columns replaced, then rows, softmax over every key; float64."""
    scores = scores.double().clone()
    scores[..., :, subject] = logits.double()
    scores[..., subject, :] = logits.double().mT
    return scores.softmax(-1) @ value.double()


# -- worked examples ---------------------------------------------------------------------------------------------------

TOY_SCORES = torch.tensor([[0, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7], [0.8, 0.9, 1, 1.1], [1.2, 1.3, 1.4, 1.5]])
TOY_LOGITS = torch.tensor([[1.0, -1], [0.5, 2], [0, 0], [-2, 3]])
TOY_VALUE = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1]])
TOY_OUT = [[0.557160, 0.672965], [0.724956, 0.456785], [1.0, 0.391468], [1.440201, -0.405530]]


def test_infusion_toy():
    # With the identity as keys and scale 1/2, queries of twice the scores give those scores.
    query, key = 2 * TOY_SCORES, torch.eye(4)
    value = torch.cat([TOY_VALUE, torch.zeros(4, 2)], 1)
    subject, rest = torch.tensor(OBJECT), torch.tensor([0, 2])
    out = infused_attention(
        query[None, None], key[None, None], value[None, None], TOY_LOGITS[None, None], subject, rest
    )
    torch.testing.assert_close(out[0, 0, :, :2], torch.tensor(TOY_OUT), atol=2e-6, rtol=0)
    torch.testing.assert_close(dense(TOY_SCORES, TOY_VALUE, TOY_LOGITS, OBJECT).float(), out[0, 0, :, :2])


def test_region_constrained_toy():
    logits = torch.tensor([[0.2, 0.1, 1], [0, 0.5, 2], [0.3, 0.3, 0.3], [1, 0, 1.5]])
    inside = torch.tensor([False, True, False, True])
    allowed = text_mask(inside, (2,), 3)
    probabilities = logits.masked_fill(~allowed[0, 0], -math.inf).softmax(-1)
    wanted = [[0.524979, 0.475021, 0], [0.099624, 0.164252, 0.736125], [0.5, 0.5, 0], [0.331499, 0.121952, 0.546549]]
    torch.testing.assert_close(probabilities, torch.tensor(wanted), atol=2e-6, rtol=0)


@pytest.mark.parametrize("words", [1, 3])
def test_outside_queries_share_their_attention_among_the_other_words(words):
    text, inside = 77, torch.tensor([False, True])
    value = torch.eye(text)
    allowed = text_mask(inside, tuple(range(4, 4 + words)), text)
    zeros = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, text, 8)
    weights = F.scaled_dot_product_attention(*zeros, value[None, None], attn_mask=allowed)[0, 0]
    assert weights[0, 4 : 4 + words].eq(0).all()
    torch.testing.assert_close(weights[0, :4], torch.full((4,), 1 / (text - words)))
    torch.testing.assert_close(weights[1], torch.full((text,), 1 / text))


@pytest.mark.parametrize(("extended", "wanted"), [(0.0, [0.9, -0.8]), (2.0, [1.1, -1.4]), (0.5, [0.95, -0.95])])
def test_guidance_toy(extended, wanted):
    uncond, cond, infused = torch.tensor([[0.1, 0.2], [0.4, 0.0], [0.5, -0.3]])
    torch.testing.assert_close(guided(uncond, infused, cond, 2.0, extended), torch.tensor(wanted))


def test_without_unconditional_row_the_infused_prediction_stands_alone():
    infused, cond = torch.tensor([0.5]), torch.tensor([0.4])
    assert guided(None, infused, cond, 1.0, 0.0) == infused
    torch.testing.assert_close(guided(None, infused, cond, 1.0, 2.0), torch.tensor([0.7]))


SCHEDULES = [  # steps, order, tau_a, tau_b, tau_c; infused, pasted, blended
    (20, 2, 0.3, 0.8, 0.1, range(5), (), range(2, 15)),
    (20, 2, 0.4, 0.8, 0.2, range(7), (2,), range(3, 15)),
    (20, 2, 0.6, 0.8, 0.3, range(11), (2, 3, 4), range(5, 15)),
    (10, 1, 0.5, 0.8, 0.2, range(5), (1,), range(2, 8)),
    (50, 2, 0.58, 0.8, 0.0, range(28), (), range(2, 39)),
    (20, 2, 0.0, 0.0, 0.0, range(2), (), ()),
    (20, 2, 1.0, 1.0, 1.0, range(19), range(2, 19), ()),
]


@pytest.mark.parametrize(("steps", "order", "a", "b", "c", "infused", "pasted_at", "blended"), SCHEDULES)
def test_schedule_of_the_release(steps, order, a, b, c, infused, pasted_at, blended):
    plan = steps_of(PrimeComposerSettings(tau_a=a, tau_b=b, tau_c=c, schedule="release"), steps, order)
    assert [k for k, step in enumerate(plan) if step.infuse] == list(infused)
    assert [k for k, step in enumerate(plan) if step.before == "paste"] == list(pasted_at)
    assert [k for k, step in enumerate(plan) if step.before == "blend"] == list(blended)


@pytest.mark.parametrize(("steps", "order", "a", "b", "c", "infused", "pasted_at", "blended"), SCHEDULES)
def test_full_schedule_blends_before_the_second_evaluation_too(steps, order, a, b, c, infused, pasted_at, blended):
    settings = {"tau_a": a, "tau_b": b, "tau_c": c}
    release = steps_of(PrimeComposerSettings(**settings, schedule="release"), steps, order)
    full = steps_of(PrimeComposerSettings(**settings), steps, order)
    changed = [k for k in range(steps) if full[k] != release[k]]
    assert changed == ([1] if order == 2 and b > 0 else [])
    assert all(full[k].before == "blend" for k in changed)


# -- infused attention -------------------------------------------------------------------------------------------------

SHAPES = [(1, 2, 16, 5, 8), (2, 1, 35, 1, 16), (1, 3, 130, 77, 5), (2, 2, 24, 24, 8)]  # B, H, N, m, D


@pytest.mark.parametrize(("batch", "heads", "count", "size", "dim"), SHAPES)
def test_merged_infusion_equals_the_dense_definition(batch, heads, count, size, dim):
    query, key, value = (torch.randn(batch, heads, count, dim) for _ in range(3))
    logits = 3 * torch.randn(batch, heads, count, size)
    order = torch.randperm(count)
    subject, rest = order[:size].sort().values, order[size:].sort().values
    wanted = dense(query.double() @ key.double().mT / dim**0.5, value, logits, subject)
    out = infused_attention(query, key, value, logits, subject, rest)
    assert (out - wanted).abs().max() < 3e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_safe_with_large_logits(dtype, tolerance):
    query, key, value = (torch.randn(1, 2, 40, 8, dtype=dtype) for _ in range(3))
    subject, rest = torch.arange(10, 17), torch.cat([torch.arange(10), torch.arange(17, 40)])
    logits = 200 * torch.randn(1, 2, 40, 7)
    wanted = dense(query.double() @ key.double().mT / 8**0.5, value, logits, subject)
    out = infused_attention(query, key, value, logits, subject, rest)
    assert out.dtype == dtype
    assert (out.double() - wanted).abs().max() < tolerance


def test_own_logits_change_nothing_for_other_queries():
    query, key, value = (torch.randn(1, 2, 30, 8) for _ in range(3))
    subject, rest = torch.arange(4, 9), torch.cat([torch.arange(4), torch.arange(9, 30)])
    logits = correlations(query, key[:, :, subject])
    out = infused_attention(query, key, value, logits, subject, rest)
    plain = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out[:, :, rest], plain[:, :, rest])
    assert not torch.allclose(out[:, :, subject], plain[:, :, subject])


def test_values_are_never_replaced():
    query, key = torch.randn(2, 1, 2, 30, 8).unbind(0)
    subject, rest = torch.arange(4, 9), torch.cat([torch.arange(4), torch.arange(9, 30)])
    out = infused_attention(query, key, torch.ones(1, 2, 30, 8), torch.randn(1, 2, 30, 5), subject, rest)
    torch.testing.assert_close(out, torch.ones(1, 2, 30, 8))


# -- processors in a U-Net ---------------------------------------------------------------------------------------------

CROSS_LENGTH = 40


def placement(size=128, box=(35, 20, 101, 90)):
    silhouette = torch.zeros(size, size, dtype=torch.bool)
    silhouette[box[1] + 2 : box[3] - 5, box[0] + 3 : box[2] - 4] = True
    return Placement(silhouette, box)


@pytest.fixture(params=["sd1", "sd2"])
def unet(request, make_pipe):
    return make_pipe(request.param).unet


@pytest.fixture
def run(unet):
    """run(steering, rows, latents, text): the U-Net's output with or without the processors."""

    def call(steering, rows, latents, text):
        with torch.no_grad():
            if steering is None:
                return unet(latents, torch.tensor(500), text)[0]
            steering.rows = rows
            with processors_replaced(unet, steering.processors(unet)):
                return unet(latents, torch.tensor(500), text)[0]

    return call


@pytest.fixture
def batch():
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(3, CROSS_LENGTH, 16)
    return latents.expand(3, -1, -1, -1), text


def captured(run, steering, batch):
    composite, canvas = torch.randn(2, 4, 16, 16).split(1)
    run(steering, ("composite", "canvas"), torch.cat([composite, canvas]), batch[1][1:2].expand(2, -1, -1))
    return steering


def test_plain_processors_equal_the_stock_ones(run, batch):
    plain = run(Steering(placement(), (16, 16)), (), *batch)
    torch.testing.assert_close(plain, run(None, (), *batch), atol=1e-6, rtol=0)


def test_without_object_cells_infusion_changes_nothing(run, batch):
    steering = captured(run, Steering(placement(box=(60, 60, 68, 68)), (16, 16)), batch)
    assert not steering.logits
    rows = ("uncond", "infused", "cond")
    assert torch.equal(run(steering, rows, *batch), run(Steering(placement(), (16, 16)), (), *batch))


@pytest.mark.parametrize("cd_query", ["composite", "object"])
def test_infusion_and_word_regions_leave_the_unconditional_row_alone(run, batch, cd_query):
    stock = run(Steering(placement(), (16, 16)), (), *batch)
    steering = captured(run, Steering(placement(), (16, 16), (3, 4), cd_query), batch)
    assert steering.logits
    out = run(steering, ("uncond", "infused", "cond"), *batch)
    assert torch.equal(out[0], stock[0])
    assert not torch.allclose(out[1], stock[1], atol=1e-6)
    assert not torch.allclose(out[2], stock[2], atol=1e-6)  # by the region of the words alone


def test_word_regions_leave_the_row_alone_without_subject(run, batch):
    steering = captured(run, Steering(placement(), (16, 16)), batch)
    stock = run(Steering(placement(), (16, 16)), (), *batch)
    out = run(steering, ("uncond", "infused", "cond"), *batch)
    assert torch.equal(out[2], stock[2])
    assert not torch.allclose(out[1], stock[1], atol=1e-6)


def test_every_layer_whose_grid_has_object_cells_is_captured(run, batch, unet):
    steering = captured(run, Steering(placement(), (16, 16)), batch)
    assert set(attention_layers(unet, "attn1")) - set(steering.logits) == {
        "mid_block.attentions.0.transformer_blocks.0.attn1"  # 2 x 2 cells, none of them half covered
    }
    for logits in steering.logits.values():
        tokens = steering.tokens(logits.shape[2], logits.device)
        assert logits.shape[3] == len(tokens.subject) and logits.dtype == torch.float32


def test_cell_lists_are_row_major_and_complete():
    steering = Steering(placement(), (16, 16))
    for count in (256, 64, 16):
        tokens = steering.tokens(count, torch.device("cpu"))
        assert torch.equal(torch.cat([tokens.subject, tokens.rest]).sort().values, torch.arange(count))
        assert (tokens.subject.diff() > 0).all()
        assert set(tokens.subject.tolist()) <= set(tokens.box.tolist())


def test_first_layer_captures_its_own_scores(unet, run):
    """Both streams alike, the first layer's L are columns of its own scores; later layers saw object keys only."""
    steering = Steering(placement(), (16, 16))
    latents, text = torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1), torch.randn(1, CROSS_LENGTH, 16).expand(2, -1, -1)
    first, *_, last = attention_layers(unet, "attn1")
    seen = {}

    def watch(name):
        def note(module, given, named):
            hidden = (*given, *named.values())[0]
            heads = [to(hidden).unflatten(2, (module.heads, -1)).transpose(1, 2) for to in (module.to_q, module.to_k)]
            seen[name] = correlations(*heads)

        return unet.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)

    hooks = [watch(name) for name in (first, last)]
    try:
        run(steering, ("composite", "canvas"), latents, text)
        run(None, (), latents, text)
    finally:
        for hook in hooks:
            hook.remove()
    for name, equal in ((first, True), (last, False)):
        subject = steering.tokens(seen[name].shape[2], latents.device).subject
        difference = (steering.logits[name] - seen[name][:1, ..., subject]).abs().max()
        assert (difference < 1e-6) == equal


@pytest.mark.parametrize("cd_query", ["composite", "object"])
def test_captured_rows_come_from_the_stream_that_asks(run, batch, unet, cd_query):
    """Another composite changes L of the first layer exactly when the composite asks; another canvas always does."""
    first = next(iter(attention_layers(unet, "attn1")))
    composite, canvas, other = torch.randn(3, 4, 16, 16).split(1)
    text = batch[1][:1].expand(2, -1, -1)

    def logits(*streams):
        steering = Steering(placement(), (16, 16), (), cd_query)
        run(steering, ("composite", "canvas"), torch.cat(streams), text)
        return steering.logits[first]

    base = logits(composite, canvas)
    assert torch.allclose(base, logits(other, canvas), atol=1e-6) == (cd_query == "object")
    assert not torch.allclose(base, logits(composite, other), atol=1e-6)


def test_scores_that_are_not_finite_name_their_layer(run, batch):
    latents = torch.full((2, 4, 16, 16), torch.nan)
    with pytest.raises(AttnProcError, match=r"down_blocks\.0.*attn1.*bfloat16 or float32"):
        run(Steering(placement(), (16, 16)), ("composite", "canvas"), latents, batch[1][:2])


def test_processors_are_the_two_kinds_on_every_layer(unet):
    processors = Steering(placement(), (16, 16)).processors(unet)
    assert [name for name, p in processors.items() if isinstance(p, SelfAttnProcessor)] == list(
        attention_layers(unet, "attn1")
    )
    assert [name for name, p in processors.items() if isinstance(p, CrossAttnProcessor)] == list(
        attention_layers(unet, "attn2")
    )


# -- geometry ----------------------------------------------------------------------------------------------------------


def picture(width=60, height=40, colour=(200, 30, 30)):
    return Image.new("RGB", (width, height), colour)


def silhouette(width=60, height=40, box=(10, 5, 50, 35)):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_object_fits_its_box_centred_with_its_aspect():
    placed, canvas = place(picture(), silhouette(), (20, 30, 100, 110), (128, 128), 128, 128)
    ys, xs = placed.silhouette.nonzero().unbind(1)
    assert (xs.min(), xs.max() + 1, ys.min(), ys.max() + 1) == (20, 100, 40, 100)  # 40 x 30 pixels in 80 x 80
    assert placed.box == (20, 30, 100, 110)
    assert canvas.getpixel((60, 70)) == (200, 30, 30) and canvas.getpixel((60, 35)) == (0, 0, 0)


def test_paste_changes_the_object_alone():
    placed, canvas = place(picture(), silhouette(), (20, 30, 100, 110), (128, 128), 128, 128)
    ground = Image.effect_noise((128, 128), 80).convert("RGB")
    result = pasted(ground, canvas, placed)
    inside = torch.tensor(list(result.getdata())).view(128, 128, 3).eq(torch.tensor([200, 30, 30])).all(-1)
    before, after = (torch.tensor(list(p.getdata())).view(128, 128, 3) for p in (ground, result))
    assert inside[placed.silhouette].all()
    assert torch.equal(before[~placed.silhouette], after[~placed.silhouette])


@pytest.mark.parametrize(
    ("target", "box"),
    [
        ((16, 24, 64, 56), (32, 48, 128, 112)),  # pixels of a background half as large
        ((0.25, 0.375, 1.0, 0.875), (32, 48, 128, 112)),
        (silhouette(64, 64, (16, 24, 64, 56)), (32, 48, 128, 112)),
        (silhouette(64, 64, (16, 24, 64, 56)).numpy(), (32, 48, 128, 112)),
    ],
    ids=["pixels", "fractions", "tensor", "array"],
)
def test_target_is_read_in_the_background_as_it_came(target, box):
    placed, _ = place(picture(), silhouette(), target, (64, 64), 128, 128)
    assert placed.box == box


def test_box_over_the_border_is_cut_with_its_object():
    with pytest.warns(AttnProcWarning, match="cut at the border"):
        placed, canvas = place(picture(), silhouette(), (-40, 64, 40, 124), (128, 128), 128, 128)
    assert placed.box == (0, 64, 40, 124)
    xs = placed.silhouette.nonzero()[:, 1]
    assert (xs.min(), xs.max()) == (0, 39)
    assert canvas.size == (128, 128)


def test_largest_part_of_a_target_mask_is_taken():
    target = silhouette(64, 64, (16, 24, 60, 56))
    target[2:10, 2:10] = True
    with pytest.warns(AttnProcWarning, match="several parts"):
        placed, _ = place(picture(), silhouette(), target, (64, 64), 128, 128)
    assert placed.box == (32, 48, 120, 112)


def test_mask_of_another_size_and_soft_values_is_cut_at_one_half():
    soft = silhouette(120, 80, (20, 10, 100, 70)).float() * 0.6 + 0.1
    hard, _ = place(picture(), silhouette(), (0.2, 0.2, 0.8, 0.8), (128, 128), 128, 128)
    placed, _ = place(picture(), soft, (0.2, 0.2, 0.8, 0.8), (128, 128), 128, 128)
    assert torch.equal(placed.silhouette, hard.silhouette)


BAD_PLACES = {
    "empty object mask": (torch.zeros(40, 60), (8, 8, 80, 80), "empty mask"),
    "object mask over everything": (torch.ones(40, 60), (8, 8, 80, 80), "covers the whole object picture"),
    "object mask of another shape": (torch.ones(40, 40), (8, 8, 80, 80), "aspect ratio"),
    "box outside": (silhouette(), (130, 8, 180, 80), "inside the picture"),
    "box turned round": (silhouette(), (80, 8, 20, 80), "x0 < x1"),
    "box larger than the picture": (silhouette(), (-8, 8, 140, 80), "larger than the picture"),
    "box of mixed numbers": (silhouette(), (8.0, 8, 80, 80), "all four in one way"),
    "box of nothing": (silhouette(), (math.nan, 8, 80, 80), "finite"),
    "empty target mask": (silhouette(), torch.zeros(128, 128), "empty mask"),
    "target mask of another shape": (silhouette(), torch.ones(128, 64), "aspect ratio"),
    "box over everything": (silhouette(), (0, 0, 128, 128), "whole picture"),
    "box of one cell": (silhouette(), (8, 8, 16, 80), "2 x 2"),
    "object too small": (silhouette(60, 40, (10, 5, 12, 35)), (9, 9, 30, 20), "object too small"),
}


@pytest.mark.parametrize(("mask", "target", "message"), BAD_PLACES.values(), ids=BAD_PLACES)
def test_bad_places_are_refused(mask, target, message):
    with pytest.raises(SettingsError, match=message):
        placed, _ = place(picture(), mask, target, (128, 128), 128, 128)
        check_cells(placed, 16, 16)


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (8, 12), (3, 5), (1, 1)])
def test_object_cells_lie_in_the_box_cells_on_every_grid(rows, columns):
    mask = silhouette(192, 128, (33, 21, 150, 90))
    placed = Placement(mask, (31, 20, 151, 92))
    assert not (placed.object_cells(rows, columns) & ~placed.box_cells(rows, columns)).any()


BAD_SETTINGS = [
    {"tau_a": -0.1},
    {"tau_b": 1.1},
    {"tau_c": math.nan},
    {"tau_a": True},
    {"tau_b": 0.2, "tau_c": 0.3},
    {"extended_guidance": -1},
    {"cd_query": "both"},
    {"schedule": "ours"},
    {"solver": "euler"},
    {"blend_last": 1},
    {"inversion_prompt": 7788},
]


@pytest.mark.parametrize("fields", BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused(fields):
    with pytest.raises(SettingsError, match="expected"):
        PrimeComposerSettings(**fields)


def test_presets_are_the_published_ones_and_can_be_changed():
    assert PrimeComposerSettings.from_preset("sketch") == PrimeComposerSettings(tau_a=0.6, tau_c=0.3)
    assert PrimeComposerSettings.from_preset("photo") == PrimeComposerSettings()
    assert PrimeComposerSettings.from_preset("cartoon", tau_b=0.8).tau_b == 0.8
    with pytest.raises(SettingsError, match="photo, painting, sketch, cartoon"):
        PrimeComposerSettings.from_preset("film")
