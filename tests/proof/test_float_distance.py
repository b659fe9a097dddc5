"""What quantization costs, without labels: each output against the float model's, and a final concatenation's parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress import api
from compress.cli.tables import float_distance_lines
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.session import open_session, run_session
from compress.graph.traced import TracedModel, trace
from compress.intake.model import take_in
from compress.proof.float_distance import final_operands, float_distance


class Detector(nn.Module):
    """Boxes in pixels beside scores in 0 to 1, boxes last in the other output."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes, scores = 500 * self.boxes(x), self.scores(x).sigmoid()
        return {"both": torch.cat([boxes, scores], 1), "boxes": boxes}


@pytest.mark.slow
def test_a_small_operand_of_a_concatenation_is_seen(tmp_path: Path) -> None:
    module = Detector().eval()
    intake = take_in(module, input_shape=(6,))
    damaged = take_in(module, input_shape=(6,))
    with torch.no_grad():
        damaged.traced.tensor("scores.weight").neg_()
    path = tmp_path / "model.onnx"
    write_onnx(build_onnx(damaged.traced), path, {})
    x = torch.randn(40, 6)
    found = float_distance(intake, path, (x,), "noise")
    (got, _) = run_session(open_session(path, "ORT_ENABLE_ALL"), [(x,)])
    with torch.no_grad():
        wanted = module(x)["both"]
    both, boxes = found.outputs
    assert (both.name, boxes.name) == ("both", "boxes")
    assert both.relative_l2 == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
    assert both.relative_l2 < 0.01, "the sum of all says nothing of the scores"
    assert both.worst_operand == "scores, 4 to 6 of dimension 1"
    scores = float((got - wanted)[:, 4:].norm() / wanted[:, 4:].norm())
    assert scores > 0.1
    assert both.worst_operand_relative_l2 == pytest.approx(scores, rel=1e-4)
    rows = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert both.worst_sample == int(rows.argmax())
    assert both.worst_relative_l2 == pytest.approx(float(rows.max()), rel=1e-3)
    assert boxes.relative_l2 < 1e-5
    assert boxes.cosine == pytest.approx(1)
    assert boxes.worst_operand is None
    first, second = float_distance_lines(found)
    assert "output both: relative L2 " in first
    assert "of its parts scores, 4 to 6 of dimension 1 (" in first
    assert "of its parts" not in second


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(2, 3, 1), nn.Conv1d(2, 4, 1), nn.Conv1d(2, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cat([self.a(x), self.b(x)], 1), torch.relu(self.c(x))], 1).permute(2, 0, 1)


def test_parts_are_found_through_concatenations_of_concatenations_and_permutations() -> None:
    (output,) = trace(Turned().eval(), (torch.randn(2, 2, 7),), fixed=True).outputs()
    assert final_operands(output) == (2, [("a", 3), ("b", 4), ("c", 5)])


@pytest.mark.slow
def test_it_is_in_the_report_without_labels_and_the_export_check_cannot_show_it(
    tmp_path: Path, compress_quickly: Callable[..., TracedModel]
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    nothing = torch.zeros(64, 6)
    real = torch.randn(64, 6)
    report = api.quantize(module, calib=nothing, eval_data=(real, torch.zeros(64, dtype=torch.int64)), bits=8).report
    assert report.export_check.failures == ()
    assert report.export_check.relative_l2_optimized < 0.05
    assert report.float_distance is not None
    assert report.float_distance.samples == 64
    assert report.float_distance.outputs[0].relative_l2 > 0.3
    (warning,) = report.warnings
    assert warning == ("WARNING: 64 of 64 samples are constant, the same value at every place: check what made them")
    good = api.quantize(module, calib=real, bits=8).report
    assert good.float_distance is not None
    assert good.float_distance.outputs[0].relative_l2 < 0.03
    assert good.float_distance.outputs[0].cosine > 0.999
    assert good.warnings == ()
