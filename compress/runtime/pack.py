"""From an artifact's graph to one that GPUs run, with weights in the layout that kernels read.

    x -- linear(dequantize_weight(codes)) -- y      becomes    packed_linear(units)         weights stay packed
    the same behind a quantizer, weights symmetric  becomes    int8_linear(bytes)           rounding fused
    convolutions there (runtime/convolutions.py)    become     int8_conv2d(bytes)           bytes passed on
    x -- linear -- linear -- y, thin in between     becomes    lowrank_linear               one operator for both
    packed_linear, and those two beside it, added   becomes    packed_lowrank_linear        the branch fused
    delta_linear(dequantize_weight(codes))          becomes    packed_delta_linear          the delta beside it
    any other stored weight or bias                 becomes    floats, once, at load time

The artifact's own graph unpacks weights as it runs, in operators whose reference is the truth; the CPU runs that one.
"""

from __future__ import annotations

import torch
from torch import fx

from compress.errors import InputError
from compress.graph.layers import is_stored, layer_name
from compress.graph.traced import TracedModel
from compress.kernels.dispatch import Call, choose
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.lanes import LaneWeight
from compress.runtime.convolutions import pack_convolutions
from compress.runtime.edits import (
    UNPACKED,
    group_size_of,
    holds_tensor,
    replace_by_tensor,
    replace_node,
    stored_weight,
    unpack_weight,
)

__all__ = ["factor_place", "packed_for_gpu", "packed_operator"]

aten = torch.ops.aten

# The operators that take weights in the kernels' layout, or factors.
_BYTES = ("int8_linear", "int8_dynamic_linear", "int8_conv2d")
_DELTAS = ("delta_linear", "packed_delta_linear")
_PACKED = ("packed_linear", "packed_lowrank_linear", "lowrank_linear", *_DELTAS, *_BYTES)
# Which arguments of those that multiply floats, behind x, are factors or a bias.
_FLOATS = {
    "lowrank_linear": (0, 1, 2),
    "packed_linear": (3,),
    "packed_lowrank_linear": (3, 4, 5),
    "packed_delta_linear": (7,),
}

# Few, some and many rows: a weight that no kernel takes at any of them is kept as floats.
_ROWS = (1, 16, 1024)


def packed_for_gpu(
    traced: TracedModel, capability: tuple[int, int] | None, dtype: torch.dtype | None = None
) -> TracedModel:
    """A copy of an artifact's graph, rewritten for a GPU of compute ``capability``, its tensors still where they were.

    Args:
        dtype: float16 or bfloat16: what linears with packed or low-rank weights and float inputs multiply in; inputs
            are rounded to it, sums are float32, and everything between such linears stays as it was. None: the inputs'
            own.

    Raises:
        InputError: another ``dtype``.
    """
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise InputError(
            f"dtype {dtype}: packed linears multiply in torch.float16 or torch.bfloat16, or None: as it is"
        )
    packed = traced.copy()
    for node in list(packed.graph.nodes):
        if node.op == "call_function" and str(node.target) == "compress.dequantize_bias.default":
            parts = [packed.tensor(str(part.target)) for part in node.args]
            replace_by_tensor(packed, node, f"{node.args[0].target}_floats", node.target(*parts))
    pack_convolutions(packed, capability)
    for node in packed.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        _unpack_branch(packed, node)
    for call in packed.graph.find_nodes(op="call_function", target=aten.linear.default):
        if is_stored(call.args[1]) and not _pack_bytes(packed, call, capability):
            _pack_linear(packed, call, capability)
    for call in packed.graph.find_nodes(op="call_function", target=torch.ops.compress.delta_linear.default):
        if is_stored(call.args[1]):
            _pack_linear(packed, call, capability)
    for call in packed.graph.find_nodes(op="call_function", target=aten.linear.default):
        _fuse_factors(packed, call)
    for node in packed.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        _fuse_branch(packed, node)
    for node in packed.graph.find_nodes(op="call_function", target=torch.ops.compress.dequantize_weight.default):
        unpack_weight(packed, node)
    if dtype is not None:
        for node in list(packed.graph.nodes):
            if packed_operator(node) in _FLOATS:
                _multiply_in(packed, node, dtype)
    packed.finish()
    return packed


