"""Deployment targets as data: which formats they run, and how they store activations."""

from __future__ import annotations

from dataclasses import dataclass

from compress.errors import InputError

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """Where the exported file is to run.

    Attributes:
        name: as given to ``--target``.
        description: one line for people.
        activation_type: "uint8" or "int8".
        formats: legal formats, by name (compress/formats.py), the preferred first.
        provider: ONNX Runtime execution provider that checks and times it.
        integer_channels: leading convolutions with fewer output channels run faster on floats; 0 where not measured.
    """

    name: str
    description: str
    activation_type: str
    formats: tuple[str, ...]
    provider: str
    integer_channels: int


TARGETS = {
    "onnx-cpu": Target(
        "onnx-cpu",
        "ONNX Runtime on x86-64 with VNNI: unsigned activations, signed weights (U8S8)",
        "uint8",
        ("integer", "dynamic", "matmul-nbits", "gather-blocks", "float-weights"),
        "CPUExecutionProvider",
        # MLAS works on 16 output channels at a time: MobileNetV1 0.25's first two layers (8 channels, 112x112) take
        # 0.21 and 0.17 ms on integers against 0.09 and 0.04 ms on floats (benchmarks/results).
        integer_channels=16,
    ),
    "onnx-arm": Target(
        "onnx-arm",
        "ONNX Runtime on Arm: signed activations and weights (S8S8)",
        "int8",
        ("integer", "dynamic", "matmul-nbits", "gather-blocks", "float-weights"),
        "CPUExecutionProvider",
        integer_channels=0,
    ),
}


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        InputError: there is none; the message lists them.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
