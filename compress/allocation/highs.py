"""HiGHS, in this process, through PuLP."""

from __future__ import annotations

import highspy
import numpy as np
import pulp

from compress.allocation.pulp_model import Model, Outcome
from compress.errors import SolverError

__all__ = ["run"]

_TOLERANCE = 1e-9
_ENDED = {
    highspy.HighsModelStatus.kOptimal,
    highspy.HighsModelStatus.kInfeasible,
    highspy.HighsModelStatus.kUnboundedOrInfeasible,
    highspy.HighsModelStatus.kTimeLimit,
    highspy.HighsModelStatus.kIterationLimit,
}


class _Quiet(highspy.Highs):
    """HiGHS without the banner that it prints, whatever its options, when its constructor sets callbacks up."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class _Highs(pulp.HiGHS):
    """PuLP's HiGHS: silent, and stopped by Ctrl-C.

    It is given no first solution: HiGHS 1.16 may improve one in presolve and then return the one it was given as
    optimal, beside the better one's objective. It is no faster with one either.
    """

    def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:
        lp.solverModel = _Quiet()
        options = {"time_limit": float(self.timeLimit), "mip_rel_gap": self.gapRel, "mip_abs_gap": self.gapAbs}
        for name, value in (options | self.optionsDict).items():
            lp.solverModel.setOptionValue(name, value)

    def callSolver(self, lp: pulp.LpProblem) -> None:
        # In a thread of its own: a signal would wait until the time limit otherwise.
        lp.solverModel.HandleUserInterrupt = True
        lp.solverModel.startSolve()
        try:
            while not lp.solverModel.wait(0.1)[0]:
                pass
        except KeyboardInterrupt:
            lp.solverModel.cancelSolve()
            lp.solverModel.wait()
            raise
        status = lp.solverModel.getModelStatus()
        if status not in _ENDED:
            # PuLP would call some of these "Optimal".
            raise SolverError(f"solver highs ended with {status.name}; try --solver cbc")


def run(model: Model, time_limit: float, allowed: float) -> Outcome:
    """Solve ``model`` to within ``allowed`` of its scaled objective.

    Raises:
        SolverError: HiGHS is missing or broke off.
    """
    solver = _Highs(
        msg=False,
        timeLimit=time_limit,
        gapRel=0.0,
        gapAbs=allowed,
        mip_feasibility_tolerance=_TOLERANCE,
        primal_feasibility_tolerance=_TOLERANCE,
        # Rows are scaled to 1: what HiGHS would drop as zero is a byte in a gigabyte.
        small_matrix_value=1e-12,
    )
    model.problem.solve(solver)
    # PuLP says "Optimal" on a time-out too; only sol_status tells the two apart.
    sol_status = model.problem.sol_status
    info = model.problem.solverModel.getInfo()
    return Outcome(
        found=sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible),
        infeasible=sol_status == pulp.LpSolutionInfeasible,
        bound=float(info.mip_dual_bound) if np.isfinite(info.mip_dual_bound) else -np.inf,
    )
