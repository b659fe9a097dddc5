"""``compress::dequantize_weight`` and ``compress::dequantize_bias``: stored integers back to the floats they stand for.

The weight's ``compute`` names how a runtime is to use it, which storage does not decide: ``"integer"`` lets the
exporter feed an integer kernel, ``"float"`` makes it an ordinary float weight at load time, ``"blocks"`` keeps it
packed in memory for a kernel that unpacks blocks as it goes (MatMulNBits) and rounds its input, ``"blocks-float"`` for
one that does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.packing import unpack
from compress.quant.weights import spread

__all__ = ["dequantize_bias", "dequantize_weight"]

_COMPUTES = ("integer", "dynamic", "float", "blocks", "blocks-float")


@torch.library.custom_op("compress::dequantize_weight", mutates_args=())
def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: list[int],
    compute: str,
    group_size: int | None = None,
) -> Tensor:
    """Reference: ``packed`` uint8 in compress.quant.packing's layout; ``scale`` float32, ``zero_point`` uint8, [O] or
    [O, G].

    With ``group_size``, that many weights of a flattened row share a grid, the last of a row maybe fewer.

    Raises:
        ValueError: ``compute`` is none of those above.
    """
    if compute not in _COMPUTES:
        raise ValueError(f"compute {compute!r} is not known; it can be {', '.join(_COMPUTES)}")
    codes = unpack(packed, bits, torch.Size(shape).numel()).reshape(shape).to(scale.dtype)
    codes.sub_(spread(zero_point.to(scale.dtype), tuple(shape), group_size))
    return codes.mul_(spread(scale, tuple(shape), group_size))


@dequantize_weight.register_fake
def _weight_shape(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    shape: list[int],
    compute: str,
    group_size: int | None = None,
) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("compress::dequantize_bias", mutates_args=())
def dequantize_bias(codes: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Reference: int32 ``codes`` [O] on the accumulator's grid, ``input_scale`` [] times ``weight_scale`` [O]."""
    return codes.to(weight_scale.dtype) * (input_scale * weight_scale)


@dequantize_bias.register_fake
def _bias_shape(codes: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.empty_like(weight_scale)
