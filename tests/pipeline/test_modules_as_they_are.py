"""Modules handed over in Python as users have them: other types, heads side by side, layers without an input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import InputError
from compress.exporters.session import open_session, run_session
from tests.every import every
from tests.sweep import sweep


class Second(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor, None]) -> Tensor:
        return x[1]


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_and_the_callers_module_stays(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)).to(dtype).train()
    report = compress.quantize(module, calib=torch.randn(32, 3, 8, 8), bits=8, method="mse").report
    assert any("converted to float32" in note for note in report.notes)
    assert module[0].weight.dtype is dtype
    assert module.training


@pytest.mark.slow
@sweep("method", ["brecq", "genie", "metaaug"], sample=["genie"])
def test_two_heads_on_one_value_are_learned_by_blocks(method: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU())
            self.classes, self.places = nn.Linear(16, 16), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.trunk(x)
            return self.classes(y.mean((2, 3))), self.places(y)

    report = compress.quantize(
        Heads(), calib=torch.randn(32, 3, 16, 16), bits=4, act_bits=4, method=method, iterations=5
    ).report
    notes = {layer.name: layer.note or "" for layer in report.layers}
    assert every("reconstructed" in notes[name] for name in ("classes", "places"))


@pytest.mark.matrix
def test_one_number_a_batch_beside_the_outputs_is_exported_with_them() -> None:
    class WithPenalty(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
            y = super().forward(x)
            return y, y.square().mean(), None

    report = compress.quantize(WithPenalty(16, 4), calib=torch.randn(80, 16), bits=8, method="mse").report
    assert any("output 2 (None)" in note for note in report.notes)
    with pytest.raises(InputError, match="first output is one number"):
        compress.quantize(nn.Sequential(WithPenalty(16, 4), Second()), calib=torch.randn(80, 16), bits=8)


@pytest.mark.slow
def test_token_ids_and_several_inputs_are_exported_without_data(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x) + self.second(y)

    reader = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 4))
    compress.export(reader, tmp_path / "reader.onnx")
    ids = torch.randint(30, (3, 11))
    (got,) = run_session(open_session(tmp_path / "reader.onnx", "ORT_ENABLE_ALL"), [(ids,)])
    torch.testing.assert_close(got, reader(ids).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"several inputs \(x, y\).*torch\.export\.save"):
        compress.export(Pair(), tmp_path / "pair.onnx")
    inputs = (torch.randn(2, 8), torch.randn(2, 6))
    torch.export.save(torch.export.export(Pair(), inputs), tmp_path / "pair.pt2")
    compress.export(tmp_path / "pair.pt2", tmp_path / "pair.onnx")


@pytest.mark.slow
def test_a_dead_layer_is_quantized_like_others() -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        module[2].weight.mul_(1e-12)
        module[2].bias.fill_(-1.0)
        module[0].weight.mul_(1e6)
    report = compress.quantize(module, calib=torch.randn(64, 16), bits=4, iterations=5).report
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]


def test_a_shape_at_which_samples_are_taken_apart_is_not_guessed() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.f = nn.Conv2d(3, 8, 5, stride=2), nn.Linear(8 * 14 * 14, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(torch.relu(self.conv(x)).view(-1, 8 * 14 * 14))

    assert any(note.startswith("input shape 3x32x32") for note in compress.inspect(Apart()).notes)
