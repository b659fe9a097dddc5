from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compress.allocation.checker import CheckFailed, check
from compress.allocation.program import Answer, Pair, Program

PROGRAM = Program(
    (
        {"error": np.array([4.0, 1.0]), "size": np.array([1.0, 3.0])},
        {"error": np.array([4.0, 2.0]), "size": np.array([1.0, 2.0])},
    ),
    "error",
    {"size": 5.0},
    {"error": 1.0},
    (Pair(0, 1, "size", np.array([[0.0, 1.0], [1.0, 0.0]])),),
)
RIGHT = Answer((1, 1), 4.0, 4.0, 0.0, "optimal", "highs", 0.1)


def test_a_right_answer_passes() -> None:
    check(PROGRAM, RIGHT)
    check(PROGRAM, replace(RIGHT, bound=2.0, gap=0.5, status="feasible"))
    check(PROGRAM, replace(RIGHT, bound=3.96, gap=0.01), gap=0.01)


def test_an_answer_without_any_bound_passes_as_feasible() -> None:
    check(PROGRAM, replace(RIGHT, bound=-np.inf, gap=np.inf, status="feasible"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"picks": (1,)}, "picks for 1 units; the program has 2"),
        ({"picks": (1, 2)}, "unit 1: choice 2"),
        ({"picks": (1, -1)}, "unit 1: choice -1"),
        ({"objective": 3.9}, "error: the plan has 4.0, the answer says 3.9"),
        ({"objective": np.nan}, "error: the plan has 4.0"),
        ({"bound": 4.1, "gap": -0.025}, "error: the bound 4.1 is above"),
        ({"bound": np.nan}, "error: the bound nan"),
        ({"bound": 3.0, "gap": 0.1}, "error: bound and plan are 0.25 apart, the answer says 0.1"),
        ({"bound": 3.0, "gap": 0.25}, "error: called optimal with a gap of 0.25"),
    ],
)
def test_a_wrong_answer_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        check(PROGRAM, replace(RIGHT, **changes))


def test_a_failed_check_ends_the_command_with_1() -> None:
    assert CheckFailed.exit_code == 1


def test_a_broken_budget_is_named_pairs_included() -> None:
    with pytest.raises(CheckFailed, match=r"size: the plan needs 5\.0, the budget is 4\.9"):
        check(replace(PROGRAM, budgets={"size": 4.9}), RIGHT)
    with pytest.raises(CheckFailed, match=r"size: the plan needs 5\.0"):
        check(replace(PROGRAM, budgets={"size": 4.5}), replace(RIGHT, picks=(1, 0), objective=6.0, bound=6.0))
