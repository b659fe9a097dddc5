"""The best plan of a program, with proof: reduce, bound, and give what is left to an integer-programming solver.

1. Drop choices that fit no budget or are dominated (:mod:`compress.allocation.reduction`).
2. Bound from below by Lagrange multipliers (:mod:`compress.allocation.relaxation`), from above by greedy from the plans
   met there; choices that no plan better than that can hold are dropped too. Of 1,000 units some tens are left.
3. A solver settles those. What it returns is added up again exactly; a plan over a budget by the solver's tolerance is
   cut off and the program solved again, so its bound still holds.

Every dropped choice is one that a plan better than the best known cannot hold, so the bound on the rest, or the best
known objective if that is lower, bounds the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pulp
from numpy.typing import NDArray

from compress.allocation.greedy import greedy, neighbour
from compress.allocation.program import Answer, Picks, Program
from compress.allocation.pulp_model import Model, Outcome, build
from compress.allocation.reduction import Reduced, affordable, undominated
from compress.allocation.relaxation import Relaxation, relax
from compress.errors import CompressError, SolverError
from compress.records.registry import resolve

__all__ = ["SOLVERS", "InfeasibleProgram", "smallest", "solve"]

SOLVERS = {
    "highs": "compress.allocation.highs:run",
    "cbc": "compress.allocation.cbc:run",
}
"""name -> function of (model, seconds, absolute gap allowed) that solves a PuLP model."""

PROVEN = 1e-9
"""Solvers and sums are no more exact than this part of the objective: a smaller gap counts as none."""

Run = Callable[[Model, float, float], Outcome]

_ROUNDS = 100
# A bound below a whole number by no more than this may be that number and a solver's rounding; while numbers stay below
# the second one it is far more than that rounding.
_WHOLE_SLACK = 1e-3
_WHOLE_LIMIT = 1e5
_MESSAGE_SECONDS = 10.0


class InfeasibleProgram(CompressError):
    """No plan is inside the budgets, which is proven."""

    exit_code = 3


@dataclass
class _Best:
    """The best plan known and what is proven, in the original program."""

    program: Program
    excluded: Collection[Picks]
    picks: Picks | None = None
    objective: float = np.inf
    bound: float = -np.inf
    whole: bool = False

    def __post_init__(self) -> None:
        self.whole = _whole(self.program)

    def open(self, gap: float, noise: float) -> bool:
        """Whether a better plan by more than ``gap``, relative, and ``noise`` may exist."""
        return self.picks is None or self.objective - self.bound > max(noise, gap * abs(self.objective))

    def prove(self, bound: float) -> None:
        """Take in a bound on the plans that may still be better."""
        if self.whole and np.isfinite(bound):
            # Nothing lies between whole numbers.
            bound = float(np.ceil(bound - _WHOLE_SLACK))
        self.bound = max(self.bound, min(bound, self.objective))

    def offer(self, picks: Picks | None) -> None:
        """Keep ``picks`` if they are allowed and better."""
        if picks is not None and picks not in self.excluded and self.program.feasible(picks):
            objective = self.program.total(picks, self.program.objective)
            if objective < self.objective:
                self.picks, self.objective = picks, objective


def solve(
    program: Program,
    *,
    solver: str = "highs",
    gap: float = 0.0,
    time_limit: float = 60.0,
    excluded: Sequence[Picks] = (),
) -> Answer:
    """The plan inside the budgets with the smallest objective.

    Args:
        solver: a name in :data:`SOLVERS`.
        gap: relative gap to stop at; the answer is then "feasible", unless it happens to be proven optimal.
        time_limit: seconds for the solver; what comes before it takes one more at 1,000 units of 20 choices.
        excluded: plans not to return; with the plans found so far, the next best comes.

    Raises:
        InputError: unknown solver.
        InfeasibleProgram: no plan is inside the budgets, or none but the excluded ones.
        SolverError: the solver is missing or died, or no plan was found in time.
        ValueError: an excluded plan does not name one choice a unit.
    """
    started = time.monotonic()
    run: Run = resolve(SOLVERS, solver, "solver")
    for picks in excluded:
        program.total(picks, program.objective)
    best = _Best(program, frozenset(tuple(picks) for picks in excluded))
    reduced, relaxation = _prepare(best)
    if reduced is None or relaxation.bound == np.inf:
        raise InfeasibleProgram(_why(program, best.excluded, solver))
    best.prove(relaxation.bound)
    settled_by = "bounds"
    noise = _noise(program)
    if best.open(max(gap, PROVEN), noise):
        core = reduced.keep(relaxation.within(best.objective, noise)) if best.picks else reduced
        if any(core.program.size(unit) > 1 for unit in range(len(program.costs))):
            settled_by = solver
            if not _search(run, solver, core, best, gap, started + time_limit):
                raise InfeasibleProgram(_why(program, best.excluded, solver))
        else:
            # Only one plan is left that can be as good as the best: nothing beats the better of the two.
            best.offer(core.outward([0] * len(program.costs)))
            if best.picks is None:
                raise InfeasibleProgram(_why(program, best.excluded, solver))
            best.bound = best.objective
    if best.open(max(gap, PROVEN), noise):
        best.offer(greedy(program))
    if best.picks is None:
        raise SolverError(
            f"solver {solver} found no plan within {time_limit:g} s; raise --time-limit, "
            f"try --solver {' or '.join(name for name in SOLVERS if name != solver)}, or raise a budget"
        )
    # What is left is below what sums can tell.
    bound = best.bound if best.objective - best.bound > noise else best.objective
    return Answer(
        picks=best.picks,
        objective=best.objective,
        bound=bound,
        gap=(best.objective - bound) / max(abs(best.objective), 1e-300),
        status="feasible" if best.open(PROVEN, noise) else "optimal",
        solver=settled_by,
        seconds=time.monotonic() - started,
    )


def smallest(
    program: Program,
    quantity: str,
    given: Mapping[str, float] | None = None,
    *,
    solver: str = "highs",
    time_limit: float = 60.0,
) -> float:
    """The smallest total of ``quantity`` that some plan reaches inside the budgets ``given`` (none by default).

    Raises:
        InfeasibleProgram: no plan is inside ``given``.
        SolverError: as :func:`solve`.
        ValueError: an unknown quantity.
    """
    alone = replace(program, objective=quantity, budgets=dict(given or {}))
    return solve(alone, solver=solver, time_limit=time_limit).objective


def _prepare(best: _Best) -> tuple[Reduced | None, Relaxation]:
    """The program without useless choices, its relaxation, and first plans for ``best``; None if nothing can fit."""
    nothing = Relaxation(np.inf, np.empty((0, 0)), ())
    reduced = Reduced.whole(best.program)
    kept = affordable(reduced.program)
    if not all(len(choices) for choices in kept):
        return None, nothing
    reduced = reduced.keep(kept)
    if not best.excluded:
        # The second best plan may differ from the best by a dominated choice alone.
        reduced = reduced.keep(undominated(reduced.program))
    relaxation = relax(reduced.program)
    starts: list[Picks | None] = list(relaxation.candidates[-3:]) or [None]
    for start in starts:
        improved = greedy(reduced.program, start=start)
        if improved is not None:
            best.offer(reduced.outward(improved))
    # Sorted: the order of a set would let the plan depend on the run.
    for picks in sorted(best.excluded):
        if best.program.feasible(picks):
            best.offer(neighbour(best.program, picks, best.excluded))
    return reduced, relaxation


def _search(run: Run, solver: str, core: Reduced, best: _Best, gap: float, deadline: float) -> bool:
    """Let the solver improve ``best``; False if it proves that there is no plan."""
    model = build(core.program, [p for p in map(core.inward, sorted(best.excluded)) if p is not None], best.objective)
    known = [abs(value) for value in (best.bound, best.objective) if np.isfinite(value)]
    allowed = gap * min(known) / model.scale if best.bound * best.objective > 0 else 0.0
    if best.whole:
        allowed = max(allowed, (1 - 2 * _WHOLE_SLACK) / model.scale)
    for _ in range(_ROUNDS):
        outcome = _run(run, solver, model, max(deadline - time.monotonic(), 0.01), allowed)
        if outcome.infeasible:
            # With a plan in hand that can only be the solver's rounding, and proves nothing.
            return best.picks is not None
        best.prove(model.unscaled(outcome.bound))
        if not outcome.found:
            break
        picks = model.picks()
        plan = core.outward(picks)
        over = [name for name in best.program.budgets if best.program.total(plan, name) > best.program.limit(name)]
        if over:
            model.forbid_excess(picks, over[0])
        elif plan in best.excluded:
            model.forbid(picks)
        else:
            best.offer(plan)
            break
    return True


def _run(run: Run, solver: str, model: Model, seconds: float, allowed: float) -> Outcome:
    others = " or ".join(name for name in SOLVERS if name != solver)
    try:
        return run(model, seconds, allowed)
    # KeyError: PuLP knows only some of the ways in which HiGHS can end.
    except (pulp.PulpError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise SolverError(f"solver {solver} died ({type(error).__name__}: {error}); try --solver {others}") from error


def _objective_terms(program: Program) -> list[NDArray[np.float64]]:
    """Everything that a plan's objective may be the sum of."""
    pairs = [pair.costs for pair in program.pairs if pair.quantity == program.objective]
    fixed = np.array([program.fixed.get(program.objective, 0.0)])
    return [fixed, *(costs[program.objective] for costs in program.costs), *pairs]


