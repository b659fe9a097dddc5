"""Decomposed layers ordered by what each component does on data, convolutions in the unrolling that loses less."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.calib.gram import Gram, rows_of
from compress.errors import InputError
from compress.lowrank.decompose import replace_layer
from compress.lowrank.factors import Factors, plain_factors, weighted_factors
from compress.lowrank.layers import LowRankConv2d, LowRankLayer, Positions, SpatialConv2d
from compress.lowrank.unroll import output_error, spatial_factors
from compress.progress import Progress

__all__ = ["UNROLLINGS", "order_layers"]

UNROLLINGS = ("best", "channel", "spatial")
_GRAM_ROWS = 64 * 1024
_BATCH = 128
_SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)


@torch.no_grad()
def order_layers(
    layers: dict[str, LowRankLayer],
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    positions: Mapping[str, Positions],
    progress: Progress,
    *,
    weighted: bool = True,
    unrolling: str = "best",
) -> dict[str, Tensor]:
    """Give every layer the factors that are best for its inputs, as the module feeds them.

    Linears and convolutions in the channel unrolling get the optimum at every rank; the spatial one gets an
    approximation (:func:`~compress.lowrank.unroll.spatial_factors`). Which of the two a convolution is left in is
    decided by the squared error of its outputs, exact for both, as a geometric mean over equal shares of its MACs.

    Args:
        layers: of ``module``, decomposed, convolutions in the channel unrolling; replaced in both where the spatial one
            is better.
        positions: from :func:`~compress.lowrank.truncate.count_positions`.
        weighted: False: by the weights' own singular values, errors those of the weights; ``inputs`` are not looked at.
        unrolling: of convolutions: "channel", "spatial", or the better.

    Returns:
        By layer, the energy of each component.

    Raises:
        InputError: ``unrolling`` is unknown.
    """
    if unrolling not in UNROLLINGS:
        raise InputError(f"--unrolling {unrolling}: known are {', '.join(UNROLLINGS)}")
    grams = _grams(layers, module, inputs, progress) if weighted else {}
    energies = {}
    for number, (name, layer) in enumerate(list(layers.items())):
        gram = grams[name].matrix()[0] if name in grams else None
        weight = layer.weight()
        matrix = weight.flatten(1)
        found = plain_factors(matrix) if gram is None else weighted_factors(matrix, gram)
        if isinstance(layer, LowRankConv2d) and unrolling != "channel" and layer.kernel != (1, 1):
            dense = layer.dense()
            across = spatial_factors(weight, gram)
            spatial = SpatialConv2d.of(dense, across).train(layer.training)
            channel = LowRankConv2d.of(dense, found)
            at = positions.get(name, Positions(1, 1))
            if unrolling == "spatial" or _score(spatial, weight, gram, at) < _score(channel, weight, gram, at):
                replace_layer(module, name, spatial)
                layers[name], found = spatial, across
        _fill(layers[name], found)
        energies[name] = found.energy
        progress("decomposing", number + 1, len(layers))
    return energies


def _grams(
    layers: Mapping[str, LowRankLayer], module: nn.Module, inputs: tuple[Tensor, ...], progress: Progress
) -> dict[str, Gram]:
    """By layer, those that were called: second moments of their inputs."""
    grams: dict[str, Gram] = {name: Gram() for name in layers}
    seen = dict.fromkeys(layers, 0)
    hooks = [layer.register_forward_pre_hook(_watch(grams, seen, name)) for name, layer in layers.items()]
    try:
        batches = torch.arange(len(inputs[0])).split(_BATCH)
        for number, index in enumerate(batches):
            module(*(x[index] for x in inputs))
            progress("gram matrices", number + 1, len(batches))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram for name, gram in grams.items() if seen[name]}


def _watch(grams: dict[str, Gram], seen: dict[str, int], name: str) -> Callable[[nn.Module, Any], None]:
    def watch(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if seen[name] >= _GRAM_ROWS:
            return
        x = arguments[0]
        if isinstance(layer, LowRankConv2d):
            settings = [_pair(layer.settings[key]) for key in ("stride", "padding", "dilation")]
            rows = rows_of(x, layer.kernel, 1, *settings)
        else:
            rows = x.reshape(1, -1, x.shape[-1])
        grams[name].update(rows)
        seen[name] += rows.shape[1]

    return watch


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        raise InputError(f"padding={value!r}: give it in numbers")
    return (value, value) if isinstance(value, int) else tuple(value)


def _fill(layer: LowRankLayer, factors: Factors) -> None:
    layer.up.data, layer.down.data = factors.up.clone(), factors.down.reshape(layer.down.shape).clone()


def _score(layer: LowRankLayer, weight: Tensor, gram: Tensor | None, positions: Positions) -> float:
    """Mean logarithm of the relative squared error over shares of the dense layer's MACs."""
    whole = max(output_error(weight, gram), 1e-30)
    total = 0.0
    for share in _SHARES:
        rank = min(math.floor(share * layer.saving_rank(positions)), layer.rank)
        total += math.log(max(output_error(weight - layer.weight(rank), gram) / whole, 1e-12))
    return total / len(_SHARES)