def _pack_bytes(traced: TracedModel, call: fx.Node, capability: tuple[int, int] | None) -> bool:
    """``call`` on bytes, where its input comes from a quantizer and a kernel takes its weight; whether it was done."""
    stored, quantizer = call.args[1], call.args[0]
    kind = str(quantizer.target)
    if kind not in ("compress.fake_quantize.default", "compress.fake_quantize_dynamic.default"):
        return False
    weight = stored_weight(traced, stored)
    if weight.group_size is not None or not weight.symmetric:
        return False
    outputs, inputs = stored.args[4]
    choices = [
        choose(Call("int8_linear", "cuda", capability, torch.float32, rows, outputs, inputs, 8, inputs))
        for rows in _ROWS
    ]
    if all(choice.name == "reference" for choice in choices):
        call.meta[UNPACKED] = choices[0].refused
        return False
    layer = layer_name(call)
    names = [f"{layer}.weight_{part}" for part in ("bytes", "bytes_scale", "bytes_sums")]
    if not holds_tensor(traced, names[0]):
        found = Int8Weight.from_quantized(weight)
        for name, part in zip(names, (found.codes, found.scale, found.sums), strict=True):
            traced.set_tensor(name, part)
    parts = [traced.attribute(name, before=call) for name in names]
    bias = call.args[2] if len(call.args) > 2 else None
    if kind == "compress.fake_quantize.default":
        x, scale, zero_point, bits = quantizer.args
        args = (x, scale, zero_point, *parts, bias, bits)
        replace_node(traced, call, torch.ops.compress.int8_linear.default, args)
    else:
        args = (quantizer.args[0], *parts, bias, False)
        replace_node(traced, call, torch.ops.compress.int8_dynamic_linear.default, args)
    return True


def _pack_linear(traced: TracedModel, call: fx.Node, capability: tuple[int, int] | None) -> None:
    """``call``, of a linear or one with a delta, with its weight in the kernels' layout, if a kernel takes that."""
    stored, with_delta = call.args[1], packed_operator(call) == "delta_linear"
    bits, (outputs, inputs), group_size = stored.args[3], stored.args[4], group_size_of(stored)
    table = "delta_linear" if with_delta else "packed_linear"
    choices = [
        choose(Call(table, "cuda", capability, torch.float32, rows, outputs, inputs, bits, group_size))
        for rows in _ROWS
    ]
    if all(choice.name == "reference" for choice in choices):
        call.meta[UNPACKED] = choices[0].refused
        return
    layer = str(stored.args[0].target).removesuffix(".weight_packed")
    names = [f"{layer}.weight_{part}" for part in ("units", "lane_scale", "lane_zero_point")]
    if not holds_tensor(traced, names[0]):  # a layer that is called twice is packed once
        weight = LaneWeight.from_quantized(stored_weight(traced, stored))
        for name, part in zip(names, (weight.units, weight.scale, weight.zero_point), strict=True):
            traced.set_tensor(name, part)
    parts = [traced.attribute(name, before=call) for name in names]
    if with_delta:
        target = torch.ops.compress.packed_delta_linear.default
        replace_node(traced, call, target, (call.args[0], *parts, *call.args[2:], bits, group_size))
        return
    bias = call.args[2] if len(call.args) > 2 else None
    replace_node(traced, call, torch.ops.compress.packed_linear.default, (call.args[0], *parts, bias, bits, group_size))


