"""The grid of a product's inputs: how rows of floats become bytes, in plain PyTorch.

    code = clip(round(x / scale) + zero_point)          to bytes from -128, so that unsigned grids are moved by 128

==========  =========================================================================================================
``static``  calibrated: a scale and a zero point for the whole tensor, or one of each a row
``tensor``  of the whole tensor's own range, zero in it, 8 bits: ONNX's DynamicQuantizeLinear (kernels/dynamic.py)
``token``   of each row's own largest absolute value, symmetric, from -127 to 127
==========  =========================================================================================================

NaN makes its own range NaN, and with it everything that is rounded to that. A calibrated grid has no such thing, nor
have bytes that are passed on: there it becomes the lowest code, as ONNX Runtime has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.kernels.dynamic import divide, dynamic_grid

__all__ = ["KINDS", "RowGrid"]

KINDS = ("static", "tensor", "token")


@dataclass(frozen=True)
class RowGrid:
    """How inputs [M, I] are rounded.

    Attributes:
        kind: one of KINDS.
        scale: of a static grid: float32 [] or [M].
        zero_point: of a static grid: uint8 or int8, of ``scale``'s shape.
        bits: of a static grid: codes span 2**bits from the smallest on.
    """

    kind: str
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    bits: int = 8

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return (-127, 127) if self.kind == "token" else (-128, -128 + (1 << self.bits) - 1)

    @property
    def offset(self) -> int:
        """What is taken off a zero point, as it is off codes."""
        unsigned = self.kind == "tensor" or (self.zero_point is not None and self.zero_point.dtype is torch.uint8)
        return 128 if unsigned else 0

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of ``x`` [M, I] as float32, and scale and zero point, [M, 1] or [1, 1], as float32."""
        x = x.float()
        if self.kind == "static":
            assert self.scale is not None
            assert self.zero_point is not None
            scale, zero = self.scale.reshape(-1, 1), self.zero_point.reshape(-1, 1).float() - self.offset
        elif self.kind == "tensor":
            scale, zero = (each.reshape(1, 1) for each in dynamic_grid(x))
            zero = zero - self.offset
        else:
            scale = divide(x.abs().amax(1, keepdim=True), 127)
            scale = torch.where(scale > 0, scale, 1.0)
            zero = torch.zeros_like(scale)
        codes = torch.round(x / scale).add_(zero).clamp_(*self.bounds)
        return codes.nan_to_num_(self.bounds[0]) if self.kind == "static" else codes, scale, zero
