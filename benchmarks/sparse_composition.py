"""Two tasks learned apart and added up: sparse deltas beside dense ones, ResNet-20 on CIFAR-10.

``python -m benchmarks.sparse_composition`` writes ``benchmarks/results/sparse_composition.json`` after every seed, and
a table beside it; seeds that are in the file already are not repeated. The tasks are the ten classes of images with
inverted colours, and of images turned by a right angle. Both start from the trained net, and neither sees the other's
images.

Frozen in every method: BatchNorm, its running statistics too, and the classifier. Statistics are no differences:
those of two tasks do not add up, so that they would decide what composition loses, for sparse and dense deltas
alike.

All methods see as many images: a dense delta is trained for the epochs of both phases of LT-SFT. Both tasks have one
learning rate in a row; the best row of a method is the one whose tasks, alone, are best on training images that are not
trained on. Composition is only tested.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import RESULTS
from benchmarks.sparse_digits import shown
from benchmarks.zoo import CIFAR_MEAN, CIFAR_STD, ZOO, cifar_images
from compress.measure.machine import describe_environment
from compress.sparse.application import apply_deltas
from compress.sparse.delta import SparseDelta
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.sparse.job import SparseCompanion

DENSE = "dense"
# Share of the maskable entries, and learning rates to choose from.
METHODS: dict[str, tuple[float, tuple[float, ...]]] = {
    DENSE: (1.0, (1e-4, 3e-4, 1e-3)),
    "K = 5 %": (0.05, (1e-3, 3e-3, 1e-2)),
    "K = 1 %": (0.01, (3e-3, 1e-2, 3e-2)),
}
FULL_RATE = 1e-3
JUDGED = 1000
_FILE = RESULTS / "sparse_composition.json"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=2000, help="to train on, others for every seed")
    parser.add_argument("--tested", type=int, default=2000)
    parser.add_argument("--full", type=int, default=2, help="epochs of the full phase")
    parser.add_argument("--sparse", type=int, default=3, help="epochs of the sparse phase")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = ZOO["resnet20"]()
    images, labels = cifar_images("cifar10_train_batch1.npz")
    others = cifar_images("cifar10_train_batch2.npz")
    judged = {name: data_of(change, others[0][:JUDGED], others[1][:JUDGED]) for name, change in TASKS.items()}
    some = slice(arguments.tested)
    test = {name: data_of(change, case.test[some], case.labels[some]) for name, change in TASKS.items()}
    plain = TrainingData((case.test[some],), case.labels[some])
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.sparse_composition --seeds {arguments.seeds} --images {arguments.images} "
        f"--tested {arguments.tested} --full {arguments.full} --sparse {arguments.sparse}",
        "environment": describe_environment().model_dump(),
        "base": {name: evaluate(case.module, data) for name, data in {**test, "as they are": plain}.items()},
        "settings": [arguments.images, arguments.tested, arguments.full, arguments.sparse],
        "seeds": [],
    }
    known = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    if known.get("settings") == result["settings"]:
        result["seeds"] = known["seeds"]
    for seed in range(len(result["seeds"]), arguments.seeds):
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: arguments.images]
        train = {name: data_of(change, images[index], labels[index]) for name, change in TASKS.items()}
        deltas: dict[tuple[str, float], dict[str, SparseDelta]] = {}
        for task, data in train.items():
            recipe = Recipe(
                epochs=arguments.full, batch=64, rate=FULL_RATE, weight_decay=0.0, schedule="linear",
                optimizer="adamw", seed=seed,
            )  # fmt: skip
            for row, delta in learned(case.module, data, recipe, arguments.sparse):
                deltas.setdefault(row, {})[task] = delta
        rows = []
        for (method, rate), pair in deltas.items():
            measured = composed(case.module, pair, judged, test, plain)
            rows.append({"method": method, "rate": rate, **measured})
            print(seed, method, rate, measured["alone"], measured["together"], flush=True)
        result["seeds"].append(rows)
        _FILE.write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "sparse_composition.md").write_text(table(result))
    print(table(result))


def _inverted(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(each).reshape(3, 1, 1) for each in (CIFAR_MEAN, CIFAR_STD))
    return (1 - 2 * mean) / deviation - images


def _turned(images: Tensor) -> Tensor:
    return images.rot90(1, (2, 3)).contiguous()


TASKS: dict[str, Callable[[Tensor], Tensor]] = {"inverted": _inverted, "turned": _turned}


def data_of(change: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> TrainingData:
    """One task's samples."""
    return TrainingData((change(images),), labels)


