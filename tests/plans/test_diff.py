"""Two plans side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from compress.plans.diff import diff_plans
from compress.records.allocation import Allocation, Candidate, Cost
from compress.records.layers import QuantOption, Split
from compress.records.plan import Choice, Plan, Skip


def choice(layer: str, bits: int, act_bits: int | None = 8, method: str = "mse") -> Choice:
    name = "integer" if act_bits is not None else "float-weights"
    option = QuantOption(bits=bits, act_bits=act_bits, symmetric=act_bits is not None)
    return Choice(layer=layer, method=method, option=option, format=name)


def plan(choices: Sequence[Choice], skipped: Sequence[str] = (), **changes: Any) -> Plan:
    frame: dict[str, Any] = {
        "choices": tuple(choices),
        "skipped": tuple(Skip(layer=name, reason="asked for") for name in skipped),
        "target": "onnx-cpu",
        "observer": "mse",
        "iterations": 10,
        "model_fingerprint": "m",
    }
    return Plan(**(frame | changes))


def allocated(choices: Sequence[Choice], prices: Mapping[str, tuple[int, float]], **totals: float) -> Plan:
    """Prices are bytes and error by layer; a layer without a choice stays float."""
    options = {each.layer: each for each in choices}
    chosen = [
        Candidate(
            layer=name,
            method=options[name].method if name in options else None,
            option=options[name].option if name in options else None,
            format=options[name].format if name in options else "float",
            cost=Cost(size_bytes=size, macs=1, bops=1),
            error=error,
        )
        for name, (size, error) in prices.items()
    ]
    found = Allocation(
        budgets=(), sensitivity="kl", objective="error", value=1.0, bound=1.0, gap=0.0, status="optimal",
        solver="highs", seconds=0.0, predicted=totals, chosen=tuple(chosen),
    )  # fmt: skip
    return plan(choices, [name for name in prices if name not in options], allocation=found)


def test_equal_plans() -> None:
    choices = [choice("a", 3), choice("b", 8)]
    found = diff_plans(plan(choices, ["c"]), plan(choices, ["c"]))
    assert [(row.layer, row.first, row.second, row.changed) for row in found.layers] == [
        ("a", "W3A8 mse", "W3A8 mse", False),
        ("b", "W8A8 mse", "W8A8 mse", False),
        ("c", "float", "float", False),
    ]
    assert found.settings == {}
    assert found.first_totals == found.second_totals == {}


def test_every_kind_of_difference() -> None:
    first = plan([choice("width", 3), choice("input", 4), choice("method", 4), choice("same", 4)], ["quantized"])
    second = plan(
        [
            choice("width", 5),
            choice("input", 4, 4),
            choice("method", 4, method="minmax"),
            choice("same", 4),
            choice("quantized", 4, None),
            choice("new", 2),
        ]
    )
    rows = {row.layer: (row.first, row.second, row.changed) for row in diff_plans(first, second).layers}
    assert rows == {
        "width": ("W3A8 mse", "W5A8 mse", True),
        "input": ("W4A8 mse", "W4A4 mse", True),
        "method": ("W4A8 mse", "W4A8 minmax", True),
        "same": ("W4A8 mse", "W4A8 mse", False),
        "quantized": ("float", "W4 mse on floats", True),
        "new": ("not in the plan", "W2A8 mse", True),
    }


def test_the_other_way_round() -> None:
    first, second = plan([choice("a", 3), choice("b", 4)]), plan([choice("b", 4)], ["c"], seed=1)
    forward, backward = diff_plans(first, second), diff_plans(second, first)
    assert {row.layer: (row.first, row.second) for row in forward.layers} == {
        row.layer: (row.second, row.first) for row in backward.layers
    }
    assert forward.settings == {"seed": ("0", "1")}
    assert backward.settings == {"seed": ("1", "0")}


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "onnx-arm"},
        {"observer": "minmax"},
        {"iterations": 20},
        {"samples": 7},
        {"model_fingerprint": "other"},
        {"data_fingerprint": "data"},
    ],
)
def test_settings_that_differ(changes: dict[str, Any]) -> None:
    found = diff_plans(plan([choice("a", 3)]), plan([choice("a", 3)], **changes))
    ((name, value),) = changes.items()
    assert list(found.settings) == [name]
    assert found.settings[name][1] == str(value)
    assert not any(row.changed for row in found.layers)


def test_steps_that_differ() -> None:
    found = diff_plans(plan([choice("a", 3)]), plan([choice("a", 3)], steps={"equalize": True}))
    assert list(found.settings) == ["steps"]
    assert "equalize=True" in found.settings["steps"][1]


def test_predictions_of_both() -> None:
    first = allocated([choice("a", 3), choice("b", 4)], {"a": (30, 0.5), "b": (40, 0.25)}, size=170.0, error=0.75)
    second = allocated([choice("a", 5)], {"a": (50, 0.1), "b": (320, 0.0)}, size=470.0, error=0.1)
    found = diff_plans(first, second)
    assert [(row.first_bytes, row.second_bytes, row.first_error, row.second_error) for row in found.layers] == [
        (30, 50, 0.5, 0.1),
        (40, 320, 0.25, 0.0),
    ]
    assert found.first_totals == {"size": 170.0, "error": 0.75}
    assert found.second_totals == {"size": 470.0, "error": 0.1}


def test_a_uniform_plan_beside_an_allocated_one() -> None:
    first = allocated([choice("a", 3)], {"a": (30, 0.5)}, size=100.0)
    found = diff_plans(first, plan([choice("a", 4)]))
    assert found.second_totals == {}
    (row,) = found.layers
    assert (row.first_bytes, row.second_bytes, row.second_error) == (30, None, None)


def test_thin_layers_stand_for_the_one_they_do_the_work_of() -> None:
    whole = plan([choice("a", 4), choice("b", 8)])
    parts = [choice("a.down", 8), choice("a.up", 8), choice("b.down", 8), choice("b", 4), choice("b.up", 8)]
    cut = plan(parts, splits=(Split(layer="a", rank=3), Split(layer="b", rank=2, form="branch")))
    found = diff_plans(whole, cut)
    assert [(row.layer, row.first, row.second) for row in found.layers] == [
        ("a", "W4A8 mse", "W8A8 mse, rank 3"),
        ("b", "W8A8 mse", "W4A8 mse, + rank 2"),
    ]
