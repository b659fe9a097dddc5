"""A folder as a graph that runs on a device; checked, and run once on the CPU, before anything is put onto a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.artifact import load_artifact
from compress.errors import InputError
from compress.graph.traced import TracedModel
from compress.runtime.device import check_device, move_graph
from compress.runtime.pack import packed_for_gpu

__all__ = ["load_on"]


def load_on(folder: Path, device: str | torch.device, dtype: torch.dtype | None = None) -> TracedModel:
    """The artifact in ``folder`` with its module on ``device``, on a GPU with weights packed for kernels.

    Args:
        dtype: see :func:`~compress.runtime.pack.packed_for_gpu`.

    Raises:
        InputError: the folder is not a finished artifact, or damaged; there is no such device; or ``dtype`` is given
            where it has no meaning.
    """
    traced = load_artifact(folder)
    place = check_device(device)
    if place.type == "cpu":
        if dtype is not None:
            raise InputError(f"dtype {dtype}: on the CPU an artifact runs as it was written; leave dtype out")
        return traced
    packed = packed_for_gpu(traced, torch.cuda.get_device_capability(place), dtype)
    move_graph(packed, place)
    return packed
