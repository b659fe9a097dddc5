"""AdaQuant on single layers: never worse than rounding, on the grid, with the right gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.calib.adaquant import PARALLEL, SEQUENTIAL, _Parameters, evaluation_rows
from compress.calib.observers import Histogram, activation_grid, observe_range
from compress.calib.walk import TensorRows
from compress.kernels.table import register_operators
from compress.quant.problem import ActivationGrid, Effort, LayerProblem, Solution
from compress.quant.rtn import MSE
from compress.records.layers import QuantOption
from tests.every import every

register_operators()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, padding=1)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, padding=1, groups=len(weight))


LAYERS = {
    "linear": (linear, (24, 32), (32,)),
    "conv": (conv, (12, 6, 3, 3), (6, 6, 6)),
    "depthwise": (depthwise, (8, 1, 3, 3), (8, 6, 6)),
}


def grid_of(x: Tensor, bits: int, learnable: bool) -> ActivationGrid:
    histogram = Histogram()
    histogram.update(x)
    scale, zero_point = activation_grid(*observe_range(histogram, "minmax", bits), bits, torch.uint8)
    return ActivationGrid(scale, zero_point, bits, learnable)


def problem_of(
    kind: str, act_bits: int | None, *, samples: int = 256, relu: str | None = None, signed: bool = True
) -> LayerProblem:
    forward, weight_shape, input_shape = LAYERS[kind]
    mixing = torch.randn(input_shape[0], input_shape[0]) / input_shape[0] ** 0.5
    x = torch.einsum("nc...,dc->nd...", torch.randn(samples, *input_shape), mixing)  # channels hang together
    x = x if signed else x.relu()
    weight, bias = torch.randn(weight_shape) * 0.2, torch.randn(weight_shape[0]) * 0.1
    grid = None if act_bits is None else grid_of(x, act_bits, learnable=True)
    return LayerProblem("layer", weight, bias, forward, relu, TensorRows(x), TensorRows(forward(x, weight, bias)), grid)


def error(problem: LayerProblem, solution: Solution, x: Tensor, y: Tensor) -> float:
    grid = solution.grid or problem.grid
    if grid is not None:
        x = torch.ops.compress.fake_quantize(x, grid.scale, grid.zero_point, grid.bits)
    bias = solution.bias if solution.bias is not None else problem.bias
    output = problem.activate(problem.forward(x, solution.weight.dequantize(), bias))
    return float((output - problem.activate(y)).square().mean())


def option(bits: int, act_bits: int | None) -> QuantOption:
    return QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)


@pytest.mark.parametrize("act_bits", [None, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_never_worse_than_rounding(kind: str, bits: int, act_bits: int | None) -> None:
    problem, chosen = problem_of(kind, act_bits), option(bits, act_bits)
    assert problem.inputs is not None
    assert problem.targets is not None
    rows = evaluation_rows(problem.inputs, problem.targets, 128)
    before = error(problem, MSE.solve(problem, chosen, Effort(0, 0)), *rows)
    after = error(problem, SEQUENTIAL.solve(problem, chosen, Effort(40, 0)), *rows)
    # The same sums in another order: a hair above is rounding of the comparison, not of the weights.
    assert after <= before * (1 + 1e-6)
    if kind == "linear" and bits < 8:
        assert after < before * 0.9


def test_bad_steps_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.calib.adaquant._RATE_WEIGHT", 50.0)
    monkeypatch.setattr("compress.calib.adaquant._RATE_SCALE", 5.0)
    problem, chosen = problem_of("linear", None), option(4, None)
    solution = SEQUENTIAL.solve(problem, chosen, Effort(24, 0))
    wanted = MSE.solve(problem, chosen, Effort(0, 0))
    assert torch.equal(solution.weight.codes, wanted.weight.codes)
    assert solution.note == "AdaQuant found nothing better than rounding to nearest"


def test_no_iterations_is_rounding() -> None:
    problem, chosen = problem_of("conv", 4), option(3, 4)
    solution, wanted = SEQUENTIAL.solve(problem, chosen, Effort(0, 0)), MSE.solve(problem, chosen, Effort(0, 0))
    assert torch.equal(solution.weight.codes, wanted.weight.codes)
    assert torch.equal(solution.weight.scale, wanted.weight.scale)


@pytest.mark.matrix
def test_held_out_samples_gain_too() -> None:
    gained, table = 0, []
    for index in range(10):
        torch.manual_seed(index)
        kind = list(LAYERS)[index % 3]
        whole = problem_of(kind, 4, samples=768, relu="relu" if index % 2 else None)
        assert whole.inputs is not None
        assert whole.targets is not None
        (x, held_x), (y, held_y) = (
            rows.take(torch.arange(768)).split([512, 256]) for rows in (whole.inputs, whole.targets)
        )
        problem, chosen = replace(whole, inputs=TensorRows(x), targets=TensorRows(y)), option(4, 4)
        before = error(problem, MSE.solve(problem, chosen, Effort(0, 0)), held_x, held_y)
        after = error(problem, SEQUENTIAL.solve(problem, chosen, Effort(120, 0)), held_x, held_y)
        gained += after < before
        table.append((kind, before, after))
    assert gained >= 9, table


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_on_the_grid(bits: int, symmetric: bool) -> None:
    problem = problem_of("conv", None)
    chosen = QuantOption(bits=bits, symmetric=symmetric)
    weight = SEQUENTIAL.solve(problem, chosen, Effort(30, 0)).weight
    values = weight.dequantize()
    assert weight.codes.dtype == torch.uint8
    assert int(weight.codes.max()) < 1 << bits
    assert bool((weight.scale > 0).all())
    assert every(len(channel.unique()) <= 1 << bits for channel in values)
    # Zero is a grid point of every channel, and the codes reproduce the values bit for bit.
    assert bool((weight.zero_point.int() < 1 << bits).all())
    again = (weight.codes.float() - weight.zero_point.float()[:, None, None, None]) * weight.scale[:, None, None, None]
    assert torch.equal(again, values)
    assert weight.symmetric == symmetric or not symmetric


def surrogate(parameters: _Parameters, problem: LayerProblem, x: Tensor, y: Tensor, base: dict[str, Any]) -> Tensor:
    """The loss with every rounding replaced by its residue at the start: what straight-through claims to descend.

    What is clipped at the start stays clipped: central differences then never step over an edge.
    """
    factor = parameters.scale_log.exp().reshape(parameters.shape)
    codes = held(parameters.codes / factor + base["weight"], *base["weight range"])
    weight = codes * factor * parameters.scale.reshape(parameters.shape)
    grid = parameters.grid
    assert grid is not None
    scale = grid.scale * parameters.grid_log.exp()
    offset = grid.zero_point.float() + parameters.grid_shift
    q = held(x / scale + base["input"] + offset, *base["input range"])
    output = problem.forward(
        (q - offset) * scale, weight, parameters.bias + parameters.bias_unit * parameters.bias_shift
    )
    return (problem.activate(output) - problem.activate(y)).square().mean()


def held(codes: Tensor, below: Tensor, above: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(below, low, torch.where(above, high, codes))


def edges(codes: Tensor, low: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high = low + ((1 << bits) - 1)
    return codes < low, codes > high, low.expand_as(codes), high.expand_as(codes)


@pytest.mark.parametrize("name", ["scale_log", "grid_log", "grid_shift", "bias_shift", "codes"])
def test_gradients_are_those_of_the_straight_through_surrogate(name: str) -> None:
    problem = problem_of("linear", 4, relu="relu")
    assert problem.grid is not None
    # A range that cuts: inside it the grid's offset cancels, and has no gradient.
    problem = replace(problem, grid=replace(problem.grid, scale=problem.grid.scale / 2))
    parameters = _Parameters(problem, option(3, 4))
    assert problem.inputs is not None
    assert problem.targets is not None
    x, y = problem.inputs.take(torch.arange(64)), problem.targets.take(torch.arange(64))
    for each in ("codes", "scale", "zero_point", "scale_log", "bias", "bias_shift", "grid_log", "grid_shift"):
        value = getattr(parameters, each)
        setattr(parameters, each, value.detach().double().requires_grad_(value.requires_grad))
    grid = parameters.grid
    assert grid is not None
    parameters.grid = replace(grid, scale=grid.scale.double())
    x, y, parameters.bias_unit = x.double(), y.double(), parameters.bias_unit.double()
    with torch.no_grad():
        steps, inputs = parameters.codes, x / parameters.grid.scale
        base = {
            "weight": torch.round(steps) - steps,
            "weight range": edges(torch.round(steps), -parameters.zero_point.reshape(parameters.shape), 3),
            "input": torch.round(inputs) - inputs,
            "input range": edges(torch.round(inputs) + grid.zero_point, torch.zeros((), dtype=torch.float64), 4),
        }
        assert bool(base["input range"][1].any()), "nothing is clipped: half of the formula goes untested"
    loss = parameters.loss(problem, x, y)
    torch.testing.assert_close(loss, surrogate(parameters, problem, x, y, base))
    tensor = getattr(parameters, name)
    (gradient,) = torch.autograd.grad(loss, tensor)
    assert float(gradient.abs().max()) > 0, "a gradient that is zero everywhere trains nothing"
    flat, step = tensor.detach().reshape(-1), 1e-6
    for position in torch.linspace(0, len(flat) - 1, min(len(flat), 8)).long().tolist():
        values = []
        for sign in (1, -1):
            flat[position] += sign * step
            with torch.no_grad():
                values.append(float(surrogate(parameters, problem, x, y, base)))
            flat[position] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert float(gradient.reshape(-1)[position]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("relu", ["relu", "relu6"])
def test_the_error_is_taken_behind_the_activation(relu: str) -> None:
    # Outputs that the activation throws away must not steer the weights: half of these channels are always below zero.
    problem = problem_of("linear", None, relu=relu)
    assert problem.bias is not None
    assert problem.inputs is not None
    bias = torch.where(torch.arange(24) < 12, torch.tensor(-1000.0), problem.bias)
    x = problem.inputs.take(torch.arange(256))
    problem = replace(problem, bias=bias, targets=TensorRows(linear(x, problem.weight, bias)))
    start = MSE.solve(problem, option(2, None), Effort(0, 0))
    solution = SEQUENTIAL.solve(problem, option(2, None), Effort(60, 0))
    moved = (solution.weight.codes != start.weight.codes).any(1)
    assert not bool(moved[:12].any())
    assert bool(moved[12:].any())


def test_a_range_of_extremes_is_tightened() -> None:
    problem = problem_of("linear", 4, signed=False)
    assert problem.inputs is not None
    assert problem.grid is not None
    wide = replace(problem, grid=replace(problem.grid, scale=problem.grid.scale * 2))
    solution = SEQUENTIAL.solve(wide, option(8, 4), Effort(200, 0))
    assert solution.grid is not None
    assert float(solution.grid.scale) < 0.75 * float(wide.grid.scale)  # type: ignore[union-attr]
    assert int(solution.grid.zero_point) == 0, "a grid that starts at zero stays there: the ReLU before is absorbed"
    assert solution.grid.bits == 4


def test_a_fixed_grid_is_left_alone() -> None:
    problem = problem_of("linear", 4)
    assert problem.grid is not None
    fixed = replace(problem, grid=replace(problem.grid, learnable=False))
    solution = SEQUENTIAL.solve(fixed, option(4, 4), Effort(40, 0))
    assert solution.grid is not None
    assert torch.equal(solution.grid.scale, problem.grid.scale)
    assert torch.equal(solution.grid.zero_point, problem.grid.zero_point)


def test_same_seed_same_bytes_and_no_global_state() -> None:
    problem, chosen = problem_of("conv", 4), option(3, 4)
    first = PARALLEL.solve(problem, chosen, Effort(25, 7))
    torch.manual_seed(123)
    second = PARALLEL.solve(problem, chosen, Effort(25, 7))
    other = PARALLEL.solve(problem, chosen, Effort(25, 8))
    assert torch.equal(first.weight.codes, second.weight.codes)
    assert torch.equal(first.weight.scale, second.weight.scale)
    assert not torch.equal(first.weight.scale, other.weight.scale)


def test_one_sample_with_one_output() -> None:
    x, weight = torch.randn(1, 8), torch.randn(1, 8)
    targets = TensorRows(x @ weight.T)
    problem = LayerProblem("layer", weight, None, linear, None, TensorRows(x), targets, grid_of(x, 8, True))
    solution = SEQUENTIAL.solve(problem, option(4, 8), Effort(10, 0))
    assert bool(torch.isfinite(solution.weight.scale).all())
    assert solution.bias is not None
    assert bool(torch.isfinite(solution.bias).all())


@pytest.mark.parametrize(("count", "wanted"), [(5, 5), (128, 128), (1000, 128)])
def test_evaluation_rows_are_spread_and_matched(count: int, wanted: int) -> None:
    values = torch.arange(float(count))
    x, y = evaluation_rows(TensorRows(values), TensorRows(-values), 128)
    assert len(x) == wanted
    assert torch.equal(x, -y)
    assert (float(x[0]), float(x[-1])) == (0.0, count - 1.0)
