"""The greedy plan: what bit allocators without a solver do, made fair.

Start from the cheapest choice everywhere, then take, again and again, the upgrade with the largest ::

    gain / use,   gain = fall of the objective,   use = sum_q (rise of q) / (budget_q - total_q at the start)

among those that stay inside every budget, until none is left. NNCF stops at the first upgrade that does not fit
(``first_overflow=True``); going on with the others costs nothing and fills the budget. Exact for the upper envelope of
one budget, blind to what only pays together: the solver's incumbent and its yardstick, not its rival.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from numpy.typing import NDArray

from compress.allocation.program import Picks, Program

__all__ = ["greedy", "neighbour"]

Table = NDArray[np.float64]


def greedy(program: Program, *, first_overflow: bool = False, start: Sequence[int] | None = None) -> Picks | None:
    """A plan inside the budgets, or None if this way finds none.

    Args:
        first_overflow: stop at the first best upgrade that breaks a budget instead of trying the next.
        start: picks to improve instead of the cheapest ones.
    """
    state = _State(program, start)
    if not state.repair():
        return None
    state.improve(first_overflow)
    picks = tuple(int(pick) for pick in state.picks)
    return picks if program.feasible(picks) else None


def neighbour(program: Program, picks: Sequence[int], excluded: Container[Picks]) -> Picks | None:
    """The best plan inside the budgets that differs from ``picks`` in one unit and is not ``excluded``."""
    state = _State(program, picks)
    fits = np.isfinite(state.moves[0]) & (state.moves[1:] <= state.spare[:, None, None]).all(axis=0)
    for flat in np.argsort(np.where(fits, state.moves[0], np.inf), axis=None, kind="stable")[: int(fits.sum())]:
        unit, choice = np.unravel_index(int(flat), fits.shape)
        found = tuple(int(choice) if u == unit else int(pick) for u, pick in enumerate(picks))
        if found not in excluded and program.feasible(found):
            return found
    return None


class _State:
    """Picks [U] and what changing one of them changes: ``moves`` float64 [1 + Q, U, K], quantity 0 the objective."""

    def __init__(self, program: Program, start: Sequence[int] | None) -> None:
        self.names = list(program.budgets)
        self.program = program
        # An absent choice has infinite costs, so no move to it ever gains or fits.
        self.units = np.stack([program.table(name, np.inf) for name in (program.objective, *self.names)])
        self.budgets = np.array([program.budgets[name] for name in self.names])
        self.scale = self._room()
        self.neighbours: list[list[tuple[int, int, Table]]] = [[] for _ in program.costs]
        for pair in program.pairs:
            for number, name in enumerate((program.objective, *self.names)):
                if name == pair.quantity:
                    self.neighbours[pair.first].append((number, pair.second, pair.costs))
                    self.neighbours[pair.second].append((number, pair.first, pair.costs.T))
        if start is None:
            weight = (self.units[1:] / self.scale[:, None, None]).sum(axis=0) if self.names else self.units[0]
            self.picks = np.lexsort((self.units[0], weight), axis=1)[:, 0]
        else:
            self.picks = np.array(start, dtype=np.intp)
        self.spare = self.budgets - self._totals()
        self.scale = np.where(self.spare > 0, self.spare, self.scale)
        self.moves = np.empty_like(self.units)
        for unit in range(len(self.picks)):
            self._refresh(unit)

    def _room(self) -> Table:
        """Between the least and the most that each quantity can be: a scale [Q] for the choice of a start."""
        present = np.where(np.isinf(self.units[1:]), -np.inf, self.units[1:])
        room = (present.max(axis=2) - self.units[1:].min(axis=2)).sum(axis=1)
        return np.where(room > 0, room, 1.0)

    def _totals(self) -> Table:
        return np.array([self.program.total([int(pick) for pick in self.picks], name) for name in self.names])

    def _refresh(self, unit: int) -> None:
        """Recompute the unit's moves after it or a neighbour changed."""
        pick = self.picks[unit]
        costs = self.units[:, unit].copy()
        for number, other, matrix in self.neighbours[unit]:
            costs[number, : len(matrix)] += matrix[:, self.picks[other]]
        self.moves[:, unit] = costs - costs[:, pick, None]

    def _take(self, unit: int, choice: int) -> list[int]:
        """Make a move; the units whose moves changed."""
        self.spare = self.spare - self.moves[1:, unit, choice]
        self.picks[unit] = choice
        changed = sorted({unit, *(other for _, other, _ in self.neighbours[unit])})
        for other in changed:
            self._refresh(other)
        return changed

    def repair(self) -> bool:
        """Lower what exceeds the budgets move by move; whether that succeeded."""
        size = float((np.abs(self.budgets) / self.scale).sum())
        while (self.spare < 0).any():
            over = np.maximum(self.moves[1:] - self.spare[:, None, None], 0.0) / self.scale[:, None, None]
            excess = over.sum(axis=0)
            least = excess.min()
            now = float((np.maximum(-self.spare, 0.0) / self.scale).sum())
            # By more than rounding, or moves that change nothing would follow each other forever.
            if not least < now - 1e-12 * (now + size):
                return self._inside()
            tied = np.where(excess == least, self.moves[0], np.inf)
            unit, choice = np.unravel_index(int(tied.argmin()), tied.shape)
            self._take(int(unit), int(choice))
        return True

    def _inside(self) -> bool:
        """Whether what is over is only the rounding that the program tolerates; then nothing more is spent."""
        inside = self.program.feasible([int(pick) for pick in self.picks])
        self.spare = np.maximum(self.spare, 0.0)
        return inside

    def improve(self, first_overflow: bool) -> None:
        """Take upgrades until none fits (or the best one does not)."""
        count = len(self.picks)
        best, score = np.zeros(count, dtype=np.intp), np.full(count, -np.inf)
        self._rate(np.arange(count), best, score, fitting=not first_overflow)
        while True:
            unit = int(score.argmax())
            if score[unit] <= 0:
                return
            choice = int(best[unit])
            if (self.moves[1:, unit, choice] > self.spare).any():
                if first_overflow:
                    return
                # Rated when there was more room: look for a smaller upgrade of the unit.
                self._rate(np.array([unit]), best, score, fitting=True)
                continue
            freed = bool((self.moves[1:, unit, choice] < 0).any())
            changed = self._take(unit, choice)
            # A move that gives room back may let upgrades of any unit fit again.
            self._rate(np.arange(count) if freed else np.array(changed), best, score, fitting=not first_overflow)

    def _rate(self, units: NDArray[np.intp], best: NDArray[np.intp], score: Table, *, fitting: bool) -> None:
        """Write best upgrade and score of ``units`` [n] into ``best`` and ``score`` [U]; -inf where there is none."""
        moves = self.moves[:, units]
        gain = -moves[0]
        use = np.maximum((moves[1:] / self.scale[:, None, None]).sum(axis=0), 0.0)
        rated = np.full(gain.shape, -np.inf)
        # What saves everywhere has no use to divide by: it comes first, the largest gain before the others.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            ratio = np.where(use > 1e-300, gain / use, 1e300 * np.minimum(gain, 1.0))
        usable = (gain > 0) & (moves[1:] <= self.spare[:, None, None]).all(axis=0) if fitting else gain > 0
        rated[usable] = np.minimum(ratio[usable], 1e300)
        choice = rated.argmax(axis=1)
        best[units] = choice
        score[units] = rated[np.arange(len(units)), choice]
