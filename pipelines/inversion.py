"""Inversion: from a picture to the noise from which a Stable Diffusion model draws it again, every latent kept.

The ordinary differential equation of sampling is solved backwards on the very noise levels on which it is solved
forwards. Two solvers: "dpm" is DPM-Solver++(2M), uniform in time from the last timestep to the first; "ddim" is DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from attnproc.control.masks import check_depth
from attnproc.control.unet import check_unet
from attnproc.control.words import check_length
from attnproc.errors import SettingsError

ORDERS = {"dpm": 2, "ddim": 1}
EXCEPTIONAL_TOKEN = 7788  # TF-ICON's exceptional prompt: this token everywhere, at no position
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_NOISY = ("Ancestral", "SDE", "DDPM", "LCM", "TCD")

Picture = Any  # a PIL image of 8 bits a channel, or an array (height, width, 3)
Predict = Callable[[Tensor, Tensor], Tensor]  # noisy latents and timestep to the model's output


@dataclass(frozen=True)
class Inversion:
    """What `invert` found.

    latents: float32 (steps + 1, pictures, channels, height, width), from the encoded pictures to noise.
    condition: (1, text tokens, text channels), the text embedding it was made with.
    solver: "dpm" or "ddim".
    """

    latents: Tensor
    condition: Tensor
    solver: str


@torch.no_grad()
def invert(
    pipe: Any,
    image: Picture | list[Picture],
    prompt: str | None = "",
    *,
    steps: int = 20,
    solver: str = "dpm",
    height: int | None = None,
    width: int | None = None,
) -> Inversion:
    """Finds the noise from which the pipeline draws a picture, without classifier-free guidance.

    Args:
        pipe: a StableDiffusionPipeline, of any prediction type; its own scheduler gives the noise levels only.
        image: a picture, or a list of them; a PIL image of 8 bits a channel (made RGB, transparency dropped) or an
            array (height, width, 3) of uint8 or of floats from 0 to 1. Resized where it is not of the working size.
        prompt: condition of every evaluation; None is the exceptional prompt of TF-ICON where the vocabulary has its
            token, else the empty prompt.
        steps: model evaluations each way.
        solver: "dpm" or "ddim".
        height, width: working size in pixels; by default the first picture's shape at the model's native area.

    Raises:
        SettingsError: bad picture, size, prompt, steps or solver, or a scheduler that has no inverse.
        UnsupportedError: another kind of pipeline.
    """
    check_unet(pipe, ("StableDiffusionPipeline",), "invert")
    pictures = [as_picture(item, "image") for item in (image if isinstance(image, list) else [image])]
    if not pictures:
        raise SettingsError("image is an empty list; expected at least one picture. Pass one.")
    height, width = working_size(pipe, pictures[0].size, height, width)
    if prompt is not None:
        check_length(pipe.tokenizer, pipe.maybe_convert_prompt(prompt, pipe.tokenizer))
    _, scheduler = solver_pair(pipe.scheduler, solver, steps, pipe._execution_device)
    try:
        clean = encode_pictures(pipe, [resized(item, width, height) for item in pictures])
        condition = inversion_condition(pipe, prompt)
        latents = invert_latents(model_of(pipe, condition), clean, scheduler, pipe.progress_bar)
    finally:
        pipe.maybe_free_model_hooks()
    return Inversion(torch.stack(latents), condition, solver)


@torch.no_grad()
def reconstruct(pipe: Any, inversion: Inversion, *, output_type: str = "pil") -> Any:
    """Draws the pictures of an `Inversion` again from its noise; output as of the pipeline's `output_type`."""
    noise = inversion.latents[-1]
    steps = len(inversion.latents) - 1
    scheduler, _ = solver_pair(pipe.scheduler, inversion.solver, steps, pipe._execution_device)
    predict = model_of(pipe, inversion.condition)
    try:
        for timestep in pipe.progress_bar(scheduler.timesteps):
            noise = scheduler.step(predict(noise, timestep), timestep, noise).prev_sample
        if output_type == "latent":
            return noise
        return pipe.image_processor.postprocess(decode(pipe, noise), output_type=output_type)
    finally:
        pipe.maybe_free_model_hooks()


