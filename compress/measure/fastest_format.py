"""Which format runs each linear fastest at the rows a call has: measured here, never assumed.

A linear of one row is bound by reading its weight, one of many rows by arithmetic; which format wins depends on its
shape, the rows and the machine. Candidates are timed alone as they are exported; times are kept in the latency table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compress.errors import InputError
from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel
from compress.measure.latency_table import LatencyTable, check_complete, open_table
from compress.measure.operators import Shape, Variant, shape_of, time_operators
from compress.progress import Progress
from compress.quant.formats import FORMATS
from compress.quant.targets import Target
from compress.records.layers import LayerSpec, QuantOption
from compress.records.plan import Choice

__all__ = ["find_fastest", "linear_shapes", "linear_variants"]

_GROUPS = (32, 128)
# Of formats as fast as this, the one that does least to the layer's input.
_AS_FAST = 1.05


def find_fastest(
    traced: TracedModel,
    layers: Sequence[LayerSpec],
    bits: Mapping[str, int],
    *,
    method: str,
    rows: int,
    with_data: bool,
    target: Target,
    threads: int,
    table_file: Path | None,
    progress: Progress,
) -> tuple[dict[str, Choice], LatencyTable]:
    """The fastest way to run each linear that can be compressed, and the times that say so.

    Args:
        bits: width of each layer's weights.
        method: for all of them.
        rows: that a call has: tokens times batch.
        with_data: whether ranges of inputs can be calibrated.
        table_file: where times are kept; None: the user's cache.

    Raises:
        InputError: ``rows`` is no number of rows, or the model has no linear.
    """
    if rows < 1:
        raise InputError(f"--rows {rows}: a call has 1 row or more (tokens times batch)")
    counts, shapes = linear_shapes(traced, layers, rows)
    if not shapes:
        raise InputError("--rows is for linears, and the model has none that can be compressed; leave it out")
    specs = {layer.name: layer for layer in layers}
    variants = {name: linear_variants(specs[name], bits[name], with_data, target) for name in shapes}
    table = _measured(shapes, variants, target, threads, table_file, progress)
    found = {}
    for name, shape in shapes.items():
        best, reason = _choose(shape, variants[name], table, counts[name])
        found[name] = Choice(layer=name, method=method, option=best.option, format=best.format, reason=reason)
    return found, table.only({shape.signature for shape in shapes.values()})


def linear_shapes(
    traced: TracedModel, layers: Sequence[LayerSpec], rows: int
) -> tuple[dict[str, int], dict[str, Shape]]:
    """Rows and shape of each linear that can be compressed, where a call has ``rows`` rows."""
    calls = layer_calls(traced)
    linears = [layer for layer in layers if layer.kind == "linear" and not layer.refusal]
    # A linear behind a pooling or on one position sees fewer rows than the others, in proportion.
    most = max((layer.rows // layer.calls for layer in linears), default=1)
    counts = {layer.name: max(rows * (layer.rows // layer.calls) // most, 1) for layer in linears}
    return counts, {name: _at_rows(shape_of(calls[name][0], 1), count) for name, count in counts.items()}


def _at_rows(shape: Shape, rows: int) -> Shape:
    """A linear's shape with ``rows`` rows: of one sample where it has a sequence."""
    sizes = (rows, shape.input[-1]) if len(shape.input) == 2 else (1, rows, shape.input[-1])
    return replace(shape, input=sizes)


def linear_variants(layer: LayerSpec, bits: int, with_data: bool, target: Target) -> list[Variant]:
    """The ways that ``target`` has, those that change the layer's input least first."""
    found = [Variant(QuantOption(bits=bits, symmetric=False), "float-weights")]
    found += [
        Variant(QuantOption(bits=bits, symmetric=False, group_size=group), "matmul-nbits")
        for group in _GROUPS
        if group <= layer.weight_shape[1]
    ]
    if with_data:
        found.append(Variant(QuantOption(bits=bits, act_bits=8), "integer"))
    found.append(Variant(QuantOption(bits=bits, act_bits=8, dynamic=True), "dynamic"))
    return [
        each
        for each in found
        if each.format in target.formats and FORMATS[each.format].refusal(layer, each.option) is None
    ]


def _measured(
    shapes: Mapping[str, Shape],
    variants: Mapping[str, Sequence[Variant]],
    target: Target,
    threads: int,
    table_file: Path | None,
    progress: Progress,
) -> LatencyTable:
    table, path = open_table(table_file, target.provider, threads)
    if table.of_kit:
        pairs = [(shapes[name].signature, variant.compute) for name in shapes for variant in variants[name]]
        check_complete(table, path, pairs)
    missing: dict[Variant, list[Shape]] = {}
    for name, shape in shapes.items():
        for variant in variants[name]:
            found = missing.setdefault(variant, [])
            if shape not in found and table.find(shape.signature, variant.compute) is None:
                found.append(shape)
    # Of one compute only one variant is timed: the weights' width makes no difference to integers and floats.
    by_compute = {variant.compute: variant for variant in missing}
    wanted = list(dict.fromkeys(shape for some in missing.values() for shape in some))
    if wanted:
        rows = time_operators(wanted, target, threads, progress, variants=list(by_compute.values()))
        table, path = open_table(table_file, target.provider, threads)  # another run may have added to it meanwhile
        table = table.with_operators(rows)
        table.save(path)
    return table


def _choose(shape: Shape, variants: Sequence[Variant], table: LatencyTable, rows: int) -> tuple[Variant, str]:
    """The variant to take, and the times that say so."""
    times: dict[Variant, float] = {}
    for variant in variants:
        row = table.find(shape.signature, variant.compute)
        assert row is not None
        times[variant] = row.layer_us + row.enter_us + row.leave_us
    best = min(times.values())
    chosen = next(variant for variant, time in times.items() if time <= _AS_FAST * best)
    others = ", ".join(
        f"{variant.option} {time:.0f}" for variant, time in sorted(times.items(), key=lambda pair: pair[1])
    )
    return chosen, f"fastest at {rows} row{'s' * (rows > 1)} (microseconds: {others})"
