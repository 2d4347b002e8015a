"""A-STAR's maths: the worked examples of its specification, and what must hold for any maps."""

import math
import random
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from attnproc.control.a_star import AStarSettings, capped, minmax, pair, smooth
from attnproc.control.a_star_controller import AStarController
from attnproc.errors import AttnProcWarning, SettingsError

PLAIN = {"smoothing": False, "max_rel_step": None}
FIXED = {**PLAIN, "scale_factor": 1.0, "scale_range": (1.0, 1.0)}


@pytest.fixture(autouse=True)
def seed():
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def grid(text):
    """Rows parted by |, as in the specification."""
    return torch.tensor([[float(v) for v in row.split()] for row in text.split("|")], dtype=torch.float64)


A0 = grid(".8 .6 .1 0 | .7 .9 .2 .1 | .1 .2 .1 0 | 0 .1 0 0")
B0 = grid(".1 .2 .3 .2 | .2 .5 .7 .45 | .1 .35 .8 .6 | 0 .1 .3 .2")
A1 = grid(".4 .5 .3 .1 | .3 .6 .4 .2 | .1 .2 .3 .1 | 0 .1 .1 0")
B1 = grid("0 .1 .2 .1 | .1 .3 .5 .4 | .1 .3 .9 .7 | 0 .1 .4 .5")
MASK_A, MASK_B = grid("1 1 0 0|1 1 0 0|0 0 0 0|0 0 0 0"), grid("0 0 0 0|0 1 1 1|0 0 1 1|0 0 0 0")


def bits(text):
    return torch.tensor([[digit == "1" for digit in row] for row in text.split("|")])


def tokens(*maps):
    """Attention (1, rows, columns, tokens): token 0 gets nothing, then one map for each token."""
    return torch.stack([torch.zeros_like(maps[0]), *maps], -1)[None]


def controller(count=2, size=(4, 4), **settings):
    concepts = [[(k + 1,) for k in range(count)]]
    return AStarController(concepts, AStarSettings(**{**PLAIN, **settings}), size, count + 1)


def feed(control, *attentions, steps=50):
    """Runs one step per attention, whatever the latents, and returns the log."""
    for number, attention in enumerate(attentions, len(control.log)):
        latents = torch.zeros(len(attention), 4, 2, 2, dtype=torch.float64)
        control.update(latents, number, steps, lambda z, a=attention: nullcontext(a + 0 * z.sum()))
    return control.log


# -- section 9: toy maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("map_norm", "first", "second", "retained"),
    [
        ("none", 0.211111, 0.273809, (0.766234, 0.711340)),
        ("minmax", 0.210117, 0.278049, (0.704918, 0.695652)),
    ],
)
def test_toy_maps_give_the_worked_losses_and_masks(map_norm, first, second, retained):
    control = controller(map_norm=map_norm)
    (start,) = feed(control, tokens(A0, B0))
    assert start.segregation[0] == pytest.approx(first, abs=6e-7)
    assert start.retention == (0.0,) and all(math.isnan(v) for v in start.concepts[0])
    assert torch.equal(control._masks[0], torch.stack([MASK_A, MASK_B]).bool())
    _, then = feed(control, tokens(A1, B1))
    assert then.segregation[0] == pytest.approx(second, abs=6e-7)
    assert then.concepts[0] == pytest.approx(retained, abs=6e-7)
    assert then.loss[0] == pytest.approx(second + sum(retained), abs=1.5e-6)
    assert then.pairs == ((then.segregation[0],),)
    assert then.peaks[0] == pytest.approx((0.6, 0.9))


def test_toy_maps_stretched_have_the_worked_sums():
    for a, b, sums in ((A0, B0, (4.333333, 6.375, 2.25)), (A1, B1, (6.166667, 5.222222, 3.166667))):
        (a, _), (b, _) = minmax(a), minmax(b)
        assert [float(v.sum()) for v in (a, b, torch.minimum(a, b))] == pytest.approx(sums, abs=6e-7)


