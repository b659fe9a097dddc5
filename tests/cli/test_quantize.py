"""``compress quantize`` from the shell: the happy path, and every way of printing or not printing."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.records.plan import Plan
from compress.records.report import Report
from tests.cli.conftest import Forks  # type: ignore[import-not-found]
from tests.every import every
from tests.forgery import forge_report

Run = Callable[..., subprocess.CompletedProcess[str]]
VERBS = ("quantize", "inspect", "export", "verify", "bench")
FILES = {"model.onnx", "model.safetensors", "base.safetensors", "graph.json", "plan.json", "report.json"}


@pytest.mark.slow
def test_help_is_there_at_once_and_without_torch(compress: Run, tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        before = processor_seconds()
        run = compress(tmp_path, "--help")
        seconds.append(processor_seconds() - before)
    assert run.returncode == 0
    assert every(verb in run.stdout for verb in VERBS)
    # Half a second of the processor at 2 GHz, whatever else it does; torch alone is three.
    assert min(seconds) < 2
    code = (
        "import sys; sys.argv = ['compress', '--help']\n"
        "from compress.cli.main import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'numpy', 'onnx'} & set(sys.modules)), 'end', file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stderr == "end\n"


def processor_seconds() -> float:
    """What the processes that tests have started took of the processor, those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(compress: Run, tmp_path: Path, verb: str) -> None:
    run = compress(tmp_path, verb, "--help")
    assert run.returncode == 0
    assert run.stderr == ""
    assert "Example:" in run.stdout
    assert f"compress {verb} " in run.stdout.partition("Example:")[2]


def test_version(compress: Run, tmp_path: Path) -> None:
    assert compress(tmp_path, "--version").stdout.startswith("compress 0.")


