"""Tiles of every kernel, timed on the GPU at hand: what the launchers' default tiles were chosen from.

``python -m benchmarks.kernel_tuning`` prints and writes a table; ``--warm I N`` only compiles every Nth candidate, so
that several processes can fill the compiler's cache before one measures. ``--ship TABLE`` needs no GPU: it writes the
fastest tiles of a table beside the kernels, where launchers find them (kernels/tuning.py).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_timing import copies_for, copy_bandwidth, record_graph, time_in_turn
from benchmarks.kernels import DTYPE, random_factors, random_weight
from compress.kernels import launch
from compress.kernels.packed_dot import packed_dot
from compress.kernels.packed_gemv import packed_gemv
from compress.kernels.packed_unpack import packed_unpack, unpack_weight
from compress.kernels.thin_dot import thin_dot
from compress.kernels.thin_gemv import thin_gemv
from compress.kernels.tuning import file_name, tile_key

SHAPES = ((4096, 4096), (8192, 28672))
BITS, GROUP_SIZE, RANK = 4, 128, 512
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Candidate:
    """A way of running a call: ``run(x, tensors)``; candidates of one ``what`` and rows are timed in turn."""

    what: str
    rows: int
    label: str
    run: Callable[[Tensor, Any], Any]


def candidates(packed_only: bool) -> Iterator[Candidate]:
    """Everything that is tried; ``packed`` gets a LaneWeight, ``down`` and ``up`` a factor, ``dense`` a weight."""
    for n, warps in ((8, 1), (8, 2), (8, 4)):
        yield Candidate("packed", 1, f"gemv {n, warps}", lambda x, w, t=(n, warps): packed_gemv(x, w, tile=t))
    for n, warps in ((64, 2), (128, 4), (256, 4), (256, 8)):
        for splits in (4, 8, 12):
            for stages, unroll in ((3, 1), (4, 1), (3, 2), (2, 4)):
                for m, rows in ((16, 16), (8, 1)):
                    tile6 = (n, m, splits, warps, stages, unroll)
                    yield Candidate("packed", rows, f"dot {tile6}", lambda x, w, t=tile6: packed_dot(x, w, tile=t))
    for n, m, splits, warps, unroll in ((128, 32, 4, 4, 1), (128, 32, 4, 4, 2), (128, 64, 4, 8, 1), (256, 64, 4, 8, 1)):
        tile6 = (n, m, splits, warps, 3, unroll)
        yield Candidate("packed", 64, f"dot {tile6}", lambda x, w, t=tile6: packed_dot(x, w, tile=t))
    for rows in (64, 256, 2048):
        yield Candidate("packed", rows, "unpack", lambda x, w: packed_unpack(x, w))
    for tile3 in ((2, 1024, 4), (4, 1024, 4), (2, 2048, 4)):
        yield Candidate("packed", 8, f"unpack alone {tile3}", lambda x, w, t=tile3: unpack_weight(w, DTYPE, t))
    for rows in (1, 4, 16, 64, 256, 2048):
        yield Candidate("dense", rows, "torch.matmul", lambda x, w: torch.matmul(x, w.T))
    if not packed_only:
        yield from thin_candidates()


def thin_candidates() -> Iterator[Candidate]:
    """Tiles of the two thin products."""
    for what in ("down", "up"):
        for tile in ((1, 4), (2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (8, 4), (8, 2)):
            yield Candidate(what, 1, f"gemv {tile}", lambda x, w, t=tile: thin_gemv(x, w, None, torch.float32, t))
        for n, k, warps in ((32, 128, 2), (64, 128, 4), (64, 64, 4), (32, 256, 4), (16, 256, 2)):
            for splits in (1, 2, 4, 8):
                tile5 = (n, k, splits, warps, 4)
                yield Candidate(what, 16, f"dot {tile5}", lambda x, w, t=tile5: thin_dot(x, w, None, t))


def tensors(what: str, shape: tuple[int, int], copies: int) -> list[Any]:
    """``copies`` weights of a kind."""
    outputs, inputs = shape
    if what == "packed":
        return [random_weight(outputs, inputs, BITS, GROUP_SIZE) for _ in range(copies)]
    if what == "dense":
        return [torch.randn(outputs, inputs, device="cuda", dtype=DTYPE) for _ in range(copies)]
    ups, downs = zip(*(random_factors(outputs, inputs, RANK) for _ in range(copies)), strict=True)
    return list(ups if what == "up" else downs)


def measure(shape: tuple[int, int], bandwidth: float, only: str | None, packed_only: bool) -> list[dict[str, Any]]:
    """Every candidate at one shape, with and without overlap of launches where that is possible."""
    rows_found = []
    groups: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in candidates(packed_only):
        groups.setdefault((candidate.what, candidate.rows), []).append(candidate)
    for what in ("packed", "dense") if packed_only else ("packed", "dense", "down", "up"):
        thin = 2 * RANK * (shape[1] if what == "down" else shape[0])
        weight_bytes = {"packed": shape[0] * shape[1] // 2, "dense": 2 * shape[0] * shape[1]}.get(what, thin)
        copies = min(64, copies_for(weight_bytes))
        weights = tensors(what, shape, copies)
        inner = RANK if what == "up" else shape[1]
        for (kind, rows), group in groups.items():
            if kind != what or only not in (None, f"{kind}:{rows}"):
                continue
            xs = [torch.randn(rows, inner, device="cuda", dtype=DTYPE) for _ in range(copies)]
            graphs = {}
            for candidate in group:
                try:
                    calls = [lambda x=x, w=w, c=candidate: c.run(x, w) for x, w in zip(xs, weights, strict=True)]
                    graphs[candidate.label] = (record_graph(calls)[0], copies)
                except Exception as error:  # noqa: BLE001 -- a tile that does not fit this GPU is an answer, too
                    print(what, rows, candidate.label, type(error).__name__, str(error)[:100], flush=True)
            for label, times in time_in_turn(graphs, rounds=5).items():
                us = statistics.median(times)
                share = weight_bytes / us / 1000 / bandwidth
                rows_found.append(
                    {
                        "what": what,
                        "shape": shape,
                        "rows": rows,
                        "tile": label,
                        "us": round(us, 2),
                        "share": round(share, 3),
                    }
                )
            best = sorted((r for r in rows_found if r["what"] == what and r["rows"] == rows), key=lambda r: r["us"])
            print(shape, what, rows, " | ".join(f"{r['tile']} {r['us']}" for r in best[:6]), flush=True)
    return rows_found


def fastest_tiles(table: dict[str, Any]) -> dict[str, list[int]]:
    """The tile of each kernel, shape and number of rows that took least time, by compress.kernels.tuning's key."""
    found: dict[str, tuple[float, list[int]]] = {}
    for row in table["rows"]:
        kind, _, label = row["tile"].partition(" ")
        if kind not in ("gemv", "dot"):
            continue
        tile = [number for number in ast.literal_eval(label) if isinstance(number, int)]
        outputs, inputs = row["shape"]
        if row["what"] == "packed":
            key = tile_key(f"packed_{kind}", row["rows"], outputs, inputs, table["bits"], table["group_size"])
        else:
            thin = (table["rank"], inputs) if row["what"] == "down" else (outputs, table["rank"])
            key = tile_key(f"thin_{kind}", row["rows"], *thin)
        if key not in found or row["us"] < found[key][0]:
            found[key] = (row["us"], tile)
    return {key: tile for key, (_, tile) in sorted(found.items())}


