"""Peak memory of a calibration against the number of samples: ``python -m benchmarks.memory``.

Each run is a process of its own on ResNet-20; the growth from 1,024 to 4,096 samples must not exceed the samples' size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.zoo import ZOO
from compress.measure.machine import describe_environment

RESULTS = Path(__file__).parent / "results"

_RUN = """
import sys
import torch
import compress
module = torch.load(sys.argv[1], weights_only=False)
report = compress.quantize(
    module, calib=sys.argv[2], bits=4, act_bits=4, samples=1 << 20, iterations=20
).report
print(report.peak_memory_bytes)
"""


def main() -> None:
    """Run from the command line; fails when memory grows by more than the samples do."""
    case = ZOO["resnet20"]()
    peaks, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pt"
        torch.save(case.module, model)
        for count in (1024, 4096):
            samples = Path(folder) / f"{count}.npy"
            np.save(samples, case.calibration[:count].numpy())
            command = [sys.executable, "-c", _RUN, str(model), str(samples)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[count], sizes[count] = int(done.stdout.split()[-1]), samples.stat().st_size
    result = {
        "command": "python -m benchmarks.memory",
        "environment": describe_environment().model_dump(),
        "peak_bytes": peaks,
        "growth_bytes": peaks[4096] - peaks[1024],
        "samples_growth_bytes": sizes[4096] - sizes[1024],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["growth_bytes"] > result["samples_growth_bytes"]:
        sys.exit("peak memory grew by more than the samples themselves")


if __name__ == "__main__":
    main()
