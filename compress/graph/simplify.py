"""Rewrites that leave the function as it is and the graph in fewer shapes.

1. Nodes that return their input in eval mode go: dropout's clone, contiguous, alias, slices over everything, reshapes
   to the same.
2. ``conv.padding`` with "same" or "valid" becomes a convolution with numbers, where the padding is even on both sides.
3. A mean over all spatial positions becomes an adaptive average pool to 1, the form integer runtimes know.
4. Every spelling of ReLU and ReLU6 (relu6, clamp, clamp_min) becomes ``relu`` or ``hardtanh(0, 6)``.
5. Attention becomes its two products and the softmax between (compress/graph/attention.py).
6. Weights that are computed are stored, and products with parameters become linears (compress/graph/settle.py).
7. A size that a reshape leaves open (-1) is written down where it is the same for every batch.
8. A layer's weight is called ``<layer>.weight``, so that the layer has a name and its bias, codes and scales a place.
9. A layer's bias is one stored tensor of its own; any other is added behind the layer (compress/graph/settle.py).
"""

from __future__ import annotations

import torch
from torch import fx

from compress.graph.attention import open_attention
from compress.graph.layers import LAYER_KINDS, TABLE, weight_position
from compress.graph.settle import settle_biases, settle_weights
from compress.graph.traced import TracedModel

__all__ = ["simplify"]

aten = torch.ops.aten
_IDENTITIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_END = 1 << 62


def simplify(traced: TracedModel) -> None:
    """Apply the rewrites in place."""
    open_attention(traced)
    settle_weights(traced)
    for node in list(traced.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif (bounds := _clip_bounds(node)) in ((0.0, 6.0), (0.0, None)):
            _name_activation(node, bounds)
        elif node.target in _RESHAPES:
            node.target = aten.reshape.default  # a view may need the memory layout that a dropped clone made
            _number_sizes(node)
        elif node.target in (aten.conv1d.padding, aten.conv2d.padding):
            _number_padding(traced, node)
        elif node.target is aten.mean.dim:
            _pool_mean(traced, node)
        if node.target in LAYER_KINDS or node.target is TABLE:
            _name_weight(traced, node.args[weight_position(node)])
    settle_biases(traced)
    traced.finish()


def _number_sizes(node: fx.Node) -> None:
    shape = node.meta["val"].shape
    sizes = [n if size == -1 and isinstance(n, int) else size for size, n in zip(node.args[1], shape, strict=True)]
    node.args = (node.args[0], sizes)


def _is_identity(node: fx.Node) -> bool:
    if node.target in _IDENTITIES:
        return True
    if node.target is aten.slice.Tensor:
        start, end, step = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
        return start in (None, 0) and (end is None or (isinstance(end, int) and end >= _END)) and step == 1
    if node.target in _RESHAPES:  # compared as text: a comparison of dynamic sizes would fix them
        return [str(n) for n in node.meta["val"].shape] == [str(n) for n in node.args[0].meta["val"].shape]
    return False


def _clip_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """Lower and upper bound of a clip between numbers, however it is spelled; None for anything else."""
    low, high = (*node.args[1:], None, None)[:2]
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.clamp_min.default:
        return low, None
    if node.target is aten.clamp.default:
        return node.kwargs.get("min", low), node.kwargs.get("max", high)
    return None


def _name_activation(node: fx.Node, bounds: tuple[float | None, float | None]) -> None:
    node.target = aten.relu.default if bounds[1] is None else aten.hardtanh.default
    node.args = (node.args[0],) if bounds[1] is None else (node.args[0], 0.0, 6.0)
    node.kwargs = {}


def _name_weight(traced: TracedModel, weight: fx.Node) -> None:
    """Rename a bare parameter (a functional layer's, ``in_proj_weight``, a root module's own) to ``<it>.weight``."""
    if weight.op != "get_attr" or str(weight.target).endswith(".weight"):
        return
    name, value = str(weight.target), traced.tensor(str(weight.target))
    owner, _, leaf = name.rpartition(".")
    delattr(traced.module.get_submodule(owner), leaf)
    traced.set_tensor(f"{name}.weight", value)
    for node in traced.graph.find_nodes(op="get_attr"):
        if node.target == name:
            node.target = f"{name}.weight"


def _number_padding(traced: TracedModel, node: fx.Node) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = (None, None, None, [1], "valid", [1], 1)
    given = {**dict(zip(names, defaults, strict=True)), **dict(zip(names, node.args, strict=False)), **node.kwargs}
    kernel = given["weight"].meta["val"].shape[2:]
    dilation = list(given["dilation"]) * (len(kernel) // len(given["dilation"]))
    if given["padding"] == "valid":
        padding = [0] * len(kernel)
    else:
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return  # uneven padding has no conv form in PyTorch; the operator stays and is not compressible
        padding = [t // 2 for t in total]
    stride = list(given["stride"]) * (len(kernel) // len(given["stride"]))
    node.target = aten.conv1d.default if len(kernel) == 1 else aten.conv2d.default
    node.args = (given["input"], given["weight"], given["bias"], stride, padding, dilation, given["groups"])
    node.kwargs = {}


def _pool_mean(traced: TracedModel, node: fx.Node) -> None:
    source, dims, keep = (*node.args, False)[:3]
    value = source.meta.get("val")
    if value is None or value.dim() != 4 or dims is None or sorted(d % 4 for d in dims) != [2, 3]:
        return
    with traced.graph.inserting_before(node):
        pooled = traced.graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
        pooled.meta = {**node.meta, "val": value.new_empty((*value.shape[:2], 1, 1))}
        result = pooled
        if not keep:
            result = traced.graph.call_function(aten.flatten.using_ints, (pooled, 1))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    traced.graph.erase_node(node)