def shipped(table: dict[str, Any], source: str) -> str:
    """The file that is shipped for a table, as text."""
    dtype = str(DTYPE).removeprefix("torch.")
    content = {"device": table["device"], "source": source, "dtype": dtype, "tiles": fastest_tiles(table)}
    lines = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", lines) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "N"))
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--only", help="WHAT:ROWS, as in packed:1")
    parser.add_argument("--packed", action="store_true", help="leave the thin products out")
    parser.add_argument("--ship", type=Path, metavar="TABLE")
    arguments = parser.parse_args()
    if arguments.ship:
        table = json.loads(arguments.ship.read_text())
        path = ROOT / "kernels" / file_name(table["device"])
        path.write_text(shipped(table, arguments.ship.name))
        print(path)
        return
    if arguments.no_overlap:
        found = torch.cuda.get_device_properties(0)
        launch._properties = lambda device: ((8, 0), found.multi_processor_count)  # type: ignore[assignment]
    if arguments.warm:
        index, count = arguments.warm
        for candidate in list(candidates(arguments.packed))[index::count]:
            shape = (1024, 4096)
            inner = RANK if candidate.what == "up" else shape[1]
            x = torch.randn(candidate.rows, inner, device="cuda", dtype=DTYPE)
            candidate.run(x, tensors(candidate.what, shape, 1)[0])
        return
    bandwidth = copy_bandwidth()
    print(torch.cuda.get_device_name(), f"copy {bandwidth:.0f} GB/s", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "copy_gb_per_s": bandwidth,
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "rank": RANK,
        "rows": [],
    }
    for shape in SHAPES:
        result["rows"] += measure(shape, bandwidth, arguments.only, arguments.packed)
        if arguments.out:  # after each shape: a lent GPU's minutes may end before the next one's
            arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
