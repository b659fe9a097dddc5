"""A convolution of bytes on the tensor cores: an implicit matrix product, bias, ReLU and the next grid fused.

    acc_om  =  sum_k w_ok q_k(m)  -  zero sum_k w_ok             k runs over (kernel row, kernel column, channel)
    y_om    =  relu(scale scale_o acc_om + bias_o)               as floats, or clip(round(y / next scale) + next zero)

Column m is an output position; the matrix of its inputs is never written, each program loads what its tile reads. What
lies outside of the image is the code of zero, as are all inputs' zero points: one subtraction serves both. Weights lie
as [O, kernel row, kernel column, channel], so that with bytes in channels-last order a step is one run of memory.

Alphabet as in packed_gemv.py; M positions, N outputs, K channels of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.conv_problem import ConvProblem
from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.int8_quantize import quantize_block
from compress.kernels.int8_weight import MOST_INPUTS, Int8Weight
from compress.kernels.launch import launch_options, on_its_device, overlaps, power_of_two
from compress.kernels.product import integer_product
from compress.kernels.tile_place import tile_place

__all__ = ["KERNEL", "int8_conv"]

# From here on places within an image are counted in 64 bits, which take registers that smaller ones are spared.
_LONG = 1 << 31


@triton.jit
def int8_conv_fwd_kernel(
    p_x, p_scale, p_zero, p_w, p_wscale, p_sums, p_bias, p_oscale, p_ozero, p_out,
    positions, group_outputs, channels, height, width, out_width, out_area, steps,
    stride_n, stride_c, stride_h, stride_w, stride_on, stride_oc, stride_oh, stride_ow,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr,
    OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CODES: tl.constexpr, HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr, REQUANTIZE: tl.constexpr, OUT_OFFSET: tl.constexpr, OUT_LOW: tl.constexpr,
    OUT_HIGH: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of a group's outputs and positions, groups. WHOLE: channels of a group are a multiple of K.

    LONG: an image, of the input or the output, is too large for offsets of 32 bits.
    """
    i_group = tl.program_id(1)
    i_n, i_m = tile_place(group_outputs, N)
    o_n = i_n * N + tl.arange(0, N)
    o_m = i_m * M + tl.arange(0, M)
    m_o = o_n < group_outputs
    m_m = o_m < positions
    o_out = i_group * group_outputs + o_n
    o_image = o_m // out_area
    o_y = (o_m % out_area) // out_width
    o_x = o_m % out_width
    total = channels * KH * KW
    p_row = p_w + o_out.to(tl.int64)[:, None] * total
    p_image = p_x + o_image.to(tl.int64) * stride_n + (i_group * channels).to(tl.int64) * stride_c
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b_scale = tl.load(p_scale)
    b_zero = tl.load(p_zero).to(tl.float32) - OFFSET
    b_acc = tl.zeros([N, M], dtype=tl.int32)
    for i_step in tl.range(steps, num_stages=STAGES):
        o_k = i_step * K + tl.arange(0, K)
        if WHOLE:
            i_tap = i_step * K // channels
            o_c = i_step * K % channels + tl.arange(0, K)
            o_tap = i_tap + tl.zeros([K], dtype=tl.int32)
        else:
            o_c = o_k % channels
            o_tap = o_k // channels
        o_h = o_y[None, :] * SH - PH + (o_tap // KW * DH)[:, None]
        o_w = o_x[None, :] * SW - PW + (o_tap % KW * DW)[:, None]
        if LONG:
            o_h = o_h.to(tl.int64)
            o_w = o_w.to(tl.int64)
        m_k = o_k < total
        m_x = m_k[:, None] & m_m[None, :] & (o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width)
        b_w = tl.load(p_row + o_k[None, :], mask=m_o[:, None] & m_k[None, :], other=0)
        b_x = tl.load(
            p_image[None, :] + o_c.to(tl.int64)[:, None] * stride_c + o_h * stride_h + o_w * stride_w, mask=m_x, other=0
        )
        b_q = tl.where(m_x, b_x, b_zero.to(tl.int8)) if CODES else quantize_block(b_x, b_scale, b_zero, LOW, HIGH)
        b_acc = integer_product(b_w, b_q, b_acc)
    b_acc -= tl.load(p_sums + o_out, mask=m_o, other=0)[:, None] * b_zero.to(tl.int32)
    b_y = b_acc.to(tl.float32) * (tl.load(p_wscale + o_out, mask=m_o, other=0.0) * b_scale)[:, None]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_out, mask=m_o, other=0.0).to(tl.float32)[:, None]
    if RELU:
        b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if LONG:
        o_y = o_y.to(tl.int64)
        o_x = o_x.to(tl.int64)
    p_y = p_out + o_image.to(tl.int64)[None, :] * stride_on + o_out.to(tl.int64)[:, None] * stride_oc
    p_y += (o_y * stride_oh + o_x * stride_ow)[None, :]
    m_y = m_o[:, None] & m_m[None, :]
    if REQUANTIZE:
        b_next = tl.load(p_ozero).to(tl.float32) - OUT_OFFSET
        tl.store(p_y, quantize_block(b_y, tl.load(p_oscale), b_next, OUT_LOW, OUT_HIGH), mask=m_y)
    else:
        tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_y)


