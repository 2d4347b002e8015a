"""Machine code of the Triton backward for GPUs that need not be here: `python tests/kernels/compile_backward.py`.

As compile_forward.py, for the kernels of dQ and of dK and dV.
"""

import json
import sys
from unittest import mock

# First: it takes Triton out of the interpreter.
from compile_forward import GPU_CLASSES, TYPES, call, describe

# isort: split
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnproc.kernels import triton_backward

KERNELS = ("query_kernel", "key_kernel")


class Launcher:
    """Stands for a kernel and keeps what it would be launched with."""

    def __init__(self):
        self.arguments, self.options = (), {}

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.arguments, self.options = arguments, options

        return launch


def compile_call(capability: int, name: str, kernel_name: str):
    """The compiled kernel of a call, and the options of its launch."""
    kernel, request = getattr(triton_backward, kernel_name), call(name)
    launchers = {name: Launcher() for name in (*KERNELS, "delta_kernel")}
    with (
        mock.patch.multiple(triton_backward, **launchers),
        mock.patch.object(triton_backward, "gpu_class", lambda tensor: GPU_CLASSES[capability]),
    ):
        lse = torch.zeros(request.query.shape[:3])
        triton_backward.backward(request, request.query, lse, request.query, lse)
    launched = launchers[kernel_name]
    options = {name: launched.options.pop(name) for name in ("num_warps", "num_stages")}
    values = dict(zip(kernel.arg_names, launched.arguments, strict=False)) | launched.options
    signature, constants, hints = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        value = values[argument]
        if argument.isupper() or (isinstance(value, int) and value == 1):
            signature[argument], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[argument] = (TYPES | {torch.int64: "*i64"})[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled, launched.options | options


if __name__ == "__main__":
    for line in sys.stdin:
        capability, name, kernel = line.strip().split(", ")
        compiled, launched = compile_call(int(capability), name, kernel)
        shape = [launched[key] for key in ("QUERY_TILE", "KEY_TILE", "num_warps", "num_stages")]
        print(json.dumps({"call": line.strip(), "shape": shape, **describe(compiled)}), flush=True)
