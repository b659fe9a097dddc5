"""Peak memory of a calibration against the number of samples: ``python -m benchmarks.memory``.

Each run is a process of its own on ResNet-20; the growth from 1,024 to 4,096 samples must not exceed the samples' size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

_RUN = """
import sys
from benchmarks.zoo import ZOO
import compress
case = ZOO["resnet20"]()
count = int(sys.argv[1])
calibration = case.calibration[:count].clone()
case = case.module
report = compress.quantize(case, calib=calibration, bits=4, act_bits=4, samples=count, iterations=20).report
print(report.peak_memory_bytes)
"""


def main() -> None:
    """Run from the command line."""
    peaks = {}
    for count in (1024, 4096):
        done = subprocess.run([sys.executable, "-c", _RUN, str(count)], capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout.split()[-1])
    result = {
        "command": "python -m benchmarks.memory",
        "peak_bytes": peaks,
        "growth_bytes": peaks[4096] - peaks[1024],
        "samples_growth_bytes": (4096 - 1024) * 3 * 32 * 32 * 4,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
