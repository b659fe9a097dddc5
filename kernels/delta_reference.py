"""The truth about linears over a base and sparse deltas, in plain PyTorch: each delta times its own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.delta_rows import DeltaRows
from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.lanes import LaneWeight
from compress.kernels.packed_reference import lane_weight_floats

__all__ = ["ADD", "KERNEL", "add_reference", "delta_reference"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def delta_reference(
    x: Tensor, base: Tensor | LaneWeight, deltas: DeltaRows, task: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """``x`` [M, I] to [M, O], of its dtype: row ``m`` times the base [O, I] plus delta ``task[m]``, rounded once."""
    weight = lane_weight_floats(base) if isinstance(base, LaneWeight) else base.float()
    y = x.float() @ weight.T
    for number in range(deltas.count):
        rows, columns, values = deltas.rows_of(number)
        own = slice(None) if task is None else (task == number).nonzero()[:, 0]
        difference = torch.zeros_like(weight).index_put_((rows, columns), values.float())
        y[own] += x[own].float() @ difference.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def add_reference(weight: Tensor, delta: DeltaRows, number: int = 0) -> None:
    """Add delta ``number`` of a stack to ``weight`` [O, ...], contiguous, in place; in float64, rounded once."""
    rows, columns, values = delta.rows_of(number)
    flat = weight.view(delta.outputs, delta.inputs)
    flat[rows, columns] = (flat[rows, columns].double() + values.double()).to(weight.dtype)


KERNEL = Kernel(run=delta_reference, requires=Requires(dtypes=_DTYPES, capability=None))
ADD = Kernel(run=add_reference, requires=Requires(dtypes=_DTYPES, capability=None))
