"""Round-to-nearest: the naive way every other method starts from and is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from compress.quant.grid import min_max_grid, mse_grid, quantize
from compress.quant.pairs import step_bound
from compress.quant.problem import Effort, LayerProblem, Solution
from compress.records.layers import QuantOption

__all__ = ["MIN_MAX", "MSE", "RoundToNearest"]


@dataclass(frozen=True)
class RoundToNearest:
    """Round every weight to the grid that ``grid`` finds; needs no data."""

    grid: Callable[[Tensor, int, bool, int | None, Tensor | None], tuple[Tensor, Tensor]]
    needs_data: bool = False
    sequential: bool = True
    grouped: bool = True
    iterations: int = 0
    step_cost: float = 0.0

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Quantize the weight; bias and input grid stay."""
        smallest = step_bound(problem, option)
        scale, zero_point = self.grid(problem.weight, option.bits, option.symmetric, option.group_size, smallest)
        return Solution(quantize(problem.weight, scale, zero_point, option.bits, option.group_size))


MIN_MAX = RoundToNearest(min_max_grid)
MSE = RoundToNearest(mse_grid)