def test_raw_gradients_are_the_worked_ones():
    a = A1.clone().requires_grad_()
    pair(a, B1).backward()
    assert [a.grad[p].item() for p in ((0, 0), (2, 2), (2, 0))] == pytest.approx(
        [-0.032596, 0.086451, 0.026927], abs=6e-7
    )
    a.grad = None
    (1 - pair(a, MASK_A)).backward()
    assert [a.grad[p].item() for p in ((0, 0), (2, 2))] == pytest.approx([-0.099511, 0.030359], abs=6e-7)


def test_smoothing_is_the_attend_and_excite_kernel():
    impulse = torch.zeros(2, 4, 4, dtype=torch.float64)
    impulse[0, 1, 1] = impulse[1, 0, 0] = 1
    smoothed = smooth(impulse)
    assert smoothed[0, 0].tolist() == pytest.approx([0.179677, 0.244206, 0.089838, 0], abs=6e-7)
    assert float(smoothed[1].sum()) == pytest.approx(0.6210, abs=6e-5)  # mass is lost in a corner


# -- section 9: a model in closed form ---------------------------------------------------------------------------------

KEYS = torch.tensor([(0, 0), (1, 0), (0, 1)], dtype=torch.float64)


def closed_form(latents):
    """Attention of three tokens, (batch, 4, 4, 3), from latents (batch, 2, 4, 4)."""
    return nullcontext((2 * torch.einsum("kc,bcij->bijk", KEYS, latents)).softmax(-1))


def closed_form_latents():
    c, i, j = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(4), indexing="ij")
    return torch.sin(1.0 + 16 * c + 4 * i + j).double()[None]


def segregation_after(control, latents):
    """L_seg, with normalisers of its own."""
    with closed_form(latents) as attention:
        return control._losses(control._maps(attention)).segregation.item()


@pytest.mark.parametrize(
    ("map_norm", "first", "second"),
    [
        ("none", (0.111510, 0.073708, 0.106162), (1.207931, 1.314093, 0.134330, 1.296556)),
        ("minmax", (0.094274, 0.076377, 0.088756), (1.138208, 1.226964, 0.140161, 1.208811)),
    ],
)
def test_closed_form_model_gives_the_worked_steps(map_norm, first, second):
    control = controller(map_norm=map_norm, **FIXED)
    z0 = closed_form_latents()
    z1 = control.update(z0, 0, 50, closed_form)
    loss, gradient, after = first
    assert control.log[0].loss[0] == pytest.approx(loss, abs=6e-7)
    assert (z0 - z1).norm().item() == pytest.approx(gradient, abs=6e-7)
    assert segregation_after(control, z1) == pytest.approx(after, abs=6e-7)
    assert torch.equal(control._masks[0, 0], bits("1100|0011|1000|1110"))
    assert torch.equal(control._masks[0, 1], bits("0001|1000|0111|0001"))
    masks, masked = control._masks, control._masked
    z2 = control.update(z1, 1, 50, closed_form)
    retention, loss, gradient, after = second
    assert control.log[1].retention[0] == pytest.approx(retention, abs=6e-7)
    assert control.log[1].loss[0] == pytest.approx(loss, abs=6e-7)
    assert (z1 - z2).norm().item() == pytest.approx(gradient, abs=6e-7)
    control._masks, control._masked = masks, masked  # the loss of this step, after its update
    with closed_form(z2) as attention:
        assert control._losses(control._maps(attention)).total.item() == pytest.approx(after, abs=6e-7)


@pytest.mark.parametrize(("map_norm", "start", "end"), [("none", 0.111510, 0.050975), ("minmax", 0.094274, 0.034831)])
def test_segregation_falls_at_each_of_twenty_updates(map_norm, start, end):
    control = controller(map_norm=map_norm, lambda_ret=0.0, **FIXED)
    latents = closed_form_latents()
    values = [segregation_after(control, latents)]
    for step in range(20):
        latents = control.update(latents, step, 50, closed_form)
        values.append(segregation_after(control, latents))
    assert all(later < earlier for earlier, later in pairwise(values))
    assert (values[0], values[-1]) == pytest.approx((start, end), abs=6e-7)


