"""Plans against brute force: sizes from real files, every plan of a small network counted through."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import InfeasibleBudget
from compress.intake.model import Intake
from compress.measure.latency_model import Boundary, LatencyModel
from compress.options import Search
from compress.records.allocation import Cost
from compress.search import allocator as module
from compress.search.allocator import Allocator, Draft
from compress.search.costs import Costs
from compress.search.prepare import Prepared
from compress.search.space import Way
from tests.every import every
from tests.search.conftest import CPU, made_up_errors, predicted_size, silent, space_of  # type: ignore[import-not-found]

TIMES = {"float": 30.0, "integer": 10.0, "narrow": 12.0}


def every_plan(allocator: Allocator) -> tuple[np.ndarray, np.ndarray]:
    """Predicted size and error of all plans."""
    costs, errors = allocator.costs, allocator.errors
    assert errors is not None
    sizes, sums = [], []
    for ways in itertools.product(*allocator.space.ways.values()):
        named = dict(zip(allocator.space.ways, ways, strict=True))
        sizes.append(predicted_size(costs, named))
        sums.append(sum(errors[layer][way] for layer, way in named.items()))
    return np.array(sizes), np.array(sums)


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(2))
def test_the_best_plan_of_all(allocator: Allocator, seed: int) -> None:
    allocator.errors = made_up_errors(allocator.space, seed)
    sizes, errors = every_plan(allocator)
    for share in (0.02, 0.4):
        limit = float(np.quantile(sizes, share))
        draft = allocator.find({"size": limit})
        assert draft.measured["size"] <= limit
        assert draft.predicted["size"] <= limit
        if not draft.notes:  # the first plan's file held what was predicted
            assert draft.predicted["error"] == pytest.approx(errors[sizes <= limit + 1e-6].min())
        assert draft.answer.status == "optimal"
        assert draft.answer.bound <= errors[sizes <= draft.limits["size"]].min() * (1 + 1e-9)
        smallest = float(sizes[errors <= draft.predicted["error"] * (1 + 1e-9)].min())
        other = allocator.find({"error": draft.predicted["error"]}, "size")
        assert other.predicted["size"] == pytest.approx(smallest)


@pytest.mark.slow
def test_a_width_is_paid_once(allocator: Allocator) -> None:
    sizes, _ = every_plan(allocator)
    best, answer = allocator._solve("size", {})
    assert answer.objective == pytest.approx(sizes.min())
    picks = [kept[pick] for kept, pick in zip(best.kept, answer.picks, strict=True)]
    chosen = [allocator.space.ways[layers[0]][pick] for layers, pick in zip(allocator.space.units, picks, strict=True)]
    used = {way.widths[0] for way in chosen if way.storage == "packed"}
    assert used
    assert best.paid == sum(allocator.costs.shared[width] for width in used)


@pytest.mark.slow
def test_grouped_layers_get_the_same_way(allocator: Allocator, intake: Intake) -> None:
    space = space_of(intake, weight_widths=(2, 3, 4, 8), grouped=True)
    grouped = Allocator(intake.traced, space, allocator.costs, CPU, Search(), silent)
    grouped.errors = allocator.errors
    sizes, _ = every_plan(allocator)
    for share in (0.1, 0.5):
        ways = grouped.find({"size": float(np.quantile(sizes, share))}).ways
        assert ways["left"] == ways["right"]


@pytest.mark.matrix
def test_out_of_reach_is_known_without_errors(allocator: Allocator) -> None:
    allocator.errors = None
    sizes, _ = every_plan_sizes(allocator)
    allocator.check_reachable({})
    allocator.check_reachable({"size": float(np.median(sizes))})
    with pytest.raises(InfeasibleBudget, match=r"size is limited to 1\.0 kB; the smallest") as caught:
        allocator.check_reachable({"size": 1000.0})
    smallest = allocator.smallest("size", {})
    assert smallest is not None
    assert f"{smallest / 1000:.1f} kB" in str(caught.value)
    # What is called reachable is.
    allocator.errors = made_up_errors(allocator.space, 0)
    assert allocator.find({"size": smallest * 1.002}).measured["size"] <= smallest * 1.002


def every_plan_sizes(allocator: Allocator) -> tuple[np.ndarray, np.ndarray]:
    allocator.errors = made_up_errors(allocator.space, 0)
    found = every_plan(allocator)
    allocator.errors = None
    return found


@pytest.mark.slow
def test_budgets_that_exclude_each_other(allocator: Allocator) -> None:
    least = allocator.smallest("bops", {})
    assert least is not None
    with pytest.raises(InfeasibleBudget) as caught:
        allocator.find({"size": 1e9, "bops": least / 2})
    assert "bops is limited to" in str(caught.value)


def test_the_plan_carries_its_certificate(prepared: Prepared) -> None:
    allocator = prepared.allocator
    sizes, _ = every_plan(allocator)
    draft = allocator.find({"size": float(np.median(sizes))})
    plan = allocator.plan(prepared.frame, draft, (), "kl", "error")
    assert plan.allocation is not None
    assert plan.allocation.status == "optimal"
    assert plan.allocation.value == pytest.approx(sum(each.error for each in plan.allocation.chosen))
    assert {choice.layer: choice.option for choice in plan.choices} == {
        layer: way.option for layer, way in draft.ways.items()
    }


class Clock:
    """Times files by what their ways say: the float file takes 150 us, a plan the model's sum times ``factor``."""

    def __init__(self, allocator: Allocator, factors: dict[int, float]) -> None:
        self.allocator, self.factors, self.asked = allocator, factors, 0
        self.exported: list[dict[str, Way]] = []

    def export(self, traced: Any, ways: dict[str, Way], target: Any, path: Path) -> Path:
        self.exported.append(dict(ways))
        path.touch()
        return path

    def time(self, files: list[Path], *_: object) -> list[float]:
        ways = next(each for each in reversed(self.exported) if each)
        model = self.allocator.costs.latency
        assert model is not None
        factor = self.factors.get(self.asked, 1.0)
        self.asked += 1
        return [150.0, factor * model.predict({layer: way.kind for layer, way in ways.items()})]


