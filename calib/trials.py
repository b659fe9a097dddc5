"""One layer done in each of the ways that are on trial: quantized, by two thin layers, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from compress.calib.factors import BRANCH_BITS, Thin, balanced, best_factors, correction, multiply_up
from compress.calib.gram import SeenRows, rows_read_by
from compress.calib.observers import Histogram, activation_grid, observe_range
from compress.graph.quantizers import on_grid
from compress.lowrank.factors import Factors
from compress.quant.methods import METHODS
from compress.quant.problem import ActivationGrid, Effort, LayerProblem, RowSource, Solution
from compress.records.layers import QuantOption
from compress.records.registry import resolve

__all__ = ["Trial", "TrialLayer", "Tried", "row_batches"]

_BATCH = 64


@dataclass(frozen=True)
class Trial:
    """One way to do one layer; an option without ``act_bits`` reads the base's input as it is.

    ``option`` None is on floats; ``rank`` None is as one layer; ``form`` is one of
    :class:`~compress.records.layers.Split`'s.
    """

    method: str
    option: QuantOption | None
    rank: int | None = None
    form: str = "factors"

    @property
    def key(self) -> str:
        """Its name among a layer's losses."""
        symmetric = self.option is None or self.option.symmetric
        return f"{self.method} {self}" + ("" if symmetric else " asymmetric")

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" {'+ ' * (self.form == 'branch')}rank {self.rank}"
        return f"{self.option or 'float'}{rank}"


@dataclass(frozen=True)
class Tried:
    """A layer as a trial has it, weights as they are after rounding.

    Attributes:
        problem: the layer.
        weight: what it multiplies with, as one matrix in the layer's own shape.
        bias: [O] or None.
        grid: of its input; None: as it comes.
        thin: the two factors it is done by; None: ``weight`` itself.
        between: grid of the value between them.
        beside: what it multiplies with beside them; None: nothing.
    """

    problem: LayerProblem
    weight: Tensor
    bias: Tensor | None
    grid: ActivationGrid | None
    thin: Thin | None = None
    between: ActivationGrid | None = None
    beside: Tensor | None = None

    def run(self, x: Tensor) -> Tensor:
        """The layer's output."""
        x = on_grid(x, self.grid)
        if self.thin is None:
            return self.problem.forward(x, self.weight, self.bias)
        value = on_grid(self.problem.forward(x, self.thin.down, None), self.between)
        if self.beside is not None:
            return multiply_up(value, self.thin.up, None) + self.problem.forward(x, self.beside, self.bias)
        return multiply_up(value, self.thin.up, self.bias)

    def rounding_between(self, rows: Tensor) -> Tensor:
        """What ``between`` does to the outputs of ``rows`` [..., n, K]: [..., n, O]."""
        assert self.thin is not None
        value = rows @ self.thin.down.flatten(1).T
        return (on_grid(value, self.between) - value) @ self.thin.up.flatten(1).T


