"""``compress::int8_conv2d`` and ``compress::dequantize_codes``: a convolution of bytes, and bytes back to floats.

    int8_conv2d(x)        =  R(relu(conv(Q(x), W) + bias))      Q: the input's grid; R: the next layer's, or none
    dequantize_codes(q)   =  (q - zero_point) * scale

Between two convolutions bytes are passed on as they are, so that nothing is rounded twice and memory moves a quarter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.conv_problem import ConvProblem
from compress.kernels.dispatch import Call, Choice, choose
from compress.kernels.int8_linear import checked_int8
from compress.kernels.packed_linear import check_places, checked_bias
from compress.kernels.row_grid import RowGrid

__all__ = ["choose_conv", "dequantize_codes", "int8_conv2d"]


def choose_conv(x: Tensor, positions: int, outputs: int, inputs: int, groups: int) -> Choice:
    """The kernel of a convolution of ``x`` with ``positions`` of ``outputs``, each from ``inputs`` of its group."""
    return choose(Call.on(x, "int8_conv2d", outputs, positions, inputs, bits=8, group_size=inputs, groups=groups))


def _static(x: Tensor, name: str, scale: Tensor, zero_point: Tensor, bits: int) -> RowGrid:
    check_places(x, scale=scale, zero_point=zero_point)
    if scale.numel() != 1 or zero_point.numel() != 1 or scale.dtype is not torch.float32:
        raise ValueError(f"{name}: scale {scale.dtype} {tuple(scale.shape)}; a convolution takes one torch.float32")
    if zero_point.dtype not in (torch.uint8, torch.int8) or not 2 <= bits <= 8:
        raise ValueError(f"{name}: zero_point {zero_point.dtype}, {bits} bits; allowed: uint8 or int8, 2 to 8 bits")
    return RowGrid("static", scale.reshape(-1), zero_point.reshape(-1), bits)


def _pair(name: str, values: list[int], least: int) -> tuple[int, int]:
    if len(values) not in (1, 2) or min(values) < least:
        raise ValueError(f"{name} {values}; a convolution takes one number for both sides, or two, from {least} on")
    return (values[0], values[-1])


def _problem(
    grid: RowGrid, stride: list[int], padding: list[int], dilation: list[int], groups: int, relu: bool,
    following: RowGrid | None,
) -> ConvProblem:  # fmt: skip
    sizes = (_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1))
    return ConvProblem(grid, *sizes, groups, relu, following)


@torch.library.custom_op("compress::int8_conv2d", mutates_args=())
def int8_conv2d(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    bits: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    relu: bool = False,
    next_scale: Tensor | None = None,
    next_zero_point: Tensor | None = None,
    next_bits: int = 8,
) -> Tensor:
    """``x`` [B, C, H, W], floats or int8 codes of its grid, to [B, O, H', W']: floats, or int8 codes of the next grid.

    Args:
        scale: float32, one; ``zero_point`` uint8 or int8, one: the input's grid of ``bits``.
        weight: int8 [O, kernel height, kernel width, C / groups]; ``weight_scale``, ``weight_sums`` as in Int8Weight.
        bias: [O].
        stride: rows and columns, or one number for both; so ``padding`` (with zeros) and ``dilation``.
        next_scale: with ``next_zero_point``, a grid of ``next_bits`` that outputs are rounded to.

    Raises:
        ValueError: parts have another size, type or device, or there is a scale or zero point of the next grid alone.
    """
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(
            f"weight {tuple(weight.shape)}; a convolution takes [O, kernel height, kernel width, C / groups], none of "
            "them 0"
        )
    outputs, kernel_h, kernel_w, channels = weight.shape
    if x.dim() != 4 or groups < 1 or x.shape[1] != channels * groups or outputs % groups:
        raise ValueError(
            f"x {tuple(x.shape)} in {groups} groups; a weight {tuple(weight.shape)} needs "
            f"[B, {channels * groups}, H, W]"
        )
    inputs = channels * kernel_h * kernel_w
    found = checked_int8(x, weight, weight_scale, weight_sums, (kernel_h, kernel_w, channels))
    bias = checked_bias(bias, outputs, x)
    following = None
    if (next_scale is None) != (next_zero_point is None):
        raise ValueError("one of next_scale and next_zero_point; a next grid has both, and floats have neither")
    if next_scale is not None and next_zero_point is not None:
        following = _static(x, "the next grid", next_scale, next_zero_point, next_bits)
    grid = _static(x, "the input's grid", scale, zero_point, bits)
    problem = _problem(grid, stride, padding, dilation, groups, relu, following)
    out_h, out_w = problem.out_size((x.shape[2], x.shape[3]), (kernel_h, kernel_w))
    if out_h < 1 or out_w < 1:
        raise ValueError(f"x {tuple(x.shape)} is smaller than the kernel, {kernel_h} x {kernel_w}")
    positions = x.shape[0] * out_h * out_w
    if not positions:
        return problem.new_output(x, outputs, (kernel_h, kernel_w))
    y: Tensor = choose_conv(x, positions, outputs, inputs, groups).run(x, found, bias, problem)
    return y


@int8_conv2d.register_fake
def _shape(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
    bias: Tensor | None, bits: int, stride: list[int], padding: list[int], dilation: list[int], groups: int = 1,
    relu: bool = False, next_scale: Tensor | None = None, next_zero_point: Tensor | None = None, next_bits: int = 8,
) -> Tensor:  # fmt: skip
    following = RowGrid("static") if next_scale is not None else None
    problem = _problem(RowGrid("static"), stride, padding, dilation, groups, relu, following)
    return problem.new_output(x, weight.shape[0], (weight.shape[1], weight.shape[2]))


@torch.library.custom_op("compress::dequantize_codes", mutates_args=())
def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """int8 ``codes`` of any shape, of the grid of ``scale`` and ``zero_point``, one each, as float32, contiguous.

    Raises:
        ValueError: codes are of another type, or there are several scales or zero points.
    """
    if codes.dtype is not torch.int8 or scale.numel() != 1 or zero_point.numel() != 1:
        raise ValueError(
            f"codes {codes.dtype}, scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)}; codes are "
            "torch.int8, of one scale and one zero point"
        )
    offset = 128 if zero_point.dtype is torch.uint8 else 0
    floats = codes.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.sub_(zero_point.float() - offset).mul_(scale)


@dequantize_codes.register_fake
def _codes_shape(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
