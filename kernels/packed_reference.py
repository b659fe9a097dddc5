"""The truth about a product with a packed weight, in plain PyTorch: unpack to float32, multiply, round once."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.lanes import LaneWeight, unpack_lanes
from compress.quant.weights import spread

__all__ = ["KERNEL", "lane_weight_floats", "packed_reference"]


def lane_weight_floats(weight: LaneWeight) -> Tensor:
    """The float32 matrix [O, I] that ``weight`` stands for."""
    codes = unpack_lanes(weight.units, weight.bits, weight.outputs, weight.inputs).float()
    shape = (weight.outputs, weight.inputs)
    zero_point = spread(weight.zero_point.float(), shape, weight.group_size)
    return (codes - zero_point) * spread(weight.scale.float(), shape, weight.group_size)


def packed_reference(
    x: Tensor, weight: LaneWeight, bias: Tensor | None = None, branch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x`` [M, I] times ``weight``, plus a ``branch`` (h [M, R], up [O, R]) and a bias [O]: [M, O], ``x``'s dtype."""
    y = x.float() @ lane_weight_floats(weight).T
    if branch:
        y += branch[0].float() @ branch[1].float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


KERNEL = Kernel(
    run=packed_reference, requires=Requires(dtypes=(torch.float16, torch.bfloat16, torch.float32), capability=None)
)
