"""GPTQ against the plain algorithm, against rounding, and on matrices that have no inverse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calib.gptq import GPTQ, OptimalRounding
from compress.calib.walk import TensorRows
from compress.kernels.table import register_operators
from compress.quant.grid import mse_grid
from compress.quant.problem import ActivationGrid, Effort, LayerProblem
from compress.quant.rtn import MSE
from compress.quant.weights import spread
from compress.records.layers import QuantOption

register_operators()

EFFORT = Effort(0, 0)


def correlated(samples: int, width: int) -> Tensor:
    """Inputs with a few strong directions."""
    return torch.randn(samples, width // 4) @ torch.randn(width // 4, width) + 0.3 * torch.randn(samples, width)


def linear(weight: Tensor, x: Tensor) -> LayerProblem:
    return LayerProblem("layer", weight, None, F.linear, inputs=TensorRows(x), targets=TensorRows(x @ weight.T))


def plain(weight: Tensor, x: Tensor, option: QuantOption) -> Tensor:
    """Optimal brain quantization in the columns' own order, with the inverse of what is left taken anew each time."""
    gram = x.T @ x
    gram = (gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))).double()
    shape = tuple(weight.shape)
    scale, zero = (
        spread(each.double(), shape, option.group_size).expand(shape)
        for each in mse_grid(weight, option.bits, option.symmetric, option.group_size)
    )
    left, codes = weight.double().clone(), torch.full(shape, torch.nan, dtype=torch.float64)
    for column in range(shape[1]):
        inverse = torch.linalg.inv(gram[column:, column:])
        codes[:, column] = (torch.round(left[:, column] / scale[:, column]) + zero[:, column]).clamp(
            0, 2**option.bits - 1
        )
        error = left[:, column] - (codes[:, column] - zero[:, column]) * scale[:, column]
        left[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes.to(torch.uint8)


def output_errors(problem: LayerProblem, weight: Tensor, x: Tensor) -> Tensor:
    return (F.linear(x, weight - problem.weight)).square().sum(0)


@pytest.mark.parametrize("group", [None, 16])
def test_the_plain_algorithm(group: int | None) -> None:
    x, weight = correlated(200, 32), torch.randn(12, 32)
    option = QuantOption(bits=3, symmetric=False, group_size=group)
    problem = linear(weight, x)
    found = OptimalRounding(act_order=False).solve(problem, option, EFFORT).weight
    wanted = plain(weight, x, option)
    nearest = MSE.solve(problem, option, EFFORT).weight
    errors = [
        output_errors(problem, (replace(found, codes=codes)).dequantize(), x) for codes in (wanted, nearest.codes)
    ]
    better = errors[0] < errors[1]
    assert better.any()
    # Where the plain algorithm wins, its codes; a rounding may fall the other way in float32.
    agreement = (found.codes[better] == wanted[better]).float().mean()
    assert agreement > 0.97


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_no_channel_is_worse_than_rounded(bits: int, group: int | None, act_order: bool) -> None:
    x, weight = correlated(500, 160), torch.randn(20, 160)
    option = QuantOption(bits=bits, symmetric=False, group_size=group)
    problem = linear(weight, x)
    nearest, found = (
        method.solve(problem, option, EFFORT).weight for method in (MSE, OptimalRounding(act_order=act_order))
    )
    before, after = (output_errors(problem, each.dequantize(), x) for each in (nearest, found))
    assert (after <= before * 1.1).all()
    assert after.sum() < 0.7 * before.sum()
    assert int(found.codes.max()) < 1 << bits


def test_inputs_without_correlation_leave_nothing_to_make_up_for() -> None:
    x, weight = torch.eye(48).repeat(3, 1), torch.randn(6, 48)
    option = QuantOption(bits=4, group_size=16)
    problem = linear(weight, x)
    nearest, found = (method.solve(problem, option, EFFORT).weight for method in (MSE, GPTQ))
    assert torch.equal(nearest.codes, found.codes)


def test_inputs_that_never_fire_and_too_few_samples() -> None:
    x, weight = correlated(5, 64), torch.randn(8, 64)
    x[:, ::3] = 0.0
    problem = linear(weight, x)
    option = QuantOption(bits=4, group_size=32)
    nearest, found = (method.solve(problem, option, EFFORT) for method in (MSE, GPTQ))
    assert torch.isfinite(found.weight.dequantize()).all()
    before, after = (output_errors(problem, each.weight.dequantize(), x).sum() for each in (nearest, found))
    assert after < before


def test_what_it_cannot_do_is_rounded_and_said() -> None:
    option = QuantOption(bits=4)
    x = torch.randn(20, 6, 5, 5)
    weight = torch.randn(8, 6, 3, 3)
    conv = LayerProblem("conv", weight, None, F.conv2d, inputs=TensorRows(x), targets=TensorRows(F.conv2d(x, weight)))
    found = GPTQ.solve(conv, option, EFFORT)
    assert found.note is not None
    assert "1x1" in found.note
    assert torch.equal(found.weight.codes, MSE.solve(conv, option, EFFORT).weight.codes)
    x[0, 0] = torch.inf
    point = replace(conv, weight=weight[:, :, :1, :1], inputs=TensorRows(x))
    assert "not finite" in str(GPTQ.solve(point, option, EFFORT).note)


def test_a_pointwise_convolution_is_a_linear() -> None:
    x, weight = correlated(300, 32), torch.randn(10, 32)
    option = QuantOption(bits=3)
    pictures = x.reshape(75, 4, 32).permute(0, 2, 1).reshape(75, 32, 2, 2).contiguous()
    as_linear = GPTQ.solve(linear(weight, x), option, EFFORT).weight
    conv = LayerProblem(
        "conv",
        weight[:, :, None, None],
        None,
        F.conv2d,
        inputs=TensorRows(pictures),
        targets=TensorRows(F.conv2d(pictures, weight[:, :, None, None])),
    )
    as_conv = GPTQ.solve(conv, option, EFFORT).weight
    assert as_conv.codes.shape == (10, 32, 1, 1)
    assert (as_conv.codes.flatten(1) == as_linear.codes).float().mean() > 0.99


def test_it_learns_on_the_rounded_input() -> None:
    x, weight = correlated(300, 32), torch.randn(10, 32)
    grid = ActivationGrid(torch.tensor(2.0), torch.tensor(128, dtype=torch.uint8), 8, learnable=True)
    rounded = torch.ops.compress.fake_quantize(x, grid.scale, grid.zero_point, 8)
    option = QuantOption(bits=3, act_bits=8)
    given = GPTQ.solve(replace(linear(weight, x), grid=grid), option, EFFORT).weight
    assert torch.equal(given.codes, GPTQ.solve(linear(weight, rounded), option, EFFORT).weight.codes)
