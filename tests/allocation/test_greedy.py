from __future__ import annotations

import time

import numpy as np
import pytest

from compress.allocation.greedy import greedy, neighbour
from compress.allocation.program import Pair, Program
from compress.allocation.solver import solve


def program(*units: tuple[list[float], list[float]], size: float, pairs: tuple[Pair, ...] = ()) -> Program:
    """Units as (errors, sizes)."""
    costs = tuple({"error": np.array(errors), "size": np.array(sizes)} for errors, sizes in units)
    return Program(costs, "error", {"size": size}, pairs=pairs)


def test_takes_the_best_gain_per_use_until_nothing_fits() -> None:
    three = program(([9.0, 0.0], [0.0, 3.0]), ([8.0, 0.0], [0.0, 2.0]), ([1.0, 0.0], [0.0, 1.0]), size=5.0)
    assert greedy(three) == (1, 1, 0)


def test_goes_on_after_an_upgrade_that_does_not_fit_unless_told_to_stop() -> None:
    # Ratios 10, 3 and 1: the second upgrade needs 5 of the 3 left.
    three = program(([20.0, 0.0], [0.0, 2.0]), ([15.0, 0.0], [0.0, 5.0]), ([2.0, 0.0], [0.0, 2.0]), size=5.0)
    assert greedy(three) == (1, 0, 1)
    assert greedy(three, first_overflow=True) == (1, 0, 0)


def test_falls_back_to_a_smaller_upgrade_of_the_same_unit() -> None:
    one = program(([10.0, 6.0, 0.0], [0.0, 1.0, 2.0]), size=1.0)
    assert greedy(one) == (1,)


def test_is_not_optimal_and_by_how_much() -> None:
    # The classic trap: the best ratio (3 for 2 of 4) leaves room that no other upgrade fits.
    trap = program(([3.0, 0.0], [0.0, 2.0]), ([5.0, 0.0], [0.0, 4.0]), size=4.0)
    found, best = greedy(trap), solve(trap)
    assert found == (1, 0)
    assert trap.total(found, "error") == 5.0
    assert best.picks == (0, 1)
    assert best.objective == 3.0


def test_pairs_count() -> None:
    # Upgrading one unit alone costs a conversion of 3: both together fit, and alone neither gains.
    boundary = Pair(0, 1, "error", np.array([[0.0, 3.0], [3.0, 0.0]]))
    units = ([2.0, 0.0], [0.0, 1.0]), ([2.0, 0.0], [0.0, 1.0])
    assert greedy(program(*units, size=2.0, pairs=(boundary,))) == (0, 0)
    assert greedy(program(*units, size=2.0)) == (1, 1)
    bonus = Pair(0, 1, "error", np.array([[0.0, -5.0], [0.0, 0.0]]))
    assert greedy(program(*units, size=1.0, pairs=(bonus,))) == (0, 1)


def test_repairs_a_start_that_pairs_push_over_the_budget() -> None:
    conversion = Pair(0, 1, "size", np.array([[10.0, 0.0], [0.0, 10.0]]))
    found = greedy(program(([2.0, 1.0], [0.0, 1.0]), ([2.0, 1.0], [0.0, 1.0]), size=3.0, pairs=(conversion,)))
    assert found in {(0, 1), (1, 0)}


def test_two_budgets_bind_together() -> None:
    costs = tuple(
        {"error": np.array([5.0, 0.0]), "size": np.array(size), "latency": np.array(latency)}
        for size, latency in (([0.0, 1.0], [0.0, 3.0]), ([0.0, 3.0], [0.0, 1.0]), ([0.0, 1.0], [0.0, 1.0]))
    )
    assert greedy(Program(costs, "error", {"size": 4.0, "latency": 2.0})) == (0, 1, 1)


def test_finds_nothing_where_nothing_fits() -> None:
    assert greedy(program(([1.0, 0.0], [2.0, 3.0]), size=1.0)) is None


def test_starts_from_given_picks() -> None:
    two = program(([3.0, 0.0], [0.0, 2.0]), ([5.0, 0.0], [0.0, 4.0]), size=4.0)
    assert greedy(two, start=(0, 1)) == (0, 1)


def test_without_budgets_the_smallest_objective() -> None:
    costs = ({"error": np.array([3.0, 1.0, 2.0])}, {"error": np.array([-1.0, 4.0])})
    assert greedy(Program(costs, "error", {})) == (1, 0)


def test_neighbour_is_the_best_single_change_not_excluded() -> None:
    two = program(([3.0, 0.0], [0.0, 2.0]), ([5.0, 0.0], [0.0, 4.0]), size=4.0)
    assert neighbour(two, (0, 0), set()) == (0, 1)
    assert neighbour(two, (0, 0), {(0, 1)}) == (1, 0)
    assert neighbour(two, (0, 0), {(0, 1), (1, 0), (0, 0)}) is None


@pytest.mark.matrix
def test_what_comes_back_is_inside_the_budgets_and_never_beats_the_solver() -> None:
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(60):
        costs = tuple(
            {name: rng.normal(2, 2, size) for name in ("error", "size", "latency")} for size in rng.integers(1, 6, 12)
        )
        conversion = Pair(0, 1, "size", rng.normal(0, 1, (len(costs[0]["size"]), len(costs[1]["size"]))))
        whole = Program(
            costs, "error", {"size": rng.uniform(5, 25), "latency": rng.uniform(5, 25)}, pairs=(conversion,)
        )
        for first_overflow in (False, True):
            picks = greedy(whole, first_overflow=first_overflow)
            if picks is not None:
                assert whole.feasible(picks)
                assert solve(whole).objective <= whole.total(picks, "error") + 1e-9
                compared += 1
    assert compared > 40


def test_ends_where_moves_change_nothing_but_the_rounding() -> None:
    # Subset sums that cannot all be met: swapping back and forth keeps the excess, in floats it seems to fall.
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 100, (4, 40)).astype(float)
    costs, budgets = [], {}
    for unit in range(40):
        sums = {f"in {row}": np.array([0.0, weight]) for row, weight in enumerate(weights[:, unit])}
        rest = {f"out {row}": np.array([weight, 0.0]) for row, weight in enumerate(weights[:, unit])}
        costs.append({"error": np.array([0.0, 1.0])} | sums | rest)
    inside = rng.integers(0, 2, 40).astype(float)
    for row, weight in enumerate(weights):
        budgets |= {f"in {row}": float(weight @ inside), f"out {row}": float(weight @ (1 - inside))}
    assert greedy(Program(tuple(costs), "error", budgets)) is None


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("budgets", [1, 2])
def test_a_thousand_units_are_no_matter_of_minutes(budgets: int) -> None:
    rng = np.random.default_rng(0)
    bits = np.linspace(2, 8, 20)
    costs = []
    for _ in range(1000):
        size = rng.lognormal(10, 1.5) * bits
        costs.append({"error": rng.lognormal(0, 2) * 4.0**-bits, "size": size, "latency": size * rng.uniform(1, 2, 20)})
    limits = {q: sum(0.6 * c[q].min() + 0.4 * c[q].max() for c in costs) for q in ("size", "latency")[:budgets]}
    large = Program(tuple(costs), "error", limits)
    started = time.process_time()
    picks = greedy(large)
    # About 0.4 s; doing it anew for every unit takes hundreds of times as long, on any processor.
    assert time.process_time() - started < 20.0
    assert picks is not None
    assert large.feasible(picks)
