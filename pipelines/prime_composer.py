"""`PrimeComposerPipeline`: an object put into a picture and drawn anew there, the rest of the picture kept.

The method is in attnproc/control/prime_composer.py; this is its denoising loop. Background and object are inverted
first (pipelines/inversion.py), then the object's box is synthesised between the background's own noisy latents.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from attnproc.control.masks import Region
from attnproc.control.prime_composer import PrimeComposerSettings, Steering, guided, steps_of
from attnproc.control.prime_composer_geometry import Box, Placement, check_cells, pasted, place
from attnproc.control.unet import processors_replaced
from attnproc.control.words import check_length, find_tokens
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.pipelines.inversion import (
    ORDERS,
    Picture,
    as_picture,
    decode,
    encode_pictures,
    inversion_condition,
    invert_latents,
    model_of,
    resized,
    solver_pair,
    working_size,
)
from attnproc.pipelines.wrapping import ControlPipeline

DOMAINS = {"same": ("photo", 2.0), "cross": ("painting", 2.5)}  # preset of the settings, guidance scale


@dataclass
class PrimeComposerOutput:
    """What a call returns.

    images: one per prompt, as `output_type` says.
    pastes: PIL pictures of the working size, one per prompt: the object's pixels copied over the background.
    boxes: (x0, y0, x1, y1) in pixels of the working size, one per prompt: where the object is.
    background_latents: float32 (prompts, 4, height, width), the encoded picture that the composition keeps outside the
        box: the paste in the same domain, the background across domains.
    nsfw_content_detected: as diffusers gives it; None without a safety checker.
    """

    images: Any
    pastes: list[Image.Image]
    boxes: list[Box]
    background_latents: Tensor
    nsfw_content_detected: list[bool] | None = None


@dataclass(frozen=True)
class _Task:
    """One composition, checked: everything that is known before the model runs."""

    prompt: str
    negative_prompt: str | None
    subject_tokens: tuple[int, ...]
    placement: Placement
    background: Image.Image  # what is inverted and kept: with the object pasted, in the same domain
    canvas: Image.Image
    paste: Image.Image
    generator: torch.Generator | None
    noise: Tensor | None


class PrimeComposerPipeline(ControlPipeline):
    """PrimeComposer for Stable Diffusion 1.x and 2.x."""

    accepted: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        background: Picture | list[Picture],
        object_image: Picture | list[Picture],
        object_mask: Region | list[Region],
        target: Region | list[Region],
        subject: Any = None,
        domain: str = "same",
        settings: PrimeComposerSettings | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PrimeComposerOutput:
        """Composes one picture per prompt, one after the other.

        With a list of prompts every other argument may be a list of that length too, or is the same for all.

        Args:
            prompt: what the finished picture shows, object and background. Words between two `<ref>` are the subject.
            background: a PIL image of 8 bits a channel, or an array (height, width, 3) of uint8 or of floats from 0 to
                1; resized to the working size.
            object_image: likewise, of any size.
            object_mask: the object's silhouette in its picture: a mask of the same aspect ratio, cut at one half.
            target: where the object goes: a box (x0, y0, x1, y1) in pixels of the background as given (integers) or
                in fractions of it (floats), or a mask of its aspect ratio, whose bounding box is taken. The object is
                fitted in with its aspect ratio kept, centred; a box over the border is cut, with a warning.
            subject: words of the prompt that name the object, or their token indices; only the object's place may
                attend to them. None leaves that out, with a warning.
            domain: "same" inverts the background with the object pasted in; "cross" (a photo into a painting) inverts
                the background as it is.
            settings: how to steer; by default `PrimeComposerSettings.from_preset` of "photo" in the same domain and
                of "painting" across.
            num_inference_steps: evaluations of each inversion and of the generation.
            guidance_scale: 2.0 by default in the same domain, 2.5 across.
            height, width: working size in pixels; by default the first background's shape at the model's native
                area.
            generator: of the noise around the object; one per prompt, or one for all in turn.
            latents: that noise itself, (prompts, 4, height, width) in latent cells.
            callback_on_step_end, callback_on_step_end_tensor_inputs, negative_prompt, output_type: as in diffusers;
                steps are counted anew for each prompt.

        Raises:
            SettingsError: an argument is not valid; before the model runs.
            UnsupportedError: the U-Net is of another kind, or holds attention processors that are not diffusers' own.
        """
        _check_model(self.pipe)
        if domain not in DOMAINS:
            raise SettingsError(f"domain={domain!r}; expected one of {', '.join(DOMAINS)}. Choose one.")
        preset, usual_scale = DOMAINS[domain]
        settings = PrimeComposerSettings.from_preset(preset) if settings is None else settings
        scale = usual_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, int | float):
            raise SettingsError(f"guidance_scale={scale!r}; expected a number. {usual_scale} is usual.")
        if not isinstance(settings, PrimeComposerSettings):
            raise SettingsError(f"settings is a {type(settings).__name__}; expected PrimeComposerSettings. Pass those.")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self.pipe._callback_tensor_inputs]
        if unknown:
            raise SettingsError(
                f"callback_on_step_end_tensor_inputs names {', '.join(unknown)}; expected names of "
                f"{', '.join(self.pipe._callback_tensor_inputs)}. Leave the others out."
            )
        solver_pair(self.pipe.scheduler, settings.solver, num_inference_steps)  # refuses what cannot be inverted
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise SettingsError(f"prompt={prompt!r}; expected a text or a list of at least one. Write one.")
        many = len(prompts) if isinstance(prompt, list) else None
        size = working_size(
            self.pipe, as_picture(_each(background, many, "background")[0], "background").size, height, width
        )
        noise = _noise(latents, len(prompts), self.pipe, size)
        columns = (
            prompts,
            _each(negative_prompt, many, "negative_prompt"),
            _each(subject, many, "subject"),
            _each(background, many, "background"),
            _each(object_image, many, "object_image"),
            _each(object_mask, many, "object_mask"),
            _each(target, many, "target"),
            _each(generator, many, "generator"),
            noise,
        )
        check_length(self._tokenizer, self._converted(settings.inversion_prompt or ""), "inversion_prompt")
        tasks = []
        # Not a comprehension: in Python 3.11 that is one more frame between a warning and the caller it points at.
        for row in zip(*columns, strict=True):
            tasks.append(self._task(domain, size, *row))
        self.pipe._guidance_rescale = 0.0
        self.pipe._clip_skip = self.pipe._cross_attention_kwargs = None
        self.pipe._interrupt = False
        watch = (callback_on_step_end, list(callback_on_step_end_tensor_inputs))
        try:
            finished, kept = [], []
            for task in tasks:
                self.pipe._guidance_scale = scale  # a callback may have changed it
                final, background_latents = _compose(self.pipe, task, settings, num_inference_steps, watch)
                finished.append(final)
                kept.append(background_latents)
            images, flags = _pictures(self.pipe, torch.cat(finished), output_type)
        finally:
            self.pipe.maybe_free_model_hooks()
        pastes, boxes = [task.paste for task in tasks], [task.placement.box for task in tasks]
        return PrimeComposerOutput(images, pastes, boxes, torch.cat(kept), flags)

    def _task(
        self,
        domain: str,
        size: tuple[int, int],
        prompt: str,
        negative_prompt: str | None,
        subject: Any,
        background: Picture,
        object_image: Picture,
        object_mask: Region,
        target: Region,
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> _Task:
        height, width = size
        prompt, subject = _marked(prompt, subject)
        encoded = self._converted(prompt)
        check_length(self._tokenizer, encoded)
        check_length(self._tokenizer, self._converted(negative_prompt or ""), "negative_prompt")
        if subject is None:
            warnings.warn(
                "subject=None: every place of the picture may attend to the words of the object. Name them to keep the "
                "object in its place.",
                AttnProcWarning,
                stacklevel=4,
            )
            tokens: tuple[int, ...] = ()
        else:
            phrase = self._converted(subject) if isinstance(subject, str) else subject
            tokens = find_tokens(self._tokenizer, encoded, phrase, what="subject")
        ground = as_picture(background, "background")
        placement, canvas = place(
            as_picture(object_image, "object_image"), object_mask, target, ground.size, height, width
        )
        check_cells(placement, height // self.pipe.vae_scale_factor, width // self.pipe.vae_scale_factor)
        ground = resized(ground, width, height)
        paste = pasted(ground, canvas, placement)
        inverted = paste if domain == "same" else ground
        return _Task(prompt, negative_prompt, tokens, placement, inverted, canvas, paste, generator, noise)


# -- the loop ----------------------------------------------------------------------------------------------------------


def _compose(
    pipe: Any, task: _Task, settings: PrimeComposerSettings, steps: int, watch: tuple[Any, list[str]]
) -> tuple[Tensor, Tensor]:
    """Final latents, and those of the encoded background; both float32 (1, 4, rows, columns)."""
    device = pipe._execution_device
    forward, inverse = solver_pair(pipe.scheduler, settings.solver, steps, device)
    rows, columns = (side // pipe.vae_scale_factor for side in reversed(task.background.size))
    mask = task.placement.object_cells(rows, columns).to(device)
    box = task.placement.box_cells(rows, columns).to(device)
    steering = Steering(task.placement, (rows, columns), task.subject_tokens, settings.cd_query)
    with processors_replaced(pipe.unet, steering.processors(pipe.unet)):
        clean = encode_pictures(pipe, [task.background, task.canvas])
        condition = inversion_condition(pipe, settings.inversion_prompt)
        trajectory = invert_latents(model_of(pipe, condition), clean, inverse, pipe.progress_bar)[::-1]
        background = [latents[:1] for latents in trajectory]
        reference = [latents[1:] for latents in trajectory]
        source = background if task.paste is task.background else reference
        noise = task.noise
        if noise is None:
            noise = randn_tensor(background[0].shape, task.generator, device, torch.float32)
        start = torch.where(mask, source[0], torch.where(box, noise.to(device, torch.float32), background[0]))
        # Both texts at any guidance scale: a callback may change it.
        texts = pipe.encode_prompt(task.prompt, device, 1, True, task.negative_prompt)
        generator = _Generator(
            pipe, steering, settings, forward, background, reference, mask, box, *(t.to(pipe.unet.dtype) for t in texts)
        )
        final = generator.run(start, watch)
        if settings.blend_last:
            final = torch.where(box, final, background[-1])
    return final, background[-1]


@dataclass
class _Generator:
    """The guided generation of one composition.

    background, reference: latents (1, 4, rows, columns) of the inverted background and object canvas, B[k] and O[k].
    mask, box: boolean (rows, columns), the cells of the object and of its box.
    """

    pipe: Any
    steering: Steering
    settings: PrimeComposerSettings
    scheduler: Any
    background: list[Tensor]
    reference: list[Tensor]
    mask: Tensor
    box: Tensor
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor

    def run(self, latents: Tensor, watch: tuple[Any, list[str]]) -> Tensor:
        callback, names = watch
        pipe, timesteps = self.pipe, self.scheduler.timesteps
        plan = steps_of(self.settings, len(timesteps), ORDERS[self.settings.solver])
        pipe._num_timesteps = len(timesteps)
        with pipe.progress_bar(total=len(timesteps)) as progress:
            for k, timestep in enumerate(timesteps):
                if pipe.interrupt:
                    continue
                latents = self._set_back(k, plan[k].before, latents)
                if plan[k].infuse:
                    self._capture(k, timestep, latents)
                output = self._predict(plan[k].infuse, timestep, latents)
                latents = self.scheduler.step(output, timestep, latents).prev_sample
                if callback is not None:
                    state = {"latents": latents, "prompt_embeds": self.prompt_embeds}
                    state["negative_prompt_embeds"] = self.negative_prompt_embeds
                    changed = callback(pipe, k, timestep, {name: state[name] for name in names})
                    latents = changed.get("latents", latents)
                    self.prompt_embeds = changed.get("prompt_embeds", self.prompt_embeds)
                    self.negative_prompt_embeds = changed.get("negative_prompt_embeds", self.negative_prompt_embeds)
                progress.update()
        return latents

    def _set_back(self, k: int, what: str | None, latents: Tensor) -> Tensor:
        """The latents with the background, and the object at a paste, of this noise level."""
        if what == "blend":
            return torch.where(self.box, latents, self.background[k])
        if what == "paste":
            if self.settings.reset_history_on_paste and self.settings.solver == "dpm":
                self.scheduler.lower_order_nums = 0
            return self._composite(k)
        return latents

    def _composite(self, k: int) -> Tensor:
        return torch.where(self.mask, self.reference[k], self.background[k])

    def _capture(self, k: int, timestep: Tensor, latents: Tensor) -> None:
        """The correlation diffuser: object in its background, and the object as it is now on its canvas."""
        canvas = torch.where(self.mask, latents, self.reference[k]) if k else self.reference[0]
        self.steering.logits.clear()
        self._evaluate(timestep, {"composite": (self._composite(k), True), "canvas": (canvas, True)})

    def _predict(self, infuse: bool, timestep: Tensor, latents: Tensor) -> Tensor:
        guides = self.pipe.do_classifier_free_guidance
        extended = self.settings.extended_guidance if infuse else 0.0
        rows: dict[str, tuple[Tensor, bool]] = {"uncond": (latents, False)} if guides else {}
        if infuse:
            rows["infused"] = (latents, True)
        if not infuse or extended:
            rows["cond"] = (latents, True)
        outputs = self._evaluate(timestep, rows)
        infused = outputs["infused" if infuse else "cond"]
        cond = outputs.get("cond", infused)
        return guided(outputs.get("uncond"), infused, cond, self.pipe.guidance_scale, extended)

    def _evaluate(self, timestep: Tensor, rows: dict[str, tuple[Tensor, bool]]) -> dict[str, Tensor]:
        """The model's float32 output by the name of the row; a row is latents, and whether the prompt conditions it."""
        dtype = self.prompt_embeds.dtype
        # diffusers' callbacks hand back embeddings of which the last row is the conditional one.
        texts = [self.prompt_embeds[-1:] if prompted else self.negative_prompt_embeds for _, prompted in rows.values()]
        batch = torch.cat([latents for latents, _ in rows.values()]).to(dtype)
        self.steering.rows = tuple(rows)
        output = self.pipe.unet(batch, timestep, torch.cat(texts), return_dict=False)[0].float()
        self.steering.rows = ()
        return dict(zip(rows, output.split(1), strict=True))


