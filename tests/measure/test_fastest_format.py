"""``--rows``: the fastest format of each linear by its times, and what is done where they are alike or missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from compress import api
from compress.errors import InputError
from compress.intake.model import take_in
from compress.measure import fastest_format
from compress.measure.fastest_format import find_fastest
from compress.measure.latency_table import Operator
from compress.measure.operators import Shape, Variant
from compress.quant.targets import Target, find_target
from compress.records.plan import Choice
from tests.every import every

CPU = find_target("onnx-cpu")
Times = Callable[[Shape, str], float]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def net() -> nn.Module:
    """64 to 96 to 5; rows of a sequence."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5)).eval()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[tuple[str, str]]]:
    """Put made-up times in place of the clock; the list of what was asked for."""

    def put(times: Times) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def time_operators(
            shapes: Sequence[Shape], *_: Any, variants: Sequence[Variant] = (), **__: Any
        ) -> list[Operator]:
            rows = [(shape, variant.compute) for shape in shapes for variant in variants]
            asked.extend((shape.signature, compute) for shape, compute in rows)
            return [
                Operator(
                    signature=shape.signature,
                    compute=compute,
                    layer_us=times(shape, compute) - 0.75,
                    enter_us=0.5,
                    leave_us=0.25,
                )
                for shape, compute in rows
            ]

        monkeypatch.setattr(fastest_format, "time_operators", time_operators)
        return asked

    return put


def found(
    module: nn.Module, rows: int, *, bits: int = 4, length: int = 7, with_data: bool = True, target: Target = CPU
) -> dict[str, Choice]:
    intake = take_in(module, input_shape=(length, 64))
    choices, _ = find_fastest(
        intake.traced,
        intake.layers,
        {layer.name: bits for layer in intake.layers},
        method="mse",
        rows=rows,
        with_data=with_data,
        target=target,
        threads=1,
        table_file=None,
        progress=lambda *_: None,
    )
    return choices


ALIKE = {"float": 100.0, "W4g32": 100.0, "W4g128": 100.0, "integer": 100.0, "dynamic": 100.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "option", "name"),
    [
        ("float", "W4", "float-weights"),
        ("W4g32", "W4g32", "matmul-nbits"),
        ("integer", "W4A8", "integer"),
        ("dynamic", "W4A8d", "dynamic"),
    ],
)
def test_the_fastest_is_taken_and_says_by_how_much(
    compute: str, option: str, name: str, timed: Callable[[Times], object]
) -> None:
    timed(lambda shape, each: 40.0 if each == compute else 100.0)
    choice = found(net(), rows=7)["0"]
    assert (str(choice.option), choice.format, choice.method) == (option, name, "mse")
    assert str(choice.reason).startswith(f"fastest at 7 rows (microseconds: {option} 40, ")
    assert str(choice.reason).count(" 100") == len(str(choice.reason).split(",")) - 1


@pytest.mark.slow
def test_of_formats_as_fast_the_one_that_changes_the_input_least(timed: Callable[[Times], object]) -> None:
    timed(lambda shape, compute: {"float": 104.0, "integer": 100.0}.get(compute, 102.0))
    assert found(net(), rows=7)["0"].format == "float-weights"
    # Other rows: nothing of the first table is used.
    timed(lambda shape, compute: {"float": 106.0, "integer": 100.0}.get(compute, 104.0))
    assert found(net(), rows=8)["0"].format == "matmul-nbits"


