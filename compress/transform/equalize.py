"""Cross-layer equalisation: give the channels between two layers like ranges, so that one grid serves them all.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721,
section 4.1). For two layers joined by a positively homogeneous f (``f(s x) = s f(x)`` for ``s > 0``: nothing, ReLU,
pools, moves of the layout), dividing output channel i of the first by ``s_i`` and multiplying input channel i of the
second by it leaves the function as it is. With ``r1_i`` and ``r2_i`` the largest magnitudes of those channels' weights,

    s_i = sqrt(r1_i r2_i) / r2_i    makes both ranges    sqrt(r1_i r2_i).

A layer of the middle of a chain belongs to two pairs, so the pairs are visited in turn until no factor moves.

It is made for one grid a tensor. With a grid for each output channel the first layer has nothing to gain, and the
second can lose: measure before using it there.

A channel that is constant (weights next to nothing, all in the bias: a dead channel after folding BatchNorm) would be
blown up to give those weights a range, and its bias would widen the grid of every channel beside it. Such a channel is
scaled no further than the largest bias of its layer.

ReLU6 is not homogeneous: the scaled channel would have to be cut at ``6 / s_i``, and a limit for each channel is not
an activation that integer runtimes fuse. By default a ReLU6 therefore ends a chain. ``relu6="replace"`` first makes
it a ReLU: another function, and one that a network may not survive, see :func:`prepare`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from compress.errors import InputError
from compress.graph.layers import layer_calls
from compress.graph.traced import ChannelStatistics, TracedModel
from compress.transform.channels import (
    Channels,
    arguments,
    channels_of_input,
    channels_of_output,
    is_relu6,
    pass_through,
)

__all__ = ["equalize", "prepare"]

aten = torch.ops.aten
_CONVERGED = 1e-3
# A channel whose weights are this much smaller than its layer's largest counts as constant.
_CONSTANT = 1e-4


@dataclass(frozen=True)
class _Pair:
    """Two layers to equalise.

    Attributes:
        first: name of the layer whose output channels are divided.
        second: name of the layer whose input channels are multiplied.
        repeat: consecutive input features of ``second`` that come from one channel (H*W after a flatten).
        groups: of ``second``.
        clips: ReLU6 nodes between the two.
    """

    first: str
    second: str
    repeat: int
    groups: int
    clips: tuple[fx.Node, ...]


def equalize(traced: TracedModel, *, iterations: int = 300, relu6: Literal["keep", "replace"] = "keep") -> list[str]:
    """Equalise every pair of layers that allows it, in place; statistics follow their channels.

    Args:
        traced: a folded graph with float weights.
        iterations: most visits to each pair; it ends earlier when no factor differs from 1 by more than 1e-3.
        relu6: "keep" leaves them and the function alone, "replace" calls :func:`prepare` first.

    Returns:
        Sentences for the report: what :func:`prepare` did, then the pairs, then the refusals and why.
    """
    if iterations < 1:
        raise InputError(f"equalisation needs at least one iteration, got {iterations}")
    sentences = prepare(traced, relu6=relu6)
    pairs, refusals = _pairs(traced, through_relu6=False)
    if pairs:
        sentences += _equalize(traced, pairs, iterations)
    return sentences + refusals


def prepare(
    traced: TracedModel, *, relu6: Literal["keep", "replace"] = "keep", iterations: int | None = None
) -> list[str]:
    """Replace the ReLU6 between pairs of layers by ReLU, if ``relu6`` is "replace"; return sentences for the report.

    This changes the function wherever a value exceeds 6, by how much depends on the network: compare the two on data.
    MobileNetV1 0.25, trained to use the limit, falls from 57.8 % to 9.2 % of 500 ImageNet images by this alone.
    Only what would otherwise keep a pair apart is replaced. ``iterations`` is :func:`equalize`'s and has no effect.
    """
    if relu6 not in ("keep", "replace"):
        raise InputError(f"unknown treatment of ReLU6 {relu6!r}; known: keep, replace")
    if relu6 == "keep":
        return []
    pairs, _ = _pairs(traced, through_relu6=True)
    clips = [clip for pair in pairs for clip in pair.clips]
    for clip in clips:
        clip.target, clip.args = aten.relu.default, clip.args[:1]
    traced.finish()
    if not clips:
        return []
    return [f"{len(clips)} ReLU6 became ReLU so that their layers can be equalised: values above 6 are no longer cut"]


def _pairs(traced: TracedModel, through_relu6: bool) -> tuple[list[_Pair], list[str]]:
    """Pairs in execution order, and why other layers have no partner."""
    # A tensor may have several get_attr nodes, so readers are counted by its name.
    readers: Counter[str] = Counter()
    for node in traced.graph.find_nodes(op="get_attr"):
        readers[str(node.target)] += len(node.users)
    calls = layer_calls(traced)
    layers = {nodes[0]: name for name, nodes in calls.items()}
    refused = {name: _refusal(nodes, readers) for name, nodes in calls.items()}
    pairs: list[_Pair] = []
    reasons: dict[str, list[str]] = {}
    for call, name in layers.items():
        found = refused[name] or _partner(call, layers, refused, through_relu6)
        if isinstance(found, str):
            reasons.setdefault(found, []).append(name)
        else:
            pairs.append(found)
    return pairs, [f"not equalised with what follows: {', '.join(names)}: {why}" for why, names in reasons.items()]


def _refusal(calls: list[fx.Node], readers: Counter[str]) -> str | None:
    """Why a layer's own tensors must not be scaled."""
    if len(calls) > 1:
        return f"it is called {len(calls)} times"
    for tensor in arguments(calls[0])[1:3]:
        if tensor is not None and tensor.op != "get_attr":
            return "its bias is computed"
        if tensor is not None and readers[tensor.target] > 1:
            return f"{tensor.target} is also read elsewhere"
    return None


