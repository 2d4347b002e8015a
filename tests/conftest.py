"""Tiny random models and pipelines of every family, and two processors made for tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import ClassVar

import diffusers
import pytest
import torch

from attnproc.kernels import BlockMask
from attnproc.processor import AttnProcessor, Dense, Plan

torch.set_num_threads(1)  # tiny tensors: threads would mostly wait for each other


# -- processors --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class RandomMaskProcessor(AttnProcessor):
    """Keeps random blocks: a fixed choice for each layer and number of tokens, the diagonal always."""

    name: ClassVar[str] = "random-mask"
    density: float = 0.5
    block_size: int = 16
    layers: list = dataclass_field(default_factory=list, init=False)

    def plan(self, call):
        self.layers.append(call.layer)
        mask = self.kept(call.layer, call.layout.tokens)
        valid = call.layout.key_valid
        return Plan(mask if valid is None else mask.with_key_valid(valid))

    def kept(self, layer, tokens):
        blocks = -(-tokens // self.block_size)
        generator = torch.Generator().manual_seed(1000 * layer + tokens)
        kept = torch.rand(blocks, blocks, generator=generator) < self.density
        kept |= torch.eye(blocks, dtype=torch.bool)
        return BlockMask.from_blocks(kept, tokens, tokens, (self.block_size, self.block_size))

    def predicted_density(self, layout):
        return self.density


@dataclass(kw_only=True)
class RecordingProcessor(AttnProcessor):
    """Runs dense and notes (step, branch, total, grid) of each call of layer 0; remembers something in its state."""

    name: ClassVar[str] = "recording"
    calls: list = dataclass_field(default_factory=list)

    def plan(self, call):
        if call.layer == 0:
            self.calls.append(call.step)
        call.state["calls"] = call.state.get("calls", 0) + 1
        return Dense()

    def predicted_density(self, layout):
        return 1.0

    @property
    def trace(self):
        return [(step.index, step.branch) for step in self.calls]


@pytest.fixture
def random_mask():
    return RandomMaskProcessor


@pytest.fixture
def recording():
    return RecordingProcessor


# -- models ------------------------------------------------------------------------------------------------------------


def rand(*shape):
    return torch.randn(*shape)


def ragged(batch, tokens, dtype=torch.bool):
    """A text mask with all tokens valid in sample 0 and fewer in the others."""
    return torch.stack([torch.arange(tokens) < tokens - 3 * sample for sample in range(batch)]).to(dtype)


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
    "patch_size": (1, 2, 2),
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}
COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 8,
}


def wan_inputs(b):
    return {
        "hidden_states": rand(b, 4, 3, 10, 14),
        "timestep": torch.full((b,), 500),
        "encoder_hidden_states": rand(b, 7, 16),
    }


def hunyuan_inputs(b):
    return {
        "hidden_states": rand(b, 4, 3, 10, 14),
        "timestep": torch.full((b,), 500),
        "encoder_hidden_states": rand(b, 7, 16),
        "encoder_attention_mask": ragged(b, 7),
        "pooled_projections": rand(b, 8),
        "guidance": torch.full((b,), 6000.0),
    }


def hunyuan15_inputs(b):
    return {
        "hidden_states": rand(b, 4, 3, 5, 7),
        "timestep": torch.full((b,), 500.0),
        "encoder_hidden_states": rand(b, 7, 16),
        "encoder_attention_mask": ragged(b, 7, torch.long),
        "encoder_hidden_states_2": rand(b, 5, 8),
        "encoder_attention_mask_2": ragged(b, 5, torch.long),
        "image_embeds": torch.zeros(b, 3, 12),
    }


def cog_inputs(b):
    return {
        "hidden_states": rand(b, 3, 4, 8, 8),
        "timestep": torch.full((b,), 500),
        "encoder_hidden_states": rand(b, 8, 8),
        "image_rotary_emb": (rand(48, 16), rand(48, 16)),
    }


def mochi_inputs(b):
    return {
        "hidden_states": rand(b, 4, 3, 10, 14),
        "timestep": torch.full((b,), 500),
        "encoder_hidden_states": rand(b, 7, 16),
        "encoder_attention_mask": ragged(b, 7),
    }


def ltx_inputs(b):
    return {
        "hidden_states": rand(b, 105, 4),
        "timestep": torch.full((b,), 500),
        "encoder_hidden_states": rand(b, 7, 16),
        "encoder_attention_mask": ragged(b, 7),
        "num_frames": 3,
        "height": 5,
        "width": 7,
    }


def sd3_inputs(b):
    return {
        "hidden_states": rand(b, 4, 18, 14),
        "timestep": torch.full((b,), 500),
        "encoder_hidden_states": rand(b, 7, 16),
        "pooled_projections": rand(b, 12),
    }


def flux_inputs(b):
    ids = torch.zeros(9, 7, 3)
    ids[..., 1], ids[..., 2] = torch.arange(9)[:, None], torch.arange(7)
    return {
        "hidden_states": rand(b, 63, 4),
        "timestep": torch.full((b,), 0.5),
        "encoder_hidden_states": rand(b, 7, 16),
        "pooled_projections": rand(b, 8),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def unet_inputs(b):
    return {"sample": rand(b, 4, 18, 14), "timestep": torch.tensor(500), "encoder_hidden_states": rand(b, 7, 16)}


def wan_i2v_inputs(b):
    return {
        **wan_inputs(b),
        "encoder_hidden_states": rand(b, 512, 16),
        "encoder_hidden_states_image": rand(b, 9, 8),
    }


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family: how to make it, inputs for a batch size, and facts that tests compare with."""

    model_class: str
    config: dict
    inputs: object
    sites: int  # modules that get a processor of ours
    attentions: int  # attention modules in all
    text_argument: str | None = None  # text with padding, and its mask
    mask_argument: str | None = None
    video_only: bool = False

    def model(self, **overrides):
        torch.manual_seed(0)
        model = getattr(diffusers, self.model_class)(**{**self.config, **overrides}).eval()
        for parameter in model.parameters():  # zero-initialised parts would hide differences
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return model


