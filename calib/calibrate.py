"""Walk the graph once: choose every activation grid, quantize every layer, measure what it cost.

Two frontiers move side by side over the same nodes, one through the float graph, one through the compressed one. A
grid's range is observed on the quantized prefix, just before the quantizer runs; a layer's method is given the input
from the quantized prefix (or from the float graph, if it is parallel) and the float layer's output; its result is put
into the graph before the walk goes on. Every finished layer is stored, and taken from the store when run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from compress.calib.adaquant import evaluation_rows
from compress.calib.bias import corrected_bias
from compress.calib.block_rounding import round_blocks
from compress.calib.block_walk import BlockWalk, layer_seed
from compress.calib.observers import Histogram, activation_grid, observe_range
from compress.calib.reconstruction import BlockMethod
from compress.calib.refit import refit_up
from compress.calib.resume import ResumeStore
from compress.calib.walk import Walk
from compress.errors import InputError
from compress.graph.layers import layer_calls, tied_tables
from compress.graph.quantizers import Quantizer, on_grid
from compress.graph.rewrite import set_bias, set_grid, set_weight
from compress.graph.traced import TracedModel
from compress.quant.methods import METHODS
from compress.quant.problem import Effort, LayerProblem, Method, Solution
from compress.quant.weights import QuantizedWeight
from compress.records.plan import Choice, Plan
from compress.records.registry import resolve

__all__ = ["LayerResult", "calibrate", "layer_seed", "quantize_table"]

_EVALUATED = 128
_SUFFERS = 0.5
_MUCH = 0.01
_WITHOUT_DATA = "mse"


@dataclass(frozen=True)
class LayerResult:
    """What came of one layer.

    Attributes:
        weight_error: ``||W - Wq||^2 / ||W||^2``.
        output_error: ``||y - yq||^2 / ||y||^2`` behind the layer's own activation, input from the quantized prefix,
            over a fixed subset of the samples; None without data.
        nearest_error: the same with the weights rounded to nearest instead.
        input_error: what a block kernel adds by rounding the input to int8; None for other layers and without data.
        note: what the method had to say.
    """

    layer: str
    weight_error: float
    output_error: float | None
    nearest_error: float | None
    note: str | None
    input_error: float | None = None


def calibrate(
    float_model: TracedModel,
    model: TracedModel,
    quantizers: list[Quantizer],
    plan: Plan,
    computes: dict[str, str],
    inputs: tuple[Tensor, ...] | None,
    store: ResumeStore,
    progress: Callable[[str], None],
    say: Callable[[str], None] = lambda what: None,
) -> list[LayerResult]:
    """Quantize ``model`` in place as ``plan`` says and return one result a layer.

    Args:
        float_model: the folded float graph.
        model: its copy with ``quantizers`` placed.
        computes: "integer" or "float" for every chosen layer.
        inputs: calibration samples, one tensor [N, ...] a graph input; None for methods that need no data.
        progress: called with the name of each layer when it is done.
        say: called with what goes on in between, where it takes long.
    """
    walk = Walk(float_model, model, inputs, store.fresh_scratch())
    calibration = _Calibration(walk, plan, computes, store)
    first_quantizer = {quantizer.node: quantizer for quantizer in quantizers}
    calls = layer_calls(model)
    first_call = {nodes[0].name: name for name, nodes in calls.items()}
    results: list[LayerResult] = []
    names = [node.name for node in model.graph.nodes]
    blocks = BlockWalk(walk, plan, computes, store, say)
    try:
        for name in names:
            blocks.enter(name)
            if name in first_quantizer:
                calibration.choose_grid(first_quantizer[name])
            elif name in first_call and (choice := plan.choice(first_call[name])):
                results.append(calibration.quantize_layer(choice, quantizers))
                progress(choice.layer)
            elif name in first_call and first_call[name] in calibration.refitted:
                calibration.refit_layer(first_call[name])
            for layer, solution, note in blocks.leave(name):
                results = [result for result in results if result.layer != layer]
                results.append(calibration.measure_again(layer, solution, note))
    finally:
        walk.close()
    return results


def quantize_table(model: TracedModel, choice: Choice, compute: str) -> LayerResult:
    """Quantize an embedding's table in place; no data are needed."""
    table = model.tensor(f"{choice.layer}.weight")
    problem = LayerProblem(choice.layer, table, None, forward=lambda x, *_: x)
    method = resolve(METHODS, choice.method, "method")
    if method.needs_data:  # a tied table; its linear does the same
        method = resolve(METHODS, _WITHOUT_DATA, "method")
    solution = method.solve(problem, choice.option, Effort(0, 0))
    set_weight(model, choice.layer, solution.weight, compute)
    return LayerResult(choice.layer, _relative(solution.weight.dequantize(), table), None, None, None)


