"""The command as a user runs it: a process of its own, in a folder with a model, a factory and data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]

NETS = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=None), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x)

class Fickle(Own):
    def forward(self, x):
        y = self.layer(x)
        if y.sum() > 0:
            return y * 2
        return y

def fickle():
    return Fickle()
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(folder: Path) -> dict[str, str]:
    """One thread, a wide terminal, temporary files and measurements under ``folder``."""
    (folder / "tmp").mkdir(exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "COLUMNS": "250", "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
    own["COMPRESS_CACHE"] = str(folder / "cache")
    return {**os.environ, **own}


def complaints(stderr: str) -> str:
    """``stderr`` without the lines of progress, which tests/cli/test_progress.py looks at."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"compress .*: started at |\d+ s: \d+ of \d+, ", line))


def run_alone(cwd: Path, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """``compress ARGUMENTS`` in a process of its own; of stderr its complaints.

    Args:
        settings: of :func:`subprocess.run`.
    """
    given = {"env": environment(cwd), "timeout": 300, **settings}
    run = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, **given)
    return subprocess.CompletedProcess(run.args, run.returncode, run.stdout, complaints(run.stderr))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "compress", *untimed(arguments)]


def untimed(arguments: Sequence[object]) -> list[str]:
    """With ``--no-bench`` for the verbs that know it; a run whose time matters says ``--bench``."""
    given = list(map(str, arguments))
    if given[:1] in (["quantize"], ["apply"]) and not {"--bench", "--no-bench"} & set(given):
        given.insert(1, "--no-bench")
    return given


def populate(folder: Path) -> Path:
    """Model, weights, factory, data: ``model.pt``, ``weights.th``, ``nets.py``, ``calib.npz``, ``test.npz``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nets.py").write_text(NETS)
    scope: dict[str, Callable[[], nn.Module]] = {}
    exec(NETS, scope)
    torch.manual_seed(0)
    module = scope["make"]().train()
    with torch.no_grad():
        module(torch.randn(64, 1, 8, 8))
    module.eval()
    torch.save(module, folder / "model.pt")
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in module.state_dict().items()}},
        folder / "weights.th",
    )
    x = torch.randn(80, 1, 8, 8)
    with torch.no_grad():
        labels = module(x).argmax(1)
    np.savez(folder / "calib.npz", x=x.numpy())
    np.savez(folder / "test.npz", x=x.numpy(), y=labels.numpy())
    return folder


class Forks:
    """``python -m compress`` many times, for the price of one start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.fork_server"],
            cwd=folder, env=environment(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self,
        cwd: Path,
        *arguments: object,
        variables: Mapping[str, str] | None = None,
        dies_at: int | None = None,
        counts_to: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``compress ARGUMENTS`` in ``cwd``.

        Args:
            variables: of the environment, for this run alone.
            dies_at: the change to a file under ``cwd``, from 0 on, before which it dies by SIGKILL.
            counts_to: the file that takes how many changes there were.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        stdout, stderr = (str(self.folder / name) for name in ("stdout", "stderr"))
        case = {
            "cwd": str(cwd), "arguments": untimed(arguments), "stdout": stdout, "stderr": stderr,
            "variables": dict(variables or {}), "dies_at": dies_at, "counts_to": str(counts_to or ""),
        }  # fmt: skip
        self.server.stdin.write(json.dumps(case) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(
            arguments, code, Path(stdout).read_text(), complaints(Path(stderr).read_text())
        )

    def close(self) -> None:
        self.server.communicate(timeout=60)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """For many short runs; a few others start a process of their own, as a user does."""
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def quiet_run(workplace: Path) -> subprocess.CompletedProcess[str]:
    """``compress quantize --quiet``, the folder ``workplace / "quiet"``."""
    arguments = ("quantize", "model.pt", "--calib", "calib.npz", "--method", "mse", "-q", "-o", "quiet")
    return run_alone(workplace, *arguments)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests that write under names of their own."""
    return populate(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="session")
def compress() -> Run:
    """Run ``compress ARGUMENTS`` in ``cwd``, in a process of its own."""
    return run_alone
