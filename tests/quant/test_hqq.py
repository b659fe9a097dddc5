"""HQQ: never behind rounding in the norm that it minimises, and no data asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quant.hqq import HQQ
from compress.quant.problem import Effort, LayerProblem
from compress.quant.rtn import MSE
from compress.quant.weights import QuantizedWeight
from compress.records.layers import QuantOption

NORM = 0.7


def problem(weight: Tensor) -> LayerProblem:
    return LayerProblem("layer", weight, None, forward=lambda x, w, b: x @ w.T)


def norms(weight: Tensor, found: QuantizedWeight, group: int | None) -> Tensor:
    error = (found.dequantize() - weight).abs().pow(NORM)
    return error.reshape(len(weight), -1, group or weight.shape[1]).sum(2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_grid_is_worse_than_rounded(bits: int, group: int | None, symmetric: bool) -> None:
    weight = torch.randn(24, 64) * torch.rand(24, 1)
    weight[torch.rand_like(weight) < 0.02] *= 8  # the outliers that the norm is for
    option = QuantOption(bits=bits, symmetric=symmetric, group_size=group)
    nearest, found = (method.solve(problem(weight), option, Effort(0, 0)).weight for method in (MSE, HQQ))
    before, after = norms(weight, nearest, group), norms(weight, found, group)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()
    assert int(found.codes.max()) < 1 << bits
    assert found.symmetric or not symmetric
    assert torch.isfinite(found.dequantize()).all()


def test_constant_and_empty_rows() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 0.25
    found = HQQ.solve(problem(weight), QuantOption(bits=4, symmetric=False, group_size=16), Effort(0, 0)).weight
    torch.testing.assert_close(found.dequantize(), weight, rtol=0.05, atol=1e-6)


def test_without_data() -> None:
    assert not HQQ.needs_data
