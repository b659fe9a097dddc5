"""A quantized weight as plain tensors: what every method returns and every format stores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.packing import pack, unpack

__all__ = ["QuantizedWeight"]


@dataclass(frozen=True)
class QuantizedWeight:
    """Unsigned integer codes with one affine grid an output channel: ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: uint8, the weight's own shape, values 0..2**bits - 1.
        scale: float32 ``[O]``, positive.
        zero_point: uint8 ``[O]``; on a symmetric grid every entry is ``2**(bits - 1)``.
        bits: width of a code, 2..8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    @property
    def symmetric(self) -> bool:
        """Whether every channel's zero point is the middle of the grid."""
        return bool((self.zero_point == 1 << (self.bits - 1)).all())

    def dequantize(self) -> Tensor:
        """The float32 weight the codes stand for, in the weight's own shape."""
        per_channel = (-1, *[1] * (self.codes.dim() - 1))
        centred = self.codes.float() - self.zero_point.float().reshape(per_channel)
        return centred * self.scale.reshape(per_channel)

    def scaled(self, factor: Tensor) -> QuantizedWeight:
        """The same codes with every channel's scale multiplied by ``factor`` ([O], positive)."""
        return replace(self, scale=self.scale * factor)

    def tensors(self) -> dict[str, Tensor]:
        """Packed form for storage: ``packed`` [bits, ceil(n / 8)], ``scale`` [O], ``zero_point`` [O]."""
        return {"packed": pack(self.codes, self.bits), "scale": self.scale, "zero_point": self.zero_point}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], bits: int, shape: tuple[int, ...]) -> QuantizedWeight:
        """Inverse of :meth:`tensors`."""
        codes = unpack(tensors["packed"], bits, torch.Size(shape).numel()).reshape(shape)
        return QuantizedWeight(codes, tensors["scale"], tensors["zero_point"], bits)
