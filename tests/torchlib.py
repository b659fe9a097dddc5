"""The exporter's table of what ONNX operators are made of, built once a process instead of once an export."""

from __future__ import annotations

import functools
import gc
import sys
from typing import Any


def keep_torchlib() -> None:
    """From now on, or not at all where torch has it elsewhere: half a second an export, the same table every time."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry: Any = getattr(module, "ONNXRegistry", None)
    if registry is None or hasattr(registry.from_torchlib, "kept"):
        return

    @functools.cache
    def build(opset_version: int) -> Any:
        made = registry_from_torchlib(opset_version)
        gc.collect()
        gc.freeze()  # it stays, and every collection during an export would walk it: a tenth of the time
        return made

    registry_from_torchlib = registry.from_torchlib

    def from_torchlib(cls: Any, opset_version: int) -> Any:
        kept, made = build(opset_version), cls()
        made._opset_version = kept._opset_version
        # An export adds operators of its own.
        made.functions = {target: list(found) for target, found in kept.functions.items()}
        return made

    from_torchlib.kept = True  # type: ignore[attr-defined]
    registry.from_torchlib = classmethod(from_torchlib)
