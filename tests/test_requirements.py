"""What is pinned can be installed, and every supported Python can read the code."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TORCH = ROOT / "tests" / "golden" / "torch-requirements.txt"
PYTHONS = ("3.11", "3.12", "3.13")
# Of the CUDA build alone.
CUDA = ("cuda-", "nvidia-", "triton")


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


PINS = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in lines_of(ROOT / "constraints.txt"))
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def applies(requirement: Requirement, python: str) -> bool:
    """Whether ``requirement`` holds on Linux, without extras."""
    where = {"platform_system": "Linux", "sys_platform": "linux", "python_version": python, "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(where)


def refused(requirement: Requirement) -> str | None:
    """A sentence where our pin is not what is required, else None."""
    pin = PINS.get(canonicalize_name(requirement.name))
    if pin is None or requirement.specifier.contains(pin, prereleases=True):
        return None
    return f"constraints.txt pins {requirement.name}=={pin}, but {requirement} is required"


def test_torchs_requirements_are_those_of_the_pinned_torch() -> None:
    assert f" torch {PINS['torch']} " in TORCH.read_text().splitlines()[0]


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_what_torch_requires(python: str) -> None:
    found = [each for each in map(Requirement, lines_of(TORCH)) if applies(each, python)]
    held = [each for each in found if canonicalize_name(each.name) in PINS]
    assert {each.name for each in held} >= {"triton", "setuptools"}
    assert [sentence for each in held if (sentence := refused(each))] == []


def test_torchs_requirements_are_those_of_the_torch_at_hand() -> None:
    """Of either build: the CPU build's are fewer, never others."""
    known = {str(each) for each in map(Requirement, lines_of(TORCH))}
    here = {str(Requirement(each)) for each in requires("torch") or ()}
    assert here <= known
    assert all(Requirement(each).name.startswith(CUDA) for each in known - here)


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    extras = PROJECT["optional-dependencies"].values()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(each for extra in extras for each in extra)]):
        assert canonicalize_name(requirement.name) in PINS, f"{requirement.name} has no pin in constraints.txt"
        assert refused(requirement) is None


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("python", PYTHONS[1:])
def test_newer_pythons_compile_the_code_without_a_warning(python: str, tmp_path: Path) -> None:
    """All that can be asked of an interpreter without torch; CONTRIBUTING says how to run the tests under another."""
    own = os.environ | {"PYENV_VERSION": python, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = shutil.which(f"python{python}")
    # Version managers' shims can be there without a Python behind them.
    if command is None or subprocess.run([command, "-c", ""], env=own, capture_output=True, check=False).returncode:
        pytest.skip(f"needs python{python}, which is not on this machine")
    folders = [str(ROOT / name) for name in ("compress", "benchmarks", "examples")]
    check = [command, "-W", "error", "-m", "compileall", "-q", *folders]
    done = subprocess.run(check, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
