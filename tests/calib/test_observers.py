"""Ranges of activations: each observer on distributions whose answer is known, streamed and at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.calib.observers import OBSERVERS, Histogram, activation_grid, observe_range
from compress.errors import InputError


def seen(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def squared_error(x: Tensor, low: float, high: float, bits: int) -> float:
    scale, zero_point = activation_grid(low, high, bits, torch.uint8)
    codes = (torch.round(x / scale) + zero_point).clamp(0, (1 << bits) - 1)
    return float(((codes - zero_point) * scale - x).square().mean())


def test_minmax_is_exact_over_batches() -> None:
    x = torch.randn(5, 1000) * 3
    assert observe_range(seen(*x), "minmax", 8) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize(("x", "wanted"), [((2.0, 3.0), (0.0, 3.0)), ((-3.0, -2.0), (-3.0, 0.0))])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_range_holds_zero(observer: str, x: tuple[float, float], wanted: tuple[float, float]) -> None:
    values = torch.linspace(*x, 10000)
    low, high = observe_range(seen(values), observer, 8)
    assert low <= 0 <= high
    assert (low, high) == pytest.approx(wanted, abs=0.02)


def test_percentile_cuts_lone_outliers_and_keeps_the_rest() -> None:
    x = torch.rand(1_000_000)
    x[0], x[1] = 50.0, -50.0
    low, high = observe_range(seen(x), "percentile", 8)
    assert -0.1 < low <= 0
    assert 1.0 <= high < 1.1
    assert observe_range(seen(x), "minmax", 8) == (-50.0, 50.0)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "relu", "outlier"])
def test_mse_is_no_worse_than_minmax(kind: str, bits: int) -> None:
    normal = torch.randn(50_000)
    x = {
        "normal": normal,
        "laplace": torch.distributions.Laplace(0, 1).sample((50_000,)),
        "uniform": torch.rand(50_000),
        "relu": normal.relu(),
        "outlier": torch.cat([normal, torch.tensor([40.0])]),
    }[kind]
    histogram = seen(x)
    mse = squared_error(x, *observe_range(histogram, "mse", bits), bits)
    plain = squared_error(x, *observe_range(histogram, "minmax", bits), bits)
    assert mse <= plain * 1.001
    if kind in ("laplace", "outlier") and bits == 4:
        assert mse < plain / 2


def test_mse_of_a_uniform_distribution_is_its_range() -> None:
    low, high = observe_range(seen(torch.linspace(0, 1, 100_000)), "mse", 4)
    assert low == 0
    assert high == pytest.approx(1, abs=0.05)


def test_mse_of_a_normal_at_four_bits_is_the_known_optimum() -> None:
    # The best uniform quantizer of a unit normal with 16 levels clips at about 2.7 deviations.
    x = torch.randn(400_000)
    low, high = observe_range(seen(x), "mse", 4)
    assert high == pytest.approx(2.7, abs=0.25)
    assert low == pytest.approx(-2.7, abs=0.25)


def test_entropy_cuts_a_long_tail() -> None:
    x = torch.cat([torch.randn(200_000), torch.tensor([-30.0, 30.0])])
    low, high = observe_range(seen(x), "histogram", 8)
    assert 3 < high < 12
    assert -12 < low < -3


@pytest.mark.parametrize("observer", OBSERVERS)
def test_streaming_equals_one_shot(observer: str) -> None:
    x = torch.randn(20, 5000)
    whole, streamed = seen(x), seen(*x)
    assert float(streamed.counts.sum()) == float(whole.counts.sum()) == x.numel()
    step = max(whole.width, streamed.width)
    ratio = 0.04 * 8  # neighbouring candidates of the searches
    tolerance = 2 * step if observer in ("minmax", "percentile") else ratio
    assert observe_range(streamed, observer, 8) == pytest.approx(observe_range(whole, observer, 8), abs=tolerance)


def test_the_histogram_grows_by_doubling_and_loses_nothing() -> None:
    histogram = seen(torch.linspace(0, 1, 1000))
    width, low = histogram.width, histogram.low
    histogram.update(torch.tensor([3.5]))
    assert histogram.width == 4 * width
    assert histogram.low == low
    histogram.update(torch.tensor([-1.0]))
    assert histogram.low == pytest.approx(-4)
    assert histogram.width == 8 * width
    assert histogram.counts.sum() == 1002
    assert histogram.counts.shape == (4096,)
    centres = histogram.centres()
    assert float((histogram.counts * centres).sum()) == pytest.approx(500 + 3.5 - 1, rel=0.01)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 5.0, -0.25, 1e-20, 1e20])
def test_constant_activations(observer: str, bits: int, value: float) -> None:
    x = torch.full((100,), value)
    low, high = observe_range(seen(x, x), observer, bits)
    assert low <= 0 <= high
    scale, zero_point = activation_grid(low, high, bits, torch.uint8)
    assert math.isfinite(float(scale))
    assert float(scale) > 0
    assert squared_error(x, low, high, bits) <= (0.01 * value) ** 2 + 1e-30
    assert 0 <= int(zero_point) < 1 << bits


def test_zeros_get_a_usable_step() -> None:
    # A step of next to nothing would overflow the int32 bias of the layer that reads them.
    scale, zero_point = activation_grid(0.0, 0.0, 8, torch.uint8)
    assert float(scale) == pytest.approx(1 / 255)
    assert int(zero_point) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_what_is_not_finite_is_refused(bad: float, first: bool) -> None:
    poisoned = torch.randn(100)
    poisoned[50] = bad
    batches = [poisoned] if first else [torch.randn(100), poisoned]
    with pytest.raises(InputError, match="overflows on the calibration data"):
        seen(*batches)


def test_an_unknown_observer_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown observer 'median'; known: minmax, percentile, mse, histogram"):
        observe_range(seen(torch.randn(10)), "median", 8)


@pytest.mark.parametrize(("dtype", "least"), [(torch.uint8, 0), (torch.int8, -128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_grid_reaches_both_ends_and_holds_zero(dtype: torch.dtype, least: int, bits: int) -> None:
    scale, zero_point = activation_grid(-1.0, 3.0, bits, dtype)
    assert zero_point.dtype == dtype
    steps = (1 << bits) - 1
    low = (least - int(zero_point)) * float(scale)
    assert low == pytest.approx(-1, abs=float(scale) / 2)
    assert low + steps * float(scale) == pytest.approx(3, abs=float(scale) / 2)
    # Data far from zero on one side only: zero stays on the grid, at its end.
    assert int(activation_grid(0.0, 3.0, bits, dtype)[1]) == least
    assert int(activation_grid(-3.0, 0.0, bits, dtype)[1]) == least + steps
