"""What a passive wait policy of torch's OpenMP threads brings on a busy machine, and costs on an idle one.

``python -m benchmarks.waiting MODEL.pt CALIB.npz`` runs ``compress quantize`` with AdaQuant under each policy in turn,
first as the machine is, then beside one busy loop a core, and prints a row for each: seconds of the calibration as the
report has them, and processor seconds of the whole command, which other work on the machine is not in.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

POLICIES = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},  # what libgomp says it does unasked, given so that nothing is set
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    print("| | policy | calibration, s: median (least) | processor, s: median (least) |\n|---|---|---|---|")
    for busy in (False, True):
        others = [_spin() for _ in range(os.cpu_count() or 1)] if busy else []
        try:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
            for _ in range(arguments.repeats):
                for name, policy in POLICIES.items():
                    times[name].append(_calibrate(arguments.model, arguments.calib, arguments.iterations, policy))
        finally:
            for other in others:
                other.kill()
        for name, found in times.items():
            where = "beside busy loops" if busy else "alone"
            parts = [[each[place] for each in found] for place in (0, 1)]
            cells = [f"{statistics.median(part):.1f} ({min(part):.1f})" for part in parts]
            print(f"| {where} | {name} | {' | '.join(cells)} |", flush=True)


def _spin() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


def _calibrate(model: Path, calib: Path, iterations: int, policy: dict[str, str]) -> tuple[float, float]:
    """Seconds of the calibration, and of the command's processor time."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    own["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "compress", "quantize", str(model), "--calib", str(calib), "--bits", "4"]
        command += ["--first-last-bits", "7", "--method", "adaquant", "--iterations", str(iterations), "-q"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--out", f"{folder}/out"], env=own | policy, check=True, capture_output=True)
        seconds = json.loads(Path(folder, "out", "report.json").read_text())["calibration_seconds"]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime


if __name__ == "__main__":
    main()
