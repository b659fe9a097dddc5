"""Deployment targets as data: which formats they run, and how they store activations.

Which layers are faster on floats is a matter of the processor: compress/quant/instruction_sets.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.errors import InputError
from compress.quant.instruction_sets import instruction_sets, sets_of

__all__ = ["TARGETS", "Target", "choose_target", "find_target"]


@dataclass(frozen=True)
class Target:
    """Where the exported file is to run.

    Attributes:
        name: as given to ``--target``.
        description: one line for people.
        activation_type: "uint8" or "int8".
        formats: legal formats, by name (compress/quant/formats.py), the preferred first.
        provider: ONNX Runtime execution provider that checks and times it.
    """

    name: str
    description: str
    activation_type: str
    formats: tuple[str, ...]
    provider: str


TARGETS = {
    "onnx-cpu": Target(
        "onnx-cpu",
        "ONNX Runtime on any x86-64: unsigned activations, signed weights (U8S8)",
        "uint8",
        ("integer", "dynamic", "matmul-nbits", "gather-blocks", "float-weights"),
        "CPUExecutionProvider",
    ),
    "onnx-arm": Target(
        "onnx-arm",
        "ONNX Runtime on Arm: signed activations and weights (S8S8)",
        "int8",
        ("integer", "dynamic", "matmul-nbits", "gather-blocks", "float-weights"),
        "CPUExecutionProvider",
    ),
}


def choose_target(name: str | None, machine: str) -> str:
    """The target asked for, or the one whose files run on ``machine``, a name from compress/quant/instruction_sets.py
    or any.

    Raises:
        InputError: one is unknown, or they do not go together.
    """
    if name is None:
        known = instruction_sets()
        name = known[machine].target if machine in known else "onnx-cpu"
    find_target(name)
    sets_of(machine, name)
    return name


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        InputError: there is none; the message lists them.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]
