"""From budgets to the one plan that is carried out."""

from __future__ import annotations

from collections.abc import Callable

from compress.allocate.budgets import format_value, parse_budgets
from compress.calib.samples import Samples
from compress.errors import InputError
from compress.intake import Intake
from compress.options import Options
from compress.records import Plan
from compress.search.drop import search_drop
from compress.search.prepare import prepare

__all__ = ["find_plan"]


def find_plan(
    intake: Intake,
    options: Options,
    samples: Samples | None,
    drop_of: Callable[[Plan], float] | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Plan, tuple[str, ...]]:
    """The best plan inside ``options.budgets``, with its certificate, and notes for the report.

    Args:
        drop_of: carries a plan out and returns its accuracy drop in points; None without labelled data.

    Raises:
        InputError: options that do not go together.
        InfeasibleBudget: no plan fits; the message has the smallest reachable value of each budget.
        SolverError: the solver found nothing in its time.
    """
    if drop_of is None and any(budget.quantity == "drop" for budget in parse_budgets(options.budgets)):
        raise InputError("--budget drop=... is kept by evaluating plans: give labelled data with classes as --eval")
    prepared = prepare(intake, options, samples, progress)
    allocator = prepared.allocator
    if prepared.drop is None:
        draft = allocator.find(prepared.limits, prepared.objective)
        plan = allocator.plan(prepared.frame, draft, prepared.budgets, prepared.measure, prepared.objective)
        notes = prepared.notes
    else:
        assert drop_of is not None
        plan, tried = search_drop(prepared, drop_of)
        values = ", ".join(f"{format_value(prepared.objective, t.value)} loses {t.drop:.2f}" for t in tried)
        notes = (*prepared.notes, f"drop: {len(tried)} plans evaluated on the evaluation data ({values})")
    if not plan.choices:
        raise InputError(
            "the budgets leave every layer float: nothing would be compressed. Lower a budget, or leave out --floats"
        )
    return plan, notes
