"""Integer grids for weights: a scale and a zero point an output channel.

Symmetric: ``zero_point = 2**(b-1)`` and the codes ``-2**(b-1) .. 2**(b-1) - 1`` around it, as integer kernels want it.
Asymmetric: ``scale = (max - min) / (2**b - 1)``, ``zero_point = round(-min / scale)`` with ``min <= 0 <= max``, so that
zero is a grid point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights import QuantizedWeight

__all__ = ["min_max_grid", "mse_grid", "quantize"]

_SMALLEST = 1e-12
_CANDIDATES = 100
_LOWEST_RATIO = 0.2


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> QuantizedWeight:
    """Round ``weight`` [O, ...] to the nearest point of its channel's grid; ``scale`` and ``zero_point`` are [O]."""
    per_channel = (-1, *[1] * (weight.dim() - 1))
    codes = torch.round(weight / scale.reshape(per_channel)) + zero_point.reshape(per_channel)
    return QuantizedWeight(codes.clamp(0, (1 << bits) - 1).to(torch.uint8), scale, zero_point.to(torch.uint8), bits)


def min_max_grid(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O] that reach the largest weight of every channel of ``weight`` [O, ...]."""
    flat = weight.reshape(len(weight), -1)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    return _grid(low, high, torch.ones_like(low), bits, symmetric)


def mse_grid(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid of the smallest squared error a channel, among ranges from 20 % to 100 % of the min-max range.

    The full range is among the candidates, so that no channel is worse than with :func:`min_max_grid`.
    """
    flat = weight.reshape(len(weight), -1)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = _grid(low, high, torch.ones_like(low), bits, symmetric)
    for ratio in torch.linspace(1.0, _LOWEST_RATIO, _CANDIDATES):
        scale, zero_point = _grid(low, high, ratio.expand_as(low), bits, symmetric)
        error = (quantize(flat, scale, zero_point, bits).dequantize() - flat).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _grid(low: Tensor, high: Tensor, ratio: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        # The range reaches from -2^(b-1) to 2^(b-1) - 1 steps; a step that fits both ends clips nothing.
        half = 1 << (bits - 1)
        scale = torch.maximum(high / (half - 1), -low / half) * ratio
        return scale.clamp(min=_SMALLEST), torch.full_like(scale, half)
    scale = ((high - low) * ratio / ((1 << bits) - 1)).clamp(min=_SMALLEST)
    return scale, torch.round(-low * ratio / scale).clamp(0, (1 << bits) - 1)
