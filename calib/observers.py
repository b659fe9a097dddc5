"""Ranges of activations from a stream of batches; memory does not grow with their number.

A histogram of fixed size follows the stream: when a batch reaches beyond it, the bins double in width until it fits.
Every observer reads the finished histogram (min-max only its ends):

- ``minmax``: everything seen.
- ``percentile``: cut 0.001 % of the values at either end.
- ``mse``: the range of the smallest squared error of the quantized values.
- ``histogram``: the range whose quantized distribution has the smallest Kullback-Leibler divergence from the original
  (the entropy calibration known from TensorRT).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import InputError
from compress.records.registry import resolve

__all__ = ["OBSERVERS", "Histogram", "activation_grid", "observe_range"]

OBSERVERS = {
    "minmax": "compress.calib.observers:min_max_range",
    "percentile": "compress.calib.observers:percentile_range",
    "mse": "compress.calib.observers:mse_range",
    "histogram": "compress.calib.observers:entropy_range",
}

_BINS = 4096
_PERCENTILE = 0.99999
_CANDIDATES = 80
_LOWEST_RATIO = 0.15
_SMALLEST_RANGE = 1e-8
_OVERFLOW = 1e30


class Histogram:
    """Counts [4096] over ``low .. low + 4096 * width``, exact minimum and maximum beside them."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.low = 0.0
        self.width = 0.0
        self.minimum = float("inf")
        self.maximum = float("-inf")

    def update(self, batch: Tensor) -> None:
        """Count every element of ``batch`` (any shape).

        Raises:
            InputError: an element is not finite, or nearly so.
        """
        low, high = (float(edge) for edge in torch.aminmax(batch))
        if not max(abs(low), abs(high)) < _OVERFLOW:  # NaN included
            raise InputError(
                f"activations span {low}..{high}: the model overflows on the calibration data; "
                "check its normalisation (--mean, --std)"
            )
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if self.width == 0.0:
            self.low, self.width = low, max((high - low) / _BINS, 1e-12 + abs(low) * 1e-6)
        while high > self.low + _BINS * self.width:
            self._widen(down=False)
        while low < self.low:
            self._widen(down=True)
        self.counts += torch.histc(batch.float(), _BINS, self.low, self.low + _BINS * self.width).double()

    def centres(self) -> Tensor:
        """Middle of every bin, float64 [4096]."""
        return self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * self.width

    def _widen(self, down: bool) -> None:
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        half = _BINS // 2
        if down:
            self.counts[half:] = merged
            self.low -= _BINS * self.width
        else:
            self.counts[:half] = merged
        self.width *= 2


def observe_range(histogram: Histogram, observer: str, bits: int) -> tuple[float, float]:
    """Range ``(low, high)`` with ``low <= 0 <= high`` that ``observer`` (a name from the table) chooses for ``bits``.

    Raises:
        InputError: unknown observer.
    """
    assert histogram.minimum <= histogram.maximum, "nothing was observed"
    low, high = resolve(OBSERVERS, observer, "observer")(histogram, bits)
    return min(low, 0.0), max(high, 0.0)


def activation_grid(low: float, high: float, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (float32 []) and zero point ([] of ``dtype``) of the ``bits``-wide grid over ``low .. high``.

    Values that were all zero get the grid of 0 .. 1: a step of next to nothing would leave the bias of the layer that
    reads them no room in its int32.
    """
    steps = (1 << bits) - 1
    scale = (high - low if high - low > _SMALLEST_RANGE else 1.0) / steps
    zero = min(max(round(-low / scale), 0), steps)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(zero + torch.iinfo(dtype).min, dtype=dtype)


def min_max_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Everything seen."""
    return histogram.minimum, histogram.maximum


def percentile_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    """All but the outermost values."""
    total = histogram.counts.sum()
    reached = torch.cumsum(histogram.counts, 0)
    first = int(torch.searchsorted(reached, (1 - _PERCENTILE) * total))
    last = min(int(torch.searchsorted(reached, _PERCENTILE * total)), _BINS - 1)
    low = histogram.low + first * histogram.width
    high = histogram.low + (last + 1) * histogram.width
    return max(low, histogram.minimum), min(high, histogram.maximum)


def mse_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Shrink both ends alike, then each alone, and keep the range of the smallest squared error."""
    centres, counts = histogram.centres(), histogram.counts
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    ratios = torch.linspace(1.0, _LOWEST_RATIO, _CANDIDATES, dtype=torch.float64).tolist()

    def error(ratio_low: float, ratio_high: float) -> float:
        return float((counts * (_on_grid(centres, low * ratio_low, high * ratio_high, bits) - centres).square()).sum())

    best = min(ratios, key=lambda ratio: error(ratio, ratio))
    best_high = min(ratios, key=lambda ratio: error(best, ratio)) if low < 0 else best
    best_low = min(ratios, key=lambda ratio: error(ratio, best_high)) if low < 0 else best
    return low * best_low, high * best_high


def entropy_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Shrink both ends alike and keep the range of the smallest KL divergence."""
    centres, counts = histogram.centres(), histogram.counts
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)

    def divergence(ratio: float) -> float:
        inside = (centres >= low * ratio) & (centres <= high * ratio)
        reference = counts * inside
        # Clipped mass stands on the outermost bins inside, where the quantizer puts it.
        edges = inside.nonzero().flatten()
        if len(edges) == 0:
            return float("inf")
        reference[edges[0]] += counts[: int(edges[0])].sum()
        reference[edges[-1]] += counts[int(edges[-1]) + 1 :].sum()
        codes = torch.round(
            (_on_grid(centres, low * ratio, high * ratio, bits) - low) / max(high - low, 1e-30) * 1e6
        ).long()
        _, group = torch.unique(codes, return_inverse=True)
        occupied = (counts > 0) & inside
        mass = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, counts * inside)
        width = torch.zeros_like(mass).index_add_(0, group, occupied.double())
        model = torch.where(occupied, (mass / width.clamp(min=1))[group], torch.zeros_like(counts))
        p, q = reference / reference.sum(), model / model.sum().clamp(min=1e-30)
        used = p > 0
        return float((p[used] * torch.log(p[used] / q[used].clamp(min=1e-12))).sum())

    best = min(torch.linspace(1.0, _LOWEST_RATIO, _CANDIDATES, dtype=torch.float64).tolist(), key=divergence)
    return low * best, high * best


def _on_grid(values: Tensor, low: float, high: float, bits: int) -> Tensor:
    steps = (1 << bits) - 1
    scale = max(high - low, 1e-30) / steps
    zero = min(max(round(-low / scale), 0), steps)
    return (torch.clamp(torch.round(values / scale) + zero, 0, steps) - zero) * scale
