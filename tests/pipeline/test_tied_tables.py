"""An embedding and a linear with one weight: stored once, read by both as the same codes, whatever runs the linear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import compress
from tests.networks import Language

WORDS, WIDTH = 70, 32


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("width", "group"), [(40, 32), (32, 64)])
def test_rows_that_end_within_a_group(width: int, group: int, tmp_path: Path) -> None:
    module, ids = Language(WORDS, width).eval(), torch.randint(0, WORDS, (24, 9))
    settings = {"bits": 4, "first_last_bits": 4, "group_size": group, "method": "mse"}
    report = compress.quantize(module, calib=ids, out=tmp_path / "out", **settings).report  # type: ignore[arg-type]
    assert {str(choice.format) for choice in report.plan.choices} == {"matmul-nbits"}
    assert report.export_check.relative_l2_optimized < 0.02


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("settings", "lookup"),
    [
        ({"bits": 8, "method": "mse"}, "Gather"),
        ({"bits": 4, "first_last_bits": 4, "method": "gptq"}, "Gather"),
        ({"bits": 8, "dynamic": True, "method": "mse"}, "Gather"),
        ({"bits": 4, "first_last_bits": 4, "group_size": 16}, "GatherBlockQuantized"),
    ],
    ids=["static 8", "static 4", "dynamic 8", "groups of 4"],
)
def test_stored_once_and_looked_up_in_codes(settings: dict[str, object], lookup: str, tmp_path: Path) -> None:
    ids = torch.randint(0, WORDS, (32, 9))
    module = Language(WORDS, WIDTH).eval()
    report = compress.quantize(module, calib=ids, out=tmp_path / "out", **settings).report  # type: ignore[arg-type]
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert lookup in {node.op_type for node in graph.node}
    tables = [each for each in graph.initializer if np.prod(each.dims) * 8 >= WORDS * WIDTH * int(settings["bits"])]  # type: ignore[call-overload]
    assert len(tables) == 1
    assert tables[0].data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    assert [row.name for row in report.layers] == ["middle", "head"]
    # The head's codes are those that every layer before it was calibrated behind: no method may change them after.
    learned = settings.get("method") != "mse"
    assert ("its weight is an embedding's table, too" in str(report.layers[1].note)) == learned
    loaded = compress.load(tmp_path / "out")
    with torch.no_grad():
        wanted, got = module(ids), loaded(ids)
    assert float((got - wanted).norm() / wanted.norm()) < (0.03 if settings["bits"] == 8 else 0.35)
