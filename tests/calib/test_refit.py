"""The second factor fitted anew: least squares, with what it was where the samples say nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from compress.calib.factors import multiply_up
from compress.calib.refit import refit_up
from compress.calib.walk import TensorRows
from compress.quant.problem import LayerProblem


@pytest.mark.parametrize("spatial", [False, True], ids=["linear", "1x1 convolution"])
def test_it_is_the_least_squares_map(spatial: bool) -> None:
    torch.manual_seed(11)
    rows = torch.randn(400, 6) @ torch.randn(6, 6) + 0.5
    wanted = torch.tanh(rows) @ torch.randn(6, 4) + torch.randn(4)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    best = torch.linalg.lstsq(torch.cat([rows, torch.ones(400, 1)], 1).double(), wanted.double()).solution
    x, y = rows, wanted
    if spatial:  # 25 samples of 4 x 4 positions
        x, y = (value.reshape(25, 4, 4, -1).permute(0, 3, 1, 2) for value in (rows, wanted))
        weight = weight[:, :, None, None]
    problem = LayerProblem("up", weight, bias, multiply_up, inputs=TensorRows(x), targets=TensorRows(y))
    found, offset = refit_up(problem)
    assert found.shape == weight.shape
    least = float((rows @ best[:-1].float() + best[-1].float() - wanted).square().sum())
    made = float((F.linear(rows, found.flatten(1), offset) - wanted).square().sum())
    assert least * (1 - 1e-5) <= made <= least * 1.01


def test_what_no_sample_shows_stays_as_it_was() -> None:
    torch.manual_seed(12)
    x = torch.randn(64, 5)
    x[:, 2] = 0.0
    weight = torch.randn(3, 5)
    problem = LayerProblem(
        "up", weight, None, multiply_up, inputs=TensorRows(x), targets=TensorRows(x @ torch.randn(5, 3))
    )
    found, _ = refit_up(problem)
    torch.testing.assert_close(found[:, 2], weight[:, 2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, 0], weight[:, 0], atol=0.1)
