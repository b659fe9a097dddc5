"""Tables and lines about plans: what was allocated and why, fronts, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from compress.plans.budgets import format_value
from compress.plans.diff import LayerDiff, PlanDiff
from compress.records.allocation import Allocation, Budget, Front

__all__ = ["allocation_lines", "allocation_table", "diff_lines", "diff_table", "front_table"]

_QUANTITIES = ("size", "latency", "bops", "error", "drop")


def allocation_table(allocation: Allocation) -> Table:
    """What each layer was given, and at what price."""
    timed = "latency" in allocation.predicted
    table = Table(title="Plan", title_justify="left")
    for name in ("layer", "does", "bytes", *(["µs"] if timed else []), f"error ({allocation.sensitivity})"):
        table.add_column(
            name,
            justify="left" if name in ("layer", "does") else "right",
            overflow="fold" if name == "layer" else "ellipsis",
        )
    for each in allocation.chosen:
        latency = [f"{each.cost.latency_us:.1f}" if each.cost.latency_us is not None else ""] if timed else []
        table.add_row(each.layer, str(each), f"{each.cost.size_bytes:,}", *latency, f"{each.error:.2g}")
    return table


def allocation_lines(allocation: Allocation | None, measured: Mapping[str, float]) -> list[str]:
    """Budgets, predictions beside measurements, and how good the plan is proven to be; nothing for a uniform plan.

    Args:
        measured: of the finished model, where there is one.
    """
    if allocation is None:
        return []
    limits = {budget.quantity: budget for budget in allocation.budgets}
    lines = []
    for name in _QUANTITIES:
        parts = []
        if name in allocation.predicted:
            parts.append(f"{format_value(name, allocation.predicted[name])} predicted")
        if name in allocation.measured:
            parts.append(f"{format_value(name, allocation.measured[name])} in the uncalibrated file")
        if name in measured:
            where = " on calibration samples" if name == "error" else ""
            parts.append(f"{format_value(name, measured[name])} measured{where}")
        if name in limits:
            parts.append(f"allowed {_limit(limits[name], allocation)}")
        if parts and (name in limits or name in ("size", "latency", "error", "drop")):
            label = f"error, {allocation.sensitivity}" if name == "error" else name
            lines.append(f"Plan's {label}: {', '.join(parts)}")
    proof = (
        "proven optimal" if allocation.status == "optimal" else f"at most {allocation.gap:.2%} from the best possible"
    )
    lines.append(
        f"Certificate: {allocation.objective} {allocation.value:.6g}, none of these choices gives less than "
        f"{allocation.bound:.6g}: {proof} ({allocation.solver}, {allocation.seconds:.1f} s)"
    )
    return lines + [f"- {note}" for note in allocation.notes]


def front_table(front: Front) -> Table:
    """One row a plan."""
    table = Table(title=f"Front over {front.over}", title_justify="left")
    timed = any("latency" in point.measured for point in front.points)
    accuracies = any("accuracy" in point.measured for point in front.points)
    columns = ["plan", "size", *(["latency"] if timed else []), f"error ({front.sensitivity})", "greedy's"]
    for name in [*columns, *(["accuracy"] if accuracies else []), "proven"]:
        table.add_column(name, justify="left" if name == "plan" else "right")
    for point in front.points:
        table.add_row(
            point.plan,
            format_value("size", point.measured["size"]),
            *([format_value("latency", point.measured["latency"])] if timed else []),
            f"{point.predicted['error']:.3g}",
            "" if point.greedy_error is None else f"{point.greedy_error:.3g}",
            *([f"{point.measured['accuracy']:.2%}"] if accuracies else []),
            "optimal" if point.status == "optimal" else f"gap {point.gap:.2%}",
        )
    return table


def diff_table(layers: Sequence[LayerDiff], first: str, second: str) -> Table:
    """What two plans do to each layer, and what the second takes more."""
    table = Table(title="Layers", title_justify="left")
    for name in ("layer", first, second, "bytes", "error"):
        table.add_column(name, justify="right" if name in ("bytes", "error") else "left")
    for row in layers:
        size = error = ""
        if row.first_bytes is not None and row.second_bytes is not None:
            size = f"{row.second_bytes - row.first_bytes:+,}"
        if row.first_error is not None and row.second_error is not None:
            error = f"{row.second_error - row.first_error:+.2g}"
        table.add_row(row.layer, row.first, row.second, size, error)
    return table


def diff_lines(found: PlanDiff) -> list[str]:
    """How many layers differ, what else does, and both plans' totals."""
    changed = sum(row.changed for row in found.layers)
    lines = [f"{changed} of {len(found.layers)} layers differ" if changed else "the plans treat every layer alike"]
    lines += [f"{name}: {a} against {b}" for name, (a, b) in found.settings.items()]
    for name in _QUANTITIES:
        if name in found.first_totals and name in found.second_totals:
            values = (found.first_totals[name], found.second_totals[name])
            lines.append(f"{name}, predicted: {' against '.join(format_value(name, value) for value in values)}")
    return lines


def _limit(budget: Budget, allocation: Allocation) -> str:
    if not budget.relative:
        return format_value(budget.quantity, budget.limit)
    whole = allocation.float_totals.get(budget.quantity)
    absolute = f" ({format_value(budget.quantity, budget.limit * whole)})" if whole else ""
    return f"{budget.limit:g}x the float model's{absolute}"
