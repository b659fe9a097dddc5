"""Accuracy, size and latency of a zoo model at several widths, beside peers, in one run.

``python -m benchmarks.accuracy resnet20 [--only W4A4 ...] [--nncf-python peer/bin/python]`` writes
``benchmarks/results/accuracy-<model>.json`` and a table of the same name in Markdown. Every compressed model is scored
by ONNX Runtime on the test set and paired with the float model sample by sample; all files are timed interleaved.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from benchmarks.peers import peer_files
from benchmarks.zoo import ZOO, Case
from compress.exporters.session import open_session, run_session
from compress.measure.bench import bench
from compress.measure.machine import describe_environment

RESULTS = Path(__file__).parent / "results"
SAMPLES = 1024

SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {"bits": 8},
    "W8A8 rounding": {"bits": 8, "method": "mse"},
    "W4A8": {"bits": 4},
    "W4A8 rounding": {"bits": 4, "method": "mse", "bias_correction": False},
    "W4A4": {"bits": 4, "act_bits": 4},
    "W4A4 rounding": {"bits": 4, "act_bits": 4, "method": "mse", "bias_correction": False},
    "W3A8": {"bits": 3},
    "W3A8 rounding": {"bits": 3, "method": "mse", "bias_correction": False},
    "W2A8": {"bits": 2},
    "W2A8 rounding": {"bits": 2, "method": "mse", "bias_correction": False},
    "W4, no data": {"bits": 4, "calibrated": False},
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(ZOO))
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--nncf-python")
    arguments = parser.parse_args()
    case = ZOO[arguments.model]()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments.model, case, arguments.only, Path(scratch), arguments.nncf_python)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"accuracy-{arguments.model}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    print(table(result))


def measure(key: str, case: Case, settings: list[str], scratch: Path, nncf_python: str | None) -> dict[str, Any]:
    """All rows of one model."""
    chosen = torch.randperm(len(case.calibration), generator=torch.Generator().manual_seed(0))[:SAMPLES].sort().values
    calibration = case.calibration[chosen].contiguous()
    float_file = compress.export(case.module, scratch / "float.onnx", input_shape=case.test.shape[1:])
    files, rows = {"float": float_file}, {}
    reference = classes(float_file, case.test) == case.labels
    float_classes = classes(float_file, case.test)
    for name in settings:
        options = dict(SETTINGS[name])
        data = calibration if options.pop("calibrated", True) else None
        started = time.monotonic()
        folder = scratch / name.replace(" ", "-").replace(",", "")
        shape = None if data is not None else case.test.shape[1:]
        result = compress.quantize(case.module, calib=data, out=folder, input_shape=shape, **options)
        files[name] = folder / "model.onnx"
        check = result.report.export_check
        rows[name] = {
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_mb": round(result.report.peak_memory_bytes / 1e6),
            "parity_l2_unoptimized": check.relative_l2_unoptimized,
            "parity_l2_optimized": check.relative_l2_optimized,
        }
        print(name, rows[name], flush=True)
    input_name = open_session(float_file, "ORT_ENABLE_ALL").get_inputs()[0].name
    files |= peer_files(float_file, input_name, calibration, scratch, nncf_python)
    for name, file in files.items():
        predicted = classes(file, case.test)
        right = predicted == case.labels
        rows.setdefault(name, {})
        rows[name] |= {
            "accuracy": float(right.float().mean()),
            "drop_points": 100 * (float(reference.float().mean()) - float(right.float().mean())),
            "lost": int((reference & ~right).sum()),
            "won": int((~reference & right).sum()),
            "agreement": float((predicted == float_classes).float().mean()),
            "file_bytes": file.stat().st_size,
        }
    report = bench(list(files.values()), batch_sizes=(1, 32), threads=1, memory=False)
    names = {str(file): name for name, file in files.items()}
    for row in report.rows:
        rows[names[row.model]][f"p50_ms_batch_{row.batch}"] = row.p50_ms
        if row.ratio is not None:
            interval = [row.ratio.value, row.ratio.low, row.ratio.high]
            rows[names[row.model]][f"ratio_to_float_batch_{row.batch}"] = interval
    return {
        "command": shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]),
        "model": case.name,
        "calibration_samples": len(calibration),
        "test_samples": len(case.test),
        "environment": describe_environment().model_dump(),
        "threads": 1,
        "rows": {name: rows[name] for name in files},
    }


def classes(file: Path, images: Tensor) -> Tensor:
    """Predicted class of every image."""
    session = open_session(file, "ORT_ENABLE_ALL")
    return run_session(session, [(batch,) for batch in images.split(50)])[0].argmax(1)


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    environment = result["environment"]
    lines = [
        f"# {result['model']}",
        "",
        f"`{result['command']}`: {result['calibration_samples']} calibration, {result['test_samples']} test samples,",
        f"{environment['cpu']}, one thread, onnxruntime {environment['onnxruntime']}. Flags: "
        f"{', '.join(environment['cpu_flags'])}.",
        "",
        "| model | accuracy % | drop | lost / won | agreement % | file kB | batch 1 ms | batch 32 ms | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {100 * row['accuracy']:.2f} | {row['drop_points']:.2f} | {row['lost']} / {row['won']} "
            f"| {100 * row['agreement']:.2f} | {row['file_bytes'] / 1e3:.1f} | {row['p50_ms_batch_1']:.3f} "
            f"| {row['p50_ms_batch_32']:.2f} | {row.get('seconds', '')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
