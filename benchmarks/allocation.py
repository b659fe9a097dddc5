"""Allocation on a real model: mixed against uniform, predictions against measurements, program against greedy.

``python -m benchmarks.allocation resnet20 [--parts accuracy spread latency front]`` writes
``benchmarks/results/allocation-<model>.json`` and a table of the same name in Markdown (``front``: a plot too); parts
not asked for keep what an earlier run wrote.

- ``accuracy``: uniform W4A4 and W4A8 and the mixed plan in a file no larger than each, carried out and scored on the
  test set, beside each other's float drop.
- ``spread``: 12 plans from the smallest size on, carried out with fewer steps; Spearman's correlation of predicted and
  measured KL, the latter on test images that neither calibration nor sensitivity has seen.
- ``latency``: five plans for latencies between all integer and all float, predicted and measured, and a budget halfway.
- ``front``: predicted error of the program and of greedy over 25 sizes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from benchmarks.accuracy import RESULTS, classes
from benchmarks.zoo import ZOO, Case
from compress import api
from compress.calib.output_loss import output_loss
from compress.data.samples import load_samples
from compress.intake.model import take_in
from compress.measure.machine import describe_environment
from compress.options import Options, Search
from compress.records.plan import Plan
from compress.search.front import sweep_front
from compress.search.front_folder import write_front
from compress.search.prepare import Prepared, prepare

PARTS = ("accuracy", "spread", "latency", "front")
SAMPLES = 1024
SPREAD_STEPS = 100
WIDTHS = (2, 3, 4, 5, 6, 8)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(ZOO))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    case = ZOO[arguments.model]()
    stem = RESULTS / f"allocation-{arguments.model}"
    file = stem.with_suffix(".json")
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    work = Work(case)
    for part in arguments.parts:
        found = {"accuracy": accuracy, "spread": spread, "latency": latency, "front": front}[part](work, stem)
        result[part] = {
            "command": shlex.join(["python", "-m", "benchmarks.allocation", arguments.model, "--parts", part]),
            "environment": describe_environment().model_dump(),
            "calibration_samples": SAMPLES,
            "test_samples": len(case.test),
            **found,
        }
        file.write_text(json.dumps(result, indent=2) + "\n")
        stem.with_suffix(".md").write_text(table(case.name, result))
        print(table(case.name, result), flush=True)


class Work:
    """A model taken in, its calibration samples, and what is asked of it again and again."""

    def __init__(self, case: Case) -> None:
        self.case = case
        chosen = torch.randperm(len(case.calibration), generator=torch.Generator().manual_seed(0))[:SAMPLES]
        self.calibration = case.calibration[chosen.sort().values].contiguous()
        self.samples = load_samples(self.calibration)
        self.intake = take_in(case.module, samples=self.samples)

    def prepare(self, **search: Any) -> Prepared:
        options = Options(search=Search(weight_widths=WIDTHS, **search))
        return prepare(self.intake, options, self.samples, note, also_timed=search.get("floats", False))

    def carry_out(self, plan: Plan, **settings: Any) -> dict[str, float]:
        """Size, accuracy and drop on the test set by ONNX Runtime, and measured KL on it."""
        with tempfile.TemporaryDirectory() as folder:
            result = api.apply(plan, self.case.module, calib=self.calibration, out=Path(folder) / "out", **settings)
            file = Path(folder) / "out" / "model.onnx"
            right = classes(file, self.case.test) == self.case.labels
            model = replace(self.intake.traced, module=result.module)
            return {
                "file_bytes": file.stat().st_size,
                "accuracy": float(right.float().mean()),
                "drop_points": 100 * (self.case.float_accuracy - float(right.float().mean())),
                "kl": output_loss(self.intake.traced, model, (self.case.test,), None, "kl"),
                "latency_ms": result.report.latency.compressed_ms if result.report.latency else 0.0,
                "seconds": result.report.calibration_seconds,
            }


def accuracy(work: Work, stem: Path) -> dict[str, Any]:
    """Uniform and mixed plans of one size."""
    rows = {}
    for name, act_bits in (("W4A4", 4), ("W4A8", 8)):
        uniform = api.preview(work.case.module, calib=work.calibration, bits=4, act_bits=act_bits).plan
        rows[f"uniform {name}"] = work.carry_out(uniform)
        prepared = work.prepare(tied=act_bits == 4)
        budgets = {"size": rows[f"uniform {name}"]["file_bytes"]}
        draft = prepared.allocator.find(budgets)
        plan = prepared.allocator.plan(prepared.frame, draft, (), prepared.measure, "error")
        label = f"mixed, {'W = A' if act_bits == 4 else 'A8'}, size of {name}"
        rows[label] = {**work.carry_out(plan), "predicted": draft.predicted["error"], "gap": draft.answer.gap}
        print(label, rows[label], flush=True)
    return {"rows": rows}


def spread(work: Work, stem: Path) -> dict[str, Any]:
    """Twelve plans carried out."""
    prepared = work.prepare(tied=True, sensitivity="kl")
    frame = prepared.frame.model_copy(update={"iterations": SPREAD_STEPS})
    found, plans = sweep_front(replace(prepared, frame=frame), "size", 12, note)
    rows = []
    for point, plan in zip(found.points, plans, strict=True):
        rows.append({"predicted_kl": point.predicted["error"], **work.carry_out(plan)})
        print(rows[-1], flush=True)
    predicted, measured = ([row[key] for row in rows] for key in ("predicted_kl", "kl"))
    return {"iterations": SPREAD_STEPS, "spearman": float(spearmanr(predicted, measured).statistic), "rows": rows}


def latency(work: Work, stem: Path) -> dict[str, Any]:
    """Plans between all integer and all float."""
    prepared = work.prepare(floats=True, sensitivity="gram")
    allocator = prepared.allocator
    least, most = allocator.smallest("latency", {}), allocator.costs.float_totals["latency"]
    rows = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        limit = least + share * (most - least)
        draft = allocator.find({"latency": limit})
        predicted, measured = draft.predicted["latency"], draft.measured["latency"]
        rows.append(
            {
                "share": share,
                "budget_us": limit,
                "predicted_us": predicted,
                "measured_us": measured,
                "error": predicted / measured - 1,
                "float_layers": sum(way.option is None for way in draft.ways.values()),
            }
        )
        print(rows[-1], flush=True)
    limit = (least + most) / 2
    plan = allocator.plan(prepared.frame, allocator.find({"latency": limit}), (), "gram", "error")
    done = work.carry_out(plan.model_copy(update={"iterations": SPREAD_STEPS}))
    ratio = done["latency_ms"] * 1e3 / limit
    return {
        "least_us": least,
        "float_us": most,
        "rows": rows,
        "halfway": {"budget_us": limit, "exported_us": done["latency_ms"] * 1e3, "ratio": ratio, **done},
    }


def front(work: Work, stem: Path) -> dict[str, Any]:
    """Program and greedy over 25 sizes."""
    prepared = work.prepare(tied=True, sensitivity="kl")
    found, plans = sweep_front(prepared, "size", 25, note)
    with tempfile.TemporaryDirectory() as folder:
        write_front(Path(folder), found, plans)
        stem.with_name(f"{stem.name}-front.png").write_bytes((Path(folder) / "front.png").read_bytes())
    rows = [
        {
            "size": point.measured["size"],
            "error": point.predicted["error"],
            "greedy_error": point.greedy_error,
            "status": point.status,
        }
        for point in found.points
    ]
    excess = [row["greedy_error"] / row["error"] - 1 for row in rows if row["greedy_error"]]
    return {"rows": rows, "greedy_excess_mean": sum(excess) / len(excess), "greedy_excess_max": max(excess)}


def note(what: str, done: int, total: int) -> None:
    """Progress is printed row by row."""


def table(name: str, result: dict[str, Any]) -> str:
    """All parts in Markdown."""
    lines = [f"# Allocation: {name}", ""]
    for part, found in result.items():
        environment = found["environment"]
        lines += [
            f"## {part}", "",
            f"`{found['command']}`: {found['calibration_samples']} calibration, {found['test_samples']} test samples; "
            f"{environment['cpu']}, onnxruntime {environment['onnxruntime']}, one thread.", "",
        ]  # fmt: skip
        rows = found["rows"]
        rows = [{"plan": key, **row} for key, row in rows.items()] if isinstance(rows, dict) else rows
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_text(row.get(column)) for column in columns)} |" for row in rows]
        rest = {key: value for key, value in found.items() if isinstance(value, float)}
        lines += ["", *(f"- {key}: {_text(value)}" for key, value in rest.items())]
        if "halfway" in found:
            lines.append(f"- halfway: {', '.join(f'{k} {_text(v)}' for k, v in found['halfway'].items())}")
        lines.append("")
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if value < 1e5 else f"{value:.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
