"""What ONNX has no form of, written as what it has one of; what stays impossible is refused by the module's name.

1. Adaptive pools to a size that does not divide the input's: each bin is a slice, and its maximum or mean.
2. Splits whose size grows with the batch (two views in one batch, then ``chunk``): slices.
3. A model's input or tensor that is returned as it is, and a value that is returned twice: a copy.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from compress.errors import InputError
from compress.graph.traced import TracedModel

__all__ = ["make_exportable"]

aten = torch.ops.aten
_MAXIMA = (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
_MEANS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)
_PROJECTED = 5  # weights of an LSTM's direction: of inputs, of its state, two biases, of the projection


def make_exportable(traced: TracedModel) -> None:
    """Apply the rewrites in place.

    Raises:
        InputError: a layer has no form in ONNX.
    """
    for node in list(traced.graph.nodes):
        if node.target in (*_MAXIMA, *_MEANS):
            _open_pool(traced, node)
        elif node.target is aten.split.Tensor and isinstance(node.args[1], fx.Node):
            _open_split(traced, node)
        elif node.target is aten.lstm.input:
            _check_projection(node)
    _copy_results(traced)
    traced.finish()


def _open_pool(traced: TracedModel, node: fx.Node) -> None:
    source, sizes = node.args[:2]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    first = len(shape) - len(sizes)
    extents = [shape[first + place] for place in range(len(sizes))]
    maximum = node.target in _MAXIMA
    readers = [user for user in node.users if user.target is operator.getitem]
    if not all(isinstance(extent, int) for extent in extents) or not any(
        extent % size for extent, size in zip(extents, sizes, strict=True)
    ):
        return
    if maximum and any(user.args[1] != 0 and user.users for user in readers):
        return  # the places of the maxima are read
    value = source
    for place, size in enumerate(sizes):
        axis, extent = first + place, extents[place]
        parts = []
        for index in range(size):
            bounds = (index * extent // size, -(-(index + 1) * extent // size))
            part = traced.insert(aten.slice.Tensor, (value, axis, *bounds), before=node)
            target = aten.amax.default if maximum else aten.mean.dim
            parts.append(traced.insert(target, (part, [axis], True), before=node))
        value = traced.insert(aten.cat.default, (parts, axis), before=node)
    for user in readers if maximum else [node]:
        user.replace_all_uses_with(value)


def _open_split(traced: TracedModel, node: fx.Node) -> None:
    source, size, axis = (*node.args, 0)[:3]
    for user in list(node.users):
        index = user.args[1]
        start = traced.insert(operator.mul, (size, index), before=user) if index else 0
        end = traced.insert(operator.mul, (size, index + 1), before=user) if index else size
        part = traced.insert(aten.slice.Tensor, (source, axis, start, end), before=user)
        user.replace_all_uses_with(part)


def _check_projection(node: fx.Node) -> None:
    weights, has_biases, layers, bidirectional = node.args[2], node.args[3], node.args[4], node.args[7]
    each = len(weights) // (layers * (2 if bidirectional else 1))
    if each == (_PROJECTED if has_biases else _PROJECTED - 2):
        module = str(weights[0].target).rpartition(".")[0]
        raise InputError(
            f"{module or 'the model'} is an LSTM with proj_size, which ONNX has no form of; train it with proj_size=0 "
            "and a Linear behind it, or leave the part around it out of what is compressed"
        )


def _copy_results(traced: TracedModel) -> None:
    (output,) = traced.graph.find_nodes(op="output")
    results = output.args[0]
    seen: set[fx.Node] = set()

    def unlike(node: fx.Node) -> fx.Node:
        if node.op not in ("placeholder", "get_attr") and node not in seen:
            seen.add(node)
            return node
        return traced.insert(aten.clone.default, (node,), before=output)

    output.args = (tuple(map(unlike, results)) if isinstance(results, tuple | list) else unlike(results),)
