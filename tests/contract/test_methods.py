"""What every row of compress.methods.METHODS promises (METHODS.md A1, A2); a new row is tested without a new test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calib.adaquant import evaluation_rows
from compress.calib.reconstruction import BlockMethod
from compress.calib.walk import TensorRows
from compress.kernels.fake_quantize import code_range, fake_quantize
from compress.kernels.table import register_operators
from compress.methods import METHODS
from compress.problem import ActivationGrid, Effort, LayerProblem, Method, Solution
from compress.quant.grid import min_max_grid, mse_grid, quantize
from compress.quant.hqq import HalfQuadratic
from compress.quant.pairs import LARGEST_CODE, LARGEST_PAIR, largest_pair, step_bound
from compress.records import QuantOption
from compress.registry import resolve

EVALUATED = 128
EFFORT = Effort(iterations=12, seed=5)
WIDTHS = (2, 3, 4, 8)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=2)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, stride=2, groups=6)


def convolution_1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv1d(x, weight, bias, dilation=2)


KINDS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], str | None]] = {
    "conv2d": (convolution, (8, 3, 3, 3), (40, 3, 7, 7), "relu"),
    "grouped": (grouped, (4, 3, 3, 3), (40, 6, 7, 7), None),
    "depthwise": (depthwise, (6, 1, 3, 3), (40, 6, 7, 7), "relu6"),
    "conv1d": (convolution_1d, (5, 4, 3), (40, 4, 12), None),
    "linear": (F.linear, (7, 10), (140, 10), None),  # more samples than are evaluated
}


def make_problem(
    kind: str, act_bits: int | None, learnable: bool = True, dtype: torch.dtype = torch.uint8
) -> LayerProblem:
    forward, shape, input_shape, relu = KINDS[kind]
    # Channels and neighbours go together, as they do in a network: on white noise nothing beats rounding to nearest.
    mixed = torch.einsum("nc...,cd->nd...", torch.randn(input_shape), torch.randn(input_shape[1], input_shape[1]) ** 3)
    x = (mixed if len(input_shape) == 2 else mixed.cumsum(-1)) * 0.3 + 0.3
    weight, bias = torch.randn(shape) * 0.2, torch.randn(shape[0]) * 0.1
    grid = None
    if act_bits is not None:
        low, high = code_range(dtype, act_bits)
        scale = (x.max() - x.min()) / (2**act_bits - 1)
        zero = torch.round(-x.min() / scale).clamp(0, 2**act_bits - 1) + low
        grid = ActivationGrid(scale, zero.to(dtype), act_bits, learnable)
        assert low < int(grid.zero_point) < high
    inputs = x if grid is None or learnable else fake_quantize(x, grid.scale, grid.zero_point, grid.bits)
    targets = forward(x, weight, bias)
    groups = {"grouped": 2, "depthwise": 6}.get(kind, 1)
    return LayerProblem(kind, weight, bias, forward, relu, TensorRows(inputs), TensorRows(targets), grid, groups=groups)


def output_error(problem: LayerProblem, solution: Solution) -> float:
    """Squared error of the activated output on the evaluation rows, from the integers alone."""
    assert problem.inputs is not None
    assert problem.targets is not None
    x, y = evaluation_rows(problem.inputs, problem.targets, EVALUATED)
    grid = solution.grid if solution.grid is not None else problem.grid
    if grid is not None:
        x = fake_quantize(x, grid.scale, grid.zero_point, grid.bits)
    bias = solution.bias if solution.bias is not None else problem.bias
    got = problem.activate(problem.forward(x, solution.weight.dequantize(), bias))
    return float((got - problem.activate(y)).double().square().mean())


@pytest.fixture(autouse=True)
def _operators() -> None:
    register_operators()


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> Method:
    return resolve(METHODS, request.param, "method")


KIND = pytest.mark.parametrize("kind", list(KINDS))


@KIND
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_and_scales_are_legal(method: Method, kind: str, symmetric: bool) -> None:
    for bits in WIDTHS:
        problem = make_problem(kind, None if not symmetric else 8)
        solution = method.solve(problem, QuantOption(bits=bits, act_bits=8, symmetric=symmetric), EFFORT)
        weight = solution.weight
        assert weight.bits == bits
        assert weight.codes.shape == problem.weight.shape
        assert weight.codes.dtype == weight.zero_point.dtype == torch.uint8
        assert int(weight.codes.max()) < 2**bits
        assert int(weight.zero_point.max()) < 2**bits  # zero is a point of the grid
        assert weight.scale.shape == weight.zero_point.shape == problem.weight.shape[:1]
        assert weight.scale.dtype == torch.float32
        assert (weight.scale > 0).all()
        assert torch.isfinite(weight.scale).all()
        assert not weight.dequantize().requires_grad
        assert weight.symmetric or not symmetric


@KIND
@pytest.mark.parametrize("act_bits", [None, 4, 8], ids=lambda bits: f"a{bits}")
def test_never_worse_than_rounding_to_nearest(method: Method, kind: str, act_bits: int | None) -> None:
    """A1: with data, on the evaluation rows, behind the layer's own activation; without data, in the weights."""
    for bits in WIDTHS:
        problem = make_problem(kind, act_bits)
        option = QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)
        solution = method.solve(problem, option, EFFORT)
        if method.needs_data:
            nearest = resolve(METHODS, "mse", "method").solve(problem, option, EFFORT)
            assert output_error(problem, solution) <= output_error(problem, nearest) * (1 + 1e-5), bits
        else:
            # HQQ minimises a norm of its own, and starts from the grid of the smallest squared error.
            grid, power = (mse_grid, 0.7) if isinstance(method, HalfQuadratic) else (min_max_grid, 2.0)
            least = step_bound(problem, option)
            naive = quantize(problem.weight, *grid(problem.weight, bits, option.symmetric, smallest=least), bits)
            got, wanted = (
                (each.dequantize() - problem.weight).abs().pow(power).sum() for each in (solution.weight, naive)
            )
            assert got <= wanted * (1 + 1e-5), bits