@pytest.mark.parametrize(("map_norm", "end"), [("none", 0.343374), ("minmax", 0.347995)])
def test_a_layout_mask_draws_attention_in_at_each_of_twenty_updates(map_norm, end):
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[:2, :2] = True
    settings = AStarSettings(**FIXED, map_norm=map_norm, lambda_seg=0.0)
    control = AStarController([[(1,)]], settings, (4, 4), 3, layout=[[corner]])

    def inside(latents):
        with closed_form(latents) as attention:
            return (attention[0, ..., 1][corner].sum() / attention[0, ..., 1].sum()).item()

    latents = closed_form_latents()
    shares = [inside(latents)]
    for step in range(20):
        latents = control.update(latents, step, 50, closed_form)
        shares.append(inside(latents))
    assert all(later > earlier for earlier, later in pairwise(shares))
    assert (shares[0], shares[-1]) == pytest.approx((0.271572, end), abs=6e-7)
    assert torch.equal(control._masks[0, 0], corner)  # never replaced


# -- what holds for any maps -------------------------------------------------------------------------------------------


def some_maps(count, size=(5, 7)):
    return torch.rand(count, *size, dtype=torch.float64)


def test_pair_is_symmetric_and_between_disjoint_and_equal():
    a, b = some_maps(2)
    assert 0 <= pair(a, b) <= 0.5 and pair(a, b) == pair(b, a)
    assert pair(a, a).item() == pytest.approx(0.5, abs=1e-6)
    half = torch.arange(7) < 3
    assert pair(a * half, b * ~half) == 0
    mask = (b > 0.5).double()
    assert 0.5 <= 1 - pair(a, mask) <= 1


def test_concept_order_does_not_matter():
    maps = some_maps(3, (4, 4))
    one, other = controller(3), controller(3)
    feed(one, tokens(*maps), tokens(*maps.flip(-1)))
    feed(other, tokens(*maps.flip(0)), tokens(*maps.flip(0).flip(-1)))
    for a, b in zip(one.log, other.log, strict=True):
        assert a.loss == pytest.approx(b.loss) and a.concepts[0] == pytest.approx(b.concepts[0][::-1], nan_ok=True)


def test_raw_overlap_ignores_a_common_scale_and_minmax_any_line():
    a, b = some_maps(2)
    scale = 10 ** random.uniform(-1, 1)
    assert pair(scale * a, scale * b).item() == pytest.approx(pair(a, b).item(), abs=1e-5)
    stretched, _ = minmax(a)
    torch.testing.assert_close(minmax(scale * a + random.uniform(-1, 1))[0], stretched)


def closed_form_gradient(a, b):
    """dpair/da, with half the minimum's share at ties."""
    total, overlap = (a + b).sum() + 1e-6, torch.minimum(a, b).sum()
    share = torch.where(a < b, 1.0, torch.where(a > b, 0.0, 0.5)).double()
    return (share * total - overlap) / total**2


@pytest.mark.parametrize("other", ["map", "mask"])
def test_autograd_is_the_closed_form_and_the_central_difference(other):
    raw, b = some_maps(2)
    b = b if other == "map" else (b > 0.5).double()
    low, high = raw.min(), raw.max()
    leaf = raw.clone().requires_grad_()
    pair(minmax(leaf)[0], b).backward()
    expected = closed_form_gradient((raw - low) / (high - low), b) / (high - low)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12)
    step = 1e-6
    for _ in range(5):
        place = random.randrange(raw.numel())
        nudge = torch.zeros_like(raw)
        nudge.view(-1)[place] = step
        up, down = (pair((raw + sign * nudge - low) / (high - low), b) for sign in (1, -1))
        assert ((up - down) / (2 * step)).item() == pytest.approx(leaf.grad.view(-1)[place].item(), rel=1e-5, abs=1e-9)


def test_one_concept_is_left_alone_at_first_and_kept_later():
    control = controller(1, **FIXED)
    attend = lambda z: nullcontext(2 * z.sum(1)[..., None].sigmoid().expand(-1, -1, -1, 2))  # noqa: E731
    latents = closed_form_latents()
    first = control.update(latents, 0, 50, attend)
    assert torch.equal(first, latents) and control.log[0].segregation == (0.0,)
    assert not torch.equal(control.update(first, 1, 50, attend), first)


