"""The Lagrangian bound of a program: proof of how good a plan can be that needs to trust no solver.

For multipliers ``m >= 0``, one a budget, charge each choice for what it uses and forget the budgets ::

    L(m) = fixed + sum_u min_k (cost[u, k] + m . use[u, k]) + sum_pairs min_ab (cost[a, b] + m . use[a, b]) - m . spare

Any plan inside the budgets costs at least ``L(m)``, whatever ``m`` (weak duality), so the largest ``L`` met is a bound.
``L`` is concave; the ellipsoid method climbs it, which converges in any number of dimensions and needs subgradients
only (Yudin, Nemirovski 1976; Grötschel, Lovász, Schrijver, "Geometric Algorithms", 1988); in one dimension it is
bisection. Forcing unit ``u`` to choice ``k`` raises the bound by how far ``k`` lies above the unit's minimum: where
that exceeds a known plan's objective, no better plan holds ``k`` (reduced-cost fixing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.allocation.program import Picks, Program

__all__ = ["Relaxation", "relax"]

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What the relaxation proves.

    Attributes:
        bound: no plan inside the budgets has a smaller objective; inf where there is provably none.
        raised: float64 [U, K], the same bound for plans with that choice; inf where a unit has fewer choices.
        candidates: plans inside the budgets met on the way, the best last; not proven to be good.
    """

    bound: float
    raised: Vector
    candidates: tuple[Picks, ...]

    def within(self, objective: float, noise: float) -> list[NDArray[np.intp]]:
        """Choices [K'_unit] of every unit that a plan no worse than ``objective`` can hold."""
        return [np.flatnonzero(row <= objective + noise) for row in self.raised]


class _Lagrangian:
    """The arrays of ``L``: units [1 + Q, U, K], pairs [1 + Q, P, K, K], spare [Q]; quantity 0 is the objective."""

    def __init__(self, program: Program) -> None:
        names = list(program.budgets)
        self.fixed = program.fixed.get(program.objective, 0.0)
        self.absent = np.isinf(program.table(program.objective, np.inf))
        self.units = np.stack([program.table(name, 0.0) for name in (program.objective, *names)])
        self.spare = np.array([program.limit(name) - program.fixed.get(name, 0.0) for name in names])
        self.first, self.second, self.pairs = self._pairs(program, [program.objective, *names])
        # Rows of one magnitude, so that one step length suits all multipliers.
        self.scale = np.maximum(np.abs(self.units[1:]).max(axis=(1, 2), initial=0.0), 1e-300)
        self.units[1:] /= self.scale[:, None, None]
        self.pairs[1:] /= self.scale[:, None, None, None]
        self.spare = self.spare / self.scale
        self.sizes = np.abs(self.units).max(axis=2).sum(axis=1)
        self.sizes += np.abs(self.pairs).max(axis=(2, 3), initial=0.0).sum(axis=1)

    def _pairs(self, program: Program, names: list[str]) -> tuple[NDArray[np.intp], NDArray[np.intp], Vector]:
        ends = sorted({(pair.first, pair.second) for pair in program.pairs})
        where = {end: number for number, end in enumerate(ends)}
        width = self.absent.shape[1]
        pairs = np.zeros((len(names), len(ends), width, width))
        for pair in program.pairs:
            rows, columns = pair.costs.shape
            # The last row and column again instead of a filler: no minimum over them changes.
            padded = np.pad(pair.costs, ((0, width - rows), (0, width - columns)), mode="edge")
            for number, name in enumerate(names):
                if name == pair.quantity:
                    pairs[number, where[pair.first, pair.second]] += padded
        index = np.array(ends, dtype=np.intp).reshape(-1, 2)
        return index[:, 0], index[:, 1], pairs

    def at(self, multipliers: Vector) -> tuple[float, Vector, NDArray[np.intp]]:
        """Value, supergradient [Q] and picks [U] at ``multipliers`` [Q]."""
        weights = np.concatenate([[1.0], multipliers])
        costs = np.tensordot(weights, self.units, axes=1)
        costs[self.absent] = np.inf
        picks = costs.argmin(axis=1)
        every = np.arange(len(picks))
        use = self.units[1:, every, picks].sum(axis=1)
        value = float(self.fixed + costs[every, picks].sum() - multipliers @ self.spare)
        if len(self.first):
            joint = np.tensordot(weights, self.pairs, axes=1).reshape(len(self.first), -1)
            cell = joint.argmin(axis=1)
            value += float(joint[np.arange(len(cell)), cell].sum())
            used = self.pairs[1:].reshape(len(self.spare), *joint.shape)
            use = use + used[:, np.arange(len(cell)), cell].sum(axis=1)
        return value, use - self.spare, picks

    def raised(self, multipliers: Vector) -> tuple[float, Vector]:
        """The bound at ``multipliers``, pairs folded into units as far as they go, and [U, K] with a choice forced."""
        weights = np.concatenate([[1.0], multipliers])
        costs = np.tensordot(weights, self.units, axes=1)
        if len(self.first):
            joint = np.tensordot(weights, self.pairs, axes=1)
            row = joint.min(axis=2)
            np.add.at(costs, self.first, row)
            np.add.at(costs, self.second, (joint - row[:, :, None]).min(axis=1))
        costs[self.absent] = np.inf
        smallest = costs.min(axis=1)
        bound = float(self.fixed + smallest.sum() - multipliers @ self.spare)
        return bound, bound + (costs - smallest[:, None])

    def worst(self) -> float:
        """No plan has a larger objective."""
        present = np.where(self.absent, -np.inf, self.units[0])
        return float(self.fixed + present.max(axis=1).sum() + self.pairs[0].max(axis=(1, 2)).sum())

    def noise(self, multipliers: Vector) -> float:
        """What rounding may do to the value at ``multipliers``: parts may cancel, or be lost beside large ones."""
        return 1e-12 * float(abs(self.fixed) + self.sizes[0] + multipliers @ (self.sizes[1:] + np.abs(self.spare)))

    def reach(self, worst: float) -> Vector:
        """Sizes [Q] of a box that holds the best multipliers, or nearly: any multipliers give a valid bound."""
        least = np.where(self.absent, np.inf, self.units[1:]).min(axis=2).sum(axis=1)
        slack = np.maximum(self.spare - least, 1e-4 * (np.abs(self.spare) + 1e-6))
        value, _, _ = self.at(np.zeros(len(self.spare)))
        return np.maximum(worst - value, 1e-12 * abs(worst) + 1e-300) / slack * 2 * max(len(slack), 1)

    def use(self, picks: NDArray[np.intp]) -> tuple[float, Vector]:
        """Objective without its fixed part, and use [Q], of a plan."""
        totals = self.units[:, np.arange(len(picks)), picks].sum(axis=1)
        if len(self.first):
            totals = totals + self.pairs[:, np.arange(len(self.first)), picks[self.first], picks[self.second]].sum(1)
        return float(totals[0]), totals[1:]