class _Calibration:
    def __init__(
        self,
        walk: Walk,
        plan: Plan,
        computes: dict[str, str],
        store: ResumeStore,
    ) -> None:
        self.walk, self.plan, self.computes, self.store = walk, plan, computes, store
        self.model = walk.model
        self.refitted = {split.parts[-1] for split in plan.splits if split.form == "factors"} if walk.inputs else set()

    def choose_grid(self, quantizer: Quantizer) -> None:
        """Observe the value that ``quantizer`` reads and set its grid."""
        assert self.walk.ahead is not None
        value = next(node for node in self.model.graph.nodes if node.name == quantizer.node).args[0]
        assert isinstance(value, fx.Node)
        histogram = Histogram()
        self.walk.ahead.show(value.name, histogram.update)
        low, high = observe_range(histogram, self.plan.observer, quantizer.bits)
        seen = max(histogram.maximum, 0.0) - min(histogram.minimum, 0.0)
        if seen:  # of nothing but zeros, behind dead units, no grid is too coarse
            self.walk.largest_scales[quantizer.name] = seen / ((1 << quantizer.bits) - 1)
        dtype = self.model.tensor(f"{quantizer.name}.zero_point").dtype
        set_grid(self.model, quantizer.name, *activation_grid(low, high, quantizer.bits, dtype))

    def quantize_layer(self, choice: Choice, quantizers: list[Quantizer]) -> LayerResult:
        """Solve one layer, put the result into the graph, measure it."""
        calls = layer_calls(self.model)[choice.layer]
        method: Method = resolve(METHODS, choice.method, "method")
        note = None
        why = f"called {len(calls)} times" if len(calls) > 1 else ""
        if choice.layer in tied_tables(self.model):
            why = "its weight is an embedding's table, too"
        if why and method.needs_data:
            note = f"{why}: scales by squared error instead of {choice.method}"
            method = resolve(METHODS, _WITHOUT_DATA, "method")
        found = self.walk.layer(choice.layer, quantizers, method.sequential)
        problem = found.problem
        effort = Effort(self.plan.iterations, seed=layer_seed(self.plan.seed, choice.layer))
        solution = self._stored(choice, problem)
        if solution is None:
            # A block's reconstruction does the same, and starts from the factor as it is.
            refitted = choice.layer in self.refitted and not isinstance(method, BlockMethod)
            if refitted:
                weight, bias = refit_up(problem)
                problem = replace(problem, weight=weight, bias=bias)
            solution = method.solve(problem, choice.option, effort)
            if refitted and solution.bias is None:
                solution = replace(solution, bias=problem.bias)
            # Whatever the method learned on: corrected and measured on what the layer will be given.
            problem = replace(problem, inputs=found.prefix)
            if self.plan.steps.bias_correction and problem.inputs is not None and len(calls) == 1:
                solution = replace(solution, bias=corrected_bias(problem, solution))
            self._save(choice, solution)
        result = self._measure(choice, replace(problem, inputs=found.prefix), solution, note)
        compute = self.computes[choice.layer]
        if compute == "blocks" and _suffers(choice, result):
            compute = "blocks-float"
            said = f"computes in floats: int8 inputs would add {result.input_error:.2g} to its error"
            result = replace(result, note="; ".join(each for each in (result.note, said) if each))
        set_weight(self.model, choice.layer, solution.weight, compute)
        if solution.bias is not None:
            set_bias(self.model, choice.layer, solution.bias)
        if found.quantizer is not None and solution.grid is not None:
            set_grid(self.model, found.quantizer.name, solution.grid.scale, solution.grid.zero_point)
        return result

    def measure_again(self, layer: str, solution: Solution, note: str | None) -> LayerResult:
        """A layer that its block's reconstruction has changed, behind the others of the block as they are by now."""
        choice = self.plan.choice(layer)
        assert choice is not None
        found = self.walk.layer(layer, [], sequential=True)
        return self._measure(choice, found.problem, solution, note)

    def refit_layer(self, layer: str) -> None:
        """Fit the second factor of a layer that stays float, in the graph."""
        problem = self.walk.layer(layer, [], sequential=True).problem
        weight, bias = refit_up(problem)
        self.model.set_tensor(f"{layer}.weight", weight)
        set_bias(self.model, layer, bias)

    def _measure(self, choice: Choice, problem: LayerProblem, solution: Solution, note: str | None) -> LayerResult:
        weight_error = _relative(solution.weight.dequantize(), problem.weight)
        output_error = nearest_error = input_error = None
        if problem.inputs is not None and problem.targets is not None:
            x, y = evaluation_rows(problem.inputs, problem.targets, _EVALUATED)
            nearest = replace(solution, bias=None, grid=None)
            if choice.method != "mse":
                nearest = resolve(METHODS, "mse", "method").solve(problem, choice.option, Effort(0, 0))
            output_error = _output_error(problem, solution, x, y)
            nearest_error = _output_error(problem, nearest, x, y)
            if self.computes[choice.layer] == "blocks":
                input_error = _input_error(problem, solution, x, y)
            if not torch.isfinite(torch.tensor(output_error)):
                raise InputError(
                    f"layer {choice.layer}: the quantized output is not finite on the calibration data; "
                    f"leave it float with --ignore {choice.layer}"
                )
        notes = "; ".join(each for each in (note, solution.note) if each)
        return LayerResult(choice.layer, weight_error, output_error, nearest_error, notes or None, input_error)

    def _stored(self, choice: Choice, problem: LayerProblem) -> Solution | None:
        found = self.store.load(choice.layer)
        if found is None:
            return None
        tensors, strings = found
        weight = QuantizedWeight.from_tensors(
            tensors, choice.option.bits, tuple(problem.weight.shape), choice.option.group_size
        )
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


