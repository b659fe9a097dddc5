"""Sums of a product whose inputs were split over programs: ``[S, M, O]`` float32 to ``[M, O]``, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.launch import launch_options, on_its_device, overlaps

__all__ = ["sum_partials"]


@triton.jit
def partial_sums_fwd_kernel(p_part, p_out, count, splits, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """``p_part`` [splits, count] float32, ``p_out`` [count]."""
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_y = o_y < count
    b_y = tl.zeros([BLOCK], dtype=tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for _ in range(splits):
        b_y += tl.load(p_part + o_y, mask=m_y, other=0.0)
        p_part += count
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_y)


@on_its_device
def sum_partials(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """``parts`` float32 [S, M, O], contiguous, to their sum [M, O] in ``dtype``."""
    splits, rows, outputs = parts.shape
    out = torch.empty(rows, outputs, dtype=dtype, device=parts.device)
    block = 512
    partial_sums_fwd_kernel[(triton.cdiv(out.numel(), block),)](
        parts, out, out.numel(), splits, BLOCK=block, OVERLAP=overlaps(parts), num_warps=4, **launch_options(parts)
    )
    return out
