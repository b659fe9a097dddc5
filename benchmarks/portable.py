"""The same files on this processor's kernels and with exact sums: accuracy, agreement, and time beside peers.

``python -m benchmarks.portable [--only resnet20 mobilenet_v1 encoder] [--model FOLDER] [--label LABEL]`` writes
``benchmarks/results/portable-<instruction sets>.json`` and a table beside it, one of each for every kind of machine
that it was run on. A run replaces rows of the same label; others stay beside it, so that two states of the code can
be compared. FOLDER is the encoder, all-MiniLM-L6-v2 (see benchmarks/encoder.py).

Exact is ONNX Runtime's own slower kernel without saturation (``session.x64quantprecision``), or, for a file that does
not load with it, the unoptimised graph: floats that hold the integers. Nothing here asks the gate: what a file loses on
a processor is what is to be seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks import encoder
from benchmarks.accuracy import RESULTS, SAMPLES
from benchmarks.peers import prepare_file, quantize_statically
from benchmarks.zoo import ZOO, Case
from compress import api
from compress.calib.resume import ResumeStore
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.session import open_session, run_session
from compress.intake.job import open_work
from compress.intake.model import ModelLike
from compress.measure.bench import ratio_of_medians, time_models
from compress.measure.machine import describe_environment
from compress.options import gather
from compress.pipeline.apply_plan import apply_plan
from compress.plans.frame import make_plan
from compress.records.environment import Environment

PEER = "onnxruntime static, 7 bits (reduce_range)"
SATURATING_PEER = "onnxruntime static, 8 bits"
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet20": {"W8A8": {"bits": 8}, "W4A8": {"bits": 4}},
    "mobilenet_v1": {"W8A8": {"bits": 8}},
    "encoder": {
        "W8A8 static": {"bits": 8, "method": "mse"},
        "W8A8 dynamic": {"bits": 8, "act_bits": 8, "calib": None},
        "W4A8 static": {"bits": 4, "method": "gptq"},
    },
}
_VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}


@dataclass(frozen=True)
class Files:
    """A model's files by setting, the float one first, and how one of them is scored."""

    by_setting: Mapping[str, Path]
    score: Callable[[ort.InferenceSession], Any]
    feeds: Mapping[str, np.ndarray]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--model", type=Path, help="all-MiniLM-L6-v2's folder; without it the encoder is left out")
    parser.add_argument("--label", default="now", help="what this run is called in the table")
    parser.add_argument("--method", help="for every setting; default: its own, or that of `compress quantize`")
    arguments = parser.parse_args()
    given = {} if arguments.method is None else {"method": arguments.method}
    environment = describe_environment()
    stem = RESULTS / f"portable-{instruction_sets(environment)}"
    command = f"python -m benchmarks.portable --only {' '.join(arguments.only)} --label {arguments.label}"
    command += f" --method {arguments.method}" if arguments.method else ""
    run: dict[str, Any] = {"commands": [command], "environment": environment.model_dump(), "rows": []}
    for name in arguments.only:
        if name == "encoder" and arguments.model is None:
            run["note"] = "The encoder was left out: no --model was given."
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            settings = {key: SETTINGS[name][key] | given for key in SETTINGS[name]}
            if name == "encoder":
                files = encoder_files(arguments.model, settings, folder)
            else:
                files = classifier_files(ZOO[name](), settings, folder)
            run["rows"] += [{"model": name, **row} for row in measure(files)]
        keep(stem.with_suffix(".json"), arguments.label, run)
    stem.with_suffix(".md").write_text(table(json.loads(stem.with_suffix(".json").read_text())))


def instruction_sets(environment: Environment) -> str:
    """The kind of machine, by what decides which integer kernels ONNX Runtime takes."""
    flags = set(environment.cpu_flags)
    if environment.architecture not in ("x86_64", "AMD64"):
        return f"{environment.architecture}{'-dot' if 'asimddp' in flags else ''}{'-i8mm' if 'i8mm' in flags else ''}"
    kind = "avx512" if "avx512bw" in flags else "avx2" if "avx2" in flags else "sse"
    return f"{kind}-vnni" if flags & _VNNI else kind


