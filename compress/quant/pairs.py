"""Pair-bounded grids: 8-bit weights whose integer products are exact on every processor.

Where a processor has no instruction for sums of byte products in 32 bits (x86 without VNNI), ONNX Runtime multiplies
unsigned by signed bytes with one that adds two neighbouring products in 16 bits and cuts off what lies beyond. Inputs
reach 255, so that two codes of one sign may come to 128 together: ``255 * 128 = 32,640 <= 32,767``. Where processors
negate bytes (Arm without dot products) the code -128 wraps; codes stay within -127..127.

A grid keeps both promises if its step is no smaller than the channel's largest pair of weights over 127: rounding to
nearest adds half a step each, rounding up both less than a whole one each. Neighbours are what the kernels take
together: channels of the group inside, kernel positions outside, the last of an odd row alone. Depthwise kernels add no
pairs.

Codes of 7 bits cannot reach the bound (``2 * 64 * 255 = 32,640``), nor can inputs of 7 bits (``254 * 127 = 32,258``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quant.problem import LayerProblem
from compress.records.layers import QuantOption

__all__ = [
    "LARGEST_CODE",
    "LARGEST_PAIR",
    "CodeBound",
    "bound_of",
    "in_kernel_order",
    "is_depthwise",
    "largest_pair",
    "step_bound",
]

LARGEST_CODE = 127
LARGEST_PAIR = 128
"""What two neighbouring codes of one sign may come to."""

# A hair below 127: weights that divide to whole numbers must not be rounded beyond them by the division itself.
_STEPS = LARGEST_CODE - 1e-3


@dataclass(frozen=True)
class CodeBound:
    """What the codes of an 8-bit weight keep within: -127..127, and 128 together where neighbours are added.

    Attributes:
        pairs: whether kernels add neighbours' products in 16 bits.
    """

    pairs: bool

    def smallest_step(self, weight: Tensor) -> Tensor:
        """The smallest step [O] for ``weight`` [O, I / groups, *kernel] that keeps its codes within."""
        return (largest_pair(weight) if self.pairs else weight.flatten(1).abs().amax(1)) / _STEPS


def bound_of(problem: LayerProblem, option: QuantOption) -> CodeBound | None:
    """What holds for the layer's codes; None where it is not on integers, or its codes are of fewer bits."""
    if option.bits < 8 or option.inputs == "float" or not option.symmetric:
        return None
    return CodeBound(pairs=option.act_bits == 8 and not is_depthwise(problem.weight, problem.groups))


def step_bound(problem: LayerProblem, option: QuantOption) -> Tensor | None:
    """What no step [O] of the layer's grids may be below; None: anything."""
    bound = bound_of(problem, option)
    return bound.smallest_step(problem.weight) if bound is not None else None


def largest_pair(weight: Tensor) -> Tensor:
    """The largest sum [O] of two neighbours' absolute values, where they have one sign, or of one, in each channel.

    Args:
        weight: [O, I / groups, *kernel], floats or codes around zero.
    """
    rows = in_kernel_order(weight)
    # Of two signs the sum is smaller than one of the two.
    extremes = (*rows.aminmax(dim=1), *rows.unflatten(1, (-1, 2)).sum(2).aminmax(dim=1))
    return torch.stack(extremes).abs().amax(0)


def in_kernel_order(weight: Tensor) -> Tensor:
    """``weight`` [O, I / groups, *kernel] as rows [O, K], neighbours side by side, with a zero where K is odd."""
    rows = weight.movedim(1, -1).flatten(1)
    return torch.nn.functional.pad(rows, (0, rows.shape[1] % 2))


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """Whether every output channel reads an input channel of its own."""
    return groups > 1 and weight.dim() > 2 and weight.shape[1] == 1 and len(weight) == groups
