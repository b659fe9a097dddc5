"""What every row of compress.quant.methods.METHODS promises; a new row is tested without a new test.

Each problem is solved once, and every promise about its solution reads that one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calib.adaquant import AdaQuant, evaluation_rows
from compress.calib.reconstruction import BlockMethod
from compress.calib.walk import TensorRows
from compress.kernels.fake_quantize import code_range, fake_quantize
from compress.kernels.table import register_operators
from compress.quant.grid import min_max_grid, mse_grid, quantize
from compress.quant.hqq import HalfQuadratic
from compress.quant.methods import METHODS
from compress.quant.pairs import LARGEST_CODE, LARGEST_PAIR, largest_pair, step_bound
from compress.quant.problem import ActivationGrid, Effort, LayerProblem, Method, Solution
from compress.records.layers import QuantOption
from compress.records.registry import resolve

EVALUATED = 128
EFFORT = Effort(iterations=12, seed=5)
WIDTHS = (2, 3, 4, 8)
# Bits of the inputs, None for floats, whose weights need not be symmetric.
INPUTS = (None, 4, 8)


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


RESOLVED: dict[str, Method] = {name: resolve(METHODS, name, "method") for name in METHODS}
# Classes whose settings say what is done around a layer, and not how it is solved: the first row stands for all.
ALIKE = (BlockMethod, AdaQuant)
FAMILIES = {each: [name for name, method in RESOLVED.items() if isinstance(method, each)] for each in ALIKE}
SOLVERS = {
    name: method for name, method in RESOLVED.items() if all(name not in names[1:] for names in FAMILIES.values())
}
LEARNING_GRIDS = ("adaquant",)

METHOD = pytest.mark.parametrize("name", SOLVERS)
KIND = pytest.mark.parametrize("kind", list(KINDS))


@dataclass(frozen=True)
class Solved:
    """A problem, what its weight was before, and what a method made of it."""

    problem: LayerProblem
    before: Tensor
    option: QuantOption
    solution: Solution


@functools.cache
def solved(name: str, kind: str, act_bits: int | None, bits: int) -> Solved:
    """The problem is the same for all methods."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bits)
        problem = make_problem(kind, act_bits)
    before = problem.weight.clone()
    option = QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)
    return Solved(problem, before, option, SOLVERS[name].solve(problem, option, EFFORT))


def all_solved(name: str, kind: str) -> list[Solved]:
    return [solved(name, kind, act_bits, bits) for act_bits in INPUTS for bits in WIDTHS]


@pytest.mark.parametrize("family", ALIKE, ids=lambda family: family.__name__)
def test_rows_of_one_class_solve_alike(family: type) -> None:
    first, *others = FAMILIES[family]
    assert others
    problem = make_problem("conv1d", 8)
    wanted, *found = (
        RESOLVED[name].solve(problem, QuantOption(bits=3, act_bits=8), EFFORT) for name in (first, *others)
    )
    for got in found:
        assert torch.equal(got.weight.codes, wanted.weight.codes)
        assert torch.equal(got.weight.scale, wanted.weight.scale)
        assert (got.bias is None) == (wanted.bias is None)
        assert got.bias is None or torch.equal(got.bias, wanted.bias)
        assert (got.grid is None) == (wanted.grid is None)
        assert got.grid is None or torch.equal(got.grid.scale, wanted.grid.scale)


@pytest.mark.slow
@METHOD
@KIND
def test_codes_and_scales_are_legal(name: str, kind: str) -> None:
    for each in all_solved(name, kind):
        weight, problem, bits = each.solution.weight, each.problem, each.option.bits
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
        assert weight.symmetric or not each.option.symmetric


@pytest.mark.slow
@METHOD
@KIND
def test_never_worse_than_rounding_to_nearest(name: str, kind: str) -> None:
    """A1: with data, on the evaluation rows, behind the layer's own activation; without data, in the weights."""
    for each in all_solved(name, kind):
        problem, option, solution = each.problem, each.option, each.solution
        case = (option.act_bits, option.bits)
        if SOLVERS[name].needs_data:
            nearest = solved("mse", kind, *case).solution
            assert output_error(problem, solution) <= output_error(problem, nearest) * (1 + 1e-5), case
        else:
            # HQQ minimises a norm of its own, and starts from the grid of the smallest squared error.
            grid, power = (mse_grid, 0.7) if isinstance(SOLVERS[name], HalfQuadratic) else (min_max_grid, 2.0)
            least = step_bound(problem, option)
            naive = quantize(
                problem.weight, *grid(problem.weight, option.bits, option.symmetric, smallest=least), option.bits
            )
            got, wanted = (
                (made.dequantize() - problem.weight).abs().pow(power).sum() for made in (solution.weight, naive)
            )
            assert got <= wanted * (1 + 1e-5), case


@METHOD
@KIND
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_eight_bits_keep_pairs_of_products_within_sixteen(name: str, kind: str, dynamic: bool) -> None:
    """On inputs of 8 bits, where a method moves weights as well: many steps, and channels that strain the bound."""
    problem = make_problem(kind, None if dynamic else 8)
    weight = problem.weight.clone()
    weight[0] = 0.2  # all pairs at the bound
    weight[1] = -weight[1].abs()
    assert problem.inputs is not None
    targets = TensorRows(problem.forward(problem.inputs.take(torch.arange(len(problem.inputs))), weight, problem.bias))
    problem = replace(problem, weight=weight, targets=targets)
    found = SOLVERS[name].solve(problem, QuantOption(bits=8, act_bits=8, dynamic=dynamic), Effort(60, 3)).weight
    codes = found.codes.long() - 128
    assert int(codes.abs().max()) <= LARGEST_CODE
    if kind == "depthwise":
        assert int(codes.abs().max()) >= 100
    else:
        # And no more room is left than that takes.
        assert 100 <= int(largest_pair(codes).max()) <= LARGEST_PAIR


