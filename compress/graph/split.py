"""Edits that do one layer by two thin ones: factors in its place, or a low-rank branch beside it.

What comes of it are ordinary layers, ``<layer>.down`` and ``<layer>.up``, so that everything behind needs nothing new.
Of a convolution the first has the kernel, with stride, padding and dilation, and the second is 1 x 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel
from compress.records.layers import Split

__all__ = ["split_layer"]

aten = torch.ops.aten


def split_layer(traced: TracedModel, split: Split, down: Tensor, up: Tensor, *, reference: bool = False) -> None:
    """Carry out ``split`` in place.

    Args:
        traced: a float graph.
        split: one that the layer does not refuse.
        down: [R, I], of a convolution [R, I * kernel].
        up: [O, R].
        reference: leave the layer as it is, and only add the thin ones' tensors and the call of the first, which nobody
            reads: the graph then holds, under the same names, what each call of the split one is to come close to, the
            second's being the whole layer's own output. For ``factors``; such a graph is not to be edited again.
    """
    call = layer_calls(traced)[split.layer][0]
    weight = traced.tensor(f"{split.layer}.weight")
    rank = len(down)
    names = {part: f"{split.layer}.{part}" for part in ("down", "up")}
    traced.set_tensor(f"{names['down']}.weight", down.reshape(rank, *weight.shape[1:]))
    traced.set_tensor(f"{names['up']}.weight", up.reshape(len(up), rank, *[1] * (weight.dim() - 2)))
    bias = traced.tensor(str(call.args[2].target)) if len(call.args) > 2 and call.args[2] is not None else None
    first = traced.insert(
        call.target,
        (call.args[0], traced.attribute(f"{names['down']}.weight", before=call), None, *call.args[3:]),
        before=call,
        name=f"{call.name}_down",
    )
    if split.form == "branch":
        _add_branch(traced, call, first, names["up"], split.layer, weight - (up @ down).reshape(weight.shape))
    else:
        if bias is not None:
            traced.set_tensor(f"{names['up']}.bias", bias)
        if split.layer in traced.statistics:
            traced.statistics[names["up"]] = traced.statistics[split.layer]
        if reference:
            traced.module.recompile()
            return
        parts = [traced.attribute(f"{names['up']}.weight", before=call)]
        if bias is not None:
            parts.append(traced.attribute(f"{names['up']}.bias", before=call))
        call.args = (first, *parts)
    traced.finish()


def _add_branch(traced: TracedModel, call: fx.Node, first: fx.Node, up: str, layer: str, rest: Tensor) -> None:
    """Let ``call`` multiply with ``rest``, and add what ``first`` and ``up`` give to its result."""
    readers = list(call.users)
    traced.set_tensor(f"{layer}.weight", rest)
    second = traced.insert(
        call.target,
        (first, traced.attribute(f"{up}.weight", before=call)),
        after=call,
        name=f"{call.name}_up",
    )
    both = traced.insert(aten.add.Tensor, (call, second), after=second, name=f"{call.name}_both")
    for reader in readers:
        reader.replace_input_with(call, both)
    call.args[1].meta["val"] = traced.tensor(f"{layer}.weight")
