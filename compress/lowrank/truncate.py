"""A decomposed model cut to smaller footprints without training, by greedy search (arXiv 2308.14929, deployment).

Order within a layer was learned (or is that of its energies); order between layers is not, so every step asks on one
batch which layer's next cut costs least for what it saves.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.lowrank.decompose import decomposed_layers
from compress.lowrank.factors import rank_by_energy, rank_by_threshold
from compress.lowrank.layers import LowRankConv2d, LowRankLayer, Positions

__all__ = ["Member", "count_positions", "cut_to", "model_macs", "next_rank", "ranks_by_rule", "truncation_path"]


@dataclass(frozen=True)
class Member:
    """One size of the family: components by layer, MACs a sample, loss on the batch."""

    ranks: dict[str, int]
    macs: int
    loss: float


def cut_to(layers: Mapping[str, LowRankLayer], ranks: Mapping[str, int]) -> AbstractContextManager[object]:
    """Cut ``layers`` to ``ranks``: under ``with`` while the block runs, called plainly until the next call.

    Raises:
        ValueError: there is no such layer, or it has no such rank; nothing is cut then.
    """
    for name, rank in ranks.items():
        if name not in layers:
            raise ValueError(f"no decomposed layer {name!r}; there are {', '.join(list(layers)[:8])}")
        if not 0 <= rank <= layers[name].rank:
            raise ValueError(f"layer {name}: rank {rank}, allowed are 0 to {layers[name].rank}")
    before = {name: layers[name].active for name in ranks}

    def put_back() -> None:
        for name, rank in before.items():
            layers[name].active = rank

    for name, rank in ranks.items():
        layers[name].active = rank
    block = ExitStack()
    block.callback(put_back)
    return block


@torch.no_grad()
def count_positions(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Positions]:
    """By layer, decomposed or not: positions a sample, all its calls together."""
    found: dict[str, Positions] = {}
    hooks = []

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(layer, LowRankConv2d | nn.Conv2d):
                repeats = len(output) // len(inputs[0]) if output.dim() == 4 else 1
                high, wide = output.shape[-2:]
                here = Positions(repeats * high * wide, repeats * high * arguments[0].shape[-1])
            else:
                rows = output.numel() // output.shape[-1] // len(inputs[0])
                here = Positions(rows, rows)
            found[name] = found.get(name, Positions(0, 0)) + here

        return count

    for name, child in module.named_modules():
        if isinstance(child, LowRankLayer | nn.Linear | nn.Conv2d):
            hooks.append(child.register_forward_hook(hook_of(name)))
    training = module.training
    module.eval()
    try:
        module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        module.train(training)
    return found


def model_macs(module: nn.Module, positions: Mapping[str, Positions], ranks: Mapping[str, int] | None = None) -> int:
    """MACs a sample of all layers, each in the form it is extracted to; ``ranks`` instead of the layers' own."""
    total = 0
    for name, child in module.named_modules():
        if name not in positions:
            continue
        if isinstance(child, LowRankLayer):
            total += child.macs((ranks or {}).get(name, child.rank), positions[name])
        elif isinstance(child, nn.Linear | nn.Conv2d):
            total += child.weight.numel() * positions[name].output
    return total


def next_rank(rank: int, saving: float, factor: float) -> int:
    """The rank that a cut goes to: ``factor`` of ``rank``, or of ``saving``, where two layers cost what one does."""
    return max(math.ceil(min(rank, saving) * factor) - 1, 1)


def truncation_path(
    module: nn.Module,
    loss: Callable[[], float],
    positions: Mapping[str, Positions],
    *,
    smallest: int,
    factor: float = 0.85,
    progress: Callable[[int, int], None] = lambda macs, smallest: None,
) -> list[Member]:
    """Members from the whole model down to at most ``smallest`` MACs, each one cut away from the one before.

    Args:
        module: in evaluation mode; left whole.
        loss: of the module as it is cut when called, on one batch, without gradients.
        positions: from :func:`count_positions`.
        smallest: where to stop; earlier when nothing is left to cut.
        factor: a cut goes to this share of the rank; the first one below the rank at which two layers save anything.
    """
    if not 0 < factor < 1:
        raise ValueError(f"factor {factor:g}: between 0 and 1")
    layers = {name: layer for name, layer in decomposed_layers(module).items() if name in positions}
    ranks = {name: layer.rank for name, layer in layers.items()}

    def loss_with(name: str, rank: int) -> float:
        layers[name].active = rank
        try:
            return loss()
        finally:
            layers[name].active = ranks[name]

    def offer(name: str, now: float, turn: int) -> tuple[float, int, str, int, float]:
        rank = next_rank(ranks[name], layers[name].saving_rank(positions[name]), factor)
        saved = layers[name].macs(ranks[name], positions[name]) - layers[name].macs(rank, positions[name])
        after = loss_with(name, rank)
        rise = after - now if math.isfinite(after) else math.inf
        return (rise / max(saved, 1), turn, name, rank, after)

    try:
        now, macs, turn = loss(), model_macs(module, positions), 0
        path = [Member(dict(ranks), macs, now)]
        offers = [offer(name, now, turn) for name in layers if ranks[name] > 1]
        heapq.heapify(offers)
        while macs > smallest and offers:
            _, asked, name, rank, after = heapq.heappop(offers)
            if asked != turn:  # measured before the last cut: once more, and back among the others
                heapq.heappush(offers, offer(name, now, turn))
                continue
            layers[name].active = ranks[name] = rank
            turn += 1
            now, macs = after, model_macs(module, positions, ranks)
            path.append(Member(dict(ranks), macs, now))
            progress(macs, smallest)
            if rank > 1:
                heapq.heappush(offers, offer(name, now, turn))
        return path
    finally:
        for layer in layers.values():
            layer.active = None


def ranks_by_rule(
    energies: Mapping[str, Tensor], *, energy: float | None = None, threshold: float | None = None
) -> dict[str, int]:
    """Each layer's rank from the energies of its own components, without looking at the others.

    Args:
        energies: by layer, [R], non-increasing.
        energy: the smallest ranks that hold this share, 0 to 1, of the energy.
        threshold: components at least this share, 0 to 1, of their layer's first in length (root of energy).

    Raises:
        ValueError: it is not exactly one rule, or its number is out of range.
    """
    if (energy is None) == (threshold is None):
        raise ValueError("one rule is needed: energy or threshold, not both")
    name, value = ("energy", energy) if threshold is None else ("threshold", threshold)
    if value is None or not 0 < value <= 1:
        raise ValueError(f"{name} {value}: above 0, up to 1")
    rank_of = rank_by_energy if threshold is None else rank_by_threshold
    return {layer: rank_of(each, value) for layer, each in energies.items()}
