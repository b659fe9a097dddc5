"""How much one layer's quantization hurts the whole model, layer by layer and option by option.

The base is the model with every layer at 8 bits (AdaQuant, arXiv 2006.10518, on integer programming). For each layer
and each option that one layer is quantized as the option says, or left float, and everything behind it is run again.
What is measured is the same for all options:

- ``kl``: Kullback-Leibler divergence ``KL(softmax(f) || softmax(q))``, f the outputs with the layer float, q with it
  quantized. Against the wholly float model's outputs the base's own error would be in every difference, and with it
  noise as large as what 5 bits and more do to a layer.
- ``loss``: cross-entropy against the samples' labels.
- ``output``: relative squared error of the outputs, likewise. The default: where calibration samples were trained on,
  their scores are saturated, and ``kl`` hangs on the few that are not (benchmarks/results/allocation-resnet56.md).
- ``gram``: relative squared error of the layer's own output, from gram matrices of its input and of its input's
  rounding: ``(tr(dW G dW^T) + tr(W E W^T)) / tr(W G W^T)``. One pass through the model.
- ``weight``: relative squared error of the weights; needs no samples.

An embedding's table (compress/calib/table_sensitivity.py) is measured likewise; nothing is multiplied with it, so for
``gram`` its weights' error counts.

Methods learn on one part of the samples and are measured on the other. Each finished layer is stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from compress.calib.calibrate import layer_seed
from compress.calib.frontier import Frontier
from compress.calib.gram import Gram, rows_of
from compress.calib.observers import Histogram, activation_grid, observe_range
from compress.calib.output_loss import judged_batches, loss_between
from compress.calib.resume import ResumeStore
from compress.calib.table_sensitivity import measure_table
from compress.calib.walk import Walk
from compress.graph.layers import layer_calls, table_calls
from compress.graph.quantizers import fake_quantize_op
from compress.graph.traced import TracedModel, first_output
from compress.methods import METHODS
from compress.problem import ActivationGrid, Effort, LayerProblem, RowSource, Solution
from compress.records import QuantOption
from compress.registry import resolve

__all__ = [
    "BASE",
    "FLOAT",
    "MEASURES",
    "Trial",
    "measure_sensitivity",
    "stored_losses",
]

# Losses of the base itself, and with one layer float, among a layer's own.
BASE, FLOAT = "base", "float"

MEASURES = ("kl", "loss", "output", "gram", "weight")
_BATCH = 64
_GRAM_ROWS = 64 * 1024
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Trial:
    """One option of one layer; an option without ``act_bits`` reads the base's input as it is."""

    method: str
    option: QuantOption

    @property
    def key(self) -> str:
        """Its name among a layer's losses."""
        return f"{self.method} {self.option}" + ("" if self.option.symmetric else " asymmetric")


