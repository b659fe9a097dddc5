"""Ctrl-C and kill -9: nothing looks finished, and the same command goes on to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.conftest import Forks, command, complaints, environment  # type: ignore[import-not-found]
from tests.every import every
from tests.sweep import sweep

# ``python -m compress``, which says when it has begun: Python itself takes its time, too, and is not ours.
START = """
import os, sys
sys.path[:] = os.environ["SITE"].split(os.pathsep)
print("begun", flush=True)
from compress.__main__ import main
main()
"""
LAYERS = 6
SAME = ("model.onnx", "model.safetensors", "graph.json", "plan.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """Model, data, and ``whole``: what a run gives that nothing happened to."""
    place = tmp_path_factory.mktemp("interruption")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS - 1):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    torch.save(nn.Sequential(*layers, nn.Linear(64, 5)), place / "model.pt")
    np.savez(place / "calib.npz", x=np.random.default_rng(0).standard_normal((256, 64), np.float32))
    assert "continued" not in finish(forks, place, "whole")
    return place


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "work"))


def arguments(out: str, *more: object) -> list[object]:
    fixed = ["quantize", "model.pt", "--calib", "calib.npz", "--bits", 3, "--iterations", 80, "--out", out]
    return [*fixed, *more]


def finish(forks: Forks, folder: Path, out: str, *more: object) -> str:
    """Run to the end; what was printed."""
    run = forks.run(folder, *arguments(out, *more))
    assert run.returncode == 0, run.stderr
    return str(run.stdout)


def stop(folder: Path, out: str, finished: int, how: signal.Signals) -> tuple[int, str]:
    """Run until ``finished`` layers are on disk, then send ``how``; the exit code and what was said."""
    process = subprocess.Popen(
        command(*arguments(out)),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background, an ignored Ctrl-C would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    work, deadline = folder / f".{out}.work", time.monotonic() + 120
    while len(list(work.glob("*.safetensors"))) < finished:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    return process.returncode, complaints(said)


@pytest.mark.matrix
def test_stopped_twice_and_continued_to_the_same_bytes(folder: Path, forks: Forks) -> None:
    code, said = stop(folder, "out", 1, signal.SIGINT)
    assert code == 130, said
    assert said == "error: stopped; what is finished is kept, and the same command continues with it\n"
    assert not (folder / "out").exists()
    kept = sorted(path.name for path in (folder / ".out.work").iterdir())
    assert "fingerprint" in kept
    assert 1 <= len(kept) - 2 < LAYERS
    assert every(name in ("fingerprint", "parts.json") or name.endswith(".safetensors") for name in kept)
    shutil.copytree(folder / ".out.work", folder / ".other.work")

    code, _ = stop(folder, "out", 4, signal.SIGKILL)
    assert code == -signal.SIGKILL
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(("out", ".out")))
    assert left == [".out.lock", ".out.work"], "the lock is nobody's any more"
    finished = len(list((folder / ".out.work").glob("*.safetensors")))
    assert 4 <= finished < LAYERS

    said = finish(forks, folder, "out")
    assert f"continued: {finished} layers were finished by an earlier run" in said
    for name in SAME:
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert not (folder / ".out.work").exists()
    # Other options: what the first run had finished is of no use, and is not thrown away unasked.
    refused = forks.run(folder, *arguments("other", "--method", "mse"))
    assert refused.returncode == 2
    assert "finished layers of another run; different: steps (none then, bias_correction now)" in refused.stderr
    assert "what is done to the layers" in refused.stderr
    assert "the model" not in refused.stderr
    assert "continued" not in finish(forks, folder, "other", "--method", "mse", "--overwrite")


@pytest.mark.matrix
def test_a_second_run_is_told_who_has_the_place(folder: Path, forks: Forks) -> None:
    first = subprocess.Popen(
        command(*arguments("out")),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / ".out.work" / "fingerprint").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    second = forks.run(folder, *arguments("out", "--overwrite"))
    assert second.returncode == 2, second.stderr
    assert f"out is being written by another run: process {first.pid}, since " in second.stderr
    _, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    for name in SAME:
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert [path.name for path in folder.iterdir() if path.name.startswith(".out")] == []


@pytest.mark.slow
def test_sigterm_is_a_ctrl_c_with_an_exit_code_of_its_own(folder: Path, forks: Forks) -> None:
    code, said = stop(folder, "out", 1, signal.SIGTERM)
    assert code == 143, said
    assert said == "error: stopped; what is finished is kept, and the same command continues with it\n"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(("out", ".out"))) == [".out.work"]
    assert list((folder / "tmp").glob("compress-*")) == []
    assert "continued: " in finish(forks, folder, "out")


@sweep("after", [0.04, 0.1, 0.2, 0.5, 1.0, 2.0], sample=[0.1])
def test_ctrl_c_at_the_start_is_quiet(after: float, folder: Path) -> None:
    """Nothing is finished yet, and nothing is said of it; before there is a command line, nothing at all."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", START, *command(*arguments("out"))[3:]],
        cwd=folder,
        env={**environment(folder), "SITE": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert complaints(said) in ("", "error: stopped\n")
    assert process.returncode in (130, -signal.SIGINT)
    assert [path.name for path in folder.iterdir() if path.name.startswith(("out", ".out"))] == []


@pytest.mark.matrix
def test_killed_at_random_points(folder: Path, forks: Forks) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown where the test fails
    moments = random.Random(seed)
    for _ in range(3):
        process = subprocess.Popen(
            command(*arguments("out")),
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Anywhere between the first line of the program and the last of the folder.
        deadline = time.monotonic() + moments.uniform(0.0, 12.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        if (folder / "out").exists():
            break
    if not (folder / "out").exists():
        finish(forks, folder, "out")
    for name in SAME:
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.matrix
def test_killed_near_the_end(folder: Path, forks: Forks) -> None:
    process = subprocess.Popen(
        command(*arguments("out")),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(list((folder / ".out.work").glob("*.safetensors"))) < LAYERS:
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(0.1)  # exporting, proving, measuring
    process.kill()
    process.wait()
    assert not (folder / "out").exists()
    assert f"continued: {LAYERS} layers" in finish(forks, folder, "out")
