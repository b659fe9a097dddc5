from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quant.grid import min_max_grid, mse_grid, quantize

GRIDS = pytest.mark.parametrize("grid", [min_max_grid, mse_grid], ids=["minmax", "mse"])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
BITS = pytest.mark.parametrize("bits", range(2, 9))


def odd_weight() -> Tensor:
    """Channels [9, 4, 3, 3] that go wrong easily: dead, constant, one-sided, tiny, huge, a single outlier."""
    weight = torch.randn(9, 4, 3, 3)
    weight[0] = 0.0
    weight[1] = 0.7
    weight[2] = -0.7
    weight[3].abs_()
    weight[4].abs_().neg_()
    weight[5] *= 1e-6
    weight[6] *= 1e4
    weight[7] = 0.0
    weight[7, 0, 0, 0] = -3.0
    return weight


def squared_error(weight: Tensor, grid: tuple[Tensor, Tensor], bits: int) -> Tensor:
    """Float64 [O]."""
    return (quantize(weight, *grid, bits).dequantize() - weight).double().square().flatten(1).sum(1)


@GRIDS
@SYMMETRIC
@BITS
def test_codes_stay_in_range_and_zero_is_a_point(grid: object, symmetric: bool, bits: int) -> None:
    weight = odd_weight()
    scale, zero_point = grid(weight, bits, symmetric)  # type: ignore[operator]
    quantized = quantize(weight, scale, zero_point, bits)
    assert scale.shape == zero_point.shape == (9,)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert quantized.codes.dtype == quantized.zero_point.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    assert ((zero_point >= 0) & (zero_point < 2**bits) & (zero_point == zero_point.round())).all()
    zeros = quantize(torch.zeros_like(weight), scale, zero_point, bits)
    assert not zeros.dequantize().any()
    assert quantized.symmetric == symmetric


@GRIDS
@SYMMETRIC
@BITS
def test_dead_and_constant_channels(grid: object, symmetric: bool, bits: int) -> None:
    weight = odd_weight()
    got = quantize(weight, *grid(weight, bits, symmetric), bits).dequantize()  # type: ignore[operator]
    assert not got[0].any()
    # A constant sits on the end of its range (the negative end of a symmetric grid is a step further out).
    torch.testing.assert_close(got[1:3], weight[1:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[7], weight[7], rtol=1e-5, atol=0)


@SYMMETRIC
@BITS
def test_min_max_clips_nothing(symmetric: bool, bits: int) -> None:
    weight = odd_weight()
    grid = min_max_grid(weight, bits, symmetric)
    error = (quantize(weight, *grid, bits).dequantize() - weight).abs().flatten(1).amax(1)
    # Half a step; the rounded zero point of an asymmetric grid may push an end out by another half.
    assert (error <= grid[0] * (0.5 if symmetric else 1.0) * (1 + 1e-4)).all()


@SYMMETRIC
@BITS
def test_mse_is_never_worse_than_min_max_in_any_channel(symmetric: bool, bits: int) -> None:
    for weight in (odd_weight(), torch.randn(64, 27), torch.rand(64, 27) ** 4, torch.randn(32, 1), torch.randn(1, 500)):
        smallest = squared_error(weight, mse_grid(weight, bits, symmetric), bits)
        naive = squared_error(weight, min_max_grid(weight, bits, symmetric), bits)
        assert (smallest <= naive * (1 + 1e-6)).all()


def test_mse_is_really_better_beside_an_outlier() -> None:
    weight = torch.randn(8, 400)
    weight[:, 0] = 12.0
    for bits in (2, 3, 4):
        smallest = squared_error(weight, mse_grid(weight, bits, True), bits)
        assert (smallest < 0.9 * squared_error(weight, min_max_grid(weight, bits, True), bits)).all()


@GRIDS
@SYMMETRIC
def test_single_weights_are_kept(grid: object, symmetric: bool) -> None:
    weight = torch.tensor([[0.3], [-2.5], [0.0], [1e-5]])
    got = quantize(weight, *grid(weight, 4, symmetric), 4).dequantize()  # type: ignore[operator]
    torch.testing.assert_close(got, weight, rtol=1e-5, atol=0)


@BITS
def test_symmetric_codes_reach_both_ends_of_the_grid(bits: int) -> None:
    half = 2 ** (bits - 1)
    weight = torch.tensor([[-float(half), 0.0, half - 1.0]])
    scale, zero_point = min_max_grid(weight, bits, True)
    assert float(scale) == 1.0
    assert quantize(weight, scale, zero_point, bits).codes.tolist() == [[0, half, 2 * half - 1]]


@GRIDS
@SYMMETRIC
def test_channels_do_not_see_each_other(grid: object, symmetric: bool) -> None:
    weight = odd_weight()
    whole = grid(weight, 4, symmetric)  # type: ignore[operator]
    for channel in range(len(weight)):
        alone = grid(weight[channel : channel + 1], 4, symmetric)  # type: ignore[operator]
        assert torch.equal(alone[0], whole[0][channel : channel + 1])
        assert torch.equal(alone[1], whole[1][channel : channel + 1])
