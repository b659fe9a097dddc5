"""Faults put in on purpose, one at a time: do the tests find them?

``python -m tests.mutate`` goes through ``tests/mutations.toml``. For each fault it copies the tracked files of this
checkout into a scratch folder, changes the one place, and runs the tests that ought to fail there, but for ``matrix``.
Without the fault they must pass, which is tried first, once for each.

``--suite FOLDER`` takes the tests of another checkout, to compare two suites on the same faults; ``--code FOLDER``
the program of another one. A fault that is not in that program, and one for which that suite has no tests, is left out,
and said to be.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.toml"
# Of those that are tried, the share that must be found.
ENOUGH = 0.9
PASSED, FAILED, BROKEN, NOTHING_RUN = 0, 1, 2, 5


class Unusable(Exception):
    """Nothing can be said about a fault; the message says why."""


@dataclass(frozen=True)
class Mutation:
    """One fault: in ``file`` the text ``before``, which is there once, becomes ``after``; ``tests`` ought to fail."""

    name: str
    what: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> None:
        """Put the fault into ``tree``.

        Raises:
            Unusable: the text is not there, or more than once.
        """
        path = tree / self.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(self.before) != 1:
            raise Unusable(f"{self.file} has its text {text.count(self.before)} times; once is needed")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


def read_list(path: Path = LIST) -> list[Mutation]:
    """All faults, in order."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def tracked(checkout: Path) -> list[str]:
    """Files of ``checkout`` that git knows, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout
    return [name for name in found.split("\0") if name and os.path.lexists(checkout / name)]


def copy_tree(code: Path, suite: Path, tree: Path) -> None:
    """``code`` without its tests, and the tests of ``suite``, as a new folder ``tree``; data beside it are shared."""
    for checkout, of_tests in ((code, False), (suite, True)):
        for name in tracked(checkout):
            if name.startswith("tests/") is of_tests:
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(checkout / name, tree / name, follow_symlinks=False)
    beside = suite.parent / "shared"
    if beside.is_dir() and not (tree.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(beside)


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit code of pytest over ``tests`` in ``tree``, and what failed first; a run without end counts as failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not matrix", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return FAILED, f"no end within {seconds:.0f} s"
    first = re.search(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    return done.returncode, first[1] if first else (done.stdout + done.stderr)[-300:].strip()


@dataclass
class Trial:
    """Faults tried in copies of ``code`` with the tests of ``suite``, under ``scratch``."""

    code: Path
    suite: Path
    scratch: Path
    seconds: float

    def __post_init__(self) -> None:
        self._sound: dict[str, str | None] = {}

    def find(self, mutation: Mutation) -> str | None:
        """The test that found it, or None.

        Raises:
            Unusable: it cannot be put in, the suite has no tests for it, or they fail without it.
        """
        tests = [each for each in mutation.tests if (self.suite / each).exists()]
        if not tests:
            raise Unusable(f"the suite has none of {', '.join(mutation.tests)}")
        tree = self._copy("mutated")
        mutation.apply(tree)
        for each in tests:
            if each not in self._sound:
                self._sound[each] = self._fault_of(each)
        broken = {each: why for each in tests if (why := self._sound[each]) is not None}
        if broken:
            raise Unusable("without it, too: " + "; ".join(broken.values()))
        code, first = run_tests(tree, tests, self.seconds)
        if code not in (PASSED, FAILED, BROKEN):
            raise Unusable(f"pytest ended with {code}: {first}")
        return first if code != PASSED else None

    def _fault_of(self, test: str) -> str | None:
        """Why ``test`` is of no use: it fails without a fault."""
        code, first = run_tests(self._copy("sound"), [test], self.seconds)
        return None if code in (PASSED, NOTHING_RUN) else f"{test} fails ({first})"

    def _copy(self, name: str) -> Path:
        tree = self.scratch / name
        shutil.rmtree(tree, ignore_errors=True)
        copy_tree(self.code, self.suite, tree)
        return tree


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or numbers from 1 on")
    parser.add_argument("--suite", type=Path, default=ROOT, metavar="FOLDER", help="whose tests; this checkout's")
    parser.add_argument("--code", type=Path, default=ROOT, metavar="FOLDER", help="whose program; this checkout's")
    parser.add_argument("--minutes", type=float, default=30.0, help="for one run of pytest")
    arguments = parser.parse_args()
    chosen = list(enumerate(read_list(), 1))
    if arguments.only:
        unknown = set(arguments.only) - {name for number, each in chosen for name in (str(number), each.name)}
        if unknown:
            parser.error(f"no fault is called {', '.join(sorted(unknown))}")
        chosen = [(number, each) for number, each in chosen if {str(number), each.name} & set(arguments.only)]
    found, missed, left_out = [], [], []
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        trial = Trial(arguments.code.resolve(), arguments.suite.resolve(), Path(scratch), 60 * arguments.minutes)
        for number, mutation in chosen:
            start = time.monotonic()
            try:
                test = trial.find(mutation)
            except Unusable as error:
                left_out.append(mutation.name)
                said = f"left out: {error}"
            else:
                (found if test else missed).append(mutation.name)
                said = f"found by {test}" if test else "MISSED"
            print(f"{number:2} {mutation.name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    tried = len(found) + len(missed)
    names = [", ".join(each) or "none" for each in (missed, left_out)]
    print(f"{len(found)} of {tried} found; missed: {names[0]}; left out: {names[1]}")
    raise SystemExit(0 if tried and len(found) >= ENOUGH * tried else 1)


if __name__ == "__main__":
    main()