def test_masks_are_those_of_the_step_before_and_flat_maps_leave_none():
    maps = [some_maps(2, (4, 4)) for _ in range(4)]
    maps[1][0] = 0.25  # the first concept's map is flat at step 1
    log = feed(controller(), *(tokens(*pair_of_maps) for pair_of_maps in maps))
    stretched = [minmax(m)[0] for m in maps]
    masks = [(m >= 0.5).double() for m in stretched]

    def retained(step, concept):
        return 1 - pair(stretched[step][concept], masks[step - 1][concept]).item()

    nan = math.nan
    expected = [(nan, nan), (nan, retained(1, 1)), (nan, retained(2, 1)), (retained(3, 0), retained(3, 1))]
    for step, terms in enumerate(expected):
        assert log[step].concepts[0] == pytest.approx(terms, nan_ok=True)
        assert log[step].retention[0] == pytest.approx(sum(t for t in terms if t == t))
    assert log[1].segregation == (0.0,) and math.isnan(log[1].pairs[0][0])
    assert log[2].segregation[0] == pytest.approx(pair(*stretched[2]).item())


def test_flat_maps_count_in_the_losses_as_they_are_but_leave_no_mask():
    flat, other = torch.full((4, 4), 0.25, dtype=torch.float64), some_maps(1, (4, 4))[0]
    log = feed(controller(map_norm="none"), *[tokens(flat, other)] * 2)
    assert log[1].segregation[0] == pytest.approx(pair(flat, other).item())
    assert math.isnan(log[1].concepts[0][0]) and not math.isnan(log[1].concepts[0][1])


def test_a_weak_concept_gets_stronger_with_minmax_and_weaker_without():
    # Section 3.2: the derivative of the loss by the log of B's strength, its normaliser frozen.
    changes = {}
    for map_norm in ("none", "minmax"):
        strength = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        a, b = tokens(A1, B1)[..., 1][0], B1 * strength
        if map_norm == "minmax":
            a, b = minmax(a)[0], minmax(b)[0]
        loss = pair(a, b) + 1 - pair(b, MASK_B)
        loss.backward()
        changes[map_norm] = strength.grad.item() * 0.1
    assert changes["none"] == pytest.approx(0.0426, abs=6e-5)
    assert changes["minmax"] == pytest.approx(-0.0518, abs=6e-5)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "steps", "alpha"), [(0, 50, 20), (10, 50, 18.952142), (24, 50, 17.379322), (49, 50, 14.142136), (0, 1, 20)]
)
def test_step_sizes_fall_under_a_square_root(step, steps, alpha):
    assert AStarSettings().step_size(step, steps) == pytest.approx(alpha, abs=6e-7)


@pytest.mark.parametrize(
    ("window", "steps", "updated"),
    [
        ((0.0, 1.0), 3, [0, 1, 2]),
        ((0.0, 0.5), 5, [0, 1, 2]),
        ((0.3, 0.7), 10, [3, 4, 5, 6]),
        ((0.5, 0.5), 10, []),
        ((0.0, 0.1), 1, [0]),
    ],
)
def test_fractions_of_the_steps_are_rounded_up(window, steps, updated):
    settings = AStarSettings(update_window=window)
    assert [step for step in range(steps) if settings.updates(step, steps)] == updated


def test_outside_the_window_nothing_is_captured():
    control = controller(update_window=(0.5, 1.0))

    def never(latents):
        raise AssertionError("captured")

    latents = closed_form_latents()
    assert control.update(latents, 0, 4, never) is latents and not control.log


def test_a_step_is_at_most_a_share_of_the_latents():
    latents, step = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    step[1] *= 1e-3
    rms = lambda x: x.square().mean((1, 2, 3)).sqrt()  # noqa: E731
    cut = capped(step, latents, 0.25)
    assert rms(cut)[0].item() == pytest.approx(0.25 * rms(latents)[0].item())
    torch.testing.assert_close(cut[0] / cut[0].norm(), step[0] / step[0].norm())
    assert torch.equal(cut[1], step[1])  # a small one is left as it is
    assert capped(step, latents, None) is step
    assert not capped(step, torch.zeros_like(latents), 0.25).any()