@KIND
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_eight_bits_keep_pairs_of_products_within_sixteen(method: Method, kind: str, dynamic: bool) -> None:
    """On inputs of 8 bits, where a method moves weights as well: many steps, and channels that strain the bound."""
    problem = make_problem(kind, None if dynamic else 8)
    weight = problem.weight.clone()
    weight[0] = 0.2  # all pairs at the bound
    weight[1] = -weight[1].abs()
    assert problem.inputs is not None
    targets = TensorRows(problem.forward(problem.inputs.take(torch.arange(len(problem.inputs))), weight, problem.bias))
    problem = replace(problem, weight=weight, targets=targets)
    found = method.solve(problem, QuantOption(bits=8, act_bits=8, dynamic=dynamic), Effort(60, 3)).weight
    codes = found.codes.long() - 128
    assert int(codes.abs().max()) <= LARGEST_CODE
    if kind == "depthwise":
        assert int(codes.abs().max()) >= 100
    else:
        # And no more room is left than that takes.
        assert 100 <= int(largest_pair(codes).max()) <= LARGEST_PAIR


@KIND
def test_twice_the_same(method: Method, kind: str) -> None:
    problem = make_problem(kind, 8)
    before = problem.weight.clone()
    option = QuantOption(bits=3, act_bits=8)
    first, second = (method.solve(problem, option, EFFORT) for _ in range(2))
    assert torch.equal(first.weight.codes, second.weight.codes)
    assert torch.equal(first.weight.scale, second.weight.scale)
    assert (first.bias is None) == (second.bias is None)
    if first.bias is not None and second.bias is not None:
        assert torch.equal(first.bias, second.bias)
    assert torch.equal(problem.weight, before)
    assert not problem.weight.requires_grad