# -- solvers -----------------------------------------------------------------------------------------------------------


def solver_pair(scheduler: Any, solver: str, steps: int, device: Any = None) -> tuple[Any, Any]:
    """A scheduler for the noise levels of another one and its inverse, set to so many steps; their lists mirror.

    Source: the released code of PrimeComposer and TF-ICON (uniform in time); the last step ends at the first noise
    level instead of at zero, as the way back begins there.

    Raises:
        SettingsError: unknown solver, fewer steps than the solver's order or too many, or a scheduler that adds
            noise, predicts something else than noise, velocity or sample, or whose last level has no signal.
    """
    _check_solver(scheduler, solver, steps)
    shared = {
        name: scheduler.config[name]
        for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    }
    shared["prediction_type"] = scheduler.config.prediction_type
    if solver == "dpm":
        shared |= {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "timestep_spacing": "linspace",
            "lower_order_final": False,
        }
        forward: Any = DPMSolverMultistepScheduler(**shared, final_sigmas_type="sigma_min")
        inverse: Any = DPMSolverMultistepInverseScheduler(**shared)
    else:
        shared |= {
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": False,
        }
        forward, inverse = DDIMScheduler(**shared), DDIMInverseScheduler(**shared)
    forward.set_timesteps(steps, device=device)
    inverse.set_timesteps(steps, device=device)
    if len(forward.timesteps) != steps or len(inverse.timesteps) != steps:
        raise SettingsError(
            f"num_inference_steps={steps} gives {len(inverse.timesteps)} different timesteps; expected fewer steps "
            f"than the {scheduler.config.num_train_timesteps} of training. Ask for fewer."
        )
    return forward, inverse


def invert_latents(
    predict: Predict, clean: Tensor, scheduler: Any, progress: Callable[[Iterable], Iterable] = iter
) -> list[Tensor]:
    """Latents from clean to noise, one more than the inverse scheduler has timesteps; the first is `clean` itself."""
    latents = [clean]
    for timestep in progress(scheduler.timesteps):
        output = predict(latents[-1], timestep)
        latents.append(scheduler.step(output, timestep, latents[-1]).prev_sample)
    return latents


