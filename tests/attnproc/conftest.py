"""The sparse methods with settings for tiny models: small blocks, no floors, no warm-up, calibrated where needed."""

import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import attnproc
from attnproc.errors import AttnProcWarning
from attnproc.methods import method_class
from attnproc.sparse.paro_calibration import PAROCalibrationProcessor

# AdaSpa's first search is a dense step, its second one the third step of a run.
SMALL: dict[str, dict[str, Any]] = {
    "radial": {"block_size": 8, "band_limit": 8, "sink_frames": 0, "adjacent_half_width": 0.25, "max_density": 1.0},
    "sparge": {"block_size": 16, "density": 0.3, "min_tokens": 0},
    "adaspa": {"block_size": 16, "density": 0.3, "search_steps": (1, 3), "min_tokens": 0},
    "vmoba": {"block_size": 16, "partitions": ((1, 3, 3), (3, 2, 2)), "min_tokens": 0},
    "paro": {"block_size": 16, "density": 0.4, "min_tokens": 0},
}
NO_WARM_UP = {"dense_steps": 0, "dense_layers": 0}
ALL_KEPT: dict[str, dict[str, Any]] = {
    "radial": {"decay_factor": 1e6, "adjacent_half_width": 1.0, "band_limit": 1},
    **{name: {"density": 1.0} for name in ("sparge", "adaspa", "vmoba", "paro")},
}


class Methods:
    """Makes processors with settings for tiny models, and the calibrations that PAROAttention needs."""

    def __init__(self, folder: Path, tiny_models: dict[str, Any]):
        self.folder, self.tiny_models = folder, tiny_models
        self._plans: dict[Any, str] = {}
        self._numbers = count()

    def make(self, method: str, plan: Callable[[float], str] | None = None, **settings: Any) -> Any:
        """A processor; `plan` gives the calibration of PAROAttention at a density."""
        settings = {**SMALL[method], **NO_WARM_UP, **settings}
        if method == "paro" and plan is not None:
            settings.setdefault("calibration", plan(settings["density"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnProcWarning)  # no warm-up, as we know
            return method_class(method)(**settings)

    def on(self, method: str, name: str, **settings: Any) -> Any:
        """A processor for one of the tiny models, or for a tiny pipeline around it."""
        return self.make(method, lambda density: self._model_plan(name, density), **settings)

    def at(self, method: str, call: Any, **settings: Any) -> Any:
        """A processor for one attention call, calibrated on it."""
        return self.make(method, lambda density: self._call_plan(call, density, settings.get("block_size")), **settings)

    def all_kept(self, method: str) -> dict[str, Any]:
        """Settings with which a method drops nothing."""
        return ALL_KEPT[method]

    def plan_of(self, model: Any, inputs: dict[str, Any], density: float) -> str:
        """Path of a calibration of a model."""

        def walk(processor: Any) -> None:
            attnproc.install(model, processor)
            with torch.no_grad():
                model(**inputs)

        path = self._calibrate(walk, density)
        attnproc.uninstall(model)
        return path

    def _model_plan(self, name: str, density: float) -> str:
        if (name, density) not in self._plans:
            tiny = self.tiny_models[name]
            self._plans[name, density] = self.plan_of(tiny.model(), tiny.inputs(2), density)
        return self._plans[name, density]

    def _call_plan(self, call: Any, density: float, block_size: int | None) -> str:
        return self._calibrate(lambda processor: processor.plan(call), density, block_size or 16)

    def _calibrate(self, walk: Callable[[Any], Any], density: float, block_size: int = 16) -> str:
        path = self.folder / f"{next(self._numbers)}.safetensors"
        processor = PAROCalibrationProcessor(block_size=block_size, density=density, slot_policy="uniform", slots=1)
        for _ in processor.rounds:
            walk(processor)
            processor.end_prompt()
            processor.end_round()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AttnProcWarning)  # tiny grids: much is forced
            processor.finish().save(path)
        return str(path)


@pytest.fixture(scope="session")
def methods(tmp_path_factory, tiny_models):
    """Makes processors of the sparse methods for tiny models."""
    return Methods(tmp_path_factory.mktemp("plans"), tiny_models)


@pytest.fixture(params=SMALL)
def method(request):
    """The name of each sparse method."""
    return request.param
