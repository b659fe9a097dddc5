"""Plans from files: what cannot be carried out is named, all of it at once; what differs from what was planned, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from compress.errors import InputError
from compress.plans.review import review_plan, settings_digest
from compress.records.allocation import Allocation, Candidate, Cost
from compress.records.layers import LayerSpec, QuantOption
from compress.records.plan import Choice, Plan, Skip, Steps

MODEL, DATA = "m" * 64, "d" * 64


def spec(name: str, **changes: Any) -> LayerSpec:
    return LayerSpec(**({"name": name, "kind": "conv2d", "weight_shape": (8, 4, 3, 3), "macs": 9, "rows": 1} | changes))


LAYERS = (
    spec("a"),
    spec("b"),
    spec("c", kind="linear", weight_shape=(8, 4)),
    spec("up", kind="conv_transpose2d", refusal="transposed convolutions are not compressed yet"),
)


def choice(layer: str, bits: int = 4, act_bits: int | None = 8, **changes: Any) -> Choice:
    option = QuantOption(bits=bits, act_bits=act_bits, symmetric=changes.pop("symmetric", act_bits is not None))
    name = "integer" if act_bits is not None else "float-weights"
    return Choice(**({"layer": layer, "method": "mse", "option": option, "format": name} | changes))


def plan(choices: Sequence[Choice], **changes: Any) -> Plan:
    frame: dict[str, Any] = {
        "choices": tuple(choices),
        "target": "onnx-cpu",
        "observer": "mse",
        "iterations": 10,
        "samples": 80,
        "model_fingerprint": MODEL,
        "data_fingerprint": DATA,
    }
    return Plan(**(frame | changes))


def allocation(choices: Sequence[Choice], floats: Sequence[str] = ()) -> Allocation:
    cost = Cost(size_bytes=10, macs=9, bops=9)
    chosen = [
        Candidate(layer=each.layer, method=each.method, option=each.option, format=each.format, cost=cost, error=0.1)
        for each in choices
    ]
    chosen += [Candidate(layer=name, cost=cost, error=0.0) for name in floats]
    return Allocation(
        budgets=(), sensitivity="kl", objective="error", value=1.0, bound=1.0, gap=0.0, status="optimal",
        solver="highs", seconds=0.0, predicted={"size": 30.0}, chosen=tuple(chosen),
        settings=settings_digest(plan(choices)),
    )  # fmt: skip


def review(given: Plan, data: str | None = DATA, model: str = MODEL) -> tuple[Plan, list[str]]:
    return review_plan(given, LAYERS, model, data, 80 if data else 0)


def refusal(given: Plan, data: str | None = DATA) -> str:
    with pytest.raises(InputError) as caught:
        review(given, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_model() -> None:
    with pytest.raises(InputError, match="made for another model") as caught:
        review(plan([choice("a")]), model="f" * 64)
    assert "m" * 12 in str(caught.value)
    assert "f" * 12 in str(caught.value)
    assert "compress allocate" in str(caught.value)


WRONG = {
    "unknown layer": (choice("nothere"), "layer nothere: the model has no layer of that name"),
    "refused layer": (choice("up"), "layer up: transposed convolutions are not compressed yet"),
    "unknown format": (choice("a", format="magic"), "layer a: target onnx-cpu has no format 'magic'; it has integer,"),
    "asymmetric weights on integers": (
        choice("a", symmetric=False),
        "layer a: format integer needs symmetric weights",
    ),
    "no activations on integers": (
        choice("a", act_bits=None, format="integer", symmetric=True),
        "layer a: format integer does not run W4; float-weights does",
    ),
    "activations on floats": (
        choice("a", format="float-weights"),
        "layer a: format float-weights does not run W4A8; integer does",
    ),
    "unknown method": (choice("a", method="magic"), "layer a: unknown method 'magic'; known: minmax, mse, hqq"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_wrong_choice(case: str) -> None:
    wrong, sentence = WRONG[case]
    said = refusal(plan([choice("b"), wrong]))
    assert said.startswith("the plan cannot be carried out: ")
    assert sentence in said
    assert "layer b" not in said


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (choice("a"), "layer a: quantized activations need calibration data: give --calib"),
        (
            choice("a", act_bits=None, method="adaquant"),
            "layer a: method adaquant needs calibration data: give --calib",
        ),
    ],
)
def test_what_needs_data(wrong: Choice, sentence: str) -> None:
    assert sentence in refusal(plan([wrong]), data=None)
    reviewed, _ = review(plan([wrong]))
    assert reviewed.choices == (wrong,)


def test_everything_wrong_is_named_at_once() -> None:
    choices = [
        choice("nothere"),
        choice("a", format="magic"),
        choice("b", symmetric=False),
        choice("c", act_bits=None, method="magic"),
        choice("c", act_bits=None, method="adaquant"),
    ]
    said = refusal(plan(choices), data=None)
    for part in (
        "layer c is chosen twice",
        "layer nothere: the model has no layer",
        "layer a: target onnx-cpu has no format 'magic'",
        "layer b: format integer needs symmetric weights",
        "layer c: unknown method 'magic'",
        "layer c: method adaquant needs calibration data",
    ):
        assert part in said, said


def test_a_layer_twice_is_said_once() -> None:
    said = refusal(plan([choice("a", 4), choice("a", 3), choice("a", 2), choice("b")]))
    assert said.count("layer a is chosen twice") == 1
    assert "layer b" not in said


def test_nothing_chosen() -> None:
    assert "it chooses nothing for any layer" in refusal(plan([]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target": "magic"}, "unknown target 'magic'; known: onnx-cpu, onnx-arm"),
        ({"observer": "magic"}, "unknown observer 'magic'; known: minmax"),
    ],
)
def test_unknown_names_in_the_frame(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(plan([choice("a")], **changes))


def test_steps_that_need_data_without_data() -> None:
    """``compress quantize`` refuses them without --calib; a plan edited to have them must not be obeyed in part."""
    steps = {"statistics_tuning": True, "bias_tuning": True}
    said = refusal(plan([choice("a", act_bits=None)], steps=steps, data_fingerprint=None, samples=0), None)
    assert "step statistics_tuning needs calibration data: give --calib; step bias_tuning needs" in said


def test_iterations_that_no_option_allows() -> None:
    assert "iterations is -5" in refusal(plan([choice("a")], iterations=-5))


def test_a_plan_as_it_was_found_keeps_its_allocation() -> None:
    choices = [choice("a", 3), choice("b", 5, act_bits=None)]
    found = plan(choices, allocation=allocation(choices, ["c"]), skipped=(Skip(layer="c", reason="the budgets"),))
    reviewed, notes = review(found)
    assert notes == []
    assert reviewed.allocation == found.allocation
    assert reviewed.choices == found.choices
    assert reviewed.skipped[0] == Skip(layer="c", reason="the budgets")
    # Order says nothing.
    reviewed, notes = review(found.model_copy(update={"choices": tuple(reversed(choices))}))
    assert notes == []
    assert reviewed.allocation == found.allocation


@pytest.mark.parametrize(
    "edited",
    [
        [choice("a", 4), choice("b", 5)],
        [choice("a", 3, act_bits=4), choice("b", 5)],
        [choice("a", 3, method="minmax"), choice("b", 5)],
        [choice("a", 3), choice("b", 5, act_bits=None)],
        [choice("a", 3)],
        [choice("a", 3), choice("b", 5), choice("c", 8)],
    ],
    ids=["width", "input", "method", "format", "removed", "added"],
)
def test_an_edited_plan_loses_its_certificate(edited: list[Choice]) -> None:
    found = plan([choice("a", 3), choice("b", 5)], allocation=allocation([choice("a", 3), choice("b", 5)], ["c"]))
    reviewed, notes = review(found.model_copy(update={"choices": tuple(edited)}))
    assert reviewed.allocation is None
    assert reviewed.choices == tuple(edited)
    assert notes == ["the plan was edited since it was found: its predictions and its certificate no longer hold"]


def test_edited_settings_lose_the_certificate_too() -> None:
    choices = [choice("a", 3)]
    found = plan(choices, allocation=allocation(choices))
    assert review(found)[0].allocation is not None
    for edited in ({"iterations": 5}, {"observer": "minmax"}, {"steps": Steps(statistics_tuning=True)}):
        assert review(found.model_copy(update=edited))[0].allocation is None, edited


def test_other_data_is_noted_and_stamped() -> None:
    reviewed, notes = review(plan([choice("a")], samples=12), data="e" * 64)
    assert notes == ["the plan was made with other calibration data than it is carried out with"]
    assert reviewed.data_fingerprint == "e" * 64
    assert reviewed.samples == 80
    _, notes = review(plan([choice("a", act_bits=None)]), data=None)
    assert len(notes) == 1
    _, notes = review(plan([choice("a", act_bits=None)], data_fingerprint=None, samples=0), data=None)
    assert notes == []


def test_layers_that_the_plan_does_not_name_stay_float_and_say_so() -> None:
    reviewed, _ = review(plan([choice("a")], skipped=(Skip(layer="b", reason="named by --ignore"),)))
    assert {skip.layer: skip.reason for skip in reviewed.skipped} == {
        "b": "named by --ignore",
        "c": "not in the plan",
        "up": "not in the plan",
    }
    # What is chosen is not skipped, though an edited plan may still list it.
    reviewed, _ = review(plan([choice("a"), choice("b")], skipped=(Skip(layer="b", reason="named by --ignore"),)))
    assert [skip.layer for skip in reviewed.skipped] == ["c", "up"]
