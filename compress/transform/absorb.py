"""Which tensors take a factor for each channel of a value, so that nothing has to be computed for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from compress.graph.layers import layer_name
from compress.graph.traced import TracedModel

__all__ = ["count_readers", "find_sources"]

aten = torch.ops.aten


def find_sources(traced: TracedModel, value: fx.Node, readers: Sequence[str]) -> list[str]:
    """Names of the tensors that, divided along their first dimension, divide the channels (last) of ``value``.

    Empty where there are none: others than ``readers`` read the value, or what makes it takes no factor.
    """
    if any(user.target is not aten.linear.default or layer_name(user) not in readers for user in value.users):
        return []
    counts = count_readers(traced)
    names = _tensors(value)
    return names if all(counts[name] == 1 for name in names) else []


def count_readers(traced: TracedModel) -> Counter[str]:
    """How many nodes read each tensor."""
    counts: Counter[str] = Counter()
    for node in traced.graph.find_nodes(op="get_attr"):
        counts[str(node.target)] += len(node.users)
    return counts


def _tensors(value: fx.Node) -> list[str]:
    if value.target is aten.layer_norm.default:
        found = list(value.args[2:4])
        return [str(each.target) for each in found] if len(found) == 2 and all(map(_is_stored, found)) else []
    if value.target is aten.linear.default:
        return _rows_of(value)
    if value.target is aten.mul.Tensor:
        for one, other in (value.args[:2], value.args[1::-1]):
            if _is_stored(one) and one.meta["val"].dim() == 1:  # the weight of a norm without bias
                return [str(one.target)]
            if isinstance(one, fx.Node) and isinstance(other, fx.Node) and _is_linear_alone(one):
                return _rows_of(one)  # the ungated half of a gated pair
        return []
    return _through_attention(value)


def _through_attention(value: fx.Node) -> list[str]:
    """The value projection's rows, where ``value`` is its heads' mixtures side by side."""
    if value.target is not aten.reshape.default:
        return []
    turned = value.args[0]
    if turned.target is not aten.transpose.int or sorted(turned.args[1:]) != [1, 2] or len(turned.users) != 1:
        return []
    mixed = turned.args[0]
    if mixed.target is not aten.matmul.default or len(mixed.users) != 1:
        return []
    heads = mixed.args[1]
    if heads.target is not aten.transpose.int or sorted(heads.args[1:]) != [1, 2] or len(heads.users) != 1:
        return []
    split = heads.args[0]
    if split.target is not aten.reshape.default or len(split.users) != 1 or not _is_linear_alone(split.args[0]):
        return []
    if split.meta["val"].shape[-2:].numel() != value.meta["val"].shape[-1]:
        return []
    return _rows_of(split.args[0])


def _is_linear_alone(node: fx.Node) -> bool:
    return node.target is aten.linear.default and len(node.users) == 1


def _rows_of(linear: fx.Node) -> list[str]:
    parts = [each for each in linear.args[1:3] if each is not None]
    return [str(each.target) for each in parts] if all(map(_is_stored, parts)) else []


def _is_stored(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"
