"""Where a loaded model runs: is the device there, and everything of a graph put onto it."""

from __future__ import annotations

import torch
from torch import fx

from compress.errors import InputError
from compress.graph.traced import TracedModel
from compress.kernels.dispatch import has_triton

__all__ = ["check_device", "move_graph"]


def check_device(device: str | torch.device) -> torch.device:
    """``device`` as torch has it, if a model can be loaded onto it.

    Raises:
        InputError: it is neither the CPU nor a GPU that is here, or triton is missing.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is none that torch knows; give cpu, cuda or cuda:1") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise InputError(f"device {device!r}: models are loaded onto cpu, cuda or cuda:1")
    if not torch.cuda.is_available():
        raise InputError(
            f"device {device!r}: torch {torch.__version__} finds no GPU here; load the model on the CPU, or check the "
            "driver and that torch is a build for CUDA"
        )
    if found.index is not None and found.index >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if not has_triton():
        raise InputError(
            f"device {device!r}: packed weights run on triton kernels, and triton is not installed; "
            "pip install 'compress-toolchain[gpu]'"
        )
    return found


def move_graph(traced: TracedModel, device: torch.device) -> torch.nn.Module:
    """The graph's module on ``device``, tensors and what it makes as it runs; ``traced`` is not to be used on."""
    for node in traced.graph.nodes:
        node.args, node.kwargs = (
            fx.node.map_aggregate(each, lambda value: device if isinstance(value, torch.device) else value)
            for each in (node.args, node.kwargs)
        )
    traced.module.recompile()
    return traced.module.to(device)
