"""``--budget drop=``: the smallest size or latency whose real accuracy drop is allowed.

The program knows errors, not accuracy. Its error is capped, the cap is searched by bisection on a logarithmic scale,
and each cap's plan is carried out and evaluated whole; the best plan that kept the drop is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compress.errors import InfeasibleBudget
from compress.records import Plan
from compress.search.prepare import Prepared

__all__ = ["Tried", "search_drop"]

_EVALUATIONS = 7


@dataclass(frozen=True)
class Tried:
    """One plan carried out: the cap on its predicted error, what it came to."""

    plan: Plan
    error_cap: float
    value: float
    drop: float


def search_drop(prepared: Prepared, evaluate: Callable[[Plan], float]) -> tuple[Plan, list[Tried]]:
    """The plan with the smallest objective among those tried that keep the drop, and all that were tried.

    Args:
        evaluate: accuracy drop in points of a plan, carried out.

    Raises:
        InfeasibleBudget: not even the plan with the smallest predicted error keeps it.
    """
    assert prepared.drop is not None
    allocator, limits = prepared.allocator, prepared.limits
    least = allocator.find(limits).predicted["error"]
    most = allocator.find(limits, prepared.objective).predicted["error"]
    tried: list[Tried] = []

    def attempt(cap: float) -> Tried:
        draft = allocator.find({**limits, "error": cap}, prepared.objective)
        plan = allocator.plan(prepared.frame, draft, prepared.budgets, prepared.measure, prepared.objective)
        known = next((each for each in tried if each.plan.choices == plan.choices), None)
        value = draft.measured.get(prepared.objective, draft.predicted[prepared.objective])
        tried.append(Tried(plan, cap, value, known.drop if known else evaluate(plan)))
        return tried[-1]

    low, high = math.log(max(least * (1 + 1e-9), 1e-12)), math.log(max(most, 1e-12))
    if attempt(math.exp(high)).drop > prepared.drop:
        while len(tried) < _EVALUATIONS:
            middle = (low + high) / 2
            before = tried[-1].plan.choices
            found = attempt(math.exp(middle))
            if found.drop <= prepared.drop:
                low = middle
            else:
                high = middle
            if found.plan.choices == before and len(tried) > 2:
                break
        if not any(each.drop <= prepared.drop for each in tried):
            attempt(math.exp(low))
    kept = [each for each in tried if each.drop <= prepared.drop]
    if not kept:
        best = min(tried, key=lambda each: each.drop)
        raise InfeasibleBudget(
            f"drop is limited to {prepared.drop:g} points; the best of {len(tried)} plans tried loses {best.drop:.2f}. "
            "Allow more, raise the other budgets, or give more calibration samples"
        )
    return min(kept, key=lambda each: each.value).plan, tried
