"""Weights and biases brought to the one form that layers are found by: stored, and read by a linear or a convolution.

1. A weight that is computed from parameters alone (weight or spectral norm, standardised convolutions) is computed now.
2. A product with a parameter, ``x @ w`` or ``addmm`` (GPT-2's ``Conv1D``), is a linear with the transposed weight, and
   ``x @ w.t()`` one with the weight, which may be an embedding's table, too.
3. A layer's bias is one stored tensor [O], read by all its calls and by nothing else. What is computed from parameters
   alone (BEiT's ``cat([q_bias, zeros, v_bias])``, a part of ``in_proj_bias``) is computed now; what something else
   reads, too, is copied; what depends on the input, or differs between the calls of a layer, is added behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from compress.graph.layers import LAYER_KINDS, TABLE, is_stored, layer_calls
from compress.graph.traced import TracedModel

__all__ = ["settle_biases", "settle_weights"]

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default, aten.matmul.default, aten.addmm.default}
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_PARAMETRIZED = ".parametrizations."


def settle_weights(traced: TracedModel) -> None:
    """Apply the first two rewrites in place."""
    for node in list(traced.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in LAYER_KINDS:
            _store(traced, node)
        elif node.target in _PRODUCTS:
            _make_linear(traced, node)
    traced.finish()


def settle_biases(traced: TracedModel) -> None:
    """Apply the third one, once weights are called ``<layer>.weight``."""
    for layer, calls in layer_calls(traced).items():
        _settle_bias(traced, layer, calls)
    traced.finish()


def _store(traced: TracedModel, call: fx.Node) -> None:
    weight = call.args[1]
    assert isinstance(weight, fx.Node)
    if weight.op == "get_attr" or is_stored(weight):
        return
    behind = _behind(weight)
    value = _evaluate(traced, behind)
    if value is None:
        return
    first = next(str(node.target) for node in behind if node.op == "get_attr")
    owner = first.partition(_PARAMETRIZED)[0] if _PARAMETRIZED in first else first.rpartition(".")[0]
    name = f"{owner}.weight" if owner else f"{call.name}.weight"
    if any(node.target == name and node not in behind for node in traced.graph.find_nodes(op="get_attr")):
        # A module that is called twice computes the same weight twice; of anything else the name is taken.
        known = traced.tensor(name)
        if known.shape != value.shape or not torch.equal(known, value):
            name = traced.free_name(f"{owner}.{call.name}.weight" if owner else f"{call.name}.weight")
    call.replace_input_with(weight, _put(traced, name, value, call))


def _behind(node: fx.Node) -> list[fx.Node]:
    """What ``node`` is computed from, and itself, in execution order."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found[each] = None
            waiting += each.all_input_nodes
    return [each for each in node.graph.nodes if each in found]


def _evaluate(traced: TracedModel, nodes: list[fx.Node]) -> Tensor | None:
    """The last one's value, if it is computed from stored tensors alone."""
    if {node.op for node in nodes} - {"get_attr", "call_function"} or all(node.op != "get_attr" for node in nodes):
        return None
    known: dict[fx.Node, object] = {}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                known[node] = traced.tensor(str(node.target))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    value = known[nodes[-1]]
    assert isinstance(value, Tensor)
    return value.contiguous()


def _settle_bias(traced: TracedModel, layer: str, calls: list[fx.Node]) -> None:
    biases = [call.args[2] if len(call.args) > 2 else None for call in calls]
    nodes = [bias for bias in biases if isinstance(bias, fx.Node)]
    if not nodes:
        return
    values = [_evaluate(traced, _behind(node)) for node in nodes]
    first, channels = values[0], calls[0].args[1].meta["val"].shape[0]
    alike = first is not None and first.shape == (channels,) and len(nodes) == len(calls)
    if not alike or any(value is None or not torch.equal(value, first) for value in values):
        for call in calls:
            _add_behind(traced, call)
        return
    names = {str(node.target) for node in nodes if node.op == "get_attr"}
    if len(names) == 1 and all(node.op == "get_attr" for node in nodes):
        (name,) = names
        readers = [user for each in traced.graph.find_nodes(op="get_attr", target=name) for user in each.users]
        if set(readers) <= set(calls):
            return
    name = traced.free_name(f"{layer}.bias")
    for call in calls:
        call.update_arg(2, _put(traced, name, first, call))


