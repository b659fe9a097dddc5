"""``compress lowrank`` as a user runs it: train, truncate, extract, quantize what comes out, and a killed training."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.training.lowrank.family import read_family
from tests.cli.conftest import Forks, command, environment  # type: ignore[import-not-found]
from tests.every import every


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 12 to 48 to 48 to 3 numbers, with labelled samples."""
    place = tmp_path_factory.mktemp("lowrank")
    torch.manual_seed(0)
    layers = (nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
    torch.save(nn.Sequential(*layers).eval(), place / "model.pt")
    x = np.random.default_rng(0).standard_normal((512, 12), np.float32)
    y = (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5)
    np.savez(place / "train.npz", x=x, y=y)
    np.savez(place / "calib.npz", x=x)
    return place


TRAIN = ("lowrank", "train", "model.pt", "--data", "train.npz", "--test", "train.npz", "--lr", 0.1, "--batch", 32)


@pytest.mark.slow
def test_from_training_to_a_quantized_member(forks: Forks, folder: Path) -> None:
    run = forks.run(folder, *TRAIN, "--epochs", 12, "--smallest", 0.2, "-o", "small")
    assert run.returncode == 0, run.stderr
    assert "accuracy" in run.stdout
    assert "compress lowrank extract small" in run.stdout
    assert sorted(each.name for each in (folder / "small").iterdir()) == [
        "family.json", "family.png", "family.pt", "model.pt", "norms.safetensors",
    ]  # fmt: skip
    family = json.loads((folder / "small" / "family.json").read_text())
    assert family["members"][0]["metric"] > 0.9
    run = forks.run(folder, "lowrank", "extract", "small", "--budget", "macs=0.5x", "-o", "half.pt")
    assert run.returncode == 0, run.stderr
    assert "Written to half.pt" in run.stdout
    run = forks.run(
        folder, "quantize", "half.pt", "--bits", 8, "--calib", "calib.npz", "--eval", "train.npz", "--method", "mse",
        "-o", "half-w8a8", "--json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    wanted = next(each for each in family["members"] if each["macs"] <= 0.5 * family["dense_macs"])
    assert abs(report["metric"]["float_model"] - wanted["metric"]) < 1e-9
    assert report["metric"]["compressed_onnx"] > wanted["metric"] - 0.03


@pytest.mark.slow
def test_truncation_without_training(forks: Forks, folder: Path) -> None:
    run = forks.run(folder, "lowrank", "truncate", "model.pt", "--calib", "calib.npz", "-o", "cut", "-q")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (folder / "cut" / "family.pt").exists()


@pytest.mark.matrix
def test_ranks_by_a_rule_instead_of_a_search(forks: Forks, folder: Path) -> None:
    cut = ("lowrank", "truncate", "model.pt", "--calib", "calib.npz", "-q")
    run = forks.run(folder, *cut, "--energy", 0.9, "--unrolling", "channel", "-o", "ruled")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    whole, member = json.loads((folder / "ruled" / "family.json").read_text())["members"]
    assert member["macs"] < whole["macs"]
    assert every(member["ranks"][name] <= rank for name, rank in whole["ranks"].items())


REFUSED = {
    "no labels": (("train", "model.pt", "--data", "calib.npz", "-o", "never"), "labels"),
    "sampler": (
        ("train", "model.pt", "--data", "train.npz", "--sampler", "magic", "-o", "never"),
        "known: pair, in",
    ),
    "penalty": (("train", "model.pt", "--data", "train.npz", "--penalty", "-1", "-o", "never"), "neither is below 0"),
    "rules": (
        ("truncate", "model.pt", "--calib", "calib.npz", "--energy", "0.9", "--threshold", "0.1", "-o", "never"),
        "one rule is needed",
    ),
    "unrolling": (
        ("truncate", "model.pt", "--calib", "calib.npz", "--unrolling", "both", "-o", "never"),
        "known are best, channel, spatial",
    ),
    "no family": (("extract", ".", "--budget", "macs=0.5x", "-o", "x.pt"), "has no family.pt"),
    "no limit": (("extract", "small", "-o", "x.pt"), "give a --budget: macs=0.5x"),
    "limit": (("extract", "small", "--budget", "macs=half", "-o", "x.pt"), "write a quantity, a number and a unit"),
    "unit": (("extract", "small", "--budget", "bops=1G", "-o", "x.pt"), "known: size, latency, drop, macs"),
    "threads": (("extract", "small", "--budget", "latency=1ms", "--threads", "0", "-o", "x.pt"), "--threads 0: at"),
    "written": (("extract", "small", "--budget", "macs=0.5x", "-o", "model.pt"), "model.pt exists already"),
    "existing": (("truncate", "model.pt", "--calib", "calib.npz", "-o", "small"), "small exists already"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, forks: Forks, folder: Path) -> None:
    if not (folder / "small").exists():
        forks.run(folder, "lowrank", "truncate", "model.pt", "--calib", "calib.npz", "-o", "small", "-q")
    arguments, sentence = REFUSED[case]
    before = sorted(each.name for each in folder.iterdir())
    run = forks.run(folder, "lowrank", *arguments)
    assert run.returncode == 2, run.stderr
    assert sentence in run.stderr
    assert run.stderr.startswith("error:")
    assert sorted(each.name for each in folder.iterdir()) == before


@pytest.mark.matrix
def test_a_latency_budget_is_measured_once_and_drawn(forks: Forks, folder: Path) -> None:
    arguments = ("--calib", "train.npz", "--test", "train.npz", "--smallest", 0.3, "--search", "program")
    assert forks.run(folder, "lowrank", "truncate", "model.pt", *arguments, "-o", "timed", "-q").returncode == 0
    cut = ("lowrank", "extract", "timed", "--overwrite", "-o", "fast.pt", "--budget")
    run = forks.run(folder, *cut, "latency=50x,macs=0.6x")
    assert run.returncode == 0, run.stderr
    assert "ms (" in run.stdout
    assert "kB of weights" in run.stdout
    run = forks.run(folder, *cut, "latency=0.001us")
    assert run.returncode == 3, run.stderr
    assert "the smallest that a member reaches is" in run.stderr
    run = forks.run(folder, "lowrank", "plot", "timed")  # the infeasible budget has made it time all
    assert run.returncode == 0, run.stderr
    assert " 0 of them timed now" in run.stdout
    assert (folder / "timed" / "latency.png").stat().st_size > 5000


@pytest.mark.matrix
def test_a_killed_training_goes_on_to_the_same_numbers(forks: Forks, folder: Path) -> None:
    arguments = (*TRAIN, "--epochs", 10)
    assert forks.run(folder, *arguments, "-o", "whole", "-q").returncode == 0
    process = subprocess.Popen(command(*arguments, "-o", "killed", "-q"), cwd=folder, env=environment(folder))
    deadline = time.monotonic() + 120
    while not (folder / ".killed.work" / "checkpoint.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed").exists()
    assert forks.run(folder, *arguments, "-o", "killed", "-q").returncode == 0
    modules = [read_family(folder / each)[0] for each in ("whole", "killed")]
    states = [module.state_dict() for module in modules]
    assert states[0].keys() == states[1].keys()
    assert every(torch.equal(states[0][name], states[1][name]) for name in states[0])
    first, second = ((folder / each / "norms.safetensors").read_bytes() for each in ("whole", "killed"))
    assert first == second
    members = [json.loads((folder / each / "family.json").read_text())["members"] for each in ("whole", "killed")]
    assert members[0] == members[1]


@pytest.mark.slow
def test_a_family_of_a_class_of_ones_own(forks: Forks, folder: Path) -> None:
    (folder / "own.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.f = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 3))\n\n"
        "    def forward(self, x):\n        return self.f(x)\n\n\ndef make():\n    return Net()\n"
    )
    weights = {
        f"f.{name}": value
        for name, value in nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 3)).state_dict().items()
    }
    torch.save(weights, folder / "own.pt")
    run = forks.run(folder, "lowrank", "truncate", "own.pt", "--model", "own:make", "--calib", "calib.npz", "-o", "o")
    assert run.returncode == 0, run.stderr
    extract = ("lowrank", "extract", "o", "--budget", "macs=0.5x", "-o", "own-half.pt")
    refused = forks.run(folder, *extract)
    assert refused.returncode == 2
    assert "--allow own.Net" in refused.stderr
    run = forks.run(folder, *extract, "--allow", "own.Net")
    assert run.returncode == 0, run.stderr
    run = forks.run(folder, "inspect", "own-half.pt", "--allow", "own.Net")
    assert run.returncode == 0, run.stderr
