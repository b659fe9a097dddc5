"""Fold BatchNorm into the convolution or linear before it.

``W' = W * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``. The mean (beta) and
deviation (|gamma|) that the normalisation gave each channel are kept for statistics tuning and equalisation.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from compress.graph.rewrite import give_bias
from compress.graph.traced import ChannelStatistics, TracedModel

__all__ = ["fold_batch_norm"]

aten = torch.ops.aten
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_SHOWN = 4
_LAYERS = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)


def fold_batch_norm(traced: TracedModel) -> None:
    """Fold in place; a BatchNorm that cannot be folded stays, with a note that says why, one for each reason."""
    kept: dict[str, list[str]] = {}
    for norm in list(traced.graph.find_nodes(op="call_function", target=_BATCH_NORM)):
        reason = _refusal(norm)
        if reason:
            kept.setdefault(reason, []).append(_name(norm))
            continue
        _fold(traced, norm)
    traced.notes += [_note(names, reason) for reason, names in kept.items()]
    traced.finish()


def _name(norm: fx.Node) -> str:
    """The module's name, from a tensor that it holds; the node's own where all are computed."""
    held = next((str(each.target) for each in norm.args[1:5] if each is not None and each.op == "get_attr"), norm.name)
    return held.rpartition(".")[0] or held


def _note(names: list[str], reason: str) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    if len(names) == 1:
        return f"BatchNorm {shown} is not folded: {reason}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} BatchNorms are not folded ({shown}{more}): {reason}"


def _refusal(norm: fx.Node) -> str | None:
    layer, weight, bias = norm.args[:3]
    if not (weight is None or weight.op == "get_attr") or not (bias is None or bias.op == "get_attr"):
        return "its parameters are computed"
    if layer.op != "call_function" or layer.target not in _LAYERS or layer.args[1].op != "get_attr":
        return "no convolution or linear stands before it"
    if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
        return "it normalises another dimension than the linear before it writes"
    if len(layer.users) > 1:
        return "the layer before it is also read elsewhere"
    if len(layer.args[1].users) > 1:
        return "the layer before it is called more than once"
    if set(norm.users) != {user for user in norm.users if user.target is operator.getitem and user.args[1] == 0}:
        return "its statistics are read"
    return None


def _fold(traced: TracedModel, norm: fx.Node) -> None:
    layer, gamma_node, beta_node, mean_node, var_node, _, eps = norm.args
    assert isinstance(layer, fx.Node)
    weight_name = layer.args[1].target
    name = weight_name.removesuffix(".weight")
    weight, mean, variance = (traced.tensor(node.target) for node in (layer.args[1], mean_node, var_node))
    gamma = traced.tensor(gamma_node.target) if gamma_node is not None else torch.ones_like(mean)
    beta = traced.tensor(beta_node.target) if beta_node is not None else torch.zeros_like(mean)
    bias_node = layer.args[2] if len(layer.args) > 2 else None
    bias = traced.tensor(bias_node.target) if bias_node is not None else torch.zeros_like(mean)
    # In float64: the folded network must differ from the original by float32 rounding only.
    factor = gamma.double() / torch.sqrt(variance.double() + eps)
    folded_weight: Tensor = (weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))).float()
    folded_bias: Tensor = ((bias.double() - mean.double()) * factor + beta.double()).float()
    traced.set_tensor(weight_name, folded_weight)
    give_bias(traced, name, [layer], folded_bias)
    traced.statistics[name] = ChannelStatistics(beta.clone(), gamma.abs())
    for user in list(norm.users):
        user.replace_all_uses_with(layer)
        traced.graph.erase_node(user)
    traced.graph.erase_node(norm)
