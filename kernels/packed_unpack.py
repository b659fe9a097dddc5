"""Many rows times a packed weight: unpack it once, then the vendor's own matrix product.

From some hundred rows on the product is bound by arithmetic, unpacking is a small part of it, and nobody's Triton beats
cuBLAS at the rest. The float weight lives only as long as the call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.lanes import LANES, LaneWeight, block_columns
from compress.kernels.launch import launch_options, overlaps

__all__ = ["KERNEL", "packed_unpack", "unpack_weight"]


@triton.jit
def _plane_codes(
    p_plane, o_block, o_lane, m_q, position: tl.constexpr, PT: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr
):
    """What a plane has of the codes [N, U] at one position, in its place of the code."""
    PER: tl.constexpr = 16 // WIDTH
    o_u = (o_block * (PT // PER) + position // PER) * 16 + o_lane
    b_u = tl.load(p_plane + o_u[None, :], mask=m_q, other=0).to(tl.int32)
    return ((b_u >> (WIDTH * (position % PER))) & ((1 << WIDTH) - 1)) << OFFSET


@triton.jit
def packed_unpack_fwd_kernel(
    p_units, p_scale, p_zero, p_out, outputs, inputs, blocks, row_units, groups,
    BITS: tl.constexpr, PT: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """``p_out`` [outputs, inputs]; a program has N outputs and the U / 16 blocks at its place."""
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    o_t = tl.program_id(1) * U + tl.arange(0, U)
    o_block = o_t // 16
    o_lane = o_t % 16
    row = o_n.to(tl.int64)[:, None]
    m_o = (o_n < outputs)[:, None]
    m_q = m_o & (o_block < blocks)[None, :]
    SINGLE: tl.constexpr = (BITS & (BITS - 1)) == 0
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if SINGLE:
        b_q = tl.load(p_units + row * row_units + o_t[None, :], mask=m_q, other=0).to(tl.int32)
    for position in tl.static_range(PT):
        if SINGLE:
            b_code = (b_q >> (BITS * position)) & ((1 << BITS) - 1)
        else:
            b_code = tl.zeros([N, U], dtype=tl.int32)
            p_plane = p_units + row * row_units
            if BITS & 4:
                b_code |= _plane_codes(p_plane, o_block, o_lane, m_q, position, PT, 4, 0)
                p_plane += blocks * (4 * PT)
            if BITS & 2:
                b_code |= _plane_codes(p_plane, o_block, o_lane, m_q, position, PT, 2, BITS & 4)
                p_plane += blocks * (2 * PT)
            if BITS & 1:
                b_code |= _plane_codes(p_plane, o_block, o_lane, m_q, position, PT, 1, BITS & 6)
        o_c = o_block * (16 * PT) + 16 * position + o_lane
        m_c = m_o & (o_c < inputs)[None, :]
        o_g = row * groups + (o_c // GROUP if GROUP > 0 else o_c * 0)[None, :]
        b_scale = tl.load(p_scale + o_g, mask=m_c, other=0.0).to(tl.float32)
        b_zero = tl.load(p_zero + o_g, mask=m_c, other=0).to(tl.float32)
        b_w = (b_code.to(tl.float32) - b_zero) * b_scale
        tl.store(p_out + row * inputs + o_c[None, :], b_w.to(p_out.dtype.element_ty), mask=m_c)


def unpack_weight(weight: LaneWeight, dtype: torch.dtype, tile: tuple[int, int, int] | None = None) -> Tensor:
    """``weight`` as floats [O, I] in ``dtype``; ``tile``: outputs and units a program, warps."""
    positions = block_columns(weight.bits) // LANES
    blocks = -(-weight.inputs // (LANES * positions))
    n, units, warps = tile or (8, 128, 4)
    out = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device=weight.units.device)
    packed_unpack_fwd_kernel[(triton.cdiv(weight.outputs, n), triton.cdiv(blocks * LANES, units))](
        weight.units, weight.scale, weight.zero_point, out,
        weight.outputs, weight.inputs, blocks, weight.units.shape[1], weight.scale.shape[1],
        BITS=weight.bits, PT=positions, GROUP=0 if weight.group_size >= weight.inputs else weight.group_size,
        N=n, U=units, OVERLAP=overlaps(out), num_warps=warps, **launch_options(out),
    )  # fmt: skip
    return out


def packed_unpack(
    x: Tensor, weight: LaneWeight, bias: Tensor | None = None, branch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x`` [M, I] times ``weight``, plus a ``branch`` (h [M, R], up [O, R]) and a bias [O]: [M, O], ``x``'s dtype."""
    y = torch.nn.functional.linear(x, unpack_weight(weight, x.dtype), bias)
    return torch.addmm(y, branch[0].to(x.dtype), branch[1].T) if branch else y


KERNEL = Kernel(
    run=packed_unpack,
    requires=Requires(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        bits=(2, 3, 4, 5, 6, 7, 8),
        group_sizes=(32, 64, 128),
        capability=(8, 0),
    ),
)
