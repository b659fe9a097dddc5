"""A program as a PuLP model: one binary for each choice of a unit, and joint columns for what two units decide.

Binaries ``x[u, k]`` with ``sum_k x[u, k] = 1``. Pairs use the transport form over classes of choices that all matrices
of the two units treat alike, which is exact for costs of any sign and needs no binaries of its own ::

    y[A, B] >= 0,   sum_B y[A, B] = sum_{k in A} x[first, k],   sum_A y[A, B] = sum_{k in B} x[second, k]

Numbers are shifted and scaled so that the solver's absolute tolerances are small beside them: each unit's smallest
cost is taken out of a row, budgets become ``row <= 1``, and the objective is counted from ``offset`` in ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pulp
from numpy.typing import NDArray

from compress.allocation.program import Picks, Program

__all__ = ["Model", "Outcome", "build"]


@dataclass(frozen=True)
class Outcome:
    """How a solver ended: ``bound`` in the model's scaled objective, -inf if it gave none."""

    found: bool
    infeasible: bool
    bound: float


@dataclass(eq=False)
class Model:
    """The problem, its binaries (none for a unit with one choice) and the joint columns of pairs."""

    program: Program
    problem: pulp.LpProblem
    binaries: list[list[pulp.LpVariable]]
    joints: list[_Joint]
    offset: float
    scale: float
    cuts: int = field(default=0)

    def picks(self) -> Picks:
        """The choices in the solution that PuLP holds."""
        return tuple(
            max(range(len(columns)), key=lambda k: columns[k].varValue or 0.0) if columns else 0
            for columns in self.binaries
        )

    def unscaled(self, bound: float) -> float:
        """A bound on the model's objective as one on the program's."""
        return self.offset + self.scale * bound

    def forbid(self, picks: Sequence[int]) -> None:
        """Cut off one plan."""
        self._at_most_all_but_one([{pick} for pick in picks])

    def forbid_excess(self, picks: Sequence[int], quantity: str) -> None:
        """Cut off a plan that exceeds a budget, and all that take as much or more of it in every unit."""
        if any(pair.quantity == quantity for pair in self.program.pairs):
            self.forbid(picks)
            return
        costs = [unit[quantity] for unit in self.program.costs]
        heavier = [set(np.flatnonzero(cost >= cost[pick]).tolist()) for cost, pick in zip(costs, picks, strict=True)]
        self._at_most_all_but_one(heavier)

    def _at_most_all_but_one(self, choices: Sequence[set[int]]) -> None:
        # A unit all of whose choices are meant adds the same to both sides.
        units = [(u, c) for u, c in enumerate(choices) if self.binaries[u] and len(c) < len(self.binaries[u])]
        terms = [(self.binaries[unit][k], 1.0) for unit, chosen in units for k in sorted(chosen)]
        self.problem += pulp.LpAffineExpression(terms) <= len(units) - 1, f"cut_{self.cuts}"
        self.cuts += 1


@dataclass(frozen=True, eq=False)
class _Joint:
    """Two units with pairs: class of every choice [K_first], [K_second], and a column for each pair of classes."""

    first: int
    second: int
    rows: list[int]
    columns: list[int]
    cells: dict[tuple[int, int], pulp.LpVariable]
    costs: dict[str, NDArray[np.float64]]


