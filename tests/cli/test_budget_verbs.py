"""Budgets on the command line: plans found, written, edited and carried out; what is refused, and how."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.conftest import Forks, command, environment, populate  # type: ignore[import-not-found]
from tests.every import every

QUICK = ("--method", "mse", "--sensitivity-samples", 64, "--weight-widths", "2,4,8")
DATA = ("--calib", "calib.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of four layers, 1 to 16 to 32 channels, with data."""
    place = populate(tmp_path_factory.mktemp("budgets"))
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
    ).eval()  # fmt: skip
    torch.save(module, place / "model.pt")
    with np.load(place / "test.npz") as stored, torch.no_grad():
        x = stored["x"]
        np.savez(place / "test.npz", x=x, y=module(torch.from_numpy(x)).argmax(1).numpy())
    return place


def good(forks: Forks, folder: Path, *arguments: object) -> str:
    run = forks.run(folder, *arguments)
    assert run.returncode == 0, run.stderr
    return str(run.stdout)


@pytest.fixture(scope="module")
def plan(forks: Forks, folder: Path) -> Path:
    """The plan of a size budget, printed as a person sees it."""
    text = good(forks, folder, "allocate", "model.pt", *DATA, *QUICK, "--budget", "size=0.22x", "-o", "plan.json")
    assert "proven optimal" in text
    assert "x the float model's" in text
    return folder / "plan.json"


@pytest.mark.slow
def test_a_plan_holds_its_budget_and_its_certificate(plan: Path) -> None:
    stored = json.loads(plan.read_text())
    allocation = stored["allocation"]
    assert allocation["status"] == "optimal"
    assert allocation["bound"] <= allocation["value"] + 1e-12
    assert allocation["measured"]["size"] <= 0.22 * allocation["float_totals"]["size"]
    assert allocation["predicted"]["error"] == pytest.approx(sum(each["error"] for each in allocation["chosen"]))
    assert len({choice["option"]["bits"] for choice in stored["choices"]}) > 1


@pytest.mark.slow
def test_apply_gives_what_quantize_with_the_budget_gives(forks: Forks, folder: Path, plan: Path) -> None:
    text = good(
        forks,
        folder,
        "quantize",
        "model.pt",
        *DATA,
        *QUICK,
        "--budget",
        "size=0.22x",
        "--eval",
        "test.npz",
        "-o",
        "at-once",
    )
    assert "Plan's size" in text
    assert "measured" in text
    good(forks, folder, "apply", "plan.json", "model.pt", *DATA, "--eval", "test.npz", "--bench", "-o", "applied")
    for name in ("model.onnx", "model.safetensors", "graph.json"):
        assert (folder / "at-once" / name).read_bytes() == (folder / "applied" / name).read_bytes(), name
    report = json.loads((folder / "applied" / "report.json").read_text())
    limit = 0.22 * report["plan"]["allocation"]["float_totals"]["size"]
    assert (folder / "applied" / "model.onnx").stat().st_size <= limit + 1000  # metadata
    assert set(report["measured"]) == {"size", "latency", "error", "drop"}
    assert not (folder / ".at-once.plan.json").exists()


@pytest.mark.slow
def test_an_edited_plan_is_carried_out_as_edited(forks: Forks, folder: Path, plan: Path) -> None:
    content = json.loads(plan.read_text())
    layer = content["choices"][1]["layer"]
    content["choices"][1]["option"]["bits"] = 7
    (folder / "edited.json").write_text(json.dumps(content))
    text = good(forks, folder, "apply", "edited.json", "model.pt", *DATA, "-o", "edited")
    assert "the plan was edited since it was found" in text
    assert "Certificate" not in text
    stored = json.loads((folder / "edited" / "plan.json").read_text())
    assert next(each for each in stored["choices"] if each["layer"] == layer)["option"]["bits"] == 7
    difference = good(forks, folder, "diff", "plan.json", "edited.json")
    assert "1 of 4 layers differ" in difference
    assert "W7A8" in difference
    rows = json.loads(good(forks, folder, "diff", "plan.json", "edited", "--json"))["layers"]
    assert [row["layer"] for row in rows if row["changed"]] == [layer]


