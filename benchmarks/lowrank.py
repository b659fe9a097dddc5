"""Maestro's accuracy at every rank beside post-hoc SVD of a dense net: 8x8 digits, MLP 64-64-64-10, several seeds.

``python -m benchmarks.lowrank`` writes ``benchmarks/results/lowrank.json`` and a table beside it. All nets start from
the same weights and are trained alike, but for the sampler; all layers are then cut to the same rank, without training.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.accuracy import RESULTS
from compress.lowrank.decompose import decompose, decomposed_layers
from compress.lowrank.maestro import Maestro
from compress.measure.machine import describe_environment
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.lowrank.job import MaestroCompanion

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TRAINED = 1297
SVD = "dense, then SVD"
VARIANTS = (SVD, "pair", "independent", "shared")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = digits()
    curves: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        start = mlp()
        recipe = Recipe(epochs=arguments.epochs, batch=64, rate=0.05, seed=seed)
        for name in curves:
            module = copy.deepcopy(start)
            companion = None
            if name != SVD:
                companion = MaestroCompanion(Maestro(module, penalty=0.0, threshold=0.0, sampler=name, seed=seed))
            begun = time.perf_counter()
            fit(module, train, recipe, companion=companion)
            seconds[name].append((time.perf_counter() - begun) / arguments.epochs)
            if name == SVD:
                decompose(module)
            curves[name].append([at_rank(module, rank, test) for rank in RANKS])
            print(seed, name, [f"{value:.3f}" for value in curves[name][-1]], flush=True)
    result = {
        "command": f"python -m benchmarks.lowrank --seeds {arguments.seeds} --epochs {arguments.epochs}",
        "environment": describe_environment().model_dump(),
        "ranks": RANKS,
        "accuracy": curves,
        "seconds_an_epoch": {name: float(np.mean(each)) for name, each in seconds.items()},
    }
    (RESULTS / "lowrank.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "lowrank.md").write_text(table(result))


def mlp() -> nn.Module:
    """64-64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[TrainingData, TrainingData]:
    """1,297 images to train on, 500 to test on, 64 numbers each."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.from_numpy(images[order] / 16).float(), torch.from_numpy(labels[order]).long()
    return TrainingData((x[:TRAINED],), y[:TRAINED]), TrainingData((x[TRAINED:],), y[TRAINED:])


def at_rank(module: nn.Module, rank: int, test: TrainingData) -> float:
    """Accuracy with every layer cut to ``rank``, or to all it has."""
    layers = decomposed_layers(module).values()
    for layer in layers:
        layer.active = min(rank, layer.rank)
    found = evaluate(module, test)
    for layer in layers:
        layer.active = None
    return found


def table(result: dict[str, Any]) -> str:
    """Means and standard deviations in Markdown."""
    means = {name: 100 * np.array(each) for name, each in result["accuracy"].items()}
    seconds = result["seconds_an_epoch"]
    lines = [
        "# Ordered factors beside SVD after training: digits, MLP 64-64-64-10",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}. Accuracy in percent, mean and standard deviation over "
        "seeds, every layer cut to the rank, by sampler. To reach: above SVD at every rank up to 16, a quarter.",
        "",
        "Time an epoch at full rank, of the dense net's: "
        + ", ".join(f"{name} {seconds[name] / seconds[SVD]:.2f}" for name in VARIANTS[1:])
        + ".",
        "",
        f"| rank | {' | '.join(VARIANTS)} |",
        "|" + "---|" * (1 + len(VARIANTS)),
    ]
    for position, rank in enumerate(result["ranks"]):
        columns = [means[name][:, position] for name in VARIANTS]
        lines.append(
            f"| {rank} | " + " | ".join(f"{each.mean():.1f} ± {each.std(ddof=1):.1f}" for each in columns) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
