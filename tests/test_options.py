"""Options, as keywords and as records: each is one, and what cannot be is refused in a sentence before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress import api
from compress.errors import InputError
from compress.options import Options, Search, Settings, Source


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip


def data() -> Tensor:
    return torch.randn(16, 1, 8, 8)


@pytest.mark.slow(cases=8)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "--bits 9: allowed are 2 to 8"),
        ({"bits": 1}, "--bits 1: allowed are 2 to 8"),
        ({"bits": 4.5}, "--bits 4.5: allowed are 2 to 8"),
        ({"act_bits": 1}, "--act-bits 1: allowed are 2 to 8"),
        ({"first_last_bits": 16}, "--first-last-bits 16: allowed are 2 to 8"),
        ({"iterations": -1}, "--iterations -1: allowed are 0"),
        ({"samples": 0}, "--samples 0: at least 1"),
        ({"method": "magic"}, "unknown method 'magic'; known: minmax, mse, hqq, gptq, adaquant, adaquant-parallel"),
        ({"observer": "magic"}, "unknown observer 'magic'; known: minmax, percentile, mse, histogram"),
        ({"target": "magic"}, "unknown target 'magic'; known: onnx-cpu, onnx-arm"),
        ({"ignore": ("nothing*",)}, "--ignore 'nothing*' matches no layer"),
        ({"ignore": ("re:[",)}, "--ignore 're:[' is not a regular expression"),
        ({"ignore": ("*",)}, "nothing to compress: 0: named by --ignore"),
        ({"bit": 4}, "the options are the fields of compress.Options"),
        ({"eval_data": torch.randn(8, 1, 8, 8)}, "labels"),
        (
            {"eval_data": (torch.randn(8, 1, 9, 9), torch.zeros(8).long())},
            "samples of shape 1x9x9; the model takes 1x8x8",
        ),
        ({"eval_data": (torch.randn(8, 1, 8, 8), torch.zeros(8))}, "the metric needs one number a sample"),
        ({"calib": None, "act_bits": 4, "input_shape": (1, 8, 8)}, "--act-bits 4: ranges measured as the model runs"),
        ({"calib": None, "method": "adaquant", "input_shape": (1, 8, 8)}, "--method adaquant needs calibration data"),
        ({"calib": None, "statistics_tuning": True, "input_shape": (1, 8, 8)}, "need calibration data: give --calib"),
        ({"calib": None, "bias_tuning": True, "input_shape": (1, 8, 8)}, "need calibration data: give --calib"),
        ({"calib": None, "bias_correction": True, "input_shape": (1, 8, 8)}, "need calibration data: give --calib"),
        (
            {"calib": torch.randn(8, 2, 8, 8)},
            "An input of shape 2x8x8 (from the calibration data) does not run through the model",
        ),
        ({"input_shape": (1, 9, 9)}, "differs from the calibration data"),
    ],
    ids=lambda each: ",".join(each) if isinstance(each, dict) else each,
)
def test_what_cannot_be_is_refused_in_a_sentence_before_any_work(
    settings: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.run.apply_plan", None)  # the work
    given = {"calib": data(), "iterations": 8, **settings}
    with pytest.raises(InputError) as error:
        api.quantize(net(), out=tmp_path / "out", **given)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_a_keyword() -> None:
    owned = {each.name for record in (Options, Search, Source) for each in dataclasses.fields(record)}
    assert set(Settings.__annotations__) == owned | {"options"}


def test_options_or_keywords() -> None:
    with pytest.raises(InputError, match="either options or keywords, not both"):
        api.quantize(net(), options=Options(), bits=3)
