"""``compress distill`` as a user runs it: a set that ``--calib`` takes, Ctrl-C and on, refusals with exit code 2."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Forks, command, complaints, environment  # type: ignore[import-not-found]

SMALL = ("--width", 4, "--depth", 1, "--experts", 2, "--expert-epochs", 3, "--expert-batch", 8, "--expert-lr", 0.05)
ARGUMENTS = ("--classes", 3, "--ipc", 2, *SMALL, "--steps", 4, "--start-epochs", 2, "--augment", "crop")


@pytest.fixture(scope="module")
def folder(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.npz``: images of bars in three classes, of the shape that ``model.pt`` takes."""
    place = Path(shutil.copytree(workplace, tmp_path_factory.mktemp("distill") / "place"))
    labels = np.arange(60) % 3
    images = 0.5 * np.random.default_rng(0).standard_normal((60, 1, 8, 8)).astype(np.float32)
    for number in range(3):
        images[labels == number, :, 2 * number : 2 * number + 3] += 1
    np.savez(place / "train.npz", images=images, labels=labels)
    return place


@pytest.mark.slow
def test_distilled_images_calibrate(forks: Forks, folder: Path) -> None:
    more = ("--iterations", 20, "--looks", 0, "--model", "model.pt", "--allow-poor-model", "-o", "small")
    run = forks.run(folder, "distill", "train.npz", *ARGUMENTS, *more)
    assert run.returncode == 0, run.stderr
    assert "Written to small: 6 images, step size" in run.stdout
    assert "(the learned one)." in run.stdout
    assert " seconds per 100 iterations" in run.stdout
    assert "Nearest real images: at " in run.stdout
    assert run.stderr.startswith("the model gives ")  # at once, and not after an hour
    refused = forks.run(folder, "distill", "train.npz", *ARGUMENTS, "--model", "model.pt", "-o", "other")
    assert refused.returncode == 2
    assert "--model: the model gives 33.3 % of the real images their label" in refused.stderr
    report = json.loads((folder / "small" / "distill.json").read_text())
    assert len(report["losses"]) == 20
    assert len(report["neighbours"]["distances"]) == 6
    arguments = ("quantize", "model.pt", "--calib", "small/distilled.npz", "--method", "mse", "--dry-run")
    calibrated = forks.run(folder, *arguments)
    assert calibrated.returncode == 0, calibrated.stderr

    again = forks.run(folder, "distill", "train.npz", *ARGUMENTS, *more)
    assert again.returncode == 2
    assert "small exists already" in again.stderr
    told = forks.run(folder, "distill", "train.npz", *ARGUMENTS, *more, "--overwrite", "--json")
    assert json.loads(told.stdout)["provenance"] == report["provenance"]


@pytest.mark.matrix
def test_real_images_are_loud(forks: Forks, folder: Path) -> None:
    arguments = (
        "distill",
        "train.npz",
        *ARGUMENTS,
        "--iterations",
        2,
        "--lr-images",
        1e30,
        "--hold-out",
        0,
        "-o",
        "real",
    )
    refused = forks.run(folder, *arguments)
    assert refused.returncode == 2
    assert "no iterate was better than the 6 real images of the start" in refused.stderr
    assert not (folder / "real").exists()
    quiet = forks.run(folder, *arguments, "--allow-originals", "-q")
    assert (quiet.returncode, quiet.stdout) == (0, "")
    warning = "WARNING: the 6 images written are real ones: no iterate was better; treat this file like the originals\n"
    assert quiet.stderr == warning
    told = forks.run(folder, *arguments, "--allow-originals", "--overwrite")
    assert warning in told.stderr
    assert "step size 0.01 (a usual one; networks became no better with the learned one, " in told.stdout
    assert "Written to real: 6 real images, none distilled, step size" in told.stdout
    assert ", of 54 images the experts were trained on; kept is 0" in told.stdout
    unseen = forks.run(folder, *arguments[:-4], "--allow-originals", "-o", "unseen")
    assert ", of 12 images held out from the experts; kept is 0" in unseen.stdout


