"""Integer models calibrated without data, beside as many real images and plain noise: accuracy over seeds.

``python -m benchmarks.synthetic resnet20 --settings W8A8 W4A8 W4A4 --seeds 3`` adds rows to
``benchmarks/results/synthetic.json``, each as soon as it is measured, leaves out those that are there, and writes the
table beside it anew. ``--lowrank`` adds families that ``compress lowrank truncate`` makes on the same sets. Real images
are drawn by the seed from those that no test image is among; noise is normal, of mean 0 and deviation 1, which is what
``--calib synthetic`` begins with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import RESULTS
from benchmarks.distill_calibration import calibrated, difference
from benchmarks.sparse_composition import told
from benchmarks.zoo import ZOO, Case
from compress.data.synthetic import SYNTHETIC, synthetic_count
from compress.measure.machine import describe_environment
from compress.training.lowrank.job import LowRankOptions, truncate

_FILE = RESULTS / "synthetic.json"
SETS = ("real", "synthetic", "noise")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(ZOO))
    parser.add_argument("--settings", nargs="*", default=[], help="such as W4A8")
    parser.add_argument("--lowrank", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = ZOO[arguments.model]()
    result = json.loads(_FILE.read_text()) if _FILE.exists() else {"rows": []}
    result["environment"] = describe_environment().model_dump()
    settings = [*arguments.settings, *(["lowrank"] if arguments.lowrank else [])]
    for setting, seed, name in itertools.product(settings, range(arguments.seeds), SETS):
        key = {"model": case.name, "setting": setting, "set": name, "seed": seed}
        if any(key.items() <= row.items() for row in result["rows"]):
            continue
        row = key | {"float": 100 * case.float_accuracy, "tests": len(case.test)}
        if setting == "lowrank":
            row["members"] = truncated(case, samples(case, name, seed))
        else:
            bits, act_bits = map(int, setting[1:].split("A"))
            row["accuracy"] = calibrated(case, samples(case, name, seed), seed, bits, act_bits)
        print(row, flush=True)
        result["rows"].append(row)
        _FILE.write_text(json.dumps(result, indent=1) + "\n")
    _FILE.with_suffix(".md").write_text(table(result))


def samples(case: Case, name: str, seed: int) -> Tensor | str:
    """As many inputs as are made without data, or what the tool is told."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(case.test.shape[1:])
    if name == "real":
        return case.calibration[torch.randperm(len(case.calibration), generator=generator)[: synthetic_count(shape)]]
    if name == "noise":
        return torch.randn((synthetic_count(shape), *shape), generator=generator)
    return SYNTHETIC


def truncated(case: Case, data: Tensor | str) -> list[tuple[float, float]]:
    """Share of the MACs and accuracy in per cent of every member, the largest first."""
    options = LowRankOptions(smallest=0.45, factor=0.7)
    with tempfile.TemporaryDirectory() as scratch:
        family = truncate(
            case.module, data, Path(scratch) / "family", test=(case.test, case.labels), options=options
        ).family
    return [(each.macs / family.dense_macs, 100 * (each.metric or 0.0)) for each in family.members]


def best_within(members: list[tuple[float, float]], share: float) -> float:
    """Accuracy of the largest member of at most ``share`` of the MACs."""
    return max((macs, accuracy) for macs, accuracy in members if macs <= share)[1]


def table(result: dict[str, Any]) -> str:
    """Means over seeds in Markdown."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    about = {row["model"]: f"{row['model']} (float {row['float']:.2f})" for row in result["rows"]}
    for row in result["rows"]:
        values = {row["setting"]: row.get("accuracy")}
        if "members" in row:
            values = {f"{share:.0%} of the MACs": best_within(row["members"], share) for share in (0.8, 0.5)}
        for setting, value in values.items():
            found.setdefault((row["model"], setting), {}).setdefault(row["set"], {})[row["seed"]] = value
    lines = [
        "# Calibration without data",
        "",
        f"`python -m benchmarks.synthetic MODEL`: {result['environment']['cpu']}, one thread. Accuracy in percent, "
        "mean and standard error over seeds; a model's sets have as many images each, 128 of 32 x 32, fewer of larger "
        "ones; `adaquant`, first and last layer at 8 bits; or low rank without training, cut to a share of the MACs.",
        "",
        "| | | real | synthetic | noise | synthetic less real | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, setting), sets in found.items():
        each = [told(np.array(list(sets[name].values()))) if name in sets else "" for name in SETS]
        less = difference(sets.get("synthetic", {}), sets.get("real", {}))
        lines.append(f"| {about[model]} | {setting} | {' | '.join(each)} | {less} | {len(sets.get('synthetic', {}))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
