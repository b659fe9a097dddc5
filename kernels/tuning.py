"""Tiles that were fastest where they were measured: one JSON file per GPU model, shipped with the kernels.

``kernels/tiles-NAME.json`` holds what ``python -m benchmarks.kernel_tuning --ship`` made of a measured table. A call
that was measured (same kernel, type, shape, bits and groups, rows rounded up to a power of two) takes its tile, and so
does one of fewer than 16 rows where 16 were: tensor cores multiply 16 at a time, which take no longer when some of them
are empty. Any other, and any other GPU, takes the launcher's own heuristic. Nothing is timed when a model runs: a first
call compiles one program and no more.
"""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.kernels.launch import power_of_two

__all__ = ["file_name", "measured_tile", "tile_key"]


def file_name(gpu: str) -> str:
    """``NVIDIA H200`` -> ``tiles-nvidia-h200.json``."""
    return f"tiles-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def tile_key(kernel: str, rows: int, outputs: int, inputs: int, bits: int = 0, group_size: int = 0) -> str:
    """What a measured call is found by; ``bits`` and ``group_size`` are 0 for float weights."""
    return f"{kernel} {power_of_two(rows)}x{inputs}x{outputs} {bits} bits, groups of {group_size}"


def measured_tile(x: Tensor, kernel: str, outputs: int, dtype: torch.dtype, bits: int = 0, group_size: int = 0) -> Any:
    """The tile, a tuple, that ``kernel`` was fastest with for ``x`` [M, I] on this model of GPU; None: not measured.

    ``dtype`` is that of the floats whose size decides: the weight's where it is not packed, else ``x``'s.
    """
    if x.device.type != "cuda":
        return None
    rows, inputs = x.shape
    return _found(_gpu_name(x.device), dtype, kernel, rows, outputs, inputs, bits, group_size)


@lru_cache(maxsize=4096)
def _found(
    gpu: str, dtype: torch.dtype, kernel: str, rows: int, outputs: int, inputs: int, bits: int, group_size: int
) -> tuple[int, ...] | None:
    tiles = _tiles(gpu, str(dtype).removeprefix("torch."))
    keys = [tile_key(kernel, each, outputs, inputs, bits, group_size) for each in (rows, max(rows, 16))]
    return next((tiles[key] for key in keys if key in tiles), None)


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _tiles(gpu: str, dtype: str) -> dict[str, tuple[int, ...]]:
    path = Path(__file__).with_name(file_name(gpu))
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: tuple(tile) for key, tile in content["tiles"].items()} if content["dtype"] == dtype else {}
