"""Deltas over a compressed graph: weights stay in their codes, differences in floats beside them.

    linear(x, dequantize_weight(codes), bias)    becomes    delta_linear(x, dequantize_weight(codes), delta, bias)
    a convolution's or an embedding's weight     becomes    floats, the difference added, once, at load time
    a bias, a norm, any float tensor             becomes    itself, the difference added
    a head, and whatever a delta replaces        becomes    floats

Everything is calibrated for the base alone: grids of activations, biases that make up for rounding. What is added is
not rounded to the weights' grid, which is why it may be smaller than a step of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from compress.errors import InputError
from compress.graph.traced import TracedModel
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.table import register_operators
from compress.runtime.base import FloatBase
from compress.runtime.edits import replace_node, stored_weight
from compress.sparse.application import check_base, choose_head
from compress.sparse.delta import CLASSES, SparseDelta, SparseTensor, sum_deltas

__all__ = ["add_to_graph"]

aten = torch.ops.aten


def add_to_graph(
    traced: TracedModel,
    base: FloatBase,
    deltas: Mapping[str, SparseDelta],
    weights: Sequence[float] | None = None,
    *,
    head: str | None = None,
    heads: bool = True,
    any_base: bool = False,
) -> None:
    """Add ``deltas`` to ``traced``, in place; the arguments are those of compress.sparse.application.apply_deltas.

    Args:
        traced: an artifact's graph, as it was read.
        base: the float model that it was made of.

    Raises:
        InputError: a delta is for another base, or changes what the graph does not have; the graph is as it was.
    """
    register_operators()
    for called, delta in deltas.items():
        if CLASSES in delta.notes and delta.without and not base.hashes.keys() & set(delta.without):
            raise InputError(
                f"{called} brings a head, and was trained beneath it; the compressed model has none: compress the "
                f"float model again with --classes {delta.notes[CLASSES]}, or with the delta: --delta"
            )
    if not any_base:
        check_base(deltas, base.hashes)
    dense = choose_head(deltas, head) if heads else {}
    try:
        summed = sum_deltas(list(deltas.values()), weights)
    except ValueError as error:
        raise InputError(str(error)) from error
    called = ", ".join(deltas)
    places = {name: _Place(traced, base.called.get(name, name)) for name in (*summed, *dense)}
    added, whole = dict[str, SparseTensor](), dict[str, Tensor]()
    for name, each in summed.items():
        if name not in dense and len(each.index):
            values = each.values * _factor(called, base, name, each.shape, each.index, places[name])
            if not bool(values.float().isfinite().all()):
                raise InputError(f"{name} would not be finite with the deltas; use smaller weights")
            added[name] = SparseTensor(each.shape, each.dtype, each.index, values)
    for name, value in dense.items():
        factor = _factor(called, base, name, tuple(value.shape), torch.arange(value.numel()), places[name])
        whole[name] = (value.double().reshape(-1) * factor).view(value.shape)
    # Nothing can fail from here on.
    for name, difference in added.items():
        places[name].add(difference)
    for name, value in whole.items():
        places[name].replace(value)
    traced.finish()


class _Place:
    """Where one of the float model's tensors is in a compressed graph: as codes, or as floats."""

    def __init__(self, traced: TracedModel, name: str) -> None:
        self._traced, self._name = traced, name
        codes = f"{name.removesuffix('.weight')}.weight_packed"
        self._weights, self._biases = list[fx.Node](), list[fx.Node]()
        for node in traced.graph.find_nodes(op="call_function", target=torch.ops.compress.dequantize_weight.default):
            if str(node.args[0].target) == codes:
                self._weights.append(node)
        for node in traced.graph.find_nodes(op="call_function", target=torch.ops.compress.dequantize_bias.default):
            if str(node.args[0].target).startswith(f"{name}_codes"):  # one for each call of the layer
                self._biases.append(node)
        names = {str(node.target) for node in traced.graph.find_nodes(op="get_attr")}
        self._floats = next((each for each in (name, f"{name}.weight") if each in names), None)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the tensor; None: the graph does not have it."""
        if self._weights:
            return tuple(self._weights[0].args[4])
        stored = str(self._biases[0].args[0].target) if self._biases else self._floats
        return tuple(self._traced.tensor(stored).shape) if stored is not None else None

    def add(self, difference: SparseTensor) -> None:
        """Add ``difference``, scaled as the graph's tensor is."""
        for node in self._weights:
            self._add_beside(node, difference)
            if self._others(node):
                self._set(node, _sum(stored_weight(self._traced, node).dequantize(), difference))
        for node in self._biases:
            parts = [self._traced.tensor(str(part.target)) for part in node.args]
            self._set(node, _sum(torch.ops.compress.dequantize_bias(*parts), difference))
        if self._floats is not None:
            self._traced.set_tensor(self._floats, _sum(self._traced.tensor(self._floats), difference))

    def replace(self, value: Tensor) -> None:
        """Compute with ``value`` instead."""
        for node in (*self._weights, *self._biases):
            self._set(node, value)
        if self._floats is not None:
            self._traced.set_tensor(self._floats, value.to(self._traced.tensor(self._floats).dtype))

    def _add_beside(self, stored: fx.Node, difference: SparseTensor) -> None:
        """Linears that read ``stored`` multiply with the difference as well."""
        linears = [node for node in stored.users if node.target is aten.linear.default and node.args[1] is stored]
        if not linears:
            return
        rows = DeltaRows.from_flat(difference.shape, difference.index, difference.values)
        names = [f"{self._name}_delta_{part}" for part in ("starts", "columns", "values")]
        for name, part in zip(names, (rows.starts, rows.columns, rows.values), strict=True):
            self._traced.set_tensor(name, part)
        for call in linears:
            parts = [self._traced.attribute(name, before=call) for name in names]
            bias = call.args[2] if len(call.args) > 2 else None
            args = (call.args[0], stored, *parts, None, bias)
            replace_node(self._traced, call, torch.ops.compress.delta_linear.default, args)

    def _others(self, stored: fx.Node) -> list[fx.Node]:
        """What reads ``stored`` beside linears that multiply with a difference to it."""
        operator = torch.ops.compress.delta_linear.default
        return [user for user in stored.users if not (user.target is operator and user.args[1] is stored)]

    def _set(self, node: fx.Node, value: Tensor) -> None:
        """Have those others read ``value``."""
        name = f"{self._name}_floats_{node.name}"
        self._traced.set_tensor(name, value.float())
        new = self._traced.attribute(name, before=node)
        for reader in self._others(node):
            reader.replace_input_with(node, new)


def _sum(tensor: Tensor, difference: SparseTensor) -> Tensor:
    flat = tensor.detach().reshape(-1).double().clone()
    flat[difference.index] += difference.values
    return flat.to(tensor.dtype).view(tensor.shape)


def _factor(called: str, base: FloatBase, name: str, shape: tuple[int, ...], index: Tensor, place: _Place) -> Tensor:
    """Factors [n] of differences to entries [n] at ``index`` of tensor ``name``.

    Raises:
        InputError: the graph does not have it, has it in another shape, or nothing tells how it was scaled.
    """
    if place.shape is not None and place.shape != shape:
        raise InputError(f"{called}: {name} has shape {list(shape)} there and {list(place.shape)} in the artifact")
    if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < math.prod(shape):
        raise InputError(f"{called}: {name} has indices beyond its {math.prod(shape):,} entries")
    factor = base.factor(name, shape, index) if place.shape is not None else None
    if factor is None or not bool(factor.isfinite().all()):
        why = "was folded into others, split or renamed" if factor is None else "was scaled, nothing tells how much,"
        raise InputError(
            f"{called}: {name} {why} when the model was compressed, so a delta cannot be added to it here; add it "
            "first: compress quantize --delta"
        )
    return factor
