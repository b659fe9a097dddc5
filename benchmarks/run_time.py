"""Processor time of a run of ``quantize`` on three small models, beside another checkout's: what a run costs by itself.

``python -m benchmarks.run_time [--against CHECKOUT] [--rounds N] [--out FILE]``. Every measurement is a process of its
own; where there is another checkout they take turns. The transformer needs the package transformers; its weights are
random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODELS = ("cnn", "mlp", "bert")
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--out", type=Path, help="JSON file of all measurements")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, json.loads(given.settings))))
        return
    sides: dict[str, tuple[Path, dict[str, object]]] = {"now": (ROOT, {}), "now, --no-bench": (ROOT, {"bench": False})}
    if given.against:
        sides = {"before": (given.against.resolve(), {}), **sides}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(given.rounds):
        for model in given.models:
            for side, (root, settings) in sides.items():
                found.setdefault(model, {}).setdefault(side, []).append(run(model, root, settings))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("| model | | imports | a process's first run | its second |\n|---|---|---|---|---|")
    for model, rows in found.items():
        for side, runs in rows.items():
            cells = (f"{statistics.median(each[name] for each in runs):.1f}" for name in ("imports", "first", "second"))
            print(f"| {model} | {side} | {' | '.join(cells)} |")


def run(model: str, root: Path, settings: dict[str, object]) -> dict[str, float]:
    """Processor seconds of imports and two runs in a process that has the code in ``root``."""
    command = [sys.executable, str(Path(__file__)), "--one", model, "--settings", json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, settings: dict[str, object]) -> dict[str, float]:
    """Of ``name`` in this process."""
    start = time.process_time()
    import torch
    from torch import nn

    import compress.api

    torch.set_num_threads(1)
    torch.manual_seed(0)
    calib: object = torch.randn(64, 3, 16, 16)
    if name == "cnn":
        module: nn.Module = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        ).eval()  # fmt: skip
    elif name == "mlp":
        module, calib = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval(), torch.randn(64, 32)
    else:
        import transformers

        config = transformers.BertConfig(
            vocab_size=60, num_hidden_layers=1, max_position_embeddings=64, hidden_size=32, num_attention_heads=4,
            intermediate_size=64,
        )  # fmt: skip
        module = transformers.BertModel(config).eval()
        ids = torch.randint(4, 60, (40, 9))
        calib = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    times = {"imports": time.process_time() - start}
    for label in ("first", "second"):
        start = time.process_time()
        compress.api.quantize(module, calib=calib, bits=4, first_last_bits=7, method="mse", **settings)  # type: ignore[arg-type]
        times[label] = time.process_time() - start
    return times


if __name__ == "__main__":
    main()
