"""Integer grids for weights: a scale and a zero point an output channel, or a group of a channel's weights.

Symmetric: ``zero_point = 2**(b-1)`` and the codes ``-2**(b-1) .. 2**(b-1) - 1`` around it, as integer kernels want it.
Asymmetric: ``scale = (max - min) / (2**b - 1)``, ``zero_point = round(-min / scale)`` with ``min <= 0 <= max``, so that
zero is a grid point.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from compress.quant.weights import QuantizedWeight, spread

__all__ = ["groups_of", "min_max_grid", "mse_grid", "quantize"]

_SMALLEST = 1e-12
_LOWEST_RATIO = 0.2
_COARSE = 17
_FINER = 4
_REFINEMENTS = 2
_CACHED = 1 << 17  # weights


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


def min_max_grid(
    weight: Tensor, bits: int, symmetric: bool, group_size: int | None = None, smallest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, [O] or [O, G], that reach the largest weight of every grid of ``weight`` [O, ...].

    Args:
        smallest: what no step [O] may be below, on symmetric grids of whole channels; None: anything.
    """
    flat = groups_of(weight, group_size)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    scale, zero_point = _grid(low, high, torch.ones_like(low), bits, symmetric, smallest)
    return _by_channel(scale, weight, group_size), _by_channel(zero_point, weight, group_size)


def mse_grid(
    weight: Tensor, bits: int, symmetric: bool, group_size: int | None = None, smallest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The grids of the smallest squared error, among ranges from 20 % to 100 % of the min-max range.

    A search in steps of 5 % of the range, then around each grid's best in steps of 1.25 % and 0.3 %. The full range is
    among the candidates, so that no grid is worse than with :func:`min_max_grid`, which takes the same arguments.
    """
    flat = groups_of(weight, group_size)
    # A few rows at a time: what is rounded again and again stays in the processor's cache.
    count = max(_CACHED // flat.shape[1], 1)
    least = smallest.split(count) if smallest is not None else repeat(None)
    parts = [_search(rows, bits, symmetric, each) for rows, each in zip(flat.split(count), least, strict=False)]
    scale, zero_point = (torch.cat(each) for each in zip(*parts, strict=True))
    return _by_channel(scale, weight, group_size), _by_channel(zero_point, weight, group_size)


def _search(rows: Tensor, bits: int, symmetric: bool, smallest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R] for ``rows`` [R, n]."""
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    room = torch.empty_like(rows)
    top = (1 << bits) - 1
    best_ratio = torch.ones_like(low)
    best_error = torch.full_like(low, torch.inf)

    def consider(ratio: Tensor) -> None:
        nonlocal best_ratio, best_error
        scale, zero_point = (each[:, None] for each in _grid(low, high, ratio, bits, symmetric, smallest))
        torch.div(rows, scale, out=room)
        room.round_().add_(zero_point).clamp_(0, top).sub_(zero_point).mul_(scale).sub_(rows)
        error = room.square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_ratio = torch.where(better, ratio, best_ratio)

    for ratio in torch.linspace(1.0, _LOWEST_RATIO, _COARSE):
        consider(ratio.expand_as(low))
    step = (1.0 - _LOWEST_RATIO) / (_COARSE - 1)
    for _ in range(_REFINEMENTS):
        step /= _FINER
        centre = best_ratio
        for offset in range(1, _FINER):
            for sign in (-1, 1):
                consider((centre + sign * offset * step).clamp(_LOWEST_RATIO, 1.0))
    return _grid(low, high, best_ratio, bits, symmetric, smallest)


def _by_channel(grid: Tensor, weight: Tensor, group_size: int | None) -> Tensor:
    return grid if group_size is None else grid.reshape(len(weight), -1)


def _grid(
    low: Tensor, high: Tensor, ratio: Tensor, bits: int, symmetric: bool, smallest: Tensor | None
) -> tuple[Tensor, Tensor]:
    if symmetric:
        # The range reaches from -2^(b-1) to 2^(b-1) - 1 steps; a step that fits both ends clips nothing.
        half = 1 << (bits - 1)
        scale = torch.maximum(high / (half - 1), -low / half) * ratio
        scale = scale if smallest is None else torch.maximum(scale, smallest)
        return scale.clamp(min=_SMALLEST), torch.full_like(scale, half)
    scale = ((high - low) * ratio / ((1 << bits) - 1)).clamp(min=_SMALLEST)
    return scale, torch.round(-low * ratio / scale).clamp(0, (1 << bits) - 1)
