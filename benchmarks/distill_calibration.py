"""ResNet-20 calibrated on distilled images beside as many real ones and noise: CIFAR-10, 4 bits for weights and inputs.

``python -m benchmarks.distill_calibration --work WORK --seeds 3`` writes
``benchmarks/results/distill_calibration.json`` after every set and a table beside it; what WORK and the file hold is
not done again. The distilled sets are what ``compress distill --ipc 10`` makes of 2,000 training images: from
trajectories alone, and with the terms of the model that is calibrated; beside them stands that noise after as many
steps on the model's terms alone. Every set has 100 images; the first and the last layer have 8 bits. A seed draws the
real images, the noise (normal, of the real images' mean and spread in each channel) and everything random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import compress
from benchmarks.accuracy import RESULTS
from benchmarks.sparse_composition import told
from benchmarks.zoo import ZOO, Case, cifar_images
from compress.data.samples import Samples
from compress.distillation.distiller import DistillSettings
from compress.distillation.experts import ExpertSettings
from compress.distillation.job import DistillOptions, distill
from compress.distillation.model_terms import ModelTerms
from compress.distillation.standardisation import Standardisation
from compress.files.known_folders import SET_FILE
from compress.measure.machine import describe_environment

EACH, IMAGES, BITS = 10, 2000, 4
AUGMENTATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
EXPERTS = ExpertSettings(count=3, epochs=10, batch=100)
_FILE = RESULTS / "distill_calibration.json"
_BATCH = 250


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    command = f"--seeds {arguments.seeds} --iterations {arguments.iterations}"
    known = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    result = {
        "command": f"python -m benchmarks.distill_calibration --work WORK {command}",
        "iterations": arguments.iterations,
        "environment": describe_environment().model_dump(),
        "rows": known["rows"] if known.get("iterations") == arguments.iterations else [],
    }
    case = ZOO["resnet20"]()
    x, labels = training_images()
    for seed in range(arguments.seeds):
        for name, make in sets(case, x, labels, arguments.work, arguments.iterations, seed).items():
            if any((row["set"], row["seed"]) == (name, seed) for row in result["rows"]):
                continue
            result["rows"].append({"set": name, "seed": seed, "accuracy": calibrated(case, make(), seed)})
            print(result["rows"][-1], flush=True)
            _FILE.write_text(json.dumps(result, indent=1) + "\n")
            (RESULTS / "distill_calibration.md").write_text(table(result, case))


def training_images() -> tuple[Tensor, Tensor]:
    """The first images of the training part, as the model takes them [N, 3, 32, 32], and their labels."""
    x, labels = cifar_images("cifar10_train_batch1.npz")
    return x[:IMAGES], labels[:IMAGES]


def sets(
    case: Case, x: Tensor, labels: Tensor, work: Path, iterations: int, seed: int
) -> dict[str, Callable[[], Tensor]]:
    """Functions to the images of each set [100, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(x), generator=generator)[: 10 * EACH]
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)

    def made(name: str, with_model: bool) -> Tensor:
        out = work / f"{name}-{iterations}-{seed}"
        if not out.exists():
            settings = DistillSettings(
                each=EACH, iterations=iterations, steps=15, last=8, batch=20, augmentations=AUGMENTATIONS,
                gradients="unrolled", looks=0, seed=seed,
            )  # fmt: skip
            options = DistillOptions(
                settings=settings, experts=EXPERTS, expert_folder=work / f"experts-{seed}",
                model=case.module if with_model else None,
            )  # fmt: skip
            distill(Samples((x,), labels, "CIFAR-10", ()), out, classes=10, options=options)
        with np.load(out / SET_FILE) as file:
            return torch.from_numpy(file["images"])

    noise = mean + std * torch.randn(10 * EACH, *x.shape[1:], generator=generator)

    def fitted() -> Tensor:
        standardisation = Standardisation.of(x)
        terms = ModelTerms(case.module, x, labels, 10, standardisation)
        ordered = torch.arange(10).repeat_interleave(EACH)
        fit = terms.fitted(standardisation.apply(noise), ordered, DistillSettings.model_steps)
        return standardisation.invert(fit.images)

    return {
        "real": lambda: x[drawn],
        "noise": lambda: noise,
        "noise, fitted to the model": fitted,
        "distilled": lambda: made("trajectories", with_model=False),
        "distilled, with the model's terms": lambda: made("model", with_model=True),
    }


def calibrated(case: Case, calib: Tensor | str, seed: int, bits: int = BITS, act_bits: int = BITS) -> float:
    """Accuracy in per cent on the test images."""
    quantized = compress.quantize(case.module, calib=calib, bits=bits, act_bits=act_bits, seed=seed).module
    with torch.no_grad():
        classes = torch.cat([quantized(batch).argmax(1) for batch in case.test.split(_BATCH)])
    return 100 * float((classes == case.labels).double().mean())


def table(result: dict[str, Any], case: Case) -> str:
    """Means over seeds in Markdown."""
    rows: dict[str, dict[int, float]] = {}
    for row in result["rows"]:
        rows.setdefault(row["set"], {})[row["seed"]] = row["accuracy"]
    lines = [
        "# Calibration on distilled images: ResNet-20, CIFAR-10, W4A4",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}. Accuracy in percent on {len(case.test):,} test images "
        f"(float {100 * case.float_accuracy:.2f}), mean and standard error over seeds; 100 images a set, ten a class, "
        f"`adaquant`. Distilled: {result['iterations']} iterations on {IMAGES:,} training images. To reach: within 0.3 "
        "of real images, and 5 above noise. Differences are taken seed by seed.",
        "",
        "| | accuracy | over real | over noise | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        leads = [difference(found, rows.get(other, {})) if name != other else "" for other in ("real", "noise")]
        lines.append(f"| {name} | {told(np.array(list(found.values())))} | {' | '.join(leads)} | {len(found)} |")
    return "\n".join(lines) + "\n"


def difference(found: dict[int, float], other: dict[int, float]) -> str:
    """Mean difference where both have the seed."""
    both = [seed for seed in found if seed in other]
    return told(np.array([found[seed] - other[seed] for seed in both])) if both else ""


if __name__ == "__main__":
    main()
