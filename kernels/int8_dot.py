"""Rows of bytes times rows of bytes on the tensor cores, summed in 32-bit integers, scaled once.

    y_mo = scale_m scale_o (sum_c q_mc w_oc  -  zero_m sum_c w_oc)  +  bias_o

Few rows are rounded as they are loaded, by every program for itself: no codes are written and read again. For many rows
that would be done once for every tile of outputs, so they become codes first (kernels/int8_quantize.py).

Alphabet as in packed_gemv.py; M rows, N outputs, K inputs of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.int8_quantize import grid_arguments, quantize_block, quantize_rows, row_grids
from compress.kernels.int8_weight import MOST_INPUTS, Int8Weight
from compress.kernels.launch import launch_options, multiprocessors, on_its_device, overlaps, power_of_two
from compress.kernels.partial_sums import sum_partials
from compress.kernels.product import integer_product
from compress.kernels.row_grid import RowGrid
from compress.kernels.tile_place import tile_place

__all__ = ["FUSED", "KERNEL", "int8_dot", "int8_fused"]


@triton.jit
def int8_dot_fwd_kernel(
    p_x, p_scale, p_zero, p_w, p_wscale, p_sums, p_bias, p_out,
    rows, outputs, inputs, steps, stride_x, stride_grid, stride_split,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, CODES: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs and rows, splits of ``steps`` times K inputs; ``p_out`` [splits, rows, outputs].

    CODES: ``p_x`` is int8 already.
    """
    i_split = tl.program_id(1)
    i_n, i_m = tile_place(outputs, N)
    o_n = i_n * N + tl.arange(0, N)
    o_m = i_m * M + tl.arange(0, M)
    m_o = o_n < outputs
    m_m = o_m < rows
    p_row = p_w + o_n.to(tl.int64)[:, None] * inputs
    p_column = p_x + o_m.to(tl.int64)[None, :] * stride_x
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_scale, b_zero = row_grids(p_scale, p_zero, o_m, m_m, stride_grid, KIND, OFFSET)
    b_acc = tl.zeros([N, M], dtype=tl.int32)
    first = i_split * steps
    for i_step in tl.range(first, tl.minimum(first + steps, tl.cdiv(inputs, K)), num_stages=STAGES):
        o_k = i_step * K + tl.arange(0, K)
        m_k = o_k < inputs
        b_w = tl.load(p_row + o_k[None, :], mask=m_o[:, None] & m_k[None, :], other=0)
        b_x = tl.load(p_column + o_k[:, None], mask=m_m[None, :] & m_k[:, None], other=0)
        if not CODES:
            b_x = quantize_block(b_x, b_scale[None, :], b_zero[None, :], LOW, HIGH)
        b_acc = integer_product(b_w, b_x, b_acc)
    if i_split == 0:
        b_sums = tl.load(p_sums + o_n, mask=m_o, other=0)
        b_acc -= b_sums[:, None] * b_zero.to(tl.int32)[None, :]
    b_y = b_acc.to(tl.float32) * (tl.load(p_wscale + o_n, mask=m_o, other=0.0)[:, None] * b_scale[None, :])
    if HAS_BIAS and i_split == 0:
        b_y += tl.load(p_bias + o_n, mask=m_o, other=0.0).to(tl.float32)[:, None]
    p_y = p_out + i_split.to(tl.int64) * stride_split + o_m.to(tl.int64)[None, :] * outputs + o_n[:, None]
    tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_o[:, None] & m_m[None, :])


Tile = tuple[int, int, int, int, int, int]


@on_its_device
def _launch(
    x: Tensor, grid: RowGrid, weight: Int8Weight, bias: Tensor | None, fused: bool, tile: Tile | None
) -> Tensor:
    rows, inputs = x.shape
    outputs = weight.codes.shape[0]
    arguments = grid_arguments(x, grid)
    source = x if fused else quantize_rows(x, grid, arguments)
    n, m, k, splits, warps, stages = tile or default_tile(
        rows, outputs, inputs, multiprocessors(x), source.element_size()
    )
    steps = triton.cdiv(triton.cdiv(inputs, k), splits)
    splits = triton.cdiv(inputs, k * steps)
    low, high = grid.bounds
    out = torch.empty(splits, rows, outputs, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    int8_dot_fwd_kernel[(triton.cdiv(outputs, n) * triton.cdiv(rows, m), splits)](
        source, arguments[0], arguments[1], weight.codes, weight.scale, weight.sums,
        bias if bias is not None else x, out,
        rows, outputs, inputs, steps, source.stride(0), arguments[2], out.stride(0),
        M=m, N=n, K=k, KIND=grid.kind, OFFSET=grid.offset, LOW=low, HIGH=high,
        CODES=not fused, HAS_BIAS=bias is not None, OVERLAP=overlaps(x), STAGES=stages,
        num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out[0] if splits == 1 else sum_partials(out, x.dtype)


def int8_fused(
    x: Tensor, grid: RowGrid, weight: Int8Weight, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """``x`` [M, I] floats, rounded to ``grid`` as they are loaded, times ``weight`` [O, I]: [M, O] of ``x``'s dtype.

    ``tile``: outputs and rows a program, inputs a step, splits of the inputs, warps, stages.
    """
    return _launch(x, grid, weight, bias, True, tile)


def int8_dot(
    x: Tensor, grid: RowGrid, weight: Int8Weight, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """As :func:`int8_fused`, but ``x`` is rounded once, by a launch of its own."""
    return _launch(x, grid, weight, bias, False, tile)


def default_tile(rows: int, outputs: int, inputs: int, processors: int, itemsize: int) -> Tile:
    """Splits until the multiprocessors are busy; three steps in 99 kB of shared memory, inputs of ``itemsize`` bytes.

    Chosen by reasoning: these kernels have not been timed.
    """
    m = min(128, max(16, power_of_two(rows)))
    n = 128 if m > 64 else 64
    k = 64 if m * itemsize > 128 or m > 64 else 128
    programs = triton.cdiv(outputs, n) * triton.cdiv(rows, m)
    splits = max(1, min(8, inputs // (4 * k), round(2 * processors / programs)))
    return n, m, k, splits, 8 if m == 128 else 4, 3


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSED = Kernel(run=int8_fused, requires=Requires(dtypes=_DTYPES, rows=(1, 64), inputs=MOST_INPUTS))
KERNEL = Kernel(run=int8_dot, requires=Requires(dtypes=_DTYPES, inputs=MOST_INPUTS))