def classifier_files(case: Case, settings: Mapping[str, Mapping[str, Any]], folder: Path) -> Files:
    """Ours and onnxruntime's, calibrated on the same images; a score is the class of every test image."""
    chosen = torch.randperm(len(case.calibration), generator=torch.Generator().manual_seed(0))[:SAMPLES].sort().values
    calibration = case.calibration[chosen].contiguous()
    files = {"float": api.export(case.module, folder / "float.onnx", input_shape=case.test.shape[1:])}
    for name, options in settings.items():
        files[name] = folder / f"{name}.onnx"
        make_file(case.module, calibration, options, files[name])
    input_name = open_session(files["float"], "ORT_ENABLE_ALL").get_inputs()[0].name
    prepared = prepare_file(files["float"], folder)
    for name, narrow in ((SATURATING_PEER, False), (PEER, True)):
        files[name] = folder / f"{name}.onnx"
        quantize_statically(prepared, files[name], input_name, calibration, reduce_range=narrow)

    def score(session: ort.InferenceSession) -> dict[str, Any]:
        classes = run_session(session, [(batch,) for batch in case.test.split(50)])[0].argmax(1)
        return {"answers": classes, "score": 100 * float((classes == case.labels).float().mean())}

    return Files(files, score, {input_name: case.test[:1].numpy()})


def make_file(model: ModelLike, calib: object, settings: Mapping[str, Any], path: Path) -> None:
    """What ``compress quantize`` writes as model.onnx, whether or not it would pass the gate on this machine."""
    options, source = gather(settings)
    work = open_work(model, calib, None, options, source)
    plan = make_plan(work.intake, options, work.samples)
    inputs = work.samples.inputs if work.samples else None
    with tempfile.TemporaryDirectory() as folder:
        store = ResumeStore(Path(folder), "portable")
        done = apply_plan(work.intake.traced.copy(), plan, inputs, store, lambda layer: None)
    write_onnx(build_onnx(done.model), path, {})
    print("made", path.name, flush=True)


def encoder_files(model: Path, settings: Mapping[str, Mapping[str, Any]], folder: Path) -> Files:
    """The sentence encoder; a score is Spearman's correlation, times 100, and there are no classes to agree on."""
    encode, pairs = encoder.encoder(model), encoder.read_pairs("test")
    calib = folder / "calib.txt"
    calib.write_text("\n".join(text for *texts, _ in encoder.read_pairs("train") for text in texts))
    files = {"float": folder / "float.onnx"}
    api.export(model, files["float"])
    for name, options in settings.items():
        files[name] = folder / f"{name}.onnx"
        given = {"samples": encoder.CALIBRATION, "calib": str(calib)} | options
        make_file(model, given.pop("calib"), given, files[name])

    def score(session: ort.InferenceSession) -> dict[str, Any]:
        return {"score": encoder.spearman(session, pairs, encode)}

    return Files(files, score, encoder.feeds_at_length())


def measure(files: Files) -> list[dict[str, Any]]:
    """A row a file: scores on this machine's kernels and with exact sums, agreement with float, and time."""
    rows: list[dict[str, Any]] = []
    baseline: Tensor | None = None
    for setting, path in files.by_setting.items():
        here = files.score(open_session(path, "ORT_ENABLE_ALL"))
        session, by = exact_session(path)
        exact = here if setting == "float" else files.score(session)
        row = {"setting": setting, "bytes": path.stat().st_size, "score": here["score"], "exact": exact["score"]}
        row["exact_by"] = by
        if "answers" in here:
            baseline = here["answers"] if baseline is None else baseline
            row["agreement"] = _share(here["answers"], baseline)
            row["agreement_exact"] = _share(exact["answers"], baseline)
            row["unlike_exact"] = int((here["answers"] != exact["answers"]).sum())
        rows.append(row)
        print(row, flush=True)
    for row, times in zip(rows, time_files(files), strict=True):
        row |= times
    return rows


