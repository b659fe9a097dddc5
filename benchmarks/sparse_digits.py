"""LT-SFT beside a random mask, BitFit and full fine-tuning: 8x8 digits, an MLP trained on 0 to 4, then on all ten.

``python -m benchmarks.sparse_digits`` writes ``benchmarks/results/sparse_digits.json`` and a table beside it. The test
images are those of all ten digits. Baselines have no full phase and are trained for the epochs of both, so that all see
as many samples. Every seed has a base and an order of samples of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy import RESULTS
from benchmarks.lowrank import digits
from compress.measure.machine import describe_environment
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.sparse.job import SparseCompanion

FULL, LOTTERY = "full fine-tuning", "LT-SFT"
BASELINES = {"random mask": "random", "BitFit": "bitfit"}
CASES: dict[str, tuple[float, tuple[str, ...]]] = {
    "K = 5 %": (0.05, ()),
    "K = 5 %, head trained whole beside it": (0.05, ("4",)),
    "K = 0.5 %": (0.005, ()),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
JUDGED = 200


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--full", type=int, default=10, help="epochs of the full phase")
    parser.add_argument("--sparse", type=int, default=20, help="epochs of the sparse phase")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given, test = digits()
    train, judged = part(given, slice(0, -JUDGED)), part(given, slice(-JUDGED, None))
    # By case and method: [seed][rate], accuracy on the images that choose the rate and on the test images.
    measured: dict[str, dict[str, list[list[tuple[float, float]]]]] = {name: {} for name in CASES}
    changed: dict[str, dict[str, int]] = {name: {} for name in CASES}
    for seed in range(arguments.seeds):
        base = trained_base(train, seed)
        for case, (density, head) in CASES.items():
            rows: dict[str, list[tuple[float, float]]] = {}
            for rate in RATES:
                recipe = Recipe(
                    epochs=arguments.full, batch=32, rate=rate, weight_decay=0.0, schedule="linear",
                    optimizer="adamw", seed=seed,
                )  # fmt: skip
                for name, (module, count) in fine_tuned(base, density, head, train, recipe, arguments.sparse).items():
                    rows.setdefault(name, []).append((evaluate(module, judged), evaluate(module, test)))
                    changed[case][name] = count
            for name, row in rows.items():
                measured[case].setdefault(name, []).append(row)
            print(seed, case, {name: [round(each, 3) for _, each in row] for name, row in rows.items()}, flush=True)
    result = {
        "command": f"python -m benchmarks.sparse_digits --seeds {arguments.seeds} --full {arguments.full} "
        f"--sparse {arguments.sparse}",
        "environment": describe_environment().model_dump(),
        "rates": RATES,
        "changed": changed,
        "measured": measured,
    }
    (RESULTS / "sparse_digits.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "sparse_digits.md").write_text(table(result))
    print(table(result))


def part(data: TrainingData, some: slice) -> TrainingData:
    """``some`` of the samples."""
    return TrainingData(tuple(x[some] for x in data.inputs), data.labels[some])


def trained_base(train: TrainingData, seed: int) -> nn.Module:
    """64-128-128-10, trained on the digits 0 to 4."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    known = train.labels < 5
    some = TrainingData(tuple(x[known] for x in train.inputs), train.labels[known])
    fit(module, some, Recipe(epochs=30, batch=32, rate=1e-3, weight_decay=0.0, optimizer="adamw", seed=seed))
    return module


def fine_tuned(
    base: nn.Module, density: float, head: tuple[str, ...], train: TrainingData, recipe: Recipe, sparse: int
) -> dict[str, tuple[nn.Module, int]]:
    """``base`` after each method, and how many entries outside a whole head that may change."""
    module = copy.deepcopy(base)
    tuner = SparseFineTuner(module, density=density, head=head)
    found = {"base": (base, 0)}
    fit(module, train, recipe, companion=SparseCompanion(tuner))
    tuner.select()
    fit(module, train, replace(recipe, epochs=sparse), companion=SparseCompanion(tuner))
    found[LOTTERY] = (module, tuner.delta().k)
    longer = replace(recipe, epochs=recipe.epochs + sparse)
    for name, criterion in BASELINES.items():
        module = copy.deepcopy(base)
        share = None if criterion == "bitfit" else density
        tuner = SparseFineTuner(module, density=share, criterion=criterion, head=head, seed=recipe.seed)
        tuner.select()
        fit(module, train, longer, companion=SparseCompanion(tuner))
        found[name] = (module, tuner.delta().k)
    module = copy.deepcopy(base)
    fit(module, train, longer)
    found[FULL] = (module, tuner.parts.count)
    return found


def table(result: dict[str, Any]) -> str:
    """Means, standard errors and differences in Markdown."""
    rates = result["rates"]
    lines = [
        "# Sparse fine-tuning: digits 0 to 4, then all ten, MLP 64-128-128-10",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}. Accuracy on all ten digits in percent, mean and "
        "standard error over seeds, by the learning rate of all phases; then at each method's own best, chosen on "
        f"{JUDGED} images that are neither trained nor tested on. LT-SFT's lead is taken seed by seed; to reach: more "
        "than two standard errors. BitFit trains all biases.",
    ]
    for case, methods in result["measured"].items():
        numbers = {name: 100 * np.array(rows) for name, rows in methods.items()}
        best = {name: int(each[:, :, 0].mean(0).argmax()) for name, each in numbers.items()}
        lines += ["", f"**{case}**", "", f"| | entries | {' | '.join(f'{rate:g}' for rate in rates)} | own best |"]
        lines.append("|---" * (3 + len(rates)) + "|")
        for name, each in numbers.items():
            row = [shown(each[:, at, 1]) for at in (*range(len(rates)), best[name])]
            lines.append(f"| {name} | {result['changed'][case][name]:,} | {' | '.join(row)} |")
        for name in BASELINES:
            leads = [numbers[LOTTERY][:, at, 1] - numbers[name][:, at, 1] for at in range(len(rates))]
            leads.append(numbers[LOTTERY][:, best[LOTTERY], 1] - numbers[name][:, best[name], 1])
            row = [f"{shown(each, '+')} ({each.mean() / max(error_of(each), 1e-9):.1f} s.e.)" for each in leads]
            lines.append(f"| lead over {name} | | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def shown(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard error of ``values`` [seeds]."""
    return f"{values.mean():{sign}.1f} ± {error_of(values):.1f}"


def error_of(values: np.ndarray) -> float:
    """Standard error of the mean of ``values`` [seeds]."""
    return float(values.std(ddof=1) / len(values) ** 0.5)


if __name__ == "__main__":
    main()
