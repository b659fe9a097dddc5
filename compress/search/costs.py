"""What each way costs in bytes, bit operations and microseconds, fixed by whole files exported and timed first.

Three base files are made without calibration (compress/exporters/skeleton.py): all float, all at 8 bits, all at the
narrowest widths. A layer's own bytes are known; what a file holds besides is read off the bases. Latency comes from
compress/latency, which the same files calibrate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.errors import InputError
from compress.exporters.build import build_onnx, write_onnx
from compress.exporters.functions import function_bytes
from compress.exporters.skeleton import write_skeleton
from compress.graph.traced import TracedModel
from compress.intake.model import Intake
from compress.kernels.table import register_operators
from compress.measure.bench import bench
from compress.measure.kit import base_kinds, layers_digest, operator_shapes
from compress.measure.latency_model import COMPUTE_OF, LatencyModel, LayerPlace, fit, layer_places
from compress.measure.latency_table import LatencyTable, check_complete, open_table
from compress.measure.operators import time_operators
from compress.options import Search
from compress.progress import Progress
from compress.quant.targets import Target
from compress.records.allocation import Cost
from compress.records.layers import LayerSpec
from compress.records.plan import Choice
from compress.search.space import FLOAT, Space, Way

__all__ = ["Costs", "export_ways", "measure_costs", "time_files"]

_STALE = 1.25


@dataclass(frozen=True)
class Costs:
    """Prices of all ways, and of the model without them.

    Attributes:
        float_totals: size (bytes), bops and, where timed, latency (microseconds) of the float model.
        fixed: what every plan pays of them.
        layers: by layer and way.
        shared: bytes that a file pays once for each width of packed weights in it: the function that unpacks them.
        latency: None where latency does not matter.
        notes: for the report.
        table: the times that ``latency`` comes from; None without.
    """

    float_totals: dict[str, float]
    fixed: dict[str, float]
    layers: dict[str, dict[Way, Cost]]
    shared: dict[int, int]
    latency: LatencyModel | None
    notes: tuple[str, ...]
    table: LatencyTable | None = None

    @property
    def timed_here(self) -> bool:
        """Whether a whole file can be timed beside them: latencies are not another machine's."""
        return self.latency is not None and not (self.table is not None and self.table.of_kit)


def measure_costs(
    intake: Intake,
    space: Space,
    target: Target,
    search: Search,
    *,
    timed: bool,
    progress: Progress,
    float_model: TracedModel | None = None,
) -> Costs:
    """Export the bases, weigh them, and time them and their operators where ``timed``.

    ``float_model`` is what budgets relate to, where ``intake`` has been transformed since.
    """
    register_operators()
    specs = {layer.name: layer for layer in intake.layers}
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        files: list[Path] = []
        bases = _bases(space)
        for position, ways in enumerate(bases):
            progress("exporting base files", position, len(bases))
            traced = float_model if position == 0 and float_model is not None else intake.traced
            files.append(export_ways(traced, ways, target, Path(folder) / f"base{position}.onnx"))
        sizes = [file.stat().st_size for file in files]
        seconds = [
            _second_layer_bytes(intake.traced, base, space, specs, target, size, Path(folder) / "thin.onnx")
            for base, size in zip(bases[:2], sizes, strict=False)
        ]
        latency: LatencyModel | None = None
        notes: tuple[str, ...] = ()
        float_us: float | None = None
        used: LatencyTable | None = None
        if timed:
            own = Path(search.latency_table) if search.latency_table else None
            kept, path = open_table(own, target.provider, search.threads)
            if kept.of_kit:
                latency, float_us, used, notes = _read_kit(intake, space, kept, path, search)
            else:
                times_us = time_files(files, target, search, intake.traced.length, progress)
                latency, used, notes = _fit(intake.traced, space, bases, times_us, target, search, progress)
                float_us = times_us[0]
    widths = {way.widths[0] for ways in space.ways.values() for way in ways if way.storage == "packed"}
    shared = {width: function_bytes(width) for width in sorted(widths)}
    fixed, extra = _overheads(specs, bases, sizes, shared)
    layers = {
        name: {
            way: Cost(
                size_bytes=way.stored_bytes(specs[name])
                + round(extra[way.storage] + seconds[way.option is not None] * (len(way.part_options) - 1)),
                macs=way.macs(specs[name]),
                bops=way.bops(specs[name]),
                # Looking rows up takes no time that could be told from the rest.
                latency_us=latency.layers_us.get(name, {way.run: 0.0}).get(way.run) if latency else None,
            )
            for way in ways
        }
        for name, ways in space.ways.items()
    }
    skipped = [specs[skip.layer] for skip in space.skipped if skip.layer in specs]
    float_bops = float(sum(FLOAT.bops(layer) for layer in intake.layers))
    totals = {"size": float(sizes[0]), "bops": float_bops}
    base = {"size": fixed, "bops": float(sum(FLOAT.bops(layer) for layer in skipped))}
    if latency is not None and float_us is not None:
        totals["latency"] = float_us
        base["latency"] = latency.fixed_us + sum(
            latency.layers_us[layer.name]["float"] for layer in skipped if layer.name in latency.layers_us
        )
    return Costs(totals, base, layers, shared, latency, notes, used)


