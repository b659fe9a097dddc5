"""Block products on the tensor cores, as every kernel here writes them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.launch import capability

__all__ = ["block_product", "integer_product", "product_precision"]


@triton.jit
def block_product(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """``b_acc + b_a @ b_b`` in float32 sums."""
    if PRECISION == "widened":
        b_acc += tl.dot(b_a.to(tl.float32), b_b.to(tl.float32))
    else:
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def integer_product(b_a, b_b, b_acc):
    """``b_acc + b_a @ b_b`` of bytes in 32-bit integers; triton before 3.9 takes sums for float32 unless it is told."""
    return tl.dot(b_a, b_b, b_acc, out_dtype=tl.int32)


def product_precision(x: Tensor) -> str:
    """How blocks of ``x`` are multiplied: float32 in three tf32 products, which keep 21 bits.

    Triton's interpreter multiplies bfloat16 as the integers it stores them in; on a CPU all blocks are widened first.
    """
    if capability(x) is None:
        return "widened"
    return "tf32x3" if x.dtype is torch.float32 else "tf32"
