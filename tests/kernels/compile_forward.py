"""Machine code of the Triton forward for GPUs that need not be here: `python tests/kernels/compile_forward.py`.

Takes lines "capability, name of a call" on standard input and prints a JSON object for each: what the kernel of that
call looks like on that GPU. The call goes through `triton_forward.forward`, on CPU tensors, up to the launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnproc.kernels import BlockMask, ChunkBits, Ranges, launch, triton_forward
from attnproc.kernels.attention import make_request

GPU_CLASSES = {80: "sm80", 86: "sm89", 89: "sm89", 90: "sm90", 100: "sm100", 120: "sm89"}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def call(name: str):
    """A request by its features, such as "bf16 D128 128x64 ranges": dtype, head_dim, block size, then options."""
    words = name.split()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[words[0]]
    head_dim, block_size = int(words[1][1:]), tuple(int(n) for n in words[2].split("x"))
    options, tokens = words[3:], 512
    grid = [tokens // size for size in block_size]
    blocks, mask_options = torch.ones(grid, dtype=torch.bool), {}
    if "ranges" in options:
        table = torch.zeros(tokens, 2, dtype=torch.int32)
        mask_options = {"partial": blocks, "rule": Ranges(table, table, table + 1)}
    if "chunks" in options:
        bits = torch.zeros(1, 1, tokens, 1, dtype=torch.int32)
        mask_options = {"partial": blocks, "rule": ChunkBits(bits, torch.zeros(grid[1], dtype=torch.int32))}
    if "ragged" in options:
        offsets = [torch.arange(0, tokens + 1, size, dtype=torch.int32) for size in block_size]
        mask_options |= {"query_offsets": offsets[0], "key_offsets": offsets[1]}
    mask = BlockMask.from_blocks(blocks & ("partial" not in mask_options), tokens, tokens, block_size, **mask_options)
    if "padded" in options:
        mask = mask.with_key_valid(torch.tensor([tokens - 3]))
    tensors = (torch.zeros(1, 2, tokens, head_dim, dtype=dtype) for _ in range(3))
    return make_request(
        *tensors,
        mask,
        key_bias=torch.zeros(1, 2, grid[1]) if "bias" in options else None,
        token_order=torch.arange(tokens)[None].expand(2, -1) if "order" in options else None,
        skip_threshold=5.0 if "skip" in options else None,
        quantization=next((word for word in options if word.startswith("int8")), None),
    )


def compile_call(capability: int, name: str, shape: launch.LaunchShape | None = None, kernel=None):
    """The compiled kernel of a call, and how it would be launched."""
    kernel = triton_forward.forward_kernel if kernel is None else kernel
    launched = {}

    class Launcher:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.update(arguments=arguments, options=options)

    with (
        mock.patch.object(triton_forward, "forward_kernel", Launcher()),
        mock.patch.object(launch, "gpu_class", lambda tensor: GPU_CLASSES[capability]),
    ):
        triton_forward.forward(call(name), shape)
    options = {name: launched["options"].pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, hints = {}, {}, {}
    values = dict(zip(kernel.arg_names, launched["arguments"], strict=False)) | launched["options"]
    for place, argument in enumerate(kernel.arg_names):
        value = values[argument]
        if value is None or argument.isupper() or (isinstance(value, int) and value == 1):
            signature[argument] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[argument] = TYPES[value.dtype]
            hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), launched[
        "options"
    ] | options


def describe(compiled) -> dict:
    """Registers, bytes of stack (spilled registers), shared memory, and counts of the instructions that matter."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True)
        code = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    words = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE)
    count = {word: words.count(word) for word in ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "LDL", "STL")}
    copies = {
        word: words.count(word) for word in ("LDGSTS", "LDG", "I2F", "F2I", "MUFU", "UTCHMMA", "UTCIMMA", "UTCQMMA")
    }
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "instructions": len(words),
        **{word: n for word, n in (count | copies).items() if n},
    }


if __name__ == "__main__":
    for line in sys.stdin:
        capability, name = line.strip().split(", ")
        compiled, launched = compile_call(int(capability), name)
        shape = [launched[key] for key in ("QUERY_TILE", "KEY_TILE", "num_warps", "num_stages")]
        gpu = GPU_CLASSES[int(capability)]
        print(json.dumps({"call": line.strip(), "gpu": gpu, "shape": shape, **describe(compiled)}), flush=True)
