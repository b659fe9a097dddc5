"""From timed operators to the time of a whole model: what each layer takes, and what a change of numbers costs.

``time = fixed + sum of layers + sum of boundaries``. A layer's time comes from the table of operators
(compress/measure/operators.py). A boundary stands between a layer and the layer that feeds it, where one runs on
integers and the other on floats: what leaving the one and entering the other took. The rest (adds, pools, the runtime
itself) is what whole base models take beyond the sum of their layers: what every base pays is fixed, what one kind of
numbers pays more than another is spread over its layers by the size of their outputs, so that each base's own time
comes out exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import fx

from compress.graph.layers import LAYER_KINDS, layer_calls, layer_name
from compress.graph.traced import TracedModel
from compress.measure.latency_table import LatencyTable, Operator
from compress.measure.operators import Shape, shape_of

__all__ = ["COMPUTE_OF", "Boundary", "LatencyModel", "LayerPlace", "fit", "layer_places", "thin_kind", "thin_shapes"]

# Kinds of numbers a layer can run on; narrow: integers, its input on fewer than eight bits.
COMPUTE_OF = {"float": "float", "integer": "integer", "narrow": "integer"}


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer stands: its shapes, one a call, the layer that feeds it, how many it feeds, its output's size.

    ``positions`` are a convolution's output positions along each dimension.
    """

    name: str
    shapes: tuple[Shape, ...]
    feeder: str | None
    readers: int
    outputs: int
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Boundary:
    """Microseconds between ``first`` and the layer ``second`` that it feeds, by their two computes."""

    first: str
    second: str
    costs_us: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class LatencyModel:
    """Everything that adds up to a model's time in microseconds.

    Attributes:
        fixed_us: what every plan takes.
        layers_us: by layer and kind of numbers (``float``, ``integer``, ``narrow``).
        boundaries: where neighbours may run on different numbers.
    """

    fixed_us: float
    layers_us: Mapping[str, Mapping[str, float]]
    boundaries: tuple[Boundary, ...]

    def predict(self, kinds: Mapping[str, str]) -> float:
        """Time of a plan that runs each layer on the kind of numbers that ``kinds`` says."""
        total = self.fixed_us + math.fsum(self.layers_us[layer][kind] for layer, kind in kinds.items())
        computes = {layer: COMPUTE_OF[kind.partition(" ")[0]] for layer, kind in kinds.items()}
        return total + math.fsum(each.costs_us[computes[each.first], computes[each.second]] for each in self.boundaries)


def layer_places(traced: TracedModel, batch: int) -> dict[str, LayerPlace]:
    """Every layer of the float graph ``traced``, in execution order.

    A layer behind a residual add has several sources; the one that runs last decides what numbers reach it.
    """
    calls = layer_calls(traced)
    position = {node: index for index, node in enumerate(traced.graph.nodes)}
    feeders = {name: _feeder(nodes[0], position) for name, nodes in calls.items()}
    return {
        name: LayerPlace(
            name=name,
            shapes=tuple(shape_of(node, batch) for node in nodes),
            feeder=feeders[name],
            readers=sum(feeder == name for feeder in feeders.values()),
            outputs=math.prod(_sizes(nodes[0])[1:]) * len(nodes),
            positions=_sizes(nodes[0])[2:] if LAYER_KINDS[nodes[0].target] != "linear" else (),
        )
        for name, nodes in calls.items()
    }


def thin_kind(kind: str, rank: int, form: str = "factors") -> str:
    """What the time of a layer's two thin ones, on ``kind`` of numbers, is filed under."""
    return f"{kind} {form} {rank}"


def thin_shapes(place: LayerPlace, rank: int) -> tuple[Shape, Shape]:
    """The two thin layers that do the layer at ``place`` at ``rank``."""
    (shape,) = place.shapes
    spatial = [1] * (len(shape.weight) - 2)
    between = (shape.input[0], rank, *place.positions) if spatial else (*shape.input[:-1], rank)
    return (
        replace(shape, weight=(rank, *shape.weight[1:]), bias=False, activation=None),
        replace(shape, weight=(shape.weight[0], rank, *spatial), rest=(), input=between),
    )


