"""Every kernel beside torch.matmul in 16 bits, on one GPU, in one run.

``python -m benchmarks.kernels`` writes ``benchmarks/results/kernels-DEVICE.json`` and a table beside it, anew after
each case; one that fails is reported there, and the next one runs. A case is a shape function (:func:`cases`): what it
computes, the tensors one call reads, and how dense the same layer would be. Weights are random codes, never zeros. GB/s
counts what a call must read of its weight: codes, scales, zero points, factors. Beside 4 bits in groups of 128 stand,
in the same rounds, those of torchao, gemlite and bitsandbytes that are installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.device_timing import copies_for, copy_bandwidth, matmul_rate, record_graph, time_in_turn
from benchmarks.kernel_peers import PEER_GROUP, installed_peers, peer_graph
from benchmarks.kernel_results import Results
from compress.kernels.delta_linear import choose_delta
from compress.kernels.delta_reference import delta_reference
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.int8_linear import choose_int8
from compress.kernels.int8_reference import int8_reference
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.lanes import LaneWeight, pack_lanes
from compress.kernels.lowrank_linear import choose_lowrank
from compress.kernels.packed_linear import choose_packed
from compress.kernels.packed_reference import packed_reference
from compress.kernels.row_grid import KINDS, RowGrid
from compress.kernels.table import register_operators

RESULTS = Path(__file__).parent / "results"
SHAPES = ((4096, 4096), (8192, 28672))
DTYPE = torch.bfloat16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ERROR = 1e-2
PEERS_BESIDE = f"4 bits, group {PEER_GROUP}"


@dataclass(frozen=True)
class Call:
    """One call with its own tensors: ``run``, its truth in float32, the weight's bytes, the kernel dispatch chooses."""

    x: Tensor
    run: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    weight_bytes: int
    kernel: str


@dataclass(frozen=True)
class Case:
    """``make(x, outputs)`` builds a call; ``beside`` names the case whose time this one is compared with as well."""

    name: str
    rows: int
    shape: tuple[int, int]
    make: Callable[[Tensor, int], Call]
    target: str = ""
    beside: str = ""