@KIND
def test_codes_are_what_the_graph_will_compute(method: Method, kind: str) -> None:
    """A2: the stored form gives back the same weight bit for bit, and a grid has the real zero among its points."""
    problem = make_problem(kind, 4)
    solution = method.solve(problem, QuantOption(bits=4, act_bits=4), EFFORT)
    weight = solution.weight
    stored = weight.tensors()
    again = torch.ops.compress.dequantize_weight(
        stored["packed"], stored["scale"], stored["zero_point"], 4, list(weight.codes.shape), "integer"
    )
    assert torch.equal(again, weight.dequantize())
    if solution.grid is not None:
        grid = solution.grid
        low, high = code_range(grid.zero_point.dtype, grid.bits)
        assert low <= int(grid.zero_point) <= high
        assert float(grid.scale) > 0
        assert not fake_quantize(torch.zeros(1), grid.scale, grid.zero_point, grid.bits).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("offset", [0, 1, 14, 15])
def test_a_learned_grid_stays_in_its_type(method: Method, dtype: torch.dtype, offset: int) -> None:
    """Zero points near either end must not wrap around."""
    problem = make_problem("linear", 4, dtype=dtype)
    low, high = code_range(dtype, 4)
    grid = problem.grid
    assert grid is not None
    moved = replace(grid, zero_point=torch.tensor(low + offset, dtype=dtype), scale=grid.scale * 1.5)
    problem = replace(problem, grid=moved)
    solution = method.solve(problem, QuantOption(bits=4, act_bits=4), Effort(60, 1))
    learned = solution.grid if solution.grid is not None else moved
    assert low <= int(learned.zero_point) <= high
    nearest = resolve(METHODS, "mse", "method").solve(problem, QuantOption(bits=4, act_bits=4), EFFORT)
    if method.needs_data:
        assert output_error(problem, solution) <= output_error(problem, nearest) * (1 + 1e-5)


def test_a_given_grid_is_not_changed(method: Method) -> None:
    problem = make_problem("conv2d", 8, learnable=False)
    solution = method.solve(problem, QuantOption(bits=4, act_bits=8), EFFORT)
    assert problem.grid is not None
    if solution.grid is not None:
        assert torch.equal(solution.grid.scale, problem.grid.scale)
        assert torch.equal(solution.grid.zero_point, problem.grid.zero_point)


def test_dead_channels_and_a_missing_bias(method: Method) -> None:
    problem = make_problem("conv2d", 8)
    weight = problem.weight.clone()
    weight[::2] = 0.0
    targets = TensorRows(problem.forward(problem.inputs.values, weight, None))  # type: ignore[union-attr]
    problem = replace(problem, weight=weight, bias=None, targets=targets)
    solution = method.solve(problem, QuantOption(bits=4, act_bits=8), EFFORT)
    assert torch.isfinite(solution.weight.dequantize()).all()
    assert torch.isfinite(solution.weight.scale).all()
    assert solution.bias is None or torch.isfinite(solution.bias).all()


# A block method rounds its layers alone, and learns the block behind them: tests/calib/test_reconstruction.py.
RESOLVED = {name: resolve(METHODS, name, "method") for name in METHODS}
LEARNING = [name for name, each in RESOLVED.items() if each.needs_data and not isinstance(each, BlockMethod)]


@pytest.mark.parametrize("name", LEARNING)
def test_data_make_it_better(name: str) -> None:
    """Were the optimisation switched off, the best iterate would hide it from every test above."""
    option = QuantOption(bits=3, act_bits=8)
    ratios = []
    for kind in KINDS:
        problem = make_problem(kind, 8)
        learned = resolve(METHODS, name, "method").solve(problem, option, Effort(200, 0))
        nearest = resolve(METHODS, "mse", "method").solve(problem, option, EFFORT)
        ratios.append(output_error(problem, learned) / output_error(problem, nearest))
    assert min(ratios) < 0.8, ratios
    if name != "gptq":  # takes linears alone
        assert sum(ratio < 0.99 for ratio in ratios) > 1, ratios
