"""Times that add up: pure numbers, and the places that a traced net gives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.intake.model import take_in
from compress.measure.latency_model import LayerPlace, fit, layer_places
from compress.measure.latency_table import LatencyTable, Operator
from compress.measure.machine import describe_environment
from compress.measure.operators import Shape
from tests.every import every

Times = Mapping[str, tuple[float, float, float]]


def shape(name: str) -> Shape:
    """A shape of its own for each name."""
    return Shape("linear", (len(name), 1 + sum(map(ord, name))), (), True, None, (1, 1 + sum(map(ord, name))))


def place(name: str, feeder: str | None, readers: int, outputs: int = 10) -> LayerPlace:
    return LayerPlace(name, (shape(name),), feeder, readers, outputs)


CHAIN = {each.name: each for each in (place("a", None, 1, 30), place("b", "a", 1, 20), place("c", "b", 0, 50))}


def table(times: Mapping[str, Times]) -> LatencyTable:
    """``{layer: {compute: (layer, enter, leave)}}`` in microseconds."""
    rows = [
        Operator(signature=shape(name).signature, compute=compute, layer_us=a, enter_us=b, leave_us=c)
        for name, computes in times.items()
        for compute, (a, b, c) in computes.items()
    ]
    return LatencyTable(environment=describe_environment(), provider="CPU", threads=1, operators=tuple(rows))


def random_table(names: Mapping[str, LayerPlace]) -> LatencyTable:
    rng = np.random.default_rng(0)
    drawn = {name: {each: tuple(rng.uniform(1, 50, 3).tolist()) for each in ("float", "integer")} for name in names}
    return table(drawn)  # type: ignore[arg-type]


def all_of(kind: str, names: Mapping[str, LayerPlace] = CHAIN) -> dict[str, str]:
    return dict.fromkeys(names, kind)


@pytest.mark.parametrize("times", [(500.0, 300.0, 320.0), (300.0, 500.0, 450.0), (2000.0, 2000.0, 2000.0)])
def test_bases_come_out_exactly(times: tuple[float, float, float]) -> None:
    bases = [(all_of(kind), time) for kind, time in zip(("float", "integer", "narrow"), times, strict=True)]
    model = fit(CHAIN, random_table(CHAIN), bases)
    for base, time in bases:
        assert model.predict(base) == pytest.approx(time, rel=1e-12)


@pytest.mark.parametrize("times", [(500.0, 300.0, 350.0), (300.0, 500.0, 350.0)])
def test_bases_with_a_layer_that_is_always_float_come_out_exactly(times: tuple[float, float, float]) -> None:
    """Layers named by --ignore are float in every base."""
    for float_layer in CHAIN:
        bases = [
            ({**all_of(kind), float_layer: "float"}, time)
            for kind, time in zip(("float", "integer", "narrow"), times, strict=True)
        ]
        model = fit(CHAIN, random_table(CHAIN), bases)
        for base, time in bases:
            assert model.predict(base) == pytest.approx(time, rel=1e-12), float_layer


def test_a_base_with_integer_and_narrow_layers_comes_out_exactly() -> None:
    bases = [(all_of("float"), 500.0), (all_of("integer"), 300.0), ({**all_of("narrow"), "a": "integer"}, 280.0)]
    model = fit(CHAIN, random_table(CHAIN), bases)
    for base, time in bases:
        assert model.predict(base) == pytest.approx(time, rel=1e-12)


def test_a_float_base_alone() -> None:
    model = fit(CHAIN, random_table(CHAIN), [(all_of("float"), 123.0)])
    assert model.predict(all_of("float")) == pytest.approx(123.0)
    assert every(set(kinds) == {"float"} for kinds in model.layers_us.values())


NUMBERS = {
    "a": {"float": (10.0, 1.0, 2.0), "integer": (4.0, 3.0, 5.0)},
    "b": {"float": (20.0, 0.25, 0.5), "integer": (8.0, 7.0, 11.0)},
    "c": {"float": (30.0, 0.125, 6.0), "integer": (12.0, 13.0, 17.0)},
}


def test_boundaries_are_paid_where_computes_differ() -> None:
    # No rest: each base is exactly the sum of its layers, with the ends' entering and leaving.
    ends = {"float": 1.0 + 6.0, "integer": 3.0 + 17.0}
    sums = {"float": 60.0, "integer": 24.0}
    model = fit(CHAIN, table(NUMBERS), [(all_of(kind), sums[kind] + ends[kind]) for kind in ("float", "integer")])
    assert model.fixed_us == pytest.approx(0.0, abs=1e-9)
    wanted = {
        # layers, a's entering, c's leaving, then what stands between
        ("float", "integer", "float"): 10 + 8 + 30 + 1 + 6 + (2 + 7) + (11 + 0.125),
        ("integer", "float", "integer"): 4 + 20 + 12 + 3 + 17 + (5 + 0.25) + (0.5 + 13),
        ("float", "float", "integer"): 10 + 20 + 12 + 1 + 17 + (0.5 + 13),
        ("integer", "integer", "float"): 4 + 8 + 30 + 3 + 6 + (11 + 0.125),
    }
    for computes, total in wanted.items():
        assert model.predict(dict(zip("abc", computes, strict=True))) == pytest.approx(total), computes


def test_narrow_and_integer_are_no_boundary() -> None:
    sums = [(all_of("float"), 67.0), (all_of("integer"), 44.0), (all_of("narrow"), 44.0)]
    model = fit(CHAIN, table(NUMBERS), sums)
    for kinds in itertools.product(("integer", "narrow"), repeat=3):
        assert model.predict(dict(zip("abc", kinds, strict=True))) == pytest.approx(44.0)
    assert {(each.first, each.second) for each in model.boundaries} == {("a", "b"), ("b", "c")}


def test_what_one_kind_pays_more_is_spread_by_the_size_of_outputs() -> None:
    bases = [(all_of("float"), 67.0 + 5.0), (all_of("integer"), 44.0 + 25.0)]
    model = fit(CHAIN, table(NUMBERS), bases)
    assert model.fixed_us == pytest.approx(5.0)
    plain = {"a": 4.0 + 3.0, "b": 8.0, "c": 12.0 + 17.0}
    for name, outputs in (("a", 30), ("b", 20), ("c", 50)):
        assert model.layers_us[name]["integer"] == pytest.approx(plain[name] + 20.0 * outputs / 100)


def test_leaving_is_paid_once_by_all_readers() -> None:
    places = {
        "a": place("a", None, 2),
        "b": place("b", "a", 0),
        "c": place("c", "a", 0),
    }
    model = fit(places, table(NUMBERS), [(all_of("float", places), 1000.0), (all_of("integer", places), 1000.0)])
    costs = {(each.first, each.second): each.costs_us for each in model.boundaries}
    assert costs["a", "b"]["float", "integer"] == pytest.approx(2.0 / 2 + 7.0)
    assert costs["a", "c"]["float", "integer"] == pytest.approx(2.0 / 2 + 13.0)
    assert costs["a", "b"]["integer", "float"] == pytest.approx(5.0 / 2 + 0.25)
    assert costs["a", "b"]["float", "float"] == costs["a", "b"]["integer", "integer"] == 0.0


def test_an_operator_that_has_no_integer_form_costs_no_boundary() -> None:
    numbers = {name: dict(computes) for name, computes in NUMBERS.items()}
    del numbers["b"]["integer"]
    bases = [(all_of("float"), 100.0), ({**all_of("integer"), "b": "float"}, 90.0)]
    model = fit(CHAIN, table(numbers), bases)
    assert set(model.layers_us["b"]) == {"float"}
    assert model.predict(bases[0][0]) == pytest.approx(100.0)


def test_every_call_of_a_shared_layer_is_paid() -> None:
    twice = LayerPlace("a", (shape("a"), shape("b")), None, 0, 10)
    model = fit({"a": twice}, table(NUMBERS), [({"a": "float"}, 100.0)])
    # 10 and 20 for the layers, 1 to enter the first, 0.5 to leave the last; the rest is fixed.
    assert model.fixed_us == pytest.approx(100.0 - 31.5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 1, stride=2)
        self.fc = nn.Linear(16, 4)
        self.aux = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.right(torch.relu(self.left(x))) + x)
        x = torch.relu(self.down(x)).mean((2, 3))
        return torch.cat([self.fc(x), self.aux(torch.tanh(x))], 1)


@pytest.mark.slow
def test_places_in_a_residual_net() -> None:
    places = layer_places(take_in(Residual(), input_shape=(3, 8, 8)).traced, 5)
    assert list(places) == ["stem", "left", "right", "down", "fc", "aux"]
    # Behind the add, what runs last decides.
    feeders = {"stem": None, "left": "stem", "right": "left", "down": "right", "fc": "down", "aux": "down"}
    assert {name: each.feeder for name, each in places.items()} == feeders
    readers = {"stem": 1, "left": 1, "right": 1, "down": 2, "fc": 0, "aux": 0}
    assert {name: each.readers for name, each in places.items()} == readers
    outputs = {"stem": 8 * 64, "left": 8 * 64, "right": 8 * 64, "down": 16 * 16, "fc": 4, "aux": 2}
    assert {name: each.outputs for name, each in places.items()} == outputs
    assert {name: each.shapes[0].input for name, each in places.items()} == {
        "stem": (5, 3, 8, 8), "left": (5, 8, 8, 8), "right": (5, 8, 8, 8), "down": (5, 8, 8, 8),
        "fc": (5, 16), "aux": (5, 16),
    }  # fmt: skip


def test_a_shared_layer_has_a_shape_for_every_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(torch.relu(self.a(x)))))

    places = layer_places(take_in(Shared(), input_shape=(6,)).traced, 2)
    assert [each.activation for each in places["a"].shapes] == ["relu", None]
    assert places["a"].outputs == 12
    assert places["b"].feeder == "a"
