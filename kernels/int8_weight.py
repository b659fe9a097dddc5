"""A weight as integer products read it: one byte an entry, row by row, whatever its width in the file.

    weight_oi = codes_oi * scale_o          codes from -128 to 127, signed; the grid is symmetric, one scale a row

``sums`` holds what each row's codes add up to: an input's zero point meets all of a row's codes at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quant.weights import QuantizedWeight

__all__ = ["MOST_INPUTS", "Int8Weight"]

# Sums in 32 bits are of (code - zero point) * weight code, up to 255 * 128 each: a zero point may be at either end.
MOST_INPUTS = ((1 << 31) - 1) // (255 * 128)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [O, ...] in signed bytes.

    Attributes:
        codes: int8 [O, I], or [O, C, kernel height, kernel width] of a convolution.
        scale: float32 [O].
        sums: int32 [O], of each output's codes.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor

    def to(self, device: str | torch.device) -> Int8Weight:
        """The same weight on ``device``."""
        return Int8Weight(self.codes.to(device), self.scale.to(device), self.sums.to(device))

    @staticmethod
    def from_quantized(weight: QuantizedWeight) -> Int8Weight:
        """``weight``, of up to 8 bits, with one symmetric grid a row.

        Raises:
            ValueError: its rows have several grids, or zero points that are not in the middle.
        """
        if weight.group_size is not None or weight.scale.dim() != 1:
            raise ValueError(f"a weight in groups of {weight.group_size}; integer products take one scale a row")
        if not weight.symmetric:
            raise ValueError("a weight with zero points of its own; integer products take symmetric grids")
        codes = (weight.codes.to(torch.int16) - (1 << (weight.bits - 1))).to(torch.int8)
        sums = codes.flatten(1).sum(1, dtype=torch.int32)
        return Int8Weight(codes.contiguous(), weight.scale.float().contiguous(), sums)
