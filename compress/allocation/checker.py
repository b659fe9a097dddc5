"""A second pair of eyes on an answer: adds the choices up again and believes nothing that the solver said.

It shares no sum with :mod:`compress.allocation.program` or the solvers, on purpose: plain loops and ``math.fsum``.
"""

from __future__ import annotations

import math

from compress.allocation.program import TOLERANCE, Answer, Program
from compress.errors import CompressError

__all__ = ["CheckFailed", "check"]

# What the parts of one sum, added in another order, may differ by.
_ROUNDING = 1e-9


class CheckFailed(CompressError):
    """An answer does not hold what it says."""


def check(program: Program, answer: Answer, *, gap: float = 0.0) -> None:
    """Verify picks, budgets, objective, bound, gap and status of ``answer``.

    Args:
        gap: what the solver was allowed to stop at.

    Raises:
        CheckFailed: naming the unit or the quantity, what was claimed and what was found.
    """
    if len(answer.picks) != len(program.costs):
        raise CheckFailed(f"the plan picks for {len(answer.picks)} units; the program has {len(program.costs)}")
    for unit, pick in enumerate(answer.picks):
        count = len(program.costs[unit][program.objective])
        if not 0 <= pick < count:
            raise CheckFailed(f"unit {unit}: choice {pick} is picked; it has {count}")
    for quantity, budget in program.budgets.items():
        total, _ = _add_up(program, answer, quantity)
        if total > budget + TOLERANCE * abs(budget):
            raise CheckFailed(f"{quantity}: the plan needs {total!r}, the budget is {budget!r}")
    objective, size = _add_up(program, answer, program.objective)
    slack = _ROUNDING * size
    if not abs(answer.objective - objective) <= slack:
        raise CheckFailed(f"{program.objective}: the plan has {objective!r}, the answer says {answer.objective!r}")
    if not answer.bound <= answer.objective + slack:
        raise CheckFailed(f"{program.objective}: the bound {answer.bound!r} is above the plan's {answer.objective!r}")
    found = (answer.objective - answer.bound) / max(abs(answer.objective), 1e-300)
    # Not abs(a - b): both are infinite where nothing is proven.
    if not (answer.gap == found or abs(answer.gap - found) <= _ROUNDING * max(1.0, abs(found))):
        raise CheckFailed(f"{program.objective}: bound and plan are {found!r} apart, the answer says {answer.gap!r}")
    largest = gap * abs(answer.objective) + slack
    if answer.status == "optimal" and not answer.objective - answer.bound <= largest:
        raise CheckFailed(
            f"{program.objective}: called optimal with a gap of {answer.gap!r}; at most {gap!r} was asked for"
        )


def _add_up(program: Program, answer: Answer, quantity: str) -> tuple[float, float]:
    """The plan's total in ``quantity``, and the sum of its parts' sizes."""
    parts = [float(program.fixed[quantity])] if quantity in program.fixed else []
    parts += [float(program.costs[unit][quantity][pick]) for unit, pick in enumerate(answer.picks)]
    pairs = (pair for pair in program.pairs if pair.quantity == quantity)
    parts += [float(pair.costs[answer.picks[pair.first]][answer.picks[pair.second]]) for pair in pairs]
    return math.fsum(parts), math.fsum(abs(part) for part in parts)
