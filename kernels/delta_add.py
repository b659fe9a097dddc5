"""A sparse delta added to a float weight where it lies, or to a temporary one for many rows.

    weight_oc = round(weight_oc + value)        the sum in float64, rounded to float32 and then to the weight's type

which is what compress.sparse.application computes, bit for bit. Entries of a delta are all different, so that no two
threads write one place.

Alphabet as in packed_gemv.py; N rows of the weight, K entries of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.delta_gemv import row_entries
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.launch import launch_options, on_its_device, overlaps

__all__ = ["delta_add"]


@triton.jit
def delta_add_fwd_kernel(
    p_weight, p_starts, p_columns, p_values, outputs, inputs, total,
    N: tl.constexpr, K: tl.constexpr, SHORT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``p_weight`` [outputs, inputs], changed in place; programs: N rows each."""
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    m_o = o_n < outputs
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_length = tl.load(p_starts + o_n + 1, mask=m_o, other=0) - tl.load(p_starts + o_n, mask=m_o, other=0)
    p_row = p_weight + o_n.to(tl.int64)[:, None] * inputs
    for i_step in range(tl.cdiv(tl.max(b_length, 0), K)):
        b_column, b_value, m_e = row_entries(p_starts, p_columns, p_values, o_n, m_o, i_step, total, K, SHORT)
        m_w = m_e & (b_column < inputs)
        b_w = tl.load(p_row + b_column, mask=m_w, other=0.0)
        b_sum = b_w.to(tl.float64) + b_value.to(tl.float64)
        tl.store(p_row + b_column, b_sum.to(tl.float32).to(p_weight.dtype.element_ty), mask=m_w)


@on_its_device
def delta_add(weight: Tensor, delta: DeltaRows, number: int = 0, tile: tuple[int, int, int] = (4, 128, 4)) -> None:
    """Add delta ``number`` of a stack to ``weight`` [O, ...], contiguous, in place; ``tile``: rows, entries, warps."""
    n, k, warps = tile
    delta_add_fwd_kernel[(triton.cdiv(delta.outputs, n),)](
        weight, delta.starts[number], delta.columns, delta.values, delta.outputs, delta.inputs, len(delta.values),
        N=n, K=k, SHORT=delta.columns.dtype is torch.int16, OVERLAP=overlaps(weight),
        num_warps=warps, **launch_options(weight),
    )  # fmt: skip
