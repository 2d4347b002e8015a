"""Model families: one file each. `family_of` finds the one for a model."""

from torch import nn

from attnproc.families.base import Family
from attnproc.families.wan import Wan

FAMILIES: tuple[Family, ...] = (Wan(),)


def family_of(model: nn.Module) -> Family | None:
    """The family of a model by the names of its classes, or None."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names.intersection(family.models)), None)
