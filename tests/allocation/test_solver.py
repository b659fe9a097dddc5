from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pulp
import pytest

from compress.allocation.cbc import bound_in
from compress.allocation.checker import check
from compress.allocation.greedy import greedy
from compress.allocation.program import TOLERANCE, Pair, Picks, Program
from compress.allocation.pulp_model import Model, build
from compress.allocation.reduction import Reduced, affordable, undominated
from compress.allocation.relaxation import relax
from compress.allocation.solver import SOLVERS, InfeasibleProgram, smallest, solve
from compress.errors import InputError, SolverError
from tests.allocation.brute_force import compare, every_objective, random_program  # type: ignore[import-not-found]
from tests.every import every

EVERY_SOLVER = pytest.mark.parametrize("solver", list(SOLVERS))


@pytest.mark.parametrize("batch", range(8))
def test_highs_equals_brute_force(batch: int) -> None:
    solved = [compare(random_program(seed), "highs") for seed in range(batch * 25, batch * 25 + 25)]
    assert any(solved)


def test_brute_force_meets_infeasible_programs_and_every_size() -> None:
    programs = [random_program(seed) for seed in range(200)]
    infeasible = sum(bool(np.isinf(every_objective(program).min())) for program in programs)
    assert 10 <= infeasible <= 100
    assert {len(program.costs) for program in programs} == set(range(1, 9))
    assert {len(program.budgets) for program in programs} == {0, 1, 2}


def test_cbc_equals_brute_force() -> None:
    assert sum(compare(random_program(seed), "cbc") for seed in range(1000, 1040)) > 20


@pytest.mark.slow
def test_reduction_and_bound_are_exact() -> None:
    for seed in range(100):
        program = random_program(seed)
        best = float(every_objective(program).min())
        reduced = Reduced.whole(program)
        kept = affordable(reduced.program)
        if not all(len(choices) for choices in kept):
            assert np.isinf(best)
            continue
        reduced = reduced.keep(kept)
        reduced = reduced.keep(undominated(reduced.program))
        after = every_objective(reduced.program)
        assert float(after.min()) == pytest.approx(best, rel=1e-9, abs=1e-9) or np.isinf(best)
        relaxation = relax(reduced.program)
        slack = 1e-9 * max(1.0, abs(best))
        assert relaxation.bound <= best + slack
        # The bound with a choice forced is below every plan that has it.
        for unit, k in ((u, k) for u in range(len(program.costs)) for k in range(reduced.program.size(u))):
            forced = float(np.take(after, k, axis=unit).min())
            assert relaxation.raised[unit, k] <= forced + 1e-9 * max(1.0, abs(forced)) or np.isinf(forced)
        for picks in relaxation.candidates:
            assert program.feasible(reduced.outward(picks))
        picks = tuple(int(k) for k in np.unravel_index(int(after.argmin()), after.shape))
        for name in program.quantities:
            outward = program.total(reduced.outward(picks), name)
            assert outward == pytest.approx(reduced.program.total(picks, name), rel=1e-9, abs=1e-6)


def realistic(units: int, choices: int, seed: int, share: float, quantities: int = 1) -> Program:
    """Errors that fall by 4 with every bit, sizes that grow with the bits, latencies that nearly do."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, choices)
    costs = []
    for _ in range(units):
        error, size = rng.lognormal(0, 2) * 4.0**-bits, rng.lognormal(10, 1.5) * bits / 8
        latency = rng.lognormal(0, 1) * (0.3 + bits / 8) * rng.uniform(0.9, 1.1, choices)
        costs.append({"error": error, "size": size, "latency": latency})
    names = ("size", "latency")[:quantities]
    budgets = {q: float(sum(c[q].min() * (1 - share) + c[q].max() * share for c in costs)) for q in names}
    return Program(tuple(costs), "error", budgets)


def hard(units: int = 100, choices: int = 5, budgets: int = 5) -> Program:
    """Whole-number costs that nearly add up to the objective: no solver finishes this."""
    rng = np.random.default_rng(0)
    names = [f"cost {number}" for number in range(budgets)]
    costs = []
    for _ in range(units):
        drawn = {name: rng.integers(1, 1000, choices).astype(float) for name in names}
        noise = rng.integers(0, 5, choices)
        costs.append(drawn | {"error": 3000 - sum(drawn.values()) / budgets + noise})
    limits = {name: float(int(0.9 * sum(unit[name].mean() for unit in costs))) for name in names}
    return Program(tuple(costs), "error", limits)


def market_split(units: int = 40, seed: int = 0) -> Program:
    """Four subset sums to meet exactly: a plan exists; of 40 units neither greedy nor a solver finds it in time."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 100, (4, units)).astype(float)
    inside = rng.integers(0, 2, units).astype(float)
    costs, budgets = [], {}
    for unit in range(units):
        costs.append({"error": np.array([0.0, 1.0])})
        for row, weight in enumerate(weights[:, unit]):
            costs[-1] |= {f"in {row}": np.array([0.0, weight]), f"out {row}": np.array([weight, 0.0])}
    for row, weight in enumerate(weights):
        budgets |= {f"in {row}": float(weight @ inside), f"out {row}": float(weight @ (1 - inside))}
    return Program(tuple(costs), "error", budgets)


