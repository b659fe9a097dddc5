"""A progress bar for anything that takes over two seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["ProgressBar"]

_BAR_AFTER_S = 2.0


class ProgressBar:
    """A bar on stderr, with the time left, that appears when the work has taken two seconds; nothing off a terminal.

    It is drawn only when told of progress: a bar that redraws itself in a thread would take time from what is measured.
    """

    def __init__(self, *, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True, emoji=False)
        self.enabled = enabled and console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not self.enabled)
        self._task: TaskID | None = None
        self._start = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Show ``what`` at ``done`` of ``total``."""
        if not self.enabled:
            return
        if self._task is None:
            if time.monotonic() - self._start < _BAR_AFTER_S:
                return
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, description=what, completed=done, total=total, refresh=True)
