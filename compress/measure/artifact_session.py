"""One finished folder opened in PyTorch for timing, on the CPU or a GPU: the same seam as an ONNX file's session.

Inputs are numpy arrays and outputs are fetched, as for files: on a GPU the copies to and from it are part of the time,
and a run has ended when its outputs are there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import InputError
from compress.files.known_folders import FAMILY_FILE
from compress.graph.traced import TracedModel, is_tokens
from compress.measure.onnx_session import InputSpec
from compress.records.layers import LayerRun
from compress.runtime.artifact import load_artifact
from compress.runtime.device import check_device
from compress.runtime.explain import explain
from compress.runtime.load import load_on
from compress.runtime.pack import packed_for_gpu

__all__ = ["OpenFolder", "explain_run", "open_folder", "start_torch"]

_TYPES = {torch.float32: "float", torch.float16: "float16", torch.float64: "double", torch.bool: "bool"}
_TYPES |= {getattr(torch, name): name for name in ("int8", "uint8", "int16", "int32", "int64")}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class OpenFolder:
    """An artifact on ``device``; ``load_ms`` is the time from the folder to a module that can run, disk included."""

    path: Path
    traced: TracedModel
    device: torch.device
    inputs: tuple[InputSpec, ...]
    load_ms: float

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Run once on ``feeds``, all outputs computed, fetched and dropped."""
        with torch.inference_mode():
            found = self.traced.module(*(torch.from_numpy(feeds[spec.name]).to(self.device) for spec in self.inputs))
            for each in (found,) if isinstance(found, Tensor) else found:
                each.cpu()

    def try_run(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Run once, kernels compiled as they are met; raises InputError where torch refuses the inputs or fails."""
        try:
            self.run(feeds)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            text = " ".join(str(error).split())
            raise InputError(f"{self.path}: torch cannot run it on {shapes or 'no inputs'}: {text}") from error

    def device_peak_bytes(self) -> int | None:
        """GPU memory that torch has had allocated at once so far; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def start_torch(device: str) -> None:
    """Run one operator on ``device``, so that no measured model pays for starting torch there.

    Raises:
        InputError: there is no such device.
    """
    (torch.ones(2, device=check_device(device)) * 2).cpu()


def open_folder(path: Path, device: str, dtype: str | None, threads: int) -> OpenFolder:
    """The artifact in ``path``, as :func:`compress.load` gives it.

    Threads are the process's own: they stay as they are set here.

    Raises:
        InputError: it is no finished folder, or there is no such ``device`` or ``dtype``.
    """
    if (path / FAMILY_FILE).is_file():
        raise InputError(f"{path}: a low-rank family has many sizes; `compress lowrank extract` one and export that")
    torch.set_num_threads(threads)
    start = time.perf_counter()
    traced = load_on(path, device, _dtype(dtype))
    load_ms = (time.perf_counter() - start) * 1e3
    return OpenFolder(path, traced, check_device(device), _inputs(traced), load_ms)


def explain_run(
    folder: OpenFolder, feeds: Mapping[str, NDArray[Any]], capability: tuple[int, int] | None, dtype: str | None
) -> list[LayerRun]:
    """What runs each layer on ``feeds``; with a ``capability``, what would on a GPU that is not here."""
    traced = folder.traced
    if capability is not None:
        traced = packed_for_gpu(load_artifact(folder.path), capability, _dtype(dtype))
    place = folder.device if capability is None else torch.device("cpu")
    return explain(traced, tuple(torch.from_numpy(feeds[spec.name]).to(place) for spec in folder.inputs), capability)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise InputError(f"dtype {name!r}: packed linears multiply in {' or '.join(_DTYPES)}; or leave it out")
    return _DTYPES[name] if name is not None else None


def _inputs(traced: TracedModel) -> tuple[InputSpec, ...]:
    """Each input under the names that the exported file has for it and its dynamic dimensions."""
    specs = []
    for name, x in zip(traced.input_names, traced.example, strict=True):
        shape: list[int | str | None] = list(x.shape)
        if traced.dynamic_batch:
            shape[0] = "batch"
        if traced.dynamic_length and is_tokens(x):
            shape[1] = "sequence"
        specs.append(InputSpec(name, f"tensor({_TYPES[x.dtype]})", tuple(shape)))
    return tuple(specs)
