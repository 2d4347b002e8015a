"""Methods by name, for settings files and the command line."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from attnproc.errors import SettingsError
from attnproc.processor import AttnProcessor

if TYPE_CHECKING:
    from attnproc.calibration import CalibrationProcessor

METHODS = {
    "dense": "attnproc.processor:DenseAttnProcessor",
    "radial": "attnproc.sparse.radial:RadialAttnProcessor",
    "sparge": "attnproc.sparse.sparge:SpargeAttnProcessor",
    "adaspa": "attnproc.sparse.adaspa:AdaSpaAttnProcessor",
    "paro": "attnproc.sparse.paro:PAROAttnProcessor",
    "vmoba": "attnproc.sparse.vmoba:VMoBAAttnProcessor",
}


# Processors that make the calibrations of the methods that have one.
CALIBRATIONS = {
    "paro": "attnproc.sparse.paro_calibration:PAROCalibrationProcessor",
    "sparge": "attnproc.sparse.sparge_tune:SpargeCalibrationProcessor",
}


def method_class(name: str) -> type[AttnProcessor]:
    """The processor class of a method, such as "radial"."""
    return _class(METHODS, name, "method")


def calibration_class(name: str) -> "type[CalibrationProcessor]":
    """The class that makes the calibration of a method, such as "paro"."""
    return _class(CALIBRATIONS, name, "method with a calibration")


def _class(known: dict[str, str], name: str, what: str) -> type:
    if name not in known:
        match = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {match[0]!r}?" if match else ""
        raise SettingsError(f"{what} {name!r} is not known; choose one of {', '.join(known)}.{hint}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
