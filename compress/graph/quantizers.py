"""Place activation quantizers where an integer runtime needs them to fuse.

- On the input of every integer layer, at that layer's width; on both inputs of a residual add, on the inputs of average
  pools, products and concatenations, at 8 bits. An operator is integer when one that writes integers feeds it and one
  that is integer reads it: nothing is gained by rounding what goes on in floats, to a grid that its parts share.
- On the result of every integer operator but a linear: its kernel writes integers. A linear's writes floats; but with a
  ReLU and a float reader behind it, ONNX Runtime would merge the two into a float kernel first.
- The result of an operator is its ReLU's output when the ReLU alone reads it: the quantizer absorbs the ReLU.
- Values that only move (reshape, slice, pad with zeros, max pool) keep one shared scale before and after. Of a value
  that no integer kernel writes they take the rounded form only where all that reads them is integer: a comparison, an
  index and an output get what the float model gives them.
- A value read at several widths is quantized once at the widest, and again, narrower, for layers that ask for less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compress.graph.layers import ACTIVATIONS, LAYER_KINDS, activation_of, layer_name
from compress.graph.traced import TracedModel
from compress.quant.problem import ActivationGrid
from compress.quant.targets import Target
from compress.records.plan import Choice

__all__ = [
    "INTEGER_BITS",
    "Quantizer",
    "fake_quantize_op",
    "is_zero_pad",
    "on_grid",
    "operands",
    "origin",
    "place_quantizers",
    "quantize_inputs",
    "readers",
]

aten = torch.ops.aten

INTEGER_BITS = 8
_ELEMENTWISE = (aten.add.Tensor, aten.mul.Tensor)
_POOLS = (aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default)
_MOVES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.slice.Tensor, aten.permute.default,
    aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.select.int,
    aten.max_pool2d.default, aten.max_pool1d.default, aten.pad.default, aten.constant_pad_nd.default,
}  # fmt: skip


@dataclass(frozen=True)
class Quantizer:
    """One activation grid; its scale and zero point are the buffers ``<name>.scale`` and ``<name>.zero_point``.

    Attributes:
        name: prefix of its buffers.
        node: name of the graph node that quantizes first; the range is observed at that node's input.
        bits: width of a code.
        layers: layers that read it directly.
        exclusive: only layers read it, so that a layer's method may learn its range.
    """

    name: str
    node: str
    bits: int
    layers: tuple[str, ...]
    exclusive: bool


@dataclass(frozen=True)
class _Edge:
    """``operator`` reads ``value`` at ``bits``; ``source`` is where the value was made, before any moves."""

    operator: fx.Node
    value: fx.Node
    source: fx.Node
    bits: int


def fake_quantize_op() -> object:
    """The operator's overload; a function because it exists only once compress.kernels is imported."""
    return torch.ops.compress.fake_quantize.default


def on_grid(x: torch.Tensor, grid: ActivationGrid | None) -> torch.Tensor:
    """``x`` rounded to ``grid``, as it is without one."""
    return x if grid is None else fake_quantize_op()(x, grid.scale, grid.zero_point, grid.bits)


def quantize_inputs(traced: TracedModel, choices: Iterable[Choice], target: Target) -> list[Quantizer]:
    """Quantize every layer's input as ``choices`` say, and return the grids that are to be calibrated, in order."""
    options = {choice.layer: choice.option for choice in choices}
    _place_dynamic(traced, {name for name, option in options.items() if option.inputs == "dynamic"})
    static = {name: option.act_bits for name, option in options.items() if option.inputs == "static"}
    return place_quantizers(traced, static, getattr(torch, target.activation_type)) if static else []


def _place_dynamic(traced: TracedModel, layers: set[str]) -> None:
    """Let every call of ``layers`` read its input on the grid of the input's own range."""
    placed: dict[fx.Node, fx.Node] = {}
    for node in list(traced.graph.nodes):
        if node.target in LAYER_KINDS and layer_name(node) in layers:
            value = node.args[0]
            if value not in placed:
                placed[value] = traced.insert(torch.ops.compress.fake_quantize_dynamic.default, (value,), after=value)
            node.update_arg(0, placed[value])
    traced.finish()