@pytest.mark.slow
def test_weights_and_a_factory_with_data_and_labels(forks: Forks, workplace: Path) -> None:
    run = forks.run(
        workplace, "quantize", "weights.th", "--model", "nets:make", "--bits", 4, "--calib", "calib.npz",
        "--eval", "test.npz", "--iterations", 10, "--bench", "--out", "full",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", "no warnings, and no bar off a terminal: lines of progress are left out"
    for text in (
        "W8A8",
        "W4A8",
        "Size: ",
        "Distance from the float model: relative L2 ",
        "Export check, file against quantized graph: ",
        "Latency (batch 1, 1 thread): ",
        "Accuracy on 80 samples: 100.00% float",
    ):
        assert text in run.stdout, text
    assert "input shape 1x8x8, from calib.npz" in run.stdout
    assert "Written to full/" in run.stdout
    assert "\x1b" not in run.stdout, "no colours off a terminal"
    assert {path.name for path in (workplace / "full").iterdir()} == FILES
    assert not (workplace / ".full.work").exists()
    assert list((workplace / "tmp").glob("compress-*")) == []


@pytest.mark.slow
def test_the_shortest_command_quantizes_the_weights(compress: Run, workplace: Path) -> None:
    run = compress(workplace, "quantize", "model.pt", "--bits", 4, "--no-bench")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "W4" in run.stdout
    assert "- latency was not measured: --no-bench" in run.stdout
    assert "Latency" not in run.stdout
    assert "found by trying: 1x28x28" in run.stdout
    assert "relative to the float weights" in run.stdout
    assert {path.name for path in (workplace / "model-w4").iterdir()} == FILES


@pytest.mark.slow
def test_json_is_the_report_and_nothing_else(forks: Forks, workplace: Path) -> None:
    run = forks.run(
        workplace, "quantize", "model.pt", "--calib", "calib.npz", "--method", "mse", "--json", "-o", "json"
    )
    assert run.returncode == 0, run.stderr
    report = Report.model_validate(json.loads(run.stdout))
    assert report == Report.model_validate_json((workplace / "json" / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-q", "--json"])
def test_warnings_are_seen_where_notes_are_not(forks: Forks, workplace: Path, how: str) -> None:
    np.savez(workplace / "few.npz", x=np.load(workplace / "calib.npz")["x"][:3])
    run = forks.run(workplace, "quantize", "model.pt", "--calib", "few.npz", "--method", "mse", how, "-o", f"few{how}")
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("WARNING: 3 samples, 192 rows in the layer in the middle, are few: give 32 samples")
    assert run.stderr.count("\n") == 1
    assert (run.stdout == "") == (how == "-q")


@pytest.mark.slow
def test_quiet_is_quiet(quiet_run: subprocess.CompletedProcess[str], workplace: Path) -> None:
    run = quiet_run
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (workplace / "quiet" / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(forks: Forks, workplace: Path, as_json: bool) -> None:
    before = sorted(workplace.rglob("*"))
    flags = ["--dry-run", "--json"] if as_json else ["--dry-run"]
    run = forks.run(workplace, "quantize", "model.pt", "--calib", "calib.npz", "--bits", 3, "-o", "dry", *flags)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert sorted(path for path in workplace.rglob("*") if path.suffix != ".pyc") == [
        path for path in before if path.suffix != ".pyc"
    ]
    if as_json:
        assert [choice.option.bits for choice in Plan.model_validate_json(run.stdout).choices] == [8, 3, 8]
    else:
        assert "W3A8" in run.stdout
        assert "Nothing was written." in run.stdout
        assert "Estimated: " in run.stdout


@pytest.mark.slow
def test_no_data_quantizes_the_weights_alone(forks: Forks, workplace: Path) -> None:
    shape = ("--input-shape", "1,8,8", "--dry-run")
    without, none = (
        forks.run(workplace, "quantize", "model.pt", "--bits", 4, *calib, *shape) for calib in ((), ("--calib", "none"))
    )
    assert none.returncode == 0, none.stderr
    assert "W4 " in none.stdout
    assert "W4A" not in none.stdout
    assert none.stdout.splitlines()[:-1] == without.stdout.splitlines()[:-1]  # the last line has an estimate of time


@pytest.mark.slow
def test_nothing_is_reported_to_anyone(quiet_run: subprocess.CompletedProcess[str], workplace: Path) -> None:
    # ONNX Runtime's builds leave the number of their reporting session in the folder for temporary files.
    assert quiet_run.returncode == 0
    assert [path.name for path in (workplace / "tmp").iterdir() if "torchinductor" not in path.name] == []


@pytest.mark.slow
def test_inspect_export_verify(forks: Forks, quiet_run: subprocess.CompletedProcess[str], workplace: Path) -> None:
    compress = forks.run
    assert quiet_run.returncode == 0
    shutil.copytree(workplace / "quiet", workplace / "checked")
    run = compress(workplace, "inspect", "model.pt", "--input-shape", "1,8,8", "--json")
    assert run.returncode == 0, run.stderr
    layers = json.loads(run.stdout)["layers"]
    assert [(layer["name"], layer["macs"]) for layer in layers] == [("0", 9216), ("3", 147456), ("7", 48)]
    run = compress(workplace, "export", "model.pt", "--input-shape", "1,8,8", "--out", "float.onnx")
    assert run.returncode == 0, run.stderr
    assert "Written to float.onnx" in run.stdout
    assert run.stderr == ""
    run = compress(workplace, "verify", "checked", "--data", "calib.npz")
    assert (run.returncode, run.stderr) == (0, "")
    assert "checked passed: relative L2" in run.stdout
    (workplace / "checked" / "model.onnx").write_bytes((workplace / "float.onnx").read_bytes())
    run = compress(workplace, "verify", "checked", "--data", "calib.npz")
    assert run.returncode == 2
    assert "model.onnx is damaged, or was replaced" in run.stderr
    forge_report(workplace / "checked")
    run = compress(workplace, "verify", "checked", "--data", "calib.npz")
    assert run.returncode == 4
    assert run.stdout == ""
    assert run.stderr.startswith("error: checked did not pass the gate: ")
    assert run.stderr.count("\n") == 1