@pytest.mark.slow(cases=1)
@EVERY_SOLVER
def test_a_thousand_units_are_proven_to_a_millionth(solver: str) -> None:
    program = realistic(1000, 20, seed=0, share=0.3)
    answer = solve(program, solver=solver, gap=1e-6)
    check(program, answer)
    assert answer.gap <= 1e-6


@pytest.mark.slow
def test_a_larger_budget_is_never_worse() -> None:
    last = np.inf
    for share in np.linspace(0.0, 1.0, 12):
        answer = solve(realistic(30, 7, seed=1, share=float(share), quantities=2))
        assert answer.objective <= last
        last = answer.objective


@EVERY_SOLVER
def test_objectives_other_than_error(solver: str) -> None:
    program = replace(realistic(6, 4, seed=3, share=0.5), objective="size", budgets={"error": 0.3, "latency": 24.0})
    assert compare(program, solver)
    assert compare(replace(program, objective="latency", budgets={"error": 0.3}), solver)
    assert compare(replace(program, objective="error", budgets={"error": 0.3}), solver)


@pytest.mark.slow
@EVERY_SOLVER
def test_time_out_reports_what_is_proven(solver: str) -> None:
    program = hard()
    started = time.monotonic()
    answer = solve(program, solver=solver, time_limit=0.3)
    # Left alone it goes on for hours; a busy machine takes seconds to start a solver.
    assert time.monotonic() - started < 60.0
    check(program, answer)
    assert answer.status == "feasible"
    assert 0 < answer.gap < 0.01
    found = greedy(program)
    assert found is not None
    assert answer.objective <= program.total(found, "error")


@EVERY_SOLVER
def test_time_out_without_a_plan_says_what_to_do(solver: str) -> None:
    other = next(name for name in SOLVERS if name != solver)
    with pytest.raises(SolverError, match=rf"within 0\.2 s; raise --time-limit, try --solver {other}"):
        solve(market_split(), solver=solver, time_limit=0.2)


@EVERY_SOLVER
def test_the_gap_asked_for_is_enough(solver: str) -> None:
    program = hard()
    answer = solve(program, solver=solver, gap=5e-3, time_limit=20.0)
    check(program, answer)
    # What was asked for is reached; "optimal" is for what cannot be improved.
    assert answer.status == "feasible"
    assert 0 < answer.gap <= 5e-3
    assert answer.seconds < 15.0


@EVERY_SOLVER
@pytest.mark.parametrize("seed", [1, 23, 33, 41])
def test_excluding_what_was_found_gives_the_best_plans_in_order(solver: str, seed: int) -> None:
    program = random_program(seed)
    expected = np.sort(every_objective(program), axis=None)
    expected = expected[np.isfinite(expected)][:6]
    assert len(expected) > 1
    found: list[Picks] = []
    for objective in expected:
        answer = solve(program, solver=solver, excluded=found)
        check(program, answer)
        assert answer.picks not in found
        assert answer.objective == pytest.approx(objective, rel=1e-9, abs=1e-9)
        found.append(answer.picks)


def test_excluding_everything_is_infeasible() -> None:
    program = Program(({"error": np.array([1.0, 2.0])}, {"error": np.array([1.0])}), "error", {})
    with pytest.raises(InfeasibleProgram, match="left besides the 2 excluded"):
        solve(program, excluded=[(0, 0), (1, 0)])
    with pytest.raises(ValueError, match="one choice for each"):
        solve(program, excluded=[(0,)])


@pytest.mark.matrix
def test_the_second_best_of_a_large_program_is_found_fast() -> None:
    program = realistic(300, 20, seed=5, share=0.3)
    first = solve(program)
    second = solve(program, excluded=[first.picks])
    check(program, second)
    assert second.picks != first.picks
    assert second.objective >= first.objective
    assert second.seconds < 10.0


