"""One linear of a ViT done whole and by two thin ones, on floats and integers: 197 rows, files in turn.

``python -m benchmarks.thin`` writes ``benchmarks/results/thin.json`` and a table beside it. K is the smaller side.
Files hold made-up numbers: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import RESULTS
from benchmarks.linears import Linear
from compress.data.samples import load_samples
from compress.exporters.session import open_session
from compress.intake.model import take_in
from compress.kernels.table import register_operators
from compress.measure.bench import ratio_of_medians, time_models
from compress.measure.machine import describe_environment
from compress.quant.targets import find_target
from compress.records.layers import QuantOption
from compress.search.costs import export_ways
from compress.search.space import FLOAT, Way

SHAPES = ((3072, 768), (768, 3072))
ROWS = 197
W8A8 = QuantOption(bits=8, act_bits=8)
W4A8 = QuantOption(bits=4, act_bits=8)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    rows = [measure(shape, arguments.threads, arguments.rounds) for shape in SHAPES]
    result = {
        "command": f"python -m benchmarks.thin --threads {arguments.threads} --rounds {arguments.rounds}",
        "environment": describe_environment().model_dump(),
        "rows": rows,
    }
    stem = RESULTS / ("thin" if arguments.threads == 1 else f"thin-{arguments.threads}")
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result, arguments.threads))


def measure(shape: tuple[int, int], threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every form, and how many times faster than float it is."""
    register_operators()
    logging.getLogger().setLevel(logging.WARNING)  # onnxruntime's tools turn everybody's logs on
    torch.manual_seed(0)
    intake = take_in(Linear(*shape).eval(), samples=load_samples(torch.randn(4, ROWS, shape[1])))
    (layer,) = (spec.name for spec in intake.layers)
    rank = min(shape) // 4
    forms = {
        "float": FLOAT,
        "W8A8": Way("mse", W8A8, "integer"),
        f"float, rank {rank}": Way(None, None, "float", rank),
        f"W8A8, rank {rank}": Way("mse", W8A8, "integer", rank),
        f"W4A8, rank {rank}": Way("mse", W4A8, "integer", rank),
    }
    target = find_target("onnx-cpu")
    x = np.random.default_rng(0).standard_normal((1, ROWS, shape[1]), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for number, way in enumerate(forms.values()):
            file = export_ways(intake.traced, {layer: way}, target, Path(folder) / f"{number}.onnx")
            sessions.append(open_session(file, "ORT_ENABLE_ALL", threads=threads))
        calls = [lambda s=s: s.run(None, {s.get_inputs()[0].name: x}) for s in sessions]
        times = time_models(calls, rounds=rounds, warmup=10)
    found = {}
    for position, name in enumerate(forms):
        ratio = ratio_of_medians(times[:, 0], times[:, position])
        found[name] = {
            "ms": float(np.median(times[:, position])),
            "speedup": 1 / ratio.value,
            "low": 1 / ratio.high,
            "high": 1 / ratio.low,
        }
    print(shape, {name: f"{row['ms']:.3f} ms, {row['speedup']:.2f}" for name, row in found.items()}, flush=True)
    return {"shape": f"{shape[1]}x{shape[0]}", "forms": found}


def table(result: dict[str, Any], threads: int) -> str:
    """One line a form."""
    environment = result["environment"]
    lines = [
        "# A ViT's linear by two thin ones",
        "",
        f"`{result['command']}`: {environment['cpu']}, onnxruntime {environment['onnxruntime']}, {threads} thread"
        f"{'s' * (threads > 1)}, {ROWS} rows. To reach: rank K/4 on integers at least 7 times float's speed.",
        "",
        "| shape | form | ms | times float's speed (95 %) |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines += [
            f"| {row['shape']} | {name} | {form['ms']:.3f} | {form['speedup']:.2f} ({form['low']:.2f} to "
            f"{form['high']:.2f}) |"
            for name, form in row["forms"].items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
