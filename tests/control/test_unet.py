"""Own processors on a U-Net compute what diffusers' do, and leave it as it was on every way out."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from attnproc import RadialAttnProcessor
from attnproc.control.unet import attention_layers, finish, frozen, grid_of, processors_replaced, project, trainable
from attnproc.errors import SettingsError, UnsupportedError
from attnproc.pipelines.wrapping import ControlPipeline


class Rewritten:
    """Attention through `project` and `finish`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        parts = project(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        out = torch.nn.functional.scaled_dot_product_attention(parts.query, parts.key, parts.value, parts.mask)
        return finish(attn, out, parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"qk_norm": "layer_norm", "bias": True},
        {"spatial_norm_dim": 6, "residual_connection": True},
    ],
    ids=["plain", "cross", "group-norm", "qk-norm", "spatial-norm"],
)
def test_project_and_finish_are_the_stock_processor(options):
    four = bool({"spatial_norm_dim", "norm_num_groups"} & set(options))  # these come with pictures
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=2, dim_head=8, **options).eval()
    states = torch.randn(2, 32, 3, 5) if four else torch.randn(2, 15, 32)
    arguments = {
        "encoder_hidden_states": torch.randn(2, 7, 12) if "cross_attention_dim" in options else None,
        "temb": torch.randn(2, 6, 3, 5) if "spatial_norm_dim" in options else None,
    }
    keys = 7 if "cross_attention_dim" in options else 15
    if not four:
        arguments["attention_mask"] = torch.where(torch.rand(2, 1, keys) < 0.3, -1e4, 0.0)
    with torch.no_grad():
        expected = AttnProcessor2_0()(attn, states, **arguments)
        actual = Rewritten()(attn, states, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "layers"), [("sd1", 16), ("sd2", 16), ("sdxl", 70)])
def test_layers_come_in_the_order_of_their_calls(make_pipe, name, layers):
    unet = make_pipe(name).unet
    for kind in ("attn1", "attn2"):
        found = attention_layers(unet, kind)
        assert len(found) == layers
        called = []
        handles = [
            m.register_forward_pre_hook(lambda *_, n=n, called=called: called.append(n)) for n, m in found.items()
        ]
        added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
        with torch.no_grad():
            unet(
                torch.zeros(1, 4, 16, 16),
                1,
                torch.zeros(1, 3, unet.config.cross_attention_dim),
                added_cond_kwargs=added,
            )
        for handle in handles:
            handle.remove()
        assert called == list(found)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_very_processors_are_back_on_every_way_out(make_pipe, error):
    unet = make_pipe("sd1").unet
    before = dict(unet.attn_processors)
    flags = [p.requires_grad for p in unet.parameters()]
    replacements = {name: Rewritten() for name in attention_layers(unet, "attn2")}
    try:
        with processors_replaced(unet, replacements), frozen(trainable(unet)):
            assert sum(isinstance(p, Rewritten) for p in unet.attn_processors.values()) == 16
            assert not any(p.requires_grad for p in unet.parameters())
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert [p.requires_grad for p in unet.parameters()] == flags


def test_gradient_flags_are_back_if_switching_them_off_is_interrupted(make_pipe, monkeypatch):
    unet = make_pipe("sd1").unet
    unet.conv_in.requires_grad_(False)
    flags = [p.requires_grad for p in unet.parameters()]
    parameters, switch, count = trainable(unet), torch.Tensor.requires_grad_, 0

    def interrupted(parameter, flag=True):
        nonlocal count
        count += 1
        if count == 50:
            raise KeyboardInterrupt
        return switch(parameter, flag)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt), frozen(parameters):
        pass
    assert count > 50
    assert [p.requires_grad for p in unet.parameters()] == flags


def test_a_layer_with_someone_elses_processor_is_refused(make_pipe):
    pipe = make_pipe("sd1")
    pipe.attn_processor = RadialAttnProcessor()
    with (
        pytest.raises(UnsupportedError, match="expected diffusers' plain"),
        processors_replaced(pipe.unet, {name: Rewritten() for name in attention_layers(pipe.unet, "attn1")}),
    ):
        pass


@pytest.mark.parametrize(
    ("tokens", "latents", "grid"), [(256, (16, 16), (16, 16)), (20, (15, 9), (4, 5)), (15, (17, 9), (5, 3))]
)
def test_the_grid_of_a_layer_follows_from_its_tokens(tokens, latents, grid):
    if tokens == 20:
        with pytest.raises(SettingsError, match="no halving"):
            grid_of(tokens, *latents)
    else:
        assert grid_of(tokens, *latents) == grid


class Plain(ControlPipeline):
    accepted = ("StableDiffusionPipeline",)

    def __call__(self, *arguments, **keywords):
        return self.pipe(*arguments, **keywords)


def test_a_control_pipeline_looks_like_the_pipeline_it_holds(make_pipe, tmp_path):
    pipe = make_pipe("sd1")
    control = Plain(pipe)
    assert control.unet is pipe.unet and control.to("cpu") is control
    replaced = pipe.scheduler.from_config(pipe.scheduler.config)
    control.scheduler = replaced
    assert pipe.scheduler is replaced
    assert Plain.from_pipe(control).pipe is pipe
    pipe.save_pretrained(tmp_path)
    loaded = Plain.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded.pipe) is type(pipe)
    with pytest.raises(AttributeError):
        control.nothing_like_this  # noqa: B018
    with pytest.raises(UnsupportedError, match="got a StableDiffusionXLPipeline; expected one of StableDiff"):
        Plain(make_pipe("sdxl"))
