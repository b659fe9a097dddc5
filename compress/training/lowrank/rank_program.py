"""Ranks of all layers at once, by integer program: what ``--search program`` adds to greedy search.

Every layer has a ladder of ranks. What a rank costs is MACs, counted; what it loses is measured: the loss with that
layer alone cut. The program adds these up, which cuts that meet in one model only roughly do: every plan is measured
whole, and of both ways' members those stay that none of fewer MACs equals (:func:`undominated`). On digits each way is
ahead at some sizes: greedy search judges every cut behind those before it, the program looks further than one cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from compress.allocation.program import Program
from compress.allocation.solver import solve
from compress.lowrank.decompose import decomposed_layers
from compress.lowrank.layers import Positions
from compress.lowrank.truncate import Member, cut_to, model_macs, next_rank

__all__ = ["program_path", "rank_ladder", "undominated"]

# Plans between the whole model and the smallest.
_PLANS = 32
_GAP = 1e-3
_SECONDS = 10.0


def rank_ladder(rank: int, saving: float, factor: float) -> list[int]:
    """``rank``, and from below ``saving`` (where two layers cost what one does) down to 1, each ``factor`` of the last.

    They are the ranks that greedy search steps through.
    """
    found = [rank]
    while found[-1] > 1:
        found.append(next_rank(found[-1], saving, factor))
    return found


def program_path(
    module: nn.Module,
    loss: Callable[[], float],
    positions: Mapping[str, Positions],
    *,
    smallest: int,
    factor: float = 0.85,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Member]:
    """Members from the whole model down to ``smallest`` MACs, each the best plan of its own budget.

    Args:
        module: in evaluation mode; left whole.
        loss: of the module as it is cut when called, on one batch, without gradients.
        positions: from :func:`~compress.lowrank.truncate.count_positions`.
        smallest: the last budget; a model that cannot be cut that far ends at the smallest that it can.
        factor: see :func:`rank_ladder`.
        progress: losses measured, of all.
    """
    layers = {name: layer for name, layer in decomposed_layers(module).items() if name in positions}
    whole = model_macs(module, positions)
    path = [Member({name: layer.rank for name, layer in layers.items()}, whole, loss())]
    ladders = {
        name: rank_ladder(layer.rank, layer.saving_rank(positions[name]), factor) for name, layer in layers.items()
    }
    total, done = sum(len(ladder) - 1 for ladder in ladders.values()) + _PLANS, 0

    def measured(ranks: dict[str, int]) -> float:
        nonlocal done
        done += 1
        progress(done, total)
        with cut_to(layers, ranks):
            return loss()

    units = []
    for name, ladder in ladders.items():
        errors = np.array([0.0, *(measured({name: rank}) - path[0].loss for rank in ladder[1:])])
        macs = np.array([model_macs(module, positions, {name: rank}) for rank in ladder], dtype=np.float64)
        usable = np.isfinite(errors)
        ladders[name] = [rank for rank, kept in zip(ladder, usable, strict=True) if kept]
        macs = macs[usable]
        units.append({"error": errors[usable], "macs": macs - macs.min()})
    fixed = whole - sum(float(unit["macs"][0]) for unit in units)
    for limit in np.geomspace(whole, max(min(smallest, whole), 1), _PLANS + 1)[1:]:
        # With every layer at its cheapest exactly ``fixed`` is left: always a plan.
        program = Program(tuple(units), "error", {"macs": max(float(limit), fixed)}, {"macs": fixed})
        picks = solve(program, gap=_GAP, time_limit=_SECONDS).picks
        ranks = {name: ladder[pick] for (name, ladder), pick in zip(ladders.items(), picks, strict=True)}
        if all(ranks != each.ranks for each in path):
            path.append(Member(ranks, model_macs(module, positions, ranks), measured(ranks)))
    progress(total, total)
    return sorted(path, key=lambda each: -each.macs)


def undominated(*paths: Sequence[Member]) -> list[Member]:
    """The members of all ``paths`` that none of fewer MACs equals in loss, by falling MACs; the whole model always."""
    whole = paths[0][0]
    found: list[Member] = []
    for member in sorted((each for path in paths for each in path), key=lambda each: (each.macs, each.loss)):
        if member.ranks != whole.ranks and (not found or member.loss < found[-1].loss):
            found.append(member)
    return [whole, *reversed(found)]
