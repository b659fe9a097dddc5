"""Bias correction: afterwards a layer's mean output a channel is the float layer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calib.bias import corrected_bias
from compress.calib.observers import activation_grid
from compress.calib.walk import TensorRows
from compress.kernels.table import register_operators
from compress.quant.problem import ActivationGrid, Effort, LayerProblem
from compress.quant.rtn import MIN_MAX
from compress.records.layers import QuantOption

register_operators()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.conv1d(x, weight, bias, stride=2)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, padding=1)


LAYERS = {
    "linear": (linear, (6, 8), (8,), 1),
    "linear on a sequence": (linear, (6, 8), (5, 8), 2),
    "conv1d": (conv1d, (6, 4, 3), (4, 9), 1),
    "conv2d": (conv2d, (6, 4, 3, 3), (4, 5, 5), 1),
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_grid", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_mean_error_a_channel_is_zero(kind: str, has_grid: bool, has_bias: bool) -> None:
    forward, weight_shape, input_shape, channel = LAYERS[kind]
    x = torch.randn(150, *input_shape) + 0.5  # three batches, the last one shorter
    weight, bias = torch.randn(weight_shape), torch.randn(6) if has_bias else None
    grid = ActivationGrid(*activation_grid(-2.0, 2.5, 4, torch.uint8), 4, learnable=False) if has_grid else None
    targets = forward(x, weight, bias)
    problem = LayerProblem("layer", weight, bias, forward, "relu", TensorRows(x), TensorRows(targets), grid)
    solution = MIN_MAX.solve(problem, QuantOption(bits=2), Effort(0, 0))
    corrected = corrected_bias(problem, solution)

    inputs = x if grid is None else torch.ops.compress.fake_quantize(x, grid.scale, grid.zero_point, grid.bits)
    others = [dim for dim in range(targets.dim()) if dim != channel]
    quantized = forward(inputs, solution.weight.dequantize(), bias)
    assert float((quantized - targets).mean(others).abs().max()) > 0.05, "there was something to correct"
    after = forward(inputs, solution.weight.dequantize(), corrected)
    torch.testing.assert_close((after - targets).mean(others), torch.zeros(6), atol=1e-5, rtol=0)
