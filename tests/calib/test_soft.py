"""Soft rounding and learned steps against their plain forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calib.soft import Masks, SoftGrid, SoftWeight
from compress.graph.quantizers import fake_quantize_op
from compress.kernels.table import register_operators
from compress.quant.grid import mse_grid, quantize
from compress.quant.problem import ActivationGrid
from compress.quant.weights import QuantizedWeight

register_operators()


def start_of(weight: Tensor, bits: int) -> QuantizedWeight:
    return quantize(weight, *mse_grid(weight, bits, symmetric=True), bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_starts_at_the_weight_softly_and_at_the_nearest_codes_decided(bits: int) -> None:
    weight = torch.randn(8, 5, 3, 3)
    start = start_of(weight, bits)
    soft = SoftWeight(weight, start, learn_scale=True)
    inside = weight.abs() < start.scale.reshape(-1, 1, 1, 1) * ((1 << (bits - 1)) - 1)
    assert float((soft.soft().detach() - weight)[inside].abs().max()) < 1e-3 * float(start.scale.max())
    hard = soft.hard()
    assert torch.equal(hard.codes, start.codes)
    torch.testing.assert_close(hard.scale, start.scale)


def test_codes_only_go_to_the_next_and_the_penalty_ends_when_all_are_decided() -> None:
    weight = torch.randn(6, 7)
    start = start_of(weight, 3)
    soft = SoftWeight(weight, start, learn_scale=False)
    with torch.no_grad():
        soft.logits.copy_(torch.where(torch.rand(6, 7) < 0.5, -50.0, 50.0))
    below = torch.floor(weight / start.scale[:, None]) + start.zero_point[:, None].float()
    moved = soft.hard().codes.float() - below.clamp(0, 7)
    assert set(moved.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert float(soft.undecided(2.0).detach()) == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(soft.soft().detach(), soft.hard().dequantize())
    undecided = SoftWeight(weight, start, learn_scale=False)
    assert float(undecided.undecided(20.0).detach()) > float(undecided.undecided(2.0).detach()) > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_grid_rounds_as_the_operator_does_and_has_the_gradients_of_straight_through_rounding(
    dtype: torch.dtype, drop: float
) -> None:
    zero = 3 if dtype is torch.uint8 else -100
    grid = ActivationGrid(torch.tensor(0.1), torch.tensor(zero, dtype=dtype), 4, learnable=True)
    soft = SoftGrid(grid, Masks(drop, torch.Generator().manual_seed(1)), True)
    x = torch.randn(400, requires_grad=True)
    y = soft(x)
    rounded = fake_quantize_op()(x.detach(), grid.scale, grid.zero_point, 4)  # type: ignore[operator]
    kept = ((y - x).abs() < (y - rounded).abs()).detach()
    torch.testing.assert_close(torch.where(kept, x.detach(), rounded), y.detach(), rtol=0, atol=1e-6)
    assert float(kept.float().mean()) == pytest.approx(drop, abs=0.1)
    pull = torch.randn(400)
    (y * pull).sum().backward()
    plain, factor = x.detach().clone().requires_grad_(), torch.zeros((), requires_grad=True)
    scale = grid.scale * factor.exp()
    low = torch.iinfo(dtype).min - zero
    steps = plain / scale
    steps = steps + (steps.round() - steps).detach()
    plainly = torch.where(kept, plain, torch.clamp(steps, low, low + 15) * scale)
    (plainly * pull).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(soft.factor_log.grad, factor.grad, rtol=1e-3, atol=1e-3)
    soft.training = False
    assert torch.equal(soft(x).detach(), rounded)


def test_a_step_never_exceeds_the_largest_allowed() -> None:
    grid = ActivationGrid(torch.tensor(0.1), torch.tensor(0, dtype=torch.uint8), 8, True, largest_scale=0.12)
    soft = SoftGrid(grid, None, True)
    with torch.no_grad():
        soft.factor_log.fill_(1.0)
    assert float(soft.scale().detach()) == pytest.approx(0.12)
