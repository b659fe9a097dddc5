"""compress: compress PyTorch models and deploy them. ``import compress; compress.quantize(model, calib=data, bits=4)``.

Names are resolved on first use, so that importing the package (and ``compress --help``) does not import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import allocate, apply, diff, export, inspect, load, quantize, stream, sweep, verify
    from compress.errors import CompressError, GateError, InfeasibleBudget, InputError
    from compress.measure.bench import bench
    from compress.options import Options, Search, Source

    __version__: str

# ONNX Runtime's own builds report to their maker unless told not to before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "CompressError",
    "GateError",
    "InfeasibleBudget",
    "InputError",
    "Options",
    "Search",
    "Source",
    "__version__",
    "allocate",
    "apply",
    "bench",
    "diff",
    "export",
    "inspect",
    "load",
    "quantize",
    "stream",
    "sweep",
    "verify",
]

_HOMES = {
    "CompressError": "compress.errors",
    "GateError": "compress.errors",
    "InfeasibleBudget": "compress.errors",
    "InputError": "compress.errors",
    "Options": "compress.options",
    "Search": "compress.options",
    "Source": "compress.options",
    "allocate": "compress.api",
    "apply": "compress.api",
    "bench": "compress.measure.bench",
    "diff": "compress.api",
    "export": "compress.api",
    "inspect": "compress.api",
    "load": "compress.api",
    "quantize": "compress.api",
    "stream": "compress.api",
    "sweep": "compress.api",
    "verify": "compress.api",
}


if not TYPE_CHECKING:  # else a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("compress-toolchain")
        if name not in _HOMES:
            raise AttributeError(f"module 'compress' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
