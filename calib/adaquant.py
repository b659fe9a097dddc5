"""AdaQuant: learn a layer's weights, bias and grids against the float layer's output (arXiv 2006.10518).

``min over V, bias, s_w, grid of x:  || act(W x + b) - act(Q_w(W + V) Q_x(x_q) + b') ||^2``

with straight-through rounding, Adam, and the layer's own ReLU on both sides when it alone reads the output. Unlike
adaptive rounding V is unbounded: a weight may move by several steps. Sequential: ``x_q`` comes from the quantized
prefix, for every sample; parallel: from the float model. The best iterate on a fixed subset of the samples is kept,
with round-to-nearest as iterate 0, so the result is never worse than its start there.

Learning rates are relative: weights move in their own steps, grids by factors, biases in deviations of the output, so
that one setting serves layers of any magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.quant.grid import mse_grid, quantize
from compress.quant.pairs import bound_of
from compress.quant.problem import STEP_SAMPLES, ActivationGrid, Effort, LayerProblem, RowSource, Solution
from compress.records.layers import QuantOption

__all__ = ["PARALLEL", "SEQUENTIAL", "AdaQuant", "evaluation_rows"]

_LEAST_BATCH = 4
# A convolution's output positions are its equations: a large map needs fewer images for as many.
_POSITIONS = 32 * 1024
_EVALUATED_BATCHES = 4
_EVALUATED_VALUES = 1 << 26
_CHECKS = 12
_RATE_WEIGHT = 0.02  # steps of the weight grid an iteration
_RATE_SCALE = 2e-3  # relative
_RATE_GRID = 1e-2  # relative
_RATE_BIAS = 2e-3  # deviations of the output


@dataclass(frozen=True)
class AdaQuant:
    """The method; ``sequential`` says where its inputs come from."""

    sequential: bool
    needs_data: bool = True
    grouped: bool = False
    iterations: int = 300
    step_cost: float = 4.0  # measured on ResNet-20 and MobileNetV1

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Quantize one layer; needs ``problem.inputs`` and ``problem.targets``."""
        assert problem.inputs is not None
        assert problem.targets is not None
        parameters = _Parameters(problem, option)
        positions = problem.targets.take(torch.zeros(1, dtype=torch.long)).numel() // len(problem.weight)
        batch = min(max(_POSITIONS // max(positions, 1), _LEAST_BATCH), STEP_SAMPLES)
        evaluated = evaluation_rows(problem.inputs, problem.targets, _EVALUATED_BATCHES * batch)
        best, best_loss = parameters.solution(), _loss_of(parameters, problem, evaluated)
        start_loss = best_loss
        optimizer = torch.optim.Adam(parameters.groups())
        rates = [group["lr"] for group in optimizer.param_groups]
        generator = torch.Generator().manual_seed(effort.seed)
        interval = max(effort.iterations // _CHECKS, 1)
        for iteration in range(effort.iterations):
            decay = 0.5 * (1 + math.cos(math.pi * iteration / effort.iterations))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * decay
            index = torch.randperm(len(problem.inputs), generator=generator)[:batch]
            loss = parameters.loss(problem, problem.inputs.take(index), problem.targets.take(index))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (iteration + 1) % interval == 0 or iteration + 1 == effort.iterations:
                loss_now = _loss_of(parameters, problem, evaluated)
                if loss_now < best_loss:
                    best, best_loss = parameters.solution(), loss_now
        if best_loss == start_loss and effort.iterations:
            return Solution(best.weight, best.bias, best.grid, "AdaQuant found nothing better than rounding to nearest")
        return best


SEQUENTIAL = AdaQuant(sequential=True)
PARALLEL = AdaQuant(sequential=False)


def evaluation_rows(inputs: RowSource, targets: RowSource, count: int) -> tuple[Tensor, Tensor]:
    """``count`` samples spread evenly over the set, inputs and targets: the fixed subset results are compared on.

    Of very large samples fewer are taken, at least two.
    """
    size = inputs.take(torch.zeros(1, dtype=torch.long)).numel()
    count = min(count, max(_EVALUATED_VALUES // size, 2))
    index = torch.linspace(0, len(inputs) - 1, min(count, len(inputs))).round().long().unique()
    return inputs.take(index), targets.take(index)


class _Parameters:
    """Trainables of one layer: V as continuous codes, log-factors of the grids, bias in output deviations."""

    def __init__(self, problem: LayerProblem, option: QuantOption) -> None:
        weight = problem.weight
        self.bits = option.bits
        self.shape = (-1, *[1] * (weight.dim() - 1))
        self.bound = bound_of(problem, option)
        smallest = self.bound.smallest_step(weight) if self.bound is not None else None
        self.scale, self.zero_point = mse_grid(weight, option.bits, option.symmetric, smallest=smallest)
        # Continuous codes around zero: W + V in units of the start's step.
        self.codes = (weight / self.scale.reshape(self.shape)).requires_grad_()
        self.scale_log = torch.zeros_like(self.scale).requires_grad_()
        assert problem.targets is not None
        spread = problem.targets.take(torch.arange(min(16, len(problem.targets)))).std(correction=0).clamp(min=1e-6)
        self.bias = problem.bias if problem.bias is not None else torch.zeros(len(weight))
        self.bias_unit = spread
        self.bias_shift = torch.zeros_like(self.bias).requires_grad_()
        self.grid = problem.grid
        self.learns_grid = self.grid is not None and self.grid.learnable
        self.grid_log = torch.zeros(()).requires_grad_(self.learns_grid)
        # A grid that does not start at zero may also move its lower end, in steps.
        self.grid_shift = torch.zeros(()).requires_grad_(self.learns_grid and not self._starts_at_zero())

    def groups(self) -> list[dict[str, object]]:
        """Parameter groups for Adam."""
        groups: list[dict[str, object]] = [
            {"params": [self.codes], "lr": _RATE_WEIGHT},
            {"params": [self.scale_log], "lr": _RATE_SCALE},
            {"params": [self.bias_shift], "lr": _RATE_BIAS},
        ]
        if self.learns_grid:
            groups.append(
                {"params": [p for p in (self.grid_log, self.grid_shift) if p.requires_grad], "lr": _RATE_GRID}
            )
        return groups

    def loss(self, problem: LayerProblem, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of the activated output; ``x`` [n, ...] float or on the grid, ``y`` the float output."""
        output = problem.forward(self._input(x), self._weight(), self.bias + self.bias_unit * self.bias_shift)
        return (problem.activate(output) - problem.activate(y)).square().mean()

    def solution(self) -> Solution:
        """The current iterate as integers."""
        with torch.no_grad():
            scale = self.scale * self._factor()
            # The codes stand for W + V in units of the *starting* step.
            weight = quantize(self.codes * self.scale.reshape(self.shape), scale, self.zero_point, self.bits)
            grid = self.grid
            if grid is not None and self.learns_grid:
                zero_point = self._grid_zero(grid).to(grid.zero_point.dtype)
                grid = replace(grid, scale=self._grid_scale(grid), zero_point=zero_point)
            return Solution(weight, self.bias + self.bias_unit * self.bias_shift, grid)

    def _weight(self) -> Tensor:
        factor = self._factor().reshape(self.shape)
        low = -self.zero_point.reshape(self.shape)
        codes = _round(self.codes / factor)
        # Not minimum and maximum: they pass half the gradient at a tie, and every weight on the last code is one.
        codes = torch.clamp(codes, low, low + ((1 << self.bits) - 1))
        return codes * (factor * self.scale.reshape(self.shape))

    def _factor(self) -> Tensor:
        """What each channel's starting step is multiplied with, [O]: as learned, or what the moved weights need."""
        factor = self.scale_log.exp()
        if self.bound is None:
            return factor
        needed = self.bound.smallest_step(self.codes.detach())
        # Not maximum, which passes half the gradient at a tie: there every channel begins.
        return torch.where(factor < needed, needed, factor)

    def _input(self, x: Tensor) -> Tensor:
        if self.grid is None:
            return x
        low, high = _codes_of(self.grid)
        scale, offset = self._grid_scale(self.grid), self._grid_zero(self.grid)
        return (torch.clamp(_round(x / scale) + offset, low, high) - offset) * scale

    def _grid_scale(self, grid: ActivationGrid) -> Tensor:
        return (grid.scale * self.grid_log.exp()).clamp(max=grid.largest_scale) if self.learns_grid else grid.scale

    def _grid_zero(self, grid: ActivationGrid) -> Tensor:
        """The zero point as learned, one of the grid's codes: beyond them zero would be no point of the grid."""
        offset = grid.zero_point.float()
        if not self.learns_grid:
            return offset
        return torch.clamp(_round(offset + self.grid_shift), *_codes_of(grid))

    def _starts_at_zero(self) -> bool:
        assert self.grid is not None
        return int(self.grid.zero_point) == torch.iinfo(self.grid.zero_point.dtype).min


def _codes_of(grid: ActivationGrid) -> tuple[int, int]:
    """The smallest and the largest code."""
    low = torch.iinfo(grid.zero_point.dtype).min
    return low, low + (1 << grid.bits) - 1


def _round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def _loss_of(parameters: _Parameters, problem: LayerProblem, rows: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(parameters.loss(problem, *rows))
