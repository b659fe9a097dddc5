"""Errors of ways from measured losses; what was measured once is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.data.samples import Samples, load_samples
from compress.errors import InputError
from compress.intake.model import Intake, take_in
from compress.options import Options, Search
from compress.plans.frame import begin_plan, make_plan
from compress.search import sensitivities as module
from compress.search.prepare import prepare
from compress.search.sensitivities import SMALLEST_ERROR, decide_measure, measure_errors
from compress.search.space import FLOAT, Space
from tests.every import every
from tests.search.conftest import silent, space_of  # type: ignore[import-not-found]


def measured(
    intake: Intake, space: Space, samples: Samples, measure: str = "output", **options: Any
) -> tuple[dict[str, dict[tuple[int, int], float]], str]:
    given = Options(method="mse", **options)
    frame = begin_plan(intake, given, samples)
    found, note = measure_errors(intake, given, frame, space, measure, samples, silent)
    return {layer: {way.widths: error for way, error in ways.items()} for layer, ways in found.items()}, note


@pytest.mark.slow
def test_narrow_widths_hurt_more_and_float_not_at_all(intake: Intake, samples: Samples) -> None:
    found, note = measured(intake, space_of(intake, weight_widths=(2, 4, 8), floats=True), samples)
    assert note == "sensitivity output: 15 of 15 measured in this run"
    for layer, errors in found.items():
        assert errors.pop((32, 32)) == 0.0
        in_order = [errors[key] for key in sorted(errors)]
        assert in_order == sorted(in_order, reverse=True), layer
        assert in_order[0] > 3 * in_order[-1] >= 3 * SMALLEST_ERROR


@pytest.mark.slow
def test_what_was_measured_is_kept(intake: Intake, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = measured(intake, space_of(intake, weight_widths=(2, 8)), samples)
    more, note = measured(intake, space_of(intake, weight_widths=(2, 4, 8)), samples)
    assert note.startswith("sensitivity output: 5 of 15 measured")
    assert every(more[layer][key] == error for layer, errors in first.items() for key, error in errors.items())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("everything was known")

    monkeypatch.setattr(module, "measure_sensitivity", never)
    assert measured(intake, space_of(intake, weight_widths=(2, 4, 8)), samples)[0] == more
    for other in ({"observer": "minmax"}, {"seed": 7}, {"search": Search(sensitivity_samples=20)}):
        with pytest.raises(AssertionError, match="everything was known"):
            measured(intake, space_of(intake, weight_widths=(2, 8)), samples, **other)


def test_weights_and_inputs_apart_add_up(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(intake, weight_widths=(2, 8), act_widths=(4, 8))
    losses = {"float": 0.5}
    for way in space.ways["body"]:
        losses[way.trial().key] = 0.5 + {(2, 8): 0.3, (8, 4): 0.2, (8, 8): 0.05}.get(way.widths, float("nan"))
    found = {way.widths: error for way, error in module._errors(space, "body", losses).items()}
    assert found[2, 8] == pytest.approx(0.3)
    assert found[8, 4] == pytest.approx(0.2)
    assert found[8, 8] == pytest.approx(0.05)
    # The corner was not measured: both harms, less what the wide pair costs already.
    assert found[2, 4] == pytest.approx(0.3 + 0.2 - 0.05)
    assert FLOAT not in space.ways["body"]


def test_luck_is_not_bought(intake: Intake) -> None:
    space = space_of(intake, weight_widths=(2, 8))
    losses = {"float": 0.5, **{way.trial().key: 0.4 for way in space.ways["deep"]}}
    assert set(module._errors(space, "deep", losses).values()) == {SMALLEST_ERROR}


@pytest.mark.parametrize(
    ("measure", "with_data", "sentence"),
    [
        ("magic", True, "unknown sensitivity 'magic'; known: kl"),
        ("kl", False, "needs calibration data"),
        ("loss", True, "needs calibration data with classes as labels"),
    ],
)
def test_measures_that_cannot_be_taken(measure: str, with_data: bool, sentence: str, samples: Samples) -> None:
    options = Options(search=Search(sensitivity=measure))
    with pytest.raises(InputError, match=sentence):
        decide_measure(options, samples if with_data else None)


def test_the_measure_that_fits(samples: Samples) -> None:
    assert decide_measure(Options(), None) == "weight"
    assert decide_measure(Options(), samples) == "output"


@pytest.mark.matrix
def test_several_methods_are_ways_to_choose_from(intake: Intake, samples: Samples) -> None:
    options = Options(method="mse,minmax", budgets=("size=0.5x",), search=Search(weight_widths=(4,)))
    prepared = prepare(intake, options, samples, silent)
    assert {way.method for way in prepared.allocator.space.ways["deep"]} == {"mse", "minmax"}
    with pytest.raises(InputError, match="that takes a --budget"):
        make_plan(intake, Options(method="mse,minmax"), samples)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("measure", ["gram", "kl"])
def test_layers_without_a_bias(measure: str) -> None:
    data = load_samples(torch.randn(20, 1, 6, 6))
    net = nn.Sequential(nn.Conv2d(1, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.Flatten())
    taken = take_in(net, samples=data)
    found, _ = measured(taken, space_of(taken, weight_widths=(2, 8)), data, measure)
    assert every(error > 0 for errors in found.values() for error in errors.values())