@METHOD
@KIND
def test_twice_the_same(name: str, kind: str) -> None:
    each = solved(name, kind, 8, 3)
    first, second = each.solution, SOLVERS[name].solve(each.problem, each.option, EFFORT)
    assert torch.equal(first.weight.codes, second.weight.codes)
    assert torch.equal(first.weight.scale, second.weight.scale)
    assert (first.bias is None) == (second.bias is None)
    if first.bias is not None and second.bias is not None:
        assert torch.equal(first.bias, second.bias)
    assert torch.equal(each.problem.weight, each.before)
    assert not each.problem.weight.requires_grad


@METHOD
@KIND
def test_codes_are_what_the_graph_will_compute(name: str, kind: str) -> None:
    """A2: the stored form gives back the same weight bit for bit."""
    for each in all_solved(name, kind):
        weight = each.solution.weight
        stored = weight.tensors()
        again = torch.ops.compress.dequantize_weight(
            stored["packed"], stored["scale"], stored["zero_point"], weight.bits, list(weight.codes.shape), "integer"
        )
        assert torch.equal(again, weight.dequantize())


@METHOD
def test_who_learns_the_grid_of_the_input(name: str) -> None:
    """The tests of grids below are of these methods; another one that gives a grid belongs among them."""
    given = [solved(name, kind, 4, 4).solution.grid is not None for kind in KINDS]
    assert given == [name in LEARNING_GRIDS] * len(KINDS)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("name", LEARNING_GRIDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("offset", [1, 15])
def test_a_learned_grid_stays_in_its_type(name: str, dtype: torch.dtype, offset: int) -> None:
    """The zero point, near either end, has every reason to leave, and enough steps; zero stays among the points."""
    problem = make_problem("linear", 4, dtype=dtype)
    low, high = code_range(dtype, 4)
    grid = problem.grid
    assert grid is not None
    assert problem.inputs is not None
    # All inputs beyond the end of the grid that is near zero.
    x = problem.inputs.take(torch.arange(len(problem.inputs))).abs() * (1 if offset < 8 else -1)
    x = x + 12 * grid.scale * x.sign()
    targets = problem.forward(x, problem.weight, problem.bias)
    moved = replace(grid, zero_point=torch.tensor(low + offset, dtype=dtype))
    problem = replace(problem, grid=moved, inputs=TensorRows(x), targets=TensorRows(targets))
    option = QuantOption(bits=4, act_bits=4)
    solution = SOLVERS[name].solve(problem, option, Effort(300, 1))
    learned = solution.grid
    assert learned is not None
    assert low <= int(learned.zero_point) <= high
    assert float(learned.scale) > float(moved.scale), "it did learn"
    assert not fake_quantize(torch.zeros(1), learned.scale, learned.zero_point, learned.bits).any()
    nearest = SOLVERS["mse"].solve(problem, option, EFFORT)
    assert output_error(problem, solution) < output_error(problem, nearest)


@pytest.mark.parametrize("name", LEARNING_GRIDS)
def test_a_given_grid_is_not_changed(name: str) -> None:
    problem = make_problem("conv2d", 8, learnable=False)
    grid = SOLVERS[name].solve(problem, QuantOption(bits=4, act_bits=8), EFFORT).grid
    assert problem.grid is not None
    assert grid is not None
    assert torch.equal(grid.scale, problem.grid.scale)
    assert torch.equal(grid.zero_point, problem.grid.zero_point)


@METHOD
def test_dead_channels_and_a_missing_bias(name: str) -> None:
    problem = make_problem("conv2d", 8)
    weight = problem.weight.clone()
    weight[::2] = 0.0
    targets = TensorRows(problem.forward(problem.inputs.values, weight, None))  # type: ignore[union-attr]
    problem = replace(problem, weight=weight, bias=None, targets=targets)
    solution = SOLVERS[name].solve(problem, QuantOption(bits=4, act_bits=8), EFFORT)
    assert torch.isfinite(solution.weight.dequantize()).all()
    assert torch.isfinite(solution.weight.scale).all()
    assert solution.bias is None or torch.isfinite(solution.bias).all()


# Block methods learn behind their layers: tests/calib/test_reconstruction.py.
LEARNING = [name for name, each in SOLVERS.items() if each.needs_data and not isinstance(each, BlockMethod)]


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("name", LEARNING)
def test_data_make_it_better(name: str) -> None:
    """Were the optimisation switched off, the best iterate would hide it from every test above."""
    option = QuantOption(bits=3, act_bits=8)
    ratios = []
    for kind in KINDS:
        problem = make_problem(kind, 8)
        learned = SOLVERS[name].solve(problem, option, Effort(200, 0))
        nearest = SOLVERS["mse"].solve(problem, option, EFFORT)
        ratios.append(output_error(problem, learned) / output_error(problem, nearest))
    assert min(ratios) < 0.8, ratios
    if name != "gptq":  # takes linears alone
        assert sum(ratio < 0.99 for ratio in ratios) > 1, ratios