@pytest.fixture
def timed(intake: Intake, allocator: Allocator) -> Allocator:
    """Five layers of 30 us on floats and 10 on integers, 8 us between the two kinds of neighbours in a row."""
    space = space_of(intake, timed=True, weight_widths=(2, 8), floats=True)
    names = list(space.ways)
    different = {(a, b): 0.0 if a == b else 8.0 for a in ("float", "integer") for b in ("float", "integer")}
    boundaries = tuple(Boundary(a, b, different) for a, b in itertools.pairwise(names))
    latency = LatencyModel(0.0, dict.fromkeys(names, TIMES), boundaries)
    layers = {
        layer: {
            way: Cost(size_bytes=way.widths[0] * 100, macs=1, bops=way.widths[0], latency_us=TIMES[way.kind])
            for way in ways
        }
        for layer, ways in space.ways.items()
    }
    totals = {"size": 1e5, "bops": 160.0, "latency": 150.0}
    costs = Costs(totals, {"size": 0.0, "bops": 0.0, "latency": 0.0}, layers, {}, latency, ())
    made = Allocator(intake.traced, space, costs, CPU, Search(top=2), silent)
    made.errors = {
        layer: {
            way: 0.0
            if way.option is None
            else (index + 1) * 4.0 ** -way.widths[0] * (2 if way.kind == "integer" else 1)
            for way in ways
        }
        for index, (layer, ways) in enumerate(space.ways.items())
    }
    return made


def watched(allocator: Allocator, monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> Clock:
    clock = Clock(allocator, factors)
    monkeypatch.setattr(module, "export_ways", clock.export)
    monkeypatch.setattr(module, "time_files", clock.time)
    return clock


def test_latency_with_boundaries_against_brute_force(timed: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(timed, monkeypatch, {})
    model, errors = timed.costs.latency, timed.errors
    assert model is not None
    assert errors is not None
    names = list(timed.space.ways)
    totals = [
        (
            model.predict({name: way.kind for name, way in zip(names, ways, strict=True)}),
            sum(errors[name][way] for name, way in zip(names, ways, strict=True)),
        )
        for ways in itertools.product(*timed.space.ways.values())
    ]
    for limit in (55.0, 90.0, 120.0, 149.0):
        draft = timed.find({"latency": limit})
        assert draft.measured["latency"] <= limit
        best = min(error for latency, error in totals if latency <= limit * 0.98 + 1e-9)
        assert draft.predicted["error"] == pytest.approx(best, abs=1e-12)


def test_a_file_slower_than_predicted_is_planned_again(timed: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    # The best two plans come out slower, the next two as predicted.
    clock = watched(timed, monkeypatch, {0: 1.3, 1: 1.3})
    draft = timed.find({"latency": 110.0})
    assert clock.asked == 4
    assert draft.measured["latency"] <= 110.0
    assert draft.limits["latency"] < 0.98 * 110.0
    assert any("solved again with that much less" in note for note in draft.notes)


def test_the_best_of_several_that_hold_is_kept(timed: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    # The best by prediction misses the budget, the second keeps it: no new program is needed.
    clock = watched(timed, monkeypatch, {0: 1.5})
    draft = timed.find({"latency": 110.0})
    assert clock.asked == 2
    assert draft.notes == ()
    # The certificate is that of all plans, the one that missed included: this one is not the best of them.
    best = timed._solve("error", {"latency": 110.0 * 0.98})[1]
    assert draft.answer.bound == pytest.approx(best.bound)
    assert draft.predicted["error"] > draft.answer.bound
    assert draft.answer.gap > 0


def test_a_file_that_never_holds(timed: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(timed, monkeypatch, dict.fromkeys(range(100), 3.0))
    with pytest.raises(InfeasibleBudget, match=r"still misses a budget: latency|no plan fits: latency"):
        timed.find({"latency": 110.0})


def test_floats_where_nothing_is_limited(timed: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    watched(timed, monkeypatch, {})
    draft: Draft = timed.find({})
    assert every(way.option is None for way in draft.ways.values())
