"""Machines with a GPU are lent bare: torch, triton, what is usual beside them, but not all that the project needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
