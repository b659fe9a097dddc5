"""``compress::dequantize_weight`` and ``compress::dequantize_bias``: stored integers back to the floats they stand for.

The weight's ``compute`` names how a runtime is to use it, which storage does not decide: ``"integer"`` lets the
exporter feed an integer kernel, ``"float"`` makes it an ordinary float weight at load time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.packing import unpack

__all__ = ["dequantize_bias", "dequantize_weight"]


@torch.library.custom_op("compress::dequantize_weight", mutates_args=())
def dequantize_weight(
    packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, shape: list[int], compute: str
) -> Tensor:
    """Reference: ``packed`` uint8 in compress.packing's layout, ``scale`` float32 [O], ``zero_point`` uint8 [O]."""
    per_channel = (-1, *[1] * (len(shape) - 1))
    codes = unpack(packed, bits, torch.Size(shape).numel()).reshape(shape).to(scale.dtype)
    return codes.sub_(zero_point.to(scale.dtype).reshape(per_channel)).mul_(scale.reshape(per_channel))


@dequantize_weight.register_fake
def _weight_shape(
    packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, shape: list[int], compute: str
) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("compress::dequantize_bias", mutates_args=())
def dequantize_bias(codes: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Reference: int32 ``codes`` [O] on the accumulator's grid, ``input_scale`` [] times ``weight_scale`` [O]."""
    return codes.to(weight_scale.dtype) * (input_scale * weight_scale)


@dequantize_bias.register_fake
def _bias_shape(codes: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.empty_like(weight_scale)