def build(program: Program, excluded: Sequence[Picks] = (), objective: float = np.inf) -> Model:
    """The model of a folded ``program`` without the plans ``excluded``.

    Args:
        objective: that of a known plan: it becomes 100 in the model, well above a solver's tolerance.
    """
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    binaries = [
        [problem.add_variable(f"x_{unit}_{k}", cat=pulp.LpBinary) for k in range(program.size(unit))]
        if program.size(unit) > 1
        else []
        for unit in range(len(program.costs))
    ]
    joints = _joints(program, problem)
    offset = _least(program, program.objective)
    scale = (objective - offset) / 100 if np.isfinite(objective) else _largest(program, program.objective)
    scale = scale if scale > 0 else 1.0
    model = Model(program, problem, binaries, joints, offset, scale)
    problem += pulp.LpAffineExpression(_row(model, program.objective, scale))
    for unit, columns in enumerate(binaries):
        if columns:
            problem += pulp.LpAffineExpression([(column, 1.0) for column in columns]) == 1, f"one_{unit}"
    for number, joint in enumerate(joints):
        _tie(problem, joint, binaries, number)
    for name in program.budgets:
        spare = program.limit(name) - _least(program, name)
        terms = _row(model, name, 1.0)
        largest = max((amount for _, amount in terms), default=0.0)
        # No room at all: only the cheapest choices; a row of zeros would say nothing.
        unit_of_row = spare if spare > 0 else max(largest, 1e-300)
        scaled = [(column, amount / unit_of_row) for column, amount in terms if amount > 0]
        if scaled:
            problem += pulp.LpAffineExpression(scaled) <= max(spare, 0.0) / unit_of_row, f"budget_{name}"
    for picks in excluded:
        model.forbid(picks)
    return model


def _least(program: Program, quantity: str) -> float:
    """What every plan of a folded program pays at least: the model's rows count from here."""
    return program.fixed.get(quantity, 0.0) + sum(float(costs[quantity].min()) for costs in program.costs)


def _largest(program: Program, quantity: str) -> float:
    return max(float(np.ptp(costs[quantity])) for costs in program.costs)


def _row(model: Model, quantity: str, scale: float) -> list[tuple[pulp.LpVariable, float]]:
    terms = []
    for costs, columns in zip(model.program.costs, model.binaries, strict=True):
        above = (costs[quantity] - costs[quantity].min()) / scale
        terms += list(zip(columns, above.tolist(), strict=False))
    for joint in model.joints:
        if quantity in joint.costs:
            terms += [(column, float(joint.costs[quantity][cell]) / scale) for cell, column in joint.cells.items()]
    return terms


def _joints(program: Program, problem: pulp.LpProblem) -> list[_Joint]:
    """One joint for each two units, whichever comes first in their pairs."""
    matrices: dict[tuple[int, int], dict[str, NDArray[np.float64]]] = {}
    for pair in program.pairs:
        if pair.quantity in program.used:
            ends = (min(pair.first, pair.second), max(pair.first, pair.second))
            matrix = pair.costs if pair.first < pair.second else pair.costs.T
            held = matrices.setdefault(ends, {})
            held[pair.quantity] = held[pair.quantity] + matrix if pair.quantity in held else matrix
    joints = []
    for (first, second), costs in matrices.items():
        stacked = np.concatenate(list(costs.values()), axis=1)
        _, row, rows = np.unique(stacked, axis=0, return_index=True, return_inverse=True)
        stacked = np.concatenate(list(costs.values()), axis=0)
        _, column, columns = np.unique(stacked, axis=1, return_index=True, return_inverse=True)
        cells = {
            (a, b): problem.add_variable(f"y_{first}_{second}_{a}_{b}", lowBound=0.0)
            for a in range(len(row))
            for b in range(len(column))
        }
        merged = {name: matrix[np.ix_(row, column)] for name, matrix in costs.items()}
        joints.append(_Joint(first, second, rows.reshape(-1).tolist(), columns.reshape(-1).tolist(), cells, merged))
    return joints


def _tie(problem: pulp.LpProblem, joint: _Joint, binaries: list[list[pulp.LpVariable]], number: int) -> None:
    """Make the joint columns follow the binaries."""
    for side, (unit, classes) in enumerate(((joint.first, joint.rows), (joint.second, joint.columns))):
        for group in sorted(set(classes)):
            terms = [(column, 1.0) for cell, column in joint.cells.items() if cell[side] == group]
            terms += [(binaries[unit][k], -1.0) for k, of in enumerate(classes) if of == group]
            problem += pulp.LpAffineExpression(terms) == 0, f"tie_{number}_{side}_{group}"
