"""A finished folder, verified: against its graph value by value, and against what its report recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compress import api
from compress.errors import InputError
from compress.proof.gate import noise_distance
from compress.records.reading import read_report
from compress.records.report import ExportCheck
from compress.runtime.artifact import load_artifact
from tests.forgery import forge_report

pytestmark = pytest.mark.slow  # each looks at a finished folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("made") / "out"
    api.quantize(module.eval(), calib=images(), bits=8, method="mse", out=folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def images(count: int = 64) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def edit(folder: Path, **factors: float) -> None:
    """Multiply every tensor whose name ends so; as who forges the report's hashes, too."""
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        for suffix, factor in factors.items():
            if tensor.name.endswith(suffix):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
    onnx.save(model, folder / "model.onnx")
    forge_report(folder)


def verified(folder: Path, data: Tensor | None = None) -> ExportCheck:
    found = api.verify(folder, data=data)
    assert isinstance(found, ExportCheck)
    return found


def test_an_untouched_folder_passes_on_noise_and_on_samples(folder: Path) -> None:
    recorded = read_report(folder / "report.json").export_check
    check = verified(folder)
    assert check.failures == ()
    assert not any("compared value by value" in note for note in check.notes)
    assert recorded.relative_l2_noise == noise_distance(
        load_artifact(folder), folder / "model.onnx", 0, "CPUExecutionProvider"
    )
    assert max(check.relative_l2_optimized, check.relative_l2_unoptimized) == recorded.relative_l2_noise
    assert verified(folder, images()).failures == ()
    assert verified(folder, 1 - images(20)).failures == ()


def test_one_bit_of_one_code_is_found(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    (tensor,) = (each for each in model.graph.initializer if each.name == "2.weight_codes")
    codes = numpy_helper.to_array(tensor).copy()
    codes.reshape(-1)[1234] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(InputError, match="is damaged, or was replaced"):
        api.verify(folder)
    forge_report(folder)
    (failure, *others) = verified(folder).failures
    was = int(codes.reshape(-1)[1234]) ^ 1
    assert failure == (
        "2.weight_codes: 1 of 2,304 values are not those of the graph beside the file, the first at 1234: "
        f"{codes.reshape(-1)[1234]} in the file, {np.int8(was)} in the graph"
    )
    assert others == [], "no distance would have shown it"


def test_scales_that_are_a_little_larger_are_found_by_values_and_by_distance(folder: Path) -> None:
    edit(folder, weight_scale=1.03)
    recorded = read_report(folder / "report.json").export_check
    for data in (None, images()):
        check = verified(folder, data)
        assert check.relative_l2_optimized < 0.08, "what was allowed whatever the report says"
        assert any(each.startswith("0.weight_scale: 16 of 16 values") for each in check.failures)
        assert recorded.relative_l2_noise is not None
        allowed = (
            2 * (recorded.relative_l2_noise + 1e-3) if data is None else 4 * (recorded.relative_l2_optimized + 1e-3)
        )
        assert any(
            f"with all optimisations is {check.relative_l2_optimized:.2%} (relative L2) from the PyTorch graph; "
            f"allowed {allowed:.2%}" in each
            for each in check.failures
        ), check.failures


def test_many_tensors_are_counted(folder: Path) -> None:
    names = [each.name for each in onnx.load(folder / "model.onnx").graph.initializer if each.name.endswith("scale")]
    assert len(names) > 3
    edit(folder, scale=1.0001)
    assert f"and {len(names) - 3} more tensors are not those of the graph" in verified(folder).failures


def test_reports_of_older_schemas_are_read(folder: Path) -> None:
    path = folder / "report.json"
    content = json.loads(path.read_text())
    known = read_report(path)
    content["parity"] = content.pop("export_check")
    del content["float_distance"], content["parity"]["relative_l2_noise"]
    for version in (2, 1):
        content["schema_version"] = version
        if version == 1:
            del content["files"]
        path.write_text(json.dumps(content))
        found = read_report(path)
        assert found.export_check == known.export_check.model_copy(update={"relative_l2_noise": None})
        assert found.float_distance is None
    with pytest.raises(InputError, match="has no hashes of its files"):  # graph.json says that there were some
        api.verify(folder)
    forge_report(folder)
    assert verified(folder, images()).failures == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 4}, "has version 4; this program reads 1 to 3"),
        ({"schema_version": "new"}, "has version 'new'; this program reads 1 to 3"),
        ({"export_check": {}}, "report.json: export_check.samples: Field required; compress the model again"),
    ],
)
def test_reports_that_cannot_be_read(change: dict[str, object], said: str, folder: Path) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        read_report(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot be read .*; compress the model again"):
        read_report(path)
