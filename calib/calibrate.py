"""Walk the graph once: choose every activation grid, quantize every layer, measure what it cost.

Two frontiers move side by side over the same nodes, one through the float graph, one through the compressed one. A
grid's range is observed on the quantized prefix, just before the quantizer runs; a layer's method is given the input
from the quantized prefix (or from the float graph, if it is parallel) and the float layer's output; its result is put
into the graph before the walk goes on. Every finished layer is stored, and taken from the store when run again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from compress.calib.adaquant import evaluation_rows
from compress.calib.bias import corrected_bias
from compress.calib.frontier import Frontier
from compress.calib.observers import Histogram, activation_grid, observe_range
from compress.calib.resume import ResumeStore
from compress.errors import InputError
from compress.graph.layers import activation_of, layer_calls
from compress.graph.quantizers import Quantizer, fake_quantize_op
from compress.graph.rewrite import input_quantizer, layer_bias, set_bias, set_grid, set_weight
from compress.graph.traced import TracedModel
from compress.methods import METHODS
from compress.problem import ActivationGrid, Effort, LayerProblem, Method, RowSource, Solution
from compress.records import Choice, Plan
from compress.registry import resolve
from compress.weights import QuantizedWeight

__all__ = ["LayerResult", "TensorRows", "calibrate"]

_EVALUATED = 128


@dataclass(frozen=True)
class LayerResult:
    """What came of one layer.

    Attributes:
        weight_error: ``||W - Wq||^2 / ||W||^2``.
        output_error: ``||y - yq||^2 / ||y||^2`` behind the layer's own activation, input from the quantized prefix,
            over a fixed subset of the samples; None without data.
        nearest_error: the same with the weights rounded to nearest instead.
        note: what the method had to say.
    """

    layer: str
    weight_error: float
    output_error: float | None
    nearest_error: float | None
    note: str | None


@dataclass(frozen=True)
class TensorRows:
    """Samples in memory as a :class:`~compress.problem.RowSource`."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Tensor) -> Tensor:
        """The samples at ``index``."""
        return self.values[index]


def calibrate(
    float_model: TracedModel,
    model: TracedModel,
    quantizers: list[Quantizer],
    plan: Plan,
    computes: dict[str, str],
    inputs: tuple[Tensor, ...] | None,
    store: ResumeStore,
    progress: Callable[[str], None],
) -> list[LayerResult]:
    """Quantize ``model`` in place as ``plan`` says and return one result a layer.

    Args:
        float_model: the folded float graph.
        model: its copy with ``quantizers`` placed.
        computes: "integer" or "float" for every chosen layer.
        inputs: calibration samples, one tensor [N, ...] a graph input; None for methods that need no data.
        progress: called with the name of each layer when it is done.
    """
    walk = _Walk(float_model, model, plan, computes, inputs, store)
    first_quantizer = {quantizer.node: quantizer for quantizer in quantizers}
    calls = layer_calls(model)
    first_call = {nodes[0].name: name for name, nodes in calls.items()}
    results = []
    try:
        for name in [node.name for node in model.graph.nodes]:
            if name in first_quantizer:
                walk.choose_grid(first_quantizer[name])
            elif name in first_call and (choice := plan.choice(first_call[name])):
                results.append(walk.quantize_layer(choice, quantizers))
                progress(choice.layer)
    finally:
        walk.close()
    return results


