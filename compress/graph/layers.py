"""List the layers of a traced model: what can be compressed, and why not the rest."""

from __future__ import annotations

import math

import torch
from torch import fx

from compress.graph.products import other_tensors, stored_products
from compress.graph.traced import TracedModel, node_sizes
from compress.records.layers import LayerSpec

__all__ = [
    "ACTIVATIONS",
    "LAYER_KINDS",
    "TABLE",
    "activation_of",
    "channel_groups",
    "is_stored",
    "layer_calls",
    "layer_computes",
    "layer_name",
    "list_layers",
    "list_others",
    "table_calls",
    "tied_tables",
    "weight_position",
]

aten = torch.ops.aten

LAYER_KINDS = {aten.conv1d.default: "conv1d", aten.conv2d.default: "conv2d", aten.linear.default: "linear"}

# Embeddings: their table comes first, and nothing is multiplied with it.
TABLE = aten.embedding.default

_BAG = aten.embedding_bag.padding_idx

_RECURRENT = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn",
    aten.rnn_relu.input: "rnn",
}

_REFUSED = {
    **{target: (kind, "recurrent layers are not compressed yet") for target, kind in _RECURRENT.items()},
    aten.bilinear.default: ("bilinear", "bilinear layers are not compressed yet"),
    _BAG: ("embedding_bag", "embeddings that are summed as they are looked up are not compressed yet"),
    aten.conv_transpose2d.input: ("conv_transpose2d", "transposed convolutions are not compressed yet"),
    aten.conv_transpose1d.default: ("conv_transpose1d", "transposed convolutions are not compressed yet"),
    aten.conv_transpose3d.input: ("conv_transpose3d", "transposed convolutions are not compressed yet"),
    aten.conv3d.padding: ("conv3d", "3-d convolutions are not compressed yet"),
    aten.conv3d.default: ("conv3d", "3-d convolutions are not compressed yet"),
    aten.conv1d.padding: ("conv1d", "padding 'same' is uneven here; give the padding in numbers"),
    aten.conv2d.padding: ("conv2d", "padding 'same' is uneven here; give the padding in numbers"),
}

ACTIVATIONS = {aten.relu.default: "relu", aten.hardtanh.default: "relu6"}


def is_stored(weight: fx.Node) -> bool:
    """Whether ``weight`` is made from packed codes (by name: the operator need not be registered to ask)."""
    return weight.op == "call_function" and str(weight.target) == "compress.dequantize_weight.default"


def layer_name(call: fx.Node) -> str:
    """The layer's name: its weight's path without the last ``.weight``; the node's own if the weight is computed."""
    weight = _weight(call)
    if is_stored(weight):
        return str(weight.args[0].target).removesuffix(".weight_packed")
    if call.target in _RECURRENT:  # the module's: its weights have names of their own
        return str(weight.target).rpartition(".")[0] or call.name
    return str(weight.target).removesuffix(".weight") if weight.op == "get_attr" else call.name


def layer_calls(traced: TracedModel) -> dict[str, list[fx.Node]]:
    """Compressible layers by name, float or stored, each with the nodes that call it in execution order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in LAYER_KINDS:
            weight = node.args[1]
            if weight.op == "get_attr" or is_stored(weight):
                calls.setdefault(layer_name(node), []).append(node)
    return calls


def table_calls(traced: TracedModel) -> dict[str, list[fx.Node]]:
    """Embeddings by name, each with the nodes that read its table in execution order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in traced.graph.find_nodes(op="call_function", target=TABLE):
        if node.args[0].op == "get_attr" or is_stored(node.args[0]):
            calls.setdefault(layer_name(node), []).append(node)
    return calls


def tied_tables(traced: TracedModel) -> set[str]:
    """Names of the linears whose weight is an embedding's table, too."""
    return layer_calls(traced).keys() & table_calls(traced).keys()


def weight_position(call: fx.Node) -> int:
    """Which argument of ``call`` is its weight, or the list of them."""
    if call.target in (TABLE, _BAG):
        return 0
    return 2 if call.target in _RECURRENT or call.target is aten.bilinear.default else 1


def _weight(call: fx.Node) -> fx.Node:
    """The weight that ``call`` reads, the first of several."""
    return _weights(call)[0]


def _weights(call: fx.Node) -> list[fx.Node]:
    """All of them, matrices of a recurrent layer; its biases are none."""
    found = call.args[weight_position(call)]
    if isinstance(found, fx.Node):
        return [found]
    return [each for each in found if len(node_sizes(each)) > 1]


def layer_computes(traced: TracedModel) -> dict[str, str]:
    """ "integer", "blocks" or "float" for every layer of a finished graph: what the exported file is planned to do."""
    return {
        name: str(calls[0].args[1].args[5]) if is_stored(calls[0].args[1]) else "float"
        for name, calls in layer_calls(traced).items()
    }


def activation_of(node: fx.Node) -> tuple[str | None, fx.Node]:
    """The ReLU or ReLU6 that alone reads ``node``, as its name and node; ``(None, node)`` without one."""
    if len(node.users) == 1:
        (user,) = node.users
        if user.target in ACTIVATIONS and (user.target is aten.relu.default or tuple(user.args[1:]) == (0.0, 6.0)):
            return ACTIVATIONS[user.target], user
    return None, node


def channel_groups(call: fx.Node) -> int:
    """Into how many groups ``call``, a convolution, divides its channels; 1 for a linear."""
    return int(call.args[6]) if len(call.args) > 6 else 1


