from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.calib.soft import SoftWeight
from compress.quant.grid import min_max_grid, mse_grid, quantize
from compress.quant.pairs import LARGEST_CODE, LARGEST_PAIR, CodeBound, in_kernel_order, largest_pair, step_bound
from compress.quant.problem import LayerProblem
from compress.records.layers import QuantOption

SHAPES = [(6, 10), (6, 7), (4, 3, 3, 3), (4, 4, 3), (8, 1, 3, 3)]
GRIDS = pytest.mark.parametrize("grid", [min_max_grid, mse_grid], ids=["minmax", "mse"])


def problem_of(weight: Tensor, groups: int = 1) -> LayerProblem:
    return LayerProblem("layer", weight, None, forward=lambda x, *_: x, groups=groups)


def brute_force(weight: Tensor) -> list[float]:
    """Pair by pair, position by position, as the kernels' loops go."""
    found = []
    for channel in weight:
        places = itertools.product(*map(range, channel.shape[1:]))
        row = [float(channel[(c, *place)]) for place in places for c in range(len(channel))]
        row += [0.0] * (len(row) % 2)
        sums = []
        for first, second in zip(row[::2], row[1::2], strict=True):
            positive = max(first, 0.0) + max(second, 0.0)
            negative = max(-first, 0.0) + max(-second, 0.0)
            sums.append(max(positive, negative))
        found.append(max(sums))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_largest_pair_is_what_the_loops_find(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    torch.testing.assert_close(largest_pair(weight), torch.tensor(brute_force(weight)))


def test_neighbours_are_channels_before_positions() -> None:
    weight = torch.arange(12.0).reshape(1, 3, 2, 2)  # channel * 4 + position
    assert in_kernel_order(weight).tolist() == [[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
    assert in_kernel_order(torch.ones(1, 3)).tolist() == [[1, 1, 1, 0]]  # the last of an odd row is alone


@GRIDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_to_nearest_keeps_the_promise(grid: object, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 4, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    bound = step_bound(problem_of(weight), QuantOption(bits=8, act_bits=8))
    codes = quantize(weight, *grid(weight, 8, True, smallest=bound), 8).codes.long() - 128  # type: ignore[operator]
    assert int(codes.abs().max()) <= LARGEST_CODE
    assert int(largest_pair(codes).max()) <= LARGEST_PAIR


@GRIDS
@pytest.mark.parametrize(("act_bits", "groups"), [(8, 6), (7, 1), (2, 1)], ids=["depthwise", "7 bits", "2 bits"])
def test_where_no_pairs_are_added_only_the_lowest_code_is_left_out(grid: object, act_bits: int, groups: int) -> None:
    weight = torch.full((6, 1, 3, 3), -0.3)
    bound = step_bound(problem_of(weight, groups), QuantOption(bits=8, act_bits=act_bits))
    codes = quantize(weight, *grid(weight, 8, True, smallest=bound), 8).codes.long() - 128  # type: ignore[operator]
    assert codes.unique().tolist() == [-LARGEST_CODE]


@pytest.mark.parametrize("first", [1, 31, 62, 63, 64, 100, 126])
@pytest.mark.parametrize("step", [1.0, 1 / 3, 0.1, 1e-7, 12345.678])
def test_soft_rounding_keeps_it_whatever_is_decided(first: int, step: float) -> None:
    """Both codes up, or both down, of pairs that divide to whole numbers but for the last bit."""
    weight = torch.tensor([[first, 127 - first], [-first, first - 127], [127, 0], [-127, 0]]).float() * step
    scale, zero = mse_grid(weight, 8, True, smallest=CodeBound(pairs=True).smallest_step(weight))
    soft = SoftWeight(weight, quantize(weight, scale, zero, 8), learn_scale=False)
    for decided in (-1.0, 1.0):
        soft.logits = torch.full_like(weight, decided)
        codes = soft.hard().codes.long() - 128
        assert int(codes.abs().max()) <= LARGEST_CODE
        assert int(largest_pair(codes).max()) <= LARGEST_PAIR


@pytest.mark.parametrize(
    "option",
    [
        QuantOption(bits=7, act_bits=8),
        QuantOption(bits=8),
        QuantOption(bits=8, group_size=32),
    ],
    ids=str,
)
def test_what_cannot_go_beyond_sixteen_bits_is_left_alone(option: QuantOption) -> None:
    problem = problem_of(torch.randn(4, 8))
    assert step_bound(problem, option) is None
    assert step_bound(problem, QuantOption(bits=8, act_bits=8)) is not None


def test_the_bound_costs_little() -> None:
    """Of normal weights the step grows by about a third, and the noise to about twice: not four times, as at 7 bits."""
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, bounded = (
        quantize(weight, *mse_grid(weight, bits, True, smallest=least), bits).dequantize()
        for bits, least in ((8, None), (8, CodeBound(pairs=True).smallest_step(weight)))
    )
    seven = quantize(weight, *mse_grid(weight, 7, True), 7).dequantize()
    noise = [float((each - weight).square().sum()) for each in (plain, bounded, seven)]
    assert noise[0] < noise[1] < 0.6 * noise[2]
