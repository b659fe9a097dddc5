"""Delta files: bytes an entry, time to load and apply them, and to select the entries of a large model.

``python -m benchmarks.sparse_file`` writes ``benchmarks/results/sparse_file.json`` and a table beside it. Entries lie
at random places, which is the worst case for gaps; values are normal. Times are those of one process on one thread, the
least of several runs, as wall clock and as processor time: other work on the machine is in the first alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy import RESULTS
from compress.measure.machine import describe_environment
from compress.sparse.application import apply_deltas
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.criteria import scores_of
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import read_delta, write_delta
from compress.sparse.selection import top_k

REACH = {(0.05, "fp16"): 3.05, (0.05, "int8"): 2.05, (0.005, "fp16"): 3.6, (0.005, "int8"): 2.6}
ENTRIES = 10_000_000
WIDE = 10_000
SELECTED_FROM = 178_000_000


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Each in a process of its own: the memory that one has had at most is asked for at its end.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        sizes = pool.apply(measure_sizes)
        applied = pool.apply(measure_application, (arguments.repeats,))
        selected = pool.apply(measure_selection)
    result = {
        "command": f"python -m benchmarks.sparse_file --repeats {arguments.repeats}",
        "environment": describe_environment().model_dump(),
        "sizes": sizes,
        "applied": applied,
        "selected": selected,
    }
    (RESULTS / "sparse_file.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "sparse_file.md").write_text(table(result))
    print(table(result))


def random_entries(density: float, rows: int, seed: int = 0) -> SparseTensor:
    """About ``density`` of a [rows, 10000] matrix."""
    generator, parts = np.random.default_rng(seed), []
    for start in range(0, rows, 1000):
        count = min(1000, rows - start) * WIDE
        parts.append(np.flatnonzero(generator.random(count, np.float32) < density) + start * WIDE)
    index = torch.from_numpy(np.concatenate(parts))
    values = torch.from_numpy(generator.standard_normal(len(index), np.float32)) * 1e-3
    return SparseTensor((rows, WIDE), "float32", index, values)


def measure_sizes() -> list[dict[str, Any]]:
    """Bytes an entry, the header included, of one matrix of 40 million."""
    found = []
    for (density, form), reach in REACH.items():
        entries = random_entries(density, 4000)
        with tempfile.TemporaryDirectory() as folder:
            path = write_delta(SparseDelta("0" * 64, {"weight": entries}), Path(folder) / "d.safetensors", form)
            size = path.stat().st_size / len(entries.index)
        bits = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
        bound = bits / 8 + (2 if form == "fp16" else 1)
        found.append({"density": density, "values": form, "bytes": size, "bound": bound, "reach": reach})
    return found


def measure_application(repeats: int) -> dict[str, Any]:
    """Ten million entries, 5 % of a model of four matrices, from the file into the model."""
    torch.set_num_threads(1)
    rows = int(ENTRIES / 0.05 / WIDE / 4)
    module = nn.Module()
    for name in "abcd":
        module.register_parameter(name, nn.Parameter(torch.zeros(rows, WIDE), requires_grad=False))
    tensors = {name: random_entries(0.05, rows, seed) for seed, name in enumerate("abcd")}
    delta = SparseDelta(base_hash(tensor_hashes(base_tensors(module))), tensors)
    found: dict[str, Any] = {"entries": delta.k, "parameters": 4 * rows * WIDE}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.safetensors"
        found["write"] = timed(lambda: write_delta(delta, path), repeats)
        found["size_bytes"] = path.stat().st_size
        found["load"] = timed(lambda: read_delta(path), repeats)
        read = {"d": read_delta(path)}
        found["apply"] = timed(lambda: apply_deltas(module, read, any_base=True), repeats)
        found["hash"] = timed(lambda: tensor_hashes(base_tensors(module)), repeats)
    return found


def measure_selection() -> dict[str, Any]:
    """1 % of 178 million parameters: seconds, and memory above that of the parameters now and before."""
    torch.set_num_threads(1)
    now = {str(part): torch.randn(SELECTED_FROM // 8) for part in range(8)}
    start = {name: torch.randn(each.numel()) for name, each in now.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mask: dict[str, torch.Tensor] = {}
    seconds = timed(lambda: mask.update(top_k(scores_of("change", now, start, 0), SELECTED_FROM // 100)), 1)
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"parameters": SELECTED_FROM, "k": sum(map(len, mask.values())), "seconds": seconds, "memory_bytes": memory}


def timed(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Least seconds of several runs: on the wall clock, and of the processor."""
    wall, own = [], []
    for _ in range(repeats):
        begun, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - begun)
        own.append(time.process_time() - used)
    return {"wall": min(wall), "processor": min(own)}


def table(result: dict[str, Any]) -> str:
    """In Markdown."""
    applied, selected = result["applied"], result["selected"]
    clocks = ("wall", "processor")
    both = {clock: applied["load"][clock] + applied["apply"][clock] for clock in clocks}
    checked = {clock: both[clock] + applied["hash"][clock] for clock in clocks}
    lines = [
        "# Delta files",
        "",
        f"`{result['command']}`: {result['environment']['cpu']}, one thread. Entries at random places, the worst case.",
        "",
        "| density | values | bytes an entry | entropy bound | to reach |",
        "|---|---|---|---|---|",
    ]
    for each in result["sizes"]:
        numbers = f"{each['bytes']:.3f} | {each['bound']:.2f} | {each['reach']}"
        lines.append(f"| {100 * each['density']:g} % | {each['values']} | {numbers} |")
    lines += [
        "",
        f"{applied['entries']:,} of {applied['parameters']:,} entries, {applied['size_bytes'] / 1e6:.1f} MB; "
        "seconds on the wall clock, and of the processor (the machine had other work):",
        "",
        "| | wall | processor | to reach |",
        "|---|---|---|---|",
    ]
    rows = {
        "load (checked)": applied["load"],
        "apply": applied["apply"],
        "**both**": both,
        "both, and the base's hash compared": checked,
        "write": applied["write"],
        f"select {selected['k']:,} of {selected['parameters']:,}": selected["seconds"],
    }
    reach = {"**both**": "2", f"select {selected['k']:,} of {selected['parameters']:,}": "10"}
    for name, spent in rows.items():
        lines.append(f"| {name} | {spent['wall']:.2f} | {spent['processor']:.2f} | {reach.get(name, '')} |")
    lines += ["", f"Selection takes {selected['memory_bytes'] / 2**20:.0f} MiB above the model and its start (1,536)."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
