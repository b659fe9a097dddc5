"""Rows times sparse deltas, added to what the base has made of them: every row of ``x`` with the delta it belongs to.

    out_mo = y_mo + sum_k value_k x_m,column_k        over the entries k of row o of delta task_m

Entries are read in runs along a weight's row, inputs gathered, which stay in the cache: a row of 4,096 is 8 or 16 kB.
Rows of one delta share a program, and an entry read once serves M of them; rows of different deltas have programs of
their own.

Alphabet as in packed_gemv.py; M rows, N outputs, K entries of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.delta_rows import DeltaRows
from compress.kernels.launch import launch_options, on_its_device, overlaps, power_of_two
from compress.kernels.tile_place import tile_place

__all__ = ["delta_gemv", "row_entries"]


@triton.jit
def row_entries(p_starts, p_columns, p_values, o_n, m_o, i_step, total, K: tl.constexpr, SHORT: tl.constexpr):
    """Step ``i_step`` of the rows ``o_n`` [N]: columns, values and which entries are there, [N, K]."""
    b_first = tl.load(p_starts + o_n, mask=m_o, other=0)
    b_last = tl.load(p_starts + o_n + 1, mask=m_o, other=0)
    o_e = b_first[:, None] + i_step * K + tl.arange(0, K)[None, :]
    m_e = (o_e < tl.minimum(b_last, total)[:, None]) & (o_e >= 0)
    b_column = tl.load(p_columns + o_e, mask=m_e, other=0).to(tl.int32)
    if SHORT:
        b_column = b_column & 0xFFFF
    return b_column, tl.load(p_values + o_e, mask=m_e, other=0.0), m_e


@triton.jit
def delta_gemv_fwd_kernel(
    p_x, p_y, p_starts, p_columns, p_values, p_task, p_out, rows, outputs, inputs, deltas, total, stride_x, stride_y,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_TASK: tl.constexpr, SHORT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs and rows; ``p_out`` [rows, outputs]. With HAS_TASK M is 1; a task that is none adds
    nothing."""
    i_n, i_m = tile_place(outputs, N)
    o_n = i_n * N + tl.arange(0, N)
    o_m = i_m * M + tl.arange(0, M)
    m_m = o_m < rows
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m_o = o_n < outputs
    if HAS_TASK:
        o_delta = tl.load(p_task + i_m + o_n * 0)
        m_o = m_o & (o_delta >= 0) & (o_delta < deltas)
        p_starts += tl.load(p_task + i_m).to(tl.int64) * (outputs + 1)
    b_length = tl.load(p_starts + o_n + 1, mask=m_o, other=0) - tl.load(p_starts + o_n, mask=m_o, other=0)
    p_row = p_x + o_m.to(tl.int64)[:, None, None] * stride_x
    b_acc = tl.zeros([M, N, K], dtype=tl.float32)
    for i_step in range(tl.cdiv(tl.max(b_length, 0), K)):
        b_column, b_value, m_e = row_entries(p_starts, p_columns, p_values, o_n, m_o, i_step, total, K, SHORT)
        m_x = m_m[:, None, None] & (m_e & (b_column < inputs))[None, :, :]
        b_x = tl.load(p_row + b_column[None, :, :], mask=m_x, other=0.0)
        b_acc += b_value.to(tl.float32)[None, :, :] * b_x.to(tl.float32)
    m_y = m_m[:, None] & (o_n < outputs)[None, :]
    b_y = tl.load(p_y + o_m.to(tl.int64)[:, None] * stride_y + o_n[None, :], mask=m_y, other=0.0).to(tl.float32)
    b_y += tl.sum(b_acc, 2)
    tl.store(p_out + o_m.to(tl.int64)[:, None] * outputs + o_n[None, :], b_y.to(p_out.dtype.element_ty), mask=m_y)


@on_its_device
def delta_gemv(
    x: Tensor, y: Tensor, deltas: DeltaRows, task: Tensor | None, tile: tuple[int, int, int, int] | None = None
) -> Tensor:
    """``y`` [M, O] plus ``x`` [M, I] times the delta of each row: [M, O] of ``y``'s dtype, summed in float32.

    ``task`` int32 [M]: which delta; one that is none, as -1, adds nothing; None: the only delta for all. ``tile``:
    rows and outputs a program, entries a step, warps.
    """
    rows, inputs = x.shape
    outputs = deltas.outputs
    m, n, k, warps = tile or default_tile(rows, len(deltas.values) // max(1, outputs * deltas.count))
    m = 1 if task is not None else m
    out = torch.empty(rows, outputs, dtype=y.dtype, device=y.device)
    delta_gemv_fwd_kernel[(triton.cdiv(outputs, n) * triton.cdiv(rows, m),)](
        x, y, deltas.starts, deltas.columns, deltas.values, task if task is not None else deltas.starts, out,
        rows, outputs, inputs, deltas.count, len(deltas.values), x.stride(0), y.stride(0),
        M=m, N=n, K=k, HAS_TASK=task is not None, SHORT=deltas.columns.dtype is torch.int16, OVERLAP=overlaps(x),
        num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out


def default_tile(rows: int, entries: int) -> tuple[int, int, int, int]:
    """Steps no longer than a usual row of so many ``entries``; few rows share a program, as each takes registers.

    Chosen by reasoning: these kernels have not been timed.
    """
    k = max(32, min(128, power_of_two(max(1, entries))))
    return min(4, power_of_two(rows)), 8, k, 4
