"""Bits and ranks in one program beside bits alone and ranks alone, over a range of latencies.

``python -m benchmarks.joint resnet56`` or ``python -m benchmarks.joint encoder --model FOLDER`` writes
``benchmarks/results/joint-<name>.json`` and a table beside it. All three programs choose from the same measured prices
and errors; every plan is exported and timed before it counts. Some are carried out, calibrated, and scored.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy import RESULTS, classes
from benchmarks.encoder import encoder, read_pairs, spearman
from benchmarks.zoo import ZOO
from compress.errors import InfeasibleBudget
from compress.exporters.session import open_session
from compress.intake.job import Work, open_work
from compress.measure.machine import describe_environment
from compress.options import Options, Search, Source
from compress.pipeline.run import realize
from compress.records.plan import Plan
from compress.search.allocator import Allocator
from compress.search.prepare import Prepared, prepare
from compress.search.space import Way

RANKS = (0.25, 0.5, 0.75)
KINDS: dict[str, Callable[[Way], bool]] = {
    "bits": lambda way: way.rank is None,
    "ranks": lambda way: way.option is None,
    "joint": lambda way: True,
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["resnet56", "resnet20", "encoder"])
    parser.add_argument("--model", type=Path, help="the encoder's folder")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--carried", type=int, default=2, help="limits whose plans are carried out")
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    options = Options(
        samples=arguments.samples,
        iterations=arguments.iterations,
        search=Search(weight_widths=(4, 8), ranks=RANKS, floats=True, sensitivity_iterations=0, top=2),
    )
    with tempfile.TemporaryDirectory() as folder:
        work, score = opened(arguments, options, Path(folder))
        prepared = prepare(work.intake, options, work.samples, say, also_timed=True)
        rows = points(prepared, arguments.points)
        carried = carry_out(work, prepared, rows, arguments.carried, score, Path(folder))
    result = {
        "command": f"python -m benchmarks.joint {arguments.name} --samples {arguments.samples} --points "
        f"{arguments.points} --carried {arguments.carried} --iterations {arguments.iterations}",
        "environment": describe_environment().model_dump(),
        "float_us": prepared.allocator.costs.float_totals["latency"],
        "notes": prepared.notes,
        "rows": [{key: value for key, value in row.items() if key != "plans"} for row in rows],
        "carried": carried,
    }
    (RESULTS / f"joint-{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"joint-{arguments.name}.md").write_text(table(arguments.name, result))


def opened(arguments: argparse.Namespace, options: Options, folder: Path) -> tuple[Work, Callable[[Path], float]]:
    """The model with its data, and what scores a file in points."""
    if arguments.name == "encoder":
        calib = folder / "calib.txt"
        calib.write_text("\n".join(text for *texts, _ in read_pairs("train") for text in texts))
        pairs, encode = read_pairs("test"), encoder(arguments.model)
        work = open_work(arguments.model, str(calib), None, options, Source())
        return work, lambda file: spearman(open_session(file, "ORT_ENABLE_ALL", threads=2), pairs, encode)
    case = ZOO[arguments.name]()
    calibration = case.calibration[: arguments.samples]
    work = open_work(case.module, calibration, None, options, Source())

    def accuracy(file: Path) -> float:
        return 100 * float((classes(file, case.test) == case.labels).float().mean())

    return work, accuracy


def points(prepared: Prepared, count: int) -> list[dict[str, Any]]:
    """One row a latency: each program's predicted error, and what its file took."""
    whole = prepared.allocator
    programs = {kind: restricted(whole, keep) for kind, keep in KINDS.items()}
    least = whole.smallest("latency", {})
    assert least is not None
    most = whole.costs.float_totals["latency"]
    rows = []
    for step in range(count):
        limit = least * 1.04 * (most / least / 1.04) ** (step / (count - 1))
        row: dict[str, Any] = {"limit_us": limit, "plans": {}}
        for kind, allocator in programs.items():
            try:
                draft = allocator.find({"latency": limit})
            except InfeasibleBudget:
                continue
            row[kind] = draft.predicted["error"]
            row[f"{kind}_us"] = draft.measured["latency"]
            row[f"{kind}_size"] = draft.measured["size"]
            row[f"{kind}_cut"] = sum(way.rank is not None for way in draft.ways.values())
            row["plans"][kind] = allocator.plan(prepared.frame, draft, (), prepared.measure, "error")
        rows.append(row)
        print({key: value for key, value in row.items() if key != "plans"}, flush=True)
    return rows


def restricted(allocator: Allocator, keep: Callable[[Way], bool]) -> Allocator:
    """The same prices and errors, fewer ways."""
    ways = {layer: tuple(filter(keep, found)) for layer, found in allocator.space.ways.items()}
    space = replace(allocator.space, ways=ways)
    made = Allocator(allocator.traced, space, allocator.costs, allocator.target, allocator.search, say)
    made.errors = allocator.errors
    return made


def carry_out(
    work: Work, prepared: Prepared, rows: list[dict[str, Any]], count: int, score: Callable[[Path], float], folder: Path
) -> list[dict[str, Any]]:
    """Calibrate, export and score the plans of ``count`` limits at which several programs have one of their own."""
    wanted = [row for row in rows if len({plan_text(plan) for plan in row["plans"].values()}) > 1][:count]
    found = []
    for number, row in enumerate(wanted):
        for kind, plan in row["plans"].items():
            out = folder / f"{number}-{kind}"
            report = realize(work.intake, plan, work.samples, None, out, overwrite=False, progress=say).report
            found.append(
                {
                    "limit_us": row["limit_us"],
                    "program": kind,
                    "predicted": row[kind],
                    "error": report.measured.get("error"),
                    "us": report.latency.compressed_ms * 1e3 if report.latency else None,
                    "size": report.size.compressed_bytes,
                    "score": score(out / "model.onnx"),
                }
            )
            print(found[-1], flush=True)
    return found


def plan_text(plan: Plan) -> str:
    """What it does."""
    return str([plan.choices, plan.splits])


def say(what: str, done: int, total: int) -> None:
    """Rows are printed instead."""


def table(name: str, result: dict[str, Any]) -> str:
    """Both parts in Markdown."""
    environment = result["environment"]
    lines = [
        f"# Bits and ranks in one program: {name}",
        "",
        f"`{result['command']}`: {environment['cpu']}, onnxruntime {environment['onnxruntime']}, one thread; the float "
        f"model takes {result['float_us']:.0f} us. Predicted error (relative squared, of the outputs) of the best plan "
        "within a latency; in brackets what its exported file took, and how many layers are cut.",
        "",
        "| limit, us | bits alone | ranks alone | both |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row[kind]:.3g} ({row[f'{kind}_us']:.0f}; {row[f'{kind}_cut']})" if kind in row else "out of reach"
            for kind in KINDS
        ]
        lines.append(f"| {row['limit_us']:.0f} | {' | '.join(cells)} |")
    if result["carried"]:
        keys = list(result["carried"][0])
        lines += ["", "Carried out:", "", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
        for row in result["carried"]:
            values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
