"""The Pareto front: the best plan for every value of one budget, with greedy's beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from compress.allocation.greedy import greedy
from compress.errors import InfeasibleBudget, InputError
from compress.progress import Progress
from compress.records.allocation import Budget, Front, FrontPoint
from compress.records.plan import Plan
from compress.search.allocator import Allocator
from compress.search.prepare import Prepared

__all__ = ["check_points", "sweep_front"]

# The very smallest plan leaves its file no room to come out larger than predicted.
_FIRST = 1.01


def check_points(count: int) -> None:
    """Refuse a front of fewer than two points.

    Raises:
        InputError: with what is allowed.
    """
    if count < 2:
        raise InputError(f"--points {count}: a front needs at least 2")


def sweep_front(
    prepared: Prepared,
    over: str,
    count: int,
    progress: Progress,
    measure: Callable[[Plan], Mapping[str, float]] | None = None,
) -> tuple[Front, list[Plan]]:
    """``count`` plans from the smallest reachable ``over`` to where nothing is lost.

    Args:
        over: ``size``, ``latency`` or ``bops``; other budgets of ``prepared`` hold at every point.
        measure: carries a plan out and returns what it came to; None: predictions and uncalibrated files only.

    Raises:
        InputError: ``over`` is unknown.
    """
    _check_over(prepared, over)
    allocator = prepared.allocator
    points: list[FrontPoint] = []
    plans: list[Plan] = []
    for limit in np.linspace(*_ends(allocator, over, prepared.limits), count).tolist():
        progress(f"plan for {over} {limit:.4g}", len(points), count)
        try:
            draft = allocator.find({**prepared.limits, over: limit})
        except InfeasibleBudget:
            continue  # the file of the very smallest plan may come out larger than predicted
        kept = (*prepared.budgets, Budget.model_validate({"quantity": over, "limit": limit}))
        plan = allocator.plan(prepared.frame, draft, kept, prepared.measure, "error")
        if plan.choices in [each.choices for each in plans] or not plan.choices:
            continue
        measured = dict(draft.measured)
        if measure is not None:
            measured |= measure(plan)
        points.append(
            FrontPoint(
                number=len(points) + 1,
                plan=f"plan-{len(points) + 1:02}.json",
                predicted=draft.predicted,
                measured=measured,
                greedy_error=_greedy_error(allocator, draft.limits),
                limit=limit,
                bound=draft.answer.bound,
                gap=draft.answer.gap,
                status=draft.answer.status,
            )
        )
        plans.append(plan)
    progress("front", count, count)
    missing = []
    if fewer := count - len(points):
        missing = [f"{fewer} of {count} limits gave no plan of their own: out of reach, all float, or the one before"]
    front = Front(
        over=over,
        sensitivity=prepared.measure,
        float_totals=allocator.costs.float_totals,
        points=tuple(points),
        notes=(*allocator.costs.notes, *prepared.notes, *missing),
    )
    return front, plans


def _check_over(prepared: Prepared, over: str) -> None:
    timed = prepared.allocator.costs.latency is not None
    known = [name for name in ("size", "latency", "bops") if name != "latency" or timed]
    if over not in known:
        raise InputError(f"--over {over}: known are {', '.join(known)}")
    if prepared.drop is not None or over in prepared.limits:
        named = "drop" if prepared.drop is not None else over
        raise InputError(f"--budget {named}=...: a front has limits of {over} of its own, and keeps no drop")


def _ends(allocator: Allocator, over: str, budgets: Mapping[str, float]) -> tuple[float, float]:
    """The smallest ``over`` that the other ``budgets`` leave within reach, and where nothing more is gained by it."""
    free = allocator.find(budgets)
    least = allocator.smallest(over, budgets)
    if least is None:
        raise InfeasibleBudget(allocator.explain(budgets))
    lowest = least * _FIRST
    return lowest, max(free.measured.get(over, free.predicted[over]), lowest)


def _greedy_error(allocator: Allocator, budgets: Mapping[str, float]) -> float | None:
    """What greedy predicts at its best over all sets of widths; None if it finds nothing."""
    found = []
    for each in allocator.programs("error", budgets):
        picks = greedy(each.program)
        if picks is not None:
            found.append(each.program.total(picks, "error"))
    return min(found, default=None)
