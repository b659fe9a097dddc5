"""Weights only in groups: rounding, HQQ and GPTQ on two small language models, in nats a token.

``python -m benchmarks.language [MODEL ...]`` writes ``benchmarks/results/language.json`` and a table beside it. Every
exported file is scored by ONNX Runtime on windows that calibration has not seen; linears only, embeddings stay float.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import RESULTS
from benchmarks.language_models import LANGUAGE_MODELS, LanguageCase
from compress import api
from compress.exporters.session import open_session, run_session
from compress.measure.machine import describe_environment

METHODS = ("minmax", "mse", "hqq", "gptq")
GROUPS = (32, 64, 128)
BITS = (2, 3, 4, 8)


def main() -> None:
    """Run from the command line; rows not asked for keep what an earlier run wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(LANGUAGE_MODELS))
    parser.add_argument("--bits", nargs="*", type=int, default=BITS)
    parser.add_argument("--groups", nargs="*", type=int, default=GROUPS)
    arguments = parser.parse_args()
    file = RESULTS / "language.json"
    result = json.loads(file.read_text()) if file.exists() else {"models": {}}
    result["environment"] = describe_environment().model_dump()
    for name in arguments.models:
        case = LANGUAGE_MODELS[name]()
        found = result["models"].setdefault(name, {"float": float_loss(case), "rows": []})
        widest = max(module.in_features for module in case.module.modules() if isinstance(module, nn.Linear))
        for bits in arguments.bits:
            for group in [each for each in arguments.groups if each <= widest]:
                for method in METHODS:
                    key = {"bits": bits, "group": group, "method": method}
                    found["rows"] = [row for row in found["rows"] if not key.items() <= row.items()]
                    found["rows"].append({**key, **quantized(case, **key)})
                    print(name, found["rows"][-1], flush=True)
                    write(result)


def float_loss(case: LanguageCase) -> float:
    """Nats a token of the float model on the test windows."""
    with torch.no_grad():
        scores = torch.cat([case.module(part[:, :-1]) for part in case.test.split(32)])
    return nats(scores, case.test)


def nats(scores: Tensor, windows: Tensor) -> float:
    """Mean cross-entropy of [N, T, V] with the tokens that follow."""
    return float(F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()))


def quantized(case: LanguageCase, bits: int, group: int, method: str) -> dict[str, float]:
    """One export: nats a token, bytes, seconds."""
    calib = case.calibration[:, :-1].contiguous()
    with tempfile.TemporaryDirectory() as folder:
        result = api.quantize(
            case.module, calib=calib, bits=bits, group_size=group, method=method, first_last_bits=bits,
            bias_correction=False, ignore=case.tables, out=Path(folder) / "out",
        )  # fmt: skip
        file = Path(folder) / "out" / "model.onnx"
        session = open_session(file, "ORT_ENABLE_ALL")
        (scores, *_) = run_session(session, ((part[:, :-1].contiguous(),) for part in case.test.split(32)))
        return {
            "nats": nats(scores, case.test),
            "file_bytes": file.stat().st_size,
            "seconds": result.report.calibration_seconds,
        }


def write(result: dict) -> None:
    """Everything so far, as JSON and as a table a model."""
    (RESULTS / "language.json").write_text(json.dumps(result, indent=2) + "\n")
    environment = result["environment"]
    lines = [
        "# Language models, weights only", "",
        f"`python -m benchmarks.language`; {environment['cpu']}, ONNX Runtime {environment['onnxruntime']}.",
        "Rise of the loss in nats a token on held-out text.", "",
    ]  # fmt: skip
    for name, found in result["models"].items():
        lines += [f"## {name}, float {found['float']:.4f}", "", f"| bits | group | {' | '.join(METHODS)} |"]
        lines += ["|" + "---|" * (2 + len(METHODS))]
        for bits in BITS:
            for group in GROUPS:
                cells = {r["method"]: r["nats"] - found["float"] for r in found["rows"]
                         if (r["bits"], r["group"]) == (bits, group)}  # fmt: skip
                if cells:
                    shown = " | ".join(f"{cells[each]:+.4f}" if each in cells else "" for each in METHODS)
                    lines.append(f"| {bits} | {group} | {shown} |")
        lines.append("")
    (RESULTS / "language.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