def _check_solver(scheduler: Any, solver: str, steps: int) -> None:
    if solver not in ORDERS:
        raise SettingsError(f"solver={solver!r} is not known; expected one of {', '.join(ORDERS)}. Choose one.")
    name, config = type(scheduler).__name__, scheduler.config
    if any(word in name for word in _NOISY) or str(config.get("algorithm_type", "")).startswith("sde"):
        raise SettingsError(
            f"the pipeline has a {name}, which adds noise at each step and has no inverse; expected a scheduler of the "
            "ordinary differential equation. Set DDIMScheduler.from_config(pipe.scheduler.config)."
        )
    if "beta_schedule" not in config or config.get("prediction_type") not in _PREDICTIONS:
        raise SettingsError(
            f"the pipeline's {name} predicts {config.get('prediction_type')!r}; expected one of "
            f"{', '.join(_PREDICTIONS)} on a beta schedule, as Stable Diffusion 1 and 2 have. Use such a model."
        )
    if config.get("rescale_betas_zero_snr"):
        raise SettingsError(
            f"the pipeline's {name} has rescale_betas_zero_snr=True, whose last noise level holds nothing of the "
            "picture and cannot be inverted; expected False. Set it for this call."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < ORDERS[solver]:
        raise SettingsError(
            f"num_inference_steps={steps!r}; expected an integer of at least {ORDERS[solver]}, the order of the solver "
            f"{solver!r}. 20 is usual."
        )
    if steps > config.num_train_timesteps:
        raise SettingsError(
            f"num_inference_steps={steps}; expected at most {config.num_train_timesteps}, as trained. Ask for fewer."
        )


# -- the model ---------------------------------------------------------------------------------------------------------


def model_of(pipe: Any, condition: Tensor) -> Predict:
    """The U-Net as a function of float32 latents and timestep, one condition (1, tokens, channels) for every row."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        rows = condition.expand(len(latents), -1, -1)
        return pipe.unet(latents.to(condition.dtype), timestep, rows, return_dict=False)[0].float()

    return predict


def inversion_condition(pipe: Any, prompt: str | None) -> Tensor:
    """Embedding (1, tokens, channels) of a prompt; of the exceptional one, or else the empty one, for None."""
    device = pipe._execution_device
    if prompt is None and pipe.text_encoder.config.vocab_size > EXCEPTIONAL_TOKEN:
        ids = torch.full((1, pipe.tokenizer.model_max_length), EXCEPTIONAL_TOKEN, device=device)
        with _no_positions(pipe.text_encoder):
            return pipe.text_encoder(ids)[0].to(pipe.unet.dtype)
    return pipe.encode_prompt(prompt or "", device, 1, False)[0].to(pipe.unet.dtype)


@contextmanager
def _no_positions(text_encoder: Any) -> Iterator[None]:
    """The positional embedding gives zeros: a hook, as offloaded weights cannot be overwritten."""
    inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 4 has it one level deeper
    hook = inner.embeddings.position_embedding.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    try:
        yield
    finally:
        hook.remove()


# -- pictures ----------------------------------------------------------------------------------------------------------


def as_picture(image: Picture, what: str) -> Image.Image:
    """As RGB a PIL image of 8 bits a channel, or an array (height, width, 3) of uint8 or of floats from 0 to 1."""
    if isinstance(image, Image.Image):
        check_depth(image, what)
        return image.convert("RGB")
    pixels = np.asarray(image) if isinstance(image, np.ndarray) else None
    if pixels is not None and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
        if pixels.dtype == np.uint8:
            return Image.fromarray(pixels)
        if np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1:
            return Image.fromarray((pixels * 255).round().astype(np.uint8))
    came = type(image).__name__ if pixels is None else f"an array of shape {pixels.shape} and type {pixels.dtype}"
    raise SettingsError(
        f"{what} is {came}; expected a PIL image, or an array (height, width, 3) of uint8 or of floats from 0 to 1. "
        "Convert it, for example with PIL.Image.open."
    )


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at another size, Lanczos; itself where it has that size."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def working_size(
    pipe: Any, size: tuple[int, int], height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width in pixels of a run: those given, else near the shape of a picture at the model's native area.

    Args:
        size: width and height of the picture.

    Raises:
        SettingsError: a given size is not a positive multiple of what the U-Net needs (64 in Stable Diffusion).
    """
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    native = pipe.unet.config.sample_size
    rows, columns = (native, native) if isinstance(native, int) else native
    scale = pipe.vae_scale_factor * (rows * columns / (size[0] * size[1])) ** 0.5
    found = []
    for name, given, pixels in (("height", height, size[1]), ("width", width, size[0])):
        if given is None:
            given = max(1, round(scale * pixels / multiple)) * multiple
        if not isinstance(given, int) or isinstance(given, bool) or given <= 0 or given % multiple:
            raise SettingsError(
                f"{name}={given!r}; expected a positive multiple of {multiple} pixels, so that every level of the "
                "U-Net has whole cells. Choose one."
            )
        found.append(given)
    return found[0], found[1]


def encode_pictures(pipe: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Latents float32 (pictures, channels, height, width): the mode of the autoencoder's distribution, scaled."""
    pixels = pipe.image_processor.preprocess(list(pictures)).to(pipe._execution_device, pipe.vae.dtype)
    return pipe.vae.encode(pixels).latent_dist.mode().float() * pipe.vae.config.scaling_factor


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures (pictures, 3, height, width) around -1 to 1, not clipped, of scaled latents."""
    latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    return pipe.vae.decode(latents, return_dict=False)[0]
