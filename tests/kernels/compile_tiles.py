"""How much shared memory packed_dot asks for with tiles of its own choice. A program, as compile_launches.py is one.

Compiled as far as shared memory is laid out, which takes a fraction of the time that machine code takes.
``python compile_tiles.py`` prints a JSON list, a row for each case.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from compile_launches import source_of
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptx_version_from_options
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from compress.kernels import launch
from compress.kernels.lanes import LaneWeight, unit_shape
from compress.kernels.packed_dot import packed_dot
from compress.kernels.packed_tile import Step

INPUTS = 1024
# Architecture, rows, outputs, bits, inputs of a group, type, rank of a branch.
CASES = (
    (90, 64, 16384, 2, INPUTS, torch.bfloat16, 0),
    (80, 64, 8192, 4, INPUTS, torch.float32, 0),
    (89, 64, 8192, 2, INPUTS, torch.bfloat16, 0),
    (89, 16, 8192, 4, 128, torch.float32, 128),
    (89, 32, 4096, 3, INPUTS, torch.bfloat16, 0),
    (90, 64, 8192, 4, 128, torch.float32, 0),
)


def shared_bytes(source: ASTSource, architecture: int, given: dict[str, Any]) -> int:
    """Shared memory of a program of ``source``."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    options = backend.parse_options(given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = (backend.get_codegen_implementation(options), backend.get_module_map())
    module = source.make_ir(target, options, *helpers, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    for name in ("ttir", "ttgir"):
        module = stages[name](module, {"target": target, **options.__dict__})
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    version = get_ptx_version_from_options(options, architecture)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, architecture, version)
    manager.run(module, "allocate")
    return int(module.get_int_attr("ttg.shared"))


def shared_of(
    architecture: int, rows: int, outputs: int, bits: int, group_size: int, dtype: torch.dtype, rank: int
) -> dict[str, Any]:
    """What a call asks for, in bytes, and at most how much the launcher foresaw."""
    launch._properties = lambda device: (divmod(architecture, 10), 132)  # type: ignore[assignment,return-value]
    found: dict[str, Any] = {}

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        source, options = source_of(kernel, arguments, settings)
        if kernel.fn.__name__ == "packed_dot_fwd_kernel":
            step = Step(settings["U"], bits, dtype.itemsize, architecture >= 90, rank)
            found["foreseen"] = step.shared(settings["N"], settings["M"], settings["STAGES"])
            found["shared_bytes"] = shared_bytes(source, architecture, options)

    JITFunction.run = run
    units = torch.zeros(unit_shape(outputs, INPUTS, bits), dtype=torch.int16)
    grids = (outputs, INPUTS // group_size)
    scale, zero_point = torch.ones(grids, dtype=torch.float16), torch.ones(grids, dtype=torch.uint8)
    weight = LaneWeight(units, scale, zero_point, bits, INPUTS, group_size)
    branch = (torch.zeros(rows, rank, dtype=dtype), torch.zeros(outputs, rank, dtype=dtype)) if rank else None
    packed_dot(torch.zeros(rows, INPUTS, dtype=dtype), weight, None, branch)
    return {**found, "architecture": architecture}


if __name__ == "__main__":
    print(json.dumps([shared_of(*case) for case in CASES]))
