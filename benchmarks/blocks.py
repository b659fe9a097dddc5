"""Layer-wise and block-wise calibration at few bits, over seeds: accuracy on held-out images and what it took.

``python -m benchmarks.blocks resnet20 --settings W2A4 --methods adaquant genie --samples 256 --seeds 3`` adds rows to
``benchmarks/results/blocks-<model>.jsonl``, each as soon as it is measured, and leaves out those that are there
already; the table of the same name is written anew. ``--plot`` draws accuracy against time over the iterations there.
Seeds choose the calibration images and everything random; the first and the last layer have 8 bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import compress
from benchmarks.zoo import ZOO, Case
from compress.measure.machine import describe_environment

RESULTS = Path(__file__).parent / "results"
_BATCH = 100


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(ZOO))
    parser.add_argument("--settings", nargs="*", default=[], help="such as W2A4")
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--iterations", nargs="*", type=int, help="[default: each method's own]")
    parser.add_argument("--samples", nargs="*", type=int, default=[256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="for a second process that shares the work")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    case = ZOO[arguments.model]()
    stem = RESULTS / f"blocks-{arguments.model}"
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    wanted = itertools.product(
        seeds, arguments.settings, arguments.samples, arguments.iterations or [None], arguments.methods
    )
    for seed, setting, samples, iterations, method in wanted:
        key = {"setting": setting, "samples": samples, "method": method, "iterations": iterations, "seed": seed}
        if not any(key.items() <= row.items() for row in _rows(stem)):
            row = key | measure(case, **key) | {"threads": torch.get_num_threads()}
            print(json.dumps(row), flush=True)
            _add(stem, row)
    rows = _rows(stem)
    stem.with_suffix(".md").write_text(table(case, rows))
    if arguments.plot:
        plot(rows, stem.with_suffix(".png"))


def measure(
    case: Case, *, setting: str, samples: int, method: str, iterations: int | None, seed: int
) -> dict[str, Any]:
    """One calibration: accuracies in per cent, agreement with the float model on its own images, seconds."""
    bits, act_bits = (int(each) for each in setting.removeprefix("W").split("A"))
    chosen = torch.randperm(len(case.calibration), generator=torch.Generator().manual_seed(seed))[:samples]
    images = case.calibration[chosen.sort().values].contiguous()
    with tempfile.TemporaryDirectory() as scratch:
        started, used = time.monotonic(), time.process_time()
        compress.quantize(
            case.module,
            calib=images,
            out=f"{scratch}/model",
            bits=bits,
            act_bits=act_bits,
            method=method,
            iterations=iterations,
            samples=samples,
            seed=seed,
        )
        seconds, processor = time.monotonic() - started, time.process_time() - used
        quantized = compress.load(f"{scratch}/model")
        right = _classes(quantized, case.test) == case.labels
        same = _classes(quantized, images) == _classes(case.module, images)
        unseen = _classes(quantized, case.test) == _classes(case.module, case.test)
    return {
        "accuracy": 100 * float(right.float().mean()),
        "agreement": 100 * float(same.float().mean()),
        "agreement_unseen": 100 * float(unseen.float().mean()),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
    }


@torch.no_grad()
def _classes(module: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([module(batch).argmax(1) for batch in images.split(_BATCH)])


def _rows(stem: Path) -> list[dict[str, Any]]:
    lines = stem.with_suffix(".jsonl")
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def _add(stem: Path, row: dict[str, Any]) -> None:
    # One short write in append mode: processes that share the work do not mix their lines.
    with open(stem.with_suffix(".jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")


def table(case: Case, rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with their standard errors."""
    environment = describe_environment()
    lines = [
        f"# {case.name}: calibration at few bits",
        "",
        f"Float: {100 * case.float_accuracy:.2f} %. Mean and standard error over seeds. Agreement: the share of test",
        "images that the float model gives the same class; it tells methods that are close apart sooner than accuracy.",
        "Gap: agreement on the calibration images less that on the test images. Seconds are of processor time on one",
        f"thread, export and checks included; {environment.cpu}.",
        "",
        "| setting | images | method | iterations | seeds | accuracy % | agreement % | gap | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("setting", "samples", "method", "iterations")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    for key, same in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], _mean(item[1], "accuracy"))):
        gap = statistics.mean(row["agreement"] - row["agreement_unseen"] for row in same)
        setting, samples, method, iterations = key
        lines.append(
            f"| {setting} | {samples} | {method} | {iterations or 'default'} | {len(same)} "
            f"| {_told(same, 'accuracy')} | {_told(same, 'agreement_unseen')} | {gap:.1f} "
            f"| {_mean(same, 'processor_seconds'):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def _told(rows: list[dict[str, Any]], name: str) -> str:
    """Mean, and its standard error where there are several."""
    error = f" ± {statistics.stdev(row[name] for row in rows) / len(rows) ** 0.5:.2f}" if len(rows) > 1 else ""
    return f"{_mean(rows, name):.2f}{error}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against seconds, a line a method, a point a number of iterations."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    rows = [row for row in rows if row["iterations"] is not None]
    for kind in sorted({(row["setting"], row["samples"], row["method"]) for row in rows}):
        same = [row for row in rows if (row["setting"], row["samples"], row["method"]) == kind]
        points = sorted({row["iterations"] for row in same})
        if len(points) > 1:
            at = [[row for row in same if row["iterations"] == each] for each in points]
            seconds, accuracy = ([_mean(each, name) for each in at] for name in ("processor_seconds", "accuracy"))
            axes.plot(seconds, accuracy, marker="o", label=f"{kind[2]}, {kind[0]}, {kind[1]} images")
            for x, y, iterations in zip(seconds, accuracy, points, strict=True):
                axes.annotate(str(iterations), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xscale="log", xlabel="processor seconds", ylabel="accuracy %")
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=110, bbox_inches="tight")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
