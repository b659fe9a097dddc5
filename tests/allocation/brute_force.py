"""Small random programs, and all their plans counted through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.allocation.checker import check
from compress.allocation.program import Pair, Program
from compress.allocation.solver import InfeasibleProgram, solve


def random_program(seed: int) -> Program:
    """Up to 8 units, 4 choices, 2 budgets, 6 pairs; whole numbers (many ties) or not; budgets met exactly or not."""
    rng = np.random.default_rng(seed)
    whole, scale = bool(rng.integers(2)), float(rng.choice([1e-4, 1.0, 1e9]))

    def amounts(low: float, high: float, *shape: int) -> NDArray[np.float64]:
        drawn = rng.uniform(low, high, shape)
        return np.round(drawn) if whole else drawn

    sizes = rng.integers(1, 5, rng.integers(1, 9))
    costs = tuple(
        {"error": amounts(0, 9, k), "size": scale * amounts(0, 9, k), "latency": amounts(1, 9, k)} for k in sizes
    )
    pairs = []
    for _ in range(rng.integers(0, 7) if len(sizes) > 1 else 0):
        first, second = rng.choice(len(sizes), 2, replace=False)
        quantity = str(rng.choice(["error", "size", "latency"]))
        matrix = amounts(-4, 4, sizes[first], sizes[second])
        if rng.integers(2):
            # Formats: rows and columns repeat.
            matrix = matrix[np.ix_(np.arange(sizes[first]) % 2 * (sizes[first] > 1), np.zeros(sizes[second], int))]
        pairs.append(Pair(int(first), int(second), quantity, matrix * (scale if quantity == "size" else 1.0)))
    fixed = {"error": float(amounts(0, 3, 1)[0]), "size": scale * 2.0} if rng.integers(2) else {}
    program = Program(costs, "error", {}, fixed, tuple(pairs))
    names = list(rng.permutation(["size", "latency"])[: rng.integers(0, 3)])
    target = tuple(int(rng.integers(k)) for k in sizes)
    # Between the cheapest and the dearest, or just what some plan needs.
    budgets = {}
    for name in names:
        totals = every_total(program, name)
        between = float(np.quantile(totals, rng.choice([0.02, 0.2, 0.6])) - rng.integers(0, 2) * 1e-3 * scale)
        budgets[str(name)] = program.total(target, name) if rng.integers(2) else between
        if rng.integers(8) == 0:
            budgets[str(name)] = float(totals.min()) - 0.01 * abs(float(totals.min())) - 1e-3
    return replace(program, budgets=budgets)


def every_total(program: Program, quantity: str) -> NDArray[np.float64]:
    """Totals of all plans, [K_1, K_2, ...]: brute force."""
    count = len(program.costs)
    totals = np.zeros([program.size(unit) for unit in range(count)]) + program.fixed.get(quantity, 0.0)
    for unit, costs in enumerate(program.costs):
        totals = totals + costs[quantity].reshape([-1 if axis == unit else 1 for axis in range(count)])
    for pair in program.pairs:
        if pair.quantity == quantity:
            matrix = pair.costs if pair.first < pair.second else pair.costs.T
            low, high = sorted((pair.first, pair.second))
            shape = [1] * count
            shape[low], shape[high] = matrix.shape
            totals = totals + matrix.reshape(shape)
    return totals


def every_objective(program: Program) -> NDArray[np.float64]:
    """Objectives of all plans, inf where a budget is broken."""
    objective = every_total(program, program.objective)
    for name in program.budgets:
        objective = np.where(every_total(program, name) <= program.limit(name), objective, np.inf)
    return objective


def compare(program: Program, solver: str) -> bool:
    """Solve, check and compare with brute force; whether there was a plan."""
    best = float(every_objective(program).min())
    if np.isinf(best):
        with pytest.raises(InfeasibleProgram, match=r"smallest .* that can be reached"):
            solve(program, solver=solver)
        return False
    answer = solve(program, solver=solver)
    check(program, answer)
    assert answer.status == "optimal"
    assert answer.objective == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert answer.bound <= best + 1e-9 * max(1.0, abs(best))
    return True