@on_its_device
def int8_conv(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    problem: ConvProblem,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """``x`` [B, C, H, W], floats or int8 codes, to [B, O, H', W']: floats, or channels-last codes on the next grid.

    ``weight``'s codes are [O, kernel height, kernel width, C / groups]. ``tile``: outputs, positions a program,
    channels a step, warps, stages.
    """
    batch, _, height, width = x.shape
    outputs, kernel_h, kernel_w, channels = weight.codes.shape
    out = problem.new_output(x, outputs, (kernel_h, kernel_w))
    out_h, out_w = out.shape[2:]
    group_outputs, positions = outputs // problem.groups, batch * out_h * out_w
    n, m, k, warps, stages = tile or default_tile(group_outputs, positions, channels)
    low, high = problem.grid.bounds
    following = problem.following or problem.grid
    next_low, next_high = following.bounds
    grid = (triton.cdiv(group_outputs, n) * triton.cdiv(positions, m), problem.groups)
    int8_conv_fwd_kernel[grid](
        x, problem.grid.scale, problem.grid.zero_point, weight.codes, weight.scale, weight.sums,
        bias if bias is not None else weight.scale, following.scale, following.zero_point, out,
        positions, group_outputs, channels, height, width, out_w, out_h * out_w,
        triton.cdiv(channels * kernel_h * kernel_w, k), *x.stride(), *out.stride(),
        SH=problem.stride[0], SW=problem.stride[1], PH=problem.padding[0], PW=problem.padding[1],
        DH=problem.dilation[0], DW=problem.dilation[1], KH=kernel_h, KW=kernel_w, M=m, N=n, K=k,
        WHOLE=channels % k == 0, OFFSET=problem.grid.offset, LOW=low, HIGH=high, CODES=x.dtype is torch.int8,
        HAS_BIAS=bias is not None, RELU=problem.relu, REQUANTIZE=problem.following is not None,
        OUT_OFFSET=following.offset, OUT_LOW=next_low, OUT_HIGH=next_high,
        OVERLAP=overlaps(x), STAGES=stages, LONG=max(_reach(x), _reach(out)) >= _LONG,
        num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out


def _reach(image: Tensor) -> int:
    """How far apart the first and the last position of an image in ``image`` [B, C, H, W] lie, in entries."""
    return sum((size - 1) * stride for size, stride in zip(image.shape[2:], image.stride()[2:], strict=True))


def default_tile(outputs: int, positions: int, channels: int) -> tuple[int, int, int, int, int]:
    """Steps of whole channels where they fit. Chosen by reasoning: this kernel has not been timed."""
    n = max(16, min(64, power_of_two(outputs)))
    m = max(16, min(64, power_of_two(positions)))
    return n, m, 64 if channels % 64 == 0 else 32, 4, 3


KERNEL = Kernel(
    run=int8_conv,
    requires=Requires(
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.int8), inputs=MOST_INPUTS, group_outputs=16
    ),
)
