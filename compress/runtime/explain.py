"""Which kernel runs each layer of a loaded graph, on which shape, and why the others do not."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from compress.graph.layers import LAYER_KINDS, TABLE, is_stored, layer_name, weight_position
from compress.graph.traced import TracedModel
from compress.kernels.dispatch import Call, choose
from compress.records.layers import LayerRun
from compress.runtime.edits import UNPACKED, group_size_of
from compress.runtime.pack import factor_place, packed_operator

__all__ = ["explain"]

_LAYOUT = re.compile(r"\.weight(_(bytes|units|packed|floats))?$")


def explain(
    traced: TracedModel, inputs: tuple[Tensor, ...], capability: tuple[int, int] | None = None
) -> list[LayerRun]:
    """Run ``traced`` on ``inputs``, which are where it is, and say of every layer what runs it, in execution order.

    Args:
        capability: of a GPU that is not here: say what would run there.
    """
    seen: dict[fx.Node, tuple[Any, Any]] = {}

    class _Recorder(torch.fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if packed_operator(n) or n.target in LAYER_KINDS or n.target is TABLE:
                x = self.map_nodes_to_values(n.args[1 if n.target is TABLE else 0], n)
                seen[n] = (x, result)
            return result

    with torch.no_grad():
        _Recorder(traced.module).run(*inputs)
    return [_layer_run(traced, node, x, y, capability) for node, (x, y) in seen.items()]


def _layer_run(
    traced: TracedModel, node: fx.Node, x: Tensor, y: Tensor, capability: tuple[int, int] | None
) -> LayerRun:
    if operator := packed_operator(node):
        outputs, rank = y.shape[-1], 0
        if operator == "int8_conv2d":
            outputs, *rest = traced.tensor(str(node.args[3].target)).shape
            inputs, positions, groups = torch.Size(rest).numel(), y.numel() // outputs, node.args[11]
            call = Call.on(
                x, operator, outputs, positions, inputs, capability, bits=8, group_size=inputs, groups=groups
            )
            return _run_of(_layer(node.args[3]), operator, call)
        if operator in ("int8_linear", "int8_dynamic_linear"):
            name = _layer(node.args[3 if operator == "int8_linear" else 1])
            return _chosen(name, operator, x, outputs, 8, x.shape[-1], 0, capability)
        if operator in ("delta_linear", "packed_delta_linear"):
            weight = node.args[1]
            name = _layer(weight.args[0] if is_stored(weight) else weight)
            bits, group_size = (0, x.shape[-1]) if operator == "delta_linear" else node.args[-2:]
            return _chosen(name, operator, x, outputs, bits, group_size, 0, capability)
        place = factor_place(operator)
        if place is not None:
            rank = traced.tensor(str(node.args[place].target)).shape[1]
        layer = _layer(node.args[1])
        if operator == "lowrank_linear":
            return _chosen(layer.removesuffix(".up"), operator, x, outputs, None, None, rank, capability)
        bits, group_size = node.args[-2:]
        return _chosen(layer, operator, x, outputs, bits, group_size, rank, capability)
    weight = node.args[weight_position(node)]
    operator = LAYER_KINDS.get(node.target, "embedding")  # type: ignore[call-overload]
    name = layer_name(node).removesuffix(".weight_floats")
    if operator == "linear" and is_stored(weight):
        return _chosen(name, operator, x, y.shape[-1], weight.args[3], group_size_of(weight), 0, capability)
    shape = weight.args[4] if is_stored(weight) else traced.tensor(str(weight.target)).shape
    if is_stored(weight):
        refused: tuple[str, ...] = (f"no kernel takes {operator} weights in codes: they are unpacked at every call",)
    else:
        refused = node.meta.get(UNPACKED, ("its weight is stored as floats",))
    if operator == "embedding":
        outputs, inputs = shape[1], 1
    else:
        outputs, inputs = shape[0], torch.Size(shape[1:]).numel()
    stored = is_stored(weight)
    return LayerRun(
        layer=name, operator=operator, kernel="torch", rows=y.numel() // outputs, inputs=inputs, outputs=outputs,
        bits=weight.args[3] if stored else None, group_size=group_size_of(weight) if stored else None, rank=0,
        refused=refused,
    )  # fmt: skip


def _layer(weight: fx.Node) -> str:
    """The layer that ``weight``, in whatever layout it is, belongs to."""
    return _LAYOUT.sub("", str(weight.target))


def _chosen(
    layer: str,
    operator: str,
    x: Tensor,
    outputs: int,
    bits: int | None,
    group_size: int | None,
    rank: int,
    capability: tuple[int, int] | None,
) -> LayerRun:
    tables = {
        "delta_linear": "delta_linear",
        "packed_delta_linear": "delta_linear",
        "lowrank_linear": "lowrank_linear",
        "int8_linear": "int8_linear",
        "int8_dynamic_linear": "int8_linear",
    }
    table = tables.get(operator, "packed_linear")
    call = Call.on(x, table, outputs, gpu=capability, bits=bits or 0, group_size=group_size or 0, rank=rank)
    return _run_of(layer, operator, call)


def _run_of(layer: str, operator: str, call: Call) -> LayerRun:
    choice = choose(call)
    return LayerRun(
        layer=layer, operator=operator, kernel=choice.name, rows=call.rows, inputs=call.inputs, outputs=call.outputs,
        bits=call.bits or None, group_size=call.group_size or None, rank=call.rank, refused=choice.refused,
    )  # fmt: skip