TINY = {
    "wan": Tiny("WanTransformer3DModel", WAN, wan_inputs, 2, 4),
    "wan-i2v": Tiny("WanTransformer3DModel", {**WAN, "image_dim": 8, "added_kv_proj_dim": 24}, wan_i2v_inputs, 2, 4),
    "vace": Tiny(
        "WanVACETransformer3DModel",
        {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 8},
        lambda b: {**wan_inputs(b), "control_hidden_states": rand(b, 8, 3, 10, 14)},
        5,
        10,
    ),
    "animate": Tiny(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda b: {
            **wan_inputs(b),
            "hidden_states": rand(b, 12, 3, 10, 14),
            "encoder_hidden_states": rand(b, 512, 16),
            "encoder_hidden_states_image": rand(b, 9, 8),
            "pose_hidden_states": rand(b, 4, 2, 10, 14),
            "face_pixel_values": rand(b, 3, 5, 16, 16),
        },
        2,
        5,
    ),
    "skyreels": Tiny("SkyReelsV2Transformer3DModel", WAN, wan_inputs, 2, 4),
    "chronoedit": Tiny("ChronoEditTransformer3DModel", WAN, wan_inputs, 2, 4),
    "hunyuan": Tiny(
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "guidance_embeds": True},
        hunyuan_inputs,
        2,
        3,
        "encoder_hidden_states",
        "encoder_attention_mask",
    ),
    "hunyuan-i2v": Tiny(
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "guidance_embeds": True, "image_condition_type": "token_replace"},
        hunyuan_inputs,
        2,
        3,
        "encoder_hidden_states",
        "encoder_attention_mask",
    ),
    "hunyuan15": Tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (4, 4, 4),
            "task_type": "t2v",
        },
        hunyuan15_inputs,
        2,
        3,
        "encoder_hidden_states",
        "encoder_attention_mask",
    ),
    "cog": Tiny("CogVideoXTransformer3DModel", {**COG, "use_rotary_positional_embeddings": True}, cog_inputs, 2, 2),
    "cog-2b": Tiny("CogVideoXTransformer3DModel", COG, lambda b: {**cog_inputs(b), "image_rotary_emb": None}, 2, 2),
    "cog-1.5": Tiny(
        "CogVideoXTransformer3DModel",
        {**COG, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
        lambda b: {
            **cog_inputs(b),
            "hidden_states": rand(b, 4, 4, 8, 8),
            "image_rotary_emb": (rand(32, 16), rand(32, 16)),
        },
        2,
        2,
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
        },
        mochi_inputs,
        2,
        2,
        "encoder_hidden_states",
        "encoder_attention_mask",
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        },
        ltx_inputs,
        2,
        4,
        "encoder_hidden_states",
        "encoder_attention_mask",
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 12,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
            "out_channels": 4,
            "patch_size": 2,
        },
        sd3_inputs,
        3,
        3,
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 4, 8),
        },
        flux_inputs,
        2,
        2,
    ),
    "unet": Tiny(
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "sample_size": 16,
            "layers_per_block": 1,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        unet_inputs,
        7,
        14,
    ),
}
# A representative of each family, for tests about something the families' variants share.
FAMILIES = ("wan", "hunyuan", "hunyuan15", "cog", "mochi", "ltx", "sd3", "flux", "unet")
VIDEO = FAMILIES[:6]


@pytest.fixture(scope="session")
def tiny_models():
    """All tiny models by name."""
    return TINY


@pytest.fixture(params=TINY)
def variant(request):
    """Each tiny model of each family."""
    return TINY[request.param]


@pytest.fixture(params=FAMILIES)
def family(request):
    """One tiny model of each family."""
    return TINY[request.param]


@pytest.fixture(params=VIDEO)
def video_family(request):
    """One tiny model of each video family."""
    return TINY[request.param]