def random_weight(outputs: int, inputs: int, bits: int, group: int) -> LaneWeight:
    """Random codes, scales in 16 bits, zero points around the middle."""
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, device="cuda")
    grid = (outputs, -(-inputs // group))
    scale = (torch.rand(grid, device="cuda") * 1e-3 + 1e-3).half()
    zero_point = torch.randint(0, 1 << bits, grid, dtype=torch.uint8, device="cuda")
    units = torch.cat([pack_lanes(part, bits) for part in codes.split(1024)])  # whole stripes at a time
    return LaneWeight(units, scale, zero_point, bits, inputs, group)


def packed(bits: int, group: int) -> Callable[[Tensor, int], Call]:
    """A weight of ``bits`` in groups."""

    def make(x: Tensor, outputs: int) -> Call:
        w = random_weight(outputs, x.shape[1], bits, group)
        run = torch.ops.compress.packed_linear
        return Call(
            x,
            lambda: run(x, w.units, w.scale, w.zero_point, None, bits, group),
            lambda: packed_reference(x.float(), w),
            w.weight_bytes,
            choose_packed(x, w).name,
        )

    return make


def packed_lowrank(bits: int, group: int, rank: int) -> Callable[[Tensor, int], Call]:
    """The same with a low-rank branch in ``x``'s dtype."""

    def make(x: Tensor, outputs: int) -> Call:
        w = random_weight(outputs, x.shape[1], bits, group)
        up, down = random_factors(outputs, x.shape[1], rank, x.dtype)
        run = torch.ops.compress.packed_lowrank_linear
        return Call(
            x,
            lambda: run(x, w.units, w.scale, w.zero_point, up, down, None, bits, group),
            lambda: packed_reference(x.float(), w, None, (x.float() @ down.float().T, up)),
            w.weight_bytes + 2 * (up.numel() + down.numel()),
            choose_packed(x, w, rank).name,
        )

    return make


def lowrank(divisor: int, kept: int) -> Callable[[Tensor, int], Call]:
    """Factors of a rank of inputs / ``divisor``, of which the first 1 / ``kept`` are used."""

    def make(x: Tensor, outputs: int) -> Call:
        total = x.shape[1] // divisor
        rank = total // kept
        up, down = random_factors(outputs, x.shape[1], total, x.dtype)
        run = torch.ops.compress.lowrank_linear
        return Call(
            x,
            lambda: run(x, up, down, None, rank),
            lambda: x.float() @ down[:rank].float().T @ up[:, :rank].float().T,
            2 * rank * (outputs + x.shape[1]),
            choose_lowrank(x, up, down, rank).name,
        )

    return make


def integers(kind: str) -> Callable[[Tensor, int], Call]:
    """8-bit weights and inputs on a grid of ``kind``, one of compress.kernels.row_grid's."""

    def make(x: Tensor, outputs: int) -> Call:
        codes = torch.randint(-127, 128, (outputs, x.shape[1]), dtype=torch.int8, device=x.device)
        w = Int8Weight(codes, torch.rand(outputs, device=x.device) * 1e-4, codes.sum(1, dtype=torch.int32))
        parts = (w.codes, w.scale, w.sums, None)
        scale, zero = torch.tensor(0.03, device=x.device), torch.tensor(128, dtype=torch.uint8, device=x.device)
        grid = RowGrid("static", scale, zero) if kind == "static" else RowGrid(kind)
        fixed, measured = torch.ops.compress.int8_linear, torch.ops.compress.int8_dynamic_linear
        return Call(
            x,
            (lambda: fixed(x, scale, zero, *parts, 8))
            if kind == "static"
            else (lambda: measured(x, *parts, kind == "token")),
            lambda: int8_reference(x, grid, w).float(),
            codes.numel() + 8 * outputs,
            choose_int8(x, w).name,
        )

    return make


def with_delta(bits: int, group: int, density: float, tasks: int) -> Callable[[Tensor, int], Call]:
    """A packed base and sparse deltas of ``density``; with several ``tasks`` each row of ``x`` has one of its own."""

    def make(x: Tensor, outputs: int) -> Call:
        w = random_weight(outputs, x.shape[1], bits, group)
        found = []
        for _ in range(tasks):
            index = (torch.rand(outputs * x.shape[1], device=x.device) < density).nonzero()[:, 0]
            values = torch.randn(len(index), device=x.device) * 1e-3
            found.append(DeltaRows.from_flat((outputs, x.shape[1]), index, values, torch.float16))
        deltas = DeltaRows.stack(found)
        numbers = torch.arange(x.shape[0], device=x.device, dtype=torch.int32) % tasks
        task = numbers if tasks > 1 else None
        parts = (w.units, w.scale, w.zero_point, deltas.starts, deltas.columns, deltas.values)
        run = torch.ops.compress.packed_delta_linear
        return Call(
            x,
            lambda: run(x, *parts, task, None, bits, group),
            lambda: delta_reference(x.float(), w, deltas, task),
            w.weight_bytes + min(tasks, x.shape[0]) * 4 * (len(deltas.values) // tasks),
            choose_delta(x, w, task).name,
        )

    return make


def random_factors(outputs: int, inputs: int, rank: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    """``up`` [O, R] and ``down`` [R, I]."""
    up = torch.randn(outputs, rank, device="cuda", dtype=dtype) * rank**-0.5
    return up, torch.randn(rank, inputs, device="cuda", dtype=dtype) * inputs**-0.5


def cases() -> list[Case]:
    """Everything that is measured, first what a target is set for: a lent GPU's minutes may end before the cases do."""
    found = []
    for shape in SHAPES:
        for rows, target in ((1, ">= 3x, >= 80 % of copy"), (4, ""), (16, ">= 2.5x"), (64, ""), (2048, ">= 0.9x")):
            found.append(Case("4 bits, group 128", rows, shape, packed(4, 128), target))
        for bits in (2, 3, 8):
            found += [Case(f"{bits} bits, group 128", rows, shape, packed(bits, 128)) for rows in (1, 16)]
        found += [Case("4 bits, group 32", rows, shape, packed(4, 32)) for rows in (1, 16)]
        for rows in (1, 16):
            target = "<= 1.15x the time without" if rows == 1 else ""
            made = packed_lowrank(4, 128, 32)
            found.append(Case("4 bits + rank 32", rows, shape, made, target, beside="4 bits, group 128"))
        for rows in (1, 16, 64, 2048):
            found += [Case(f"8 bits, inputs 8 bits, {kind}", rows, shape, integers(kind)) for kind in KINDS]
        for rows in (1, 16, 2048):
            made = with_delta(4, 128, 0.05, 1)
            found.append(Case("4 bits + 5 % delta", rows, shape, made, beside="4 bits, group 128"))
        made = with_delta(4, 128, 0.005, 4)
        found.append(Case("4 bits + 4 deltas of 0.5 %, rows mixed", 16, shape, made, beside="4 bits, group 128"))
    for shape in ((4096, 4096), (8192, 8192), (28672, 8192)):
        for rows in (1, 4, 16):
            found.append(Case("rank inputs / 8", rows, shape, lowrank(8, 1), ">= 4x"))
        found.append(Case("rank inputs / 8, half of it used", 1, shape, lowrank(8, 2)))
    return sorted(found, key=lambda case: not case.target)


def measure(case: Case, bandwidth: float, rate: float, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Time one case, its dense twin, and the case it stands beside, in turn.

    ``bandwidth``: GB/s of a copy; ``rate``: TFLOP/s of a matrix product in ``dtype``, which inputs are in.
    """
    outputs, inputs = case.shape
    makers = {"ours": case.make}
    if case.beside:
        makers["beside"] = packed(4, 128)
    graphs, kept, error = {}, [], 0.0
    for name, make in makers.items():
        calls = [make(torch.randn(case.rows, inputs, device="cuda", dtype=dtype), outputs)]
        copies = copies_for(calls[0].weight_bytes)
        calls += [make(torch.randn_like(calls[0].x), outputs) for _ in range(copies - 1)]
        graph, results = record_graph([call.run for call in calls])
        graph.replay()
        graph.replay()
        for call, result in ((calls[0], results[0]), (calls[-1], results[-1])):
            truth = call.truth()
            error = max(error, float((result - truth).norm() / truth.norm()))
        kept.append((calls, results))
        graphs[name] = (graph, copies)
    first = kept[0][0][0]
    if not error <= MAX_ERROR:
        raise AssertionError(f"{case}: relative error {error:.2e}")
    copies = copies_for(2 * outputs * inputs)
    weights = [torch.randn(outputs, inputs, device="cuda", dtype=dtype) * inputs**-0.5 for _ in range(copies)]
    xs = [torch.randn(case.rows, inputs, device="cuda", dtype=dtype) for _ in range(copies)]
    dense = [lambda x=x, w=w: torch.matmul(x, w.T) for x, w in zip(xs, weights, strict=True)]
    graphs["dense"] = (record_graph(dense)[0], copies)
    peers: dict[str, Any] = {}
    if case.name == PEERS_BESIDE and dtype is torch.bfloat16:
        for name, peer in installed_peers().items():
            try:
                graphs[name], held, peers[name] = peer_graph(peer, case.rows, case.shape)
                kept.append(held)
            except Exception as failure:  # noqa: BLE001 -- a peer that cannot is a result, too
                peers[name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
    times = time_in_turn(graphs)
    ours = statistics.median(times["ours"])
    tflop_per_s = 2 * case.rows * outputs * inputs / ours / 1e6
    for name, found in peers.items():
        if name in times:
            found["us"] = round(statistics.median(times[name]), 2)
            ratios = [p / o for p, o in zip(times[name], times["ours"], strict=True)]
            found["times_ours"] = round(statistics.median(ratios), 2)
    row: dict[str, Any] = {
        "case": case.name,
        "outputs": outputs,
        "inputs": inputs,
        "rows": case.rows,
        "kernel": first.kernel,
        "us": round(ours, 2),
        "us_low_high": [round(min(times["ours"]), 2), round(max(times["ours"]), 2)],
        "dense_us": round(statistics.median(times["dense"]), 2),
        "speedup": round(statistics.median(d / o for d, o in zip(times["dense"], times["ours"], strict=True)), 2),
        "weight_bytes": first.weight_bytes,
        "gb_per_s": round(first.weight_bytes / ours / 1000, 1),
        "share_of_copy": round(first.weight_bytes / ours / 1000 / bandwidth, 3),
        "tflop_per_s": round(tflop_per_s, 1),
        "share_of_matmul": round(tflop_per_s / rate, 3),
        "relative_error": float(f"{error:.2e}"),
        "target": case.target,
    }
    if case.beside:
        ratios = [o / b for o, b in zip(times["ours"], times["beside"], strict=True)]
        row["times_beside"] = round(statistics.median(ratios), 3)
    if peers:
        row["peers"] = peers
    return row


def warm(found: list[Case], dtype: torch.dtype) -> None:
    """Only compile what the cases ``found`` run, so that several processes can do it before one measures."""
    for case in found:
        try:
            case.make(torch.randn(case.rows, case.shape[1], device="cuda", dtype=dtype), case.shape[0]).run()
        except Exception as error:  # noqa: BLE001 -- measuring will meet and report it
            print(f"{case.name}, {case.rows} rows, {case.shape}: {type(error).__name__}", flush=True)


def is_usable() -> bool:
    """Whether the GPU still takes work: after an illegal access it refuses all of this process's."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of inputs, factors and dense weights")
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "N"), help="only compile every Nth case, from I on")
    parser.add_argument(
        "--from", dest="first", type=int, default=0, metavar="N", help="go on behind the N cases that --out has already"
    )
    arguments = parser.parse_args()
    register_operators()
    torch.manual_seed(0)
    dtype = DTYPES[arguments.dtype]
    if arguments.warm:
        index, count = arguments.warm
        warm(cases()[index::count], dtype)
        return
    bandwidth, rate = copy_bandwidth(), matmul_rate(dtype)
    header = {
        "device": torch.cuda.get_device_name(),
        "command": "python -m benchmarks.kernels" + (f" --dtype {arguments.dtype}" if dtype is not DTYPE else ""),
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_per_s": round(bandwidth, 1),
        "matmul_tflop_per_s": round(rate, 1),
    }
    results = Results(arguments.out, header, arguments.first)
    shown = ("case", "outputs", "inputs", "rows", "kernel", "us", "dense_us", "speedup", "share_of_copy")
    for number, case in list(enumerate(cases()))[arguments.first :]:
        try:
            row = measure(case, bandwidth, rate, dtype)
        except Exception as error:  # noqa: BLE001 -- reported, and the others are still worth their time
            results.fail(case.name, case.rows, case.shape, error)
            print(number, *results.failures[-1].values(), flush=True)
            if not is_usable():
                # Another process has a GPU that works; this one's memory goes with it.
                rest = ["--out", str(arguments.out), "--dtype", arguments.dtype, "--from", str(number + 1)]
                os.execv(sys.executable, [sys.executable, "-m", "benchmarks.kernels", *rest])
            continue
        results.add(row)
        print(number, *(row[name] for name in shown), row.get("times_beside", ""), row["relative_error"], flush=True)
    if results.failures:
        raise SystemExit(f"{len(results.failures)} cases failed")


if __name__ == "__main__":
    main()