def test_an_image_whose_gradient_is_not_finite_stays_and_one_warning_tells():
    control = AStarController([[(1,), (2,)]] * 2, AStarSettings(**FIXED), (4, 4), 3)
    latents = closed_form_latents().repeat(2, 1, 1, 1)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[0, 0, 0, 0] = math.nan
            return gradient

    attend = lambda z: closed_form(Broken.apply(z))  # noqa: E731
    with pytest.warns(AttnProcWarning, match="not finite") as caught:
        after = control.update(control.update(latents, 0, 9, attend), 1, 9, attend)
    assert len(caught) == 1
    alone = controller(**FIXED)
    expected = alone.update(alone.update(latents[1:], 0, 9, closed_form), 1, 9, closed_form)
    assert torch.equal(after[0], latents[0])
    torch.testing.assert_close(after[1:], expected)


def test_images_with_different_concepts_are_as_alone():
    attend = lambda z: nullcontext((3 * z).permute(0, 2, 3, 1).softmax(-1))  # noqa: E731
    concepts = [[(1,), (2, 3), (4,)], [(3,), (1, 5)], [(2,)]]
    settings = AStarSettings(scale_factor=5.0)
    latents = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    together = AStarController(concepts, settings, (5, 4), 6)
    after = latents
    for step in range(3):
        after = together.update(after, step, 4, attend)
    for image, its in enumerate(concepts):
        alone = AStarController([its], settings, (5, 4), 6)
        own = latents[image : image + 1]
        for step in range(3):
            own = alone.update(own, step, 4, attend)
        torch.testing.assert_close(after[image : image + 1], own)
        for a, b in zip(together.log, alone.log, strict=True):
            assert a.pairs[image] == pytest.approx(b.pairs[0]) and len(a.pairs[image]) == math.comb(len(its), 2)
            assert a.concepts[image] == pytest.approx(b.concepts[0], nan_ok=True)
            assert a.step_rms[image] == pytest.approx(b.step_rms[0])


def test_a_concept_of_several_tokens_is_their_mean():
    a, b, c = some_maps(3, (4, 4))
    control = AStarController([[(1, 2), (3,)]], AStarSettings(**PLAIN), (4, 4), 4)
    (step,) = feed(control, tokens(a, b, c))
    assert step.segregation[0] == pytest.approx(pair(minmax((a + b) / 2)[0], minmax(c)[0]).item())


def test_refinement_repeats_until_the_target_and_takes_masks_from_its_last_pass():
    calls = []

    def attend(latents):
        calls.append(latents.detach().clone())
        return closed_form(latents)

    control = controller(refine={0: (0.0, 3)}, **FIXED)
    control.update(closed_form_latents(), 0, 50, attend)
    assert len(calls) == 4 and control.log[0].refinements == (3,)
    with closed_form(calls[-1]) as attention:
        last = minmax(attention[0, ..., 1:].movedim(-1, 0))[0]
    assert torch.equal(control._masks[0], last >= 0.5)
    # Without a mask to keep, the losses fall from 0.094274; a target above that is reached at once.
    control = controller(refine={0: (0.095, 3)}, **FIXED)
    control.update(closed_form_latents(), 0, 50, attend)
    assert control.log[0].refinements == (0,)
    # 0.088756 after the first update is what the first repeat sees, and it ends there.
    control = controller(refine={0: (0.09, 3)}, **FIXED)
    control.update(closed_form_latents(), 0, 50, attend)
    assert control.log[0].refinements == (1,)


def test_only_images_above_the_target_are_refined():
    settings = AStarSettings(**FIXED, refine={0: (0.09, 3)})
    latents = torch.cat([closed_form_latents(), 3 * closed_form_latents()])
    together = AStarController([[(1,), (2,)]] * 2, settings, (4, 4), 3)
    after = together.update(latents, 0, 50, closed_form)
    counts = []
    for image in range(2):
        alone = AStarController([[(1,), (2,)]], settings, (4, 4), 3)
        torch.testing.assert_close(
            after[image : image + 1], alone.update(latents[image : image + 1], 0, 50, closed_form)
        )
        assert torch.equal(together._masks[image], alone._masks[0])
        counts += alone.log[0].refinements
    assert together.log[0].refinements == tuple(counts) and len(set(counts)) == 2