def _partner(
    call: fx.Node, layers: dict[fx.Node, str], refused: dict[str, str | None], through_relu6: bool
) -> _Pair | str:
    """Follow the output of ``call`` to the layer that alone reads it, or say what stands in the way."""
    value = call
    clips: list[fx.Node] = []
    channels = channels_of_output(call)
    while True:
        # The batch size of a value is no reading of its numbers.
        users = [user for user in value.users if user.target is not aten.sym_size.int]
        if len(users) != 1:
            return f"{value.name} is read {len(users)} times" if users else f"nothing reads {value.name}"
        (user,) = users
        if user.op == "output":
            return f"{value.name} is an output of the model"
        if user in layers:
            name = layers[user]
            if refused[name]:
                return f"{name} reads it, and {refused[name]}"
            if arguments(user)[0] is not value or channels != channels_of_input(user, channels.repeat):
                return f"{name} mixes its channels"
            return _Pair(layers[call], name, channels.repeat, _groups(user), tuple(clips))
        if is_relu6(user):
            if not through_relu6:
                return "a ReLU6 follows, which is not homogeneous"
            clips.append(user)
        else:
            step: Channels | str = pass_through(user, value, channels)
            if isinstance(step, str):
                return step
            channels = step
        value = user


def _equalize(traced: TracedModel, pairs: list[_Pair], iterations: int) -> list[str]:
    calls = {name: nodes[0] for name, nodes in layer_calls(traced).items()}
    names = dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second))
    # Rounded to the weight's own type once, at the end: factors of many visits would add up their rounding.
    weights = {name: traced.tensor(str(arguments(calls[name])[1].target)).double() for name in names}
    total = [torch.ones(len(weights[pair.first]), dtype=torch.float64) for pair in pairs]
    floors = [_floor(weights[pair.first], _bias(traced, calls[pair.first])) for pair in pairs]
    start = [_imbalance(weights, pair) for pair in pairs]
    for _ in range(iterations):
        change = 0.0
        for pair, factors, floor in zip(pairs, total, floors, strict=True):
            factor = torch.maximum(_factors(weights, pair), floor / factors)
            weights[pair.first] = _scale_outputs(weights[pair.first], 1 / factor)
            weights[pair.second] = _scale_inputs(weights[pair.second], factor, pair)
            factors *= factor
            change = max(change, float((factor - 1).abs().max()))
        if change <= _CONVERGED:
            break
    for name, weight in weights.items():
        _store(traced, arguments(calls[name])[1], weight)
    for pair, factors in zip(pairs, total, strict=True):
        _follow(traced, pair.first, calls[pair.first], factors)
    sentences = []
    for pair, factors, floor, before in zip(pairs, total, floors, start, strict=True):
        held = int((factors <= floor * (1 + _CONVERGED)).sum())
        sentences.append(
            f"{pair.first} and {pair.second} are equalised: their ranges differed by up to {float(before.max()):.3g} "
            f"times in a channel" + (f"; {held} constant channels are held back by their bias" if held else "")
        )
    if change > _CONVERGED:
        sentences.append(f"equalisation stopped after {iterations} iterations, factors still moving by {change:.2g}")
    return sentences