def _suffers(choice: Choice, result: LayerResult) -> bool:
    """Whether rounding the input costs the layer about as much as its weights' codes do.

    Kernels for 2 and 8 bits are many times slower on floats: there it must cost much besides.
    """
    if result.input_error is None or result.output_error is None:
        return False
    much = choice.option.bits == 4 or result.input_error > _MUCH
    return much and result.input_error > _SUFFERS * result.output_error


def _input_error(problem: LayerProblem, solution: Solution, x: Tensor, y: Tensor) -> float:
    """What rounding of the input's blocks changes, relative to the float output, squared."""
    weight, bias = solution.weight.dequantize(), solution.bias if solution.bias is not None else problem.bias
    assert solution.weight.group_size is not None
    with torch.no_grad():
        plain = problem.activate(problem.forward(x, weight, bias))
        rounded = problem.activate(problem.forward(round_blocks(x, solution.weight.group_size), weight, bias))
        return float((rounded - plain).square().sum() / problem.activate(y).square().sum().clamp(min=1e-30))


def _relative(got: Tensor, wanted: Tensor) -> float:
    # In float64: of a layer whose outputs are all zero the quotient is beyond float32's range, and not infinite.
    return float((got - wanted).square().sum().double() / wanted.square().sum().double().clamp(min=1e-30))


def _output_error(problem: LayerProblem, solution: Solution, x: Tensor, y: Tensor) -> float:
    grid = solution.grid if solution.grid is not None else problem.grid
    with torch.no_grad():
        bias = solution.bias if solution.bias is not None else problem.bias
        output = problem.activate(problem.forward(on_grid(x, grid), solution.weight.dequantize(), bias))
        return _relative(output, problem.activate(y))
