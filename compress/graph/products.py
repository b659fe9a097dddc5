"""Products with stored matrices that are no layers: listed with what they hold, so that nothing stays float unsaid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from compress.graph.traced import TracedModel, node_sizes
from compress.records.layers import LayerSpec

__all__ = ["other_tensors", "stored_products"]

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default: "mm",
    aten.matmul.default: "matmul",
    aten.bmm.default: "bmm",
    aten.addmm.default: "addmm",
    aten.baddbmm.default: "baddbmm",
    aten.einsum.default: "einsum",
}
_REASON = "a product with a stored matrix that is no linear layer: where it can be, write it as nn.Linear"


def stored_products(traced: TracedModel) -> dict[fx.Node, LayerSpec]:
    """By their first call, products of a value with a parameter of two dimensions or more; several a call, or none."""
    found: dict[str, tuple[fx.Node, LayerSpec]] = {}
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        for source in node.all_input_nodes:
            stored = _stored(traced, source)
            if stored is None:
                continue
            name = str(stored.target).removesuffix(".weight")
            macs = _macs(node) // len(traced.example[0])
            first, spec = found.get(name, (node, None))
            if spec is not None:
                found[name] = first, spec.model_copy(update={"macs": spec.macs + macs, "calls": spec.calls + 1})
                continue
            found[name] = node, LayerSpec(
                name=name, kind=_PRODUCTS[node.target], weight_shape=node_sizes(stored), macs=macs, rows=0,
                block=name.rpartition(".")[0], refusal=_REASON,
            )  # fmt: skip
    return dict(found.values())


def other_tensors(traced: TracedModel, listed: set[fx.Node]) -> dict[str, int]:
    """Floats by name that no layer holds (biases, norms, positions, constants), the largest first.

    Args:
        listed: nodes that read the weights of layers.
    """
    names = {str(node.target) for node in listed}
    found = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        value = _attribute(traced, node)
        number = value.dim() == 0 and not isinstance(value, nn.Parameter)  # in the model's source
        if str(node.target) not in names and value.is_floating_point() and not number:
            found[str(node.target)] = value.numel()
    return dict(sorted(found.items(), key=lambda each: (-each[1], each[0])))


def _stored(traced: TracedModel, node: fx.Node) -> fx.Node | None:
    """The parameter that ``node`` is, seen through views of it; None for what is computed."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    if node.op != "get_attr":
        return None
    value = _attribute(traced, node)
    return node if isinstance(value, nn.Parameter) and value.dim() > 1 else None


def _attribute(traced: TracedModel, node: fx.Node) -> Tensor:
    owner, _, leaf = str(node.target).rpartition(".")
    value = getattr(traced.module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _macs(node: fx.Node) -> int:
    """Multiply-accumulates of the example batch."""
    if node.target is not aten.einsum.default:
        first = node.args[1] if node.target in (aten.addmm.default, aten.baddbmm.default) else node.args[0]
        assert isinstance(first, fx.Node)
        return math.prod(node_sizes(node)) * node_sizes(first)[-1]
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, each in zip(inputs.split(","), node.args[1], strict=True):
        before, _, behind = letters.partition("...")
        shape = node_sizes(each)
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(behind), reversed(shape), strict=False))
    if "->" not in str(node.args[0]):
        output = "".join(letter for letter in sizes if inputs.count(letter) == 1)
    return math.prod(node_sizes(node)) * math.prod(size for letter, size in sizes.items() if letter not in output)
