"""A part of a traced graph as a function of tensors, with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from compress.graph.traced import TracedModel

__all__ = ["Stretch", "output_names"]


class Stretch:
    """Computes the values of some nodes; what does not depend on the inputs (stored weights) is computed once.

    Args:
        traced: the graph, as it is now.
        wanted: names of the nodes.
        given: names of nodes whose values are handed over: nothing behind them is computed.
    """

    def __init__(self, traced: TracedModel, wanted: Sequence[str], given: Sequence[str] = ()) -> None:
        self._traced = traced
        self._wanted = tuple(wanted)
        self._inputs = [node.name for node in traced.inputs()]
        nodes = {node.name: node for node in traced.graph.nodes}
        needed: set[fx.Node] = set()
        waiting = [nodes[name] for name in wanted]
        while waiting:
            node = waiting.pop()
            if node not in needed and node.name not in given:
                needed.add(node)
                waiting += node.all_input_nodes
        self._constants: dict[str, Any] = {}
        self._nodes: list[fx.Node] = []
        for node in traced.graph.nodes:
            if node not in needed or node.op == "placeholder":
                continue
            if node.op == "get_attr":
                self._constants[node.name] = traced.tensor(str(node.target))
            elif node.all_input_nodes and all(source.name in self._constants for source in node.all_input_nodes):
                with torch.no_grad():
                    self._constants[node.name] = _compute(node, self._constants)
            else:
                self._nodes.append(node)

    def __call__(self, inputs: Sequence[Tensor], given: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The wanted values, in the order that they were asked for.

        Args:
            inputs: one batch a graph input.
            given: by name.
        """
        known = {**self._constants, **dict(zip(self._inputs, inputs, strict=True)), **given}
        for node in self._nodes:
            known[node.name] = _compute(node, known)
        return tuple(known[name] for name in self._wanted)


def output_names(traced: TracedModel) -> list[str]:
    """The nodes that the graph returns."""
    (output,) = traced.graph.find_nodes(op="output")
    return [node.name for node in output.all_input_nodes]


def _compute(node: fx.Node, known: Mapping[str, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known[source.name])
    return node.target(*args, **kwargs)  # type: ignore[operator]
