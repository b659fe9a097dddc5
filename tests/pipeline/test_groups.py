"""Options of weights in groups: what goes together, what is chosen, what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import api
from compress.errors import InputError
from compress.quant.grid import min_max_grid, mse_grid, quantize
from compress.quant.weights import QuantizedWeight


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 40),
        nn.ReLU(), nn.Linear(40, 3),
    ).eval()  # fmt: skip


def planned(**settings: Any) -> dict[str, tuple[str, str, str]]:
    plan = api.preview(net(), input_shape=(1, 6, 6), **settings).plan
    return {choice.layer: (str(choice.option), choice.method, choice.format) for choice in plan.choices}


@pytest.mark.slow
def test_groups_are_for_linears() -> None:
    assert planned(bits=4, group_size=32, first_last_bits=4) == {
        "0": ("W4", "hqq", "float-weights"),
        "4": ("W4g32", "hqq", "matmul-nbits"),
        "6": ("W4g32", "hqq", "matmul-nbits"),
    }


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 24), (4, 512)])
def test_what_the_kernel_does_not_run_becomes_float_weights(bits: int, group: int) -> None:
    found = planned(bits=bits, group_size=group, first_last_bits=bits)
    assert found["4"] == (f"W{bits}g{group}", "hqq", "float-weights")
    plan = api.preview(net(), input_shape=(1, 6, 6), bits=bits, group_size=group, first_last_bits=bits).plan
    choice = plan.choice("4")
    assert choice is not None
    said = f"groups of 16, 32, 64, 128, 256, not {group}" if bits == 4 else "runs 2, 4, 8 bits, not 3"
    assert said in str(choice.reason)


@pytest.mark.slow
def test_data_brings_gptq_and_leaves_inputs_float() -> None:
    found = planned(bits=4, group_size=32, calib=torch.randn(20, 1, 6, 6))
    assert found["4"] == ("W4g32", "gptq", "matmul-nbits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"group_size": 1}, "--group-size 1: allowed are 2 and more"),
        ({"act_bits": 8, "calib": torch.randn(20, 1, 6, 6)}, "quantizes weights alone"),
        (
            {"method": "adaquant", "calib": torch.randn(20, 1, 6, 6)},
            "with --group-size or --rows choose minmax, mse, hqq, gptq",
        ),
        ({"method": "gptq"}, "--method gptq needs calibration data"),
        ({"bits": None, "budgets": "size=0.5x"}, "--group-size goes with --bits"),
    ],
)
def test_refusals(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(**{"bits": 4, "group_size": 32, **settings})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("make", [min_max_grid, mse_grid])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_has_the_grid_it_would_have_alone(make: Any, symmetric: bool) -> None:
    weight = torch.randn(5, 44)
    scale, zero = make(weight, 3, symmetric, 16)
    assert scale.shape == zero.shape == (5, 3)
    found = quantize(weight, scale, zero, 3, 16).dequantize()
    for start in (0, 16, 32):
        part = weight[:, start : start + 16]
        alone = quantize(part, *make(part, 3, symmetric), 3).dequantize()
        torch.testing.assert_close(found[:, start : start + 16], alone)


def test_grouped_weights_survive_storage() -> None:
    weight = torch.randn(5, 44)
    stored = quantize(weight, *mse_grid(weight, 5, False, 16), 5, 16)
    again = QuantizedWeight.from_tensors(stored.tensors(), 5, (5, 44), 16)
    assert torch.equal(again.dequantize(), stored.dequantize())
    torch.testing.assert_close(stored.scaled(torch.arange(1.0, 6.0)).dequantize(), weight_times(stored))


def weight_times(stored: QuantizedWeight) -> torch.Tensor:
    return stored.dequantize() * torch.arange(1.0, 6.0)[:, None]


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 24)])
def test_grids_of_groups_are_stored_once_a_group_even_where_no_kernel_reads_them(
    bits: int, group: int, tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Linear(192, 160), nn.ReLU(), nn.Linear(160, 48)).eval()
    settings = {"bits": bits, "first_last_bits": bits, "group_size": group, "method": "mse"}
    size = api.quantize(module, input_shape=(192,), out=tmp_path / "out", **settings).report.size  # type: ignore[arg-type]
    weights = 192 * 160 + 160 * 48
    assert size.compressed_bytes < weights * (bits / 8 + 5 / group) * 1.1 + 6000  # codes, scale and zero, the rest
