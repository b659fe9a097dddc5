"""Few to many rows times a packed weight on the tensor cores, split along the inputs where there are too few programs.

The weight is the left operand, unpacked in registers. Codes minus zero point are small integers, exact in
bfloat16; a scale is met once a group, by the float32 sums.

    y_mo = sum_g scale_og * sum_c (code_oc - zero_og) x_mc  +  sum_r up_or h_mr  +  bias_o

Two lanes are unpacked at a time: a unit pair masked to one position, with an exponent OR-ed over it, is two 16-bit
floats ``magic + code``; one fused multiply-add takes off the magic number and the zero point (as in Marlin and
FasterTransformer). Triton has no word for pairs of 16-bit floats, hence the inline assembly; its plain twin serves
float32, 8-bit codes in bfloat16, and the interpreter.

Alphabet as in packed_gemv.py; M rows, N outputs, U units of a group, position by position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.lanes import CHUNK, LANES, LaneWeight, block_columns
from compress.kernels.launch import (
    capability,
    launch_options,
    multiprocessors,
    on_its_device,
    overlaps,
    power_of_two,
    shared_memory,
)
from compress.kernels.packed_tile import Step, default_tile, step_units
from compress.kernels.partial_sums import sum_partials
from compress.kernels.product import block_product, product_precision
from compress.kernels.tuning import measured_tile

__all__ = ["KERNEL", "packed_dot"]

_MAGIC = tl.constexpr(8388608.0)  # 2**23: a float32 whose lowest mantissa bit is 1
_MAGIC_BITS = tl.constexpr(0x4B000000)


@triton.constexpr_function
def _pair_assembly(half: str, shift: int, width: int, offset: int) -> str:
    """PTX from a unit pair ($1) and minus (magic * 2**offset + zero), twice ($2), to two codes minus zero ($0)."""
    mask = ((1 << width) - 1) * 0x00010001
    magic, kind = (0x64006400, "f16x2") if half == "fp16" else (0x43004300, "bf16x2")
    # 2**offset, twice, as 16-bit floats.
    factor = ((15 + offset) << 10 if half == "fp16" else (127 + offset) << 7) * 0x00010001
    return f"""{{
        .reg .b32 t, f;
        shr.b32 t, $1, {shift};
        lop3.b32 t, t, {mask}, {magic}, 0xea;
        mov.b32 f, {factor};
        fma.rn.{kind} $0, t, f, $2;
    }}"""


@triton.jit
def _decode(
    b_q, b_zero, dtype: tl.constexpr, position: tl.constexpr,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, FIRST: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Units [N, U] to ``code * 2**OFFSET - zero`` of one position, in ``dtype``; ``b_zero`` [N, 1] float32."""
    if PAIRS:
        magic: tl.constexpr = 1024.0 if dtype == tl.float16 else 128.0
        name: tl.constexpr = "fp16" if dtype == tl.float16 else "bf16"
        b_minus = (-magic * (1 << OFFSET) - (b_zero if FIRST else b_zero * 0.0)).to(dtype)
        b_w = tl.inline_asm_elementwise(
            _pair_assembly(name, WIDTH * position, WIDTH, OFFSET), "=r,r,r", [b_q, b_minus],
            dtype=b_minus.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        b_code = (b_q.to(tl.int32) >> (WIDTH * position)) & ((1 << WIDTH) - 1)
        b_f = (b_code | _MAGIC_BITS).to(tl.float32, bitcast=True) - _MAGIC
        b_w = (b_f * (1 << OFFSET) - (b_zero if FIRST else b_zero * 0.0)).to(dtype)
    return b_w


@triton.jit
def _grids(p_scale, p_zero, i_group, m_o, groups):
    """Scales and zero points [N] of a group, as loaded.

    Groups past a row's end hold padding alone, which meets inputs of zero: any scale will do.
    """
    o_g = tl.minimum(i_group, groups - 1)
    return tl.load(p_scale + o_g, mask=m_o, other=0.0), tl.load(p_zero + o_g, mask=m_o, other=0)


@triton.jit
def _plane_dots(
    b_acc, b_scale, b_zero, p_x, o_m, m_m, p_row, i_plane, p_scale, p_zero, m_o, i_block, blocks, inputs, groups,
    PT: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
    U: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Add what one plane has in U / 16 blocks from ``i_block`` on to ``b_acc`` [N, M].

    AHEAD: ``b_scale`` and ``b_zero`` are already those of the first group.
    """
    PER: tl.constexpr = 16 // WIDTH
    TILES: tl.constexpr = PT // PER
    CHUNKS: tl.constexpr = 1 if GROUP == 0 or GROUP >= 16 * PER else 16 * PER // GROUP
    o_u = tl.arange(0, U)
    o_block = i_block + o_u // 16
    for tile in tl.static_range(TILES):
        o_q = i_plane + o_block * TILES + tile
        p_q = p_row + (o_q // 2 * 256 + o_q % 2 * 16 + o_u % 16)[None, :]
        m_q = m_o[:, None] if FULL else m_o[:, None] & (o_block < blocks)[None, :]
        b_q = tl.load(p_q, mask=m_q, other=0)
        i_x = (i_block * TILES + tile) * (16 * PER)
        o_x = (o_block * TILES + tile) * (16 * PER) + o_u % 16
        i_g = i_x // GROUP if GROUP > 0 else 0
        for chunk in tl.static_range(CHUNKS):
            if tile + chunk > 0 or not AHEAD:
                b_scale, b_zero = _grids(p_scale, p_zero, i_g + chunk, m_o, groups)
            b_part = tl.zeros_like(b_acc)
            for k in tl.static_range(PER // CHUNKS):
                o_c = o_x + 16 * (chunk * (PER // CHUNKS) + k)
                m_x = m_m[None, :] if FULL else m_m[None, :] & (o_c < inputs)[:, None]
                b_x = tl.load(p_x + o_m[None, :] + o_c[:, None], mask=m_x, other=0.0)
                b_w = _decode(
                    b_q, b_zero.to(tl.float32)[:, None], b_x.dtype, chunk * (PER // CHUNKS) + k,
                    WIDTH, OFFSET, FIRST, PAIRS,
                )  # fmt: skip
                b_part = block_product(b_w, b_x, b_part, PRECISION)
            b_acc += b_part * b_scale.to(tl.float32)[:, None]
    return b_acc


@triton.jit
def packed_dot_fwd_kernel(
    p_x, p_units, p_scale, p_zero, p_bias, p_h, p_up, p_out,
    rows, outputs, inputs, blocks, row_units, groups, rank, steps, stride_x, stride_h, stride_up, stride_split,
    BITS: tl.constexpr, PT: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
    FULL: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Programs: outputs, rows, splits of ``steps`` times U / 16 blocks each; ``p_out`` [splits, rows, outputs].

    FULL: inputs end where a step ends.
    """
    i_split = tl.program_id(2)
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    o_r = tl.program_id(1) * M + tl.arange(0, M)
    m_o = o_n < outputs
    m_m = o_r < rows
    o_m = o_r.to(tl.int64) * stride_x
    p_row = p_units + (o_n // 8).to(tl.int64)[:, None] * (8 * row_units) + (o_n % 8)[:, None] * 32
    p_scale += o_n.to(tl.int64) * groups
    p_zero += o_n.to(tl.int64) * groups
    b_acc = tl.zeros([N, M], dtype=tl.float32)
    STEP: tl.constexpr = U // 16
    AHEAD: tl.constexpr = (BITS & (BITS - 1)) == 0
    SPAN: tl.constexpr = STEP * 16 * PT
    first = i_split * steps
    # Two bytes of a row are too few for the copy engine that brings codes and inputs: grids are loaded a step ahead.
    b_scale, b_zero = _grids(p_scale, p_zero, first * SPAN // GROUP if GROUP > 0 else 0, m_o, groups)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    last = tl.minimum(first + steps, tl.cdiv(blocks, STEP))
    for i_step in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        i_block = i_step * STEP
        if AHEAD:
            i_after = (i_step + 1) * SPAN // GROUP if GROUP > 0 else 0
            b_next_scale, b_next_zero = _grids(p_scale, p_zero, i_after, m_o, groups)
        i_plane = 0
        if BITS & 8:
            b_acc = _plane_dots(
                b_acc, b_scale, b_zero, p_x, o_m, m_m, p_row, i_plane, p_scale, p_zero, m_o, i_block,
                blocks, inputs, groups,
                PT, 8, 0, True, GROUP, U, PAIRS, PRECISION, FULL, AHEAD,
            )  # fmt: skip
        if BITS & 4:
            b_acc = _plane_dots(
                b_acc, b_scale, b_zero, p_x, o_m, m_m, p_row, i_plane, p_scale, p_zero, m_o, i_block,
                blocks, inputs, groups,
                PT, 4, 0, True, GROUP, U, PAIRS, PRECISION, FULL, AHEAD,
            )  # fmt: skip
            i_plane += blocks * (PT // 4)
        if BITS & 2:
            b_acc = _plane_dots(
                b_acc, b_scale, b_zero, p_x, o_m, m_m, p_row, i_plane, p_scale, p_zero, m_o, i_block,
                blocks, inputs, groups,
                PT, 2, BITS & 4, (BITS & 4) == 0, GROUP, U, PAIRS, PRECISION, FULL, AHEAD,
            )  # fmt: skip
            i_plane += blocks * (PT // 8)
        if BITS & 1:
            b_acc = _plane_dots(
                b_acc, b_scale, b_zero, p_x, o_m, m_m, p_row, i_plane, p_scale, p_zero, m_o, i_block,
                blocks, inputs, groups,
                PT, 1, BITS & 6, False, GROUP, U, PAIRS, PRECISION, FULL, AHEAD,
            )  # fmt: skip
        if AHEAD:
            b_scale, b_zero = b_next_scale, b_next_zero
    if RANK > 0 and i_split == 0:
        o_k = tl.arange(0, RANK)
        p_branch = p_up + o_n.to(tl.int64)[:, None] * stride_up + o_k[None, :]
        b_up = tl.load(p_branch, mask=m_o[:, None] & (o_k < rank)[None, :], other=0.0)
        p_inner = p_h + o_r.to(tl.int64)[None, :] * stride_h + o_k[:, None]
        b_h = tl.load(p_inner, mask=m_m[None, :] & (o_k < rank)[:, None], other=0.0)
        b_acc = block_product(b_up, b_h.to(b_up.dtype), b_acc, PRECISION)
    if HAS_BIAS and i_split == 0:
        b_acc += tl.load(p_bias + o_n, mask=m_o, other=0.0).to(tl.float32)[:, None]
    p_y = p_out + i_split.to(tl.int64) * stride_split + o_r.to(tl.int64)[None, :] * outputs + o_n[:, None]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_o[:, None] & m_m[None, :])


@on_its_device
def packed_dot(
    x: Tensor,
    weight: LaneWeight,
    bias: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
    tile: tuple[int, int, int, int, int, int] | None = None,
) -> Tensor:
    """``x`` [M, I] times ``weight``, plus a ``branch`` (h [M, R], up [O, R]) and a bias [O]: [M, O] of ``x``'s dtype.

    ``tile``: outputs and rows a program, splits of the inputs, warps, stages, steps unrolled; None takes what was
    fastest where it was measured.
    """
    rows, inputs = x.shape
    outputs, bits = weight.outputs, weight.bits
    positions = block_columns(bits) // LANES
    whole = weight.group_size >= inputs
    chunk = step_units(bits, inputs, weight.group_size)
    blocks = -(-inputs // (LANES * positions))
    total = triton.cdiv(blocks * LANES, chunk)
    tile = tile or measured_tile(x, "packed_dot", outputs, x.dtype, bits, weight.group_size)
    h, up = branch or (x, x)
    rank = up.shape[1] if branch else 0
    step = Step(chunk, bits, x.element_size(), overlaps(x), rank)
    n, m, splits, warps, stages, unroll = tile or default_tile(
        rows, outputs, total, multiprocessors(x), step, shared_memory(x)
    )
    steps = triton.cdiv(total, splits)
    splits = triton.cdiv(total, steps)
    out = torch.empty(splits, rows, outputs, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    pairs = capability(x) is not None and x.dtype is not torch.float32 and not (bits == 8 and x.dtype is torch.bfloat16)
    packed_dot_fwd_kernel[(triton.cdiv(outputs, n), triton.cdiv(rows, m), splits)](
        x, weight.units, weight.scale, weight.zero_point, bias if bias is not None else x, h, up, out,
        rows, outputs, inputs, blocks, weight.units.shape[1] * CHUNK, weight.scale.shape[1], rank, steps,
        x.stride(0), h.stride(0), up.stride(0), out.stride(0),
        BITS=bits, PT=positions, GROUP=0 if whole else weight.group_size, M=m, N=n, U=chunk,
        RANK=max(16, power_of_two(rank)) if rank else 0, HAS_BIAS=bias is not None, PAIRS=pairs,
        PRECISION=product_precision(x),
        FULL=inputs % (chunk * positions) == 0, OVERLAP=overlaps(x), STAGES=stages, UNROLL=unroll,
        num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out[0] if splits == 1 else sum_partials(out, x.dtype)


KERNEL = Kernel(
    run=packed_dot,
    requires=Requires(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        rows=(1, 128),
        bits=(2, 3, 4, 5, 6, 7, 8),
        group_sizes=(16, 32, 64, 128, 256),
        rank=128,
        capability=(8, 0),
    ),
)