class _Walk:
    def __init__(
        self,
        float_model: TracedModel,
        model: TracedModel,
        plan: Plan,
        computes: dict[str, str],
        inputs: tuple[Tensor, ...] | None,
        store: ResumeStore,
    ) -> None:
        self.float_model, self.model, self.plan, self.computes, self.inputs, self.store = (
            float_model, model, plan, computes, inputs, store,
        )  # fmt: skip
        self.largest_scales: dict[str, float] = {}
        self.ahead: Frontier | None = None
        self.reference: Frontier | None = None
        if inputs is not None:
            scratch = store.fresh_scratch()
            self.ahead = Frontier(model, inputs, scratch / "quantized")
            self.reference = Frontier(float_model, inputs, scratch / "float")

    def close(self) -> None:
        for frontier in (self.ahead, self.reference):
            if frontier is not None:
                frontier.close()

    def choose_grid(self, quantizer: Quantizer) -> None:
        """Observe the value that ``quantizer`` reads and set its grid."""
        assert self.ahead is not None
        value = self._node(quantizer.node).args[0]
        assert isinstance(value, fx.Node)
        histogram = Histogram()
        self.ahead.advance(value.name, watch={value.name: histogram.update})
        low, high = observe_range(histogram, self.plan.observer, quantizer.bits)
        seen = max(histogram.maximum, 0.0) - min(histogram.minimum, 0.0)
        self.largest_scales[quantizer.name] = seen / ((1 << quantizer.bits) - 1)
        dtype = self.model.tensor(f"{quantizer.name}.zero_point").dtype
        set_grid(self.model, quantizer.name, *activation_grid(low, high, quantizer.bits, dtype))

    def quantize_layer(self, choice: Choice, quantizers: list[Quantizer]) -> LayerResult:
        """Solve one layer, put the result into the graph, measure it."""
        calls = layer_calls(self.model)[choice.layer]
        method: Method = resolve(METHODS, choice.method, "method")
        note = None
        if method.needs_data and len(calls) > 1:
            note = f"called {len(calls)} times: scales by squared error instead of {choice.method}"
            method = resolve(METHODS, "mse", "method")
        problem, prefix, quantizer = self._problem(choice, calls, quantizers, method)
        effort = Effort(self.plan.iterations, seed=self.plan.seed ^ zlib.crc32(choice.layer.encode()))
        solution = self._stored(choice, problem)
        if solution is None:
            solution = method.solve(problem, choice.option, effort)
            # Whatever the method learned on: corrected and measured on what the layer will be given.
            problem = replace(problem, inputs=prefix)
            if self.plan.steps.bias_correction and problem.inputs is not None and len(calls) == 1:
                solution = replace(solution, bias=corrected_bias(problem, solution))
            self._save(choice, solution)
        result = self._measure(choice, replace(problem, inputs=prefix), solution, note)
        set_weight(self.model, choice.layer, solution.weight, self.computes[choice.layer])
        if solution.bias is not None:
            set_bias(self.model, choice.layer, solution.bias)
        if quantizer is not None and solution.grid is not None:
            set_grid(self.model, quantizer.name, solution.grid.scale, solution.grid.zero_point)
        return result

    def _problem(
        self, choice: Choice, calls: list[fx.Node], quantizers: list[Quantizer], method: Method
    ) -> tuple[LayerProblem, RowSource | None, Quantizer | None]:
        """The layer, its inputs from the quantized prefix, and the quantizer whose grid the method may change."""
        call = calls[0]
        float_call = self._float_node(call.name)
        weight = self.float_model.tensor(str(float_call.args[1].target))
        grid, quantizer, inputs, prefix, targets = None, None, None, None, None
        if self.ahead is not None and self.reference is not None:
            quantizer = next((q for q in quantizers if choice.layer in q.layers), None)
            grid_node = input_quantizer(call)
            source = call.args[0]
            assert isinstance(source, fx.Node)
            learnable = (
                quantizer is not None and quantizer.exclusive and quantizer.layers == (choice.layer,)
                and source is grid_node
                and source.args[0].op != "placeholder" and len(calls) == 1
                and not self.ahead.passed(source.name)
            )  # fmt: skip
            if learnable:
                source = source.args[0]
            elif source.op != "placeholder":
                self.ahead.advance(source.name)
            if grid_node is not None:
                scale, zero_point = (self.model.tensor(node.target) for node in grid_node.args[1:3])
                limit = self.largest_scales.get(quantizer.name, math.inf) if quantizer is not None else math.inf
                grid = ActivationGrid(scale, zero_point, grid_node.args[3], learnable, limit)
            before = float_call.args[0]
            assert isinstance(before, fx.Node)
            self.reference.advance(before.name)
            prefix = self._rows(self.ahead, source)
            inputs = prefix if method.sequential else self._rows(self.reference, before)
            self.reference.advance(call.name, keep=(call.name, before.name))
            targets = self._rows(self.reference, float_call)
        return (
            LayerProblem(
                name=choice.layer,
                weight=weight,
                bias=layer_bias(self.float_model, float_call),
                forward=_forward_of(call),
                relu=activation_of(float_call)[0],
                inputs=inputs,
                targets=targets,
                grid=grid,
            ),
            prefix,
            quantizer if grid is not None and grid.learnable else None,
        )

    def _rows(self, frontier: Frontier, node: fx.Node) -> RowSource:
        if node.op == "placeholder":
            assert self.inputs is not None
            names = [each.name for each in self.model.inputs()]
            return TensorRows(self.inputs[names.index(node.name)])
        return frontier.samples(node.name)

    def _measure(self, choice: Choice, problem: LayerProblem, solution: Solution, note: str | None) -> LayerResult:
        weight_error = _relative(solution.weight.dequantize(), problem.weight)
        output_error = nearest_error = None
        if problem.inputs is not None and problem.targets is not None:
            x, y = evaluation_rows(problem.inputs, problem.targets, _EVALUATED)
            nearest = resolve(METHODS, "mse", "method").solve(problem, choice.option, Effort(0, 0))
            output_error = _output_error(problem, solution, x, y)
            nearest_error = _output_error(problem, nearest, x, y)
            if not torch.isfinite(torch.tensor(output_error)):
                raise InputError(f"layer {choice.layer}: the quantized output is not finite on the calibration data")
        notes = "; ".join(each for each in (note, solution.note) if each)
        return LayerResult(choice.layer, weight_error, output_error, nearest_error, notes or None)

    def _stored(self, choice: Choice, problem: LayerProblem) -> Solution | None:
        found = self.store.load(choice.layer)
        if found is None:
            return None
        tensors, strings = found
        weight = QuantizedWeight.from_tensors(tensors, choice.option.bits, tuple(problem.weight.shape))
        grid = problem.grid
        if grid is not None and "grid_scale" in tensors:
            grid = replace(grid, scale=tensors["grid_scale"], zero_point=tensors["grid_zero_point"])
        return Solution(weight, tensors.get("bias"), grid, strings.get("note"))

    def _save(self, choice: Choice, solution: Solution) -> None:
        tensors = solution.weight.tensors()
        if solution.bias is not None:
            tensors["bias"] = solution.bias
        if solution.grid is not None:
            tensors |= {"grid_scale": solution.grid.scale, "grid_zero_point": solution.grid.zero_point}
        self.store.save(choice.layer, tensors, {"note": solution.note} if solution.note else {})

    def _node(self, name: str) -> fx.Node:
        return next(node for node in self.model.graph.nodes if node.name == name)

    def _float_node(self, name: str) -> fx.Node:
        return next(node for node in self.float_model.graph.nodes if node.name == name)


def _forward_of(call: fx.Node) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    target, rest, kwargs = call.target, call.args[3:], call.kwargs

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return target(x, weight, bias, *rest, **kwargs)

    return forward


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))


def _output_error(problem: LayerProblem, solution: Solution, x: Tensor, y: Tensor) -> float:
    grid = solution.grid if solution.grid is not None else problem.grid
    with torch.no_grad():
        if grid is not None:
            x = fake_quantize_op()(x, grid.scale, grid.zero_point, grid.bits)
        bias = solution.bias if solution.bias is not None else problem.bias
        output = problem.activate(problem.forward(x, solution.weight.dequantize(), bias))
        return _relative(output, problem.activate(y))
