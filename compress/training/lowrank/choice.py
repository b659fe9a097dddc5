"""Which member of a family a budget buys: size, MACs, accuracy drop, and latency, which is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.errors import InfeasibleBudget, InputError
from compress.plans.budgets import FAMILY_UNITS, format_value, parse_budgets
from compress.records.allocation import Budget
from compress.training.lowrank.family import Family, FamilyMember
from compress.training.lowrank.timing import MemberTimer

__all__ = ["WEIGHT_BYTES", "choose_member", "family_budgets"]

WEIGHT_BYTES = 4
"""Members are float32."""


def family_budgets(texts: Sequence[str], family: Family) -> tuple[Budget, ...]:
    """The budgets in ``texts`` (size, latency, macs, drop), as ``compress quantize --budget`` takes them.

    Raises:
        InputError: one is malformed, there is none, or the family cannot tell the drop.
    """
    budgets = parse_budgets(texts, FAMILY_UNITS)
    if not budgets:
        raise InputError("give a --budget: macs=0.5x of the dense model's, size=2MB, latency=2ms or drop=0.5")
    if any(budget.quantity == "drop" for budget in budgets):
        if family.metric_name is None:
            raise InputError("--budget drop=...: no accuracy was measured; make the family with --test")
        if family.metric_name != "accuracy":
            raise InputError(f"--budget drop=...: points of accuracy are meant; this family has {family.metric_name}")
    return budgets


def choose_member(family: Family, budgets: Sequence[Budget], timer: MemberTimer | None = None) -> FamilyMember:
    """The member with the smallest loss within ``budgets``; with a drop among them, the one with the fewest MACs.

    Args:
        timer: measures members; of no use where latency is not limited.

    Raises:
        InfeasibleBudget: there is none; with the smallest value that can be reached of what is limited.
    """
    plain = [each for each in budgets if each.quantity != "latency"]
    costs: dict[str, list[float]] = {each.quantity: _costs(family, each.quantity) for each in plain}
    whole = {"size": float(family.dense_weights * WEIGHT_BYTES), "macs": float(family.dense_macs)}
    limits: dict[str, float] = {
        each.quantity: each.limit * (whole[each.quantity] if each.relative else 1) for each in plain
    }
    numbers = range(len(family.members))
    for quantity, limit in limits.items():
        if min(costs[quantity]) > limit:
            raise InfeasibleBudget(_sentence(quantity, limit, costs[quantity]))
    fitting = [each for each in numbers if all(costs[name][each] <= limit for name, limit in limits.items())]
    if not fitting:
        raise InfeasibleBudget(_together(limits, costs))

    def merit(number: int) -> tuple[float, float]:
        member = family.members[number]
        return (float(member.macs), member.loss) if "drop" in limits else (member.loss, float(member.macs))

    latency = next((each for each in budgets if each.quantity == "latency"), None)
    if latency is None:
        return family.members[min(fitting, key=merit)]
    if timer is None:
        raise ValueError("a latency budget needs a timer")
    limit = latency.limit * (timer.dense_us if latency.relative else 1)
    # Only what was measured is promised: bisection has times of some.
    for number in sorted(timer.within(fitting, limit), key=merit):
        if timer.times([number])[number] <= limit:
            return family.members[number]
    times = timer.times(fitting)
    fastest = min(times.values())
    within = " within the other budgets" if limits else ""
    raise InfeasibleBudget(
        f"latency is limited to {format_value('latency', limit)}; the smallest that a member reaches{within} is "
        f"{format_value('latency', fastest)} ({fastest / timer.dense_us:.2f}x of the dense model's; --threads "
        f"{timer.threads}, --batch {timer.batch})"
    )


def _costs(family: Family, quantity: str) -> list[float]:
    """Of every member: bytes, MACs, or points that its accuracy is below the dense model's."""
    if quantity == "size":
        return [float(each.weights * WEIGHT_BYTES) for each in family.members]
    if quantity == "macs":
        return [float(each.macs) for each in family.members]
    dense = float(family.dense_metric or 0.0)
    # Accuracies are shares of whole samples: a difference of a hair is a sum of floats.
    return [round(100 * (dense - float(each.metric or 0.0)), 9) for each in family.members]


def _sentence(quantity: str, limit: float, costs: Sequence[float]) -> str:
    return (
        f"{quantity} is limited to {format_value(quantity, limit)}; the smallest that a member reaches is "
        f"{format_value(quantity, min(costs))}"
    )


def _together(limits: Mapping[str, float], costs: Mapping[str, Sequence[float]]) -> str:
    """Each budget can be kept alone: what the others leave of it."""
    parts = []
    for name, limit in limits.items():
        others = [
            costs[name][number]
            for number in range(len(costs[name]))
            if all(costs[other][number] <= most for other, most in limits.items() if other != name)
        ]
        reached = format_value(name, min(others)) if others else "nothing"
        parts.append(f"{name} is limited to {format_value(name, limit)}, and {reached} is reached within the others")
    return "no member keeps all budgets: " + "; ".join(parts)
