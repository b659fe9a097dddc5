"""From measured ways to a plan: the integer program, its answer checked on a real file, and the plan that follows.

The program's prices are predictions. Every plan is therefore exported without calibration before it is accepted: its
size is read off the file, its latency timed against the float model's, and where a budget is not kept the program is
solved again with that budget tightened by as much as was missed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.allocation.checker import check
from compress.allocation.program import Answer, Pair, Picks, Program
from compress.allocation.solver import InfeasibleProgram, solve
from compress.errors import InfeasibleBudget, SolverError
from compress.graph.traced import TracedModel
from compress.measure.latency_model import COMPUTE_OF
from compress.options import Search
from compress.plans.budgets import format_value
from compress.plans.frame import with_times
from compress.plans.review import settings_digest
from compress.progress import Progress
from compress.quant.targets import Target
from compress.records.allocation import Allocation, Budget, Candidate
from compress.records.plan import Plan, Skip
from compress.search.costs import Costs, export_ways, time_files
from compress.search.space import Space, Way

__all__ = ["Allocator", "Draft"]

_ATTEMPTS = 8
_LEAST_SECONDS = 1.0  # for a solver that others have left no time
# Two sessions on one file differ by this much (compress/measure/bench.py): a plan is to hold in the next one too.
_LATENCY_RESERVE = 0.02
# Share of the file that the functions of all widths must be for a plan to be looked for without some of them.
_SHARED_MATTERS = 0.005
_KEPT_FLOAT = "the budgets leave it float"


@dataclass(frozen=True)
class Draft:
    """A plan's ways with what was predicted for them, and what their uncalibrated file measured.

    ``limits`` are the budgets that the program was given, some tighter than asked for.
    """

    ways: dict[str, Way]
    answer: Answer
    limits: dict[str, float]
    predicted: dict[str, float]
    measured: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Restricted:
    """A program over some of the ways: ``kept`` has their numbers, a list a unit; ``paid``: bytes for their widths."""

    program: Program
    kept: list[list[int]]
    paid: int


class Allocator:
    """Everything measured of one model; :meth:`find` answers any number of budgets.

    Args:
        traced: the folded float graph.
        costs: prices of all ways.

    Attributes:
        errors: by layer and way; set once they are measured. Until then only :meth:`check_reachable` can be asked.
    """

    def __init__(
        self, traced: TracedModel, space: Space, costs: Costs, target: Target, search: Search, progress: Progress
    ) -> None:
        self.traced, self.space, self.costs = traced, space, costs
        self.errors: Mapping[str, Mapping[Way, float]] | None = None
        self.target, self.search, self.progress = target, search, progress

    def limit(self, budget: Budget) -> float:
        """The budget in its quantity's own unit."""
        return budget.limit * self.costs.float_totals[budget.quantity] if budget.relative else budget.limit

    def programs(self, objective: str, budgets: Mapping[str, float]) -> list[Restricted]:
        """The integer program, once for each set of widths that packed weights may have.

        A file pays for every width in it, whatever the number of layers. Where that matters, each set of widths is a
        program of its own, with just those paid for; the best of their answers is the best of all. Where it does not,
        or size does not count, one program pays for all widths.
        """
        whole = self.program(objective, budgets)
        widths = sorted(self.costs.shared)
        total = sum(self.costs.shared.values())
        counts = "size" in budgets or objective == "size"
        most = budgets.get("size", self._least_size(whole))
        sets: list[tuple[int, ...]] = [tuple(widths)]
        if counts and total > _SHARED_MATTERS * most:
            sets = [each for size in range(len(widths) + 1) for each in itertools.combinations(widths, size)]
        found = []
        for allowed in sets:
            kept = [
                [
                    k
                    for k, way in enumerate(self.space.ways[layers[0]])
                    if way.storage != "packed" or way.widths[0] in allowed
                ]
                for layers in self.space.units
            ]
            if all(kept):
                paid = sum(self.costs.shared[width] for width in allowed)
                found.append(Restricted(_restricted(whole, kept, paid), kept, paid))
        return found

    def _least_size(self, program: Program) -> float:
        return program.fixed["size"] + sum(float(costs["size"].min()) for costs in program.costs)

    def program(self, objective: str, budgets: Mapping[str, float]) -> Program:
        """One unit a group of layers, one choice a way; widths of packed weights are not paid for."""
        places = {layer: unit for unit, layers in enumerate(self.space.units) for layer in layers}
        quantities = ["error", "size", "bops", *(["latency"] if self.costs.latency else [])]
        units = []
        for layers in self.space.units:
            ways = self.space.ways[layers[0]]
            units.append(
                {
                    name: np.array([sum(self._price(layer, way, name) for layer in layers) for way in ways])
                    for name in quantities
                }
            )
        pairs = []
        for boundary in self.costs.latency.boundaries if self.costs.latency else ():
            first, second = places.get(boundary.first), places.get(boundary.second)
            if first is not None and second is not None and first != second:
                matrix = self._boundary(boundary.first, boundary.second, boundary.costs_us)
                if matrix.any():
                    pairs.append(Pair(first, second, "latency", matrix))
        fixed = {name: self.costs.fixed.get(name, 0.0) for name in quantities}
        return Program(tuple(units), objective, dict(budgets), fixed, tuple(pairs))

    def find(self, budgets: Mapping[str, float], objective: str = "error") -> Draft:
        """The best plan whose file keeps ``budgets`` (in bytes, microseconds, bit operations, error).

        Raises:
            InfeasibleBudget: no plan does; the message has the smallest reachable value of each.
            SolverError: the solver gave nothing.
        """
        tightened = _with_reserve(budgets)
        bound: float | None = None
        notes: tuple[str, ...] = ()
        for attempt in itertools.count():
            try:
                best, answer = self._solve(objective, tightened)
            except InfeasibleProgram as error:
                raise InfeasibleBudget(self.explain(budgets)) from error
            answers = [answer]
            if self._timed(budgets, objective):
                answers += self._next_best(best, answer, self.search.top - 1)
            # What is proven is proven of the first program: later ones leave out its best plans, or have less room.
            bound = answer.bound if bound is None else min(bound, answer.bound)
            drafts = [self._draft(best, _with_bound(each, bound), notes) for each in answers]
            kept = [draft for draft in drafts if self._over(draft, budgets) == {}]
            if kept:
                return min(kept, key=lambda draft: draft.measured.get(objective, draft.predicted[objective]))
            if attempt + 1 == _ATTEMPTS:
                raise InfeasibleBudget(
                    f"after {_ATTEMPTS} plans the exported file still misses a budget: "
                    + "; ".join(
                        f"{name} {format_value(name, value)}, allowed {format_value(name, budgets[name])}"
                        for name, value in self._over(drafts[0], budgets).items()
                    )
                    + "; raise it a little"
                )
            for name, value in self._over(drafts[0], budgets).items():
                tightened[name] -= max(value - budgets[name], 0.0) + 1e-3 * budgets[name]
                missed = f"{format_value(name, value)} instead of {format_value(name, budgets[name])}"
                notes = (*notes, f"a plan's file came to {missed} {name}; solved again with that much less")
        raise AssertionError("the loop ends by returning or raising")

    def explain(self, budgets: Mapping[str, float]) -> str:
        """Why ``budgets`` cannot be kept, and the smallest value of each that can."""
        sentences = []
        for name, limit in budgets.items():
            others = {other: value for other, value in budgets.items() if other != name}
            alone = self.smallest(name, {})
            if name == "latency" and alone is not None:
                alone /= 1 - _LATENCY_RESERVE
            sentence = f"{name} is limited to {format_value(name, limit)}; the smallest that can be reached is "
            sentence += format_value(name, alone) if alone is not None else "not known"
            if name == "latency":
                sentence += f", with {_LATENCY_RESERVE:.0%} to spare for what timings differ by"
            if others and alone is not None and alone <= limit:
                within = self.smallest(name, _with_reserve(others))
                if within is not None:
                    sentence += f", and {format_value(name, within)} within the other budgets"
            sentences.append(sentence)
        return "no plan fits: " + "; ".join(sentences)

    def check_reachable(self, budgets: Mapping[str, float]) -> None:
        """Refuse budgets that nothing fits, before sensitivities are measured or anything is calibrated.

        Raises:
            InfeasibleBudget: with the smallest reachable values.
        """
        if not budgets:
            return
        try:
            # Any objective but the error, which may not be known yet.
            self._solve(next(iter(budgets)), _with_reserve(budgets))
        except InfeasibleProgram as error:
            raise InfeasibleBudget(self.explain(budgets)) from error

    def smallest(self, name: str, given: Mapping[str, float]) -> float | None:
        """Smallest value of one quantity within budgets, None if nothing fits them; of the size as a file has it."""
        try:
            best, answer = self._solve(name, given)
        except InfeasibleProgram:
            return None
        return self._draft(best, answer, ()).measured["size"] if name == "size" else answer.objective

    def _timed(self, budgets: Mapping[str, float], objective: str) -> bool:
        return self.costs.timed_here and ("latency" in budgets or objective == "latency")

    def _solve(self, objective: str, budgets: Mapping[str, float]) -> tuple[Restricted, Answer]:
        """The best plan over all sets of widths, and a bound that holds for all of them."""
        answers: list[tuple[Restricted, Answer]] = []
        bounds: list[float] = []
        failure: SolverError | None = None
        deadline = time.monotonic() + self.search.time_limit
        for each in self.programs(objective, budgets):
            try:
                answers.append((each, self._answer(each.program, deadline)))
                bounds.append(answers[-1][1].bound)
            except InfeasibleProgram:
                continue
            except SolverError as error:  # no answer for these widths; the others' still count
                failure = error
                bounds.append(_least(each.program))
        if not answers:
            raise failure or InfeasibleProgram("no plan is inside the budgets")
        best, answer = min(answers, key=lambda pair: pair[1].objective)
        proven = failure is None and all(each.status == "optimal" for _, each in answers)
        found = replace(
            answer,
            status="optimal" if proven else "feasible",
            seconds=sum(each.seconds for _, each in answers),
        )
        return best, _with_bound(found, min(bounds))

    def _answer(self, program: Program, deadline: float, excluded: Sequence[Picks] = ()) -> Answer:
        search = self.search
        left = max(deadline - time.monotonic(), _LEAST_SECONDS)
        answer = solve(program, solver=search.solver, gap=search.gap, time_limit=left, excluded=excluded)
        check(program, answer)
        return answer

    def _next_best(self, restricted: Restricted, first: Answer, count: int) -> list[Answer]:
        """The ``count`` plans that follow ``first``, by cutting off those found."""
        answers = [first]
        deadline = time.monotonic() + self.search.time_limit
        while len(answers) <= count:
            try:
                answers.append(self._answer(restricted.program, deadline, [answer.picks for answer in answers]))
            except (InfeasibleProgram, SolverError):
                break
        return answers[1:]

    def _draft(self, restricted: Restricted, answer: Answer, notes: tuple[str, ...]) -> Draft:
        program = restricted.program
        picks = [kept[pick] for kept, pick in zip(restricted.kept, answer.picks, strict=True)]
        picked = zip(self.space.units, picks, strict=True)
        chosen = {layer: self.space.ways[layer][pick] for layers, pick in picked for layer in layers}
        ways = {layer: chosen[layer] for layer in self.space.ways}
        with tempfile.TemporaryDirectory(prefix="compress-") as folder:
            self.progress("exporting a plan without calibration", 0, 1)
            file = export_ways(self.traced, ways, self.target, Path(folder) / "plan.onnx")
            measured = {"size": float(file.stat().st_size)}
            if self.costs.timed_here:
                plain = export_ways(self.traced, {}, self.target, Path(folder) / "float.onnx")
                float_us, plan_us = time_files(
                    [plain, file], self.target, self.search, self.traced.length, self.progress
                )
                # The machine may run at another speed than when the budget was set.
                measured["latency"] = plan_us / float_us * self.costs.float_totals["latency"]
        predicted = program.totals(answer.picks)
        used = {way.widths[0] for way in ways.values() if way.storage == "packed"}
        # One program for all widths pays for those it does not use, too.
        predicted["size"] += sum(self.costs.shared[each] for each in used) - restricted.paid
        return Draft(ways, answer, dict(program.budgets), predicted, measured, notes)

    @staticmethod
    def _over(draft: Draft, budgets: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in draft.measured.items() if name in budgets and value > budgets[name]}

    def _price(self, layer: str, way: Way, name: str) -> float:
        if name == "error":
            return self.errors[layer][way] if self.errors is not None else 0.0
        cost = self.costs.layers[layer][way]
        if name == "latency":
            assert cost.latency_us is not None, f"layer {layer} was not timed"
            return cost.latency_us
        return float(cost.size_bytes if name == "size" else cost.bops)

    def _boundary(self, first: str, second: str, costs_us: Mapping[tuple[str, str], float]) -> NDArray[np.float64]:
        computes = [[COMPUTE_OF[way.kind] for way in self.space.ways[layer]] for layer in (first, second)]
        return np.array([[costs_us[a, b] for b in computes[1]] for a in computes[0]])

    def plan(self, frame: Plan, draft: Draft, budgets: Sequence[Budget], measure: str, objective: str) -> Plan:
        """``draft`` as a plan that can be applied, with its certificate."""
        candidates = tuple(
            Candidate(
                layer=layer,
                method=way.method,
                option=way.option,
                format=way.format,
                split=way.split(layer),
                cost=self.costs.layers[layer][way],
                error=self._price(layer, way, "error"),
            )
            for layer, way in draft.ways.items()
        )
        splits = tuple(split for layer, way in draft.ways.items() if (split := way.split(layer)) is not None)
        kept = tuple(
            Skip(layer=part, reason=_KEPT_FLOAT)
            for layer, way in draft.ways.items()
            if way.option is None
            for part in way.names(layer)
        )
        answer = draft.answer
        allocation = Allocation(
            budgets=tuple(budgets),
            sensitivity=measure,
            objective=objective,
            value=answer.objective,
            bound=answer.bound,
            gap=answer.gap,
            status="optimal" if answer.status == "optimal" and answer.gap <= 1e-9 else "feasible",
            solver=answer.solver,
            seconds=round(answer.seconds, 3),
            predicted=draft.predicted,
            measured=draft.measured,
            float_totals=self.costs.float_totals,
            chosen=candidates,
            notes=(*self.costs.notes, *draft.notes),
            settings=settings_digest(frame),
            threads=self.search.threads,
            batch=self.search.batch,
            machine=self.costs.table.machine if self.costs.table is not None and self.costs.table.of_kit else None,
        )
        choices = tuple(choice for layer, way in draft.ways.items() for choice in way.choices(layer))
        plan = frame.model_copy(
            update={
                "choices": choices,
                "splits": splits,
                "skipped": (*self.space.skipped, *kept),
                "allocation": allocation,
            }
        )
        return plan if self.costs.table is None else with_times(plan, self.costs.table)


