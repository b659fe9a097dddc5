"""Ranks a layer may be cut to, and the two thin layers that it becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.errors import InputError
from compress.records.layers import LayerSpec, Split

__all__ = ["SHARES", "check_shares", "layers_of", "thin_layers", "thin_ranks"]

SHARES = (0.25, 0.5)
"""Of a layer's MACs: the ranks that are tried where none are named."""

# Integer kernels work on so many channels at a time.
_STEP = 8


def check_shares(shares: Sequence[float]) -> None:
    """Refuse shares of a layer's MACs that are none.

    Raises:
        InputError: with what is allowed.
    """
    for share in shares:
        if not 0 < share < 1:
            raise InputError(f"--ranks {share:g}: each is a share of the layer's MACs, between 0 and 1")


def thin_ranks(layer: LayerSpec, shares: Sequence[float]) -> tuple[int, ...]:
    """The ranks at which two thin layers do ``shares`` of the MACs of ``layer``; none where it cannot be cut.

    From two steps of the kernels on they are rounded down to whole ones.
    """
    if Split(layer=layer.name, rank=1).refusal(layer):
        return ()
    outputs, inputs = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
    found = []
    for share in shares:
        rank = int(share * outputs * inputs / (outputs + inputs))
        rank = rank // _STEP * _STEP if rank >= 2 * _STEP else rank
        if 1 <= rank < min(outputs, inputs):
            found.append(rank)
    return tuple(dict.fromkeys(found))


def layers_of(layers: Sequence[LayerSpec], splits: Sequence[Split]) -> tuple[LayerSpec, ...]:
    """The layers that a model has when ``splits`` are done, in execution order."""
    ranks = {split.layer: split for split in splits}
    found: list[LayerSpec] = []
    for layer in layers:
        split = ranks.get(layer.name)
        if split is None:
            found.append(layer)
        elif split.form == "factors":
            found += thin_layers(layer, split.rank)
        else:
            down, up = thin_layers(layer, split.rank)
            found += (down, layer, up)
    return tuple(found)


def thin_layers(layer: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
    """What ``layer`` becomes at ``rank``."""
    outputs = layer.weight_shape[0]
    inputs = math.prod(layer.weight_shape[1:])
    down, up = (rank, *layer.weight_shape[1:]), (outputs, rank, *[1] * (len(layer.weight_shape) - 2))
    parts = ((f"{layer.name}.down", down, rank * inputs), (f"{layer.name}.up", up, rank * outputs))
    first, second = (
        layer.model_copy(update={"name": name, "weight_shape": shape, "macs": weights * layer.rows})
        for name, shape, weights in parts
    )
    return first.model_copy(update={"activation": None}), second
