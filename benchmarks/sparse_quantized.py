"""A delta over a compressed base against a delta that was merged before: ResNet-20, inverted CIFAR-10 images, K = 5 %.

``python -m benchmarks.sparse_quantized`` writes ``benchmarks/results/sparse_quantized.json`` and a table beside it.

The base is compressed once, calibrated on images as they are; the delta, trained on the float base, is added by
``compress.load``. Merged ones are compressed anew for the task: calibrated on images as they are, too, and on the
task's own. All by the method ``mse``, layers alike, nothing learned. BatchNorm and the classifier are frozen.
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compress
from benchmarks.accuracy import RESULTS
from benchmarks.sparse_composition import TASKS, added, data_of, tuned
from benchmarks.zoo import ZOO, cifar_images
from compress.measure.machine import describe_environment
from compress.sparse.deltafile import read_delta, write_delta
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.sparse.job import SparseCompanion

TRAINED, TESTED, CALIBRATED = 2000, 2000, 256
WIDTHS = ((8, None), (4, None), (3, None), (4, 8))
_FILE = RESULTS / "sparse_quantized.json"


def main() -> None:
    """Run from the command line."""
    torch.set_num_threads(1)
    base = ZOO["resnet20"]().module.eval()
    change = TASKS["inverted"]
    images, labels = cifar_images("cifar10_train_batch1.npz")
    tested = cifar_images("cifar10_test_a.npz")
    task = data_of(change, tested[0][:TESTED], tested[1][:TESTED])
    plain, turned = images[-CALIBRATED:], change(images[-CALIBRATED:])
    with tempfile.TemporaryDirectory() as scratch:
        file = learn(base, data_of(change, images[:TRAINED], labels[:TRAINED]), Path(scratch) / "task.safetensors")
        merged = added(base, {"task": read_delta(file)})
        rows: list[dict[str, Any]] = []
        for bits, act_bits in WIDTHS:
            folder = squeeze(base, plain, bits, act_bits, Path(scratch) / f"base-{bits}-{act_bits}")
            row = {
                "bits": bits,
                "act_bits": act_bits,
                "base alone": evaluate(compress.load(folder), task),
                "delta over it": evaluate(compress.load(folder, deltas=file), task),
                "merged, calibrated as the base": accuracy(merged, plain, bits, act_bits, scratch, task),
                "merged, calibrated on the task": accuracy(merged, turned, bits, act_bits, scratch, task),
            }
            rows.append(row)
            print(row, flush=True)
        result = {
            "environment": describe_environment().model_dump(),
            "images": {"trained": TRAINED, "tested": TESTED, "calibrated": CALIBRATED},
            "float": {"base": evaluate(base, task), "merged": evaluate(merged, task)},
            "delta": {"entries": read_delta(file).k, "bytes": file.stat().st_size},
            "rows": rows,
        }
    _FILE.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "sparse_quantized.md").write_text(table(result))


def learn(base: nn.Module, data: TrainingData, out: Path) -> Path:
    """The task's delta at K = 5 %: one epoch of all, two of the selected."""
    tuner = tuned(base, 0.05)
    recipe = Recipe(epochs=1, batch=64, rate=1e-3, weight_decay=0.0, schedule="linear", optimizer="adamw")
    fit(tuner.module, data, recipe, companion=SparseCompanion(tuner))
    tuner.select()
    fit(tuner.module, data, replace(recipe, epochs=2, rate=1e-2), companion=SparseCompanion(tuner))
    return write_delta(tuner.delta(), out)


def squeeze(module: nn.Module, images: Tensor, bits: int, act_bits: int | None, out: Path) -> Path:
    """The folder of ``module`` at these widths; without activation bits its weights alone are rounded."""
    given: dict[str, Any] = {"calib": {"x": images.numpy()}, "act_bits": act_bits} if act_bits else {}
    given = given or {"input_shape": (3, 32, 32)}
    compress.quantize(copy.deepcopy(module), bits=bits, method="mse", out=out, overwrite=True, **given)
    return out


def accuracy(
    module: nn.Module, images: Tensor, bits: int, act_bits: int | None, scratch: str, task: TrainingData
) -> float:
    """Of ``module`` at these widths."""
    return evaluate(compress.load(squeeze(module, images, bits, act_bits, Path(scratch) / "merged")), task)


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    names = list(result["rows"][0])[2:]
    lines = [
        "# A delta over a compressed base, and merged before: ResNet-20, inverted CIFAR-10 images",
        "",
        f"`python -m benchmarks.sparse_quantized`: {result['environment']['cpu']}. Accuracy in percent on "
        f"{result['images']['tested']:,} images (one has a standard error of 1), one seed, learned from "
        f"{result['images']['trained']:,}; K = 5 %, {result['delta']['entries']:,} entries, "
        f"{result['delta']['bytes']:,} bytes. In floats: base {100 * result['float']['base']:.1f}, with the delta "
        f"{100 * result['float']['merged']:.1f}. Layers alike, method `mse`; where inputs are floats nothing is "
        "calibrated.",
        "",
        f"| weights | inputs | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for row in result["rows"]:
        inputs = f"{row['act_bits']} bits" if row["act_bits"] else "float"
        shown = " | ".join(f"{100 * row[name]:.1f}" for name in names)
        lines.append(f"| {row['bits']} bits | {inputs} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
