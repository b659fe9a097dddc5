"""``compress::fake_quantize_dynamic``: an activation rounded to the 8-bit grid of its own range, and back.

The grid is what ONNX's DynamicQuantizeLinear computes when the model runs: over the whole tensor, from its smallest to
its largest value, zero among them. No calibration is needed; a sample's result depends a little on what else is in its
batch. Backward: straight through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["divide", "dynamic_grid", "fake_quantize_dynamic"]

_TOP = 255


def divide(x: Tensor, number: int) -> Tensor:
    """``x / number``, rounded once everywhere: on a GPU torch multiplies with a plain number's reciprocal instead."""
    return x / x.new_full((), number)


def dynamic_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [] each in ``x``'s dtype, of the 8-bit grid that ``x`` gets."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = divide(high - low, _TOP)
    # All zeros: any grid keeps them. Its value is not asked for: a GPU would have to be waited for.
    scale = torch.where(scale > 0, scale, 1.0)
    offset = torch.round((-low / scale).clamp(0, _TOP))
    return scale, offset


@torch.library.custom_op("compress::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """Reference in plain PyTorch: ``x`` float32 of any shape."""
    scale, offset = dynamic_grid(x)
    codes = torch.round(x / scale).add_(offset).clamp_(0, _TOP)
    return codes.sub_(offset).mul_(scale)


@fake_quantize_dynamic.register_fake
def _shape(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _straight_through(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient  # the grid reaches every value


fake_quantize_dynamic.register_autograd(_straight_through)
