"""What a passive wait policy of torch's OpenMP threads brings on a busy machine, and costs on an idle one.

``python -m benchmarks.waiting`` learns two small convolutions on as many threads as there are cores, as layers are
calibrated, under each policy in turn: alone, and beside as many busy loops. ``--first`` asks the system to prefer it
to all other work (SCHED_FIFO, as root): so "alone" can be measured on a machine that is not idle, and is all that is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

POLICIES = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}  # the first: libgomp's own
STEPS = """
import os, sys, time
if "first" in sys.argv:  # before OpenMP makes its threads, which inherit it
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
import torch
from torch import nn
torch.manual_seed(0)
x = torch.randn(64, 16, 16, 16)
layers = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
optimizer = torch.optim.Adam(layers.parameters())
for step in range(120):
    if step == 20:
        wall, processor = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    (layers(x) - x).square().mean().backward()
    optimizer.step()
print(time.perf_counter() - wall, time.process_time() - processor)
"""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first", action="store_true")
    arguments = parser.parse_args()
    print("| | threads wait | seconds for 100 steps, median (least to most) | processor seconds |\n|---|---|---|---|")
    for busy in (False,) if arguments.first else (False, True):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(_cores())] if busy else []
        try:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
            for _ in range(arguments.repeats):
                for name, policy in POLICIES.items():
                    found[name].append(_learn(policy, arguments.first))
        finally:
            for other in others:
                other.kill()
                other.wait()
        for name, pairs in found.items():
            wall, processor = ([pair[place] for pair in pairs] for place in (0, 1))
            seconds = f"{statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f})"
            where = "beside busy loops" if busy else "alone"
            print(f"| {where} | {name} | {seconds} | {statistics.median(processor):.2f} |", flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _learn(policy: dict[str, str], first: bool) -> tuple[float, float]:
    """Seconds, and processor seconds, of a hundred steps in a process of its own."""
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", STEPS, *(["first"] if first else [])]
    variables = own | policy | {"OMP_NUM_THREADS": str(_cores())}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    wall, processor = map(float, done.stdout.split())
    return wall, processor


if __name__ == "__main__":
    main()