def _fuse_factors(traced: TracedModel, up: fx.Node) -> None:
    """``up``, a float linear, and the thin float linear without bias that it alone reads, as one operator."""
    pair = _factors(traced, up)
    if pair is None:
        return
    x, down_weight, up_weight = pair
    bias = up.args[2] if len(up.args) > 2 else None
    rank = traced.tensor(str(up_weight.target)).shape[1]
    replace_node(traced, up, torch.ops.compress.lowrank_linear.default, (x, up_weight, down_weight, bias, rank))


def _factors(traced: TracedModel, up: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Input, ``down`` and ``up`` of two thin linears of which ``up`` is the second; None where it is not."""
    down = up.args[0]
    if down.target is not aten.linear.default or len(down.users) != 1 or any(a is not None for a in down.args[2:3]):
        return None
    weights = (down.args[1], up.args[1])
    if any(weight.op != "get_attr" for weight in weights):
        return None
    rank, inputs = traced.tensor(str(weights[0].target)).shape
    outputs = traced.tensor(str(weights[1].target)).shape[0]
    return (down.args[0], *weights) if rank * (inputs + outputs) < inputs * outputs else None


def _fuse_branch(traced: TracedModel, add: fx.Node) -> None:
    """The sum of a packed linear and a low-rank one of the same input, as one operator."""
    packed_op, lowrank_op = torch.ops.compress.packed_linear.default, torch.ops.compress.lowrank_linear.default
    whole, branch = add.args[:2]
    if len(add.args) != 2 or add.kwargs or getattr(whole, "target", None) is not packed_op:
        return
    if getattr(branch, "target", None) is not lowrank_op or branch.args[0] is not whole.args[0]:
        return
    if len(whole.users) != 1 or len(branch.users) != 1 or branch.args[3] is not None:
        return
    x, units, scale, zero_point, bias, bits, group_size = whole.args
    args = (x, units, scale, zero_point, branch.args[1], branch.args[2], bias, bits, group_size)
    replace_node(traced, add, torch.ops.compress.packed_lowrank_linear.default, args)


def _unpack_branch(traced: TracedModel, add: fx.Node) -> None:
    """A branch's factors as floats, where they are stored in codes: fused, they cost less than kernels of their own."""
    if len(add.args) != 2 or not all(isinstance(each, fx.Node) for each in add.args):
        return
    whole, up = add.args
    if whole.target is not aten.linear.default or up.target is not aten.linear.default or not is_stored(whole.args[1]):
        return
    down = up.args[0]
    if down.target is aten.linear.default and down.args[0] is whole.args[0] and len(down.users) == 1:
        for stored in (down.args[1], up.args[1]):
            if is_stored(stored) and len(stored.users) == 1:
                unpack_weight(traced, stored)


def _multiply_in(traced: TracedModel, call: fx.Node, dtype: torch.dtype) -> None:
    """``call`` between two casts; factors are stored in ``dtype``, a bias too."""
    x, *rest = call.args
    for place in _FLOATS[packed_operator(call)]:
        if rest[place] is not None:
            name = f"{rest[place].target}_{str(dtype).removeprefix('torch.')}"
            traced.set_tensor(name, traced.tensor(str(rest[place].target)).to(dtype))
            rest[place] = traced.attribute(name, before=call)
    with traced.graph.inserting_before(call):
        narrow = traced.graph.call_function(aten.to.dtype, (x, dtype))
    call.args = (narrow, *rest)
    with traced.graph.inserting_after(call):
        wide = traced.graph.call_function(aten.to.dtype, (call, x.meta["val"].dtype))
    wide.meta["val"] = call.meta["val"]
    call.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def packed_operator(node: fx.Node) -> str | None:
    """Which of the operators over packed weights and factors ``node`` calls; None: another."""
    namespace, _, rest = str(node.target).partition(".")
    name = rest.partition(".")[0]
    return name if node.op == "call_function" and namespace == "compress" and name in _PACKED else None


def factor_place(operator: str) -> int | None:
    """Which argument of ``operator`` is ``up`` [O, R], the second factor; None: it has none."""
    return {"lowrank_linear": 1, "packed_lowrank_linear": 4}.get(operator)
