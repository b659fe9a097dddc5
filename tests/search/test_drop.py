"""The search for the smallest plan that keeps a drop, against drops that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compress.errors import InfeasibleBudget
from compress.records.allocation import Budget
from compress.records.plan import Plan
from compress.search.allocator import Allocator
from compress.search.drop import search_drop
from compress.search.prepare import Prepared


class Scale:
    """Evaluates plans: the drop is the predicted error times ``factor``."""

    def __init__(self, factor: float) -> None:
        self.factor, self.seen = factor, 0

    def __call__(self, plan: Plan) -> float:
        self.seen += 1
        assert plan.allocation is not None
        return self.factor * plan.allocation.predicted["error"]


def limited(prepared: Prepared, drop: float, **budgets: float) -> Prepared:
    given = [Budget(quantity="drop", limit=drop)]
    given += [Budget(quantity=name, limit=value) for name, value in budgets.items()]  # type: ignore[arg-type]
    return replace(prepared, budgets=tuple(given), objective="size")


def ends(allocator: Allocator) -> tuple[float, float]:
    """Smallest and largest error of a plan that makes sense."""
    return allocator.find({}).predicted["error"], allocator.find({}, "size").predicted["error"]


@pytest.mark.slow
def test_the_smallest_plan_is_taken_where_it_keeps_the_drop(prepared: Prepared) -> None:
    evaluate = Scale(1.0)
    plan, tried = search_drop(limited(prepared, 100.0), evaluate)
    assert evaluate.seen == len(tried) == 1
    assert plan.allocation is not None
    assert plan.allocation.predicted["size"] == prepared.allocator.find({}, "size").predicted["size"]


@pytest.mark.slow
def test_between_the_ends(prepared: Prepared) -> None:
    least, most = ends(prepared.allocator)
    allowed = (least * most) ** 0.5
    evaluate = Scale(1.0)
    plan, tried = search_drop(limited(prepared, allowed), evaluate)
    assert plan.allocation is not None
    assert plan.allocation.predicted["error"] <= allowed
    assert evaluate.seen <= len(tried) <= 8
    kept = [each for each in tried if each.drop <= allowed]
    assert min(each.value for each in kept) == next(each.value for each in kept if each.plan == plan)
    best = prepared.allocator.find({"error": allowed}, "size").measured["size"]
    whole = prepared.allocator.find({}).measured["size"] - prepared.allocator.find({}, "size").measured["size"]
    # Bisection ends within a few per cent of the range.
    assert next(each.value for each in kept if each.plan == plan) <= best + 0.1 * whole


@pytest.mark.matrix
def test_a_plan_met_twice_does_not_end_the_search(prepared: Prepared) -> None:
    """Whatever the drop allowed, the answer is not much larger than the smallest plan that keeps it."""
    least, most = ends(prepared.allocator)
    for share in (0.1, 0.35, 0.8):
        allowed = least * (most / least) ** share
        plan, tried = search_drop(limited(prepared, allowed), Scale(1.0))
        assert plan.allocation is not None
        best = prepared.allocator.find({"error": allowed}, "size").predicted["size"]
        assert plan.allocation.predicted["size"] <= best * 1.1
        assert len(tried) <= 8


def test_other_budgets_hold_too(prepared: Prepared) -> None:
    least = prepared.allocator.smallest("bops", {})
    assert least is not None
    plan, _ = search_drop(limited(prepared, 100.0, bops=least * 1.5), Scale(1.0))
    assert plan.allocation is not None
    assert plan.allocation.predicted["bops"] <= least * 1.5


def test_a_drop_that_no_plan_keeps(prepared: Prepared) -> None:
    least, _ = ends(prepared.allocator)
    with pytest.raises(InfeasibleBudget, match=r"drop is limited to .* plans tried loses"):
        search_drop(limited(prepared, least / 10), Scale(1.0))


def test_the_same_plan_is_evaluated_once(prepared: Prepared) -> None:
    least, _ = ends(prepared.allocator)
    evaluate = Scale(1.0)
    plan, tried = search_drop(limited(prepared, least * (1 + 1e-6)), evaluate)
    assert plan.allocation is not None
    assert evaluate.seen == len({each.plan.choices for each in tried})
