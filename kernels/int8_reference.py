"""The truth about integer linears, in plain PyTorch: codes multiplied as float64, which sums them exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.row_grid import RowGrid

__all__ = ["KERNEL", "int8_reference"]


def int8_reference(x: Tensor, grid: RowGrid, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``x`` [M, I], rounded to ``grid``, times ``weight`` [O, I], plus a bias [O]: [M, O] of ``x``'s dtype."""
    codes, scale, zero = grid.quantize(x)
    y = (codes - zero).double() @ weight.codes.double().T
    y = y * (scale * weight.scale)
    return (y if bias is None else y + bias.double()).to(x.dtype)


KERNEL = Kernel(
    run=int8_reference, requires=Requires(dtypes=(torch.float16, torch.bfloat16, torch.float32), capability=None)
)