def test_the_change_of_the_loss_is_measured_when_asked():
    control = controller(log_loss_change=True, **FIXED)
    control.update(closed_form_latents(), 0, 50, closed_form)
    assert control.log[0].loss_change == pytest.approx((1 - 0.088756 / 0.094274,), abs=2e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_keep_their_type(kind):
    control = controller(**FIXED)
    latents = closed_form_latents().to(kind)
    after = control.update(latents, 0, 50, lambda z: closed_form(z.double()))
    assert after.dtype == kind and not torch.equal(after, latents)


def test_tiny_half_precision_gradients_do_not_vanish():
    latents = closed_form_latents()
    weak = lambda z: closed_form(z.double() * 2**-14)  # noqa: E731
    alpha = 2.0**14
    exact = controller(**{**FIXED, "scale_factor": alpha}).update(latents, 0, 50, weak) - latents
    half = latents.half()
    got = controller(**{**FIXED, "scale_factor": alpha}).update(half, 0, 50, weak).double() - half.double()
    assert ((got - exact).norm() / exact.norm()).item() < 0.1


# -- attend and excite -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("softmax", "kept"), [("tokens", slice(1, 6)), ("words", slice(1, 4))])
def test_attend_and_excite_raises_the_most_neglected_concept(softmax, kept):
    attention = torch.rand(1, 4, 4, 7, dtype=torch.float64) / 30
    settings = AStarSettings(objective="attend_and_excite", token_softmax=softmax, max_rel_step=None)
    control = AStarController([[(1,), (3,)]], settings, (4, 4), 7, ends=[4])
    (step,) = feed(control, attention)
    sharp = (100 * attention[0, ..., kept]).softmax(-1)
    lacks = [1 - smooth(sharp[..., k]).max().item() for k in (0, 2)]
    assert step.concepts[0] == pytest.approx(lacks) and step.loss[0] == pytest.approx(max(lacks))
    assert step.peaks[0] == pytest.approx([1 - lack for lack in lacks])


def test_attend_and_excite_lowers_its_loss_as_its_gradient_says():
    attend = lambda z: nullcontext((3 * z).permute(0, 2, 3, 1).softmax(-1))  # noqa: E731
    # Even maps and a small step: the sharpened softmax of uneven ones is flat, and a large step goes past the lowest.
    latents, scale = 0.02 * torch.randn(1, 5, 4, 4, dtype=torch.float64), 1e-7
    settings = AStarSettings(objective="attend_and_excite", scale_factor=scale, log_loss_change=True)
    control = AStarController([[(1,), (2,)]], settings, (4, 4), 5)
    control.update(latents, 0, 9, attend)
    step = control.log[0]
    squared_gradient = step.step_rms[0] ** 2 * latents.numel() / scale**2
    assert squared_gradient > 0
    assert step.loss_change[0] * step.loss[0] == pytest.approx(scale * squared_gradient, rel=1e-3)


def test_token_softmax_is_off_for_a_star_and_on_for_attend_and_excite():
    assert AStarSettings().softmax == "off"
    assert AStarSettings(objective="attend_and_excite").softmax == "tokens"
    assert AStarSettings(objective="attend_and_excite", token_softmax="off").softmax == "off"


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "other"},
        {"map_norm": "sum"},
        {"mask_source": None},
        {"token_softmax": "on"},
        {"lambda_seg": -1.0},
        {"lambda_ret": math.nan},
        {"scale_factor": "20"},
        {"scale_factor": math.inf},
        {"scale_range": (1.0,)},
        {"scale_range": (1.0, -0.5)},
        {"update_window": (0.5, 0.2)},
        {"update_window": (0, 25)},
        {"update_window": 0.5},
        {"tau": 0.0},
        {"tau": 1.5},
        {"max_rel_step": 0},
        {"refine": {-1: (0.1, 2)}},
        {"refine": {0: 0.1}},
        {"refine": {0: (0.1, 0)}},
        {"attention_resolution": 16},
        {"attention_resolution": (16, 0)},
        {"attention_resolution": (16.0, 16.0)},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(SettingsError, match=rf"{name}.*expected"):
        AStarSettings(**wrong)


def test_maps_too_small_to_smooth_are_refused():
    with pytest.raises(SettingsError, match="2 x 2 to smooth"):
        AStarController([[(1,)]], AStarSettings(), (1, 8), 3)
