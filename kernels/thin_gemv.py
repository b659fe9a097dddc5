"""One row times a low-rank weight, ``up @ (down @ x)``: two launches of one kernel, the second waiting on the chip.

The second launch starts while the first runs (programmatic dependent launch, from Hopper on), has its part of ``up`` in
registers by the time the rank-sized result is there, and reads that from the cache. A smaller rank is fewer rows of
``down`` and shorter rows of ``up``: nothing is copied.

That is right as long as no kernel in flight writes the weight: only waiting makes the writes of those launched before
visible. Whatever changes factors in place just before (an optimizer's step, a merged delta) breaks it, unless the
stream is synchronized in between; so factors that require gradients are refused.

Alphabet as in packed_gemv.py; N outputs, K inputs of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.dispatch import Kernel, Requires
from compress.kernels.launch import launch_options, multiprocessors, on_its_device, overlaps, power_of_two
from compress.kernels.tuning import measured_tile

__all__ = ["KERNEL", "inner_gemv", "lowrank_gemv", "thin_gemv"]


@triton.jit
def thin_gemv_fwd_kernel(
    p_x, p_w, p_bias, p_out, outputs, inputs, span, stride_x, stride_w, stride_split, stride_out,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """``p_w`` [outputs, inputs], rows ``stride_w`` apart; programs: outputs, rows, splits of ``span`` inputs.

    LATE: let the next kernel start only when this one's inputs are complete, so that it may read them, too.
    """
    i_m = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    o_k = tl.arange(0, K)[None, :]
    m_o = o_n < outputs
    p_row = p_w + o_n.to(tl.int64)[:, None] * stride_w
    p_x += i_m * stride_x
    first = tl.program_id(2) * span
    inputs = tl.minimum(inputs, first + span)
    if OVERLAP and not LATE:
        tl.extra.cuda.gdc_launch_dependents()
    # No kernel in flight writes weights (see above): they are on the way before this one waits for its input.
    b_next = tl.load(p_row + first + o_k, mask=m_o[:, None] & (first + o_k < inputs), other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        if LATE:
            tl.extra.cuda.gdc_launch_dependents()
    b_acc = tl.zeros([N, K], dtype=tl.float32)
    for i_k in range(first, inputs, K):
        b_w = b_next.to(tl.float32)
        o_next = i_k + K + o_k
        b_next = tl.load(p_row + o_next, mask=m_o[:, None] & (o_next < inputs), other=0.0)
        b_x = tl.load(p_x + i_k + o_k, mask=i_k + o_k < inputs, other=0.0).to(tl.float32)
        b_acc += b_w * b_x
    b_y = tl.sum(b_acc, 1)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_o, other=0.0).to(tl.float32)
    p_out += tl.program_id(2).to(tl.int64) * stride_split
    tl.store(p_out + i_m * stride_out + o_n, b_y.to(p_out.dtype.element_ty), mask=m_o)


def thin_gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: tuple[int, int] | None = None
) -> Tensor:
    """``x`` [M, I] times ``weight`` [O, I], rows maybe apart, to [M, O] in ``dtype``; ``tile``: outputs, warps."""
    tile = tile or measured_tile(x, "thin_gemv", weight.shape[0], weight.dtype) or default_tile(weight.shape[0])
    return _launch(x, weight, bias, dtype, tile, splits=1, late=False)[0]


def inner_gemv(x: Tensor, down: Tensor) -> Tensor:
    """``x`` [M, I] times a branch's ``down`` [R, I], as partial sums [S, M, R] in float32.

    The kernel launched next may start while this one runs, but not before ``x`` is complete.
    """
    # A few rows alone would keep a few multiprocessors busy with long sums.
    splits = max(1, min(8, x.shape[1] // 2048, 4 * multiprocessors(x) // down.shape[0]))
    return _launch(x, down, None, torch.float32, (1, 4), splits, late=True)


def default_tile(outputs: int) -> tuple[int, int]:
    """Few outputs: all warps along a row, so that there are programs enough."""
    if outputs <= 1024:
        return 2, 8
    return (4, 4) if outputs <= 4096 else (8, 4)


@on_its_device
def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: tuple[int, int], splits: int, late: bool
) -> Tensor:
    """[S, M, O] in ``dtype``."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    n, warps = tile
    # 16 bytes of weights a thread; no more threads than a row needs.
    per_thread = 16 // weight.element_size()
    warps = max(1, min(warps, power_of_two(inputs) // (32 * per_thread)))
    k = warps * 32 * per_thread
    span = triton.cdiv(triton.cdiv(inputs, k), splits) * k
    splits = triton.cdiv(inputs, span)
    out = torch.empty(splits, rows, outputs, dtype=dtype, device=x.device)
    thin_gemv_fwd_kernel[(triton.cdiv(outputs, n), rows, splits)](
        x, weight, bias if bias is not None else x, out, outputs, inputs, span,
        x.stride(0), weight.stride(0), out.stride(0), out.stride(1),
        N=n, K=k, HAS_BIAS=bias is not None, OVERLAP=overlaps(x), LATE=late,
        num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return out


def lowrank_gemv(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    tiles: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None),
) -> Tensor:
    """``x`` [M, I] to ``up`` [O, R] @ (``down`` [R, I] @ x) + bias, [M, O]; float32 between the two."""
    return thin_gemv(thin_gemv(x, down, None, torch.float32, tiles[0]), up, bias, x.dtype, tiles[1])


KERNEL = Kernel(
    run=lowrank_gemv,
    requires=Requires(
        dtypes=(torch.float16, torch.bfloat16, torch.float32), rows=(1, 2), trained=False, capability=(8, 0)
    ),
)
