"""A folder as a graph that runs on a device; checked, and run once on the CPU, before anything is put onto a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress.errors import InputError
from compress.graph.traced import TracedModel
from compress.runtime.artifact import load_artifact, tensors_digest
from compress.runtime.base import read_base
from compress.runtime.delta import add_to_graph
from compress.runtime.device import check_device, move_graph
from compress.runtime.pack import packed_for_gpu
from compress.sparse.delta import SparseDelta

__all__ = ["load_on"]


def load_on(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    deltas: Mapping[str, SparseDelta] | None = None,
    **adding: Any,
) -> TracedModel:
    """The artifact in ``folder`` with its module on ``device``, on a GPU with weights packed for kernels.

    Args:
        dtype: see :func:`~compress.runtime.pack.packed_for_gpu`.
        deltas, adding: see :func:`~compress.runtime.delta.add_to_graph`.

    Raises:
        InputError: the folder is not a finished artifact, or damaged; there is no such device; or ``dtype`` is given
            where it has no meaning; or a delta is for another base, or changes what the artifact does not have.
    """
    traced = load_artifact(folder)
    if deltas:
        add_to_graph(traced, read_base(folder, tensors_digest(folder)), deltas, **adding)
    place = check_device(device)
    if place.type == "cpu":
        if dtype is not None:
            raise InputError(f"dtype {dtype}: on the CPU an artifact runs as it was written; leave dtype out")
        return traced
    packed = packed_for_gpu(traced, torch.cuda.get_device_capability(place), dtype)
    move_graph(packed, place)
    return packed
