"""``compress::fake_quantize``: an activation rounded to a per-tensor integer grid and back.

``y = (clip(round(x / scale) + zero_point, low, low + 2**bits - 1) - zero_point) * scale`` with ``low`` the smallest
value of the zero point's dtype (0 for uint8, -128 for int8): codes of fewer than 8 bits lie at the bottom of the 8-bit
range, so that an integer runtime saturates their lower end for free and only the upper end needs a clip.
Rounding is half to even, as in ONNX QuantizeLinear. Backward: straight through inside the grid, zero outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["code_range", "fake_quantize"]


def code_range(zero_point_dtype: torch.dtype, bits: int) -> tuple[int, int]:
    """Smallest and largest code of a ``bits``-wide grid stored in ``zero_point_dtype`` (uint8 or int8)."""
    low = torch.iinfo(zero_point_dtype).min
    return low, low + (1 << bits) - 1


@torch.library.custom_op("compress::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Reference in plain PyTorch: ``x`` float32 of any shape, ``scale`` float32 [], ``zero_point`` uint8 or int8 []."""
    low, high = code_range(zero_point.dtype, bits)
    offset = zero_point.to(x.dtype)
    codes = torch.round(x / scale).add_(offset).clamp_(low, high)
    return codes.sub_(offset).mul_(scale)


@fake_quantize.register_fake
def _shape(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, bits = inputs
    low, high = code_range(zero_point.dtype, bits)
    offset = zero_point.to(x.dtype)
    ctx.save_for_backward((x >= (low - offset - 0.5) * scale) & (x <= (high - offset + 0.5) * scale))


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (inside,) = ctx.saved_tensors
    return gradient * inside, None, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_remember)