def place_quantizers(traced: TracedModel, act_bits: Mapping[str, int], dtype: torch.dtype) -> list[Quantizer]:
    """Insert the quantizers in place and return them in execution order, their scales unset (NaN).

    Args:
        traced: a folded graph without quantizers.
        act_bits: width of the input of every layer that runs on integers.
        dtype: uint8 or int8, the type activations are stored in on the target.
    """
    integer = _integer_operators(traced, act_bits)
    written = {activation_of(node)[1] for node in integer}
    rounded = _rounded_moves(traced, set(integer), written)
    edges = list(_edges(integer, act_bits, rounded))
    widths: dict[fx.Node, set[int]] = defaultdict(set)
    for edge in edges:
        widths[edge.source].add(edge.bits)
    results = {activation_of(node)[1] for node in integer if _writes_integers(node)}
    for result in results:
        if not any(result is source for source in widths):
            widths[result].add(INTEGER_BITS)
    placer = _Placer(traced, dtype, written)
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    for source in sorted(widths, key=order.__getitem__):
        placer.quantize_source(source, max(widths[source]), {*integer, *rounded})
    for edge in edges:
        placer.connect(edge, max(widths[edge.source]))
    traced.finish()
    return placer.quantizers()


def _writes_integers(node: fx.Node) -> bool:
    if node.target is not aten.linear.default:
        return True
    return node.meta["val"].dim() == 2 and activation_of(node)[0] == "relu"


def is_zero_pad(node: fx.Node) -> bool:
    """Whether ``node`` pads with constant zeros."""
    if node.target is aten.pad.default:
        mode, value = (*node.args[2:], *("constant", 0)[len(node.args) - 2 :])[:2]
        return mode == "constant" and not value
    return node.target is aten.constant_pad_nd.default and (len(node.args) < 3 or not node.args[2])


def _moves(node: fx.Node) -> bool:
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return is_zero_pad(node)
    return node.op == "call_function" and node.target in _MOVES


def _rounded_moves(traced: TracedModel, integer: set[fx.Node], written: set[fx.Node]) -> set[fx.Node]:
    """Moves of what integer kernels write, and of other values those that only integer operators read in the end."""
    rounded: set[fx.Node] = set()
    moves = [node for node in traced.graph.nodes if _moves(node)]
    for node in moves:
        if node.args[0] in written or node.args[0] in rounded:
            rounded.add(node)
    for node in reversed(moves):
        users = [user for user in node.users if user.target is not aten.sym_size.int]
        if users and all(user in integer or user in rounded for user in users):
            rounded.add(node)
    return rounded


def _source(value: fx.Node, rounded: set[fx.Node]) -> fx.Node:
    while value in rounded:
        value = value.args[0]
    return value


def operands(node: fx.Node) -> list[Any]:
    """What a layer, pool, concatenation, add or product calculates with, weights left out."""
    if node.target in LAYER_KINDS or node.target in _POOLS:
        return [node.args[0]]
    if node.target is aten.cat.default:
        return list(node.args[0])
    return [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]


def _may_be_integer(node: fx.Node) -> bool:
    if node.target in _ELEMENTWISE:
        added = operands(node)
        return (
            len(added) == 2
            and node.kwargs.get("alpha", 1) == 1
            and all(operand.op != "get_attr" and _is_float(operand) for operand in added)
        )
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(node.args[1]) == [1, 1]
    return node.target in _POOLS or (node.target is aten.cat.default and all(map(_is_float, operands(node))))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _integer_operators(traced: TracedModel, act_bits: Mapping[str, int]) -> list[fx.Node]:
    """Layers named in ``act_bits`` and the operators that are fed integers, directly or through ReLUs and moves."""
    integer: list[fx.Node] = []
    writers: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in LAYER_KINDS:
            chosen = node.args[1].op == "get_attr" and layer_name(node) in act_bits
        else:
            chosen = _may_be_integer(node) and any(origin(operand) in writers for operand in operands(node))
        if chosen:
            integer.append(node)
            if _writes_integers(node):
                writers.add(node)
    return _read_by_integers(integer)


def _read_by_integers(integer: list[fx.Node]) -> list[fx.Node]:
    """The layers of ``integer``, and of its other operators those that one of what is left reads."""
    kept: set[fx.Node] = set()
    for node in reversed(integer):
        if node.target in LAYER_KINDS or not kept.isdisjoint(readers(node)):
            kept.add(node)
    return [node for node in integer if node in kept]


def origin(value: fx.Node) -> fx.Node:
    """What has made ``value``, before quantizers, ReLUs and moves."""
    while _moves(value) or value.target in ACTIVATIONS or value.target is fake_quantize_op():
        value = value.args[0]
    return value


