"""Budgets as people write them: ``size=2MB``, ``size=0.15x``, ``latency=3ms``, ``drop=0.5``, ``bops=0.1x``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from compress.errors import InputError
from compress.records.allocation import Budget

__all__ = ["FAMILY_UNITS", "UNITS", "format_value", "parse_budgets"]

# Units by quantity, each as a multiple of what totals are kept in: bytes, microseconds, points, bit operations.
UNITS: dict[str, dict[str, float]] = {
    "size": {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "latency": {"us": 1, "µs": 1, "ms": 1e3, "s": 1e6},
    "drop": {"": 1, "points": 1, "pt": 1, "pp": 1},
    "bops": {"": 1, "M": 1e6, "G": 1e9, "T": 1e12},
}
# What a member of a low-rank family is chosen by: its numbers are floats, so that MACs say what bit operations would.
FAMILY_UNITS = {name: UNITS[name] for name in ("size", "latency", "drop")} | {
    "macs": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
}
_RELATIVE = ("size", "latency", "bops", "macs")
_EXAMPLES = {
    "size": "size=2MB, or size=0.15x for a multiple of the float file",
    "latency": "latency=3ms, or latency=0.5x for a multiple of the float model's time",
    "drop": "drop=0.5, in points of accuracy",
    "bops": "bops=0.5G, or bops=0.1x for a multiple of the float model's",
    "macs": "macs=50M, or macs=0.5x for a multiple of the dense model's",
}
_FORM = re.compile(r"\s*([A-Za-z]+)\s*=\s*([-+0-9.eE]+?)\s*([A-Za-zµ%]*)\s*")


def parse_budgets(texts: Iterable[str], units: Mapping[str, Mapping[str, float]] = UNITS) -> tuple[Budget, ...]:
    """The budgets in ``texts``, each of which may hold several, separated by commas.

    Args:
        units: the quantities that can be limited here, with their units.

    Raises:
        InputError: an unknown quantity, a number or unit that is missing or wrong, or a quantity given twice.
    """
    budgets: list[Budget] = []
    for text in (part for each in texts for part in each.split(",")):
        budget = _parse(text, units)
        if any(known.quantity == budget.quantity for known in budgets):
            raise InputError(f"--budget {text.strip()}: {budget.quantity} is limited twice; give one limit for each")
        budgets.append(budget)
    return tuple(budgets)


def format_value(quantity: str, value: float) -> str:
    """``value`` of ``quantity`` with the unit that reads best."""
    if quantity == "size":
        return f"{value / 1e6:,.3f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
    if quantity == "latency":
        return f"{value / 1e3:,.3f} ms"
    if quantity == "drop":
        return f"{value:.2f} points"
    if quantity == "bops":
        return f"{value / 1e9:,.3f} G bit operations"
    if quantity == "macs":
        return f"{value:,.0f} MACs"
    return f"{value:.4g}"


def _parse(text: str, units: Mapping[str, Mapping[str, float]]) -> Budget:
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(f"--budget {text.strip()!r}: write a quantity, a number and a unit, as in {_EXAMPLES['size']}")
    quantity, number, unit = found[1].lower(), found[2], found[3]
    if quantity not in units:
        raise InputError(f"--budget {text.strip()}: unknown quantity {quantity!r}; known: {', '.join(units)}")
    try:
        value = float(number)
    except ValueError as error:
        raise InputError(f"--budget {text.strip()}: {number!r} is not a number; write {_EXAMPLES[quantity]}") from error
    if not math.isfinite(value) or value < 0 or (value == 0 and quantity != "drop"):
        raise InputError(f"--budget {text.strip()}: {number} is no limit that can be kept; write {_EXAMPLES[quantity]}")
    if unit == "x" and quantity in _RELATIVE:
        return Budget.model_validate({"quantity": quantity, "limit": value, "relative": True})
    if unit not in units[quantity]:
        problem = f"{unit!r} is no unit of {quantity}" if unit else f"{quantity} needs a unit"
        allowed = ", ".join([*filter(None, units[quantity]), *(["x"] if quantity in _RELATIVE else [])])
        raise InputError(f"--budget {text.strip()}: {problem} ({allowed}); write {_EXAMPLES[quantity]}")
    return Budget.model_validate({"quantity": quantity, "limit": value * units[quantity][unit]})
