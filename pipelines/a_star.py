"""A-STAR on Stable Diffusion: every subject of the prompt drawn, or where the user wants it, without training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from attnproc import context
from attnproc.control import words
from attnproc.control.a_star import AStarSettings
from attnproc.control.a_star_controller import AStarController, AStarStep, Concept
from attnproc.control.attention_maps import captured_maps, layers_at, listening
from attnproc.control.masks import Region, region_mask, token_mask
from attnproc.control.unet import Parameters, frozen, processors_replaced, require_gradients, trainable
from attnproc.errors import AttnProcWarning, SettingsError, UnsupportedError
from attnproc.pipelines.wrapping import ControlPipeline

Words = str | Sequence[int]  # a concept: words of the prompt, or its token indices
Layout = Mapping[Any, Region]  # by concept
T = TypeVar("T")


@dataclass(frozen=True)
class AStarOutput:
    """Pictures, and what each optimised step did to them.

    Attributes:
        images: as the diffusers pipeline returns them for the `output_type`.
        log: one record per optimised step; the inner tuples follow the order of `images`.
        nsfw_content_detected: of pipelines with a safety checker, else None.
    """

    images: Any
    log: list[AStarStep]
    nsfw_content_detected: list[bool] | None = None


class AStarPipeline(ControlPipeline):
    """Stable Diffusion 1.x, 2.x or XL with A-STAR (ICCV 2023).

    About one more pass of the U-Net forward and back per optimised step, for the conditional half of the batch alone
    and up to the last layer whose maps are read. Works for any size the pipeline makes, with LoRA and offloading; a
    U-Net compiled by `pipe.unet = torch.compile(pipe.unet)` runs its extra passes eagerly.
    """

    accepted: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

    def get_indices(self, prompt: str) -> dict[int, str]:
        """The tokens of a prompt by their index, as `concepts` may name them."""
        return words.get_indices(self._tokenizer, self._converted(prompt))

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        concepts: Sequence[Any],
        layout_masks: Layout | Sequence[Layout | None] | None = None,
        settings: AStarSettings | None = None,
        num_images_per_prompt: int = 1,
        **arguments: Any,
    ) -> AStarOutput:
        """Generates pictures.

        Args:
            prompt: one prompt or several; None if `prompt_embeds` are given.
            concepts: for one prompt a list of the things that it shall show, each a word or phrase of the prompt or a
                list of token indices (see `get_indices`); for several prompts or for `prompt_embeds` a list of such
                lists, which may differ in length. With `prompt_embeds` only indices are possible.
            layout_masks: {concept: region} or for several prompts a list of those, None for no regions. A region is a
                box (x0, y0, x1, y1) in pixels or fractions, or a mask of the picture's aspect ratio or of the maps'
                resolution. A concept given as indices is named by the tuple of them. The concept is held there.
            settings: `AStarSettings()` by default.
            num_images_per_prompt: pictures per prompt.
            arguments: everything else that the diffusers pipeline takes.

        Raises:
            SettingsError: a concept is not in the prompt or appears twice; a prompt has more tokens than the text
                encoder takes; a region is empty, covers everything, leaves the picture or shares a place of the maps
                with another; no layer has the resolution; the scheduler calls the model more than once per step.
                Before any denoising.
            UnsupportedError: the U-Net has attention processors of others, or the call is in `torch.inference_mode`.
        """
        settings = settings or AStarSettings()
        _check_pipeline(self.pipe, arguments)
        _check_count(num_images_per_prompt)
        single = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if prompts is not None and not prompts:
            raise SettingsError("prompt is an empty list; expected at least one prompt. Write one.")
        for name in ("negative_prompt", "negative_prompt_2"):
            negative = arguments.get(name) or []
            for text in [negative] if isinstance(negative, str) else negative:
                words.check_length(self._tokenizer, self._converted(text), name)
        sides = arguments.get("height"), arguments.get("width")
        arguments["height"], arguments["width"] = self.size(*sides)
        count = _embedded(arguments) if prompts is None else len(prompts)
        each = _one_for_each(count, "concepts", [concepts] if single else concepts)
        layouts = _one_for_each(count, "layout_masks", [layout_masks] if single else layout_masks or [None] * count)
        if prompts is None:
            if settings.softmax == "words":
                raise SettingsError(
                    'token_softmax="words" came with prompt_embeds; expected a prompt, whose end is known. Pass the '
                    'prompt, or choose "tokens".'
                )
            found = [_checked_indices(its, arguments["prompt_embeds"].shape[1]) for its in each]
            ends = None
        else:
            found = [self._found(text, its) for text, its in zip(prompts, each, strict=True)]
            ends = _repeated([len(self.get_indices(text)) - 1 for text in prompts], num_images_per_prompt)
        regions = [_regions(its, layout) for its, layout in zip(each, layouts, strict=True)]
        _warn_of_single_concepts(found, regions, settings)
        run = _Run(
            self.pipe,
            settings,
            _repeated(found, num_images_per_prompt),
            _repeated(regions, num_images_per_prompt),
            ends,
        )
        with run.installed(arguments):
            output = self.pipe(prompt, num_images_per_prompt=num_images_per_prompt, return_dict=True, **arguments)
        log = [] if run.controller is None else run.controller.log
        return AStarOutput(output.images, log, getattr(output, "nsfw_content_detected", None))

    def _found(self, prompt: str, concepts: Sequence[Words]) -> list[Concept]:
        """Token indices of one prompt's concepts."""
        _check_list(concepts)
        prompt = self._converted(prompt)
        words.check_length(self._tokenizer, prompt)
        found: list[Concept] = []
        for concept in concepts:
            phrase = self._converted(concept) if isinstance(concept, str) else concept
            taken = [index for before in found for index in before]
            found.append(words.find_tokens(self._tokenizer, prompt, phrase, taken))
        return found


