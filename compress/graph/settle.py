"""Weights brought to the one form that layers are found by: stored, and read by a linear or a convolution.

1. A weight that is computed from parameters alone (weight or spectral norm, standardised convolutions) is computed now.
2. A product with a parameter, ``x @ w`` or ``addmm`` (GPT-2's ``Conv1D``), is a linear with the transposed weight, and
   ``x @ w.t()`` one with the weight, which may be an embedding's table, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from compress.graph.layers import LAYER_KINDS, TABLE, is_stored
from compress.graph.traced import TracedModel

__all__ = ["settle_weights"]

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default, aten.matmul.default, aten.addmm.default}
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_PARAMETRIZED = ".parametrizations."


def settle_weights(traced: TracedModel) -> None:
    """Apply both rewrites in place."""
    for node in list(traced.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in LAYER_KINDS:
            _store(traced, node)
        elif node.target in _PRODUCTS:
            _make_linear(traced, node)
    traced.finish()


def _store(traced: TracedModel, call: fx.Node) -> None:
    weight = call.args[1]
    assert isinstance(weight, fx.Node)
    if weight.op == "get_attr" or is_stored(weight):
        return
    behind = _behind(weight)
    parameters = [node for node in behind if node.op == "get_attr"]
    if not parameters or any(node.op not in ("get_attr", "call_function") for node in behind):
        return
    with torch.no_grad():
        value = _evaluate(traced, behind)
    first = str(parameters[0].target)
    owner = first.partition(_PARAMETRIZED)[0] if _PARAMETRIZED in first else first.rpartition(".")[0]
    name = f"{owner}.weight" if owner else f"{call.name}.weight"
    if any(node.target == name and node not in behind for node in traced.graph.find_nodes(op="get_attr")):
        # A module that is called twice computes the same weight twice; of anything else the name is taken.
        known = traced.tensor(name)
        if known.shape != value.shape or not torch.equal(known, value):
            name = f"{call.name}.weight"
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


def _evaluate(traced: TracedModel, nodes: list[fx.Node]) -> Tensor:
    known: dict[fx.Node, object] = {}
    for node in nodes:
        if node.op == "get_attr":
            known[node] = traced.tensor(str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    value = known[nodes[-1]]
    assert isinstance(value, Tensor)
    return value.contiguous()


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
