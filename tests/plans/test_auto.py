"""``--method auto``: what it chooses by widths, samples and time, and that it says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from compress.data.samples import Samples, load_samples
from compress.errors import InputError
from compress.intake.model import Intake, take_in
from compress.options import Options
from compress.plans import auto


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_samples(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def intake(samples: Samples) -> Intake:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)]
    return take_in(nn.Sequential(*layers).eval(), samples=samples)


@pytest.fixture(autouse=True)
def a_pass_takes_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "pass_seconds", lambda traced: 1 / auto.STEP_SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "method", "iterations", "reason"),
    [
        ({"bits": 4}, "adaquant", 300, "W4A8 loses next to nothing layer by layer"),
        ({"bits": 2, "act_bits": 4}, "genie", 1000, "64 samples suffice"),
        ({"bits": 4, "act_bits": 4}, "genie", 1000, "W4A4 needs layers learned together"),
        ({"bits": 2, "minutes": 1000.0}, "genie", 5000, "--minutes 1000 allows for about 8571 steps each"),
        ({"bits": 2, "minutes": 100.0}, "genie", 850, "--minutes 100 allows for about 857 steps each"),
        ({"bits": 2, "minutes": 30.0}, "adaquant", 300, "too few for blocks, and 450 layer by layer"),
        ({"bits": 2, "minutes": 0.01}, "adaquant", 50, "0 layer by layer; 50 are the fewest, and take longer"),
        (
            {"bits": 2, "iterations": 70, "minutes": 0.01},
            "genie",
            70,
            "--iterations is what counts, --minutes does not",
        ),
        ({"budgets": ("size=0.2x",)}, "adaquant", 300, "errors of single layers"),
        ({"bits": 4, "group_size": 32}, None, None, "groups of weights"),
    ],
)
def test_the_choice_and_its_reason(
    changes: dict[str, object], method: str, iterations: int, reason: str, intake: Intake, samples: Samples
) -> None:
    options = Options(method="auto", **changes)  # type: ignore[arg-type]
    settled, why = auto.settle_method(intake, options, samples)
    assert (settled.method, settled.iterations, settled.minutes) == (method, iterations, None)
    assert why is not None
    assert why.startswith("method auto: ")
    assert reason in why


def test_without_data_or_with_few_samples(intake: Intake, samples: Samples) -> None:
    options = Options(method="auto", bits=2)
    assert "no calibration data" in (auto.settle_method(intake, options, None)[1] or "")
    assert auto.settle_method(intake, options, samples.take(32))[0].method == "adaquant"


def test_another_method_is_left_alone_and_takes_no_minutes(intake: Intake, samples: Samples) -> None:
    options = Options(method="genie")
    assert auto.settle_method(intake, options, samples) == (options, None)
    with pytest.raises(InputError, match="--minutes limits --method auto; genie takes --iterations"):
        auto.settle_method(intake, Options(method="genie", minutes=3.0), samples)
    for minutes in (0.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"--minutes {minutes:g}: allowed is more than 0, and not without end"):
            auto.settle_method(intake, Options(method="auto", minutes=minutes), samples)


def test_an_unknown_method_is_told_of_all_and_of_auto(intake: Intake, samples: Samples) -> None:
    with pytest.raises(InputError, match=r"unknown method 'magic'; known: minmax, .*, metaaug-published, auto$"):
        auto.settle_method(intake, Options(method="magic"), samples)


@pytest.mark.slow
def test_the_report_says_it(samples: Samples) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5)).eval()
    result = compress.quantize(model, calib=samples.inputs[0], bits=2, method="auto", iterations=5)
    assert any(note.startswith("method auto: genie, 5 steps: W2A8") for note in result.report.notes)


def test_several_methods_pass_and_auto_is_none_of_several(intake: Intake, samples: Samples) -> None:
    options = Options(method="mse,genie", budgets=("size=0.3x",))
    assert auto.settle_method(intake, options, samples) == (options, None)
    with pytest.raises(InputError, match="--method genie,auto: auto chooses alone"):
        auto.settle_method(intake, Options(method="genie,auto"), samples)
    with pytest.raises(InputError, match="unknown method 'magic'"):
        auto.settle_method(intake, Options(method="mse,magic"), samples)
