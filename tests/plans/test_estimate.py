"""The estimate before a run: grows with what is asked for, and never costs much itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress import api
from compress.data.samples import load_samples
from compress.intake.model import take_in
from compress.options import Options
from compress.plans.estimate import Estimate, estimate, pass_seconds
from compress.plans.frame import make_plan
from tests.networks import FixedBatch


class Clock:
    """A clock that advances a millisecond whenever it is read: estimates become exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3
        return self.now


def estimated(monkeypatch: object, samples: int, **options: object) -> Estimate:
    intake = take_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), input_shape=(3, 16, 16))
    monkeypatch.setattr("compress.plans.estimate.time", Clock())  # type: ignore[attr-defined]
    data = load_samples(torch.zeros(max(samples, 1), 3, 16, 16)) if samples else None
    return estimate(intake.traced, make_plan(intake, Options(**options), data), samples)  # type: ignore[arg-type]


@pytest.mark.slow
def test_time_follows_samples_and_iterations(monkeypatch: object) -> None:
    few, many = (estimated(monkeypatch, count, method="mse").seconds for count in (32, 320))
    assert many == few * 10
    short, long = (estimated(monkeypatch, 32, iterations=count).seconds for count in (100, 200))
    assert long > short > few
    assert abs((long - few) / (short - few) - 2) < 1e-6


@pytest.mark.slow
def test_memory_holds_the_samples_and_little_more(monkeypatch: object) -> None:
    few, many = (estimated(monkeypatch, count).memory_bytes for count in (64, 640))
    assert many - few == 576 * 3 * 16 * 16 * 4
    assert few > 64 * 3 * 16 * 16 * 4


@pytest.mark.slow
def test_transformed_copies_cost_more_than_what_they_are_made_for(monkeypatch: object) -> None:
    genie, metaaug = (estimated(monkeypatch, 32, method=name).seconds for name in ("genie", "metaaug"))
    assert metaaug > 1.1 * genie


def test_without_data_it_is_quick(monkeypatch: object) -> None:
    assert estimated(monkeypatch, 0).seconds <= 2


def test_a_fixed_batch_is_kept() -> None:
    seen = api.preview(FixedBatch(), calib=torch.zeros(10, 6))
    assert seen.estimate.seconds > 0


def test_one_slow_pass_among_others_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    intake = take_in(nn.Linear(4, 4), input_shape=(4,))
    reads = iter([0.0, 0.2, 1.0, 1.032, *(2.0 + 0.05 * count for count in range(40))])
    monkeypatch.setattr("compress.plans.estimate.time.perf_counter", lambda: next(reads))
    assert pass_seconds(intake.traced) == pytest.approx(1e-3)