def readers(value: fx.Node) -> Iterator[fx.Node]:
    """What calculates with ``value``, behind quantizers, ReLUs and moves."""
    for user in value.users:
        if _moves(user) or user.target in ACTIVATIONS or user.target is fake_quantize_op():
            yield from readers(user)
        else:
            yield user


def _edges(integer: list[fx.Node], act_bits: Mapping[str, int], rounded: set[fx.Node]) -> Iterator[_Edge]:
    for node in integer:
        bits = act_bits[layer_name(node)] if node.target in LAYER_KINDS else INTEGER_BITS
        for operand in dict.fromkeys(operands(node)):
            yield _Edge(node, operand, _source(operand, rounded), bits)


class _Placer:
    """Inserts nodes and remembers them; one life, one graph."""

    def __init__(self, traced: TracedModel, dtype: torch.dtype, results: set[fx.Node]) -> None:
        self.traced = traced
        self.dtype = dtype
        self.results = results
        self.placed: dict[tuple[fx.Node, int], fx.Node] = {}
        self.grids: set[str] = set()

    def quantize_source(self, source: fx.Node, bits: int, rounded: set[fx.Node]) -> None:
        """Quantize ``source`` for those of its readers in ``rounded``, or for all if an integer kernel writes it."""
        quantized = self._insert(source, bits, _grid_name(source))
        if source in self.results:
            source.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
        else:
            for user in [user for user in source.users if user in rounded]:
                user.replace_input_with(source, quantized)

    def connect(self, edge: _Edge, base_bits: int) -> None:
        """Make ``edge.operator`` read ``edge.value`` at ``edge.bits``."""
        value = edge.value
        if value is edge.source:
            value = self.placed[(value, base_bits)]
        elif not _pads_for_convolution(edge):
            value = self._insert(edge.value, base_bits, _grid_name(edge.source))
            edge.operator.replace_input_with(edge.value, value)
        if edge.bits < base_bits:
            narrow = self._insert(value, edge.bits, f"{_grid_name(edge.value)}_a{edge.bits}")
            edge.operator.replace_input_with(value, narrow)

    def quantizers(self) -> list[Quantizer]:
        """All grids in execution order."""
        nodes: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.traced.graph.find_nodes(op="call_function", target=fake_quantize_op()):
            nodes[node.args[1].target.removesuffix(".scale")].append(node)
        order = {node: position for position, node in enumerate(self.traced.graph.nodes)}
        found = []
        for name, same_grid in nodes.items():
            first = min(same_grid, key=order.__getitem__)
            users = [user for node in same_grid for user in node.users]
            layers = tuple(dict.fromkeys(layer_name(user) for user in users if user.target in LAYER_KINDS))
            exclusive = len(same_grid) == 1 and all(user.target in LAYER_KINDS for user in users)
            found.append(Quantizer(name, first.name, first.args[3], layers, exclusive))
        return sorted(found, key=lambda quantizer: order[self._node(quantizer.node)])

    def _node(self, name: str) -> fx.Node:
        return next(node for node in self.traced.graph.nodes if node.name == name)

    def _insert(self, value: fx.Node, bits: int, name: str) -> fx.Node:
        if (value, bits) in self.placed:
            return self.placed[(value, bits)]
        if name not in self.grids:
            self.grids.add(name)
            self.traced.set_tensor(f"{name}.scale", torch.tensor(math.nan))
            self.traced.set_tensor(f"{name}.zero_point", torch.zeros((), dtype=self.dtype))
        with self.traced.graph.inserting_after(value):
            scale = self.traced.graph.get_attr(f"{name}.scale")
        with self.traced.graph.inserting_after(scale):
            zero_point = self.traced.graph.get_attr(f"{name}.zero_point")
        with self.traced.graph.inserting_after(zero_point):
            node = self.traced.graph.call_function(fake_quantize_op(), (value, scale, zero_point, bits))
        node.meta["val"] = value.meta.get("val")
        self.placed[(value, bits)] = node
        return node


def _grid_name(value: fx.Node) -> str:
    return f"quantizers.{value.name}"


def _pads_for_convolution(edge: _Edge) -> bool:
    """Zero padding of a quantized value is still on its grid, and ONNX Runtime merges the Pad into the Conv."""
    value = edge.value
    return (
        is_zero_pad(value)
        and value.args[0].target is fake_quantize_op()
        and all(user.target in LAYER_KINDS for user in value.users)
    )
