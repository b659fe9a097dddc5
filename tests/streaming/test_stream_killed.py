"""``compress stream`` in a process of its own, killed at any moment: the same command goes on to the same bytes."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.conftest import Forks, command, environment  # type: ignore[import-not-found]
from tests.streaming.conftest import save_llama, weight_files  # type: ignore[import-not-found]

BLOCKS = 8
SAME = ("config.json", "model.safetensors.index.json", "plan.json")


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    """For the runs that nothing happens to."""
    server = Forks(tmp_path)
    yield server
    server.close()


@pytest.fixture
def folder(ids: Path, tmp_path: Path) -> Path:
    save_llama(tmp_path / "llama", BLOCKS)
    (tmp_path / "ids.npz").write_bytes(ids.read_bytes())
    return tmp_path


def arguments(out: str, *more: object) -> list[object]:
    return ["stream", "llama", "--calib", "ids.npz", "--bits", 4, "--group-size", 32, "--out", out, *more]


def finished_blocks(work: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("block").split("-")[0]) for path in work.glob("block*.safetensors"))


def run_and_kill(folder: Path, seconds: float) -> None:
    """Start, and kill ``seconds`` after the first change on disk; it may have ended before."""
    work, limit = folder / ".out.work", time.monotonic() + 60
    process = subprocess.Popen(
        command(*arguments("out")),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = {path.name for path in work.glob("*")}
    while process.poll() is None and time.monotonic() < limit and {path.name for path in work.glob("*")} == before:
        time.sleep(0.002)
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() in (0, -9)


@pytest.mark.matrix
@pytest.mark.parametrize("kills", ["one", "random"])
def test_killed_and_continued(kills: str, folder: Path, forks: Forks) -> None:
    run = forks.run(folder, *arguments("whole"))
    assert run.returncode == 0, run.stderr
    seed = time.time_ns()
    print(f"seed {seed}")  # shown where the test fails
    dice = random.Random(seed)
    for moment in [0.2] if kills == "one" else [dice.uniform(0.0, 0.8) for _ in range(3)]:
        run_and_kill(folder, moment)
        if (folder / "out").exists():
            break
    if not (folder / "out").exists():
        kept = finished_blocks(folder / ".out.work")
        run = forks.run(folder, *arguments("out", "--json"))
        assert run.returncode == 0, run.stderr
        # Killed while it wrote the folder, the first blocks are missing, and all are done again.
        assert json.loads(run.stdout)["continued"] == (len(kept) if 0 in kept else 0)
    whole, out = folder / "whole", folder / "out"
    assert len(weight_files(whole)) == BLOCKS + 1
    assert weight_files(out) == weight_files(whole)
    for name in SAME:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