class TrialLayer:
    """Every trial of one layer.

    Args:
        problem: the layer, its input's grid the base's own.
        prefix: its input as the base gives it; None without data.
        calls: the nodes that call it in the float graph.
        learned: the samples of all that a trial may learn from.
        observer: how ranges are chosen.
    """

    def __init__(
        self,
        problem: LayerProblem,
        prefix: RowSource | None,
        calls: Sequence[fx.Node],
        learned: Callable[[RowSource], RowSource],
        observer: str,
        effort: Effort,
    ) -> None:
        self.prefix, self.calls, self.observer, self.effort = prefix, calls, observer, effort
        if problem.inputs is not None and problem.targets is not None:
            problem = replace(problem, inputs=learned(problem.inputs), targets=learned(problem.targets))
        self.problem = problem
        self._grids: dict[int, ActivationGrid] = {}
        self._factors: Factors | None = None
        self._seen: SeenRows | None = None

    def attempt(self, trial: Trial) -> Tried:
        """Carry out ``trial``."""
        grid = self._grid(trial.option)
        problem = replace(self.problem, grid=grid)
        if trial.rank is not None:
            return self._attempt_thin(trial, trial.rank, problem)
        assert trial.option is not None
        solution = self._solve(trial, problem, trial.option)
        return Tried(problem, solution.weight.dequantize(), _bias(solution, problem), grid)

    def _attempt_thin(self, trial: Trial, rank: int, problem: LayerProblem) -> Tried:
        if trial.form == "branch":
            return self._attempt_branch(trial, rank, problem)
        thin = Thin.of(self._best().truncated(rank), problem.weight)
        if trial.option is None:
            return Tried(problem, thin.weight, problem.bias, None, thin)
        if self._sample is not None:
            thin = balanced(thin, self._sample, trial.option)
        found, bias, between = self._quantized(trial, trial.option, thin, problem)
        return Tried(problem, found.weight, bias, problem.grid, found, between)

    def _attempt_branch(self, trial: Trial, rank: int, problem: LayerProblem) -> Tried:
        assert trial.option is not None
        fine = trial.option.model_copy(update={"bits": BRANCH_BITS})
        thin = correction(problem.weight, self._gram(), rank, trial.option)
        if self._sample is not None:
            thin = balanced(thin, self._sample, fine)
        targets = _mapped(problem.inputs, lambda x: problem.forward(x, thin.weight, None))
        branch = replace(problem, bias=None, relu=None, targets=targets)
        found, _, between = self._quantized(trial, fine, thin, branch)
        rest = problem.weight - thin.weight
        targets = _mapped(problem.inputs, lambda x: problem.forward(x, rest, problem.bias))
        solution = self._solve(trial, replace(problem, weight=rest, relu=None, targets=targets), trial.option)
        beside = solution.weight.dequantize()
        return Tried(problem, found.weight + beside, _bias(solution, problem), problem.grid, found, between, beside)

    def _quantized(
        self, trial: Trial, option: QuantOption, thin: Thin, problem: LayerProblem
    ) -> tuple[Thin, Tensor | None, ActivationGrid | None]:
        """``thin`` after rounding, its bias, and the grid of the value between; ``problem`` says what it is to give."""
        first = replace(
            problem, weight=thin.down, bias=None, relu=None,
            targets=_mapped(problem.inputs, lambda x: problem.forward(x, thin.down, None)),
        )  # fmt: skip
        down = self._solve(trial, first, option).weight.dequantize()
        values = _mapped(problem.inputs, lambda x: problem.forward(on_grid(x, problem.grid), down, None))
        between = None
        if option.act_bits is not None and values is not None and problem.grid is not None:
            between = self._observed(values, option.act_bits, problem.grid.zero_point.dtype)
        second = replace(
            problem, weight=thin.up, forward=multiply_up, grid=between,
            inputs=_mapped(values, lambda x: on_grid(x, between)),
        )  # fmt: skip
        solution = self._solve(trial, second, option)
        return Thin(down, solution.weight.dequantize()), _bias(solution, problem), between

    def _best(self) -> Factors:
        if self._factors is None:
            self._factors = best_factors(self.problem.weight, self._gram())
        return self._factors

    def _gram(self) -> Tensor | None:
        """Of the layer's rows; None without data."""
        if self._seen is None and self.problem.inputs is not None:
            self._seen = SeenRows(rows_read_by(self.calls[0], self.problem.weight))
            for batch in row_batches(self.problem.inputs):
                self._seen.update(batch)
                if self._seen.full:
                    break
        return None if self._seen is None else self._seen.gram()

    @property
    def _sample(self) -> Tensor | None:
        """Some of the layer's rows [n, K]; None without data."""
        self._gram()
        return None if self._seen is None else self._seen.sample()

    def _solve(self, trial: Trial, problem: LayerProblem, option: QuantOption) -> Solution:
        method = resolve(METHODS, trial.method, "method")
        if method.needs_data and (len(self.calls) > 1 or problem.inputs is None):
            method = resolve(METHODS, "mse", "method")
        return method.solve(problem, option, self.effort)

    def _grid(self, option: QuantOption | None) -> ActivationGrid | None:
        """The grid a trial puts the layer's input on: the base's own, or a narrower one observed behind it."""
        base = self.problem.grid
        if option is None or option.act_bits is None or base is None or self.prefix is None:
            return None
        if option.act_bits == base.bits:
            return base
        if option.act_bits not in self._grids:
            self._grids[option.act_bits] = self._observed(self.prefix, option.act_bits, base.zero_point.dtype)
        return self._grids[option.act_bits]

    def _observed(self, values: RowSource, bits: int, dtype: torch.dtype) -> ActivationGrid:
        histogram = Histogram()
        for batch in row_batches(values):
            histogram.update(batch)
        low, high = observe_range(histogram, self.observer, bits)
        return ActivationGrid(*activation_grid(low, high, bits, dtype), bits, learnable=False)


def row_batches(rows: RowSource) -> Iterator[Tensor]:
    """All samples, some at a time."""
    for index in torch.arange(len(rows)).split(_BATCH):
        yield rows.take(index)


@dataclass(frozen=True)
class _Mapped:
    rows: RowSource
    function: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(self.rows.take(index))


def _mapped(rows: RowSource | None, function: Callable[[Tensor], Tensor]) -> RowSource | None:
    return None if rows is None else _Mapped(rows, function)


def _bias(solution: Solution, problem: LayerProblem) -> Tensor | None:
    return solution.bias if solution.bias is not None else problem.bias
