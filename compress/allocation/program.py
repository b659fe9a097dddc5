"""A choice for every unit under budgets, as numbers alone: what integer-programming bit allocation solves.

With ``x`` the picks, one choice a unit, every quantity ``q`` (error, size, latency) adds up to ::

    total_q(x) = fixed_q + sum_u costs[u][q][x_u] + sum_pairs(q) pair[x_first, x_second]

and the program is: minimise ``total_objective(x)`` with ``total_q(x) <= budget_q`` for every budget. A pair is what
depends on two units at once, such as the conversion between two formats. Nothing here knows of layers or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOLERANCE", "Answer", "Pair", "Picks", "Program"]

TOLERANCE = 1e-9
"""A total may exceed its budget by this part of it: sums of floats are not exact, and budgets are often met exactly."""

Picks = tuple[int, ...]
"""The number of the choice, one a unit."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Cost in ``quantity``, of any sign, for the choices of two units: ``costs`` float64 [K_first, K_second]."""

    first: int
    second: int
    quantity: str
    costs: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Program:
    """Units, their choices, and the budgets.

    Attributes:
        costs: for every unit, quantity -> float64 [K_unit]; all units have the same quantities.
        objective: the quantity to minimise.
        budgets: quantity -> largest total allowed; see :data:`TOLERANCE`.
        fixed: quantity -> what every plan pays; 0 where missing.
        pairs: costs of two units' choices together; several may name the same two units.

    Raises:
        ValueError: no units, a unit without choices, shapes that disagree, unknown quantities, numbers not finite.
    """

    costs: tuple[Mapping[str, NDArray[np.float64]], ...]
    objective: str
    budgets: Mapping[str, float]
    fixed: Mapping[str, float] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if not self.costs:
            raise ValueError("a program needs at least one unit")
        known = set(self.costs[0])
        for name in (self.objective, *self.budgets, *self.fixed):
            if name not in known:
                raise ValueError(f"quantity {name!r} has no costs; the units have {', '.join(sorted(known))}")
        for name, amount in (*self.budgets.items(), *self.fixed.items()):
            if not math.isfinite(amount):
                raise ValueError(f"{name}: {amount} is not a finite number")
        for unit, costs in enumerate(self.costs):
            self._check_unit(unit, costs, known)
        for pair in self.pairs:
            self._check_pair(pair, known)

    def _check_unit(self, unit: int, costs: Mapping[str, NDArray[np.float64]], known: set[str]) -> None:
        if set(costs) != known:
            raise ValueError(f"unit {unit} has costs in {sorted(costs)}, unit 0 in {sorted(known)}")
        shapes = {array.shape for array in costs.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or next(iter(shapes)) == (0,):
            raise ValueError(f"unit {unit} has costs of shapes {sorted(shapes)}; every quantity needs the same [K > 0]")
        if not all(np.isfinite(array).all() for array in costs.values()):
            raise ValueError(f"unit {unit} has a cost that is not a finite number")

    def _check_pair(self, pair: Pair, known: set[str]) -> None:
        count = len(self.costs)
        if pair.first == pair.second or not (0 <= pair.first < count and 0 <= pair.second < count):
            raise ValueError(f"a pair of units {pair.first} and {pair.second}; there are {count}, and two must differ")
        if pair.quantity not in known:
            raise ValueError(f"a pair costs {pair.quantity!r}; the units have {', '.join(sorted(known))}")
        wanted = (self.size(pair.first), self.size(pair.second))
        if pair.costs.shape != wanted or not np.isfinite(pair.costs).all():
            raise ValueError(
                f"the pair of units {pair.first} and {pair.second} has costs of shape {pair.costs.shape}; "
                f"finite numbers of shape {wanted} are needed"
            )

    @property
    def quantities(self) -> tuple[str, ...]:
        """Every quantity that the units have costs in."""
        return tuple(self.costs[0])

    @property
    def used(self) -> tuple[str, ...]:
        """The quantities that matter to the program: the objective, then the budgets."""
        return (self.objective, *(name for name in self.budgets if name != self.objective))

    def size(self, unit: int) -> int:
        """How many choices ``unit`` has."""
        return len(self.costs[unit][self.objective])

    def limit(self, quantity: str) -> float:
        """The largest total that counts as inside the budget."""
        budget = self.budgets[quantity]
        return budget + TOLERANCE * abs(budget)

    def table(self, quantity: str, fill: float) -> NDArray[np.float64]:
        """Unit costs of ``quantity`` as float64 [U, K], ``fill`` where a unit has fewer than K choices."""
        width = max(len(costs[quantity]) for costs in self.costs)
        table = np.full((len(self.costs), width), fill)
        for row, costs in zip(table, self.costs, strict=True):
            row[: len(costs[quantity])] = costs[quantity]
        return table

    def total(self, picks: Sequence[int], quantity: str) -> float:
        """What ``picks`` cost in ``quantity``: the exact sum, rounded once.

        Raises:
            ValueError: ``picks`` does not name one choice of every unit.
        """
        if len(picks) != len(self.costs) or any(not 0 <= k < self.size(u) for u, k in enumerate(picks)):
            raise ValueError(f"{len(picks)} picks do not name one choice for each of the {len(self.costs)} units")
        terms = [float(costs[quantity][pick]) for costs, pick in zip(self.costs, picks, strict=True)]
        terms += [float(p.costs[picks[p.first], picks[p.second]]) for p in self.pairs if p.quantity == quantity]
        return math.fsum((*terms, self.fixed.get(quantity, 0.0)))

    def totals(self, picks: Sequence[int]) -> dict[str, float]:
        """What ``picks`` cost in every quantity."""
        return {name: self.total(picks, name) for name in self.quantities}

    def feasible(self, picks: Sequence[int]) -> bool:
        """Whether ``picks`` stay inside every budget, up to :data:`TOLERANCE`."""
        return all(self.total(picks, name) <= self.limit(name) for name in self.budgets)


@dataclass(frozen=True)
class Answer:
    """The plan found and how good it is proven to be.

    Attributes:
        picks: the choice of every unit.
        objective: its total in the objective quantity.
        bound: no plan inside the budgets has a smaller objective.
        gap: ``(objective - bound) / |objective|``.
        status: "optimal" when the gap is closed, to within what sums of floats can tell, else "feasible".
        solver: who settled it; "bounds" when greedy and Lagrangian bound already met.
        seconds: wall time of the whole search.
    """

    picks: Picks
    objective: float
    bound: float
    gap: float
    status: Literal["optimal", "feasible"]
    solver: str
    seconds: float
