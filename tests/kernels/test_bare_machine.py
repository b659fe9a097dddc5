"""Machines with a GPU are lent bare: torch, triton, what is usual beside them, but not all that the project needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.on_gpu import run

ROOT = Path(__file__).resolve().parents[2]
# Not in the image of those machines.
ABSENT = ("pydantic", "pulp", "highspy")


@pytest.mark.slow
def test_kernels_are_tested_and_timed_without_the_rest_of_the_project() -> None:
    files = [path.relative_to(ROOT).with_suffix("") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    modules = [".".join(path.parts) for path in files]
    program = f"""
import importlib, sys, types
sys.modules |= dict.fromkeys({ABSENT})
for name in {[*modules, "benchmarks.kernels", "benchmarks.kernel_tuning"]}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_keeps_what_it_said(tmp_path: Path) -> None:
    def python(program: str) -> list[str]:
        return [sys.executable, "-c", program]

    assert run("good", [python("print(1)"), python("print(2)")], tmp_path, 60)
    assert not run("bad", [python("print(3)"), python("raise SystemExit('four')")], tmp_path, 60)
    assert not run("long", [python("import time; print(5); time.sleep(60)")], tmp_path, 3)
    said = {path.stem: sorted(path.read_text().split()) for path in tmp_path.iterdir()}
    assert said == {"good": ["1", "2"], "bad": ["3", "four"], "long": ["5"]}
