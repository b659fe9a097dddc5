"""A quantized weight as plain tensors: what every method returns and every format stores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.quant.packing import pack, unpack

__all__ = ["QuantizedWeight", "spread"]


@dataclass(frozen=True)
class QuantizedWeight:
    """Unsigned integer codes, ``weight = (codes - zero_point) * scale``, on a grid an output channel, or a group of it.

    Attributes:
        codes: uint8, the weight's own shape, values 0..2**bits - 1.
        scale: float32 ``[O]``, or ``[O, G]`` with groups, positive.
        zero_point: uint8, of ``scale``'s shape; on a symmetric grid every entry is ``2**(bits - 1)``.
        bits: width of a code, 2..8.
        group_size: weights along a flattened row that share a grid, the last group of a row maybe fewer; None: all.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int | None = None

    @property
    def symmetric(self) -> bool:
        """Whether every channel's zero point is the middle of the grid."""
        return bool((self.zero_point == 1 << (self.bits - 1)).all())

    def dequantize(self) -> Tensor:
        """The float32 weight the codes stand for, in the weight's own shape."""
        shape = tuple(self.codes.shape)
        centred = self.codes.float() - spread(self.zero_point.float(), shape, self.group_size)
        return centred * spread(self.scale, shape, self.group_size)

    def scaled(self, factor: Tensor) -> QuantizedWeight:
        """The same codes with every channel's scale multiplied by ``factor`` ([O], positive)."""
        return replace(self, scale=self.scale * factor.reshape(-1, *[1] * (self.scale.dim() - 1)))

    def tensors(self) -> dict[str, Tensor]:
        """Packed form for storage: ``packed`` [bits, ceil(n / 8)], ``scale`` and ``zero_point`` as they are."""
        return {"packed": pack(self.codes, self.bits), "scale": self.scale, "zero_point": self.zero_point}

    @staticmethod
    def from_tensors(
        tensors: dict[str, Tensor], bits: int, shape: tuple[int, ...], group_size: int | None = None
    ) -> QuantizedWeight:
        """Inverse of :meth:`tensors`."""
        codes = unpack(tensors["packed"], bits, torch.Size(shape).numel()).reshape(shape)
        return QuantizedWeight(codes, tensors["scale"], tensors["zero_point"], bits, group_size)


def spread(grid: Tensor, shape: tuple[int, ...], group_size: int | None) -> Tensor:
    """Scales or zero points, [O] or [O, G], so that they meet a weight of ``shape`` [O, ...] entry by entry."""
    if group_size is None:
        return grid.reshape(-1, *[1] * (len(shape) - 1))
    row = torch.Size(shape[1:]).numel()
    return grid.repeat_interleave(group_size, dim=1)[:, :row].reshape(shape)
