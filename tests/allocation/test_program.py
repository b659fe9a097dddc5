from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from compress.allocation.program import TOLERANCE, Pair, Program


def unit(**costs: list[float]) -> dict[str, Any]:
    return {name: np.array(amounts, dtype=float) for name, amounts in costs.items()}


def two_units(**changes: Any) -> Program:
    parts: dict[str, Any] = {
        "costs": (unit(error=[3.0, 1.0], size=[1.0, 4.0]), unit(error=[5.0, 2.0, 0.5], size=[1.0, 2.0, 8.0])),
        "objective": "error",
        "budgets": {"size": 6.0},
        "fixed": {"size": 0.5},
        "pairs": (Pair(0, 1, "error", np.array([[0.0, -1.0, 0.0], [0.0, 7.0, 0.25]])),),
    }
    return Program(**(parts | changes))


def test_totals_add_units_pairs_and_the_fixed_part() -> None:
    program = two_units()
    assert program.total((0, 1), "error") == 3.0 + 2.0 - 1.0
    assert program.totals((1, 2)) == {"error": 1.0 + 0.5 + 0.25, "size": 4.0 + 8.0 + 0.5}


def test_several_pairs_of_the_same_units_add_up() -> None:
    program = two_units(pairs=(*two_units().pairs, Pair(1, 0, "error", np.full((3, 2), 10.0))))
    assert program.total((0, 1), "error") == 14.0


def test_total_is_exact_where_a_running_sum_is_not() -> None:
    amounts = [0.1] * 10
    program = Program(tuple(unit(error=[amount]) for amount in amounts), "error", {})
    assert program.total((0,) * 10, "error") == 1.0 != sum(amounts)


def test_feasible_up_to_the_tolerance() -> None:
    assert two_units().feasible((1, 0))
    assert not two_units().feasible((1, 1))
    assert two_units(budgets={"size": 6.5 * (1 - 0.5 * TOLERANCE)}).feasible((1, 1))
    assert not two_units(budgets={"size": 6.5 * (1 - 2 * TOLERANCE)}).feasible((1, 1))


def test_budgets_below_zero_have_a_tolerance_too() -> None:
    program = Program((unit(error=[-0.3]), unit(error=[0.2])), "error", {"error": -0.1})
    assert program.feasible((0, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"costs": ()}, "at least one unit"),
        ({"costs": (unit(error=[], size=[]),)}, "shapes"),
        ({"costs": (unit(error=[1.0], size=[1.0, 2.0]),)}, "shapes"),
        ({"costs": (unit(error=[1.0], size=[1.0]), unit(error=[1.0]))}, "unit 1 has costs in"),
        ({"costs": (unit(error=[math.nan], size=[1.0]),)}, "unit 0 has a cost that is not a finite number"),
        ({"objective": "speed"}, "'speed' has no costs"),
        ({"budgets": {"speed": 1.0}}, "'speed' has no costs"),
        ({"budgets": {"size": math.inf}}, "size: inf is not a finite number"),
        ({"fixed": {"error": math.nan}}, "error: nan is not a finite number"),
        ({"pairs": (Pair(0, 0, "error", np.zeros((2, 2))),)}, "two must differ"),
        ({"pairs": (Pair(0, 2, "error", np.zeros((2, 2))),)}, "units 0 and 2"),
        ({"pairs": (Pair(0, 1, "speed", np.zeros((2, 3))),)}, "a pair costs 'speed'"),
        ({"pairs": (Pair(1, 0, "error", np.zeros((2, 3))),)}, r"shape \(3, 2\)"),
        ({"pairs": (Pair(0, 1, "error", np.full((2, 3), np.inf)),)}, "finite numbers"),
    ],
)
def test_a_broken_program_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        two_units(**changes)


@pytest.mark.parametrize("picks", [(0,), (0, 3), (0, -1), (0, 0, 0)])
def test_picks_must_name_one_choice_a_unit(picks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one choice for each of the 2 units"):
        two_units().total(picks, "size")


def test_table_pads_units_with_fewer_choices() -> None:
    assert two_units().table("size", -1.0).tolist() == [[1.0, 4.0, -1.0], [1.0, 2.0, 8.0]]
