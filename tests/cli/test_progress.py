"""Off a terminal a command says that it has begun before it imports torch, and every ten seconds how far it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compress.cli import progress
from compress.cli.progress import ProgressBar
from tests.cli.conftest import command, environment  # type: ignore[import-not-found]

STARTED = r"compress .*: started at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the bar reads; its last entry is now."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[-1])
    monkeypatch.setattr(sys, "argv", ["compress", "quantize", "my model.pt", "--bits", "4"])
    return seconds


def test_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(enabled=True) as bar:
        for second in range(0, 35, 3):
            clock.append(second)
            bar.update(f"layer{second}", second, 40)
    started, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(STARTED, started)
    assert started.startswith("compress quantize 'my model.pt' --bits 4: ")
    assert lines == ["12 s: 12 of 40, layer12", "24 s: 24 of 40, layer24"]


def test_one_that_is_told_to_be_quiet_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(enabled=False) as bar:
        clock.append(100)
        bar.update("layer", 1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_first_line_comes_before_torch(workplace: Path) -> None:
    program = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def stop(name, *rest, **more):\n"
        "    if name == 'torch' or name.startswith('torch.'):\n"
        "        raise SystemExit(77)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = stop\n"
        "sys.argv = ['compress', *sys.argv[1:]]\n"
        "from compress.__main__ import main\n"
        "main()\n"
    )
    arguments = command("quantize", "model.pt", "--bits", 4)[3:]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=workplace, env=environment(workplace), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 77, run.stderr
    assert re.fullmatch(STARTED, run.stderr.strip())
    assert run.stdout == ""