@pytest.mark.slow
def test_rows_are_those_of_the_widest_layer_and_others_have_fewer_in_proportion(
    timed: Callable[[Times], list[tuple[str, str]]],
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.whole = nn.Linear(64, 96), nn.Linear(96, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.whole(self.each(x).mean(1))

    asked = timed(lambda shape, compute: 10.0)
    choices = found(Pooled().eval(), rows=40, length=10)
    assert str(choices["each"].reason).startswith("fastest at 40 rows")
    assert str(choices["whole"].reason).startswith("fastest at 4 rows")
    assert len(set(asked)) == len(asked), "nothing is timed twice"


def test_without_data_nothing_needs_a_calibrated_range(timed: Callable[[Times], list[tuple[str, str]]]) -> None:
    asked = timed(lambda shape, compute: 10.0)
    found(net(), rows=7, with_data=False)
    assert "integer" not in {compute for _, compute in asked}
    assert "dynamic" in {compute for _, compute in asked}


@pytest.mark.slow
def test_widths_that_no_kernel_unpacks_are_not_offered(timed: Callable[[Times], list[tuple[str, str]]]) -> None:
    asked = timed(lambda shape, compute: 10.0)
    found(net(), rows=7, bits=3)
    assert {compute for _, compute in asked} == {"float", "integer", "dynamic"}


@pytest.mark.slow
def test_times_are_kept(timed: Callable[[Times], list[tuple[str, str]]]) -> None:
    timed(lambda shape, compute: 40.0 if compute == "integer" else 100.0)
    first = found(net(), rows=7)
    asked = timed(lambda shape, compute: 1.0)
    assert found(net(), rows=7) == first
    assert asked == []


@pytest.mark.slow
def test_refusals() -> None:
    with pytest.raises(InputError, match="--rows 0: a call has 1 row or more"):
        found(net(), rows=0)
    module = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU()).eval()
    with pytest.raises(InputError, match="the model has none that can be compressed"):
        api.preview(module, input_shape=(1, 6, 6), rows=4)


def test_alike_in_everything_stays_on_floats(timed: Callable[[Times], object]) -> None:
    timed(lambda shape, compute: ALIKE[compute])
    choices = found(net(), rows=1)
    assert {(str(choice.option), choice.format) for choice in choices.values()} == {("W4", "float-weights")}
    times = "W4 100, W4g32 100, W4A8 100, W4A8d 100"
    assert {choice.reason for choice in choices.values()} == {f"fastest at 1 row (microseconds: {times})"}


@pytest.mark.slow
def test_the_reason_names_the_slowest_last(timed: Callable[[Times], object]) -> None:
    timed(lambda shape, compute: {"float": 80.0, "W4g32": 20.4, "integer": 41.0, "dynamic": 60.0}[compute])
    reason = found(net(), rows=7)["0"].reason
    assert reason == "fastest at 7 rows (microseconds: W4g32 20, W4A8 41, W4A8d 60, W4 80)"


def test_each_linear_has_a_winner_of_its_own(timed: Callable[[Times], object]) -> None:
    timed(lambda shape, compute: 10.0 if compute == ("dynamic" if shape.weight == (96, 64) else "W4g32") else 20.0)
    assert {name: choice.format for name, choice in found(net(), rows=7).items()} == {
        "0": "dynamic",
        "2": "matmul-nbits",
    }


@pytest.mark.slow
def test_groups_wider_than_a_row_are_not_offered(timed: Callable[[Times], list[tuple[str, str]]]) -> None:
    asked = timed(lambda shape, compute: 10.0)
    reasons = {name: str(choice.reason) for name, choice in found(Towers().eval(), rows=7).items()}
    assert {compute for _, compute in asked if compute.startswith("W4g")} == {"W4g32", "W4g128"}
    assert [("W4g32" in reasons[name], "W4g128" in reasons[name]) for name in ("tiny", "small", "large")] == [
        (False, False),
        (True, False),
        (True, True),
    ]


class Towers(nn.Module):
    """Rows of 16, of 64 and of 128 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.tiny = nn.Linear(128, 16), nn.Linear(64, 64), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tiny(torch.relu(self.large(torch.cat([x, self.small(x)], -1))))


@pytest.mark.slow
def test_a_target_without_a_format_is_not_timed_in_it(timed: Callable[[Times], list[tuple[str, str]]]) -> None:
    asked = timed(lambda shape, compute: 10.0)
    found(net(), rows=7, target=replace(CPU, formats=("float-weights", "dynamic")))
    assert {compute for _, compute in asked} == {"float", "dynamic"}


@pytest.mark.slow
def test_only_what_the_table_lacks_is_timed(timed: Callable[[Times], list[tuple[str, str]]]) -> None:
    timed(lambda shape, compute: 40.0 if compute == "dynamic" else 100.0)
    found(net(), rows=7)
    asked = timed(lambda shape, compute: 10.0)
    longer = nn.Sequential(net(), nn.ReLU(), nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU()).eval()
    choices = found(longer, rows=7)
    # The first layer was timed with the ReLU behind it; the third to last is the same.
    assert {signature.partition(" on ")[0] for signature, _ in asked} == {"linear 5x96", "linear 64x5"}
    assert choices["0.0"].format == choices["4"].format == "dynamic"
    assert str(choices["0.0"].reason).startswith("fastest at 7 rows (microseconds: W4A8d 40, W4 100")


@pytest.mark.slow
def test_layers_that_are_no_linears_are_left_to_the_uniform_plan(timed: Callable[[Times], object]) -> None:
    timed(lambda shape, compute: 10.0 if compute in ("W8g32", "W8g128") else 20.0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 7)
    ).eval()
    plan = api.preview(module, input_shape=(1, 6, 6), bits=4, rows=2, first_last_bits=8, ignore=("3",)).plan
    formats = {choice.layer: (str(choice.option), choice.format) for choice in plan.choices}
    # The last layer has 8 bits, and was timed with them.
    assert formats == {"0": ("W8", "float-weights"), "5": ("W8g32", "matmul-nbits")}
    assert [(skip.layer, skip.reason) for skip in plan.skipped] == [("3", "named by --ignore")]


@pytest.mark.slow
def test_exported_and_proven_as_chosen(timed: Callable[[Times], object], tmp_path: Path) -> None:
    timed(lambda shape, compute: 10.0 if compute == ("dynamic" if shape.weight == (96, 64) else "W4g32") else 20.0)
    result = api.quantize(
        net(), calib=torch.randn(16, 7, 64), bits=4, first_last_bits=4, rows=7, method="mse", out=tmp_path / "out"
    )
    check = result.report.export_check
    assert check.failures == ()
    assert (check.integer_layers, check.block_layers, check.float_layers) == (1, 1, 0)
    operators = {node.name: node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert (operators["0"], operators["2"]) == ("MatMulIntegerToFloat", "MatMulNBits")
    assert every("fastest at 7 rows" in str(row.note) for row in result.report.layers)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("compute", "operator"),
    [
        ("float", "MatMul"),
        ("W8g32", "MatMulNBits"),
        ("integer", "MatMulIntegerToFloat"),
        ("dynamic", "MatMulIntegerToFloat"),
    ],
)
def test_every_winner_is_exported_as_chosen(
    compute: str, operator: str, timed: Callable[[Times], object], tmp_path: Path
) -> None:
    timed(lambda shape, each: 40.0 if each == compute else 100.0)
    report = api.quantize(
        net(), calib=torch.randn(16, 7, 64), bits=4, rows=7, method="mse", out=tmp_path / "out"
    ).report
    assert [choice.layer for choice in report.plan.choices] == ["0", "2"]
    nodes = {node.name: node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert (nodes["0"], nodes["2"]) == (operator, operator)


@pytest.mark.matrix
def test_measured_for_real() -> None:
    """Whichever wins on this machine: every way of each linear has a time, and the plan holds the fastest of them."""
    choices = found(net(), rows=7)
    ways = {"W4": "float-weights", "W4g32": "matmul-nbits", "W4A8": "integer", "W4A8d": "dynamic"}
    for choice in choices.values():
        before, _, listed = str(choice.reason).removesuffix(")").partition(" (microseconds: ")
        assert before == "fastest at 7 rows"
        times = {way: float(time) for way, time in (each.split() for each in listed.split(", "))}
        assert times.keys() == ways.keys()
        assert ways[str(choice.option)] == choice.format
        # Rounded to whole microseconds; of those as fast as 5 % the one that changes the input least is taken.
        assert 0 <= times[str(choice.option)] <= 1.05 * (min(times.values()) + 0.5) + 0.5
