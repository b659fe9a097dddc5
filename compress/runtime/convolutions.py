"""Convolutions behind quantizers on bytes; between two of them bytes are passed on, rounded in the first one's kernel.

fake_quantize -- conv2d(dequantize_weight) -- y             becomes    int8_conv2d -- y
int8_conv2d -- relu -- fake_quantize -- int8_conv2d         becomes    int8_conv2d -- int8_conv2d
"""

from __future__ import annotations

import torch
from torch import fx

from compress.graph.layers import is_stored, layer_name
from compress.graph.traced import TracedModel
from compress.kernels.dispatch import Call, choose
from compress.kernels.int8_weight import Int8Weight
from compress.runtime.edits import UNPACKED, holds_tensor, replace_node, stored_weight

__all__ = ["pack_convolutions"]

aten = torch.ops.aten

# A small and a large feature map: a convolution that no kernel takes at either is kept on floats.
_POSITIONS = (64, 100_000)
_QUANTIZER = "compress.fake_quantize.default"
_CONV = "compress.int8_conv2d.default"


def pack_convolutions(traced: TracedModel, capability: tuple[int, int] | None) -> None:
    """Make the edits above, in place, for a GPU of compute ``capability``."""
    for call in traced.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        if is_stored(call.args[1]) and str(call.args[0].target) == _QUANTIZER:
            _on_bytes(traced, call, capability)
    traced.graph.eliminate_dead_code()
    for node in list(traced.graph.nodes):
        if str(node.target) == _CONV:
            _absorb_relu(node)
            _pass_bytes_on(traced, node)


def _on_bytes(traced: TracedModel, call: fx.Node, capability: tuple[int, int] | None) -> None:
    """``call`` as a product of bytes, if its weight's grid is symmetric and a kernel takes it."""
    stored = call.args[1]
    weight = stored_weight(traced, stored)
    if weight.group_size is not None or not weight.symmetric:
        return
    bias, stride, padding, dilation, groups = (*call.args[2:], *(None, [1], [0], [1], 1)[len(call.args) - 2 :])
    outputs, *rest = stored.args[4]
    inputs = torch.Size(rest).numel()
    choices = [
        choose(Call("int8_conv2d", "cuda", capability, torch.float32, n, outputs, inputs, 8, inputs, groups=groups))
        for n in _POSITIONS
    ]
    if all(choice.name == "reference" for choice in choices):
        call.meta[UNPACKED] = choices[0].refused
        return
    layer = layer_name(call)
    names = [f"{layer}.weight_{part}" for part in ("bytes", "bytes_scale", "bytes_sums")]
    if not holds_tensor(traced, names[0]):
        found = Int8Weight.from_quantized(weight)
        # The kernel reads a position's channels side by side.
        codes = found.codes.permute(0, 2, 3, 1).contiguous()
        for name, part in zip(names, (codes, found.scale, found.sums), strict=True):
            traced.set_tensor(name, part)
    parts = [traced.attribute(name, before=call) for name in names]
    x, scale, zero_point, bits = call.args[0].args
    sizes = (list(stride), list(padding), list(dilation), groups)
    args = (x, scale, zero_point, *parts, bias, bits, *sizes, False)
    replace_node(traced, call, torch.ops.compress.int8_conv2d.default, args)


def _absorb_relu(node: fx.Node) -> None:
    """The ReLU that alone reads ``node``, into it."""
    if len(node.users) == 1:
        (reader,) = node.users
        if reader.target is aten.relu.default:
            node.args = (*node.args[:12], True)
            node.meta["val"] = reader.meta["val"]
            reader.replace_all_uses_with(node)


def _pass_bytes_on(traced: TracedModel, node: fx.Node) -> None:
    """Let ``node`` round to the grid that all its readers round it to, where one of them is a convolution on bytes."""
    readers = [reader for reader in node.users if reader.users or reader.op == "output"]
    grids = {_grid_of(reader, node) for reader in readers}
    if None in grids or len(grids) != 1 or not any(str(reader.target) == _CONV for reader in readers):
        return
    first = readers[0].args
    scale, zero_point, bits = first[1], first[2], first[7] if str(readers[0].target) == _CONV else first[3]
    node.args = (*node.args[:13], *_before(traced, node, (scale, zero_point)), bits)
    others = [reader for reader in readers if str(reader.target) != _CONV]
    if others:
        with traced.graph.inserting_after(node):
            floats = traced.graph.call_function(torch.ops.compress.dequantize_codes.default, (node, *node.args[13:15]))
        floats.meta["val"] = node.meta["val"]
        for reader in others:
            reader.replace_all_uses_with(floats)


def _grid_of(reader: fx.Node, node: fx.Node) -> tuple[str, str, int] | None:
    """Names of the grid that ``reader`` rounds ``node`` to, and its bits; None where it does not."""
    if reader.op != "call_function" or not reader.args or reader.args[0] is not node:
        return None
    places = {_CONV: 7, _QUANTIZER: 3}.get(str(reader.target))
    if places is None or any(argument is node for argument in reader.args[1:]):
        return None
    return str(reader.args[1].target), str(reader.args[2].target), reader.args[places]


def _before(traced: TracedModel, node: fx.Node, parts: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The tensors ``parts`` read again before ``node``: where they were read may be behind it."""
    return [traced.attribute(str(part.target), before=node) for part in parts]
