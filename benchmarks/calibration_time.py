"""Processor time of a calibration of ResNet-20, beside another checkout's.

``python -m benchmarks.calibration_time --against CHECKOUT [--rounds N] [--out FILE]``. Every measurement is a process
of its own, the two checkouts taking turns; counted is one thread's time within ``calibrate``, 8 bits, 256 images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, object]] = {
    "mse": {"method": "mse"},
    "gptq": {"method": "gptq"},
    "adaquant": {"method": "adaquant", "iterations": 200},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, help="JSON file of all measurements")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(given.one))
        return
    sides = {"before": given.against.resolve()} if given.against else {}
    sides["now"] = ROOT
    found: dict[str, dict[str, list[float]]] = {name: {side: [] for side in sides} for name in given.methods}
    for number in range(given.rounds):
        for name in given.methods:
            for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
                found[name][side].append(run(name, sides[side]))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"| method | {' | '.join(f'{side}, s' for side in sides)} | ratio |\n|---|{'---|' * (len(sides) + 1)}")
    for name, seconds in found.items():
        medians = [statistics.median(each) for each in seconds.values()]
        ratio = f"{medians[-1] / medians[0]:.2f}" if len(medians) > 1 else ""
        print(f"| {name} | {' | '.join(f'{each:.2f}' for each in medians)} | {ratio} |")


def run(method: str, root: Path) -> float:
    """Processor seconds in a process that has the package in ``root``; model and data are this checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), "--one", method]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure(method: str) -> float:
    """Of ``method`` in this process."""
    import torch

    from compress import api, errors

    try:
        from compress.pipeline import apply_plan
    except ImportError:  # a checkout from before the rooms
        from compress import compression as apply_plan  # type: ignore[attr-defined, no-redef]

    sys.path.insert(0, str(ROOT))  # whose models and data they are, whatever the program
    from benchmarks.zoo import ZOO

    torch.set_num_threads(1)
    case = ZOO["resnet20"]()
    calibrate, spent = apply_plan.calibrate, []

    def timed(*arguments: object, **settings: object) -> object:
        start = time.process_time()
        result = calibrate(*arguments, **settings)  # type: ignore[arg-type]
        spent.append(time.process_time() - start)
        return result

    apply_plan.calibrate = timed  # type: ignore[assignment]
    # The gate of an older checkout refuses on some processors; the calibration is done by then.
    with contextlib.suppress(errors.GateError):
        api.quantize(case.module, calib=case.calibration[:256], bits=8, act_bits=8, seed=0, **METHODS[method])  # type: ignore[arg-type]
    (seconds,) = spent
    return seconds


if __name__ == "__main__":
    main()
