"""Tiny random pipelines with the structure of SD 1.x, SD 2.x and SDXL."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from attnproc.demos.shapes.picture_text import build_clip_tokenizer

torch.set_num_threads(1)


def text_encoder(tokenizer, kind=CLIPTextModel, width=16):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def vae():
    """8x in space."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=128,
    ).eval()


def scheduler(**settings):
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **settings,
    )


def stable_diffusion(version):
    """SD 1.x: four levels, 16 self- and 16 cross-attentions, those at latent/4 in down_blocks.2 and up_blocks.1.

    SD 2.x has linear projections, `upcast_attention` and predicts the velocity.
    """
    second = version == 2
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=16,
        attention_head_dim=(1, 1, 2, 2) if second else 2,
        norm_num_groups=4,
        use_linear_projection=second,
        upcast_attention=second,
    ).eval()
    tokenizer = build_clip_tokenizer()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(prediction_type="v_prediction" if second else "epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl():
    """SDXL: three levels, 70 self- and 70 cross-attentions, 60 of them at latent/4."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=32,
        attention_head_dim=(1, 1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()
    tokenizer = build_clip_tokenizer()
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer),
        text_encoder_2=text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        force_zeros_for_empty_prompt=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


BUILDERS = {"sd1": lambda: stable_diffusion(1), "sd2": lambda: stable_diffusion(2), "sdxl": sdxl}


@pytest.fixture
def make_pipe():
    """make_pipe("sd1" | "sd2" | "sdxl"): a fresh tiny pipeline, the same weights each time; 128 x 128 pixels."""

    def make(name):
        torch.manual_seed(0)
        return BUILDERS[name]()

    return make
