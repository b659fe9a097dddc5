"""Compile every kernel for GPUs that are not there. A program of its own: triton is imported without its interpreter.

Launchers are called as always, with tensors on the CPU and the device's properties made up; what they would launch is
compiled instead. ``python compile_launches.py ARCHITECTURE [BITS]`` prints a JSON list, a row for each launch; with
BITS those of packed weights of that width alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from compress.kernels import launch
from compress.kernels.conv_problem import ConvProblem
from compress.kernels.delta_add import delta_add
from compress.kernels.delta_gemv import delta_gemv
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.int8_conv import int8_conv
from compress.kernels.int8_dot import int8_dot, int8_fused
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.lanes import LaneWeight, unit_shape
from compress.kernels.packed_dot import packed_dot
from compress.kernels.packed_gemv import packed_gemv
from compress.kernels.packed_unpack import unpack_weight
from compress.kernels.row_grid import RowGrid
from compress.kernels.thin_dot import lowrank_dot
from compress.kernels.thin_gemv import lowrank_gemv

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTERS |= {torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")
INPUTS = OUTPUTS = 256
TILE = (128, 16, 2, 4, 3, 1)  # packed_dot's own for these outputs, but two splits, so that partial sums are added


def source_of(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What a launch would compile, and its options."""
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    signature = {name: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else "i32" for name, v in values.items()}
    # A launch tells the compiler the same about its arguments: which are 1, and which are multiples of 16.
    settings |= {name: 1 for name, v in values.items() if not isinstance(v, torch.Tensor) and v == 1}
    signature |= dict.fromkeys(settings, "constexpr")
    aligned = [i for i, v in enumerate(values.values()) if isinstance(v, torch.Tensor) or v % 16 == 0]
    return ASTSource(kernel, signature, settings, {(i,): [["tt.divisibility", 16]] for i in aligned}), options


