"""Working out something about a tensor once, however often it is asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once(tensor: Tensor, compute: Callable[..., Any], *arguments: Any) -> Any:
    """compute(tensor, *arguments), worked out once for all calls with the same tensor object of the same contents.

    So that what waits for the device, such as reading lengths or checking values, does so once for all layers. What is
    computed must not hold on to the tensor. The function is part of the key: give a named one.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():  # these have no version to tell contents by
        return compute(tensor, *arguments)
    version, known = _known.get(tensor, (None, None))
    if version != tensor._version:
        version, known = tensor._version, {}
        _known[tensor] = version, known
    if (compute, *arguments) not in known:
        known[compute, *arguments] = compute(tensor, *arguments)
    return known[compute, *arguments]