def _factors(weights: dict[str, Tensor], pair: _Pair) -> Tensor:
    """``s`` [C] of one visit, 1 for a channel that has no weights on one of the sides."""
    factor = torch.sqrt(_output_range(weights[pair.first]) / _input_range(weights[pair.second], pair))
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))


def _floor(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Smallest total factor [O] for the output channels of ``weight``; 0 but for constant channels."""
    ranges = _output_range(weight)
    if bias is None:
        return torch.zeros_like(ranges)
    size = bias.abs().double()
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(ranges < _CONSTANT * ranges.max(), size / size.max().clamp_min(tiny), torch.zeros_like(ranges))


def _groups(call: fx.Node) -> int:
    return int(arguments(call)[6]) if len(call.args) > 6 else 1


def _imbalance(weights: dict[str, Tensor], pair: _Pair) -> Tensor:
    """Ratio [C] of the two layers' ranges, the larger by the smaller."""
    factor = _factors(weights, pair)
    return torch.maximum(factor, 1 / factor) ** 2


def _output_range(weight: Tensor) -> Tensor:
    """Largest magnitude per output channel of ``weight`` [O, ...]: [O]."""
    return weight.abs().flatten(1).amax(1)


def _by_channel(weight: Tensor, pair: _Pair) -> Tensor:
    """View of ``weight`` [O, I/G, ...] as [G, O/G, C/G, repeat, positions]: group, its outputs, its channels."""
    outputs, inputs = weight.shape[:2]
    positions = math.prod(weight.shape[2:])
    return weight.reshape(pair.groups, outputs // pair.groups, inputs // pair.repeat, pair.repeat, positions)


def _input_range(weight: Tensor, pair: _Pair) -> Tensor:
    """Largest magnitude per channel that ``weight`` [O, I/G, ...] reads: [C]."""
    return _by_channel(weight, pair).abs().amax((1, 3, 4)).flatten()


def _scale_outputs(weight: Tensor, factor: Tensor) -> Tensor:
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _scale_inputs(weight: Tensor, factor: Tensor, pair: _Pair) -> Tensor:
    """``weight`` [O, I/G, ...] with the weights that read channel c times ``factor[c]``."""
    return (_by_channel(weight, pair) * factor.reshape(pair.groups, 1, -1, 1, 1)).reshape(weight.shape)


def _bias(traced: TracedModel, call: fx.Node) -> Tensor | None:
    """The bias that ``call`` adds, [O]."""
    node = (*arguments(call), None)[2]
    return traced.tensor(str(node.target)) if node is not None else None


def _follow(traced: TracedModel, name: str, call: fx.Node, factors: Tensor) -> None:
    """Divide the bias and statistics of layer ``name`` by ``factors`` [O]."""
    bias = _bias(traced, call)
    if bias is not None:
        _store(traced, arguments(call)[2], bias.double() / factors)
    if name in traced.statistics:
        old = traced.statistics[name]
        mean, deviation = ((x.double() / factors).to(x.dtype) for x in (old.mean, old.deviation))
        traced.statistics[name] = ChannelStatistics(mean, deviation)


def _store(traced: TracedModel, node: fx.Node, value: Tensor) -> None:
    """Replace the tensor that the get_attr ``node`` reads by ``value``, in the type it had."""
    name = str(node.target)
    traced.set_tensor(name, value.to(traced.tensor(name).dtype))
    node.meta["val"] = traced.tensor(name)