def learned(
    base: nn.Module, data: TrainingData, recipe: Recipe, sparse: int
) -> list[tuple[tuple[str, float], SparseDelta]]:
    """Method and learning rate, and the delta, of every method at each of its rates.

    Args:
        recipe: of the full phase, after which masks are chosen; one mask for all rates of the sparse phase.
        sparse: epochs of the sparse phase.
    """
    moved = tuned(base, 1.0)
    fit(moved.module, data, recipe, companion=SparseCompanion(moved))
    start = dict(base.named_parameters())
    scores = {name: (now - start[name]).detach().abs() for name, now in moved.parts.maskable.items()}
    done = []
    for method, (density, rates) in METHODS.items():
        for rate in rates:
            tuner = tuned(base, density)
            tuner.select(scores)
            epochs = recipe.epochs + sparse if method == DENSE else sparse
            fit(tuner.module, data, replace(recipe, rate=rate, epochs=epochs), companion=SparseCompanion(tuner))
            done.append(((method, rate), tuner.delta()))
    return done


def tuned(base: nn.Module, density: float) -> SparseFineTuner:
    """A copy of ``base``, its norms and its classifier frozen."""
    return SparseFineTuner(copy.deepcopy(base), density=density, frozen=("linear",))


def added(base: nn.Module, deltas: dict[str, SparseDelta]) -> nn.Module:
    """A copy of ``base`` with ``deltas``."""
    module = copy.deepcopy(base)
    apply_deltas(module, deltas)
    return module


def composed(
    base: nn.Module,
    deltas: dict[str, SparseDelta],
    judged: dict[str, TrainingData],
    test: dict[str, TrainingData],
    plain: TrainingData,
) -> dict[str, Any]:
    """Accuracy of each task's delta alone and of both together, on each task's images and on unchanged ones."""
    both = copy.deepcopy(base)
    overlap = apply_deltas(both, deltas).overlap
    alone = {task: added(base, {task: delta}) for task, delta in deltas.items()}
    return {
        "entries": next(iter(deltas.values())).k,
        "overlap": overlap.share,
        "length": {task: length_of(delta) for task, delta in deltas.items()},
        "judged": {task: evaluate(alone[task], data) for task, data in judged.items()},
        "alone": {task: evaluate(alone[task], data) for task, data in test.items()},
        "together": {task: evaluate(both, data) for task, data in test.items()},
        "plain": evaluate(both, plain),
    }


def length_of(delta: SparseDelta) -> float:
    """Euclidean length of all that is added."""
    return sum(float(each.values.double().square().sum()) for each in delta.tensors.values()) ** 0.5


def table(result: dict[str, Any]) -> str:
    """Means and standard errors over seeds in Markdown."""
    seeds, base = result["seeds"], result["base"]
    lines = [
        "# Composition: ResNet-20, inverted and turned CIFAR-10 images learned apart, deltas added",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}. Accuracy in percent, mean and standard error over "
        f"{len(seeds)} seeds. Lost: alone minus together, seed by seed. Length: the deltas' Euclidean length, mean of "
        "both. To reach: composed sparse deltas lose at most half of what dense ones lose, on both tasks. BatchNorm "
        "and the classifier are frozen in all rows. Bold: the rate at which a method's tasks, alone, are best on "
        "images that are neither trained nor tested on. The base without a delta: "
        + ", ".join(f"{100 * value:.1f} ({name})" for name, value in base.items())
        + ".",
        "",
        "| | rate | entries | in both | length | "
        + " | ".join(f"{task}: alone | together | lost" for task in TASKS)
        + " | as they are, together |",
        "|---" * (6 + 3 * len(TASKS)) + "|",
    ]
    lost: dict[str, dict[str, float]] = {}
    for method, (_, rates) in METHODS.items():
        rows = {rate: [row for seed in seeds for row in seed if (row["method"], row["rate"]) == (method, rate)]
                for rate in rates}  # fmt: skip
        best = max(rates, key=lambda rate: sum(sum(row["judged"].values()) for row in rows[rate]))
        for rate, found in rows.items():
            cells = []
            for task in TASKS:
                alone, together = (100 * np.array([row[at][task] for row in found]) for at in ("alone", "together"))
                cells += [told(alone), told(together), told(alone - together)]
                if rate == best:
                    lost.setdefault(method, {})[task] = float((alone - together).mean())
            cells.append(told(100 * np.array([row["plain"] for row in found])))
            shared = 100 * float(np.mean([row["overlap"] for row in found]))
            length = float(np.mean([list(row["length"].values()) for row in found]))
            shown_rate = f"**{rate:g}**" if rate == best else f"{rate:g}"
            lines.append(
                f"| {method} | {shown_rate} | {found[0]['entries']:,} | {shared:.0f} % | {length:.2f} | "
                f"{' | '.join(cells)} |"
            )
    lines.append("")
    for method in METHODS:
        if method != DENSE:
            shares = [f"{lost[method][task] / lost[DENSE][task]:.2f} ({task})" for task in TASKS]
            lines.append(f"- {method}, at its best rate, loses as a share of dense at its best: {', '.join(shares)}")
    return "\n".join(lines) + "\n"


def told(values: np.ndarray) -> str:
    """Mean, and standard error where there are several seeds."""
    return shown(values) if len(values) > 1 else f"{values.mean():.1f}"


if __name__ == "__main__":
    main()
