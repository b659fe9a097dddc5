"""Which layers of onnxruntime's own quantized files can saturate, and what that costs on the machine at hand.

``python -m benchmarks.saturation [resnet20 mobilenet_v1]`` writes ``benchmarks/results/saturation.json`` and a table of
the same name in Markdown. Each file is judged as ``compress verify FILE.onnx`` does it, and scored twice: as it runs by
default, and with ``session.x64quantprecision=1``, which is exact on every x86.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

import compress
from benchmarks.peers import peer_files
from benchmarks.zoo import ZOO, Case
from compress.exporters.saturation import prove
from compress.exporters.session import open_session, run_session
from compress.measure.machine import describe_environment

RESULTS = Path(__file__).parent / "results"
CALIBRATION, TEST = 256, 1000


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=list(ZOO), default=["resnet20"])
    models = parser.parse_args().models
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.saturation", *sys.argv[1:]]),
        "environment": describe_environment().model_dump(),
        "models": {},
    }
    for key in models:
        with tempfile.TemporaryDirectory() as scratch:
            result["models"][key] = measure(ZOO[key](), Path(scratch))
    (RESULTS / "saturation.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "saturation.md").write_text(table(result))
    print(table(result))


def measure(case: Case, scratch: Path) -> dict[str, Any]:
    """Proof and accuracy of each file of one model."""
    chosen = torch.randperm(len(case.calibration), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    images, labels = case.test[:TEST], case.labels[:TEST]
    float_file = compress.export(case.module, scratch / "float.onnx", input_shape=case.test.shape[1:])
    name = open_session(float_file, "ORT_ENABLE_ALL").get_inputs()[0].name
    files = peer_files(float_file, name, case.calibration[chosen].contiguous(), scratch, None)
    wanted = classes(float_file, images)
    rows = {}
    for peer, file in files.items():
        scores = {}
        for title, precise in (("as it runs", "0"), ("exact", "1")):
            got = classes(file, images, precise)
            scores[title] = {
                "accuracy": float((got == labels).float().mean()),
                "agreement": float((got == wanted).float().mean()),
            }
        rows[peer] = {"proof": prove(file).model_dump(mode="json"), **scores}
    return {
        "model": case.name,
        "calibration_samples": CALIBRATION,
        "test_samples": len(images),
        "float_accuracy": float((wanted == labels).float().mean()),
        "files": rows,
    }


def classes(file: Path, images: Tensor, precise: str = "0") -> Tensor:
    """Predicted class of every image, in a session as anybody opens it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", precise)
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return run_session(session, [(batch,) for batch in images.split(50)])[0].argmax(1)


def table(result: dict[str, Any]) -> str:
    """The files in Markdown, and the layers of those that are not proven."""
    environment = result["environment"]
    lines = [
        "# Layers that can saturate",
        "",
        f"`{result['command']}`: {environment['cpu']}, one thread, onnxruntime {environment['onnxruntime']}. Flags: "
        f"{', '.join(environment['cpu_flags'])}. Files by onnxruntime's own quantizers; agreement is with the float "
        "model, exact is `session.x64quantprecision=1`. Layers are named whose codes do not prove that sums fit "
        "in 16 bits (`compress verify FILE.onnx`).",
        "",
        "| model | file | layers not proven | not proven on | accuracy %, as it runs / exact | agreement % |",
        "|---|---|---|---|---|---|",
    ]
    for model in result["models"].values():
        for peer, row in model["files"].items():
            proof = row["proof"]
            open_sets = [name for name, exact in proof["instruction_sets"].items() if not exact]
            count = sum(bool(layer["unproven"]) for layer in proof["layers"])
            pairs = [
                " / ".join(f"{100 * row[title][metric]:.2f}" for title in ("as it runs", "exact"))
                for metric in ("accuracy", "agreement")
            ]
            lines.append(
                f"| {model['model']} | {peer} | {count} of {len(proof['layers'])} | {', '.join(open_sets) or 'none'} | "
                f"{' | '.join(pairs)} |"
            )
    for model in result["models"].values():
        for peer, row in model["files"].items():
            layers = [each for each in row["proof"]["layers"] if each["unproven"]]
            if layers:
                lines += [
                    "",
                    f"## {model['model']}, {peer}",
                    "",
                    "| layer | pair sum | channel | codes |",
                    "|---|---|---|---|",
                ]
                lines += [
                    f"| {each['name']} | {each['worst']} of {each['limit']} | {each['channel']} | "
                    f"{' and '.join(map(str, each['codes']))} at {' and '.join(map(str, each['pair']))} |"
                    for each in layers
                ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
