"""A front on disk: a table (CSV), everything (JSON), a plot (PNG and SVG), and every plan."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.files.known_folders import FRONT_FILE
from compress.files.outputs import new_folder
from compress.plans.plan_file import save_plan
from compress.records.allocation import Front, FrontPoint
from compress.records.plan import Plan

__all__ = ["FRONT", "write_front"]

_TABLE = "front.csv"
# What compress.files.outputs knows its folders by.
FRONT = (FRONT_FILE, "compress sweep")
_UNITS = {"size": (1e3, "kB"), "latency": (1e3, "ms"), "bops": (1e9, "G bit operations")}


def write_front(folder: Path, front: Front, plans: Sequence[Plan], overwrite: bool) -> None:
    """Write ``folder`` with ``front.csv``, ``front.json``, ``front.png``, ``front.svg`` and the plans.

    Raises:
        InputError: see :func:`~compress.files.outputs.new_folder`.
    """
    with new_folder(folder, overwrite, *FRONT) as partial:
        for point, plan in zip(front.points, plans, strict=True):
            save_plan(plan, partial / point.plan)
        rows = [_row(point) for point in front.points]
        with open(partial / _TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        (partial / FRONT_FILE).write_text(front.model_dump_json(indent=2))
        _plot(partial, front)


def _row(point: FrontPoint) -> dict[str, Any]:
    return {
        "number": point.number,
        "plan": point.plan,
        **{f"predicted_{name}": value for name, value in point.predicted.items()},
        **{f"measured_{name}": value for name, value in point.measured.items()},
        "greedy_error": point.greedy_error,
        "bound": point.bound,
        "gap": point.gap,
        "status": point.status,
    }


def _plot(folder: Path, front: Front) -> None:
    """Error against what was swept: predicted, greedy's, and where plans were carried out, measured."""
    from matplotlib.figure import Figure

    scale, unit = _UNITS[front.over]
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    x = [point.measured.get(front.over, point.predicted[front.over]) / scale for point in front.points]
    axes.plot(x, [point.predicted["error"] for point in front.points], "o-", label="integer program, predicted")
    greedy = [(at, point.greedy_error) for at, point in zip(x, front.points, strict=True) if point.greedy_error]
    if greedy:
        axes.plot(*zip(*greedy, strict=True), "x--", color="tab:gray", label="greedy, predicted")
    found = list(zip(x, front.points, strict=True))
    measured = [(at, point.measured["error"]) for at, point in found if "error" in point.measured]
    if measured:
        axes.plot(*zip(*measured, strict=True), "s:", color="tab:green", label="carried out")
    axes.axvline(front.float_totals[front.over] / scale, color="tab:red", linewidth=1, label="float model")
    axes.set_yscale("log")
    axes.set_xlabel(f"{front.over} ({unit})")
    axes.set_ylabel(f"error ({front.sensitivity})")
    axes.grid(visible=True, which="both", alpha=0.25)
    accuracies = [(at, 100 * point.measured["accuracy"]) for at, point in found if "accuracy" in point.measured]
    if accuracies:
        right = axes.twinx()
        right.plot(*zip(*accuracies, strict=True), "^-", color="tab:orange", alpha=0.7, label="accuracy")
        right.set_ylabel("accuracy (%)")
        right.legend(loc="lower right")
    axes.legend(loc="upper right")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"front.{suffix}", dpi=150)