def measure_sensitivity(
    float_model: TracedModel,
    base: TracedModel,
    trials: Mapping[str, Sequence[Trial]],
    measure: str,
    inputs: tuple[Tensor, ...] | None,
    labels: Tensor | None,
    *,
    observer: str,
    iterations: int,
    seed: int,
    store: ResumeStore,
    progress: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Loss of every trial, ``{layer: {trial's key: loss}}``; beside them ``BASE`` and ``FLOAT``, the layer float.

    Args:
        float_model: the folded float graph.
        base: its copy with every layer at 8 bits, as :func:`compress.calib.calibrate.calibrate` leaves it.
        trials: by layer; what a layer's store already holds is not measured again.
        inputs: samples, one tensor [N, ...] a graph input; None for ``weight``.
        labels: classes [N], for ``loss``.
        progress: called with a label after every trial.
    """
    walk = Walk(float_model, base, inputs if measure != "weight" else None, store.fresh_scratch())
    judge: _Judge
    if measure == "weight":
        judge = _WeightJudge()
    elif measure == "gram":
        judge = _GramJudge(walk)
    else:
        judge = _OutputJudge(walk, measure, labels)
    found = {}
    tables = table_calls(base).keys()
    try:
        # Tables first: the walk never turns back.
        for layer in [name for name in (*tables, *layer_calls(base)) if name in trials]:
            losses = stored_losses(store, layer)
            wanted = [trial for trial in trials[layer] if trial.key not in losses]
            if wanted:
                if layer in tables:
                    losses |= {BASE: 0.0, FLOAT: 0.0}
                    options = {trial.key: (trial.method, trial.option) for trial in wanted}
                    losses |= measure_table(base, layer, options, measure, inputs, labels, progress)
                else:
                    losses |= _measure_layer(walk, judge, layer, wanted, observer, Effort(iterations, seed), progress)
                keys = list(losses)
                values = torch.tensor([losses[key] for key in keys], dtype=torch.float64)
                store.save(layer, {"losses": values}, {"keys": json.dumps(keys)})
            else:
                progress(layer)
            found[layer] = losses
    finally:
        walk.close()
    return found


class _Judge:
    """Measures one layer after the other; ``solve_on`` restricts what methods learn on."""

    def start(self, layer: str, problem: LayerProblem) -> dict[str, float]:
        """Take up a layer; its BASE and FLOAT losses."""
        return {BASE: 0.0, FLOAT: 0.0}

    def loss(self, problem: LayerProblem, solution: Solution, grid: ActivationGrid | None) -> float:
        """Loss with the layer as ``solution`` has it and its input on ``grid``."""
        raise AssertionError("a judge says how it measures")

    def solve_on(self, rows: RowSource) -> RowSource:
        """The samples that a method may see."""
        return rows


class _WeightJudge(_Judge):
    def loss(self, problem: LayerProblem, solution: Solution, grid: ActivationGrid | None) -> float:
        change = solution.weight.dequantize() - problem.weight
        return float(change.square().sum() / problem.weight.square().sum().clamp(min=_SMALLEST))


class _GramJudge(_Judge):
    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def start(self, layer: str, problem: LayerProblem) -> dict[str, float]:
        call = layer_calls(self.walk.float_model)[layer][0]
        self.rows = _rows_function(call, problem.weight)
        self.inputs = problem.inputs
        self.gram = Gram()
        for rows in self._rows():
            self.gram.update(rows)
        self.rounding: dict[int, Gram] = {}
        self.energy = max(self.gram.energy(problem.weight), _SMALLEST)
        return super().start(layer, problem)

    def loss(self, problem: LayerProblem, solution: Solution, grid: ActivationGrid | None) -> float:
        error = self.gram.energy(solution.weight.dequantize() - problem.weight)
        if grid is not None:
            if grid.bits not in self.rounding:
                self.rounding[grid.bits] = Gram()
                for rows in self._rows(lambda x: _on_grid(x, grid) - x):
                    self.rounding[grid.bits].update(rows)
            error += self.rounding[grid.bits].energy(problem.weight)
        return error / self.energy

    def _rows(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[Tensor]:
        """Rows of as many samples as it takes to fix the matrix; a large picture gives thousands each."""
        seen = 0
        for batch in _row_batches(self.inputs):
            rows = self.rows(change(batch))
            yield rows
            seen += rows.shape[1]
            if seen >= max(_GRAM_ROWS, 16 * rows.shape[2]):
                return


class _OutputJudge(_Judge):
    def __init__(self, walk: Walk, measure: str, labels: Tensor | None) -> None:
        assert walk.ahead is not None
        self.walk, self.measure = walk, measure
        self.ahead: Frontier = walk.ahead
        self.index = judged_batches(walk.model, len(walk.inputs[0]))
        samples = torch.cat(self.index)
        self.learned = max(int(samples[0]), 1)
        self.labels = labels[samples] if labels is not None else None
        self.wanted: list[Tensor] = []

    def start(self, layer: str, problem: LayerProblem) -> dict[str, float]:
        self.calls = [call.name for call in layer_calls(self.walk.model)[layer]]
        unchanged = {name: lambda x: problem.forward(x, problem.weight, problem.bias) for name in self.calls}
        self.wanted = [first_output(self.ahead.finish(unchanged, index)) for index in self.index]
        return {BASE: self._run({}), FLOAT: self._loss(self.wanted)}

    def loss(self, problem: LayerProblem, solution: Solution, grid: ActivationGrid | None) -> float:
        weight = solution.weight.dequantize()
        bias = solution.bias if solution.bias is not None else problem.bias

        def layer(x: Tensor) -> Tensor:
            return problem.forward(x if grid is None else _on_grid(x, grid), weight, bias)

        return self._run(dict.fromkeys(self.calls, layer))

    def solve_on(self, rows: RowSource) -> RowSource:
        return _FirstRows(rows, len(rows) * self.learned // len(self.walk.inputs[0]))

    def _run(self, instead: Mapping[str, Callable[[Tensor], Tensor]]) -> float:
        return self._loss([first_output(self.ahead.finish(instead, index)) for index in self.index])

    def _loss(self, outputs: Sequence[Tensor]) -> float:
        return loss_between(self.measure, torch.cat(list(outputs)), torch.cat(self.wanted), self.labels)


def _measure_layer(
    walk: Walk,
    judge: _Judge,
    layer: str,
    trials: Sequence[Trial],
    observer: str,
    effort: Effort,
    progress: Callable[[str], None],
) -> dict[str, float]:
    found = walk.layer(layer, quantizers=[], sequential=not isinstance(judge, _GramJudge))
    problem = found.problem
    effort = replace(effort, seed=layer_seed(effort.seed, layer))
    losses = judge.start(layer, problem)
    grids: dict[int, ActivationGrid] = {}
    for trial in trials:
        grid = _grid_for(trial.option, problem, found.prefix, observer, grids)
        solution = _solve(trial, replace(problem, grid=grid), len(layer_calls(walk.model)[layer]), judge, effort)
        losses[trial.key] = judge.loss(problem, solution, grid)
        progress(f"{layer} {trial.option}")
    return losses


def _solve(trial: Trial, problem: LayerProblem, calls: int, judge: _Judge, effort: Effort) -> Solution:
    method = resolve(METHODS, trial.method, "method")
    if method.needs_data and (calls > 1 or problem.inputs is None):
        method = resolve(METHODS, "mse", "method")
    if problem.inputs is not None and problem.targets is not None:
        problem = replace(problem, inputs=judge.solve_on(problem.inputs), targets=judge.solve_on(problem.targets))
    return method.solve(problem, trial.option, effort)


def _grid_for(
    option: QuantOption,
    problem: LayerProblem,
    prefix: RowSource | None,
    observer: str,
    known: dict[int, ActivationGrid],
) -> ActivationGrid | None:
    """The grid a trial puts the layer's input on: the base's own, or a narrower one observed behind it."""
    if option.act_bits is None or problem.grid is None or prefix is None:
        return None
    if option.act_bits == problem.grid.bits:
        return problem.grid
    if option.act_bits not in known:
        histogram = Histogram()
        for batch in _row_batches(prefix):
            histogram.update(batch)
        low, high = observe_range(histogram, observer, option.act_bits)
        scale, zero_point = activation_grid(low, high, option.act_bits, problem.grid.zero_point.dtype)
        known[option.act_bits] = ActivationGrid(scale, zero_point, option.act_bits, learnable=False)
    return known[option.act_bits]


def _rows_function(call: fx.Node, weight: Tensor) -> Callable[[Tensor], Tensor]:
    if weight.dim() == 2:
        return lambda x: x.reshape(1, -1, x.shape[-1])
    sizes = weight.dim() - 2
    given = call.args[3:]
    stride, padding, dilation, groups = (*given, *([1], [0], [1], 1)[len(given) :])
    stride, padding, dilation = (list(each) * (sizes // len(each)) for each in (stride, padding, dilation))
    return lambda x: rows_of(x, weight.shape[2:], groups, stride, padding, dilation)


def _on_grid(x: Tensor, grid: ActivationGrid) -> Tensor:
    return fake_quantize_op()(x, grid.scale, grid.zero_point, grid.bits)


def _row_batches(rows: RowSource) -> Iterator[Tensor]:
    for index in torch.arange(len(rows)).split(_BATCH):
        yield rows.take(index)


@dataclass(frozen=True)
class _FirstRows:
    rows: RowSource
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, index: Tensor) -> Tensor:
        return self.rows.take(index)


def stored_losses(store: ResumeStore, layer: str) -> dict[str, float]:
    found = store.load(layer)
    if found is None:
        return {}
    tensors, strings = found
    return dict(zip(json.loads(strings["keys"]), tensors["losses"].tolist(), strict=True))
