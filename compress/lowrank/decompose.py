"""A module's layers replaced by decomposed ones, exactly, and back: module in, module out."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compress.lowrank.attention import attention_refusal, open_attention
from compress.lowrank.factors import break_even
from compress.lowrank.layers import LowRankConv2d, LowRankLayer, LowRankLinear, SpatialConv2d, refusal

__all__ = ["CONVOLUTIONS", "Decomposition", "decompose", "decomposed_layers", "extract", "replace_layer"]

CONVOLUTIONS = {each.unrolling: each for each in (LowRankConv2d, SpatialConv2d)}


@dataclass(frozen=True)
class Decomposition:
    """What was done: decomposed layers by name, and those left dense with the reason."""

    layers: dict[str, LowRankLayer]
    dense: dict[str, str]


def decompose(
    module: nn.Module,
    *,
    ignore: Sequence[str] = (),
    keep_first: int = 0,
    keep_last: bool = False,
    unrolling: str = "channel",
) -> Decomposition:
    """Replace every linear, conv2d and attention projection of ``module`` in place by its full-rank decomposition.

    What it computes stays the same up to rounding (arXiv 2308.14929, section 3: U = P sqrt(S), V = Q sqrt(S)).

    Args:
        module: left in the mode it is in.
        ignore: names to leave dense, as shell patterns.
        keep_first: leave so many leading layers dense.
        keep_last: leave the last layer dense.
        unrolling: of convolutions, "channel" or "spatial" (:mod:`compress.lowrank.unroll`).

    Raises:
        ValueError: a pattern matches nothing, nothing is left to decompose, or ``unrolling`` is unknown.
    """
    if unrolling not in CONVOLUTIONS:
        raise ValueError(f"unknown unrolling {unrolling!r}; known: {', '.join(CONVOLUTIONS)}")
    dense: dict[str, str] = {}
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.MultiheadAttention):
            reason = attention_refusal(child)
            if reason is not None:
                dense[name] = reason
            else:
                replace_layer(module, name, open_attention(child))
    inside = [name for name in dense if name]
    candidates = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | nn.Conv2d) and not any(name.startswith(f"{each}.") for each in inside)
    }
    for pattern in ignore:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in candidates):
            known = ", ".join(list(candidates)[:8])
            raise ValueError(f"{pattern!r} matches no layer; there are {known}{', ...' * (len(candidates) > 8)}")
    shared = _shared_weights(module)
    names = list(candidates)
    layers: dict[str, LowRankLayer] = {}
    for position, (name, child) in enumerate(candidates.items()):
        reason = refusal(child)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            reason = "named to be left dense"
        elif position < keep_first or (keep_last and position == len(names) - 1):
            reason = "first or last, to be left dense"
        elif id(child.weight) in shared:
            reason = "its weight is another module's, too"
        elif reason is None and break_even(child.weight.shape[0], child.weight[0].numel()) <= 1:
            reason = "two layers of rank 1 would cost no less"
        if reason is not None:
            dense[name] = reason
            continue
        layers[name] = LowRankLinear.of(child) if isinstance(child, nn.Linear) else CONVOLUTIONS[unrolling].of(child)
        layers[name].train(child.training)
        replace_layer(module, name, layers[name])
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(dense.items())[:3])
        raise ValueError(f"nothing to decompose: {reasons or 'the model has no linear and no conv2d'}")
    return Decomposition(layers, dense)


def decomposed_layers(module: nn.Module) -> dict[str, LowRankLayer]:
    """Every decomposed layer of ``module`` by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LowRankLayer)}


def extract(module: nn.Module, ranks: Callable[[str, LowRankLayer], int] | None = None) -> dict[str, str]:
    """Replace every decomposed layer in place by ordinary ones: two thin, or one dense where that has fewer weights.

    Args:
        ranks: components to keep of each layer; all without it.

    Returns:
        By name, what became of it.
    """
    done = {}
    for name, layer in decomposed_layers(module).items():
        rank = layer.rank if ranks is None else ranks(name, layer)
        plain = layer.thin(rank) if layer.pays(rank) else layer.dense(rank)
        done[name] = f"rank {rank} of {layer.full_rank}" if layer.pays(rank) else f"dense: rank {rank} would cost more"
        replace_layer(module, name, plain.train(layer.training))
    return done


def replace_layer(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put ``child`` in the place of ``module``'s layer ``name``.

    Raises:
        ValueError: the layer is the module itself.
    """
    if not name:
        raise ValueError("the module is itself one layer; put it into an nn.Sequential")
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, child)


def _shared_weights(module: nn.Module) -> set[int]:
    """Parameters that several modules hold."""
    owners: dict[int, set[int]] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(child))
    return {parameter for parameter, children in owners.items() if len(children) > 1}