def resources(cubin: bytes) -> dict[str, int]:
    """Registers that a thread takes, and bytes of what did not fit into them."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found, said.stdout
    return {"registers": int(found[1]), "spilled_bytes": int(found[2])}


class Recorder:
    """Stands in for launching: compiles for ``architecture`` and remembers what came of it, under ``label``."""

    def __init__(self, architecture: int, label: str) -> None:
        self.architecture = architecture
        self.label = label
        self.rows: list[dict[str, Any]] = []

    def method(self) -> Any:
        """To put in place of ``JITFunction.run``: a function, so that it is bound to the kernel."""
        return lambda kernel, *given, **named: self.compile(kernel, *given, **named)

    def compile(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        """Compile what would be launched."""
        source, options = source_of(kernel, arguments, settings)
        built = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        ptx = built.asm["ptx"]
        self.rows.append(
            {
                "kernel": kernel.fn.__name__,
                "case": self.label,
                "architecture": self.architecture,
                "target": next(line.split()[1] for line in ptx.splitlines() if line.startswith(".target")),
                "shared_bytes": built.metadata.shared,
                "tensor_cores": any(word in ptx for word in ("wgmma.mma_async", "mma.sync")),
                "flushes_subnormals": ".ftz" in ptx,
                "cubin_bytes": len(built.asm["cubin"]),
                **resources(built.asm["cubin"]),
            }
        )


def weight_of(bits: int, group_size: int = 128) -> LaneWeight:
    """A weight of zeros, scales in 16 bits."""
    units = torch.zeros(unit_shape(OUTPUTS, INPUTS, bits), dtype=torch.int16)
    grid = (OUTPUTS, INPUTS // group_size)
    return LaneWeight(
        units, torch.ones(grid, dtype=torch.float16), torch.ones(grid, dtype=torch.uint8), bits, INPUTS, group_size
    )


PACKED = {4: torch.float16, 3: torch.bfloat16, 8: torch.float32}


def compile_packed(architecture: int, widths: Iterable[int]) -> list[dict[str, Any]]:
    """The kernels that read packed weights, with a low-rank branch."""
    rows = []
    for bits in widths:
        dtype = PACKED[bits]
        recorder = Recorder(architecture, f"{bits} bits {dtype}")
        JITFunction.run = recorder.method()
        weight = weight_of(bits)
        branch = (torch.zeros(16, 32, dtype=dtype), torch.zeros(OUTPUTS, 32, dtype=dtype))
        packed_gemv(torch.zeros(1, INPUTS, dtype=dtype), weight, None, branch)
        packed_dot(torch.zeros(16, INPUTS, dtype=dtype), weight, None, branch, tile=TILE)
        unpack_weight(weight, dtype)
        rows += recorder.rows
    return rows


def compile_all(architecture: int) -> list[dict[str, Any]]:
    """Every kernel, at the widths and types that take different code."""
    # Triton's own stages give Ada the programs of Ampere, and no other takes as long to compile as 3 bits.
    rows = compile_packed(architecture, [bits for bits in PACKED if (architecture, bits) != (89, 3)])
    recorder = Recorder(architecture, "4 bits, one scale a row")
    JITFunction.run = recorder.method()
    weight = weight_of(4, INPUTS)
    packed_gemv(torch.zeros(1, INPUTS, dtype=torch.bfloat16), weight)
    packed_dot(torch.zeros(16, INPUTS, dtype=torch.bfloat16), weight)
    unpack_weight(weight, torch.bfloat16)
    rows += recorder.rows
    for dtype in (torch.bfloat16, torch.float32):
        recorder = Recorder(architecture, f"rank 32 {dtype}")
        JITFunction.run = recorder.method()
        up, down = torch.zeros(OUTPUTS, 32, dtype=dtype), torch.zeros(32, INPUTS, dtype=dtype)
        lowrank_gemv(torch.zeros(1, INPUTS, dtype=dtype), up, down)
        lowrank_dot(torch.zeros(16, INPUTS, dtype=dtype), up, down)
        rows += recorder.rows
        recorder = Recorder(architecture, f"delta {dtype}")
        JITFunction.run = recorder.method()
        x, y = torch.zeros(4, INPUTS, dtype=dtype), torch.zeros(4, OUTPUTS, dtype=dtype)
        delta = DeltaRows.from_flat((OUTPUTS, INPUTS), torch.arange(0, OUTPUTS * INPUTS, 20), torch.zeros(3277), dtype)
        delta_gemv(x, y, delta, None)
        delta_gemv(x, y, delta, torch.zeros(4, dtype=torch.int32))
        delta_add(up.new_zeros(OUTPUTS, INPUTS), delta)
        rows += recorder.rows
        recorder = Recorder(architecture, f"int8 {dtype}")
        JITFunction.run = recorder.method()
        codes = torch.zeros(OUTPUTS, INPUTS, dtype=torch.int8)
        weight8 = Int8Weight(codes, torch.ones(OUTPUTS), torch.zeros(OUTPUTS, dtype=torch.int32))
        static = RowGrid("static", torch.ones(1), torch.zeros(1, dtype=torch.uint8))
        int8_fused(x, static, weight8)
        int8_fused(torch.zeros(64, INPUTS, dtype=dtype), RowGrid("token"), weight8, torch.zeros(OUTPUTS, dtype=dtype))
        int8_dot(torch.zeros(200, INPUTS, dtype=dtype), RowGrid("tensor"), weight8)
        kernels = Int8Weight(codes.reshape(OUTPUTS, 2, 2, 64), weight8.scale, weight8.sums)
        image = torch.zeros(1, 64, 9, 9, dtype=dtype)
        problem = ConvProblem(static, (1, 1), (1, 1), (1, 1), 1, following=static)
        int8_conv(image, kernels, None, problem)
        int8_conv(image.to(torch.int8, memory_format=torch.channels_last), kernels, weight8.scale, problem)
        rows += recorder.rows
    return rows


if __name__ == "__main__":
    gpu, *widths_asked = map(int, sys.argv[1:])
    launch._properties = lambda device: (divmod(gpu, 10), 132)  # type: ignore[assignment,return-value]
    print(json.dumps(compile_packed(gpu, widths_asked) if widths_asked else compile_all(gpu)))