def test_infeasible_says_which_budget_and_the_smallest_reachable() -> None:
    program = realistic(5, 3, seed=0, share=0.5, quantities=2)
    least = smallest(program, "size")
    assert least == pytest.approx(sum(float(costs["size"].min()) for costs in program.costs))
    with pytest.raises(InfeasibleProgram, match=rf"smallest size that can be reached is {least:.6g}, the budget 10"):
        solve(replace(program, budgets={"size": 10.0, "latency": 1e9}))
    costs = tuple({"error": np.zeros(2), "size": np.array([0.0, 2.0]), "latency": np.array([2.0, 0.0])} for _ in "ab")
    both = Program(costs, "error", {"size": 2.0, "latency": 1.0})
    assert smallest(both, "latency", {"size": 2.0}) == 2.0
    with pytest.raises(InfeasibleProgram, match="size of at most 2, the smallest latency that can be reached is 2"):
        solve(both)
    assert InfeasibleProgram.exit_code == 3


@EVERY_SOLVER
def test_a_plan_over_the_budget_by_the_solvers_tolerance_is_cut_off(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[Picks] = []
    forbid = Model.forbid_excess
    monkeypatch.setattr(
        Model, "forbid_excess", lambda model, picks, name: cut.append(picks) or forbid(model, picks, name)
    )
    for seed in (13, 40, 44, 45, 73, 85):
        rng = np.random.default_rng(seed)
        costs = tuple(
            {"error": -np.sort(-rng.uniform(0, 9, 4)), "size": np.sort(rng.uniform(0, 9, 4))} for _ in range(8)
        )
        program = Program(costs, "error", {"size": sum(float(unit["size"].mean()) for unit in costs)})
        # Its best plan is now over by half of what the program tolerates, which is within what solvers do.
        size = program.total(solve(program).picks, "size")
        assert compare(replace(program, budgets={"size": size * (1 - 1.5 * TOLERANCE)}), solver)
    assert cut


def test_bytes_in_a_gigabyte_count() -> None:
    rng = np.random.default_rng(4)
    for room in (9.0, 16.0):
        costs = tuple(
            {"error": 1e-6 * rng.uniform(1, 9, 4), "size": 1e9 + rng.integers(0, 9, 4).astype(float)} for _ in range(7)
        )
        for solver in SOLVERS:
            assert compare(Program(costs, "error", {"size": 7e9 + room}), solver)


@pytest.mark.slow
def test_the_answer_does_not_depend_on_the_run() -> None:
    program = realistic(60, 8, seed=7, share=0.4, quantities=2)
    assert len({solve(program).picks for _ in range(3)}) == 1


@pytest.mark.slow
def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    program = realistic(60, 8, seed=7, share=0.4, quantities=2)
    assert {solve(program, solver=solver).solver for solver in SOLVERS} == set(SOLVERS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.matrix
@EVERY_SOLVER
def test_a_plan_that_greedy_does_not_find_is_found(solver: str) -> None:
    programs = [market_split(8, seed) for seed in range(20)]
    missed = [program for program in programs if greedy(program) is None]
    assert len(missed) > 5
    for program in missed:
        assert compare(program, solver)


def test_the_only_plan_left_is_weighed_too() -> None:
    # Every unit has one choice left once what cannot fit is gone, and the way to it is closed to greedy.
    costs = tuple(
        {"error": np.array([0.0, 1.0]), "in": np.array([0.0, weight]), "out": np.array([weight, 0.0])}
        for weight in (1.0, 2.0, 4.0)
    )
    for total in range(8):
        assert compare(Program(costs, "error", {"in": float(total), "out": 7.0 - total}), "highs")
        with pytest.raises(InfeasibleProgram):
            solve(Program(costs, "error", {"in": float(total), "out": 6.5 - total}))


def test_an_objective_that_cancels_to_nothing_is_not_taken_for_a_proof() -> None:
    # The best plan everywhere has a total of exactly 0: the bound may lie above it by rounding alone.
    costs = (
        {"error": np.array([1.0, 0.0, 1.0]), "latency": np.array([4.0, -1.0, 5.0])},
        {"error": np.array([-2.0, -1.0, 5.0, -2.0]), "latency": np.array([-2.0, 4.0, 5.0, 0.0])},
    )
    assert compare(Program(costs, "latency", {"error": -1.0}, {"latency": 3.0}), "highs")


def test_what_highs_returns_is_what_it_found() -> None:
    # Given (0, 2, 0, 0) to start from, HiGHS 1.16 returns it as optimal with the objective of (1, 2, 1, 0).
    costs = (
        {"error": [0.09, 0.0], "size": [178.88386367, 226.79779756], "latency": [4.04190825, 0.0]},
        {"error": [0.75, 2.5, 0.0], "size": [0.11685969, 0.21925, 0.0], "latency": [0.018, 0.015, 0.0]},
        {"error": [0.0, 0.0003], "size": [187.42096861, 138.42496937], "latency": [0.0, 4.85902495]},
        {"error": [0.0, 0.57, 2.7], "size": [0.0, 0.0005672, 0.0008374], "latency": [0.0, 1.24473, 1.03874]},
    )
    joint = [[0.00984149, 0.00167943, 0.00106921], [0.00027777, 0.00112362, 0.00036226], [0.00813, 0.0215, 0.0112]]
    program = Program(
        tuple({name: np.array(amounts) for name, amounts in unit.items()} for unit in costs),
        "size",
        {"error": 3.04409973, "latency": 5.5966},
        pairs=(Pair(1, 3, "size", np.array(joint)),),
    )
    assert compare(program, "highs")


def test_a_bound_between_whole_numbers_is_rounded_up() -> None:
    rng = np.random.default_rng(0)
    costs = tuple({name: rng.integers(0, 50, 20).astype(float) for name in ("error", "size")} for _ in range(300))
    half = 0.5 * sum(float(unit["size"].mean()) for unit in costs)
    program = Program(costs, "error", {"size": half})
    answer = solve(program)
    check(program, answer)
    assert answer.status == "optimal"
    assert answer.bound == answer.objective == round(answer.objective)
    # Nothing is rounded where a fixed part is no whole number, or could not tell one from the next.
    moved = replace(program, fixed={"error": 0.5})
    assert solve(moved).objective == answer.objective + 0.5


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(InputError, match="unknown solver 'gurobi'; known: highs, cbc"):
        solve(realistic(2, 2, seed=0, share=0.5), solver="gurobi")


@EVERY_SOLVER
@pytest.mark.parametrize("error", [pulp.PulpSolverError("killed"), OSError("no such file"), KeyError("kUnknown")])
def test_a_solver_that_dies(solver: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pulp.HiGHS if solver == "highs" else pulp.COIN_CMD, "actualSolve", die)
    other = next(name for name in SOLVERS if name != solver)
    with pytest.raises(SolverError, match=rf"solver {solver} died .*try --solver {other}"):
        solve(hard(), solver=solver)
    assert SolverError.exit_code == 2


def test_a_solver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", "/nowhere/cbc")
    with pytest.raises(SolverError, match="cbc is not there"):
        solve(hard(), solver="cbc")


def test_bounds_in_a_log_are_lowered_by_their_rounding() -> None:
    relaxed = "Continuous objective value is 23.6265 - 0.00 seconds\n"
    # A heuristic's search, of a part of the problem, says more than is proven for the whole.
    part = "Cbc0005I Partial search - best objective 25 (best possible 24.5), took 3 iterations\n"
    search = "Cbc0005I Partial search - best objective 1e+50 (best possible 23.626527), took 0 iterations\n"
    assert bound_in("") == -np.inf
    assert bound_in(relaxed) == pytest.approx(23.6264)
    assert bound_in(relaxed + part + "\nLower bound:                    23.627\n") == pytest.approx(23.6264)
    assert bound_in(relaxed + part + search + "\nLower bound:       23.627\n") == pytest.approx(23.626526, abs=1e-9)
    assert bound_in("Lower bound:      -1.5e-05\n") == pytest.approx(-1.6e-5)


def test_every_pair_of_two_formats_needs_four_joint_columns() -> None:
    format_of = np.arange(10) % 2
    switch = (format_of[:, None] != format_of[None, :]).astype(float)
    costs = tuple({"error": np.arange(10.0), "latency": np.arange(10.0)} for _ in range(2))
    pairs = (Pair(0, 1, "latency", switch), Pair(1, 0, "error", 2 * switch))
    model = build(Program(costs, "error", {"latency": 5.0}, pairs=pairs))
    assert [len(joint.cells) for joint in model.joints] == [4]
    equations = [row for row in model.problem.constraints() if row.sense == 0]
    assert len(equations) == 6
    joint = model.joints[0]
    for picks in itertools.product(range(10), repeat=2):
        for columns, pick in zip(model.binaries, picks, strict=True):
            for k, column in enumerate(columns):
                column.setInitialValue(float(k == pick))
        # The one cell that the two picks leave, and no other, keeps every equation.
        for cell in joint.cells:
            for key, column in joint.cells.items():
                column.setInitialValue(float(key == cell))
            right = cell == (joint.rows[picks[0]], joint.columns[picks[1]])
            assert every(abs(row.value()) < 1e-9 for row in equations) is right
