"""``--budget drop=``: the smallest size or latency whose real accuracy drop is allowed.

The program knows errors, not accuracy. Its error is capped, the cap is searched by bisection on a logarithmic scale,
and each cap's plan is carried out and evaluated whole; the best plan that kept the drop is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compress.errors import InfeasibleBudget
from compress.records.plan import Plan
from compress.search.prepare import Prepared

__all__ = ["Tried", "search_drop"]

_EVALUATIONS = 7
_PROGRAMS = 20
_CLOSE = 0.02  # of the error's logarithm
_SMALLEST = 1e-6  # of the largest error: a float model's is zero


@dataclass(frozen=True)
class Tried:
    """One plan carried out: its predicted error, what it came to."""

    plan: Plan
    error: float
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
        if known is None:
            value = draft.measured.get(prepared.objective, draft.predicted[prepared.objective])
            tried.append(Tried(plan, draft.predicted["error"], value, evaluate(plan)))
        return known or tried[-1]

    low, high = (math.log(max(each, most * _SMALLEST, 1e-12)) for each in (least * (1 + 1e-9), most))
    if attempt(math.exp(high)).drop > prepared.drop:
        for _ in range(_PROGRAMS):
            if len(tried) >= _EVALUATIONS or high - low < _CLOSE:
                break
            middle = (low + high) / 2
            found = attempt(math.exp(middle))
            if found.drop <= prepared.drop:
                low = middle
            else:  # no cap that lets this plan in is small enough
                high = min(middle, math.log(max(found.error, 1e-12)))
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
