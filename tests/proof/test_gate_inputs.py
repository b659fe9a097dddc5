"""What a file is judged on: samples, else text, else made inputs, and noise with a note only where nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress import api
from compress.cli.tables import export_check_text
from compress.data.norm_distance import norm_distance
from compress.data.samples import Samples, load_samples
from compress.errors import InputError
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.session import open_session, run_session
from compress.graph.traced import TracedModel
from compress.intake.model import take_in
from compress.models.huggingface import TextReader
from compress.proof.gate import verify
from compress.proof.gate_inputs import GATE_SAMPLES, gate_inputs, page_of_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def normed(channels: int = 8) -> nn.Sequential:
    """A net whose BatchNorm has seen inputs far from noise."""
    net = nn.Sequential(nn.Conv2d(1, channels, 3), nn.BatchNorm2d(channels, momentum=None), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        net.train()(3 + 0.5 * torch.randn(64, 1, 6, 6).cumsum(3))
    return net.eval()


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids).mean(1))


def samples(value: float, count: int = 4) -> Samples:
    return load_samples(torch.full((count, 6), value))


def test_calibration_samples_come_before_others_and_are_not_too_many() -> None:
    intake = take_in(plain(), input_shape=(6,))
    judged = gate_inputs(intake.traced, 0, samples(1.0, GATE_SAMPLES + 5), samples(2.0), intake=intake, ask="")
    assert judged.source == "the samples given"
    assert torch.equal(judged.inputs[0], torch.full((GATE_SAMPLES, 6), 1.0))
    assert judged.notes == ()


def test_evaluation_samples_come_before_made_ones() -> None:
    intake = take_in(plain(), input_shape=(6,))
    judged = gate_inputs(intake.traced, 0, None, samples(2.0), intake=intake, ask="")
    assert torch.equal(judged.inputs[0], torch.full((4, 6), 2.0))
    with pytest.raises(InputError, match="samples of shape 5; the model takes 6"):
        gate_inputs(intake.traced, 0, None, load_samples(torch.zeros(4, 5)), intake=intake, ask="")


@pytest.mark.slow
def test_inputs_are_made_to_fit_batch_norm() -> None:
    net = normed()
    intake = take_in(net, input_shape=(1, 6, 6))
    judged = gate_inputs(intake.traced, 0, None, None, intake=intake, ask="")
    assert judged.source == "inputs made from BatchNorm statistics"
    assert judged.notes == ()
    with torch.no_grad():
        made, noise = (float(norm_distance(net, x)[1]) for x in (judged.inputs[0], torch.randn(16, 1, 6, 6)))
    assert made < 0.5 * noise


@pytest.mark.slow
def test_large_models_are_judged_on_noise_and_the_note_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.proof.gate_inputs._MOST_MACS", 1e5)
    intake = take_in(normed(), input_shape=(1, 6, 6))
    judged = gate_inputs(intake.traced, 0, intake=intake, ask="give samples with --data")
    assert judged.source == "noise"
    (note,) = judged.notes
    assert note.startswith("judged on noise, which may not show what real samples would (making inputs that fit Batch")
    assert note.endswith("; give samples with --data")


@pytest.mark.slow
def test_without_anything_it_is_noise_and_the_report_says_so(tmp_path: Path) -> None:
    result = api.quantize(plain(), input_shape=(6,), bits=8, out=tmp_path / "out")
    (note,) = (note for note in result.report.notes if note.startswith("gate: "))
    assert note == (
        "gate: judged on noise, which may not show what real samples would (there is no tokenizer, and no BatchNorm "
        "that inputs could be made to fit); give samples with --calib or --eval"
    )
    check = api.verify(tmp_path / "out")
    assert check.source == "noise"
    assert "give samples with --data" in check.notes[0]
    assert api.verify(tmp_path / "out", data=torch.randn(8, 6)).notes == ()


def test_token_ids_at_random_are_no_noise() -> None:
    intake = take_in(Words(), samples=load_samples(torch.randint(50, (4, 7))))
    judged = gate_inputs(intake.traced, 0, intake=intake, ask="")
    assert judged.source == "token ids at random"
    assert judged.notes[0].startswith("judged on token ids at random")


class Letters(TextReader):
    """A tokenizer that is not in a folder: a letter a token."""

    def encode(self, texts: list[str], length: int | None = None, second: list[str] | None = None) -> dict[str, Tensor]:
        longest = min(length or 40, max(map(len, texts)))
        rows = [[ord(letter) % 50 for letter in text[:longest].ljust(longest)] for text in texts]
        return {"input_ids": torch.tensor(rows)}


@pytest.mark.parametrize("any_length", [True, False])
def test_text_goes_through_the_tokenizer(any_length: bool, tmp_path: Path) -> None:
    intake = take_in(Words(), samples=load_samples(torch.randint(50, (4, 7))))
    reader = Letters(tmp_path, ("input_ids",), ("input_ids",), 50, 40, False)
    object.__setattr__(intake, "text", reader)
    intake.traced.dynamic_length = any_length
    judged = gate_inputs(intake.traced, 0, intake=intake, ask="")
    assert judged.source == "our page of text"
    assert judged.inputs[0].shape == (32, 40 if any_length else 7)
    assert len(judged.inputs[0].unique(dim=0)) == 32
    assert judged.notes == ()


def test_a_folder_without_a_tokenizer_is_told_of(tmp_path: Path) -> None:
    intake = take_in(Words(), samples=load_samples(torch.randint(50, (4, 7))))
    object.__setattr__(intake, "text", TextReader(tmp_path, ("input_ids",), ("input_ids",), 50, 40, False))
    judged = gate_inputs(intake.traced, 0, intake=intake, ask="")
    assert judged.source == "token ids at random"
    assert "has no tokenizer" in judged.notes[0]


def test_our_page_is_of_many_kinds() -> None:
    page = page_of_text()
    assert len(page) >= 32
    assert len(set(page)) == len(page)
    assert not any("\n" in text or "  " in text for text in page)
    whole = " ".join(page)
    assert all(sign in whole for sign in ".,;:!?\"'()-@$ß")
    assert any(letter.isdigit() for letter in whole)


@pytest.mark.slow
def test_the_worst_sample_is_named_in_report_and_text(
    tmp_path: Path, compress_quickly: Callable[..., TracedModel]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    x[23] *= 30  # far outside of every grid
    traced = compress_quickly(plain(), x[:20], bits=7, act_bits=7, first_last_bits=7)
    path = tmp_path / "model.onnx"
    write_onnx(build_onnx(compress_quickly(plain(), x[:20], bits=7, act_bits=7, first_last_bits=7)), path, {})
    check = verify(traced, path, (x,), "noise")
    (got,) = run_session(open_session(path, "ORT_ENABLE_ALL"), zip(x.split(8), strict=True))
    with torch.no_grad():
        wanted = traced.module(x)
    distances = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert check.worst_sample == int(distances.argmax())
    assert check.worst_relative_l2 == pytest.approx(float(distances.max()), rel=1e-4)
    assert f"furthest on sample {check.worst_sample} (" in export_check_text(check)
    assert any(f"furthest on sample {check.worst_sample} (" in failure for failure in check.failures)


@pytest.mark.slow
def test_one_row_is_compared_with_one_row(tmp_path: Path, compress_quickly: Callable[..., TracedModel]) -> None:
    traced = compress_quickly(plain(), None, (6,), bits=7, dynamic=True, first_last_bits=7)
    path = tmp_path / "model.onnx"
    write_onnx(build_onnx(traced), path, {})
    x = torch.randn(32, 6) * torch.logspace(-2, 1, 32).reshape(-1, 1)
    with torch.no_grad():
        alone, together = torch.cat([traced.module(row) for row in x.split(1)]), traced.module(x)
    assert float((alone - together).norm() / together.norm()) > 0.002  # the grid is that of the whole batch
    check = verify(traced, path, (x,), "noise")
    assert check.relative_l2_one_row is not None
    assert max(check.relative_l2_one_row, check.relative_l2_optimized) < 1e-4
    assert "one sample at a time" in export_check_text(check)
