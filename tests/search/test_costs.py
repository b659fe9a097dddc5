"""Prices against real files: what is predicted for a mixed plan is what its file has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.intake.model import Intake
from compress.options import Search
from compress.search.costs import Costs, export_ways, measure_costs
from compress.search.space import FLOAT, Space
from tests.search.conftest import CPU, predicted_size, silent, space_of  # type: ignore[import-not-found]


def priced(intake: Intake, **changes: object) -> tuple[Space, Costs]:
    space = space_of(intake, **changes)
    return space, measure_costs(intake, space, CPU, Search(), timed=False, progress=silent)


@pytest.mark.matrix
@pytest.mark.parametrize("floats", [False, True])
def test_sizes_of_mixed_plans(intake: Intake, tmp_path: Path, floats: bool) -> None:
    space, costs = priced(intake, weight_widths=(2, 3, 5, 8), act_widths=(4, 8), floats=floats)
    rng = np.random.default_rng(0)
    for _ in range(2):
        ways = {layer: found[rng.integers(len(found))] for layer, found in space.ways.items()}
        size = export_ways(intake.traced, ways, CPU, tmp_path / "mixed.onnx").stat().st_size
        # Floats among integers leave quantizers out: a plan's file is weighed before the plan is accepted.
        assert predicted_size(costs, ways) == pytest.approx(size, rel=0.12 if floats else 0.05), ways


@pytest.mark.slow
def test_the_float_model_is_priced_exactly(intake: Intake, tmp_path: Path) -> None:
    space, costs = priced(intake, floats=True)
    ways = dict.fromkeys(space.ways, FLOAT)
    file = export_ways(intake.traced, ways, CPU, tmp_path / "float.onnx")
    assert predicted_size(costs, ways) == costs.float_totals["size"] == file.stat().st_size


@pytest.mark.slow
def test_bit_operations_by_hand(intake: Intake) -> None:
    _, costs = priced(intake, weight_widths=(3,), act_widths=(4,), floats=True)
    macs = {"stem": 8 * 27 * 64, "body": 32 * 72 * 64, "deep": 48 * 288 * 64, "left": 240, "right": 240}
    assert costs.float_totals["bops"] == sum(macs.values()) * 1024
    for layer, ways in costs.layers.items():
        found = {way.widths: cost.bops for way, cost in ways.items()}
        narrow = (3, 32) if layer == "stem" else (3, 4)
        assert found == {narrow: macs[layer] * narrow[0] * narrow[1], (32, 32): macs[layer] * 1024}


@pytest.mark.slow
def test_skipped_layers_are_paid_by_every_plan(intake: Intake) -> None:
    _, costs = priced(intake, ignore=("deep",))
    assert costs.fixed["bops"] == 48 * 288 * 64 * 1024
    assert costs.fixed["size"] > 4 * 48 * 288