@pytest.mark.slow
def test_dry_run_writes_nothing(forks: Forks, folder: Path) -> None:
    arguments = ("distill", "train.npz", *ARGUMENTS, "--dry-run", "-o", "dry", "--expert-folder", "dry-experts")
    run = forks.run(folder, *arguments)
    assert run.returncode == 0, run.stderr
    assert "Experts: 2 of 3 epochs of 6 steps, 0 there already; 0.0 MB in dry-experts" in run.stdout
    assert "Set: 6 images, 2 a class; 150 iterations of 4 steps, " in run.stdout
    assert " s each; judged 5 times on 12 images held out from the experts" in run.stdout
    assert "Estimated: " in run.stdout
    assert "(within a factor of two). Nothing was written." in run.stdout
    assert not list(folder.glob("*dry*"))
    assert json.loads(forks.run(folder, *arguments, "--json").stdout)["images"] == 48


@pytest.mark.matrix
def test_stopped_and_continued(forks: Forks, folder: Path) -> None:
    arguments = ("distill", "train.npz", *ARGUMENTS, "--iterations", 1500, "--looks", 0)
    process = subprocess.Popen(
        command(*arguments, "-o", "stopped"), cwd=folder, env=environment(folder), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    work, deadline = folder / ".stopped.work", time.monotonic() + 120
    while not (work / "preview.png").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert complaints(said) == "error: stopped; what is finished is kept, and the same command continues with it\n"
    assert not (folder / "stopped").exists()
    assert sorted(each.name for each in work.iterdir()) == ["preview.png", "state.safetensors"]

    refused = forks.run(folder, *arguments, "--seed", 1, "-o", "stopped")
    assert refused.returncode == 2
    assert "holds the state of another run; different: --seed (0 then, 1 now)" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--classes", 2), "labels go from 0 to 2; with --classes 2 they are 0 to 1"),
        (("--ipc", 21), "--ipc 21 images a class are asked for, and class 0 has 20"),
        (("--expert-lr", 1e-9), "expert 1 did not learn"),
        (("--augment", "blur"), "--augment blur: known are color, crop"),
        (("--depth", 4), "--depth 4: 8 x 8 pixels are 1 x 1 after 3 blocks"),
        (("--network", "nets:make"), "keeps running statistics"),
        (("--method", "mtt", "--balance"), "--balance: a part of AST, which --method mtt goes without; leave one out"),
        (("--method", "mtt", "--intermediate", "aggregate"), "--intermediate aggregate: a part of AST"),
        (("--method", "mtt", "--perturbation", 1.0), "--perturbation 1.0: a part of AST"),
        (("--method", "mtt", "--representative"), "--representative: a part of AST"),
    ],
)
def test_refusals(forks: Forks, folder: Path, change: tuple[object, ...], message: str) -> None:
    run = forks.run(folder, "distill", "train.npz", *ARGUMENTS, *change, "-o", "refused")
    assert run.returncode == 2
    assert message in run.stderr
    assert not (folder / "refused").exists()


@pytest.mark.matrix
def test_mtt_takes_asts_options_that_turn_parts_off(forks: Forks, folder: Path) -> None:
    off = ("--intermediate", "none", "--perturbation", 0, "--penalty", 0, "--no-balance", "--random")
    more = ("--method", "mtt", "--iterations", 1, "--looks", 0, "-o", "mtt")
    run = forks.run(folder, "distill", "train.npz", *ARGUMENTS, "--expert-lr", 0.005, *off, *more)
    assert run.returncode == 0, run.stderr


@pytest.mark.matrix
def test_trajectories_of_another_network(forks: Forks, folder: Path) -> None:
    arguments = ("distill", "train.npz", *ARGUMENTS, "--iterations", 1, "--looks", 0, "--expert-folder", "experts")
    assert forks.run(folder, *arguments, "-q", "-o", "first").returncode == 0
    run = forks.run(folder, *arguments, "--width", 5, "-o", "second")
    assert run.returncode == 2
    assert "expert-000.safetensors is a trajectory of another network" in run.stderr
