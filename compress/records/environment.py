"""The machine and the versions that something was measured on."""

from __future__ import annotations

from pydantic import Field

from compress.records.layers import Record

__all__ = ["Environment"]


class Environment(Record):
    """Processor, memory and versions. A version is None when the package is not installed."""

    cpu: str = Field(description="the processor's own name, or its architecture where it has none")
    cpu_flags: tuple[str, ...] = Field(description="instruction sets that decide speed; empty also where unknown")
    architecture: str
    cores: int | None = Field(description="physical cores; None where the system does not say")
    usable_cpus: int = Field(description="logical processors this process may run on")
    memory_bytes: int
    system: str
    python: str
    torch: str | None
    onnxruntime: str | None
    onnx: str | None
    numpy: str | None
