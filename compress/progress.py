"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "Tally", "silent"]

# Called with what is being done, steps done, and steps in all.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A :data:`Progress` for nobody."""


class Tally:
    """Counts steps, of ``total``, for ``progress``; steps beyond them are not shown.

    Attributes:
        count: steps done.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self.count, self._progress, self._total = 0, progress, total

    def add(self, what: str) -> None:
        """One step more is done: ``what``."""
        self.count += 1
        self.say(what)

    def say(self, what: str) -> None:
        """What is being done between two steps."""
        self._progress(what, min(self.count, self._total), self._total)

    def finish(self, what: str) -> None:
        """What is being done behind the last step."""
        self._progress(what, self._total, self._total)