@pytest.mark.slow
def test_sweep_writes_a_front_of_plans(forks: Forks, folder: Path, plan: Path) -> None:
    text = good(forks, folder, "sweep", "model.pt", *DATA, *QUICK, "--points", 3, "-o", "front")
    assert "Front over size" in text
    with open(folder / "front" / "front.csv") as file:
        rows = list(csv.DictReader(file))
    front = json.loads((folder / "front" / "front.json").read_text())
    assert [row["plan"] for row in rows] == [point["plan"] for point in front["points"]]
    errors = [float(row["predicted_error"]) for row in rows]
    sizes = [float(row["measured_size"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert every(float(row["greedy_error"]) >= float(row["predicted_error"]) * (1 - 1e-9) for row in rows)
    assert (folder / "front" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "front" / "front.svg").read_text()
    good(forks, folder, "diff", f"front/{rows[0]['plan']}", f"front/{rows[-1]['plan']}")
    run = forks.run(folder, "sweep", "model.pt", *DATA, *QUICK, "-o", "at-nothing", "--points", 1)
    assert (run.returncode, "needs at least 2" in run.stderr) == (2, True)


@pytest.mark.slow
def test_dry_run_shows_the_plan_and_writes_nothing(forks: Forks, folder: Path, plan: Path) -> None:
    before = set(folder.iterdir())
    text = good(forks, folder, "quantize", "model.pt", *DATA, *QUICK, "--budget", "size=0.22x", "--dry-run")
    assert "Certificate" in text
    assert "Nothing was written" in text
    assert set(folder.iterdir()) == before


@pytest.mark.slow
def test_latency_budget_is_kept_by_the_exported_file(forks: Forks, folder: Path) -> None:
    arguments = (
        "quantize",
        "model.pt",
        *DATA,
        *QUICK,
        "--budget",
        "latency=50x",  # which kernels are faster, and what else the machine does, is no matter here
        "--no-floats",
        "--top",
        2,
        "--bench",
        "-o",
        "timed",
        "--json",
    )
    report = json.loads(good(forks, folder, *arguments, "--latency-table", "table.json"))
    allocation = report["plan"]["allocation"]
    assert allocation["measured"]["latency"] <= 50 * allocation["float_totals"]["latency"]
    table = json.loads((folder / "table.json").read_text())
    assert {row["compute"] for row in table["operators"]} == {"float", "integer"}
    assert every(row["layer_us"] > 0 for row in table["operators"])
    table["environment"]["cpu"] = "another"
    (folder / "foreign.json").write_text(json.dumps(table))
    run = forks.run(folder, *arguments[:-3], "-o", "elsewhere", "--latency-table", "foreign.json")
    assert run.returncode == 2
    assert "foreign.json was measured with processor another" in run.stderr


@pytest.mark.matrix
def test_drop_is_kept_on_real_evaluations(forks: Forks, folder: Path, plan: Path) -> None:
    text = good(
        forks, folder, "quantize", "model.pt", *DATA, *QUICK, "--budget", "drop=100", "--eval", "test.npz", "-o", "drop"
    )
    assert "1 plans evaluated on the evaluation data" in text
    report = json.loads((folder / "drop" / "report.json").read_text())
    assert report["measured"]["drop"] <= 100
    allocation = report["plan"]["allocation"]
    assert allocation["objective"] == "size"
    assert allocation["value"] <= json.loads(plan.read_text())["allocation"]["predicted"]["size"]
    # Not everywhere: the smallest layers save less than the code that unpacks two bits takes.
    assert 2 in {choice["option"]["bits"] for choice in report["plan"]["choices"]}


REFUSED = {
    "no unit": (("--budget", "size=2"), 2, "size needs a unit"),
    "wrong unit": (("--budget", "latency=3MB"), 2, "'MB' is no unit of latency"),
    "unknown quantity": (("--budget", "energy=3J"), 2, "unknown quantity 'energy'; known: size, latency, drop, bops"),
    "untimed": (("--budget", "latency=5x", "--no-bench"), 2, "--no-bench leaves the finished file untimed"),
    "twice": (("--budget", "size=1MB,size=2MB"), 2, "size is limited twice"),
    "bits too": (("--budget", "size=0.2x", "--bits", 4), 2, "give either --bits"),
    "drop without data": (("--budget", "drop=0.5"), 2, "give labelled data with classes as --eval"),
    "solver": (("--budget", "size=0.2x", "--solver", "magic"), 2, "unknown solver 'magic'; known: highs, cbc"),
    "sensitivity": (("--budget", "size=0.2x", "--sensitivity", "magic"), 2, "unknown sensitivity 'magic'; known: kl"),
    "no labels": (("--budget", "size=0.2x", "--sensitivity", "loss"), 2, "needs calibration data with classes as"),
    "widths": (("--budget", "size=0.2x", "--weight-widths", "1,4"), 2, "--weight-widths 1: allowed are 2 to 8"),
    "out of reach": (("--budget", "size=1kB"), 3, "the smallest that can be reached is"),
    "contradictory": (("--budget", "size=0.3x,bops=0.0001x"), 3, "bops is limited to"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, forks: Forks, folder: Path) -> None:
    arguments, code, sentence = REFUSED[case]
    started = set(folder.iterdir())
    run = forks.run(folder, "quantize", "model.pt", *DATA, "--method", "mse", "-o", "never", *arguments)
    assert run.returncode == code, run.stderr
    assert sentence in run.stderr.replace("\n", " ")
    assert run.stderr.startswith("error:")
    assert "Traceback" not in run.stderr
    assert set(folder.iterdir()) == started


@pytest.mark.slow
def test_plans_that_do_not_fit_are_refused(forks: Forks, folder: Path, plan: Path) -> None:
    content = json.loads(plan.read_text())
    content["choices"][0]["layer"] = "nowhere"
    content["choices"][1]["format"] = "magic"
    (folder / "wrong.json").write_text(json.dumps(content))
    run = forks.run(folder, "apply", "wrong.json", "model.pt", *DATA, "-o", "never")
    assert run.returncode == 2
    assert "layer nowhere: the model has no layer of that name" in run.stderr
    assert "has no format 'magic'" in run.stderr
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), folder / "other.pt")
    run = forks.run(folder, "apply", "plan.json", "other.pt", *DATA, "-o", "never")
    assert (run.returncode, "the plan was made for another model" in run.stderr) == (2, True)
    (folder / "torn.json").write_text(plan.read_text()[:100])
    run = forks.run(folder, "apply", "torn.json", "model.pt", *DATA, "-o", "never")
    assert (run.returncode, "torn.json is not JSON" in run.stderr) == (2, True)
    run = forks.run(folder, "apply", "plan.json", "model.pt", "-o", "never")
    assert (run.returncode, "give them as --calib" in run.stderr.replace("\n", " ")) == (2, True)


@pytest.mark.matrix
def test_a_killed_run_keeps_its_sensitivities(forks: Forks, folder: Path, tmp_path: Path) -> None:
    arguments = ("allocate", "model.pt", *DATA, "--budget", "size=0.22x", "--sensitivity-iterations", 40)
    own = environment(folder) | {"COMPRESS_CACHE": str(tmp_path / "cache")}
    killed = subprocess.Popen(command(*arguments, "-o", tmp_path / "killed.json"), cwd=folder, env=own)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").glob("sensitivity-*/*.safetensors")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.json").exists()
    for name, cache in (("again", "cache"), ("fresh", "fresh")):
        variables = {"COMPRESS_CACHE": str(tmp_path / cache)}
        run = forks.run(folder, *arguments, "-o", tmp_path / f"{name}.json", variables=variables)
        assert run.returncode == 0, run.stderr
    plans = [json.loads((tmp_path / name).read_text()) for name in ("again.json", "fresh.json")]
    assert plans[0]["choices"] == plans[1]["choices"]
    errors = [[each["error"] for each in plan["allocation"]["chosen"]] for plan in plans]
    assert errors[0] == errors[1]