def relax(program: Program, *, steps: int = 2000) -> Relaxation:
    """Maximise the Lagrangian bound of ``program``.

    Pairs may have costs of any sign; the bound is tightest for a program that
    :func:`compress.allocation.reduction.fold` has been through.
    """
    lagrangian = _Lagrangian(program)
    count = len(lagrangian.spare)
    worst = lagrangian.worst()
    bound, best = -np.inf, np.zeros(count)
    cheapest = np.inf
    candidates: list[Picks] = []
    search = _Ellipsoid(lagrangian.reach(worst))
    for _ in range(steps):
        low = int(search.centre.argmin()) if count else 0
        if count and search.centre[low] < 0:
            # Outside the quadrant: cut off everything on the wrong side of the axis.
            search.cut(np.eye(count)[low], -float(search.centre[low]))
            continue
        multipliers = search.centre.copy()
        value, gradient, picks = lagrangian.at(multipliers)
        if value > bound:
            bound, best = value, multipliers
        if value > worst + 1e-9 * abs(worst) + lagrangian.noise(multipliers):
            return Relaxation(np.inf, np.full(lagrangian.absent.shape, np.inf), ())
        objective, use = lagrangian.use(picks)
        if objective < cheapest and (use <= lagrangian.spare).all():
            cheapest = objective
            candidates.append(tuple(int(pick) for pick in picks))
        # Nothing in the ellipsoid is better than the best by more than rounding.
        if value + search.rise(gradient) <= bound + 1e-13 * abs(bound):
            break
        search.cut(gradient, bound - value)
    return Relaxation(*lagrangian.raised(best), tuple(candidates))


class _Ellipsoid:
    """Where the best multipliers [Q] may still be: ``{centre + z, z @ inverse(shape) @ z <= 1}``."""

    def __init__(self, box: Vector) -> None:
        self.centre = box / 2
        self.shape = np.diag(box * box / 4) * len(box)

    def rise(self, direction: Vector) -> float:
        """The largest ``direction @ z``."""
        return math.sqrt(max(float(direction @ self.shape @ direction), 0.0))

    def cut(self, direction: Vector, depth: float) -> None:
        """Shrink to the smallest ellipsoid around ``direction @ z >= depth``, with ``depth >= 0``."""
        count, rise = len(direction), self.rise(direction)
        alpha = min(depth / rise, 1.0) if rise > 0 else 1.0
        step = self.shape @ direction / rise if rise > 0 else np.zeros(count)
        self.centre = self.centre + (1 + count * alpha) / (count + 1) * step
        if count == 1:
            self.shape = self.shape * ((1 - alpha) / 2) ** 2
        else:
            shape = self.shape - 2 * (1 + count * alpha) / ((count + 1) * (1 + alpha)) * np.outer(step, step)
            self.shape = count**2 / (count**2 - 1) * (1 - alpha**2) * shape
