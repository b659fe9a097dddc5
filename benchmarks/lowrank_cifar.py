"""Ordered factors on CIFAR-10: accuracy at every rank, at every share of the MACs, and what training costs.

``python -m benchmarks.lowrank_cifar train --data FOLDER`` trains one seed after the other (``--seed 3`` only that one,
``--device cuda`` on a GPU) and keeps each seed's figures under ``--work``, beside what is there of it; ``time`` takes
the time an epoch on the CPU; ``report`` writes ``benchmarks/results/lowrank_cifar.{json,md,png}`` from both. With
``--small`` images have half the side and the net half of the channels: minutes a seed on one core. FOLDER holds
``.npz`` files with ``images`` [N, 32, 32, 3] in bytes and ``labels``. All nets of a seed start from the same weights
and see the same batches; every one that was cut gets its BatchNorm's statistics anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import RESULTS
from benchmarks.lowrank import at_rank
from compress.lowrank.decompose import decompose, decomposed_layers, extract
from compress.lowrank.maestro import Maestro
from compress.lowrank.norms import recalibrate
from compress.lowrank.shrink import shrink
from compress.lowrank.truncate import count_positions, cut_to, model_macs, truncation_path
from compress.measure.machine import describe_environment
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate, fit
from compress.training.lowrank.job import MaestroCompanion
from compress.training.lowrank.ordering import order_layers

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
SVD, AWARE = "dense, then SVD", "dense, then data-aware, better unrolling"
CONTINUED = "dense, data-aware, then shared"
SCRATCH = ("shared", "pair")
TUNED = (AWARE, "shared", CONTINUED)
_NORMALISED, _BATCH = 4096, 512
Batches = list[tuple[Tensor, ...]]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("train", "time", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("lowrank_cifar.work"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--tuned", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--images", type=int, help="So many to train and to test on, for a trial")
    parser.add_argument("--judged", type=int, default=2048)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--scratch", action=argparse.BooleanOptionalAction, default=True, help="Ordered from the start")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.part == "report":
        report(arguments.work, "lowrank_cifar_small" if arguments.small else "lowrank_cifar")
        return
    train, test = cifar(arguments.data, arguments.device, arguments.images)
    if arguments.small:
        train = replace(train, inputs=(F.avg_pool2d(train.inputs[0], 2),))
        test = replace(test, inputs=(F.avg_pool2d(test.inputs[0], 2),))
    if arguments.part == "time":
        (arguments.work / "time.json").write_text(json.dumps(timed(train, arguments.repeats)))
        return
    settings = {
        "command": f"python -m benchmarks.lowrank_cifar train --epochs {arguments.epochs} --tuned {arguments.tuned} "
        f"--batch {arguments.batch} --rate {arguments.rate:g} --device {arguments.device}"
        + " --small"
        * arguments.small,
        "tuned": arguments.tuned,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else describe_environment().cpu,
        "images": len(train),
        "date": time.strftime("%Y-%m-%d"),
    }
    for seed in range(arguments.seeds) if arguments.seed is None else (arguments.seed,):
        run = Run(
            train, test, seed, arguments.epochs, arguments.tuned, arguments.batch, arguments.rate, arguments.judged,
            arguments.scratch, 0.5 if arguments.small else 1.0,
        )  # fmt: skip
        for found in run.all():
            path = arguments.work / f"seed{seed}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            merged = {
                part: known.get(part, {}) | each if isinstance(each, dict) else each for part, each in found.items()
            }
            path.write_text(json.dumps(merged | {"settings": settings}))


class Augmented(TrainingData):
    """Every batch flipped and moved by up to four pixels, each image in its own way, from torch's own generator."""

    def take(self, index: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Samples at ``index``."""
        images, labels = self.inputs[0][index], self.labels[index]
        count = len(images)
        device = images.device
        flipped = torch.where(torch.rand(count, 1, 1, 1).to(device) < 0.5, images.flip(3), images)
        side = images.shape[-1]
        padded = F.pad(flipped, (4, 4, 4, 4))
        down, right = (torch.randint(0, 9, (count, 1), generator=None).to(device) for _ in range(2))
        rows = (down + torch.arange(side, device=device))[:, None, :, None]
        columns = (right + torch.arange(side, device=device))[:, None, None, :]
        samples = torch.arange(count, device=device)[:, None, None, None]
        channels = torch.arange(3, device=device)[None, :, None, None]
        return (padded[samples, channels, rows, columns],), labels


def cifar(folder: Path, device: str, limit: int | None) -> tuple[Augmented, TrainingData]:
    """To train and to test on, with channels at mean 0 and deviation 1."""
    parts = {}
    for what, pattern in (("train", "*train*.npz"), ("test", "*test*.npz")):
        files = [np.load(path) for path in sorted(folder.glob(pattern))]
        images = torch.from_numpy(np.concatenate([each["images"] for each in files])).permute(0, 3, 1, 2).float() / 255
        parts[what] = images, torch.from_numpy(np.concatenate([each["labels"] for each in files])).long()
    mean, deviation = (getattr(parts["train"][0], each)((0, 2, 3), keepdim=True) for each in ("mean", "std"))
    (x, y), (tx, ty) = (
        (((images - mean) / deviation).contiguous().to(device), labels.to(device)) for images, labels in parts.values()
    )
    return Augmented((x[:limit],), y[:limit]), TrainingData((tx[:limit],), ty[:limit])


def net(width: float = 1.0) -> nn.Module:
    """Six 3 x 3 convolutions of 32 to 128 channels, times ``width``, with BatchNorm, then a linear."""
    layers: list[nn.Module] = []
    for inputs, outputs, pooled in (
        (3, 32, True), (32, 64, False), (64, 64, True), (64, 128, False), (128, 128, True), (128, 128, False),
    ):  # fmt: skip
        inputs, outputs = (channels if channels == 3 else int(channels * width) for channels in (inputs, outputs))
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()] + [nn.MaxPool2d(2)] * pooled
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(int(128 * width), 10))


@dataclass
class Run:
    """One seed."""

    train: Augmented
    test: TrainingData
    seed: int
    epochs: int
    tuned: int
    batch: int
    rate: float
    judged: int
    scratch: bool
    width: float

    def all(self) -> Iterator[dict[str, Any]]:
        """Accuracy of every variant by rank and by share of the MACs; all that is known after each one."""
        plain = TrainingData((self.train.inputs[0][:_NORMALISED],), self.train.labels[:_NORMALISED])
        self.batches: Batches = [inputs for inputs, _ in plain.batches(_BATCH)]
        found: dict[str, Any] = {"ranks": {}, "shares": {}, "tuned": {}}
        torch.manual_seed(self.seed)
        start = net(self.width).to(self.train.labels.device)
        self.positions = count_positions(start, tuple(x[:2] for x in self.train.inputs))
        found["macs"] = self.dense_macs = model_macs(start, self.positions)
        dense = copy.deepcopy(start)
        self.fit(dense, self.recipe())
        found["dense"] = evaluate(dense, self.test)
        for name, weighted in ((SVD, False), (AWARE, True)):
            module = self.decomposed(dense, weighted=weighted)
            self.measure(found, name, module)
            yield found
        self.tune(found, "dense", copy.deepcopy(dense))
        module = self.decomposed(dense, weighted=True)
        maestro = Maestro(module, penalty=0.0, threshold=0.0, sampler="shared", seed=self.seed)
        recipe = replace(self.recipe(), epochs=max(self.epochs // 2, 1), rate=self.rate / 5, weight_decay=1e-4)
        self.fit(module, recipe, MaestroCompanion(maestro))
        self.measure(found, CONTINUED, module)
        yield found
        for sampler in SCRATCH if self.scratch else ():
            module = copy.deepcopy(start)
            maestro = Maestro(module, penalty=0.0, threshold=0.0, sampler=sampler, seed=self.seed)
            self.fit(module, self.recipe(), MaestroCompanion(maestro))
            self.measure(found, sampler, module)
            yield found

    def recipe(self) -> Recipe:
        """For a net from its start."""
        return Recipe(epochs=self.epochs, batch=self.batch, rate=self.rate, weight_decay=5e-4, seed=self.seed)

    def fit(self, module: nn.Module, recipe: Recipe, companion: MaestroCompanion | None = None) -> None:
        """Train; the same pictures for all nets of a seed."""
        torch.manual_seed(self.seed)
        begun = time.perf_counter()
        history, stopped = fit(module, self.train, recipe, companion=companion)
        if stopped:
            raise RuntimeError(stopped)
        seconds = (time.perf_counter() - begun) / recipe.epochs
        print(self.seed, f"loss {history[-1].loss:.4f}, {seconds:.2f} s an epoch", flush=True)
        module.eval()

    def decomposed(self, dense: nn.Module, *, weighted: bool) -> nn.Module:
        """``dense`` in ordered factors: of the weights, or by data and in the better unrolling."""
        module = copy.deepcopy(dense).cpu()
        layers = decompose(module).layers
        if weighted:
            inputs = tuple(x[:_NORMALISED].cpu() for x in self.train.inputs)
            order_layers(layers, module, inputs, self.positions, lambda what, done, total: None)
            print(self.seed, {name: type(layer).__name__ for name, layer in layers.items()}, flush=True)
        return module.to(self.train.labels.device)

    def measure(self, found: dict[str, Any], name: str, module: nn.Module) -> None:
        """Accuracy by rank, by share, and of the half trained on."""
        layers = decomposed_layers(module)
        found["ranks"][name] = []
        for rank in RANKS:
            with cut_to(layers, {key: min(rank, layer.rank) for key, layer in layers.items()}):
                recalibrate(module, self.batches)
            found["ranks"][name].append(at_rank(module, rank, self.test))
        path = truncation_path(
            module, self.loss_of(module), self.positions, smallest=round(min(SHARES) * self.dense_macs)
        )
        accuracies = []
        for share in SHARES:
            member = next(each for each in path if each.macs <= share * self.dense_macs)
            with cut_to(layers, member.ranks):
                recalibrate(module, self.batches)
                accuracies.append(evaluate(module, self.test))
            if share == 0.5:
                half = member.ranks
        found["shares"][name] = accuracies
        extract(module, lambda key, layer: half[key])
        print(self.seed, name, [f"{100 * each:.1f}" for each in found["ranks"][name]], flush=True)
        print("  ", [f"{100 * each:.1f}" for each in accuracies], flush=True)
        if name in TUNED:
            self.tune(found, name, module)

    def tune(self, found: dict[str, Any], name: str, module: nn.Module) -> None:
        """A short training of ordinary layers."""
        self.fit(module, replace(self.recipe(), epochs=self.tuned, rate=self.rate / 5, seed=self.seed + 1000))
        found["tuned"][name] = evaluate(module, self.test)
        print(self.seed, name, f"tuned {100 * found['tuned'][name]:.1f}", flush=True)

    def loss_of(self, module: nn.Module) -> Callable[[], float]:
        """On one batch, with that batch's own statistics in every BatchNorm."""
        inputs, labels = tuple(x[-self.judged :] for x in self.train.inputs), self.train.labels[-self.judged :]

        @torch.no_grad()
        def loss() -> float:
            recalibrate(module, [inputs])
            return float(F.cross_entropy(module(*inputs), labels))

        return loss


def timed(train: Augmented, repeats: int) -> dict[str, Any]:
    """The processor's seconds for 1,024 images on one thread, all variants in turn: medians."""
    torch.set_num_threads(1)
    few = Augmented((train.inputs[0][:1024],), train.labels[:1024])
    torch.manual_seed(0)
    dense = net()
    positions = count_positions(dense, (few.inputs[0][:2],))
    variants: dict[str, tuple[nn.Module, MaestroCompanion | None]] = {"dense": (dense, None)}
    for name, sampler, share in (
        ("shared, full rank", "shared", 1.0), ("pair, full rank", "pair", 1.0), ("full, full rank", "full", 1.0),
        ("shared, shrunk to half the MACs", "shared", 0.5), ("pair, shrunk to half the MACs", "pair", 0.5),
    ):  # fmt: skip
        module = copy.deepcopy(dense)
        maestro = Maestro(module, penalty=1e-6, threshold=0.0, sampler=sampler)
        if share < 1:
            for key, layer in maestro.layers.items():
                shrink(layer, min(int(share * layer.saving_rank(positions[key])), layer.rank))
        variants[name] = module, MaestroCompanion(maestro)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, (module, companion) in variants.items():
            begun = time.process_time()
            fit(module, few, Recipe(epochs=1, rate=1e-3), companion=companion)
            seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    print({name: f"{each:.2f} s, {each / medians['dense']:.2f}" for name, each in medians.items()})
    return {"seconds": medians, "repeats": repeats, "environment": describe_environment().model_dump()}


def report(work: Path, title: str) -> None:
    """Put all seeds together."""
    seeds = [json.loads(path.read_text()) for path in sorted(work.glob("seed*.json"))]
    result: dict[str, Any] = {
        "settings": seeds[0]["settings"],
        "rank": RANKS,
        "share": SHARES,
        "macs": seeds[0].get("macs", 31_556_864),
        "dense": [each["dense"] for each in seeds],
        **{
            part: {name: [each[part][name] for each in seeds] for name in seeds[0][part]}
            for part in ("ranks", "shares", "tuned")
        },
    }
    if (work / "time.json").exists():
        result["time"] = json.loads((work / "time.json").read_text())
    (RESULTS / f"{title}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{title}.md").write_text(table(result, title))
    draw(result, RESULTS / f"{title}.png")


def table(result: dict[str, Any], title: str) -> str:
    """Means and standard deviations in Markdown."""
    settings = result["settings"]
    dense = 100 * np.array(result["dense"])
    names = list(result["ranks"])
    lines = [
        "# Ordered factors on CIFAR-10",
        "",
        f"`{settings['command']}`: {settings['device']}, {settings['date']}. {settings['images']:,} images to train "
        f"on, 4,990 to test on, {len(dense)} seeds, six convolutions and a linear, "
        f"{result['macs'] / 1e6:.1f} million MACs. Accuracy in percent, mean and standard deviation over "
        f"seeds. The dense net has {spread(dense)}.",
        "",
        f"![curves]({title}.png)",
        "",
        "## Every layer cut to the same rank, without training",
        "",
        "To reach: an ordered training above SVD at every rank up to a quarter of the highest.",
        "",
        *rows("rank", result["rank"], {name: 100 * np.array(result["ranks"][name]) for name in names}),
        "",
        "## Cut by greedy search, without training",
        "",
        "To reach: half the MACs at a drop of at most 0.5 points.",
        "",
        *rows("MACs", result["share"], {name: 100 * np.array(result["shares"][name]) for name in names}),
        "",
        f"Cut to half the MACs (all but `dense`), then trained for {settings['tuned']} epochs more:",
        "",
        "| | accuracy | against dense |",
        "|---|---|---|",
    ]
    for name in result["tuned"]:
        tuned = 100 * np.array(result["tuned"][name])
        lines.append(f"| {name} | {spread(tuned)} | {(tuned - dense).mean():+.2f} |")
    if "time" in result:
        seconds = result["time"]["seconds"]
        lines += [
            "",
            "## Time an epoch, of the dense net's",
            "",
            f"`python -m benchmarks.lowrank_cifar time`: {result['time']['environment']['cpu']}, one thread, processor "
            f"time, variants in turn, medians of {result['time']['repeats']}. Sought: 1.3 at full rank, below 1 when "
            "shrunk to half.",
            "",
            *(f"- {name}: {each / seconds['dense']:.2f}" for name, each in seconds.items()),
        ]
    return "\n".join(lines) + "\n"


def rows(title: str, values: Any, columns: dict[str, Any]) -> list[str]:
    """A table: one row a value, one column a variant."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|" + "---|" * (1 + len(columns))]
    for position, value in enumerate(values):
        lines.append(f"| {value} | " + " | ".join(spread(each[:, position]) for each in columns.values()) + " |")
    return lines


def spread(values: Any) -> str:
    """Mean and deviation."""
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values.mean():.1f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy by rank, and by share of the MACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, part, places in ((left, "ranks", result["rank"]), (right, "shares", result["share"])):
        for name, each in result[part].items():
            values = 100 * np.array(each)
            axes.errorbar(places, values.mean(0), values.std(0), marker="o", markersize=3, capsize=2, label=name)
        axes.axhline(100 * np.mean(result["dense"]), linestyle=":", color="grey", label="dense")
        axes.grid(alpha=0.3)
    left.set(xscale="log", xlabel="rank of every layer", ylabel="accuracy, %")
    right.set(xlabel="MACs, of the dense model's")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
