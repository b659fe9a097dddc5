"""From budgets to the one plan that is carried out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from compress.data.samples import Samples
from compress.errors import InputError
from compress.files.cache import digest
from compress.files.outputs import new_file
from compress.intake.model import Intake
from compress.options import Options
from compress.plans.budgets import format_value, parse_budgets
from compress.progress import Progress
from compress.records.plan import Plan
from compress.search.drop import search_drop
from compress.search.prepare import prepare

__all__ = ["find_plan"]


def find_plan(
    intake: Intake,
    options: Options,
    samples: Samples | None,
    drop_of: Callable[[Plan], float] | None,
    progress: Progress,
    pending: Path | None = None,
    evaluation: str | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """The best plan inside ``options.budgets``, with its certificate, and notes for the report.

    Args:
        drop_of: carries a plan out and returns its accuracy drop in points; None without labelled data.
        pending: file that keeps the plan until it is carried out. Latencies differ from run to run, and with them
            plans: a run that was stopped is to continue with the one it had.
        evaluation: fingerprint of the labelled data.

    Raises:
        InputError: options that do not go together.
        InfeasibleBudget: no plan fits; the message has the smallest reachable value of each budget.
        SolverError: the solver found nothing in its time.
    """
    if drop_of is None and any(budget.quantity == "drop" for budget in parse_budgets(options.budgets)):
        raise InputError("--budget drop=... is kept by evaluating plans: give labelled data with classes as --eval")
    versions = [version(name) for name in ("compress-toolchain", "onnxruntime", "torch")]
    data = samples.fingerprint if samples else None
    key = digest([intake.fingerprint, data, evaluation, asdict(replace(options, bench=True)), versions])
    if pending is not None and (kept := _kept(pending, key)) is not None:
        return kept, ("continued with the plan that an earlier run found",)
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
    if pending is not None:
        content = {"key": key, "plan": plan.model_dump(mode="json"), "latency": plan.latency_table}
        with new_file(pending) as temporary:
            temporary.write_text(json.dumps(content))
    return plan, notes


def _kept(pending: Path, key: str) -> Plan | None:
    """The plan that a stopped run left for the same model, data and options."""
    try:
        content = json.loads(pending.read_text())
        plan = Plan.model_validate(content["plan"]).model_copy(update={"latency_table": content["latency"]})
        return plan if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
