"""Edits that turn a float graph into the compressed one: stored weights, integer biases, absorbed ReLUs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from compress.graph.layers import (
    ACTIVATIONS,
    LAYER_KINDS,
    is_stored,
    layer_calls,
    layer_name,
    table_calls,
    weight_position,
)
from compress.graph.quantizers import fake_quantize_op
from compress.graph.traced import TracedModel
from compress.quant.weights import QuantizedWeight

__all__ = [
    "absorb_activations",
    "give_bias",
    "input_quantizer",
    "layer_bias",
    "set_bias",
    "set_grid",
    "set_weight",
    "store_biases",
]

_LARGEST_BIAS = 2.0**30  # half of int32: the other half is for the sum


def set_weight(traced: TracedModel, layer: str, weight: QuantizedWeight, compute: str) -> None:
    """Replace the weight of ``layer`` by its packed codes and ``compress::dequantize_weight``.

    ``compute`` is a :class:`~compress.quant.formats.Format`'s: how a runtime is to use it. Storing a layer again
    replaces the tensors.
    """
    for part, tensor in weight.tensors().items():
        traced.set_tensor(f"{layer}.weight_{part}", tensor)
    readers = {*layer_calls(traced).get(layer, ()), *table_calls(traced).get(layer, ())}
    calls = [node for node in traced.graph.nodes if node in readers]  # of a tied table the embedding comes first
    rest = (weight.bits, list(weight.codes.shape), compute, weight.group_size)
    stored = calls[0].args[weight_position(calls[0])]
    if is_stored(stored):
        stored.args = (*stored.args[:3], *rest)
    else:
        parts = [
            traced.attribute(f"{layer}.weight_{part}", before=calls[0]) for part in ("packed", "scale", "zero_point")
        ]
        with traced.graph.inserting_before(calls[0]):
            stored = traced.graph.call_function(torch.ops.compress.dequantize_weight.default, (*parts, *rest))
        for call in calls:
            call.update_arg(weight_position(call), stored)
    stored.meta["val"] = weight.dequantize()
    traced.finish()


def layer_bias(traced: TracedModel, call: fx.Node) -> Tensor | None:
    """The bias that ``call`` adds, float32 [O], or None."""
    node = call.args[2] if len(call.args) > 2 else None
    return traced.tensor(str(node.target)) if node is not None else None


def set_bias(traced: TracedModel, layer: str, bias: Tensor) -> None:
    """Make every call of ``layer`` add ``bias`` [O]; a layer without a bias gains one."""
    give_bias(traced, layer, layer_calls(traced)[layer], bias)
    traced.finish()


def give_bias(traced: TracedModel, layer: str, calls: list[fx.Node], bias: Tensor) -> None:
    """:func:`set_bias` of all ``calls`` of ``layer``, without finishing the graph."""
    node = calls[0].args[2] if len(calls[0].args) > 2 else None
    # Its own is nobody else's (compress/graph/settle.py), whatever it is called.
    name = str(node.target) if node is not None else traced.free_name(f"{layer}.bias")
    traced.set_tensor(name, bias)
    for call in calls:
        call.args = (*call.args[:2], traced.attribute(name, before=call), *call.args[3:])


def set_grid(traced: TracedModel, quantizer: str, scale: Tensor, zero_point: Tensor) -> None:
    """Set the activation grid called ``quantizer``."""
    traced.set_tensor(f"{quantizer}.scale", scale)
    traced.set_tensor(f"{quantizer}.zero_point", zero_point)


def input_quantizer(call: fx.Node) -> fx.Node | None:
    """The quantizer whose grid the input of ``call`` lies on (padding with zeros keeps it there), or None."""
    value = call.args[0]
    while value.target is not fake_quantize_op():
        if value.op != "call_function" or value.target not in (
            torch.ops.aten.pad.default,
            torch.ops.aten.constant_pad_nd.default,
        ):
            return None
        value = value.args[0]
    return value


def store_biases(traced: TracedModel) -> None:
    """Round the bias of every integer call to its accumulator's int32 grid: input scale times weight scale."""
    calls = [node for node in traced.graph.nodes if _adds_integer_bias(node)]
    # First for all calls: a shared layer's grid must not change after one of its biases is rounded.
    for node in calls:
        input_scale = traced.tensor(input_quantizer(node).args[1].target)
        _make_room(traced, layer_name(node), node.args[1], traced.tensor(node.args[2].target), input_scale)
    for node in calls:
        bias_node = node.args[2]
        bias = traced.tensor(bias_node.target)
        scale_nodes = (input_quantizer(node).args[1], node.args[1].args[1])
        input_scale, weight_scale = (traced.tensor(scale.target) for scale in scale_nodes)
        codes = torch.round(bias.double() / (input_scale.double() * weight_scale.double()))
        name = f"{bias_node.target}_codes" + ("" if len(bias_node.users) == 1 else f"_{node.name}")
        traced.set_tensor(name, codes.to(torch.int32))
        parts = [traced.attribute(each, before=node) for each in (name, *(scale.target for scale in scale_nodes))]
        with traced.graph.inserting_before(node):
            stored = traced.graph.call_function(torch.ops.compress.dequantize_bias.default, tuple(parts))
        stored.meta["val"] = bias
        node.update_arg(2, stored)
    traced.finish()


