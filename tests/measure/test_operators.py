"""Operators timed by a real ONNX Runtime: every shape has its rows, and equal shapes are one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compress.graph.layers import layer_calls
from compress.intake.model import take_in
from compress.kernels.table import register_operators
from compress.measure import operators
from compress.measure.operators import Shape, shape_of, time_operators
from compress.quant.targets import find_target
from tests.every import every

register_operators()

CPU = find_target("onnx-cpu")
# Few: nothing here depends on how exact the times are.
ROUNDS = 5


class Everything(nn.Module):
    """conv2d with strides and groups, conv1d, linears on vectors and on sequences, two of them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 16, 3, padding=1)
        self.strided = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, (1, 3), padding=(0, 1), groups=4)
        self.dilated = nn.Conv2d(24, 16, 3, padding=2, dilation=2)
        self.signal = nn.Conv1d(16, 16, 3, stride=2, groups=2)
        self.rows = nn.Linear(7, 9)
        self.fc, self.same, self.other = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.strided(torch.nn.functional.relu6(self.plain(x))))
        x = self.dilated(torch.relu(self.grouped(self.depthwise(x)))).flatten(2)
        x = self.rows(self.signal(x)).mean(1)
        return self.other(torch.relu(self.same(torch.relu(self.fc(x)))))


@pytest.fixture(scope="module")
def shapes() -> dict[str, Shape]:
    traced = take_in(Everything(), input_shape=(3, 8, 8)).traced
    return {name: shape_of(nodes[0], 2) for name, nodes in layer_calls(traced).items()}


def silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.mark.slow
def test_shapes_say_what_time_depends_on(shapes: dict[str, Shape]) -> None:
    plain, strided, signal = shapes["plain"], shapes["strided"], shapes["signal"]
    assert (plain.kind, plain.weight, plain.input) == ("conv2d", (16, 3, 3, 3), (2, 3, 8, 8))
    assert (plain.bias, plain.activation) == (True, "relu6")
    assert (strided.bias, strided.activation, strided.rest[0]) == (False, "relu", (2, 2))
    assert (signal.kind, signal.weight, signal.input) == ("conv1d", (16, 8, 3), (2, 16, 16))
    assert (shapes["rows"].kind, shapes["rows"].input) == ("linear", (2, 16, 7))
    assert shapes["fc"].input == (2, 9)


@pytest.mark.slow
def test_equal_shapes_share_a_signature_and_others_do_not(shapes: dict[str, Shape]) -> None:
    assert shapes["fc"].signature == shapes["same"].signature
    # The activation behind it is fused, and part of its time.
    assert shapes["other"].signature != shapes["same"].signature
    signatures = [each.signature for name, each in shapes.items() if name != "same"]
    assert len(set(signatures)) == len(signatures)
    assert every("\n" not in each for each in signatures)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "conv1d"},
        {"weight": (16, 16, 3, 5)},
        {"weight": (16, 1, 63, 3)},
        {"rest": ((1, 1), (1, 1), (1, 1), 1)},
        {"rest": ((2, 2), (0, 0), (1, 1), 1)},
        {"rest": ((2, 2), (1, 1), (2, 2), 1)},
        {"rest": ((2, 2), (1, 1), (1, 1), 2)},
        {"bias": True},
        {"activation": None},
        {"activation": "relu6"},
        {"input": (2, 16, 8, 9)},
        {"input": (1, 16, 8, 8)},
    ],
)
def test_everything_in_a_shape_is_in_its_signature(changes: dict[str, object], shapes: dict[str, Shape]) -> None:
    base = replace(shapes["strided"], rest=((2, 2), (1, 1), (1, 1), 1))
    assert replace(base, **changes).signature != base.signature  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_batch_is_part_of_the_shape() -> None:
    traced = take_in(Everything(), input_shape=(3, 8, 8)).traced
    (call,) = layer_calls(traced)["plain"]
    assert shape_of(call, 1).signature != shape_of(call, 2).signature
    assert shape_of(call, 7).input == (7, 3, 8, 8)


@pytest.fixture(scope="module")
def distinct(shapes: dict[str, Shape]) -> list[Shape]:
    return list({each.signature: each for each in shapes.values()}.values())


@pytest.mark.matrix
def test_one_row_a_shape_and_compute(distinct: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_ROUNDS", ROUNDS)
    said: list[str] = []
    rows = time_operators(distinct, CPU, 1, lambda label, done, total: said.append(label))
    found = [(row.signature, row.compute) for row in rows]
    assert sorted(found) == sorted((shape.signature, each) for shape in distinct for each in ("float", "integer"))
    for row in rows:
        assert math.isfinite(row.layer_us)
        assert row.layer_us > 0, row
        assert row.enter_us >= 0, row
        assert row.leave_us >= 0, row
        if row.compute == "integer":
            assert row.enter_us > 0, "floats are quantized before it"
    assert any("operators" in label for label in said)


def test_no_integer_rows_for_a_target_without_the_format(
    shapes: dict[str, Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_ROUNDS", ROUNDS)
    given = [shapes["plain"], shapes["fc"]]
    rows = time_operators(given, replace(CPU, formats=("float-weights",)), 1, silent)
    assert [(row.signature, row.compute) for row in rows] == [(each.signature, "float") for each in given]


def test_timing_leaves_the_callers_random_numbers_alone(
    shapes: dict[str, Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_ROUNDS", ROUNDS)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    time_operators([shapes["fc"]], replace(CPU, formats=("float-weights",)), 1, silent)
    assert torch.equal(torch.rand(3), wanted)
