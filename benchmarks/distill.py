"""Distilled images against random real ones and against those they began as: ConvNet of depth 3 and width 32, CIFAR-10.

    python -m benchmarks.distill run --work WORK --seeds 3    # goes on where it was stopped; writes results as it goes
    python -m benchmarks.distill run --work WORK --methods all           # AST's parts left out one by one
    python -m benchmarks.distill memory                       # peak and time of both exact gradients, 20 to 100 steps

Every set is trained on by fresh networks, the same starts for all sets, and judged on test images after the last step.
Real images get the step size of a few that is best for them on the test images, distilled ones the one they learned.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.distillation.convnet import convnet
from compress.distillation.distiller import Distilled, Distiller, DistillSettings
from compress.distillation.episode import Episode, checkpoints, inner_batches
from compress.distillation.experts import Experts, ExpertSettings
from compress.distillation.judge import Judge
from compress.distillation.network import FlatNetwork
from compress.distillation.representatives import random_images, representatives
from compress.distillation.standardisation import Standardisation
from compress.distillation.student import GRADIENTS, Student
from compress.measure.machine import describe_environment

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
NETS, STEPS = 2, 150
RATES = (0.003, 0.01)
AUGMENTATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
AST = DistillSettings(
    iterations=150, steps=15, last=8, balance=True, augmentations=AUGMENTATIONS, gradients="unrolled", looks=0
)
EXPERTS = ExpertSettings(count=3, epochs=10, batch=100, rate=0.01, augmentations=AUGMENTATIONS)


@dataclass(frozen=True)
class Method:
    """Experts, by a name that they are stored under, and how a set is distilled from them."""

    called: str
    experts: ExpertSettings
    settings: DistillSettings


def main() -> None:
    """Read options, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser("run")
    run.add_argument("--work", type=Path, required=True)
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--images", type=int, default=2000)
    run.add_argument("--each", type=int, default=1)
    run.add_argument("--iterations", type=int, default=AST.iterations)
    run.add_argument("--methods", nargs="*", help="[default: AST MTT]; or all, or some of methods()")
    run.add_argument("--name", default="distill")
    commands.add_parser("memory")
    one = commands.add_parser("peak")
    one.add_argument("gradients", choices=GRADIENTS)
    one.add_argument("steps", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "memory":
        memory()
    elif arguments.what == "peak":
        print(json.dumps(peak(arguments.gradients, arguments.steps)))
    else:
        measure(arguments)


def images_of(pattern: str, limit: int) -> tuple[Tensor, Tensor]:
    """[N, 3, 32, 32] in 0..1, and labels, the first ``limit`` of them."""
    files = [np.load(path) for path in sorted(DATA.glob(pattern))]
    x = np.concatenate([each["images"] for each in files])[:limit]
    labels = np.concatenate([each["labels"] for each in files])[:limit]
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long()


def methods(base: DistillSettings) -> dict[str, Method]:
    """AST, MTT, and AST without each of its parts, or with the one that is off, by name."""
    found = {"AST": Method("AST", EXPERTS, base), "MTT": Method("MTT", EXPERTS.mtt(), base.mtt())}
    for change, expert in (
        ("without clipping", replace(EXPERTS, clipping=False)),
        ("with the published gradient penalty", replace(EXPERTS, penalty=2.0)),
    ):
        found[f"AST {change}"] = Method(f"AST {change}", expert, base)
    for part, settings in (
        ("representative initialization", replace(base, representative=False)),
        ("intermediate matching", replace(base, beta="none")),
        ("balanced inner loss", replace(base, balance=False)),
        ("weight perturbation", replace(base, perturbation=0.0)),
    ):
        found[f"AST without {part}"] = Method("AST", EXPERTS, settings)
    return found


def measure(arguments: argparse.Namespace) -> None:
    """All methods and seeds; whatever ``WORK`` has is not done again."""
    x, labels = images_of("*train*.npz", arguments.images)
    tx, ty = images_of("*test*.npz", 2000)
    standardisation = Standardisation.of(x)
    x, tx = standardisation.apply(x), standardisation.apply(tx)
    network = FlatNetwork(partial(convnet, 3, 10, (32, 32)))
    base = replace(AST, each=arguments.each, iterations=arguments.iterations)
    known = methods(base)
    names = list(known) if arguments.methods == ["all"] else arguments.methods or ("AST", "MTT")
    chosen = {name: known[name] for name in names}
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.distill", *sys.argv[1:]]),
        "environment": describe_environment().model_dump(),
        "images": arguments.images, "each": arguments.each, "iterations": base.iterations, "rates": RATES,
        "experts": {}, "sets": {},
    }  # fmt: skip
    state = arguments.work / f"{arguments.name}.json"
    if state.exists():
        result |= {part: json.loads(state.read_text())[part] for part in ("experts", "sets")}

    def keep() -> None:
        arguments.work.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(result))
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(table(result))

    for seed in range(arguments.seeds):
        judge = Judge(network, tx, ty, nets=NETS, steps=STEPS, augmentations=AUGMENTATIONS, seed=1000 + seed)
        for name, method in chosen.items():
            folder = arguments.work / f"experts-{method.called.replace(' ', '-')}-{arguments.images}"
            experts = Experts(folder, network, x, labels, 10, method.experts, str(arguments.images))
            there = experts.path(0).exists()
            begun = time.process_time()
            accuracies = experts.train(lambda what, done, total: print(what, done, total, flush=True))
            seconds = None if there else time.process_time() - begun
            result["experts"].setdefault(method.called, {"accuracies": accuracies, "seconds": seconds})
            last = method.experts.epochs
            logits = network.logits(experts.rows(seed % method.experts.count, last, last + 1)[0], x)
            middle = representatives(logits, labels, 10, arguments.each, seed)
            drawn = random_images(labels, 10, arguments.each, seed)
            for what, start in (("random real", drawn), ("representative real", middle)):
                if name != "AST" or f"{what}/{seed}" in result["sets"]:
                    continue
                found = [judge.accuracy(x[start], labels[start], rate) for rate in RATES]
                result["sets"][f"{what}/{seed}"] = {"accuracy": max(found), "by_rate": found}
                print(what, seed, found, flush=True)
                keep()
            if f"{name}/{seed}" in result["sets"]:
                continue
            settings = replace(method.settings, seed=seed)
            start = middle if settings.representative else drawn
            begun = time.process_time()
            state_file = arguments.work / f"{arguments.name}-{name}-{seed}"
            distiller = Distiller(experts, x[start], labels[start], settings, state=state_file)
            done = distiller.run()
            seconds = time.process_time() - begun
            result["sets"][f"{name}/{seed}"] = told(done, judge, labels[start], settings, seconds)
            print(name, seed, result["sets"][f"{name}/{seed}"]["accuracy"], flush=True)
            keep()
    keep()  # a run that found everything there already writes the tables, too


