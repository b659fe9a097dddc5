"""Everything that has to be measured before budgets can be answered, in the order of its price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.allocation.solver import SOLVERS
from compress.data.samples import Samples
from compress.errors import InputError
from compress.intake.model import Intake
from compress.lowrank.ranks import SHARES, check_shares
from compress.options import Options
from compress.plans.budgets import parse_budgets
from compress.plans.frame import begin_plan, choose_methods
from compress.progress import Progress
from compress.quant.targets import choose_target, find_target
from compress.records.allocation import Budget
from compress.records.plan import Plan
from compress.search.allocator import Allocator
from compress.search.costs import measure_costs
from compress.search.sensitivities import check_measure, decide_measure, measure_errors, transformed
from compress.search.space import input_widths, list_space

__all__ = ["OBJECTIVES", "Prepared", "check_search", "prepare"]

OBJECTIVES = ("error", "size", "latency", "bops")


@dataclass(frozen=True)
class Prepared:
    """A model ready for budgets.

    Attributes:
        allocator: with all prices and errors.
        frame: the plan without its choices.
        budgets: as given.
        measure: what errors are measured by.
        objective: what is minimised.
        notes: where the measurements come from.
    """

    allocator: Allocator
    frame: Plan
    budgets: tuple[Budget, ...]
    measure: str
    objective: str
    notes: tuple[str, ...]

    @property
    def limits(self) -> dict[str, float]:
        """The budgets that the program keeps, in its own units; the drop is kept by evaluation."""
        return {each.quantity: self.allocator.limit(each) for each in self.budgets if each.quantity != "drop"}

    @property
    def drop(self) -> float | None:
        """Allowed drop of accuracy in points, None where it is not limited."""
        return next((each.limit for each in self.budgets if each.quantity == "drop"), None)


def check_search(options: Options, *, with_data: bool) -> tuple[tuple[Budget, ...], str]:
    """The budgets and what is to be minimised; refuse options that no search takes, before anything is read.

    Raises:
        InputError: naming the option.
    """
    if options.bits is not None:
        raise InputError("give either --bits, one width for all layers, or --budget, which chooses widths by layer")
    if options.group_size is not None:
        raise InputError("--group-size goes with --bits; budgets choose among whole rows")
    if options.equalize:
        raise InputError("--equalize changes the weights that sensitivities are measured on; with budgets leave it out")
    budgets = parse_budgets(options.budgets)
    objective = _objective(options, budgets)
    if not options.bench and any(each.quantity == "latency" for each in budgets):
        raise InputError(
            "--no-bench leaves the finished file untimed, and its time shows whether a budget on latency was kept; "
            "leave one of the two out"
        )
    _check_solver(options)
    input_widths(options, with_data)
    check_measure(options, with_data)
    check_shares(options.search.ranks or ())
    return budgets, objective


def prepare(
    intake: Intake,
    options: Options,
    samples: Samples | None,
    progress: Progress,
    *,
    also_timed: bool = False,
) -> Prepared:
    """Measure prices, refuse budgets out of reach, measure errors.

    Args:
        also_timed: measure latency though no budget limits it.

    Raises:
        InputError: options that do not go together.
        InfeasibleBudget: nothing fits; with the smallest reachable values, before sensitivities are measured.
    """
    budgets, objective = check_search(options, with_data=samples is not None)
    frame = begin_plan(intake, options, samples)
    measure = decide_measure(options, samples)
    target = find_target(choose_target(options.target, options.machine))
    timed = also_timed or objective == "latency" or any(each.quantity == "latency" for each in budgets)
    own_batch = len(intake.traced.example[0])
    if timed and options.search.batch != own_batch and not intake.traced.dynamic_batch:
        raise InputError(f"--batch {options.search.batch}: the model fixes its batch to {own_batch}")
    search = options.search
    if search.floats is None:
        # A float layer among integer ones is slow in a way that only measured latencies price.
        options = replace(options, search=replace(search, floats=timed or samples is None))
    if options.search.ranks is None:
        costly = timed or "bops" in (objective, *(each.quantity for each in budgets))
        options = replace(options, search=replace(options.search, ranks=SHARES if costly else ()))
    float_model = intake.traced
    intake = transformed(intake, options, frame, samples)
    space = list_space(
        intake.traced,
        intake.layers,
        options,
        choose_methods(options, samples is not None),
        target,
        with_data=samples is not None,
        timed=timed,
    )
    costs = measure_costs(
        intake, space, target, options.search, timed=timed, progress=progress, float_model=float_model
    )
    allocator = Allocator(intake.traced, space, costs, target, options.search, progress)
    prepared = Prepared(allocator, frame, budgets, measure, objective, ())
    allocator.check_reachable(prepared.limits)
    allocator.errors, note = measure_errors(intake, options, frame, space, measure, samples, progress)
    return replace(prepared, notes=(note,))


def _objective(options: Options, budgets: Sequence[Budget]) -> str:
    wanted = options.search.minimize
    if wanted is None:
        return "size" if any(each.quantity == "drop" for each in budgets) else "error"
    if wanted not in OBJECTIVES:
        raise InputError(f"--minimize {wanted}: known are {', '.join(OBJECTIVES)}")
    if wanted == "error" and any(each.quantity == "drop" for each in budgets):
        raise InputError("--budget drop=... limits the error already; minimize size, latency or bops")
    if wanted != "error" and not any(each.quantity == "drop" for each in budgets):
        raise InputError(f"--minimize {wanted} needs --budget drop=...: else the smallest widths would always win")
    return wanted


def _check_solver(options: Options) -> None:
    search = options.search
    if search.solver not in SOLVERS:
        raise InputError(f"unknown solver {search.solver!r}; known: {', '.join(SOLVERS)}")
    for name, value, least in (
        ("--gap", search.gap, 0.0),
        ("--time-limit", search.time_limit, 0.01),
        ("--top", search.top, 1),
        ("--threads", search.threads, 1),
        ("--batch", search.batch, 1),
        ("--sensitivity-samples", search.sensitivity_samples, 2),
        ("--sensitivity-iterations", search.sensitivity_iterations, 0),
    ):
        if not value >= least:
            raise InputError(f"{name} {value:g}: it must be at least {least:g}")
