"""A kit: timed by a process that has no compress, and read as the times of another machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import api
from compress.errors import InputError
from compress.measure import fastest_format
from compress.measure.kit import write_kit
from compress.measure.latency_table import LatencyTable
from compress.options import Source
from compress.quant.targets import find_target
from compress.records.plan import Plan
from compress.search import allocator, costs

pytestmark = pytest.mark.slow  # a kit is seven exports, and every plan four

CPU = find_target("onnx-cpu")
ROUNDS = 3  # nothing here depends on how exact the times are
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def net(hidden: int = 32) -> nn.Module:
    """Two convolutions and a linear, on images of 3 x 8 x 8."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, hidden, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit, in which a round is worth less than usual."""
    folder = tmp_path_factory.mktemp("kits") / "kit"
    write_kit(net(), folder, source=Source(input_shape=(3, 8, 8)), target=CPU, threads=1, batch=1, rows=4)
    kit = json.loads((folder / "kit.json").read_text())
    (folder / "kit.json").write_text(json.dumps({**kit, "rounds": ROUNDS}))
    return folder


def measure(folder: Path) -> subprocess.CompletedProcess[str]:
    """``python measure.py`` where nothing of ours can be imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-I", "measure.py"]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def measured(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "kit"
    shutil.copytree(written, folder)
    run = measure(folder)
    assert run.returncode == 0, run.stderr
    assert f"{ROUNDS} of {ROUNDS} rounds" in run.stdout
    return folder / "latency.json"


@pytest.fixture
def table(measured: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """``latency.json`` of a processor that is not this one, edited."""

    def edited(edit: Edit = lambda content: None) -> Path:
        content = json.loads(measured.read_text())
        content["environment"]["cpu"] = "Elbrus-8SV"
        edit(content)
        path = tmp_path / "latency.json"
        path.write_text(json.dumps(content))
        return path

    return edited


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be timed to find a plan fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(costs, "time_files", refuse)
    monkeypatch.setattr(costs, "time_operators", refuse)
    monkeypatch.setattr(allocator, "time_files", refuse)
    monkeypatch.setattr(fastest_format, "time_operators", refuse)


def planned(table: Path | None, module: nn.Module | None = None, **options: Any) -> Plan:
    settings = {
        "input_shape": (3, 8, 8),
        "sensitivity": "weight",
        "weight_widths": (4, 8),
        "method": "mse",
        "bench": True,
    }
    return api.allocate(
        module or net(), calib=torch.randn(8, 3, 8, 8), latency_table=str(table) if table else None,
        **{**settings, **options},
    )  # fmt: skip


def test_the_kit_measures_without_compress(measured: Path) -> None:
    found = LatencyTable.model_validate_json(measured.read_text())
    assert found.of_kit
    assert {row.compute for row in found.operators} >= {"float", "integer", "dynamic", "W4g32"}
    assert all(row.layer_us > 0 for row in found.operators)
    assert {each.kind for each in found.models} == {"float", "integer"}
    assert all(each.us > 0 for each in found.models)
    assert found.environment.onnxruntime
    assert found.environment.cpu in found.machine


def test_a_plan_for_another_machine(table: Callable[..., Path], clockless: None, tmp_path: Path) -> None:
    def faster(content: dict[str, Any]) -> None:
        for row in content["operators"]:
            row |= {"layer_us": 10.0 if row["compute"] == "integer" else 100.0, "enter_us": 1.0, "leave_us": 1.0}
        for model in content["models"]:
            model["us"] = 60.0 if model["kind"] == "integer" else 330.0

    path = tmp_path / "plan.json"
    plan = planned(table(faster), budgets=("latency=0.4x",), out=path)
    assert plan.allocation is not None
    assert plan.allocation.machine is not None
    assert plan.allocation.machine.startswith("Elbrus-8SV")
    assert plan.allocation.float_totals["latency"] == 330.0
    assert "latency" not in plan.allocation.measured
    assert any("nothing was timed on this machine" in note for note in plan.allocation.notes)
    assert {choice.format for choice in plan.choices} == {"integer"}
    kept = path.with_suffix(".latency.json")
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == plan.latency_sha256
    assert LatencyTable.model_validate_json(kept.read_text()).machine == plan.allocation.machine
    assert api.load_plan(path) == plan
    # What was kept is a table like the one given.
    assert planned(kept, budgets=("latency=0.4x",)).choices == plan.choices
    kept.write_text(kept.read_text().replace("Elbrus", "Baikal"))
    with pytest.raises(InputError, match=r"plan\.latency\.json is damaged, or not the table that plan\.json was made"):
        api.load_plan(path)


@pytest.mark.matrix
def test_where_integers_are_slow_there_layers_stay_float(table: Callable[..., Path], clockless: None) -> None:
    def slower(content: dict[str, Any]) -> None:
        for row in content["operators"]:
            row |= {"layer_us": 500.0 if row["compute"] == "integer" else 50.0, "enter_us": 1.0, "leave_us": 1.0}
        for model in content["models"]:
            model["us"] = 1600.0 if model["kind"] == "integer" else 170.0

    plan = planned(table(slower), budgets=("latency=1.1x", "size=0.9x"))
    assert {choice.option.act_bits for choice in plan.choices} == {None}


def test_rows_by_a_table(table: Callable[..., Path], clockless: None) -> None:
    plan = api.preview(
        net(), input_shape=(3, 8, 8), rows=4, bits=4, first_last_bits=4, latency_table=str(table())
    ).plan  # fmt: skip
    assert "fastest at 4 rows" in str(plan.choices[-1].reason)
    assert plan.latency_sha256
    with pytest.raises(InputError, match=r"is of other operators: it has no time of linear 10x32 on 5x32 bias \(float"):
        api.preview(net(), input_shape=(3, 8, 8), rows=5, bits=4, latency_table=str(table()))


@pytest.mark.matrix
def test_other_operators_are_refused_by_name(table: Callable[..., Path], clockless: None) -> None:
    with pytest.raises(InputError, match=r"is of other operators: it has no time of conv2d 48x16x3x3 .* and \d+ more"):
        planned(table(), net(48), budgets=("latency=1x",))
    with pytest.raises(InputError, match=r"it has no time of this model as a whole \(float\)"):
        planned(table(lambda content: content["models"].clear()), budgets=("latency=1x",))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("name", "value"), [("onnxruntime", "0.1.2"), ("threads", 7)])
def test_other_conditions_are_refused(name: str, value: object, table: Callable[..., Path]) -> None:
    def edit(content: dict[str, Any]) -> None:
        place = content["environment"] if name == "onnxruntime" else content
        place[name] = value

    with pytest.raises(InputError, match=f"was measured with {name} {value}; this run has .*bench --kit"):
        planned(table(edit), budgets=("latency=1x",))


def test_measure_refuses_another_onnxruntime_and_damage(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kit"
    shutil.copytree(written, folder)
    kit = json.loads((folder / "kit.json").read_text())
    (folder / "kit.json").write_text(json.dumps({**kit, "onnxruntime": "0.1.2"}))
    run = measure(folder)
    assert (run.returncode, "the kit is for onnxruntime 0.1.2" in run.stderr) == (2, True)
    (folder / "kit.json").write_text(json.dumps(kit))
    (folder / "integer.onnx").write_bytes(b"\0")
    run = measure(folder)
    assert (run.returncode, "integer.onnx is missing or damaged" in run.stderr) == (2, True)
    assert not (folder / "latency.json").exists()


@pytest.mark.matrix
def test_nothing_is_timed_without_being_asked(clockless: None) -> None:
    assert planned(None, budgets=("size=0.5x",)).latency_sha256 is None
    plan = api.preview(net(), calib=torch.randn(8, 3, 8, 8), bits=4, method="mse").plan
    assert plan.latency_sha256 is None
    with pytest.raises(AssertionError, match="timed"):
        planned(None, budgets=("latency=1x",))


def test_a_folder_that_is_no_kit_stays(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a folder that `compress bench --kit` has written"):
        write_kit(net(), tmp_path / "kit", source=Source(input_shape=(3, 8, 8)), target=CPU, threads=1, batch=1,
                  overwrite=True)  # fmt: skip
    assert (tmp_path / "kit" / "mine.txt").exists()
