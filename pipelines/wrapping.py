"""What the control pipelines have in common: each one holds a diffusers pipeline and looks like it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from diffusers import DiffusionPipeline

from attnproc.control.unet import check_unet


class ControlPipeline:
    """A diffusers pipeline with another `__call__`.

    Everything else is that pipeline's: components, `load_lora_weights`, `enable_model_cpu_offload`, `scheduler` and so
    on are read from and written to `pipe`, which stays usable by itself.
    """

    accepted: ClassVar[tuple[str, ...]] = ()
    pipe: Any

    def __init__(self, pipe: Any):
        """Args: pipe: a loaded diffusers pipeline. Raises: UnsupportedError: it is not of an `accepted` class."""
        check_unet(pipe, self.accepted, type(self).__name__)
        object.__setattr__(self, "pipe", pipe)

    @classmethod
    def from_pretrained(cls, model: str, **arguments: Any) -> Self:
        """Loads a local folder or Hugging Face id as `DiffusionPipeline.from_pretrained` does, same arguments."""
        return cls(DiffusionPipeline.from_pretrained(model, **arguments))

    @classmethod
    def from_pipe(cls, pipe: Any) -> Self:
        """The same weights and components as another pipeline, which may itself be a control pipeline."""
        return cls(pipe.pipe if isinstance(pipe, ControlPipeline) else pipe)

    def to(self, *arguments: Any, **keywords: Any) -> Self:
        """Moves or casts the pipeline, as `DiffusionPipeline.to`."""
        self.pipe.to(*arguments, **keywords)
        return self

    @property
    def _tokenizer(self) -> Any:
        return self.pipe.tokenizer if self.pipe.tokenizer is not None else self.pipe.tokenizer_2

    def _converted(self, text: str) -> str:
        """A prompt as it is encoded: words of textual inversion as their tokens."""
        return self.pipe.maybe_convert_prompt(text, self._tokenizer)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None. diffusers takes its own for both if one is None."""
        if height is not None and width is not None:
            return height, width
        own = self.pipe.unet.config.sample_size
        rows, columns = (own, own) if isinstance(own, int) else own
        scale = self.pipe.vae_scale_factor
        return rows * scale if height is None else height, columns * scale if width is None else width

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not set yet: while copying or unpickling
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.pipe).__name__})"
