"""IR-Diffusion as a pipeline: portraits and the scenes of a story, denoised together. See `attnproc.control`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from attnproc.control.ir_diffusion import IRSettings, Layout
from attnproc.control.ir_diffusion_attention import Given, Grid, IRRun, LayerRules, SceneMasks, ir_processors
from attnproc.control.masks import Region
from attnproc.control.unet import processors_replaced
from attnproc.control.words import check_length
from attnproc.errors import AttnProcWarning, SettingsError
from attnproc.pipelines.inversion import as_picture, resized, working_size
from attnproc.pipelines.ir_diffusion_places import Places, Scene, Segmenter, Subject
from attnproc.pipelines.wrapping import ControlPipeline

__all__ = ["IRDiffusionPipeline", "IROutput", "IRSettings", "Scene", "Subject"]

Generators = torch.Generator | list[torch.Generator] | None

DEFAULTS = IRSettings()
NEGATIVE = ("negative_prompt", "negative_prompt_2")
SDXL = "StableDiffusionXLPipeline"
# What this pipeline itself passes on, or cannot: several prompts and pictures go through one call.
RESERVED = ("prompt", "prompt_2", "prompt_embeds", "negative_prompt_embeds", "latents", "return_dict")


@dataclass(frozen=True, eq=False)
class IROutput:
    """A scene.

    Attributes:
        image: in the asked `output_type`.
        references: the portraits of the same run, in the subjects' order; a given picture as it was used.
        layouts: who stood where in the last step, by grid (rows, columns) of tokens; empty without subjects.
        nsfw_content_detected: the safety checker's word on the scene, or None.
    """

    image: Any
    references: list[Any]
    layouts: dict[Grid, Layout]
    nsfw_content_detected: bool | None = None


class IRDiffusionPipeline(ControlPipeline):
    """Scenes in which several subjects look as in their portraits and keep apart, without training.

    Wraps a `StableDiffusionXLPipeline`, or as an extension of the method a `StableDiffusionPipeline`. Source: arXiv
    2411.19261; settings in `IRSettings`.

    Memory and time of a call are those of a batch with all portraits and scenes in it.
    """

    accepted: ClassVar[tuple[str, ...]] = (SDXL, "StableDiffusionPipeline")

    def __call__(
        self,
        *,
        subjects: Sequence[Subject],
        scene_prompt: str,
        scene_regions: Sequence[Region | str | None] | None = None,
        latents: Tensor | None = None,
        settings: IRSettings = DEFAULTS,
        generator: Generators = None,
        segmenter: Segmenter | None = None,
        **arguments: Any,
    ) -> IROutput:
        """One scene.

        Args:
            subjects: who is in it; none gives the plain pipeline's picture.
            scene_prompt, scene_regions, latents: as in `Scene`.
            settings, generator, segmenter, arguments, and what is raised: as for `story`.
        """
        scene = Scene(scene_prompt, scene_regions, latents)
        return self.story(subjects, [scene], settings=settings, generator=generator, segmenter=segmenter, **arguments)[
            0
        ]

    @torch.no_grad()
    def story(
        self,
        subjects: Sequence[Subject],
        scenes: Sequence[Scene],
        *,
        settings: IRSettings = DEFAULTS,
        generator: Generators = None,
        segmenter: Segmenter | None = None,
        scenes_per_batch: int | None = None,
        **arguments: Any,
    ) -> list[IROutput]:
        """All scenes of a story; the portraits are denoised once, with the scenes.

        Args:
            subjects: the characters.
            scenes: the pictures.
            settings: of the method.
            generator: for the noise, in the order portraits, scenes, as the plain pipeline would draw it for all
                their prompts; or one for each of them. Query dropout is seeded by its state and draws nothing from it.
            segmenter: a function of a PIL image and a list of phrases that gives a mask (as `Subject.region`) or None
                for each. Pictures are then first made without this method, and it finds in them the subjects without
                a region; where one is missing in a scene, other noise is tried, up to 20 times.
            scenes_per_batch: how many scenes are denoised with the portraits at a time; all by default. Fewer need
                less memory, and denoise the portraits again for each batch, to the same pictures (with a scheduler
                that draws noise only where each picture has a generator).
            arguments: of the diffusers pipeline. A list of negative prompts has one for each portrait and scene.

        Raises:
            SettingsError: an argument does not fit; a region is empty, outside or of another shape, or covers a whole
                portrait; a word is not in its prompt; a prompt, also a negative one, is too long; height or width are
                no multiple of what the U-Net needs.
            UnsupportedError: something else holds the attention layers (an IP-Adapter needs lam=0.0), or the
                segmenter does not find a subject.

        Warns (`AttnProcWarning`) once of each subject of a scene that smaller ones cover wholly, and once per call of
        an experimental U-Net.
        """
        if scenes_per_batch is not None and not _is_count(scenes_per_batch):
            raise SettingsError(
                f"scenes_per_batch={scenes_per_batch!r}; expected an integer of at least 1, or None for all at a time. "
                "Choose one."
            )
        call = _Call(self, list(subjects), list(scenes), settings, segmenter, arguments)
        noise = call.noise(generator)
        seeds = _dropout_seeds(generator, len(call.subjects), len(call.scenes))
        masks, noise = call.places.masks(noise, seeds)
        given = call.given(noise)
        count = scenes_per_batch or len(scenes)
        states = _states(generator)
        outputs = []
        for first in range(0, len(scenes), count):
            _restore(generator, states)
            chosen = range(first, min(first + count, len(scenes)))
            outputs += call.run(chosen, [masks[n] for n in chosen], noise, given, seeds, generator)
        return outputs


class _Call:
    """One checked call of the pipeline."""

    def __init__(
        self,
        pipeline: IRDiffusionPipeline,
        subjects: list[Subject],
        scenes: list[Scene],
        settings: IRSettings,
        segmenter: Segmenter | None,
        arguments: dict[str, Any],
    ):
        self.pipeline, self.pipe = pipeline, pipeline.pipe
        self.subjects, self.scenes, self.settings = subjects, scenes, settings
        self.arguments = dict(arguments)
        sdxl = any(kind.__name__ == SDXL for kind in type(self.pipe).__mro__)
        self._check_arguments()
        self.rules = LayerRules.of(self.pipe.unet, settings, sdxl)
        self.height, self.width = self._picture_size()
        self._check_lengths()
        self.pictures = {n: self._picture(n, s.image) for n, s in enumerate(subjects) if s.image is not None}
        self.places = Places(
            subjects,
            scenes,
            settings,
            segmenter,
            tokenizer=pipeline._tokenizer,
            converted=pipeline._converted,
            size=(self.height, self.width),
            rehearse=self._rehearse,
        )
        if subjects and not (sdxl or settings.experimental):
            warnings.warn(
                f"IR-Diffusion was made for SDXL; on a {type(self.pipe).__name__} it is an extension. Set "
                "IRSettings(experimental=True) to say that you know.",
                AttnProcWarning,
                stacklevel=4,
            )

    @property
    def prompts(self) -> list[str]:
        return [item.prompt for item in (*self.subjects, *self.scenes)]

    @property
    def latent_size(self) -> Grid:
        return self.height // self.pipe.vae_scale_factor, self.width // self.pipe.vae_scale_factor

    def noise(self, generator: Generators) -> Tensor:
        """Standard noise (portraits and scenes, channels, rows, columns)."""
        pipe, items = self.pipe, (*self.subjects, *self.scenes)
        encoder = getattr(pipe, "text_encoder_2", None) or getattr(pipe, "text_encoder", None) or pipe.unet
        shape = (len(items), pipe.unet.config.in_channels, *self.latent_size)
        if isinstance(generator, list) and len(generator) != len(items):
            raise SettingsError(
                f"{len(generator)} generators came for {len(self.subjects)} portraits and {len(self.scenes)} scenes; "
                "expected a single one, or one for each, portraits first."
            )
        noise = randn_tensor(shape, generator=generator, device=pipe._execution_device, dtype=encoder.dtype)
        for number, item in enumerate(items):
            if item.latents is None:
                continue
            if tuple(item.latents.shape) != (1, *shape[1:]):
                raise SettingsError(
                    f"latents of {item.prompt!r} have the shape {tuple(item.latents.shape)}; expected "
                    f"{(1, *shape[1:])}. Draw them in this shape."
                )
            noise[number] = item.latents[0].to(noise)
        return noise

    def given(self, noise: Tensor) -> dict[int, Given]:
        """By portrait the given pictures."""
        return {number: Given(self._encode(self._pixels(number))[0], noise[number]) for number in self.pictures}

    def run(
        self,
        chosen: Sequence[int],
        masks: Sequence[SceneMasks],
        noise: Tensor,
        given: dict[int, Given],
        seeds: Sequence[int],
        generator: Generators,
    ) -> list[IROutput]:
        """Denoises the portraits and some of the scenes."""
        subjects = len(self.subjects)
        images = [*range(subjects), *(subjects + n for n in chosen)]
        arguments = dict(self.arguments)
        for name in NEGATIVE:
            if isinstance(arguments.get(name), list):
                arguments[name] = [arguments[name][n] for n in images]
        arguments["generator"] = [generator[n] for n in images] if isinstance(generator, list) else generator
        layouts: list[dict[Grid, Layout]] = [{} for _ in chosen]
        with ExitStack() as stack:
            if subjects:
                run = IRRun(
                    self.settings,
                    self.rules,
                    masks,
                    self.latent_size,
                    [torch.Generator().manual_seed(seeds[n]) for n in chosen],
                    given,
                    self.pipe.scheduler,
                    first_scene=chosen[0],
                )
                hook = self.pipe.unet.register_forward_pre_hook(run.watch, with_kwargs=True)
                stack.callback(hook.remove)
                stack.enter_context(processors_replaced(self.pipe.unet, ir_processors(self.pipe.unet, run)))
            out = self.pipe(prompt=[self.prompts[n] for n in images], latents=noise[images], **arguments)
            if subjects:
                grids = self.rules.grids(self.latent_size)
                layouts = [{grid: run.layout(n, grid) for grid in grids} for n in range(len(chosen))]
        references = [self._portrait(number, out.images, given) for number in range(subjects)]
        unsafe = getattr(out, "nsfw_content_detected", None)
        return [
            IROutput(out.images[subjects + n], references, layouts[n], None if unsafe is None else unsafe[subjects + n])
            for n in range(len(chosen))
        ]

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        for name in RESERVED:
            if name in self.arguments:
                raise SettingsError(
                    f"{name} came as an argument of the diffusers pipeline; expected prompts and latents in the "
                    "subjects and scenes, and the rest by name. Leave it out."
                )
        if self.arguments.pop("num_images_per_prompt", 1) != 1:
            raise SettingsError("num_images_per_prompt must be 1, as scenes share a batch; repeat the scene instead.")
        if not _is_count(self.arguments.get("num_inference_steps", 1)):
            raise SettingsError(
                f"num_inference_steps={self.arguments['num_inference_steps']!r}; expected an integer of at least 1. "
                "Choose one, or leave it out."
            )
        if not self.scenes:
            raise SettingsError("no scenes came; expected at least one Scene.")
        count = len(self.subjects) + len(self.scenes)
        for name in NEGATIVE:
            negative = self.arguments.get(name)
            if isinstance(negative, list) and len(negative) != count:
                raise SettingsError(
                    f"{len(negative)} negative prompts came for {len(self.subjects)} portraits and {len(self.scenes)} "
                    f"scenes as {name}; expected one text for all, or one for each, portraits first."
                )
            if isinstance(negative, str):
                self.arguments[name] = [negative] * count

    def _check_lengths(self) -> None:
        prompts = [(prompt, "prompt") for prompt in self.prompts]
        prompts += [(prompt, name) for name in NEGATIVE for prompt in self.arguments.get(name) or ()]
        for prompt, what in dict.fromkeys(prompts):
            check_length(self.pipeline._tokenizer, self.pipeline._converted(prompt), what)

    def _picture_size(self) -> tuple[int, int]:
        """Height and width in pixels, which the arguments of the call hold from here on."""
        sides = self.pipeline.size(self.arguments.get("height"), self.arguments.get("width"))
        size = working_size(self.pipe, (1, 1), *sides)  # with both sides the shape of a picture does not matter
        self.arguments["height"], self.arguments["width"] = size
        return size

    def _picture(self, number: int, image: Any) -> Image.Image:
        picture = as_picture(image, f"the image of subject {number + 1}")
        if picture.width * self.height != picture.height * self.width:
            raise SettingsError(
                f"the image of subject {number + 1} is {picture.width} x {picture.height}; expected the aspect ratio "
                f"of the scene, {self.width} x {self.height}. Crop it."
            )
        return resized(picture, self.width, self.height)

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _pixels(self, number: int) -> Tensor:
        """A given picture (1, 3, height, width) from -1 to 1."""
        return self.pipe.image_processor.preprocess(self.pictures[number])

    def _encode(self, pixels: Tensor) -> Tensor:
        """Latents (1, channels, rows, columns), the mode of what the autoencoder says, scaled for the U-Net."""
        vae = self.pipe.vae
        before = vae.dtype
        upcast = before == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.to(torch.float32)
        try:
            latents = vae.encode(pixels.to(self.pipe._execution_device, vae.dtype)).latent_dist.mode().to(before)
        finally:
            if upcast:
                vae.to(before)
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and deviation is not None:
            mean, deviation = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (mean, deviation))
            return (latents - mean) * vae.config.scaling_factor / deviation
        return latents * vae.config.scaling_factor

    def _portrait(self, number: int, images: Any, given: dict[int, Given]) -> Any:
        if number not in given:
            return images[number]
        output_type = self.arguments.get("output_type", "pil")
        if output_type == "latent":
            return given[number].latents
        return self.pipe.image_processor.postprocess(self._pixels(number), output_type=output_type)[0]

    def _rehearse(self, number: int, noise: Tensor) -> Image.Image:
        """The picture of one prompt, portraits first, without this method."""
        if number in self.pictures:
            return self.pictures[number]
        own = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type")
        arguments = {name: value for name, value in self.arguments.items() if name not in own}
        for name in NEGATIVE:
            if isinstance(arguments.get(name), list):
                arguments[name] = arguments[name][number]
        return self.pipe(prompt=self.prompts[number], latents=noise, **arguments).images[0]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _dropout_seeds(generator: Generators, subjects: int, scenes: int) -> list[int]:
    """One for each scene, from a copy of its generator, so that schedulers draw the noise they would."""

    def seed(source: torch.Generator | None) -> int:
        device = "cpu" if source is None else source.device
        copy = None if source is None else source.clone_state()
        return int(torch.randint(2**62, (1,), generator=copy, device=device))

    if isinstance(generator, list):
        return [seed(source) for source in generator[subjects:]]
    first = seed(generator)
    return [first + number for number in range(scenes)]


def _states(generator: Generators) -> list[Tensor]:
    return [g.get_state() for g in _listed(generator)]


def _restore(generator: Generators, states: Sequence[Tensor]) -> None:
    for source, state in zip(_listed(generator), states, strict=True):
        source.set_state(state)


def _listed(generator: Generators) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]
