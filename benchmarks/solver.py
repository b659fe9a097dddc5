"""Time and proof of the integer program on synthetic models of 1,000 units with 20 choices each.

``python -m benchmarks.solver`` writes ``benchmarks/results/solver.json`` and a table of the same name in Markdown.

- ``one_budget``: whole time and proven gap by kind, share and solver. ``uniform``: error and size drawn apart;
  ``realistic``: error ``s 4^-bits`` and size ``params bits / 8`` with lognormal ``s`` and ``params``; ``ties``: whole
  numbers below 50. The budget lies at ``share`` between the smallest size and that of the smallest error.
- ``two_budgets``: size and a latency that nearly follows it, 20 seconds each.
- ``greedy``: excess of greedy's error over the optimum (``stopping``: ended at the first overflow) over 20 budgets.

Every answer is added up again by :mod:`compress.allocation.checker`.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.allocation.checker import check
from compress.allocation.greedy import greedy
from compress.allocation.program import Answer, Program
from compress.allocation.solver import SOLVERS, solve
from compress.measure.machine import describe_environment

RESULTS = Path(__file__).parent / "results"
UNITS, CHOICES = 1000, 20
SEEDS = range(5)
SHARES = (0.1, 0.3, 0.5)
TIME_LIMIT = 20.0
FRONT = 20
KINDS = ("uniform", "realistic", "ties")

Costs = tuple[dict[str, NDArray[np.float64]], ...]


def main() -> None:
    """Run from the command line."""
    result = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "solver.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "solver.md").write_text(table(result))
    print(table(result))


def measure() -> dict[str, Any]:
    """All rows."""
    # A first solve loads the solvers.
    for solver in SOLVERS:
        solve(within(draw("uniform", 0, units=10), 0.3), solver=solver)
    load = os.getloadavg()[0]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.solver", *sys.argv[1:]]),
        "units": UNITS,
        "choices": CHOICES,
        "time_limit": TIME_LIMIT,
        "environment": describe_environment().model_dump(),
        "load_before": load,
        "one_budget": list(noted(one_budget())),
        "two_budgets": list(noted(two_budgets())),
        "greedy": list(noted(fronts())),
        "load_after": os.getloadavg()[0],
    }


def draw(kind: str, seed: int, units: int = UNITS) -> Costs:
    """Costs in error, size and latency."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(1.5, 11.0, CHOICES)
    costs = []
    for _ in range(units):
        if kind == "uniform":
            error, size = rng.uniform(size=(2, CHOICES))
        elif kind == "ties":
            error, size = rng.integers(0, 50, (2, CHOICES)).astype(float)
        else:
            error, size = rng.lognormal(0, 2) * 4.0**-bits, np.round(rng.lognormal(9, 1.5)) * bits / 8
        costs.append({"error": error, "size": size, "latency": size * rng.uniform(0.7, 1.3, CHOICES)})
    return tuple(costs)


def within(costs: Costs, share: float, quantities: tuple[str, ...] = ("size",)) -> Program:
    """The program with every budget at ``share`` between the smallest total and that of the smallest error."""
    budgets = {}
    for name in quantities:
        least = sum(float(unit[name].min()) for unit in costs)
        most = sum(float(unit[name][unit["error"].argmin()]) for unit in costs)
        budgets[name] = least + share * (most - least)
    return Program(costs, "error", budgets)


def settle(program: Program, solver: str) -> Answer:
    """The checked answer."""
    answer = solve(program, solver=solver, time_limit=TIME_LIMIT)
    check(program, answer)
    return answer


def one_budget() -> Iterator[dict[str, Any]]:
    """Every kind, share and seed with every solver."""
    for kind in KINDS:
        for solver in SOLVERS:
            for share in SHARES:
                answers = [settle(within(draw(kind, seed), share), solver) for seed in SEEDS]
                yield {"kind": kind, "solver": solver, "share": share, **summary(answers)}


def two_budgets() -> Iterator[dict[str, Any]]:
    """Size and latency together."""
    for kind in KINDS:
        for solver in SOLVERS:
            for seed in SEEDS[:2]:
                answer = settle(within(draw(kind, seed), 0.3, ("size", "latency")), solver)
                yield {
                    "kind": kind,
                    "solver": solver,
                    "seed": seed,
                    "seconds": answer.seconds,
                    "objective": answer.objective,
                    "bound": answer.bound,
                    "gap": answer.gap,
                    "status": answer.status,
                }


def fronts() -> Iterator[dict[str, Any]]:
    """Greedy beside the optimum, from nearly the smallest size to nearly all."""
    for kind in KINDS:
        for seed in SEEDS[:2]:
            excess: dict[str, list[float]] = {"greedy": [], "stopping": []}
            gaps = []
            for share in np.linspace(0.02, 0.95, FRONT).tolist():
                program = within(draw(kind, seed), share)
                answer = settle(program, "highs")
                gaps.append(answer.gap)
                for name, amounts in excess.items():
                    picks = greedy(program, first_overflow=name == "stopping")
                    assert picks is not None
                    assert program.feasible(picks)
                    # Both sums are exact, so no tolerance: below the bound would be a mistake in the proof.
                    amounts.append(program.total(picks, "error") / answer.objective - 1)
                    assert program.total(picks, "error") >= answer.bound, f"greedy is below the bound at {share}"
            row = {"kind": kind, "seed": seed, "budgets": FRONT, "largest_gap": max(gaps)}
            for name, amounts in excess.items():
                row |= {f"{name}_least": min(amounts), f"{name}_mean": statistics.mean(amounts)}
                row |= {f"{name}_largest": max(amounts)}
            yield row


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Seconds and gaps over seeds."""
    seconds = [answer.seconds for answer in answers]
    return {
        "seeds": len(answers),
        "seconds_median": statistics.median(seconds),
        "seconds_largest": max(seconds),
        "gap_largest": max(answer.gap for answer in answers),
        "optimal": sum(answer.status == "optimal" for answer in answers),
    }


def noted(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print rows as they come."""
    for row in rows:
        print(row, flush=True)
        yield row


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    environment = result["environment"]
    highs = [row for row in result["one_budget"] if row["solver"] == "highs"]
    slowest = max(row["seconds_largest"] for row in highs)
    gap = max(row["gap_largest"] for row in highs)
    lines = [
        f"# Allocation of {result['units']} units with {result['choices']} choices",
        "",
        f"`{result['command']}`: {environment['cpu']}, {environment['usable_cpus']} processors, load "
        f"{result['load_before']:.1f} before and {result['load_after']:.1f} after, numpy {environment['numpy']}. "
        "Seconds are the whole search.",
        "",
        f"One budget, HiGHS, all kinds: at most {slowest:.2f} s, gap at most {gap:.1e}; to reach: 3 s, 1e-6.",
        "",
    ]
    for part in ("one_budget", "two_budgets", "greedy"):
        columns = list(result[part][0])
        lines += [f"## {part.replace('_', ' ')}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(text(row[column]) for column in columns)} |" for row in result[part]]
        lines.append("")
    return "\n".join(lines)


def text(value: object) -> str:
    """A cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