def told(done: Distilled, judge: Judge, labels: Tensor, settings: DistillSettings, seconds: float) -> dict[str, Any]:
    """What came of a set: accuracy at the learned step size, and at those of the real images, all with momentum."""
    # A student without momentum has learned a step size about ten times as large.
    rate = done.rate if settings.momentum else done.rate / 10
    return {
        "accuracy": judge.accuracy(done.images, labels, rate),
        "by_rate": [judge.accuracy(done.images, labels, each) for each in RATES],
        "rate": done.rate,
        "matching": [float(np.mean(done.matching[:20])), float(np.mean(done.matching[-20:]))],
        "seconds_per_100": 100 * seconds / len(done.losses),
        "stopped": done.stopped,
    }


def table(result: dict[str, Any]) -> str:
    """Means, standard errors and leads in Markdown."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for key, each in result["sets"].items():
        name, _, seed = key.rpartition("/")
        rows.setdefault(name, {})[int(seed)] = each
    lines = [
        f"# Dataset distillation: CIFAR-10, {result['each']} images a class",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}, one thread. {result['images']:,} training "
        f"images, ConvNet of depth 3 and width 32, {result['iterations']} iterations of {AST.steps} student steps. A "
        f"set's worth: {NETS} fresh networks, {STEPS} steps each, 2,000 test images, accuracy after the last step in "
        "percent; mean and standard error over seeds. Real images at the best step size of "
        f"{', '.join(f'{rate:g}' for rate in result['rates'])} for each set, distilled ones at the one they learned "
        "(last column: at that best). Leads are taken seed by seed. Times are the processor's, on a shared machine.",
        "",
        "| | accuracy | over random real | over representative real | L_TM, first and last 20 | s / 100 iterations "
        "| at the best step size |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        leads = []
        for other in ("random real", "representative real"):
            both = [seed for seed in found if seed in rows.get(other, {}) and other != name]
            lead = [100 * (found[seed]["accuracy"] - rows[other][seed]["accuracy"]) for seed in both]
            leads.append(shown(lead, "+") if lead else "")
        matching, seconds = "", ""
        if "matching" in next(iter(found.values())):
            first, last = np.mean([each["matching"] for each in found.values()], 0)
            matching = f"{first:.3f}, {last:.3f}"
            seconds = f"{np.mean([each['seconds_per_100'] for each in found.values()]):.0f}"
        accuracy, best = (
            shown([100 * value for value in values])
            for values in (
                [each["accuracy"] for each in found.values()],
                [max(each["by_rate"]) for each in found.values()],
            )
        )
        lines.append(f"| {name} | {accuracy} | {leads[0]} | {leads[1]} | {matching} | {seconds} | {best} |")
    for name, each in result["experts"].items():
        shares = ", ".join(f"{100 * accuracy:.1f}" for accuracy in each["accuracies"])
        seconds = f"; {each['seconds']:.0f} s for all" if each["seconds"] else ""
        lines += ["", f"{name}'s experts: {shares} % of their own images{seconds}."]
    return "\n".join(lines) + "\n"


def shown(values: list[float], sign: str = "") -> str:
    """Mean and standard error."""
    mean = f"{np.mean(values):{sign}.1f}"
    return f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else mean


def peak(gradients: str, steps: int) -> dict[str, float]:
    """Seconds of an outer gradient at one image a class, and what it adds to the process's peak, in MB."""
    network = FlatNetwork(partial(convnet, 3, 10, (32, 32)))
    images, labels, start = torch.randn(10, 3, 32, 32), torch.arange(10), network.start(0)
    batches = inner_batches(10, 10, steps, torch.Generator().manual_seed(0))
    terms = checkpoints(start, [start + 0.01, start + 0.02], steps, "aggregate")
    student = Student(network, augmentations=AUGMENTATIONS)
    # Once with a single step: libraries and the memory pool are then there.
    student.outcome(
        images, labels, 0.01, Episode(start, checkpoints(start, [start + 0.01], 1, "none"), batches[:1]), gradients
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    student.outcome(images, labels, 0.01, Episode(start, terms, batches), gradients)
    seconds = time.process_time() - begun
    return {"seconds": seconds, "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def memory() -> None:
    """Both ways at several numbers of steps, each in a process of its own."""
    rows = []
    for gradients in GRADIENTS:
        for steps in (20, 50, 100):
            command = [sys.executable, "-m", "benchmarks.distill", "peak", gradients, str(steps)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"gradients": gradients, "steps": steps, **found})
            print(rows[-1], flush=True)
    environment = describe_environment().model_dump()
    (RESULTS / "distill_memory.json").write_text(
        json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
