"""Edits of a graph that is made ready for a GPU: a node by another, a stored weight by tensors in another layout."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from compress.graph.layers import LAYER_KINDS, TABLE
from compress.graph.traced import TracedModel
from compress.quant.weights import QuantizedWeight

__all__ = [
    "UNPACKED",
    "group_size_of",
    "holds_tensor",
    "replace_by_tensor",
    "replace_node",
    "stored_weight",
    "unpack_weight",
]

# Key of a node's notes: why its weight is no longer in codes, a sentence a kernel.
UNPACKED = "compress_unpacked"


def replace_node(traced: TracedModel, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Call ``target`` in ``node``'s place."""
    with traced.graph.inserting_before(node):
        new = traced.graph.create_node("call_function", target, args, name=f"{node.name}_fused")
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


def replace_by_tensor(traced: TracedModel, node: fx.Node, name: str, value: Tensor) -> None:
    """Read ``value``, stored as ``name``, in ``node``'s place."""
    traced.set_tensor(name, value)
    node.replace_all_uses_with(traced.attribute(name, before=node))
    traced.graph.erase_node(node)


def unpack_weight(traced: TracedModel, stored: fx.Node) -> None:
    """``stored``, a weight in codes, as floats from now on."""
    name = str(stored.args[0].target).removesuffix("_packed")
    for reader in stored.users:
        kind = "embedding" if reader.target is TABLE else LAYER_KINDS.get(reader.target, str(reader.target))  # type: ignore[call-overload]
        why = f"no kernel takes {kind} weights in codes: they were unpacked when the model was loaded"
        reader.meta.setdefault(UNPACKED, (why,))
    replace_by_tensor(traced, stored, f"{name}_floats", stored_weight(traced, stored).dequantize())


def holds_tensor(traced: TracedModel, name: str) -> bool:
    """Whether the graph has a tensor called ``name``."""
    return any(name == found for found, _ in traced.module.named_buffers())


def group_size_of(stored: fx.Node) -> int:
    """Weights of a row of ``stored``, a weight in codes, that share a grid."""
    row = math.prod(stored.args[4][1:])
    return (stored.args[6] if len(stored.args) > 6 else None) or row


def stored_weight(traced: TracedModel, stored: fx.Node) -> QuantizedWeight:
    """What ``stored``, a weight in codes, holds."""
    parts = {
        part: traced.tensor(str(node.target))
        for part, node in zip(("packed", "scale", "zero_point"), stored.args, strict=False)
    }
    group_size = stored.args[6] if len(stored.args) > 6 else None
    return QuantizedWeight.from_tensors(parts, stored.args[3], tuple(stored.args[4]), group_size)
