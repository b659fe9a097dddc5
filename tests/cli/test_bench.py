"""``compress bench`` as a command: options, table, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner

from compress.cli import bench as command
from compress.errors import InputError
from compress.measure.bench import BenchReport, BenchRow, Ratio


def relu(path: Path, side: int | str = 4) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", side]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_imports_nothing_heavy() -> None:
    code = "import sys, compress.cli.bench; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torch", "onnxruntime", "numpy", "onnx"} & set(run.stdout.split())


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command.bench)
    return app


@pytest.mark.slow
def test_json_on_stdout_is_alone_there(tmp_path: Path, app: typer.Typer) -> None:
    arguments = [
        str(relu(tmp_path / "a.onnx")),
        "--json",
        "-",
        "--runs",
        "3",
        "--no-memory",
        "--batch",
        "1",
        "--batch",
        "4",
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert [row["batch"] for row in json.loads(result.stdout)["rows"]] == [1, 4]
    assert result.stderr == ""


@pytest.mark.slow
def test_table_and_json_file(tmp_path: Path, app: typer.Typer) -> None:
    a, b, out = relu(tmp_path / "a.onnx"), relu(tmp_path / "b.onnx", "side"), tmp_path / "out.json"
    arguments = [str(a), str(b), "--dim", "side=4", "--runs", "3", "--json", str(out), "--no-memory"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    for text in ("batch 1, 3 runs each", "P99.9, ms", "a.onnx", "b.onnx takes", "95 % interval", "1 thread, "):
        assert text in " ".join(result.stdout.split()), text
    assert "peak memory" not in result.stdout
    assert len(BenchReport.model_validate_json(out.read_text()).rows) == 2


@pytest.mark.slow
def test_unwritable_json_is_refused_before_any_run(tmp_path: Path, app: typer.Typer) -> None:
    arguments = ["none.onnx", "--json", str(tmp_path / "no" / "out.json")]
    with pytest.raises(InputError, match=r"the folder .*no does not exist"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(InputError, match=r"cannot write .*: Is a directory; name another file in --json"):
        CliRunner().invoke(
            app,
            [str(relu(tmp_path / "a.onnx")), "--runs", "1", "--no-memory", "--json", str(tmp_path)],
            catch_exceptions=False,
        )


@pytest.mark.parametrize("text", ["seq", "=4", "seq=", "seq=x", "seq=-1"])
def test_dim_that_is_no_name_and_number(text: str) -> None:
    with pytest.raises(InputError, match="expected NAME=VALUE"):
        command.parse_dims([text])


def test_dims() -> None:
    assert command.parse_dims(["seq=128", "ids:1=16", "past + 1=2"]) == {"seq": 128, "ids:1": 16, "past + 1": 2}
    with pytest.raises(InputError, match="seq has the value 1 already"):
        command.parse_dims(["seq=1", "seq=2"])


def row(model: str, ratio: Ratio | None = None) -> BenchRow:
    return BenchRow.model_construct(model=model, batch=1, ratio=ratio)


def test_files_of_one_name_keep_their_paths() -> None:
    rows = tuple(row(path) for path in ("one/model.onnx", "two/model.onnx", "two/b.onnx", "one/model.onnx"))
    labels = command.model_labels(BenchReport.model_construct(rows=rows))
    assert labels == {"one/model.onnx": "one/model.onnx", "two/model.onnx": "two/model.onnx", "two/b.onnx": "b.onnx"}


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        ((0.4, 0.39, 0.41), "b takes 0.400 of the time of a (95 % interval 0.390 to 0.410): 2.50 times as fast."),
        ((1.5, 1.4, 1.6), ": 1.50 times as slow."),
        ((1.01, 0.98, 1.04), ": no difference that these runs can tell."),
        ((1.02, 1.01, 1.03), ": no difference that can be told from one file opened twice (3%)."),
        ((0.02, 0.0196, 0.0204), "takes 0.0200 of the time of a (95 % interval 0.0196 to 0.0204)"),
    ],
    ids=["faster", "slower", "same", "too close", "tiny"],
)
def test_comparison_in_words(ratio: tuple[float, float, float], sentence: str) -> None:
    value, low, high = ratio
    assert sentence in command.comparison(row("b", Ratio(value=value, low=low, high=high)), "b", "a")
