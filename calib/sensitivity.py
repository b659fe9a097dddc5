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
from torch import Tensor

from compress.calib.block_walk import layer_seed
from compress.calib.frontier import Frontier
from compress.calib.gram import Gram, rows_read_by
from compress.calib.output_loss import judged_batches, loss_between
from compress.calib.resume import ResumeStore
from compress.calib.table_sensitivity import measure_table
from compress.calib.trials import Trial, TrialLayer, Tried, row_batches
from compress.calib.walk import Walk
from compress.graph.layers import layer_calls, table_calls
from compress.graph.quantizers import on_grid
from compress.graph.traced import TracedModel, first_output
from compress.quant.problem import Effort, LayerProblem, RowSource

__all__ = [
    "BASE",
    "FLOAT",
    "MEASURES",
    "measure_sensitivity",
    "stored_losses",
]

# Losses of the base itself, and with one layer float, among a layer's own.
BASE, FLOAT = "base", "float"

MEASURES = ("kl", "loss", "output", "gram", "weight")
_GRAM_ROWS = 64 * 1024
_SMALLEST = 1e-30


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
                    options = {trial.key: (trial.method, trial.option) for trial in wanted if trial.option is not None}
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

    def loss(self, problem: LayerProblem, tried: Tried) -> float:
        """Loss with the layer as ``tried``."""
        raise AssertionError("a judge says how it measures")

    def solve_on(self, rows: RowSource) -> RowSource:
        """The samples that a method may see."""
        return rows


class _WeightJudge(_Judge):
    def loss(self, problem: LayerProblem, tried: Tried) -> float:
        change = tried.weight - problem.weight
        return float(change.square().sum() / problem.weight.square().sum().clamp(min=_SMALLEST))


class _GramJudge(_Judge):
    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def start(self, layer: str, problem: LayerProblem) -> dict[str, float]:
        call = layer_calls(self.walk.float_model)[layer][0]
        self.rows = rows_read_by(call, problem.weight)
        self.inputs = problem.inputs
        self.gram = self._gram(lambda x: x)
        self.rounding: dict[int, Gram] = {}
        self.energy = max(self.gram.energy(problem.weight), _SMALLEST)
        return super().start(layer, problem)

    def loss(self, problem: LayerProblem, tried: Tried) -> float:
        error = self.gram.energy(tried.weight - problem.weight)
        grid = tried.grid
        if grid is not None:
            if grid.bits not in self.rounding:
                self.rounding[grid.bits] = self._gram(lambda x: on_grid(x, grid) - x)
            error += self.rounding[grid.bits].energy(problem.weight)
        if tried.thin is not None and tried.between is not None:
            error += sum(float(tried.rounding_between(rows).square().sum()) for rows in self._rows(lambda x: x))
        return error / self.energy

    def _gram(self, change: Callable[[Tensor], Tensor]) -> Gram:
        found = Gram()
        for rows in self._rows(change):
            found.update(rows)
        return found

    def _rows(self, change: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Rows of as many samples as it takes to fix the matrix; a large picture gives thousands each."""
        seen = 0
        for batch in row_batches(self.inputs):
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

    def loss(self, problem: LayerProblem, tried: Tried) -> float:
        return self._run(dict.fromkeys(self.calls, tried.run))

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
    losses = judge.start(layer, problem)
    tries = TrialLayer(
        problem, found.prefix, layer_calls(walk.float_model)[layer], judge.solve_on, observer,
        replace(effort, seed=layer_seed(effort.seed, layer)),
    )  # fmt: skip
    for trial in trials:
        losses[trial.key] = judge.loss(problem, tries.attempt(trial))
        progress(f"{layer} {trial}")
    return losses


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
