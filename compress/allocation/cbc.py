"""CBC, the program that comes with PuLP; its bound is read from its log.

The log rounds to nearest, so a printed lower bound may lie above the true one: each is lowered by one unit of its last
printed digit.
"""

from __future__ import annotations

import re
import tempfile
from decimal import Decimal
from pathlib import Path

import pulp

from compress.allocation.pulp_model import Model, Outcome
from compress.errors import SolverError

__all__ = ["bound_in", "run"]

_NUMBER = r"([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
_RELAXED = re.compile(rf"^Continuous objective value is {_NUMBER}", re.MULTILINE)
_SUMMARY = re.compile(rf"^Lower bound:\s+{_NUMBER}", re.MULTILINE)
_SEARCH = re.compile(rf"^Cbc0005I Partial search .*\(best possible {_NUMBER}\)", re.MULTILINE)
_STOPPED = re.compile("Exiting on maximum time|Result - Stopped")
# CBC looks only for solutions better by this much; left alone it asks for 1e-5 and calls the rest optimal.
_INCREMENT = 1e-9


def run(model: Model, time_limit: float, allowed: float) -> Outcome:
    """Solve ``model`` to within ``allowed`` of its scaled objective.

    Raises:
        SolverError: CBC is missing.
        PulpError, OSError: CBC died.
    """
    problem = model.problem
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        # The class PULP_CBC_CMD is this one with the path of PuLP's own CBC, and a warning on every call.
        solver = pulp.COIN_CMD(
            path=pulp.PULP_CBC_CMD.pulp_cbc_path,
            msg=False,
            timeLimit=time_limit,
            gapRel=0.0,
            gapAbs=allowed,
            logPath=str(log),
            options=[f"increment {_INCREMENT}", "primalTolerance 1e-9", "integerTolerance 1e-9"],
        )
        solver.tmpDir = folder
        if not solver.available():
            raise SolverError("solver cbc is not there; reinstall pulp, or use --solver highs")
        problem.solve(solver)
        text = log.read_text(errors="replace")
    proven = problem.sol_status == pulp.LpSolutionOptimal
    bound = bound_in(text)
    if proven:
        bound = max(bound, float(pulp.value(problem.objective)) - allowed - _INCREMENT)
    return Outcome(
        found=proven or problem.sol_status == pulp.LpSolutionIntegerFeasible,
        infeasible=problem.status == pulp.LpStatusInfeasible and not _STOPPED.search(text),
        bound=bound,
    )


def bound_in(log: str) -> float:
    """The best lower bound that a log of CBC proves; -inf if there is none."""
    bounds = [_at_least(found) for found in _RELAXED.findall(log)[:1]]
    summary = _SUMMARY.search(log)
    if summary:
        bounds.append(_at_least(summary[1]))
        # The same number with more digits; heuristics log searches of their own, on parts of the problem.
        exact = [
            text for text in _SEARCH.findall(log) if abs(float(text) - float(summary[1])) <= _last_digit(summary[1])
        ]
        bounds += [_at_least(text) for text in exact[-1:]]
    return max(bounds, default=float("-inf"))


def _at_least(text: str) -> float:
    return float(text) - _last_digit(text)


def _last_digit(text: str) -> float:
    """The worth of a printed number's last digit: 0.001 for 23.627."""
    return float(Decimal(1).scaleb(int(Decimal(text).as_tuple().exponent)))
