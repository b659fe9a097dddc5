"""Integer grids for weights: a scale and a zero point an output channel, or a group of a channel's weights.

Symmetric: ``zero_point = 2**(b-1)`` and the codes ``-2**(b-1) .. 2**(b-1) - 1`` around it, as integer kernels want it.
Asymmetric: ``scale = (max - min) / (2**b - 1)``, ``zero_point = round(-min / scale)`` with ``min <= 0 <= max``, so that
zero is a grid point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights import QuantizedWeight, spread

__all__ = ["groups_of", "min_max_grid", "mse_grid", "quantize"]

_SMALLEST = 1e-12
_CANDIDATES = 100
_LOWEST_RATIO = 0.2


def quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int | None = None
) -> QuantizedWeight:
    """Round ``weight`` [O, ...] to the nearest point of its grid; ``scale`` and ``zero_point`` are [O] or [O, G]."""
    shape = tuple(weight.shape)
    codes = torch.round(weight / spread(scale, shape, group_size)) + spread(zero_point, shape, group_size)
    codes = codes.clamp(0, (1 << bits) - 1).to(torch.uint8)
    return QuantizedWeight(codes, scale, zero_point.to(torch.uint8), bits, group_size)


def groups_of(weight: Tensor, group_size: int | None) -> Tensor:
    """The weights that share a grid as rows: [O, row], or [O * G, group], a row's last group filled up with zeros."""
    flat = weight.reshape(len(weight), -1)
    if group_size is None:
        return flat
    missing = -flat.shape[1] % group_size
    return torch.nn.functional.pad(flat, (0, missing)).reshape(-1, group_size)


def min_max_grid(weight: Tensor, bits: int, symmetric: bool, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [O] or [O, G], that reach the largest weight of every grid of ``weight`` [O, ...]."""
    flat = groups_of(weight, group_size)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    scale, zero_point = _grid(low, high, torch.ones_like(low), bits, symmetric)
    return _by_channel(scale, weight, group_size), _by_channel(zero_point, weight, group_size)


def mse_grid(weight: Tensor, bits: int, symmetric: bool, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The grids of the smallest squared error, among ranges from 20 % to 100 % of the min-max range.

    The full range is among the candidates, so that no grid is worse than with :func:`min_max_grid`.
    """
    flat = groups_of(weight, group_size)
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
    return _by_channel(best_scale, weight, group_size), _by_channel(best_zero, weight, group_size)


def _by_channel(grid: Tensor, weight: Tensor, group_size: int | None) -> Tensor:
    return grid if group_size is None else grid.reshape(len(weight), -1)


def _grid(low: Tensor, high: Tensor, ratio: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        # The range reaches from -2^(b-1) to 2^(b-1) - 1 steps; a step that fits both ends clips nothing.
        half = 1 << (bits - 1)
        scale = torch.maximum(high / (half - 1), -low / half) * ratio
        return scale.clamp(min=_SMALLEST), torch.full_like(scale, half)
    scale = ((high - low) * ratio / ((1 << bits) - 1)).clamp(min=_SMALLEST)
    return scale, torch.round(-low * ratio / scale).clamp(0, (1 << bits) - 1)
