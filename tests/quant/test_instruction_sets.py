"""``--for``: which layers stay float on which instruction set, by shipped figures alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from compress import api
from compress.errors import InputError
from compress.intake.model import take_in
from compress.quant.instruction_sets import InstructionSet, kind_of, sets_of
from compress.quant.targets import choose_target
from compress.records.plan import Plan
from tests.conftest import SHIPPED_SPEEDS


def mobile() -> nn.Module:
    """Stem of 8 channels, depthwise, 1x1 to 16, depthwise, 1x1 to 32, linear."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for inputs, outputs in ((8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.ReLU()]
        layers += [nn.Conv2d(inputs, outputs, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def images() -> torch.Tensor:
    """The same each time."""
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plan(machine: str, **options: object) -> Plan:
    settings = {"bits": 8, "method": "mse", "input_shape": (3, 8, 8), "machine": machine, **options}
    return api.preview(mobile(), calib=images(), **settings).plan  # type: ignore[arg-type]


def floats(found: Plan) -> list[str]:
    return [choice.layer for choice in found.choices if choice.option.act_bits is None]


@pytest.mark.matrix
def test_leading_layers_that_integers_slow_down_stay_float() -> None:
    found = plan("any")
    # The depthwise one of 16 channels is slower alone, and faster than the casts that it would take as floats.
    assert floats(found) == ["0", "2"]
    assert found.choices[1].reason == (
        "runs on floats: depthwise conv, 8 outputs: integers have 0.25 of their speed on avx2"
    )
    assert found.choices == plan("avx2").choices


@pytest.mark.slow
def test_what_was_not_measured_decides_nothing() -> None:
    assert floats(plan("vnni")) == []
    arm = plan("arm")
    assert (arm.target, floats(arm)) == ("onnx-arm", [])


@pytest.mark.slow
def test_a_depthwise_layer_among_integers_stays_float_only_where_that_pays_for_the_casts() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
    ).eval()  # fmt: skip
    found = api.preview(module, calib=images(), bits=8, method="mse", input_shape=(3, 8, 8)).plan
    assert floats(found) == ["4"]
    assert "0.75 of their speed" in str(found.choices[2].reason)


@pytest.mark.matrix
def test_budgets_follow_the_same_figures() -> None:
    settings = {"sensitivity": "weight", "weight_widths": (4, 8), "method": "mse", "input_shape": (3, 8, 8)}
    for machine, expected in (("any", ["0", "2"]), ("vnni", [])):
        found = api.allocate(mobile(), calib=images(), budgets=("size=3x",), machine=machine, **settings)  # type: ignore[arg-type]
        assert floats(found) == expected


@pytest.mark.slow
def test_refusals() -> None:
    with pytest.raises(InputError, match="--for sse2: known are avx2, vnni, arm and any"):
        plan("sse2")
    with pytest.raises(InputError, match="--for arm goes with --target onnx-arm, not onnx-cpu"):
        plan("arm", target="onnx-cpu")
    assert choose_target(None, "any") == "onnx-cpu"
    assert sets_of("any", "onnx-arm") == ("arm",)


@pytest.mark.slow
def test_kinds() -> None:
    specs = {layer.name: layer for layer in take_in(mobile(), input_shape=(3, 8, 8)).layers}
    kinds = ("conv of an image", "depthwise conv", "conv 1x1", "depthwise conv", "conv 1x1", "linear, one row")
    assert tuple(map(kind_of, specs.values())) == kinds
    assert kind_of(specs["12"], dynamic=True) == "dynamic linear, one row"


def test_what_is_shipped_can_be_read_and_covers_every_number_of_channels() -> None:
    shipped = TypeAdapter(dict[str, InstructionSet]).validate_python(json.loads(Path(SHIPPED_SPEEDS).read_text()))
    assert [*shipped] == ["avx2", "vnni", "arm"]
    benchmarked = [each for found in shipped.values() for each in found.measurements if "integers_pay" in each.source]
    assert benchmarked
    for measurement in benchmarked:
        assert measurement.flags
        for kind in {speed.kind for speed in measurement.speeds}:
            rows = [speed for speed in measurement.speeds if speed.kind == kind]
            assert [rows[0].least, *(row.below for row in rows)] == [*(row.least for row in rows), None]
            assert all(row.alone and row.placed for row in rows)
