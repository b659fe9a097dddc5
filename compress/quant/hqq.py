"""HQQ: half-quadratic quantization of weights without data (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog).

Minimises ``||W - (q - z) s||_p^p`` with p = 0.7, which large errors of few weights do not dominate. The error is split
in two: ``E``, its sparse part, by a generalised soft threshold; zero point and scale by least squares on ``W - E``.
Unlike the original the zero point stays a whole number, as it is stored, and the scale is fitted too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quant.grid import groups_of, mse_grid, quantize
from compress.quant.pairs import step_bound
from compress.quant.problem import Effort, LayerProblem, Solution
from compress.records.layers import QuantOption

__all__ = ["HQQ", "HalfQuadratic"]

_NORM = 0.7
_STEPS = 20
_SHRINKAGE = 10.0
_GROWTH = 1.01
_SMALLEST = 1e-12


class HalfQuadratic:
    """The method; starts from round-to-nearest and keeps each grid's best."""

    needs_data = False
    sequential = True
    grouped = True
    iterations = 0
    step_cost = 0.0

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Quantize the weight; bias and input grid stay."""
        weight, group = problem.weight, option.group_size
        smallest = step_bound(problem, option)
        scale, zero_point = mse_grid(weight, option.bits, option.symmetric, group, smallest)
        shape = scale.shape
        rows = groups_of(weight, group)
        best_scale, best_zero = _search(rows, scale.reshape(-1), zero_point.reshape(-1).float(), option, smallest)
        return Solution(quantize(weight, best_scale.reshape(shape), best_zero.reshape(shape), option.bits, group))


HQQ = HalfQuadratic()


def _search(
    rows: Tensor, scale: Tensor, zero: Tensor, option: QuantOption, smallest: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best scale, not below ``smallest`` [R], and zero point [R] of each of ``rows`` [R, K] met on the way."""
    top = (1 << option.bits) - 1

    def codes(scale: Tensor, zero: Tensor) -> Tensor:
        return (torch.round(rows / scale[:, None]) + zero[:, None]).clamp(0, top)

    best = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale, zero
    beta = _SHRINKAGE
    for _ in range(_STEPS + 1):
        q = codes(scale, zero)
        error = rows - (q - zero[:, None]) * scale[:, None]
        norm = error.abs().pow(_NORM).sum(1)
        better = norm < best
        best = torch.where(better, norm, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        # Soft threshold of the l_p norm, relative to the step so that one beta fits all layers.
        relative = (error / scale[:, None]).abs()
        shrunk = (relative - relative.clamp(min=_SMALLEST).pow(_NORM - 1) / beta).clamp(min=0)
        smooth = rows - shrunk * scale[:, None] * error.sign()
        if not option.symmetric:
            zero = torch.round((q - smooth / scale[:, None]).mean(1)).clamp(0, top)
        centred = q - zero[:, None]
        fitted = (centred * smooth).sum(1) / centred.square().sum(1).clamp(min=_SMALLEST)
        scale = torch.where(fitted > _SMALLEST, fitted, scale)
        scale = scale if smallest is None else torch.maximum(scale, smallest)
        beta *= _GROWTH
    return best_scale, best_zero
