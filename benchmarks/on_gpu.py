"""All that is to be done on a GPU that is there for minutes, in one command: kernels' tests, then their benchmark.

``python -m benchmarks.on_gpu --out FOLDER --minutes 9`` takes a python with torch, triton and pytest, no network and
nothing of this project's other needs (with pydantic, pulp and highspy, artifacts are loaded there as well). A part is
one or several processes with a time limit of their own. What they print lies in FOLDER as it comes, and a part that
fails or is cut short does not keep the next one from running.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = (sys.executable, "-m", "benchmarks.kernels")
LAST_LINES = 15


def tests(workers: int) -> list[str]:
    """The tests, on the GPU instead of triton's interpreter; each result is a line, there also when time runs out."""
    paths = ["tests/kernels"]
    if all(map(find_spec, ("pydantic", "pulp", "highspy"))):
        paths.append("tests/runtime/test_on_gpu.py")
    spread = ["-n", str(workers)] if find_spec("xdist") else []
    # Another torch than the pinned one warns of other things.
    shown = ["-vv", "--tb=short", "-o", "filterwarnings=default"]
    return [sys.executable, "-m", "pytest", *paths, "-m", "not slow", *shown, *spread]


def run(name: str, commands: Sequence[Sequence[str]], folder: Path, seconds: float) -> bool:
    """Run ``commands`` side by side for at most ``seconds``, output to ``folder/NAME.log``; whether all ended well."""
    start = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
        started = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            for command in commands
        ]
        codes: list[int | None] = []
        for process in started:
            try:
                codes.append(process.wait(max(0.0, start + seconds - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
    said = "cut short" if None in codes else "failed" if any(codes) else "done"
    print(f"== {name}: {said} after {time.monotonic() - start:.0f} s; {log}", flush=True)
    print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]), flush=True)
    return said == "done"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; tests take 45 %% of it at most")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    arguments = parser.parse_args()
    out, workers = arguments.out.resolve(), arguments.workers
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    well = run("tests", [tests(workers)], out, 60 * 0.45 * arguments.minutes)
    warm = [(*BENCHMARK, "--warm", str(index), str(workers)) for index in range(workers)]
    run("warm", warm, out, (end - time.monotonic()) / 2)
    well = run("kernels", [(*BENCHMARK, "--out", str(out))], out, end - time.monotonic()) and well
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
