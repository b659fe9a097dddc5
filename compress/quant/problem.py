"""One layer as its method sees it: tensors in, tensors out; the graph stays outside.

A method is a pure function: ``solve(problem, option, effort)`` returns a :class:`Solution` and never
scores itself; the error in the report is computed once, the same way for all, by whoever called it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.quant.weights import QuantizedWeight
from compress.records.layers import QuantOption

__all__ = ["STEP_SAMPLES", "ActivationGrid", "Effort", "LayerProblem", "Method", "RowSource", "Solution"]

STEP_SAMPLES = 32
"""Samples that an optimisation step takes, where neither the graph's batch nor large maps call for another number."""


class RowSource(Protocol):
    """Samples of one value, [N, ...], read a few at a time."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> Tensor:
        """The samples at ``index`` ([n] int64), as [n, ...]."""
        ...


@dataclass(frozen=True)
class ActivationGrid:
    """Grid of a layer's input: ``scale`` float32 [], ``zero_point`` in ``dtype``'s range, ``bits``.

    ``learnable`` says whether a method may change it; otherwise the samples are already on it. No step may exceed
    ``largest_scale``: a grid beyond all values wastes codes, and one beyond a ReLU6's bound keeps the ReLU6 from being
    absorbed.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    learnable: bool
    largest_scale: float = float("inf")


@dataclass(frozen=True)
class LayerProblem:
    """What a method may know of a layer.

    Attributes:
        name: for messages.
        weight: float32 ``[O, I/groups, *kernel]``.
        bias: float32 ``[O]`` or None.
        forward: ``(x, weight, bias) -> y``, the layer with its stride, padding and groups.
        relu: "relu", "relu6" or None: what alone reads the output.
        inputs: samples of the layer's input, before its own grid if that is learnable; None without data.
        targets: the float layer's output for the same samples; None without data.
        grid: grid of the input; None when the input stays float.
        gram: gram matrix [I, I] of the input on its grid, where it is known already.
        groups: of a convolution's channels.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    relu: str | None = None
    inputs: RowSource | None = None
    targets: RowSource | None = None
    grid: ActivationGrid | None = None
    gram: Tensor | None = None
    groups: int = 1

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation that alone reads the output, if there is one."""
        if self.relu == "relu":
            return torch.relu(y)
        return y.clamp(0.0, 6.0) if self.relu == "relu6" else y


@dataclass(frozen=True)
class Effort:
    """How long a method may work, and its seed."""

    iterations: int
    seed: int


@dataclass(frozen=True)
class Solution:
    """A layer's numbers: weight codes, bias [O] (None: as it was) and input grid (None: as it was)."""

    weight: QuantizedWeight
    bias: Tensor | None = None
    grid: ActivationGrid | None = None
    note: str | None = None


class Method(Protocol):
    """A row of the table of methods."""

    needs_data: bool
    """Whether ``inputs`` and ``targets`` must be there."""

    sequential: bool
    """Whether the inputs come from the already quantized prefix (True) or from the float model."""

    grouped: bool
    """Whether a channel's weights may have several grids (``QuantOption.group_size``)."""

    iterations: int
    """Optimisation steps where nothing else is asked for; 0 for methods that take none."""

    step_cost: float
    """What one such step takes, all layers together, in passes of ``STEP_SAMPLES`` through the float model."""

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Quantize one layer."""
        ...
