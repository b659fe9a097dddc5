"""The front: monotone, proven, and never behind greedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from compress.errors import InputError
from compress.records.allocation import Budget
from compress.records.plan import Plan
from compress.search.front import check_points, sweep_front
from compress.search.prepare import Prepared
from tests.every import every
from tests.search.conftest import silent  # type: ignore[import-not-found]


@pytest.mark.slow
def test_sizes_rise_and_errors_fall(prepared: Prepared) -> None:
    front, plans = sweep_front(prepared, "size", 8, silent)
    assert len(front.points) == len(plans) >= 4
    sizes = [point.measured["size"] for point in front.points]
    errors = [point.predicted["error"] for point in front.points]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    for point, plan in zip(front.points, plans, strict=True):
        assert plan.allocation is not None
        assert point.status == "optimal"
        assert point.bound <= point.predicted["error"] * (1 + 1e-9)
        assert point.greedy_error is None or point.greedy_error >= point.predicted["error"] * (1 - 1e-9)
        assert plan.allocation.predicted == point.predicted
    assert any(point.greedy_error is not None for point in front.points)


@pytest.mark.matrix
def test_bit_operations_can_be_swept_inside_a_size(prepared: Prepared) -> None:
    free = prepared.allocator.find({}, "size").measured["size"]
    budgets = (Budget(quantity="size", limit=1.4 * free),)
    front, _ = sweep_front(replace(prepared, budgets=budgets), "bops", 5, silent)
    assert front.over == "bops"
    assert every(point.measured["size"] <= 1.4 * free for point in front.points)
    totals = [point.predicted["bops"] for point in front.points]
    assert totals == sorted(totals)


def test_measured_values_are_added(prepared: Prepared) -> None:
    seen: list[Plan] = []

    def measure(plan: Plan) -> Mapping[str, float]:
        seen.append(plan)
        return {"accuracy": 1 / len(seen)}

    front, plans = sweep_front(prepared, "size", 3, silent, measure)
    assert seen == plans
    assert [point.measured["accuracy"] for point in front.points] == [1 / (n + 1) for n in range(len(plans))]


def test_every_point_has_its_own_limit(prepared: Prepared) -> None:
    front, plans = sweep_front(prepared, "size", 4, silent)
    for point, plan in zip(front.points, plans, strict=True):
        assert plan.allocation is not None
        (budget,) = plan.allocation.budgets
        assert (budget.quantity, budget.limit) == ("size", point.limit)
        assert point.measured["size"] <= point.limit
    with pytest.raises(InputError, match="a front has limits of size of its own"):
        sweep_front(replace(prepared, budgets=(Budget(quantity="size", limit=1e6),)), "size", 3, silent)


def test_refusals(prepared: Prepared) -> None:
    with pytest.raises(InputError, match="--over latency: known are size, bops"):
        sweep_front(prepared, "latency", 3, silent)
    with pytest.raises(InputError, match="--points 1: a front needs at least 2"):
        check_points(1)