def _with_reserve(budgets: Mapping[str, float]) -> dict[str, float]:
    """Budgets as a plan has to be predicted to keep them."""
    return {name: value * (1 - _LATENCY_RESERVE if name == "latency" else 1) for name, value in budgets.items()}


def _with_bound(answer: Answer, bound: float) -> Answer:
    gap = (answer.objective - bound) / max(abs(answer.objective), 1e-300)
    return replace(answer, bound=bound, gap=gap)


def _least(program: Program) -> float:
    """A bound that needs no solver: every unit's and pair's smallest cost."""
    units = sum(float(costs[program.objective].min()) for costs in program.costs)
    pairs = sum(float(pair.costs.min()) for pair in program.pairs if pair.quantity == program.objective)
    return program.fixed.get(program.objective, 0.0) + units + pairs


def _restricted(program: Program, kept: Sequence[Sequence[int]], paid: int) -> Program:
    """``program`` with the choices in ``kept`` alone, and ``paid`` more bytes."""
    return replace(
        program,
        costs=tuple(
            {name: row[list(ks)] for name, row in costs.items()} for costs, ks in zip(program.costs, kept, strict=True)
        ),
        pairs=tuple(
            replace(pair, costs=pair.costs[np.ix_(kept[pair.first], kept[pair.second])]) for pair in program.pairs
        ),
        fixed={**program.fixed, "size": program.fixed["size"] + paid},
    )
