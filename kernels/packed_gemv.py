"""One row times a packed weight: every thread unpacks 16 bytes at a time and multiplies on the ordinary cores.

A tensor core would do 16 rows' work for one. What limits the plain way is instructions, so codes are never converted:
a unit masked to one position is, read as the bits of a float32, a subnormal number, the code times a power of two, and
exact; GPUs multiply subnormal float32 at full speed. The power of two goes into the input instead, once for all
outputs. Per code that leaves one mask and one multiply-add.

    y_o = sum_g scale_og * (sum_c code_oc x_c  -  zero_og * sum_c x_c)  +  sum_r up_or h_r  +  bias_o

Inputs may span 1e-10 to 1e13 without loss: products are carried 2**-85 times their size.

Tiles are flat, [N, G U]: threads then lie along a row, whichever Triton lays them out.

Alphabet: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` a block that was loaded; N outputs, G groups
of a row, U units of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.lanes import LANES, LaneWeight, block_columns
from compress.kernels.launch import launch_options, multiprocessors, on_its_device, overlaps, power_of_two
from compress.kernels.tuning import measured_tile

__all__ = ["KERNEL", "packed_gemv"]

# Subnormal float32 are multiples of 2**-149; inputs are multiplied by 2**64, so sums are 2**-85 times their size.
_UP = tl.constexpr(2.0**64)
_SUM = tl.constexpr(2.0**-85)
_BACK = tl.constexpr(2.0**85)


@triton.jit
def word_place(o_w):
    """Where a row's word (two units, 32 bits) lies behind its first one: rows are interleaved by eight."""
    return (o_w // 16) * 128 + o_w % 16


@triton.jit
def _grids(p_scale, p_zero, o_g, m_o, groups):
    """Scales and zero points [N, G] of the groups ``o_g`` [1, G], as loaded; past a row's end both are 0."""
    m_g = m_o[:, None] & (o_g < groups)
    return tl.load(p_scale + o_g, mask=m_g, other=0.0), tl.load(p_zero + o_g, mask=m_g, other=0)


@triton.jit
def _word_sums(
    b_acc, b_q, b_scale, b_zero, p_x, o_x, p_scale, p_zero, o_g, m_o, inputs, groups,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Add a plane's words ``b_q`` [N, G U / 2] to ``b_acc`` [N, G]; ``o_x`` [1, G U]: columns of position 0.

    ``b_scale`` and ``b_zero`` are those of the groups ``o_g`` [1, G], in which the words begin.
    """
    PER: tl.constexpr = 16 // WIDTH
    LOW: tl.constexpr = (1 << WIDTH) - 1
    CHUNKS: tl.constexpr = 1 if GROUP == 0 or GROUP >= 16 * PER else 16 * PER // GROUP
    b_high = b_q >> 12
    for chunk in tl.static_range(CHUNKS):
        b_sum = tl.zeros_like(o_x).to(tl.float32)
        for k in tl.static_range(PER // CHUNKS):
            position = chunk * (PER // CHUNKS) + k
            o_c = o_x + 16 * position
            b_x = tl.load(p_x + o_c, mask=o_c < inputs, other=0.0).to(tl.float32)
            if FIRST:
                b_sum += b_x
            b_x0, b_x1 = tl.split(tl.reshape(b_x, [1, G * U // 2, 2]))
            b_even = (b_q & (LOW << (WIDTH * position))).to(tl.float32, bitcast=True)
            b_even *= b_x0 * (_UP * ((1 << OFFSET) / (1 << (WIDTH * position))))
            # Above bit 22 a float's exponent begins: codes that reach it are taken 12 bits lower.
            if 16 + WIDTH * position + WIDTH <= 23:
                b_odd = (b_q & (LOW << (16 + WIDTH * position))).to(tl.float32, bitcast=True)
                b_odd *= b_x1 * (_UP * ((1 << OFFSET) / (1 << (16 + WIDTH * position))))
            else:
                b_odd = (b_high & (LOW << (4 + WIDTH * position))).to(tl.float32, bitcast=True)
                b_odd *= b_x1 * (_UP * ((1 << OFFSET) / (1 << (4 + WIDTH * position))))
            if k == 0:
                b_part = b_even
            else:
                b_part += b_even
            b_part += b_odd
        # Sums of whole groups first: scales then meet [N, G] numbers instead of [N, G, U].
        b_group = tl.sum(tl.reshape(b_part, [N, G, U // 2]), 2)
        if FIRST:
            b_group -= b_zero.to(tl.float32) * (tl.sum(tl.reshape(b_sum, [1, G, U]), 2) * _SUM)
        b_acc += b_group * (b_scale.to(tl.float32) * _BACK)
        if chunk + 1 < CHUNKS:
            b_scale, b_zero = _grids(p_scale, p_zero, o_g + chunk + 1, m_o, groups)
    return b_acc


@triton.jit
def _plane_sums(
    b_acc, p_row, i_plane, i_block, p_x, p_scale, p_zero, m_o, blocks, inputs, groups,
    PT: tl.constexpr, WIDTH: tl.constexpr, OFFSET: tl.constexpr, FIRST: tl.constexpr,
    GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Add what one plane has in G * U / 16 blocks from ``i_block`` on: ``TILES`` units a lane and block."""
    PER: tl.constexpr = 16 // WIDTH
    TILES: tl.constexpr = PT // PER
    o_w = tl.arange(0, G * U // 2)[None, :]
    o_t = tl.arange(0, G * U)[None, :]
    o_first = i_block + tl.arange(0, G)[None, :] * (U // 16)
    for tile in tl.static_range(TILES):
        o_block = i_block + o_w // 8
        o_q = i_plane + o_block * TILES + tile
        b_q = tl.load(p_row + (o_q // 2 * 128 + o_q % 2 * 8 + o_w % 8), mask=m_o[:, None] & (o_block < blocks), other=0)
        o_x = ((i_block + o_t // 16) * TILES + tile) * (16 * PER) + o_t % 16
        o_g = (o_first * TILES + tile) * (16 * PER) // GROUP if GROUP > 0 else o_first * 0
        b_scale, b_zero = _grids(p_scale, p_zero, o_g, m_o, groups)
        b_acc = _word_sums(
            b_acc, b_q, b_scale, b_zero, p_x, o_x, p_scale, p_zero, o_g, m_o, inputs, groups,
            WIDTH, OFFSET, FIRST, GROUP, N, G, U,
        )  # fmt: skip
    return b_acc


@triton.jit
def packed_gemv_fwd_kernel(
    p_x, p_words, p_scale, p_zero, p_bias, p_h, p_up, p_out,
    outputs, inputs, blocks, row_words, groups, rank, stride_x, stride_h, stride_part, stride_up, stride_out,
    BITS: tl.constexpr, PT: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr, U: tl.constexpr,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr, HINT: tl.constexpr,
    PARTS: tl.constexpr, READY: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """``p_words``: two units, of an even lane and the odd one behind it, in 32 bits; GROUP is 0 for one a row.

    ``p_h`` comes in PARTS to be added. READY: the launch before, which makes it, began when ``p_x`` was complete.
    """
    i_m = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    m_o = o_n < outputs
    m_n = m_o[:, None]
    o_w = tl.arange(0, G * U // 2)[None, :]
    o_t = tl.arange(0, G * U)[None, :]
    p_row = p_words + (o_n // 8).to(tl.int64)[:, None] * (8 * row_words) + (o_n % 8)[:, None] * 16
    p_scale += o_n.to(tl.int64)[:, None] * groups
    p_zero += o_n.to(tl.int64)[:, None] * groups
    p_x += i_m * stride_x
    b_acc = tl.zeros([N, G], dtype=tl.float32)
    SINGLE: tl.constexpr = (BITS & (BITS - 1)) == 0
    if OVERLAP:
        # The next kernel may take its place on the chip now; it waits for our results where it needs them.
        tl.extra.cuda.gdc_launch_dependents()
    if RANK > 0:
        o_r = tl.arange(0, RANK)
        p_branch = p_up + o_n.to(tl.int64)[:, None] * stride_up + o_r[None, :]
        b_up = tl.load(p_branch, mask=m_o[:, None] & (o_r < rank)[None, :], other=0.0)
    if SINGLE:
        # Weights depend on no other kernel: the first ones, and always those of the next step, are already on the way.
        words = blocks * 8
        o_first = tl.arange(0, G)[None, :] * (U // 16)
        o_g = o_first * (16 * PT) // GROUP if GROUP > 0 else o_first * 0
        b_next = tl.load(p_row + word_place(o_w), mask=m_n & (o_w < words), other=0, eviction_policy=HINT)
        b_next_scale, b_next_zero = _grids(p_scale, p_zero, o_g, m_o, groups)
        if OVERLAP and not READY:
            tl.extra.cuda.gdc_wait()
        if ONE_STEP:
            o_x = o_t // 16 * (16 * PT) + o_t % 16
            b_acc = _word_sums(
                b_acc, b_next, b_next_scale, b_next_zero, p_x, o_x, p_scale, p_zero, o_g, m_o, inputs, groups,
                BITS, 0, True, GROUP, N, G, U,
            )  # fmt: skip
        for i_block in range(0, 0 if ONE_STEP else blocks, G * U // 16):
            b_q, b_scale, b_zero = b_next, b_next_scale, b_next_zero
            o_next = (i_block * 8 + G * U // 2) + o_w
            b_next = tl.load(p_row + word_place(o_next), mask=m_n & (o_next < words), other=0, eviction_policy=HINT)
            o_x = (i_block + o_t // 16) * (16 * PT) + o_t % 16
            o_first = i_block + tl.arange(0, G)[None, :] * (U // 16)
            o_g = o_first * (16 * PT) // GROUP if GROUP > 0 else o_first * 0
            o_after = (o_first + G * U // 16) * (16 * PT) // GROUP if GROUP > 0 else o_first * 0
            b_next_scale, b_next_zero = _grids(p_scale, p_zero, o_after, m_o, groups)
            b_acc = _word_sums(
                b_acc, b_q, b_scale, b_zero, p_x, o_x, p_scale, p_zero, o_g, m_o, inputs, groups,
                BITS, 0, True, GROUP, N, G, U,
            )  # fmt: skip
    else:
        if OVERLAP and not READY:
            tl.extra.cuda.gdc_wait()
        for i_block in range(0, blocks, G * U // 16):
            i_plane = 0
            if BITS & 4:
                b_acc = _plane_sums(
                    b_acc, p_row, i_plane, i_block, p_x, p_scale, p_zero, m_o, blocks, inputs, groups,
                    PT, 4, 0, True, GROUP, N, G, U,
                )  # fmt: skip
                i_plane += blocks * (PT // 4)
            if BITS & 2:
                b_acc = _plane_sums(
                    b_acc, p_row, i_plane, i_block, p_x, p_scale, p_zero, m_o, blocks, inputs, groups,
                    PT, 2, BITS & 4, (BITS & 4) == 0, GROUP, N, G, U,
                )  # fmt: skip
                i_plane += blocks * (PT // 8)
            if BITS & 1:
                b_acc = _plane_sums(
                    b_acc, p_row, i_plane, i_block, p_x, p_scale, p_zero, m_o, blocks, inputs, groups,
                    PT, 1, BITS & 6, False, GROUP, N, G, U,
                )  # fmt: skip
    b_y = tl.sum(b_acc, 1)
    if OVERLAP and READY:
        tl.extra.cuda.gdc_wait()
    if RANK > 0:
        b_h = tl.zeros([RANK], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            p_part = p_h + part * stride_part + i_m * stride_h + o_r
            b_h += tl.load(p_part, mask=o_r < rank, other=0.0).to(tl.float32)
        b_y += tl.sum(b_up.to(tl.float32) * b_h[None, :], 1)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_out + i_m * stride_out + o_n, b_y.to(p_out.dtype.element_ty), mask=m_o)


@on_its_device
def packed_gemv(
    x: Tensor,
    weight: LaneWeight,
    bias: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
    tile: tuple[int, int] | None = None,
    inputs_ready: bool = False,
) -> Tensor:
    """``x`` [M, I] times ``weight``, plus a ``branch`` (h [M, R], up [O, R]) and a bias [O]: [M, O] of ``x``'s dtype.

    ``h`` may be partial sums [S, M, R]. ``inputs_ready``: the launch before this one is ``inner_gemv`` of the same
    ``x``, which lets this one start when ``x`` is complete. ``tile``: outputs a program, warps; None takes what was
    fastest where it was measured.
    """
    rows, inputs = x.shape
    outputs = weight.outputs
    positions = block_columns(weight.bits) // LANES
    whole = weight.group_size >= inputs
    chunk = 64 if whole else LANES * max(1, weight.group_size // (LANES * positions))
    blocks = -(-inputs // (LANES * positions))
    tile = tile or measured_tile(x, "packed_gemv", outputs, x.dtype, weight.bits, weight.group_size)
    n, warps = tile or default_tile(outputs, inputs, multiprocessors(x))
    # So many units are 16 bytes a thread, which gives inputs and weights one layout over the threads. Short rows: less.
    span = min(warps * 256, power_of_two(blocks * LANES))
    h, up = branch or (x, x)
    rank = up.shape[1] if branch else 0
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    packed_gemv_fwd_kernel[(triton.cdiv(outputs, n), rows)](
        x, weight.units.view(torch.int32), weight.scale, weight.zero_point, bias if bias is not None else x, h, up, out,
        outputs, inputs, blocks, weight.units.shape[1] * 16, weight.scale.shape[1], rank,
        x.stride(0), h.stride(-2), h.stride(0), up.stride(0), out.stride(0),
        BITS=weight.bits, PT=positions, GROUP=0 if whole else weight.group_size,
        N=n, G=max(1, span // chunk), U=chunk,
        RANK=power_of_two(rank) if rank else 0, PARTS=h.shape[0] if h.dim() == 3 else 1, HAS_BIAS=bias is not None,
        OVERLAP=overlaps(x), READY=inputs_ready, ONE_STEP=blocks * LANES <= max(span, chunk), HINT="evict_first",
        num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out


def default_tile(outputs: int, inputs: int, processors: int) -> tuple[int, int]:
    """Eight outputs share an unpacked input, unless that leaves too few programs; long rows take narrow steps."""
    n = 8 if outputs >= 16 * processors else 4
    return n, 4 if inputs <= 8192 else 2


KERNEL = Kernel(
    run=packed_gemv,
    requires=Requires(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        rows=(1, 1),
        bits=(2, 3, 4, 5, 6, 7, 8),
        group_sizes=(16, 32, 64, 128, 256),
        rank=512,
        trained=False,
        unaligned=False,
        capability=(8, 0),
    ),
)
