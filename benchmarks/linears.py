"""One exported linear at ViT- and Llama-like shapes, beside what onnxruntime's own tools write, in one run.

``python -m benchmarks.linears`` writes ``benchmarks/results/linears.json`` and a table beside it. Ours is what
``--bits 4 --rows ROWS`` and ``--bits 8 --rows ROWS`` choose from the measured table; all files of a shape and number of
rows are timed in turn, and ratios are medians of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import nn

from benchmarks.accuracy import RESULTS
from benchmarks.peers import peer_files
from compress import api
from compress.exporters.session import open_session
from compress.measure.bench import time_models
from compress.measure.machine import describe_environment

SHAPES = ((3072, 768), (768, 3072), (4096, 4096))
ROWS = (1, 16, 197)
BLOCKS = (32, 128)


class Linear(nn.Module):
    """[1, rows, I] to [1, rows, O], as inside a transformer."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return self.linear(x)  # type: ignore[no-any-return]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"threads": arguments.threads, "rows": []}
    result["command"] = f"python -m benchmarks.linears --threads {arguments.threads}"
    result["environment"] = describe_environment().model_dump()
    for shape in SHAPES:
        for rows in ROWS:
            result["rows"].append(measure(shape, rows, arguments.threads))
            print(result["rows"][-1], flush=True)
    (RESULTS / "linears.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "linears.md").write_text(table(result))


def measure(shape: tuple[int, int], rows: int, threads: int) -> dict[str, Any]:
    """Milliseconds of every file at one shape, and the error of its output on noise."""
    torch.manual_seed(0)
    module = Linear(*shape).eval()
    samples = torch.randn(16, rows, shape[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        float_file = folder / "float.onnx"
        api.export(module, float_file, input_shape=(rows, shape[1]))
        files = {"float": float_file}
        chosen = {}
        for bits in (4, 8):
            out = folder / f"ours{bits}"
            widths = {"bits": bits, "first_last_bits": bits}
            report = api.quantize(
                module, calib=samples, out=out, rows=rows, method="mse", threads=threads, **widths
            ).report
            chosen[f"ours, {bits} bits"] = report.layers[0].option
            files[f"ours, {bits} bits"] = out / "model.onnx"
        files |= peer_files(float_file, "x", samples, folder, None)
        logging.getLogger().setLevel(logging.WARNING)  # onnxruntime\'s tools turn everybody\'s logs on
        for block in BLOCKS:
            files[f"onnxruntime MatMulNBits {block}"] = matmul_nbits(float_file, block, folder / f"nbits{block}.onnx")
        sessions = [open_session(file, "ORT_ENABLE_ALL", threads=threads) for file in files.values()]
        x = samples[:1].numpy()
        feeds = [{session.get_inputs()[0].name: x} for session in sessions]
        calls = [lambda s=s, f=f: s.run(None, f)[0] for s, f in zip(sessions, feeds, strict=True)]
        times = np.median(time_models(calls, rounds=max(60, 6000 // rows), warmup=10), axis=0)
        wanted = calls[0]()
        errors = [float(np.linalg.norm(call() - wanted) / np.linalg.norm(wanted)) for call in calls]
    ms = dict(zip(files, times.tolist(), strict=True))
    ours = min(ms[name] for name in chosen)
    peers = {name: time for name, time in ms.items() if name.startswith("onnxruntime")}
    best = min(peers, key=peers.__getitem__)
    return {
        "shape": f"{shape[1]}x{shape[0]}",
        "rows": rows,
        "ms": ms,
        "relative_error": dict(zip(files, errors, strict=True)),
        "chosen": chosen,
        "best_peer": best,
        "ours_over_best_peer": ours / peers[best],
        "speedup": ms["float"] / ours,
    }


def matmul_nbits(float_file: Path, block: int, out: Path) -> Path:
    """What onnxruntime's weight-only tool writes, at its fast accuracy level."""
    settings = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(float_file), algo_config=settings)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))
    return out


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    environment = result["environment"]
    names = list(result["rows"][0]["ms"])
    lines = [
        "# One linear, beside onnxruntime's own tools",
        "",
        f"`{result['command']}`: {environment['cpu']}, onnxruntime {environment['onnxruntime']}, batch 1; "
        "milliseconds, medians of interleaved runs. To reach: ours at least as fast as the best of the tools (ratio at "
        "most 1, give or take 0.05 of noise).",
        "",
        f"| shape | rows | {' | '.join(names)} | chosen at 4 and 8 bits | ours / best tool | float / ours |",
        "|" + "---|" * (len(names) + 5),
    ]
    for row in result["rows"]:
        cells = [f"{row['ms'][name]:.3f}" for name in names]
        lines.append(
            f"| {row['shape']} | {row['rows']} | {' | '.join(cells)} | {', '.join(row['chosen'].values())} | "
            f"{row['ours_over_best_peer']:.2f} ({row['best_peer']}) | {row['speedup']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