def _noise(program: Program) -> float:
    """What rounding may do to a sum over the program's objective."""
    return 1e-13 * sum(float(np.abs(term).max()) for term in _objective_terms(program))


def _whole(program: Program) -> bool:
    """Whether every plan's objective is a whole number, small enough to tell it from the next in a solver's bound."""
    terms = _objective_terms(program)
    small = sum(float(np.abs(term).max()) for term in terms) <= _WHOLE_LIMIT
    return small and all(bool((term == np.round(term)).all()) for term in terms)


def _why(program: Program, excluded: Collection[Picks], solver: str) -> str:
    """The sentence that says which budget is out of reach, and what is within."""
    if excluded:
        return f"no plan inside the budgets is left besides the {len(excluded)} excluded"
    try:
        return _out_of_reach(program, solver)
    except SolverError:
        return "no plan is inside the budgets, which is proven; what can be reached took too long to find"


def _out_of_reach(program: Program, solver: str) -> str:
    found = {name: smallest(program, name, solver=solver, time_limit=_MESSAGE_SECONDS) for name in program.budgets}
    over = [name for name in program.budgets if found[name] > program.limit(name)]
    if over:
        return "no plan is inside the budgets: " + "; ".join(
            f"the smallest {name} that can be reached is {found[name]:.6g}, the budget {program.budgets[name]:.6g}"
            for name in over
        )
    *others, last = program.budgets
    given = {name: program.budgets[name] for name in others}
    least = smallest(program, last, given, solver=solver, time_limit=_MESSAGE_SECONDS)
    within = " and ".join(f"{name} of at most {amount:.6g}" for name, amount in given.items())
    return (
        f"each budget can be met, but not all at once: with {within}, the smallest {last} that can be reached is "
        f"{least:.6g}, the budget {program.budgets[last]:.6g}"
    )
