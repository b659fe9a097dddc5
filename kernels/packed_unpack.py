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
from compress.kernels.lanes import CHUNK, LANES, LaneWeight, block_columns
from compress.kernels.launch import launch_options, on_its_device, overlaps

__all__ = ["KERNEL", "packed_unpack", "unpack_weight"]


@triton.jit
def _plane_codes(
    p_row, i_plane, o_c, m_c, PT: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """What a plane has of the codes [N, C] of columns ``o_c`` [1, C], in its place of the code."""
    PER: tl.constexpr = 16 // WIDTH
    o_position = (o_c // 16) % PT
    o_q = i_plane + o_c // (16 * PT) * (PT // PER) + o_position // PER
    b_u = tl.load(p_row + (o_q // 2 * 256 + o_q % 2 * 16 + o_c % 16), mask=m_c, other=0).to(tl.int32)
    return ((b_u >> (WIDTH * (o_position % PER))) & ((1 << WIDTH) - 1)) << OFFSET


@triton.jit
def packed_unpack_fwd_kernel(
    p_units, p_scale, p_zero, p_out, outputs, inputs, blocks, row_units, groups,
    BITS: tl.constexpr, PT: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """``p_out`` [outputs, inputs]; a program has N outputs and the C columns, G groups, at its place.

    A thread has 8 neighbouring columns: their units are one load, which threads of other positions share, and their
    floats one store.
    """
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    o_c = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    o_g = tl.program_id(1) * (C // GROUP if GROUP > 0 else 0) + tl.arange(0, G)[None, :]
    row = o_n.to(tl.int64)[:, None]
    m_o = (o_n < outputs)[:, None]
    m_c = m_o & (o_c < inputs)
    p_row = p_units + row // 8 * (8 * row_units) + row % 8 * 32
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_scale = tl.load(p_scale + row * groups + o_g, mask=m_o & (o_g < groups), other=0.0).to(tl.float32)
    b_zero = tl.load(p_zero + row * groups + o_g, mask=m_o & (o_g < groups), other=0).to(tl.float32)
    b_code = tl.zeros([N, C], dtype=tl.int32)
    i_plane = 0
    if BITS & 8:
        b_code |= _plane_codes(p_row, i_plane, o_c, m_c, PT, 8, 0)
    if BITS & 4:
        b_code |= _plane_codes(p_row, i_plane, o_c, m_c, PT, 4, 0)
        i_plane += blocks * (PT // 4)
    if BITS & 2:
        b_code |= _plane_codes(p_row, i_plane, o_c, m_c, PT, 2, BITS & 4)
        i_plane += blocks * (PT // 8)
    if BITS & 1:
        b_code |= _plane_codes(p_row, i_plane, o_c, m_c, PT, 1, BITS & 6)
    # Exact without a conversion: with an exponent of 2**23 over it, a code is the lowest bits of a float32.
    b_float = (b_code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    b_w = (tl.reshape(b_float, [N, G, C // G]) - b_zero[:, :, None]) * b_scale[:, :, None]
    tl.store(p_out + row * inputs + o_c, tl.reshape(b_w, [N, C]).to(p_out.dtype.element_ty), mask=m_c)


def unpack_weight(weight: LaneWeight, dtype: torch.dtype, tile: tuple[int, int, int] | None = None) -> Tensor:
    """``weight`` as floats [O, I] in ``dtype``; ``tile``: outputs and columns a program, warps."""
    out = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device=weight.units.device)
    _unpack_into(out, weight, tile or (2, 1024, 4))
    return out


@on_its_device
def _unpack_into(out: Tensor, weight: LaneWeight, tile: tuple[int, int, int]) -> None:
    positions = block_columns(weight.bits) // LANES
    n, columns, warps = tile
    whole = weight.group_size >= weight.inputs
    packed_unpack_fwd_kernel[(triton.cdiv(weight.outputs, n), triton.cdiv(weight.inputs, columns))](
        weight.units, weight.scale, weight.zero_point, out, weight.outputs, weight.inputs,
        -(-weight.inputs // (LANES * positions)), weight.units.shape[1] * CHUNK, weight.scale.shape[1],
        BITS=weight.bits, PT=positions, GROUP=0 if whole else weight.group_size,
        N=n, G=1 if whole else columns // weight.group_size, C=columns,
        OVERLAP=overlaps(out), num_warps=warps, **launch_options(out),
    )  # fmt: skip


def packed_unpack(
    x: Tensor, weight: LaneWeight, bias: Tensor | None = None, branch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x`` [M, I] times ``weight``, plus a ``branch`` (h [M, R], up [O, R]) and a bias [O]: [M, O], ``x``'s dtype."""
    y = torch.nn.functional.linear(x, unpack_weight(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.addmm(y, branch[0].to(x.dtype), branch[1].T) if branch else y


KERNEL = Kernel(
    run=packed_unpack,
    requires=Requires(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        bits=(2, 3, 4, 5, 6, 7, 8),
        group_sizes=(16, 32, 64, 128, 256),
        capability=(8, 0),
    ),
)
