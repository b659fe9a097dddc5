"""``compress::int8_linear`` and ``compress::int8_dynamic_linear``: bytes times bytes, the inputs rounded on the way.

    int8_linear(x)          =  Q(x) W^T + bias         Q: a calibrated grid, of the tensor or of each row
    int8_dynamic_linear(x)  =  the same                Q: the grid of the tensor's own range, or of each row's

Weights come as compress.kernels.int8_weight says, grids as compress.kernels.row_grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.dispatch import Call, Choice, choose
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.packed_linear import check_places, checked_bias, flat_rows, row_length
from compress.kernels.row_grid import RowGrid

__all__ = ["checked_int8", "choose_int8", "int8_dynamic_linear", "int8_linear"]


def choose_int8(x: Tensor, weight: Int8Weight) -> Choice:
    """The kernel that multiplies ``x`` [M, I] with ``weight``, and why others do not."""
    return choose(Call.on(x, "int8_linear", weight.codes.shape[0], bits=8, group_size=x.shape[1]))


def checked_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, row: tuple[int, ...]
) -> Int8Weight:
    """The weight, its parts checked against ``x``, each other and the shape of a ``row``, [I] or that of a kernel: a
    kernel would read past the end of wrong ones.

    Raises:
        ValueError: one has another size, type or device.
    """
    outputs = weight.shape[0] if weight.dim() else 0
    wanted = {
        "weight": (weight, torch.int8, (outputs, *row)),
        "weight_scale": (weight_scale, torch.float32, (outputs,)),
        "weight_sums": (weight_sums, torch.int32, (outputs,)),
    }
    for name, (part, dtype, shape) in wanted.items():
        if tuple(part.shape) != shape or part.dtype is not dtype or not part.is_contiguous():
            raise ValueError(
                f"{name} {part.dtype} {tuple(part.shape)}; {' x '.join(map(str, (outputs, *row)))} need contiguous "
                f"{dtype} {shape}"
            )
    check_places(x, weight=weight, weight_scale=weight_scale, weight_sums=weight_sums)
    return Int8Weight(weight, weight_scale, weight_sums)


def _run(x: Tensor, grid: RowGrid, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    flat = flat_rows(x)
    outputs = weight.codes.shape[0]
    bias = checked_bias(bias, outputs, x)
    if not (len(flat) and outputs):
        return x.new_empty(*x.shape[:-1], outputs)
    y: Tensor = choose_int8(flat, weight).run(flat, grid, weight, bias)
    return y.reshape(*x.shape[:-1], -1)


@torch.library.custom_op("compress::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """``x`` [..., I] of float16, bfloat16 or float32, rounded to a grid of ``bits``, times ``weight``: [..., O].

    Args:
        scale: float32 [], or one for each row of ``x``, [...]; ``zero_point`` uint8 or int8, of its shape.
        weight: int8 [O, I]; ``weight_scale`` float32 [O] and ``weight_sums`` int32 [O] as in Int8Weight.
        bias: [O].

    Raises:
        ValueError: parts have another size or type.
    """
    found = checked_int8(x, weight, weight_scale, weight_sums, (row_length(x),))
    check_places(x, scale=scale, zero_point=zero_point)
    if scale.numel() not in (1, x.numel() // x.shape[-1]) or scale.shape != zero_point.shape:
        raise ValueError(
            f"scale {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)}; x {tuple(x.shape)} needs one of "
            "each, or one of each a row"
        )
    if scale.dtype is not torch.float32 or zero_point.dtype not in (torch.uint8, torch.int8) or not 2 <= bits <= 8:
        raise ValueError(
            f"scale {scale.dtype}, zero_point {zero_point.dtype}, {bits} bits; grids are torch.float32, torch.uint8 or "
            "torch.int8, 2 to 8 bits"
        )
    grid = RowGrid("static", scale.reshape(-1).contiguous(), zero_point.reshape(-1).contiguous(), bits)
    return _run(x, grid, found, bias)


@torch.library.custom_op("compress::int8_dynamic_linear", mutates_args=())
def int8_dynamic_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, bias: Tensor | None, per_token: bool
) -> Tensor:
    """As :func:`int8_linear`, on the grid of the whole tensor's range, or with ``per_token`` of each row's own.

    Raises:
        ValueError: as there.
    """
    found = checked_int8(x, weight, weight_scale, weight_sums, (row_length(x),))
    return _run(x, RowGrid("token" if per_token else "tensor"), found, bias)


@int8_linear.register_fake
def _shape(x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@int8_dynamic_linear.register_fake
def _dynamic_shape(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
