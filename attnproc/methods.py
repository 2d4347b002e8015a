"""Methods by name, for settings files and the command line."""

import difflib
from importlib import import_module

from attnproc.errors import SettingsError
from attnproc.processor import AttnProcessor

METHODS = {
    "dense": "attnproc.processor:DenseAttnProcessor",
    "radial": "attnproc.sparse.radial:RadialAttnProcessor",
}


def method_class(name: str) -> type[AttnProcessor]:
    """The processor class of a method, such as "radial"."""
    if name not in METHODS:
        match = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {match[0]!r}?" if match else ""
        raise SettingsError(f"method {name!r} is not known; choose one of {', '.join(METHODS)}.{hint}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