def fit(
    places: Mapping[str, LayerPlace],
    table: LatencyTable,
    bases: Sequence[tuple[Mapping[str, str], float]],
    ranks: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> LatencyModel:
    """The model that gives each base its measured time.

    Args:
        places: the model's layers.
        table: holds an operator for each of their shapes, and for those of ``ranks``.
        bases: kind of numbers by layer, and the whole model's microseconds; the first all float, and one at most for
            each other kind.
        ranks: by layer, those at which it may be done by two thin ones.
    """
    kinds = ["float", *sorted({kind for base, _ in bases for kind in base.values()} - {"float"})]
    raw: dict[str, dict[str, float]] = {}
    for name, place in places.items():
        raw[name] = {}
        for kind in kinds:
            rows = _rows(place, table, COMPUTE_OF[kind])
            if rows is None:
                continue
            time_us = sum(row.layer_us for row in rows)
            if place.feeder is None:
                time_us += rows[0].enter_us
            if not place.readers:
                time_us += rows[-1].leave_us
            raw[name][kind] = time_us
            for rank in ranks.get(name, ()):
                if (thin_us := _thin_us(place, rank, table, COMPUTE_OF[kind])) is not None:
                    raw[name][thin_kind(kind, rank)] = time_us - rows[0].layer_us + thin_us
                    raw[name][thin_kind(kind, rank, "branch")] = time_us + thin_us
    boundaries = tuple(_boundary(places[place.feeder], place, table) for place in places.values() if place.feeder)
    plain = LatencyModel(0.0, raw, boundaries)
    fixed_us = min(time_us - plain.predict(base) for base, time_us in bases)
    model = LatencyModel(fixed_us, raw, boundaries)
    # One after the other, float first: a later base may hold layers that an earlier one has changed.
    for base, time_us in bases:
        rest = time_us - model.predict(base)
        own = _own_kind(base)
        layers = [name for name, kind in base.items() if kind == own]
        total = sum(places[name].outputs for name in layers)
        for name in layers:
            for kind in raw[name]:
                if kind.partition(" ")[0] == own:
                    raw[name][kind] += rest * places[name].outputs / total
    return model


def _thin_us(place: LayerPlace, rank: int, table: LatencyTable, compute: str) -> float | None:
    """What two thin layers take; the sum that adds a branch is a small part of it, and left to the whole file."""
    down, up = (table.find(shape.signature, compute) for shape in thin_shapes(place, rank))
    if down is None or up is None:
        return None
    # An integer linear ends in floats, and the next one begins with them.
    between = down.leave_us + up.enter_us if place.shapes[0].kind == "linear" and compute != "float" else 0.0
    return down.layer_us + between + up.layer_us


def _own_kind(base: Mapping[str, str]) -> str:
    """What a base is the measure of: narrow before integer before float."""
    return next(kind for kind in ("narrow", "integer", "float") if kind in base.values())


def _rows(place: LayerPlace, table: LatencyTable, compute: str) -> list[Operator] | None:
    rows = [table.find(shape.signature, compute) for shape in place.shapes]
    return None if any(row is None for row in rows) else [row for row in rows if row is not None]


def _boundary(first: LayerPlace, second: LayerPlace, table: LatencyTable) -> Boundary:
    costs = {}
    for a in ("float", "integer"):
        for b in ("float", "integer"):
            leaving, entering = (_rows(first, table, a), _rows(second, table, b))
            known = leaving is not None and entering is not None and a != b
            # What one layer gives to several is converted once.
            costs[a, b] = leaving[-1].leave_us / first.readers + entering[0].enter_us if known else 0.0
    return Boundary(first.name, second.name, costs)


def _feeder(call: fx.Node, position: Mapping[fx.Node, int]) -> str | None:
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = [call.args[0]]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and node.target in LAYER_KINDS:
            found.add(node)
        else:
            waiting += node.all_input_nodes
    if not found:
        return None
    last = max(found, key=position.__getitem__)
    return layer_name(last) if last.args[1].op == "get_attr" else None


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape)