def export_ways(traced: TracedModel, ways: Mapping[str, Way], target: Target, path: Path) -> Path:
    """Write the uncalibrated file of ``ways`` to ``path``."""
    choices: list[Choice] = [choice for layer, way in ways.items() for choice in way.choices(layer)]
    splits = [split for layer, way in ways.items() if (split := way.split(layer)) is not None]
    if choices or splits:
        write_skeleton(traced, choices, target, path, splits)
    else:
        write_onnx(build_onnx(traced), path, {})
    return path


def time_files(
    files: Sequence[Path],
    target: Target,
    search: Search,
    length: int | None,
    progress: Progress,
) -> list[float]:
    """Median microseconds of each file, interleaved; ``length`` tokens a sample (None: other inputs)."""
    report = bench(
        files,
        batch_sizes=(search.batch,),
        threads=search.threads,
        provider=target.provider,
        dims={"sequence": length} if length else {},
        memory=False,
        progress=progress,
    )
    return [row.p50_ms * 1e3 for row in report.rows]


def _bases(space: Space) -> list[dict[str, Way]]:
    """All float, then the widest and the narrowest way of each layer on integers where it has one."""
    found = [dict.fromkeys(space.ways, FLOAT)]
    for choose in (max, min):
        base = {}
        for layer, ways in space.ways.items():
            quantized = [way for way in ways if way.option is not None and way.rank is None]
            integer = [way for way in quantized if way.kind != "float"] or quantized
            base[layer] = choose(integer, key=lambda way: way.widths)
        if base not in found:
            found.append(base)
    return found


def _overheads(
    specs: Mapping[str, LayerSpec],
    bases: Sequence[Mapping[str, Way]],
    sizes: Sequence[int],
    shared: Mapping[int, int],
) -> tuple[float, dict[str, float]]:
    """Bytes of a file without its layers, and bytes that a layer adds besides its numbers, by how it is stored."""
    float_bytes = sum(FLOAT.stored_bytes(specs[name]) for name in bases[0])
    fixed = float(sizes[0] - float_bytes)
    extra = {"float": 0.0, "plain": 0.0, "packed": 0.0, "blocks": 0.0}
    for base, size in zip(bases[1:], sizes[1:], strict=True):
        stored = {name: way.storage for name, way in base.items()}
        rest = size - fixed - sum(way.stored_bytes(specs[name]) for name, way in base.items())
        rest -= sum(shared[width] for width in {way.widths[0] for way in base.values() if way.storage == "packed"})
        kind = "packed" if "packed" in stored.values() else "plain"
        count = sum(each == kind for each in stored.values())
        if count:
            rest -= sum(extra[each] for each in stored.values() if each != kind)
            extra[kind] = rest / count
    if not extra["packed"]:
        extra["packed"] = extra["plain"]
    return fixed, extra


