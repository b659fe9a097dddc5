"""How torch's threads wait for each other, as its OpenMP library itself says where a command has loaded it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import environment

OF_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def spins_of(arguments: list[str], own: dict[str, str], folder: Path) -> str:
    """What the OpenMP library that python with ``arguments`` loads says of its GOMP_SPINCOUNT."""
    inherited = {name: value for name, value in environment(folder).items() if name not in OF_WAITING}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | own | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr))
    assert len(found) == 1, done.stderr
    return found.pop()


@pytest.fixture(scope="module")
def unasked(workplace: Path) -> str:
    """What the library does by itself."""
    try:
        return spins_of(["-c", "import torch"], {}, workplace)
    except AssertionError:
        pytest.skip("torch's OpenMP library is not libgomp here")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("own", "spins"),
    [
        pytest.param({}, "0", id="passive"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000", id="own policy", marks=pytest.mark.matrix),
        pytest.param({"GOMP_SPINCOUNT": "1234"}, "1234", id="own count", marks=pytest.mark.matrix),
    ],
)
def test_threads_wait_asleep_unless_the_user_said_otherwise(
    own: dict[str, str], spins: str, workplace: Path, unasked: str
) -> None:
    assert unasked != "0"
    assert spins_of(["-m", "compress", "inspect", "model.pt"], own, workplace) == spins


@pytest.mark.matrix
def test_bench_measures_threads_as_users_have_them(
    workplace: Path, quiet_run: subprocess.CompletedProcess[str], unasked: str
) -> None:
    assert quiet_run.returncode == 0, quiet_run.stderr
    assert spins_of(["-m", "compress", "bench", "quiet", "--no-memory"], {}, workplace) == unasked