def exact_session(path: Path) -> tuple[ort.InferenceSession, str]:
    """A session whose sums of products cannot saturate, and what makes it so."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), "kernel"
    except Exception as error:  # noqa: BLE001 - whatever ONNX Runtime raises, the message says why
        print(f"{path.name} with session.x64quantprecision: {str(error).splitlines()[0]}")
        return open_session(path, "ORT_DISABLE_ALL"), "unoptimised graph"


def time_files(files: Files) -> list[dict[str, float]]:
    """Median milliseconds of one sample, all files interleaved, and float's time over each's.

    What the calling thread took of the processor, which does all the work: other programs are no part of it.
    """
    calls = []
    for path in files.by_setting.values():
        session = open_session(path, "ORT_ENABLE_ALL", threads=1)
        calls.append(lambda session=session: session.run(None, files.feeds))
    times = time_models(calls, clock=time.thread_time)
    found = []
    for position in range(len(calls)):
        ratio = ratio_of_medians(times[:, 0], times[:, position])
        row = {"ms": float(np.median(times[:, position])), "speedup": 1 / ratio.value}
        found.append(row | {"speedup_low": 1 / ratio.high, "speedup_high": 1 / ratio.low})
    return found


def keep(path: Path, label: str, run: Mapping[str, Any]) -> None:
    """Write ``run`` under its label; rows of models that it did not measure stay."""
    runs = json.loads(path.read_text()) if path.exists() else {}
    measured = {row["model"] for row in run["rows"]}
    before = runs.get(label, {"commands": [], "rows": []})
    commands = [*(each for each in before["commands"] if each not in run["commands"]), *run["commands"]]
    others = [row for row in before["rows"] if row["model"] not in measured]
    runs[label] = {**run, "commands": commands, "rows": [*others, *run["rows"]]}
    path.write_text(json.dumps(runs, indent=1) + "\n")


def table(runs: Mapping[str, Any]) -> str:
    """All runs in Markdown."""
    lines = ["# Integer files on this kind of machine", ""]
    for label, run in runs.items():
        environment = run["environment"]
        lines += [
            f"## {label}",
            "",
            f"`{'`, `'.join(run['commands'])}`: {environment['cpu']}, onnxruntime {environment['onnxruntime']}, one "
            f"thread, batch 1. Instruction sets: {', '.join(environment['cpu_flags'])}. Scores are accuracy in %, of "
            "the encoder Spearman x 100; exact: the same file where sums of products cannot saturate; agreement: "
            f"classes like the float model's, in %; unlike exact: test samples of another class. "
            f"{run.get('note', '')}".rstrip(),
            "",
            "| model | file | kB | score here | exact | agreement here | exact | unlike exact | ms "
            "| float / it (95 %) |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in run["rows"]:
            agreement = [f"{100 * row[key]:.2f}" if key in row else "" for key in ("agreement", "agreement_exact")]
            exact = f"{row['exact']:.2f}" + (" *" if row["exact_by"] != "kernel" else "")
            lines.append(
                f"| {row['model']} | {row['setting']} | {row['bytes'] / 1e3:.0f} | {row['score']:.2f} | {exact} "
                f"| {' | '.join(agreement)} | {row.get('unlike_exact', '')} | {_times(row)} |"
            )
        if any(row["exact_by"] != "kernel" for row in run["rows"]):
            lines += ["", "\\* by the unoptimised graph: ONNX Runtime does not load the file with its exact kernels."]
        lines.append("")
    return "\n".join(lines)


def _times(row: Mapping[str, Any]) -> str:
    if "ms" not in row:
        return " | "
    return f"{row['ms']:.3f} | {row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"


def _share(classes: Tensor, others: Tensor) -> float:
    return float((classes == others).float().mean())


if __name__ == "__main__":
    main()
