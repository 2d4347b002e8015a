"""Model families: one file each. `family_of` finds the one for a model."""

from torch import nn

from attnproc.families.base import Family
from attnproc.families.cogvideox import CogVideoX
from attnproc.families.generic import Generic
from attnproc.families.hunyuan_video import HunyuanVideo
from attnproc.families.hunyuan_video15 import HunyuanVideo15
from attnproc.families.images import SD3, Flux, UNet
from attnproc.families.ltx import LTX
from attnproc.families.mochi import Mochi
from attnproc.families.wan import Wan

FAMILIES: tuple[Family, ...] = (
    Wan(),
    HunyuanVideo(),
    HunyuanVideo15(),
    CogVideoX(),
    Mochi(),
    LTX(),
    SD3(),
    Flux(),
    UNet(),
)


def family_of(model: nn.Module) -> Family:
    """The family of a model by the names of its classes; one that knows nothing about it if there is none."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names.intersection(family.models)), Generic())
