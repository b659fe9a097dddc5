"""A finished folder timed in PyTorch, beside its own ONNX file, and what is said to run its layers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from compress import api
from compress.cli import bench as command
from compress.errors import InputError
from compress.measure.bench import BenchReport, Explanation, bench
from compress.records.layers import LayerRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    path = tmp_path_factory.mktemp("bench") / "out"
    api.quantize(module, calib=torch.randn(16, 64), bits=4, act_bits=None, group_size=32, method="mse", out=path)
    return path


@pytest.mark.matrix
def test_a_folder_beside_its_own_file(folder: Path) -> None:
    report = bench([folder / "model.onnx", folder], runs=3, batch_sizes=[1, 4], explain=True)
    assert [Path(row.model).name for row in report.rows] == ["model.onnx", "out"] * 2
    assert {tuple(row.shapes.values()) for row in report.rows[2:]} == {((4, 64),)}, "the same inputs for both"
    for row in report.rows:
        assert row.load_ms > 0
        assert row.peak_memory_bytes is not None
        assert row.device_memory_bytes is None, "nothing ran on a GPU"
    assert report.device == "cpu"
    assert [(each.batch, len(each.layers)) for each in report.explanations] == [(1, 2), (4, 2)]
    layer = report.explanations[1].layers[0]
    assert (layer.kernel, layer.rows, layer.inputs, layer.outputs) == ("reference", 4, 64, 64)
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.slow
def test_command_explains_for_a_gpu_that_is_not_here(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.bench)
    out = tmp_path / "out.json"
    arguments = [str(folder), "--runs", "2", "--no-memory", "--explain", "--capability", "9.0", "--json", str(out)]
    arguments += ["--dtype", "bfloat16"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    shown = " ".join(result.stdout.replace("│", " ").split())
    for text in (
        "what would run each layer on compute capability 9.0",
        "packed_linear packed_gemv 1 x 64 x 64 8 bits, groups of 32",
        "on cpu.",
    ):
        assert text in shown, text
    report = json.loads(out.read_text())
    assert report["dtype"] is None, "what was timed is the CPU's"
    layers = report["explanations"][0]["layers"]
    assert [layer["kernel"] for layer in layers] == ["packed_gemv", "packed_gemv"]


def test_layers_read_plainly() -> None:
    gpus = ("packed_gemv: only on GPUs, not on cpu", "packed_dot: only on GPUs, not on cpu")
    rows = [
        ("first", "linear", "reference", 4, 144, 0, gpus),
        ("pair", "lowrank_linear", "thin_gemv", None, None, 16, ()),
        ("branch", "packed_lowrank_linear", "packed_gemv", 3, 48, 16, ()),
        ("table", "embedding", "torch", 8, 32, 0, ("no kernel takes embedding weights in codes: they are unpacked",)),
        ("head", "linear", "torch", None, None, 0, ("its weight is stored as floats",)),
    ]
    fields = ("layer", "operator", "kernel", "bits", "group_size", "rank", "refused")
    layers = tuple(LayerRun(**dict(zip(fields, row, strict=True)), rows=1, inputs=144, outputs=32) for row in rows)
    out = io.StringIO()
    table = command.layer_table(Explanation(model="model", batch=1, layers=layers), "model")
    Console(width=200, file=out).print(table)
    shown = [" ".join(line.split("│")[2:-1]).split() for line in out.getvalue().splitlines()]
    for wanted in (
        "linear PyTorch 1 x 144 x 32 4 bits, one scale an output packed_gemv, packed_dot: only on GPUs, not on cpu",
        "lowrank_linear thin_gemv 1 x 144 x 32 factors of rank 16",
        "packed_lowrank_linear packed_gemv 1 x 144 x 32 3 bits, groups of 48, and a branch of rank 16",
        "embedding PyTorch 1 x 144 x 32 8 bits, one scale a row no kernel takes embedding weights in codes: they are "
        "unpacked",
        "linear PyTorch 1 x 144 x 32 floats its weight is stored as floats",
    ):
        assert wanted.split() in shown, wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "on the CPU an artifact runs as it was written"),
        ({"dtype": "int8"}, "dtype 'int8': packed linears multiply in float16 or bfloat16"),
        ({"device": "tpu"}, "give cpu, cuda or cuda:1"),
        ({"capability": (9, 0)}, "it goes with --explain"),
        ({"batch_sizes": [0]}, "batch 0: 0 was given"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench([folder], runs=2, memory=False, **options)  # type: ignore[arg-type]


def test_options_of_folders_without_one(folder: Path) -> None:
    with pytest.raises(InputError, match="--device and --explain: for folders that `compress quantize` has written"):
        bench([folder / "model.onnx"], runs=2, device="cuda", explain=True)


@pytest.mark.slow
def test_inputs_that_the_model_does_not_take(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layer(nn.functional.one_hot(ids, 8).float())

    api.quantize(Fixed().eval(), calib=torch.randint(0, 8, (4, 3)), method="mse", out=tmp_path / "out")
    assert bench([tmp_path / "out"], runs=2, memory=False, dims={"sequence": 5}).rows[0].shapes == {"ids": (1, 5)}


@pytest.mark.parametrize("text", ["9", "x.y", "9.", ""])
def test_capability_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match=r"expected a GPU's compute capability, as in 8\.0 or 9\.0"):
        command.parse_capability(text)


def test_a_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "family.json").write_text("{}")
    with pytest.raises(InputError, match="a low-rank family has many sizes"):
        bench([tmp_path], runs=2, memory=False)
