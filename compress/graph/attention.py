"""Scaled dot-product attention as the operators it consists of: two matrix products and a softmax.

Whole, it is one operator that no calibration can look into and that ONNX spells in a dozen nodes. In parts, its
products are matmuls like others, and what masks need is computed once for all layers that share a mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from compress.graph.traced import TracedModel

__all__ = ["open_attention"]

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


def open_attention(traced: TracedModel) -> None:
    """Replace every attention operator in place.

    A masked score becomes the lowest float instead of minus infinity: a query that may look nowhere gets the mean of
    all values where PyTorch gives zeros. Padding is the only such query, and nobody reads its result.
    """
    biases: dict[fx.Node, fx.Node] = {}
    for node in list(traced.graph.find_nodes(op="call_function", target=_ATTENTION)):
        _open(traced, node, biases)


def _open(traced: TracedModel, node: fx.Node, biases: dict[fx.Node, fx.Node]) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    mask, width = given.get("attn_mask"), query.meta["val"].shape[-1]

    def insert(target: Any, *args: Any) -> fx.Node:
        return traced.insert(target, args, before=node)

    if given.get("enable_gqa"):
        copies = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key, value = (insert(aten.repeat_interleave.self_int, each, copies, -3) for each in (key, value))
    scale = given.get("scale")
    scores = insert(aten.matmul.default, query, insert(aten.transpose.int, key, -2, -1))
    scores = insert(aten.mul.Tensor, scores, 1.0 / math.sqrt(width) if scale is None else scale)
    if given.get("is_causal"):
        mask = _causal(insert, query, key)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        if mask not in biases:
            # Right behind the mask, so that every layer finds it made.
            low = torch.finfo(query.meta["val"].dtype).min
            biases[mask] = traced.insert(aten.where.ScalarOther, (mask, _zeros(traced, mask), low), after=mask)
        mask = biases[mask]
    if mask is not None:
        scores = insert(aten.add.Tensor, scores, mask)
    weights = insert(aten.softmax.int, scores, -1)
    result = insert(aten.matmul.default, weights, value)
    node.replace_all_uses_with(result)
    traced.graph.erase_node(node)


def _causal(insert: Any, query: fx.Node, key: fx.Node) -> fx.Node:
    """Query ``i`` may look at keys up to ``i``: [L, S]."""
    rows, columns = (insert(aten.arange.default, insert(aten.sym_size.int, each, -2)) for each in (query, key))
    found: fx.Node = insert(aten.ge.Tensor, insert(aten.unsqueeze.default, rows, 1), columns)
    return found


def _zeros(traced: TracedModel, mask: fx.Node) -> fx.Node:
    """A zero of the scores' type, to take the place of what is let through."""
    name = "attention.zero"
    traced.set_tensor(name, torch.zeros(()))
    return traced.attribute(name, before=mask)
