"""A few rows times a low-rank weight on the tensor cores: each thin product split along its inputs where programs lack.

Alphabet as in packed_gemv.py; M rows, N outputs, K inputs of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.launch import launch_options, on_its_device, overlaps, power_of_two
from compress.kernels.partial_sums import sum_partials
from compress.kernels.product import block_product, product_precision
from compress.kernels.tuning import measured_tile

__all__ = ["KERNEL", "lowrank_dot", "thin_dot"]


@triton.jit
def thin_dot_fwd_kernel(
    p_x, p_w, p_bias, p_out, rows, outputs, inputs, steps, stride_x, stride_w, stride_split,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs: outputs, rows, splits of ``steps`` times K inputs; ``p_out`` [splits, rows, outputs]."""
    i_split = tl.program_id(2)
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    o_m = tl.program_id(1) * M + tl.arange(0, M)
    m_o = o_n < outputs
    m_m = o_m < rows
    p_row = p_w + o_n.to(tl.int64)[:, None] * stride_w
    p_column = p_x + o_m.to(tl.int64)[None, :] * stride_x
    b_acc = tl.zeros([N, M], dtype=tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    first = i_split * steps
    for i_step in tl.range(first, tl.minimum(first + steps, tl.cdiv(inputs, K)), num_stages=STAGES):
        o_k = i_step * K + tl.arange(0, K)
        m_k = o_k < inputs
        b_w = tl.load(p_row + o_k[None, :], mask=m_o[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_column + o_k[:, None], mask=m_m[None, :] & m_k[:, None], other=0.0)
        b_acc = block_product(b_w, b_x, b_acc, PRECISION)
    if HAS_BIAS and i_split == 0:
        b_acc += tl.load(p_bias + o_n, mask=m_o, other=0.0).to(tl.float32)[:, None]
    p_y = p_out + i_split.to(tl.int64) * stride_split + o_m.to(tl.int64)[None, :] * outputs + o_n[:, None]
    tl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_o[:, None] & m_m[None, :])


@on_its_device
def thin_dot(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuple[int, int, int, int, int] | None = None
) -> Tensor:
    """``x`` [M, I] times ``weight`` [O, I], whose rows may be apart: [M, O] of ``x``'s dtype.

    ``tile``: outputs a program, inputs a step, splits, warps, stages.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    tile = tile or measured_tile(x, "thin_dot", outputs, weight.dtype)
    n, k, splits, warps, stages = tile or default_tile(rows, outputs, inputs, x.element_size())
    m = min(64, max(16, power_of_two(rows)))
    steps = triton.cdiv(triton.cdiv(inputs, k), splits)
    splits = max(1, triton.cdiv(inputs, k * steps)) if steps else 1
    out = torch.empty(splits, rows, outputs, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    thin_dot_fwd_kernel[(triton.cdiv(outputs, n), triton.cdiv(rows, m), splits)](
        x, weight, bias if bias is not None else x, out, rows, outputs, inputs, steps,
        x.stride(0), weight.stride(0), out.stride(0),
        M=m, N=n, K=k, HAS_BIAS=bias is not None, PRECISION=product_precision(x),
        OVERLAP=overlaps(x), STAGES=stages, num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out[0] if splits == 1 else sum_partials(out, x.dtype)


def default_tile(rows: int, outputs: int, inputs: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Few outputs: narrow tiles with long steps, split eight ways; many: each program goes through all inputs."""
    room = max(1, power_of_two(rows) // 16) * itemsize // 2
    if outputs <= 1024:
        return 32, max(32, 256 // room), max(1, min(8, inputs // 512)), 4, 4
    return 64, max(32, 128 // room), 1, 4, 4


def lowrank_dot(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    tiles: tuple[tuple[int, int, int, int, int] | None, tuple[int, int, int, int, int] | None] = (None, None),
) -> Tensor:
    """``x`` [M, I] to ``up`` [O, R] @ (``down`` [R, I] @ x) + bias, [M, O]; ``x``'s dtype between the two."""
    return thin_dot(thin_dot(x, down, None, tiles[0]), up, bias, tiles[1])


KERNEL = Kernel(
    run=lowrank_dot,
    requires=Requires(dtypes=(torch.float16, torch.bfloat16, torch.float32), rows=(1, 64), capability=(8, 0)),
)
