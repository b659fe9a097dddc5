"""What a convolution of bytes is asked for, its output's shape, and the truth about it in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.row_grid import RowGrid

__all__ = ["KERNEL", "ConvProblem", "conv_reference"]


@dataclass(frozen=True)
class ConvProblem:
    """A 2-d convolution, without its tensors.

    Attributes:
        grid: static, one for the whole input.
        stride, padding, dilation: rows, columns; padding is with zeros, on both sides.
        relu: whether outputs below zero become zero.
        following: the grid that outputs are rounded to, static, one for all; None: they are floats.
    """

    grid: RowGrid
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    relu: bool = False
    following: RowGrid | None = None

    def out_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the output."""
        found = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        ]
        return found[0], found[1]

    def new_output(self, x: Tensor, outputs: int, kernel: tuple[int, int]) -> Tensor:
        """Room for the output [B, O, H', W']: codes in channels-last order, which the next convolution reads in runs;
        floats in the order that whatever comes next was traced with."""
        shape = (x.shape[0], outputs, *self.out_size((x.shape[2], x.shape[3]), kernel))
        if self.following is not None:
            return torch.empty(shape, dtype=torch.int8, device=x.device, memory_format=torch.channels_last)
        return torch.empty(shape, dtype=torch.float32 if x.dtype is torch.int8 else x.dtype, device=x.device)


def conv_reference(x: Tensor, weight: Int8Weight, bias: Tensor | None, problem: ConvProblem) -> Tensor:
    """As int8_conv: codes multiplied as float64, which sums them exactly; rounded once."""
    grid = problem.grid
    assert grid.scale is not None
    if x.dtype is torch.int8:
        assert grid.zero_point is not None
        codes, zero = x.double(), grid.zero_point.double().reshape(()) - grid.offset
    else:
        flat, _, found = grid.quantize(x.reshape(1, -1))
        codes, zero = flat.reshape(x.shape).double(), found.double().reshape(())
    kernel = weight.codes.permute(0, 3, 1, 2).double()
    y = torch.nn.functional.conv2d(
        codes - zero, kernel, None, problem.stride, problem.padding, problem.dilation, problem.groups
    )
    y = y * (grid.scale.reshape(()) * weight.scale)[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    y = y.relu() if problem.relu else y
    out = problem.new_output(x, *_sizes(weight))
    if problem.following is not None:
        y = problem.following.quantize(y.reshape(1, -1))[0].reshape(out.shape)
    return out.copy_(y)


def _sizes(weight: Int8Weight) -> tuple[int, tuple[int, int]]:
    outputs, height, width, _ = weight.codes.shape
    return outputs, (height, width)


KERNEL = Kernel(
    run=conv_reference,
    requires=Requires(dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.int8), capability=None),
)