@pytest.fixture
def run():
    """Calls a model without gradients and returns its output tensor."""

    @torch.no_grad()
    def call(model, inputs):
        return model(**inputs, return_dict=False)[0]

    return call


# -- pipelines, offline: no text encoder and no VAE, embeddings given, latents out -------------------------------------


def text_inputs(batch=1, tokens=7, channels=16):
    torch.manual_seed(2)
    return {"prompt_embeds": rand(batch, tokens, channels), "negative_prompt_embeds": rand(batch, tokens, channels)}


def wan_pipeline(two_experts=False, **overrides):
    parts = {"transformer": TINY["wan"].model()}
    if two_experts:
        torch.manual_seed(5)
        parts |= {"transformer_2": TINY["wan"].model(), "boundary_ratio": 0.5}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, **parts, **overrides)
    return pipe, {**text_inputs(), "height": 80, "width": 112, "num_frames": 9, "guidance_scale": 3.0}


def hunyuan_pipeline(true_cfg=False):
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=None,
        transformer=TINY["hunyuan"].model(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    inputs = {
        "prompt_embeds": text_inputs()["prompt_embeds"],
        "pooled_prompt_embeds": rand(1, 8),
        "prompt_attention_mask": ragged(1, 7),
    }
    if true_cfg:
        inputs |= {f"negative_{name}": value for name, value in inputs.items()} | {"true_cfg_scale": 3.0}
    return pipe, {**inputs, "height": 80, "width": 112, "num_frames": 9}


def hunyuan15_pipeline():
    from diffusers.guiders import ClassifierFreeGuidance

    # This pipeline reads the number of channels from the VAE.
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        transformer=TINY["hunyuan15"].model(in_channels=9),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe.vision_num_semantic_tokens = 3
    inputs = {
        "prompt_embeds": text_inputs()["prompt_embeds"],
        "prompt_embeds_mask": ragged(1, 7, torch.long),
        "prompt_embeds_2": rand(1, 5, 8),
        "prompt_embeds_mask_2": ragged(1, 5, torch.long),
    }
    inputs |= {f"negative_{name}": value for name, value in inputs.items()}
    return pipe, {**inputs, "height": 80, "width": 112, "num_frames": 9}


def cog_pipeline():
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=TINY["cog"].model(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, {**text_inputs(tokens=8, channels=8), "height": 64, "width": 64, "num_frames": 9}


def mochi_pipeline():
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=TINY["mochi"].model(),
    )
    masks = {"prompt_attention_mask": ragged(1, 7), "negative_prompt_attention_mask": ragged(2, 7)[1:]}
    return pipe, {**text_inputs(), **masks, "height": 80, "width": 112, "num_frames": 13}


def ltx_pipeline():
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=TINY["ltx"].model(),
    )
    masks = {"prompt_attention_mask": ragged(1, 7), "negative_prompt_attention_mask": ragged(2, 7)[1:]}
    return pipe, {**text_inputs(), **masks, "height": 160, "width": 224, "num_frames": 17}


def sd_pipeline(pipeline_class=diffusers.StableDiffusionPipeline):
    pipe = pipeline_class(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=TINY["unet"].model(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {**text_inputs(), "height": 128, "width": 96}


def sd3_pipeline():
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=TINY["sd3"].model(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pooled = {"pooled_prompt_embeds": rand(1, 12), "negative_pooled_prompt_embeds": rand(1, 12)}
    return pipe, {**text_inputs(), **pooled, "height": 128, "width": 96}


def flux_pipeline():
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=TINY["flux"].model(),
    )
    inputs = {"prompt_embeds": text_inputs()["prompt_embeds"], "pooled_prompt_embeds": rand(1, 8)}
    return pipe, {**inputs, "height": 128, "width": 96}


PIPELINES = {
    "wan": wan_pipeline,
    "hunyuan": hunyuan_pipeline,
    "hunyuan-true-cfg": lambda: hunyuan_pipeline(true_cfg=True),
    "hunyuan15": hunyuan15_pipeline,
    "cog": cog_pipeline,
    "mochi": mochi_pipeline,
    "ltx": ltx_pipeline,
    "sd": sd_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
}


@pytest.fixture
def generate():
    """Runs a pipeline for a few steps from a fixed seed and returns its latents."""

    def call(pipe, inputs, steps=3, **more):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": steps, "output_type": "latent", **more}
        return pipe(**inputs, generator=generator, **more)[0]

    return call


@pytest.fixture(scope="session")
def tiny_pipelines():
    """All tiny pipelines by name: a function that returns a pipeline and the inputs to call it with."""
    return PIPELINES


@pytest.fixture(params=PIPELINES)
def pipeline_name(request):
    """The name of each tiny pipeline."""
    return request.param


@pytest.fixture
def wan(tiny_pipelines):
    """A Wan pipeline and its inputs."""
    return tiny_pipelines["wan"]()
