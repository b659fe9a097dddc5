"""The list of faults fits the program as it is, and the runner tells those that are found from those that are not."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.mutate import ROOT, Mutation, Trial, Unusable, read_list

MUTATIONS = {each.name: each for each in read_list()}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_list_fits_the_program(name: str, tmp_path: Path) -> None:
    each = MUTATIONS[name]
    assert all((ROOT / path).exists() for path in each.tests)
    (tmp_path / each.file).parent.mkdir(parents=True)
    (tmp_path / each.file).write_text((ROOT / each.file).read_text())
    each.apply(tmp_path)
    changed = (tmp_path / each.file).read_text()
    assert changed != (ROOT / each.file).read_text()
    compile(changed, each.file, "exec")


def test_thirty_faults_over_all_rooms() -> None:
    assert len(MUTATIONS) == len(read_list()) == 30
    rooms = Counter(str(Path(each.file).parent) for each in MUTATIONS.values())
    assert len(rooms) >= 14
    assert rooms["kernels"] == 2


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A program of one line, and tests that look at its sign alone."""
    files = {
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['matrix']\n",
        "half.py": "def half(x):\n    return x / 2\n",
        "tests/test_half.py": "from half import half\n\ndef test_half():\n    assert half(2) > 0\n",
        "tests/test_wrong.py": "def test_wrong():\n    assert False\n",
    }
    for name, text in files.items():
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "checkout", check=True)
    return tmp_path / "checkout"


@pytest.mark.slow
def test_what_is_found_missed_and_of_no_use(checkout: Path, tmp_path: Path) -> None:
    trial = Trial(checkout, checkout, tmp_path / "scratch", 60)
    tests = ("tests/test_half.py",)
    sign = Mutation("sign", "", "half.py", "x / 2", "-x / 2", tests)
    assert str(trial.find(sign)).startswith("tests/test_half.py::test_half")
    assert trial.find(Mutation("third", "", "half.py", "/ 2", "/ 3", tests)) is None
    assert (checkout / "half.py").read_text() == "def half(x):\n    return x / 2\n"
    for change, message in (
        ({"before": "x"}, "half.py has its text 2 times; once is needed"),
        ({"tests": ("tests/test_nothing.py",)}, "the suite has none of tests/test_nothing.py"),
        ({"tests": ("tests/test_wrong.py",)}, "without it, too: tests/test_wrong.py fails"),
    ):
        with pytest.raises(Unusable, match=message):
            trial.find(Mutation(**{**vars(sign), **change}))