class _Run:
    """One call of the pipeline, listened to from outside.

    The latents of a step are known from where the pipeline gets them, `prepare_latents` and the callback; what the
    U-Net is given is known from its call. So the update happens on entering that call, in place, and follows every
    way of conditioning the pipeline has.
    """

    def __init__(
        self,
        pipe: Any,
        settings: AStarSettings,
        concepts: list[list[Concept]],
        regions: list[list[Region | None]],
        ends: list[int] | None,
    ):
        self.pipe = pipe
        self.unet = getattr(pipe.unet, "_orig_mod", pipe.unet)  # the module under a compiled one
        self.settings = settings
        self.concepts, self.regions, self.ends = concepts, regions, ends
        self.controller: AStarController | None = None
        self.step = 0
        self.latents: Tensor | None = None
        self.trainable: Parameters = ()
        self.listening = ExitStack()

    @contextmanager
    def installed(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Listens for the length of the block; `arguments` of the call get our callback around the user's."""
        self._wrap_callback(arguments)
        pipe, prepare = self.pipe, self.pipe.prepare_latents
        own = vars(pipe).get("prepare_latents")

        def prepare_latents(*args: Any, **kwargs: Any) -> Tensor:
            self.latents = prepare(*args, **kwargs)
            return self.latents

        with ExitStack() as hooks, self.listening:
            # Once more around the whole call: an interrupt may come while the flags are set back.
            self.trainable = trainable(self.unet)
            hooks.callback(require_gradients, self.trainable, True)
            hooks.callback(pipe.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True).remove)
            hooks.callback(pipe.unet.register_forward_hook(self._after_unet).remove)
            vars(pipe)["prepare_latents"] = prepare_latents
            try:
                yield
            finally:
                vars(pipe).pop("prepare_latents", None)
                if own is not None:
                    vars(pipe)["prepare_latents"] = own

    def _wrap_callback(self, arguments: dict[str, Any]) -> None:
        theirs: Callable[..., Any] | None = arguments.get("callback_on_step_end")
        asked = arguments.get("callback_on_step_end_tensor_inputs", ["latents"])
        names = getattr(theirs, "tensor_inputs", asked)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            given = {name: tensors[name] for name in names}
            returned = {} if theirs is None else theirs(pipe, step, timestep, given)
            # A copy, as schedulers and callbacks may keep what they returned, and the next update is in place.
            self.latents = returned.get("latents", tensors["latents"]).clone()
            self.step = step + 1
            return {**returned, "latents": self.latents}

        arguments["callback_on_step_end"] = after_step
        arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys([*names, "latents"]))

    def _before_unet(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Updates the latents, and the U-Net's input with them."""
        sample, timestep, *rest = args
        latents = self.latents
        assert latents is not None
        if self.controller is None:
            self._begin(latents, kwargs["encoder_hidden_states"].shape[1])
        assert self.controller is not None
        steps = self.pipe.num_timesteps
        if not self.settings.updates(self.step, steps):
            return None
        images = len(latents)
        conditional = {name: _last(value, images) for name, value in kwargs.items()}

        def attend(given: Tensor) -> AbstractContextManager[Tensor]:
            scaled = self.pipe.scheduler.scale_model_input(given, timestep)
            return captured_maps(self.unet, self.layers, self.grid, scaled, timestep, conditional)

        # Around the extra passes alone: kernels may choose by it, and the ordinary pass shall stay the same to the bit.
        with frozen(self.trainable):
            updated = self.controller.update(latents, self.step, steps, attend, float(timestep))
        latents.copy_(updated)
        if self.settings.mask_source == "denoise":
            self.recorder = self.listening.enter_context(listening(self.unet, self.layers, self.grid, images))
        scaled = self.pipe.scheduler.scale_model_input(torch.cat([latents] * (len(sample) // images)), timestep)
        return (scaled, timestep, *rest), kwargs

    def _after_unet(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if self.settings.mask_source == "denoise" and self.settings.updates(self.step, self.pipe.num_timesteps):
            self.listening.close()
            assert self.controller is not None
            self.controller.see(self.recorder.maps())

    def _begin(self, latents: Tensor, tokens: int) -> None:
        """Finds the layers and places the regions, now that the size is known."""
        height, width = latents.shape[-2:]
        rows, columns = self.settings.attention_resolution or (-(-height // 4), -(-width // 4))
        self.grid = rows, columns
        self.layers = layers_at(self.unet, height, width, self.grid)
        with processors_replaced(self.unet, dict.fromkeys(self.layers)):
            pass  # refuses, before any denoising, layers with a processor that is not diffusers' own
        pixels = height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor
        layout = [
            [None if region is None else _placed(region, *pixels, self.grid) for region in its] for its in self.regions
        ]
        for its in layout:
            _check_apart(its)
        self.controller = AStarController(
            self.concepts, self.settings, self.grid, tokens, latents.device, self.ends, layout
        )


def _check_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> None:
    order = getattr(pipe.scheduler, "order", 1)
    if order > 1:
        raise SettingsError(
            f"the pipeline has a {type(pipe.scheduler).__name__} of order {order}; expected a scheduler that calls the "
            "model once per step. Choose for example DDIM, Euler or DPM-Solver multistep."
        )
    if torch.is_inference_mode_enabled():
        raise UnsupportedError(
            "the call came inside torch.inference_mode, where no gradient can be taken; expected torch.no_grad, or "
            "nothing. Take the call out of it."
        )
    if hasattr(pipe.unet, context.ATTRIBUTE):
        raise UnsupportedError(
            "a sparse attention processor of this package is set on the pipeline; expected dense attention, through "
            "which gradients are exact. Set `pipe.attn_processor = None`, then call again."
        )
    if getattr(pipe.unet, "_compiled_call_impl", None) is not None:
        raise UnsupportedError(
            "the U-Net was compiled by `unet.compile()`, which leaves no place to update the latents; expected "
            "`pipe.unet = torch.compile(pipe.unet)`. Load it again and compile it so."
        )
    if arguments.get("prompt_2") is not None:
        raise SettingsError(
            "prompt_2 came beside concepts; expected one prompt for both text encoders, so that a token index "
            "means one word. Leave it out."
        )


def _check_count(num_images_per_prompt: Any) -> None:
    if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
        raise SettingsError(
            f"num_images_per_prompt={num_images_per_prompt!r}; expected a whole number of at least 1. Change it."
        )


def _embedded(arguments: Mapping[str, Any]) -> int:
    """How many prompts the embeddings are."""
    embeds = arguments.get("prompt_embeds")
    if embeds is None:
        raise SettingsError("neither prompt nor prompt_embeds came; expected one of them. Pass a prompt.")
    return len(embeds)


def _one_for_each(count: int, name: str, values: Any) -> Sequence[Any]:
    """The value of an argument for each prompt."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise SettingsError(
            f"{name} for {count} prompts or prompt_embeds is a {type(values).__name__}"
            f"{f' of {len(values)}' if hasattr(values, '__len__') else ''}; expected a list with one entry for each. "
            f"Pass {name}=[...] of length {count}."
        )
    return values


def _check_list(concepts: Any) -> None:
    valid = isinstance(concepts, Sequence) and not isinstance(concepts, str) and len(concepts) > 0
    if not valid or not all(isinstance(concept, Sequence) for concept in concepts):
        raise SettingsError(
            f"concepts of a prompt are {concepts!r}; expected a list of at least one word, phrase or list of token "
            'indices, as in ["red circle", [7, 8]]. Two or more make sense.'
        )


def _checked_indices(concepts: Any, tokens: int) -> list[Concept]:
    """Concepts of an embedded prompt of so many tokens."""
    _check_list(concepts)
    indices = [index for concept in concepts for index in concept]
    numbers = all(isinstance(index, int) and not isinstance(index, bool) for index in indices)
    if not numbers or not all(map(len, concepts)) or not all(1 <= index <= tokens - 2 for index in indices):
        raise SettingsError(
            f"concepts {concepts!r} came with prompt_embeds; expected token indices from 1 to {tokens - 2}, as words "
            "cannot be looked up. Find them with get_indices(prompt)."
        )
    if len(set(indices)) < len(indices):
        raise SettingsError(f"concepts {concepts!r} have an index twice; expected each token once. Take one out.")
    return [tuple(concept) for concept in concepts]


def _regions(concepts: Sequence[Words], layout: Layout | None) -> list[Region | None]:
    """The region of each concept of a prompt."""
    if layout is not None and not isinstance(layout, Mapping):
        raise SettingsError(
            f"layout_masks of a prompt is a {type(layout).__name__}; expected a dictionary of regions by "
            'concept, or None. Pass it as {"star": (0, 0, 64, 64)}.'
        )
    names = [concept if isinstance(concept, str) else tuple(concept) for concept in concepts]
    for name in layout or {}:
        if names.count(name) != 1:
            raise SettingsError(
                f"layout_masks has {name!r}, which is {'twice' if name in names else 'not'} among the concepts {names};"
                " expected each key to be one of them. Name the concept as it is there, or by its token indices."
            )
    return [None if layout is None else layout.get(name) for name in names]


def _placed(region: Region, height: int, width: int, grid: tuple[int, int]) -> Tensor:
    """A region on the grid of the maps, boolean."""
    if tuple(getattr(region, "shape", ())) == grid:
        mask = region_mask(region, *grid, "a layout mask")
    else:
        mask = token_mask(region_mask(region, height, width, "a layout mask"), *grid)
    if mask.all():
        raise SettingsError(
            "a layout mask covers the whole picture; expected a part of it, as the rest is where the concept shall not "
            "be. Leave it out, or make it smaller."
        )
    return mask


def _check_apart(layout: Sequence[Tensor | None]) -> None:
    """Two concepts cannot both be held in one place while their maps are parted."""
    masks = [mask for mask in layout if mask is not None]
    shared = int((torch.stack(masks).sum(0) > 1).sum()) if masks else 0
    if shared:
        raise SettingsError(
            f"layout masks overlap in {shared} of {masks[0].numel()} places of the attention maps; expected them apart "
            "from each other, as A-STAR parts the concepts. Draw them so."
        )


def _warn_of_single_concepts(found: Any, regions: Any, settings: AStarSettings) -> None:
    alone = any(len(its) == 1 and where == [None] for its, where in zip(found, regions, strict=True))
    if alone and settings.objective == "a_star":
        warnings.warn(
            "A-STAR got a prompt with one concept; expected two or more, whose maps it parts. It only keeps the one "
            "where it is. Name every object of the prompt.",
            AttnProcWarning,
            stacklevel=3,
        )


def _repeated(values: list[T], times: int) -> list[T]:
    """Each value for each picture of its prompt."""
    return [value for value in values for _ in range(times)]


def _last(value: Any, images: int) -> Any:
    """The conditional rows, the last ones, of what the U-Net takes for a batch."""
    if isinstance(value, Tensor) and value.ndim:
        return value[-images:]
    if isinstance(value, dict):
        return {name: _last(part, images) for name, part in value.items()}
    return value
