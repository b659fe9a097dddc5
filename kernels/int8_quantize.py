"""Rows of floats to bytes: ranges where a grid follows from them, and codes, for products and on their own.

Arithmetic is kernels/row_grid.py's, division and rounding exact: the codes are the reference's. So is what becomes of
NaN: a range with one is NaN, and so are scale and outputs; on a calibrated grid it is the lowest code. To carry it
through there would take a register for every input of a step, and products of 64 rows have none left.

Alphabet as in packed_gemv.py; M rows, K inputs of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.launch import launch_options, on_its_device, overlaps, power_of_two
from compress.kernels.row_grid import RowGrid

__all__ = ["grid_arguments", "quantize_block", "quantize_rows", "row_grids", "row_ranges"]

# 1.5 * 2**23: added and taken off again, it rounds a small float32 to a whole number, half to even.
_WHOLE = tl.constexpr(12582912.0)


@triton.jit
def row_grids(
    p_scale, p_zero, o_m, m_m, stride_grid, KIND: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Scale and zero point, [M] float32 each. Not static: ``p_scale`` and ``p_zero`` are lows and highs."""
    if KIND == "static":
        b_scale = tl.load(p_scale + o_m * stride_grid, mask=m_m, other=1.0)
        b_zero = tl.load(p_zero + o_m * stride_grid, mask=m_m, other=0).to(tl.float32) - OFFSET
    else:
        if KIND == "token":
            b_low = tl.load(p_scale + o_m, mask=m_m, other=0.0)
            b_high = tl.load(p_zero + o_m, mask=m_m, other=0.0)
            b_width = tl.maximum(-b_low, b_high, propagate_nan=tl.PropagateNan.ALL)
            b_scale = tl.div_rn(b_width, tl.full(o_m.shape, 127.0, tl.float32))
        else:
            # One number for all rows: spread from a register, it takes fewer of them than a block that is loaded.
            b_low = tl.load(p_scale) + tl.zeros(o_m.shape, dtype=tl.float32)
            b_high = tl.load(p_zero) + tl.zeros(o_m.shape, dtype=tl.float32)
            b_scale = tl.div_rn(b_high - b_low, tl.full(o_m.shape, 255.0, tl.float32))
        b_scale = tl.where(b_scale == 0, 1.0, b_scale)
        # As the reference has it: infinity over an infinite scale.
        b_scale = tl.where(b_scale == float("inf"), float("nan"), b_scale)
        b_zero = tl.zeros_like(b_scale)
        if KIND == "tensor":
            b_zero = tl.minimum(tl.maximum(tl.div_rn(-b_low, b_scale), 0.0), 255.0)
            b_zero = (b_zero + _WHOLE) - _WHOLE - OFFSET
    return b_scale, b_zero


@triton.jit
def quantize_block(b_x, b_scale, b_zero, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Floats to int8 codes; scale and zero point broadcast to ``b_x``. Clipped first: bounds are whole numbers.

    NaN is LOW: of two numbers the larger is the one that is a number.
    """
    b_q = tl.div_rn(b_x.to(tl.float32), b_scale + tl.zeros_like(b_x).to(tl.float32))
    b_q = tl.minimum(tl.maximum(b_q, LOW - b_zero), HIGH - b_zero)
    return ((b_q + _WHOLE) - _WHOLE + b_zero).to(tl.int8)


@triton.jit
def row_ranges_fwd_kernel(p_x, p_low, p_high, inputs, stride_x, K: tl.constexpr, OVERLAP: tl.constexpr):
    """A program a row: its smallest and largest value, zero among them; NaN both, if one is."""
    i_m = tl.program_id(0).to(tl.int64)
    b_low = tl.zeros([K], dtype=tl.float32)
    b_high = tl.zeros([K], dtype=tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for i_k in range(0, inputs, K):
        o_k = i_k + tl.arange(0, K)
        b_x = tl.load(p_x + i_m * stride_x + o_k, mask=o_k < inputs, other=0.0).to(tl.float32)
        b_low = tl.minimum(b_low, b_x, propagate_nan=tl.PropagateNan.ALL)
        b_high = tl.maximum(b_high, b_x, propagate_nan=tl.PropagateNan.ALL)
    # Minima and maxima over a block leave NaN out.
    b_nan = tl.max((b_low != b_low).to(tl.int32), 0) > 0
    tl.store(p_low + i_m, tl.where(b_nan, float("nan"), tl.min(b_low, 0)))
    tl.store(p_high + i_m, tl.where(b_nan, float("nan"), tl.max(b_high, 0)))


@triton.jit
def quantize_rows_fwd_kernel(
    p_x, p_scale, p_zero, p_out, rows, inputs, stride_x, stride_grid,
    K: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs: rows, K inputs each; ``p_out`` int8 [rows, inputs]."""
    o_m = tl.program_id(0) + tl.arange(0, 1)
    o_k = tl.program_id(1) * K + tl.arange(0, K)
    m_k = (o_k < inputs)[None, :]
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_scale, b_zero = row_grids(p_scale, p_zero, o_m, o_m < rows, stride_grid, KIND, OFFSET)
    b_x = tl.load(p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :], mask=m_k, other=0.0)
    b_q = quantize_block(b_x, b_scale[:, None], b_zero[:, None], LOW, HIGH)
    tl.store(p_out + o_m.to(tl.int64)[:, None] * inputs + o_k[None, :], b_q, mask=m_k)


@on_its_device
def row_ranges(x: Tensor) -> Tensor:
    """Smallest and largest value of each row of ``x`` [M, I], zero among them: float32 [2, M]."""
    rows, inputs = x.shape
    ends = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    row_ranges_fwd_kernel[(rows,)](
        x, ends[0], ends[1], inputs, x.stride(0), K=min(2048, power_of_two(inputs)), OVERLAP=overlaps(x),
        num_warps=4, **launch_options(x),
    )  # fmt: skip
    return ends


def grid_arguments(x: Tensor, grid: RowGrid) -> tuple[Tensor, Tensor, int]:
    """What kernels read a grid from: two tensors, and how far apart their entries are (0: one for all rows)."""
    if grid.kind == "static":
        assert grid.scale is not None
        assert grid.zero_point is not None
        return grid.scale, grid.zero_point, 0 if grid.scale.numel() == 1 else 1
    ends = row_ranges(x)
    if grid.kind == "token":
        return ends[0], ends[1], 1
    # Of the whole tensor, once for all programs: the ranges of the rows' lows and of their highs.
    lows, highs = row_ranges(ends) if len(x) > 1 else ends
    return lows[:1], highs[-1:], 0


@on_its_device
def quantize_rows(x: Tensor, grid: RowGrid, arguments: tuple[Tensor, Tensor, int]) -> Tensor:
    """``x`` [M, I] as int8 codes [M, I]; ``arguments`` are :func:`grid_arguments` of both."""
    rows, inputs = x.shape
    scale, zero, stride = arguments
    low, high = grid.bounds
    out = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
    k = min(1024, power_of_two(inputs))
    quantize_rows_fwd_kernel[(rows, triton.cdiv(inputs, k))](
        x, scale, zero, out, rows, inputs, x.stride(0), stride,
        K=k, KIND=grid.kind, OFFSET=grid.offset, LOW=low, HIGH=high,
        OVERLAP=overlaps(x), num_warps=4, **launch_options(x),
    )  # fmt: skip
    return out
