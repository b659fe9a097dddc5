from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from compress.quant.grid import min_max_grid, mse_grid, quantize
from compress.quant.problem import Effort, LayerProblem
from compress.quant.rtn import MIN_MAX, MSE
from compress.records.layers import QuantOption


@pytest.mark.parametrize(("method", "grid"), [(MIN_MAX, min_max_grid), (MSE, mse_grid)], ids=["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_goes_to_the_nearest_point(method: object, grid: object, symmetric: bool, bits: int) -> None:
    weight = torch.randn(6, 3, 3, 3)
    problem = LayerProblem("layer", weight, torch.ones(6), F.conv2d)
    option = QuantOption(bits=bits, symmetric=symmetric)
    solution = method.solve(problem, option, Effort(0, 0))  # type: ignore[attr-defined]
    assert solution.bias is None
    assert solution.grid is None
    scale, zero_point = grid(weight, bits, symmetric)  # type: ignore[operator]
    assert torch.equal(solution.weight.codes, quantize(weight, scale, zero_point, bits).codes)
    # No other point of the channel's grid is nearer.
    steps = torch.arange(2**bits).reshape(-1, 1, 1)
    points = (steps - zero_point.reshape(1, -1, 1)) * scale.reshape(1, -1, 1)  # [codes, O, 1]
    nearest = (points - weight.reshape(1, 6, -1)).abs().amin(0)
    got = (solution.weight.dequantize() - weight).abs().reshape(6, -1)
    assert (got <= nearest + 1e-6).all()


def test_they_need_no_data() -> None:
    assert not MIN_MAX.needs_data
    assert not MSE.needs_data
