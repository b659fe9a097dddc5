"""The stretches of a graph that are reconstructed as one: from where a single value is alive to where one is again.

Between two such places lies a residual block, an inverted residual, the attention or the feed-forward half of a
transformer's block, or a single layer with its activation where nothing runs beside it (BRECQ, arXiv 2102.05426,
section 3.2). Where that is so nowhere, as between several outputs, every layer is alone. Values that no layer and no
embedding of the samples has touched (masks, positions) do not count as alive.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from compress.graph.layers import LAYER_KINDS, TABLE, activation_of, layer_name
from compress.graph.traced import TracedModel

__all__ = ["Block", "find_blocks"]


@dataclass(frozen=True)
class Block:
    """A stretch of the float graph, by names of its nodes.

    Attributes:
        input: the one value that it reads from before; None for a first one that reads the graph's inputs.
        output: the one value that is read after it.
        layers: in execution order, each whole within it.
    """

    input: str | None
    output: str
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its layers' paths have in common, or the only layer's."""
        parts = [layer.split(".") for layer in self.layers]
        common = []
        for each in zip(*parts, strict=False):
            if len(set(each)) > 1:
                break
            common.append(each[0])
        return ".".join(common) or self.layers[0]


def find_blocks(traced: TracedModel, whole: bool = True) -> list[Block]:
    """Every block of the float graph ``traced``, in execution order.

    Args:
        whole: False makes each layer a block of its own, with its activation (AdaRound, arXiv 2004.10568).
    """
    nodes = [node for node in traced.graph.nodes if node.op not in ("get_attr", "output")]
    if not whole:
        return [_alone(node, nodes) for node in nodes if _is_layer(node)]
    cuts = _places(traced, nodes)
    blocks: list[Block] = []
    start: fx.Node | None = None
    layers: list[str] = []
    ends = _wanted(nodes, cuts)
    for node in nodes:
        if _is_layer(node):
            layers.append(layer_name(node))
        if node in ends:
            if layers:  # none yet: embeddings alone, which are no part of the first block
                blocks.append(Block(start.name if start else None, ends[node].name, tuple(dict.fromkeys(layers))))
            start, layers = ends[node], []
    if layers:
        behind = nodes[max(index for index, node in enumerate(nodes) if _is_layer(node)) :]
        places = [node for node in behind if node in cuts]
        if places:
            blocks.append(Block(start.name if start else None, cuts[places[-1]].name, tuple(dict.fromkeys(layers))))
        else:  # several outputs: one of them would say nothing of what the others need
            rest = nodes[nodes.index(start) + 1 if start is not None else 0 :]
            blocks += [_alone(node, nodes) for node in rest if _is_layer(node)]
    return blocks


def _places(traced: TracedModel, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Nodes behind which one value alone is alive, and that value."""
    last_read = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last_read[source] = max(last_read.get(source, 0), index)
    (output,) = traced.graph.find_nodes(op="output")
    for source in output.all_input_nodes:
        last_read[source] = len(nodes)
    touched: set[fx.Node] = set()
    found = {}
    for index, node in enumerate(nodes):
        begins = _is_layer(node) or (node.target is TABLE and traced.batch_dim(node) is not None)
        if begins or any(source in touched for source in node.all_input_nodes):
            touched.add(node)
        alive = [each for each in touched if last_read[each] > index]
        if len(alive) == 1 and _is_float(alive[0]):
            found[node] = alive[0]
    return found


def _alone(call: fx.Node, nodes: list[fx.Node]) -> Block:
    end = activation_of(call)[1]
    if any(_is_layer(node) for node in nodes[nodes.index(call) + 1 : nodes.index(end)]):
        end = call  # its activation comes behind another layer: blocks must not lie across each other
    return Block(call.args[0].name, end.name, (layer_name(call),))


def _wanted(nodes: list[fx.Node], cuts: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Of all places those that come last before a layer: activations and pools stay with the layer before them."""
    found = {}
    place: fx.Node | None = None
    for node in nodes:
        if _is_layer(node):
            if place is not None:
                found[place] = cuts[place]
            place = None
        if node in cuts:
            place = node
    return found


def _is_float(node: fx.Node) -> bool:
    """Not the number of a class, whose error has no gradient, and not several values."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in LAYER_KINDS
