"""Where integers pay: measured once for each instruction set, and shipped, so that a plan is the same on every machine.

``instruction_sets.json`` is written by ``python -m benchmarks.integers_pay``, which times pairs of operators of ONNX
Runtime on one thread; a few older figures of whole nets stand in it by hand, with their source. A set may have several
measurements, of several processors; the slowest counts. What was not measured is not in it, and decides nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from compress.errors import InputError
from compress.records.layers import LayerSpec, Record

__all__ = [
    "ANY",
    "DATA_FILE",
    "InstructionSet",
    "Measurement",
    "Place",
    "Speed",
    "instruction_sets",
    "kind_of",
    "sets_of",
    "slowest",
]

DATA_FILE = Path(__file__).with_suffix(".json")
Place = Literal["first", "behind floats", "elsewhere"]
ANY = "any"
_IMAGE_CHANNELS = 4  # a convolution of so many inputs, at most, reads an image


class Speed(Record):
    """Float time over integer time of one kind of layer: above 1 integers pay. None: not measured.

    Where several sizes were measured, that of the size at which integers do best.
    """

    kind: str = Field(description="as kind_of says")
    least: int = Field(description="output channels from which it holds")
    below: int | None = Field(description="and below which; None: without end")
    alone: float | None = Field(description="the two kernels")
    placed: float | None = Field(
        description="with what a change of numbers costs: of a convolution among integer layers, of a linear among "
        "float ones"
    )

    leading: float | None = Field(
        None, description="of a model's first convolution: with the casts and changes of memory layout around it"
    )

    def of(self, place: Place) -> float | None:
        """The one that counts at ``place``."""
        return {"first": self.leading, "behind floats": self.alone, "elsewhere": self.placed}[place]


class Measurement(Record):
    """What one processor came to."""

    processor: str
    flags: tuple[str, ...] = Field(description="instruction sets that were in use, of those that decide speed")
    onnxruntime: str
    date: str
    source: str = Field(description="how it was measured")
    speeds: tuple[Speed, ...]


class InstructionSet(Record):
    """One value of ``--for``; without measurements where there was no such machine."""

    title: str
    target: str = Field(description="the target whose files run on it")
    measurements: tuple[Measurement, ...]


@functools.cache
def instruction_sets() -> dict[str, InstructionSet]:
    """All of them by name, as shipped."""
    return TypeAdapter(dict[str, InstructionSet]).validate_json(DATA_FILE.read_bytes())


def sets_of(name: str, target: str) -> tuple[str, ...]:
    """The sets that ``name`` stands for where files are made for ``target``.

    Raises:
        InputError: the name is unknown, or its machines do not run that target's files.
    """
    known = instruction_sets()
    if name == ANY:
        return tuple(each for each, found in known.items() if found.target == target)
    if name not in known:
        raise InputError(f"--for {name}: known are {', '.join(known)} and {ANY}")
    if known[name].target != target:
        raise InputError(f"--for {name} goes with --target {known[name].target}, not {target}; leave out one of them")
    return (name,)


def kind_of(layer: LayerSpec, *, dynamic: bool = False) -> str:
    """The kind of layer that speeds are kept by."""
    if layer.kind == "linear":
        rows = "many rows" if layer.rows > layer.calls else "one row"
        return f"{'dynamic ' if dynamic else ''}linear, {rows}"
    if layer.kind == "conv1d":
        return "conv1d" if layer.groups == 1 else "grouped conv1d"
    if layer.groups > 1:
        return "depthwise conv" if layer.weight_shape[1] == 1 else "grouped conv"
    if layer.weight_shape[1] <= _IMAGE_CHANNELS:
        return "conv of an image"
    return "conv 1x1" if set(layer.weight_shape[2:]) == {1} else "conv 3x3"


def slowest(layer: LayerSpec, sets: Sequence[str], place: Place, *, dynamic: bool = False) -> tuple[float, str] | None:
    """The lowest measured speed of integers for ``layer`` on ``sets``, and whose it is; None: nowhere measured."""
    kind, channels = kind_of(layer, dynamic=dynamic), layer.weight_shape[0]
    found = []
    for name in sets:
        for measurement in instruction_sets()[name].measurements:
            for speed in measurement.speeds:
                inside = speed.least <= channels and (speed.below is None or channels < speed.below)
                if speed.kind == kind and inside and (value := speed.of(place)) is not None:
                    following = next((s for s in measurement.speeds if s.kind == kind and s.least == speed.below), None)
                    found.append((_between(value, speed, following, channels, place), name))
    return min(found, default=None)


def _between(value: float, speed: Speed, following: Speed | None, features: int, place: Place) -> float:
    """A linear's ``value`` grows evenly to the next row's; convolutions work on 16 channels at a time, in steps."""
    upper = following.of(place) if following is not None else None
    if "linear" not in speed.kind or speed.least == 1 or following is None or upper is None:
        return value
    share = math.log(features / speed.least) / math.log(following.least / speed.least)
    return float(value * (upper / value) ** share)
