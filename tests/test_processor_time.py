"""The limit on a test's processor time, in a pytest run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = """
from tests import processor_time
processor_time.LIMIT_SECONDS = 0.05
from tests.processor_time import add_option as pytest_addoption, pytest_runtest_call, pytest_runtest_protocol
"""
TESTS = """
import subprocess, sys, time
import pytest

seen = []

def burn():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass

@pytest.fixture
def made():
    burn()

def test_short(): pass
def test_asleep(): time.sleep(0.3)
def test_long(): burn()
def test_in_a_process(): subprocess.run([sys.executable, "-c", "for _ in range(8_000_000): pass"])
def test_in_a_fixture(made): pass
def test_failing():
    burn()
    assert 0, "its own reason"
def test_first_of_its_process():
    if "first" not in seen: burn()
    seen.append("first")
def test_once_only():
    burn()
    seen.append("once")
    assert seen.count("once") < 2
@pytest.mark.slow
def test_marked(): burn()
"""
FAILED = {
    "long": "s when repeated; an unmarked test may take",
    "in_a_process": "s when repeated; an unmarked test may take",
    "once_only": "and could not be repeated; an unmarked test may take",
    "failing": "AssertionError: its own reason",
}
PASSED = ("short", "asleep", "in_a_fixture", "first_of_its_process", "marked")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("limit")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (folder / "test_it.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rA",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--limit-time",
        "test_it.py",
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_what_takes_long_fails(output: str) -> None:
    for name, sentence in FAILED.items():
        assert f"FAILED test_it.py::test_{name}" in output
        _, _, report = output.partition(f"_ test_{name} _")
        assert sentence in report.partition("\n_____")[0], name


@pytest.mark.slow
def test_fixtures_first_uses_and_what_is_marked_are_forgiven(output: str) -> None:
    for name in PASSED:
        assert f"PASSED test_it.py::test_{name}" in output
    assert f"{len(FAILED)} failed, {len(PASSED)} passed" in output