def _add_behind(traced: TracedModel, call: fx.Node) -> None:
    bias = call.args[2] if len(call.args) > 2 else None
    if not isinstance(bias, fx.Node):
        return
    call.update_arg(2, None)
    places = call.meta["val"].dim() - 2 if call.target is not aten.linear.default else 0
    if places:  # channels come first
        bias = traced.insert(aten.reshape.default, (bias, [-1, *[1] * places]), before=call)
    readers = list(call.users)
    added = traced.insert(aten.add.Tensor, (call, bias), after=call)
    for reader in readers:
        reader.replace_input_with(call, added)


def _make_linear(traced: TracedModel, node: fx.Node) -> None:
    bias, x, weight = node.args if node.target is aten.addmm.default else (None, *node.args)
    if node.kwargs or not isinstance(weight, fx.Node) or not isinstance(x, fx.Node):
        return
    read = _transposed(weight)
    turned, weight, reader = (True, read, weight) if read is not None else (False, weight, node)
    if weight.op != "get_attr":
        return
    name = str(weight.target)
    owner, _, leaf = name.rpartition(".")
    parameter = getattr(traced.module.get_submodule(owner), leaf)
    readers = [user for each in traced.graph.find_nodes(op="get_attr", target=name) for user in each.users]
    # A buffer is a constant of the model's (a filter bank, positions), not a weight that was trained; a parameter that
    # something else reads, too, would have to be kept twice; not where that is an embedding with it as its table.
    tables = [user for user in readers if turned and leaf == "weight" and user.target is TABLE]
    others = [user for user in readers if user not in tables]
    alone = others == [reader] and (not turned or list(reader.users) == [node])
    if not isinstance(parameter, nn.Parameter) or parameter.dim() != 2 or not alone or x.op == "get_attr":
        return
    if isinstance(bias, fx.Node) and (bias.op != "get_attr" or bias.meta["val"].dim() != 1):
        return
    source, end = _without_rows(node, x)
    called = name if leaf == "weight" else f"{name}.weight"
    value = traced.tensor(name) if turned else traced.tensor(name).t().contiguous()
    if called != name:
        delattr(traced.module.get_submodule(owner), leaf)  # a module takes its name
    linear = traced.insert(
        aten.linear.default,
        (source, _put(traced, called, value, node), *([bias] if bias is not None else [])),
        before=node,
        name=f"{node.name}_linear",
    )
    end.replace_all_uses_with(linear)
    for each in dict.fromkeys((end, node, *([reader] if turned else []))):
        traced.graph.erase_node(each)


def _transposed(node: fx.Node) -> fx.Node | None:
    """The matrix whose transpose ``node`` is; None where it is none."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1 or len(_sizes(node)) != 2:
        return None
    if node.target is aten.t.default or node.target is aten.numpy_T.default:
        return node.all_input_nodes[0]
    if node.target is aten.transpose.int:
        order = [int(each) % 2 for each in node.args[1:]]
        return node.all_input_nodes[0] if order[0] != order[1] else None
    if node.target is aten.permute.default:
        order = [int(each) % 2 for each in node.args[1]]
        return node.all_input_nodes[0] if order == [1, 0] else None
    return None


def _without_rows(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What a linear would read, and the node it would be: without reshapes to rows before and back behind."""
    if x.target in _RESHAPES and len(node.users) == 1:
        source, (end,) = x.args[0], node.users
        assert isinstance(source, fx.Node)
        if end.target in _RESHAPES and _sizes(end)[:-1] == _sizes(source)[:-1] and _sizes(x)[-1] == _sizes(source)[-1]:
            return source, end
    return x, node


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]  # as text: a comparison of dynamic sizes would fix them


def _put(traced: TracedModel, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    traced.set_tensor(name, value)
    node = traced.attribute(name, before=before)
    for each in traced.graph.find_nodes(op="get_attr", target=name):
        each.meta["val"] = value
    return node