def _adds_integer_bias(node: fx.Node) -> bool:
    """Whether ``node`` is an integer layer with a float bias and an input on a grid."""
    if node.target not in LAYER_KINDS or not is_stored(node.args[1]) or node.args[1].args[5] != "integer":
        return False
    if node.target is torch.ops.aten.linear.default and node.meta["val"].dim() > 2:
        return False  # its kernel ends in floats, and adds the bias there
    bias = node.args[2] if len(node.args) > 2 else None
    return bias is not None and bias.op == "get_attr" and input_quantizer(node) is not None


def _make_room(traced: TracedModel, layer: str, stored: fx.Node, bias: Tensor, input_scale: Tensor) -> None:
    """Widen the weight grid of channels whose bias would not fit into int32 on the accumulator's grid.

    Such a channel is all but dead: its weights are a billion times smaller than its bias, and so is what rounding
    them on the wider grid costs.
    """
    scale = traced.tensor(f"{layer}.weight_scale")
    needed = bias.abs() / (input_scale * _LARGEST_BIAS)
    if not bool((scale < needed).any()):
        return
    bits, shape, compute = stored.args[3:6]
    parts = {part: traced.tensor(f"{layer}.weight_{part}") for part in ("packed", "scale", "zero_point")}
    weight = QuantizedWeight.from_tensors(parts, bits, tuple(shape), group_size=None)
    wider = torch.maximum(scale, needed)
    per_channel = (-1, *[1] * (weight.codes.dim() - 1))
    zero = weight.zero_point.reshape(per_channel).float()
    codes = torch.round((weight.codes.float() - zero) * (scale / wider).reshape(per_channel)) + zero
    set_weight(traced, layer, QuantizedWeight(codes.to(torch.uint8), wider, weight.zero_point, bits), compute)


def absorb_activations(traced: TracedModel) -> None:
    """Drop every ReLU and ReLU6 whose only reader clips to the same range, so that the kernel before it fuses."""
    for node in list(traced.graph.find_nodes(op="call_function", target=fake_quantize_op())):
        activation = node.args[0]
        if activation.target not in ACTIVATIONS or len(activation.users) != 1:
            continue
        scale = traced.tensor(node.args[1].target)
        zero_point = traced.tensor(node.args[2].target)
        starts_at_zero = int(zero_point) == torch.iinfo(zero_point.dtype).min
        top = float(scale) * ((1 << node.args[3]) - 1)
        low, high = _clip_range(activation)
        if starts_at_zero and low <= 0.0 and top <= high * (1 + 1e-6):
            node.update_arg(0, activation.args[0])
    traced.finish()


def _clip_range(activation: fx.Node) -> tuple[float, float]:
    """What a ReLU or a Hardtanh (a ReLU6 is one from 0 to 6) clips to."""
    if activation.target is torch.ops.aten.relu.default:
        return 0.0, float("inf")
    low, high = (*activation.args[1:], *(-1.0, 1.0)[len(activation.args) - 1 :])
    return float(low), float(high)