def _second_layer_bytes(
    traced: TracedModel,
    base: Mapping[str, Way],
    space: Space,
    specs: Mapping[str, LayerSpec],
    target: Target,
    size: int,
    path: Path,
) -> float:
    """Bytes that a layer of ``base`` done by two takes besides its weights: the second one's own place in the file."""
    thin = {}
    for name, ways in space.ways.items():
        ranks = [way.rank for way in ways if way.rank is not None and replace(way, rank=None) == base[name]]
        if ranks:
            thin[name] = replace(base[name], rank=ranks[0])
    if not thin:
        return 0.0
    change = sum(way.stored_bytes(specs[name]) - base[name].stored_bytes(specs[name]) for name, way in thin.items())
    return (export_ways(traced, {**base, **thin}, target, path).stat().st_size - size - change) / len(thin)


def _fit(
    traced: TracedModel,
    space: Space,
    bases: Sequence[Mapping[str, Way]],
    times_us: Sequence[float],
    target: Target,
    search: Search,
    progress: Progress,
) -> tuple[LatencyModel, LatencyTable, tuple[str, ...]]:
    places = layer_places(traced, search.batch)
    ranks = _ranks(space)
    shapes = operator_shapes(places, ranks)
    own = Path(search.latency_table) if search.latency_table else None
    table, path = open_table(own, target.provider, search.threads)
    kinds: list[tuple[dict[str, str], float]] = []
    for base, time_us in zip(bases, times_us, strict=True):
        runs = {name: base[name].kind if name in base else "float" for name in places}
        if runs not in [known for known, _ in kinds]:
            kinds.append((runs, time_us))
    computes = {COMPUTE_OF[kind] for base, _ in kinds for kind in base.values()}
    wanted = {signature for signature in shapes if any(table.find(signature, each) is None for each in computes)}
    known = "kept in" if len(wanted) == len(shapes) else "the rest from"
    note = f"latency: {len(wanted)} of {len(shapes)} operators timed in this run, {known} {path}"
    if not wanted and _stale(places, table, times_us[0]):
        wanted = set(shapes)
        note = f"latency: all operators timed again, as those in {path} are slower than the whole model is now"
    if wanted:
        rows = time_operators([shapes[each] for each in sorted(wanted)], target, search.threads, progress)
        table, path = open_table(own, target.provider, search.threads)  # another run may have added to it meanwhile
        table = table.with_operators(rows)
        table.save(path)
    return fit(places, table, kinds, ranks), table.only(shapes.keys()), (note,)


def _read_kit(
    intake: Intake, space: Space, table: LatencyTable, path: Path, search: Search
) -> tuple[LatencyModel, float, LatencyTable, tuple[str, ...]]:
    """The latency model of another machine, and the float model's microseconds there; nothing is timed here."""
    places = layer_places(intake.traced, search.batch)
    ranks = _ranks(space)
    shapes = operator_shapes(places, ranks)
    ways = {way.kind for ways in space.ways.values() for way in ways}
    computes = {"float", *(COMPUTE_OF[kind] for kind in ways)}
    check_complete(table, path, [(signature, each) for signature in shapes for each in sorted(computes)])
    bases: list[tuple[dict[str, str], float]] = []
    for kind in ("float", "integer"):
        time_us = table.whole(layers_digest(places), kind)
        if time_us is None:
            raise InputError(
                f"{path} is of other operators: it has no time of this model as a whole ({kind}). Write a kit for it "
                "with `compress bench --kit`, and measure it on that machine"
            )
        runs = base_kinds(intake.layers, kind)
        bases.append((runs, time_us))
        if kind == "integer" and "narrow" in ways:  # fewer bits take no less time
            bases.append(({name: "narrow" if each == "integer" else each for name, each in runs.items()}, time_us))
    note = f"latency: as {path} has it for {table.machine}; nothing was timed on this machine to find the plan"
    distinct = [base for position, base in enumerate(bases) if base[0] not in [each for each, _ in bases[:position]]]
    return fit(places, table, distinct, ranks), bases[0][1], table.only(shapes.keys()), (note,)


def _ranks(space: Space) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(dict.fromkeys(way.rank for way in ways if way.rank is not None))
        for name, ways in space.ways.items()
    }


def _stale(places: Mapping[str, LayerPlace], table: LatencyTable, float_us: float) -> bool:
    """Whether the float layers alone take longer than the whole float model just did."""
    total = 0.0
    for place in places.values():
        for shape in place.shapes:
            row = table.find(shape.signature, "float")
            total += row.layer_us if row else 0.0
    return total > _STALE * float_us