def list_layers(traced: TracedModel) -> list[LayerSpec]:
    """One :class:`LayerSpec` per layer in execution order, refused ones included."""
    specs = []
    for name, calls in layer_calls(traced).items():
        call = calls[0]
        shape = tuple(call.args[1].meta["val"].shape)
        rows = sum(_rows(node) for node in calls) // len(traced.example[0])
        specs.append(
            LayerSpec(
                name=name,
                kind=LAYER_KINDS[call.target],
                weight_shape=shape,
                groups=channel_groups(call),
                macs=math.prod(shape) * rows,
                rows=rows,
                calls=len(calls),
                activation=activation_of(call)[0] if len(calls) == 1 else None,
                block=name.rpartition(".")[0],
                refusal="its input is the same for every sample" if _is_constant(traced, calls) else None,
            )
        )
    specs.extend(_tables(traced))
    specs.extend(_refused(traced))
    tied = layer_calls(traced).keys()
    weighted = [node for node in _weighted(traced) if node.target is not TABLE or layer_name(node) not in tied]
    names = [(node, layer_name(node)) for node in weighted]
    known = {name for _, name in names} | table_calls(traced).keys()
    products = {node: spec for node, spec in stored_products(traced).items() if spec.name not in known}
    names += [(node, spec.name) for node, spec in products.items()]
    places = {node: place for place, node in enumerate(traced.graph.nodes)}
    order = {name: place for place, name in sorted(((places[node], name) for node, name in names), reverse=True)}
    return sorted([*specs, *products.values()], key=lambda spec: order[spec.name])


def list_others(traced: TracedModel) -> dict[str, int]:
    """Floats by tensor that are in no layer of :func:`list_layers`: biases, norms, positions; the largest first."""
    weights = [each for node in _weighted(traced) for each in _weights(node)]
    weights += [each for node in stored_products(traced) for each in node.all_input_nodes]
    return other_tensors(traced, {each for weight in weights for each in _stored_behind(weight)})


def _stored_behind(node: fx.Node) -> set[fx.Node]:
    """Tensors that ``node`` is computed from, where it is from nothing else."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        each = waiting.pop()
        if each.op not in ("get_attr", "call_function"):
            return set()
        if each.op == "get_attr":
            found.add(each)
        waiting += each.all_input_nodes
    return found


def _is_constant(traced: TracedModel, calls: list[fx.Node]) -> bool:
    """Whether a call's input does not grow with the batch: there are no samples of it."""
    return traced.dynamic_batch and any(traced.batch_dim(call.args[0]) is None for call in calls)


def _tables(traced: TracedModel) -> list[LayerSpec]:
    linears = layer_calls(traced)
    return [
        LayerSpec(
            name=name,
            kind="embedding",
            weight_shape=node_sizes(calls[0].args[0]),
            macs=0,
            rows=sum(math.prod(node_sizes(node)[:-1]) for node in calls) // len(traced.example[0]),
            calls=len(calls),
            block=name.rpartition(".")[0],
            refusal=None if _is_only_looked_up(traced, calls) else "its table is read by something else, too",
        )
        for name, calls in table_calls(traced).items()
        if name not in linears  # of a tied table the linear is the layer
    ]


def _is_only_looked_up(traced: TracedModel, calls: list[fx.Node]) -> bool:
    """Whether nothing but ``calls`` reads their table: else the float table would stay beside the codes."""
    table = calls[0].args[0]
    if is_stored(table):
        return True
    readers = [node for each in traced.graph.find_nodes(op="get_attr", target=table.target) for node in each.users]
    return set(readers) <= set(calls)


def _weighted(traced: TracedModel) -> list[fx.Node]:
    """Every call of an operator that is, or resembles, a layer."""
    return [
        node
        for node in traced.graph.nodes
        if node.op == "call_function" and node.target in {*LAYER_KINDS, *_REFUSED, TABLE}
    ]


def _rows(call: fx.Node) -> int:
    """Output positions of the example batch: spatial ones of a convolution, sequence ones of a linear."""
    sizes = node_sizes(call)
    channels = sizes[-1] if call.target is aten.linear.default else sizes[1]
    return math.prod(sizes) // channels


def _refused(traced: TracedModel) -> list[LayerSpec]:
    found: dict[str, LayerSpec] = {}
    for node in _weighted(traced):
        kind, reason = _REFUSED.get(node.target, (None, None))  # type: ignore[call-overload]
        weight = _weight(node)
        if node.target in LAYER_KINDS and weight.op != "get_attr" and not is_stored(weight):
            kind, reason = LAYER_KINDS[node.target], "its weight is computed, not stored"
        if kind is None:
            continue
        name = layer_name(node)
        macs = _refused_macs(node) // len(traced.example[0])
        if name in found:
            before = found[name]
            found[name] = before.model_copy(update={"macs": before.macs + macs, "calls": before.calls + 1})
            continue
        weights = [math.prod(node_sizes(each)) for each in _weights(node)]
        found[name] = LayerSpec(
            name=name, kind=kind, weight_shape=node_sizes(weight), macs=macs, rows=0, refusal=reason,
            weights=sum(weights) if len(weights) > 1 else None,
        )  # fmt: skip
    return list(found.values())


def _refused_macs(call: fx.Node) -> int:
    """Multiply-accumulates of the example batch: how often each weight is used."""
    weights = sum(math.prod(node_sizes(each)) for each in _weights(call))
    if call.target is _BAG:
        return 0
    if call.target in _RECURRENT:
        return weights * math.prod(node_sizes(call.args[0])[:-1])
    if "conv_transpose" in str(call.target):  # each of its inputs meets each weight
        sizes = node_sizes(call.args[0])
        return weights * math.prod(sizes) // sizes[1]
    if call.target is aten.bilinear.default:
        return weights * math.prod(node_sizes(call)[:-1])
    return weights * _rows(call)