def _pictures(pipe: Any, latents: Tensor, output_type: str) -> tuple[Any, list[bool] | None]:
    if output_type == "latent":
        return latents, None
    # One at a time: the autoencoder of a large picture takes much memory.
    decoded = torch.cat([decode(pipe, item) for item in latents.split(1)])
    decoded, flags = pipe.run_safety_checker(decoded, pipe._execution_device, decoded.dtype)
    clear = [True] * len(decoded) if flags is None else [not flag for flag in flags]
    return pipe.image_processor.postprocess(decoded, output_type=output_type, do_denormalize=clear), flags


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_model(pipe: Any) -> None:
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels or config.time_cond_proj_dim is not None:
        raise UnsupportedError(
            f"the U-Net has {config.in_channels} input channels and time_cond_proj_dim={config.time_cond_proj_dim}; "
            f"expected {pipe.vae.config.latent_channels} channels and None, as in Stable Diffusion 1 and 2. Load a "
            "text-to-image model."
        )


def _each(value: Any, count: int | None, name: str) -> list[Any]:
    """The value for every prompt; a list of numbers is one box, or the token indices of one phrase."""
    if not isinstance(value, list) or all(isinstance(item, Real) for item in value):
        return [value] * (count or 1)
    if len(value) != count:
        raise SettingsError(
            f"{name} is a list of {len(value)} for {'one prompt' if count is None else f'{count} prompts'}; expected "
            "one value, or one for each prompt of a list. Make the lists equally long."
        )
    return value


def _noise(latents: Tensor | None, count: int, pipe: Any, size: tuple[int, int]) -> list[Tensor | None]:
    if latents is None:
        return [None] * count
    expected = (count, pipe.unet.config.in_channels, *(side // pipe.vae_scale_factor for side in size))
    if tuple(latents.shape) != expected:
        raise SettingsError(f"latents have the shape {tuple(latents.shape)}; expected {expected}. Draw them anew.")
    return list(latents.split(1))


def _marked(prompt: str, subject: Any) -> tuple[str, Any]:
    """The prompt without `<ref>` markers, and the subject: the words between them where they are."""
    parts = [" ".join(part.split()) for part in re.split(r"\s*<ref>\s*", prompt)]
    if len(parts) == 1:
        return prompt, subject
    if len(parts) != 3 or not parts[1] or subject is not None:
        raise SettingsError(
            f"the prompt {prompt!r} has {len(parts) - 1} markers <ref> with subject={subject!r}; expected two around "
            "the words of the object, and then no subject. Mark them once."
        )
    return " ".join(part for part in parts if part), parts[1]
