"""Smaller programs with the same best plans: what is dropped before a solver sees it, and why that is exact.

- A choice that breaks a budget even when every other unit takes its cheapest can be in no plan.
- A choice is dominated when another of its unit costs no more in the objective and in every budget and is the same in
  every pair: swapping it in makes no plan worse. Only for the best plan: the second best may well hold it.
- A pair's costs are split into what one unit's choice pays whatever the other does and a rest,
  ``pair[a, b] = row[a] + column[b] + rest[a, b]`` with ``rest >= 0`` and a zero in every column; rows and columns go
  to the units. Plans cost what they did, and pairs with nothing left disappear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compress.allocation.program import Pair, Picks, Program

__all__ = ["Reduced", "affordable", "fold", "restrict", "undominated"]


@dataclass(frozen=True, eq=False)
class Reduced:
    """A program whose choices are some of another's: ``original`` holds their numbers there, int [K_unit] a unit."""

    program: Program
    original: tuple[NDArray[np.intp], ...]

    @classmethod
    def whole(cls, program: Program) -> Reduced:
        """All of ``program``, its pairs folded."""
        return cls(fold(program), tuple(np.arange(program.size(unit)) for unit in range(len(program.costs))))

    def keep(self, kept: Sequence[NDArray[np.intp]]) -> Reduced:
        """With only the choices ``kept``, numbered as here."""
        original = tuple(numbers[keep] for numbers, keep in zip(self.original, kept, strict=True))
        return Reduced(fold(restrict(self.program, kept)), original)

    def outward(self, picks: Sequence[int]) -> Picks:
        """The original numbers of ``picks``."""
        return tuple(int(numbers[pick]) for numbers, pick in zip(self.original, picks, strict=True))

    def inward(self, picks: Sequence[int]) -> Picks | None:
        """The numbers here of original ``picks``, or None if one of them was dropped."""
        found = [np.flatnonzero(numbers == pick) for numbers, pick in zip(self.original, picks, strict=True)]
        return tuple(int(where[0]) for where in found) if all(len(where) for where in found) else None


def restrict(program: Program, kept: Sequence[NDArray[np.intp]]) -> Program:
    """``program`` with only the choices ``kept``, one int array [K'_unit] a unit; the rest is numbered anew."""
    costs = tuple(
        {name: array[keep] for name, array in unit.items()} for unit, keep in zip(program.costs, kept, strict=True)
    )
    pairs = tuple(replace(p, costs=p.costs[np.ix_(kept[p.first], kept[p.second])]) for p in program.pairs)
    return replace(program, costs=costs, pairs=pairs)


def fold(program: Program) -> Program:
    """``program`` with only what really depends on two units left in its pairs, and none of it below zero."""
    costs = [dict(unit) for unit in program.costs]
    pairs: list[Pair] = []
    for pair in program.pairs:
        row = pair.costs.min(axis=1)
        rest = pair.costs - row[:, None]
        column = rest.min(axis=0)
        rest = rest - column
        costs[pair.first][pair.quantity] = costs[pair.first][pair.quantity] + row
        costs[pair.second][pair.quantity] = costs[pair.second][pair.quantity] + column
        if rest.any():
            pairs.append(replace(pair, costs=rest))
    return replace(program, costs=tuple(costs), pairs=tuple(pairs))


def affordable(program: Program) -> list[NDArray[np.intp]]:
    """Choices of every unit that fit when all others take their cheapest; for a folded program. May be empty."""
    fits = [np.ones(program.size(unit), dtype=bool) for unit in range(len(program.costs))]
    for name in program.budgets:
        table = program.table(name, np.inf)
        smallest = table.min(axis=1)
        spare = program.limit(name) - program.fixed.get(name, 0.0) - smallest.sum()
        # The sum above is rounded: what is over by no more than that stays in and the solver decides.
        spare += 1e-12 * (np.abs(smallest).sum() + abs(program.limit(name)))
        for unit, fit in enumerate(fits):
            fit &= program.costs[unit][name] - smallest[unit] <= spare
    return [np.flatnonzero(fit) for fit in fits]


def undominated(program: Program) -> list[NDArray[np.intp]]:
    """Choices of every unit that no other choice of it dominates; of equal ones the first."""
    tables = np.stack([program.table(name, np.inf) for name in program.used])
    signature = _pair_classes(program, tables.shape[2])
    width = tables.shape[2]
    beaten = np.zeros(tables.shape[1:], dtype=bool)
    for other in range(width):
        cost = tables[:, :, other, None]
        no_worse = (cost <= tables).all(axis=0) & (signature == signature[:, other, None])
        strictly = (cost < tables).any(axis=0)
        # Of two equal choices the earlier one stays.
        beaten |= no_worse & (strictly | (np.arange(width) > other))
    return [np.flatnonzero(~beaten[unit, : program.size(unit)]) for unit in range(len(program.costs))]


def _pair_classes(program: Program, width: int) -> NDArray[np.intp]:
    """Numbers [U, K]: two choices of a unit have the same one if every pair treats them alike."""
    rows: list[list[NDArray[np.float64]]] = [[] for _ in program.costs]
    for pair in program.pairs:
        if pair.quantity in program.used:
            rows[pair.first].append(pair.costs)
            rows[pair.second].append(pair.costs.T)
    classes = np.zeros((len(program.costs), width), dtype=np.intp)
    for unit, matrices in enumerate(rows):
        if matrices:
            _, inverse = np.unique(np.concatenate(matrices, axis=1), axis=0, return_inverse=True)
            classes[unit, : program.size(unit)] = inverse.reshape(-1)
    return classes
