"""How far a command is: a bar on a terminal, plain lines where there is none (CI, nohup, a notebook)."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["ProgressBar"]

_BAR_AFTER_S = 2.0
_LINE_EVERY_S = 10.0


class ProgressBar:
    """Progress on stderr, from the moment it is made.

    On a terminal it is a bar with the time left, which appears when the work has taken two seconds. Elsewhere it is one
    line that names the command, at once (verbs make it before they import torch), then one line every ten seconds. It
    draws only when told of progress: a bar that redraws itself in a thread would take time from what is measured.
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
        self.enabled = enabled
        self._terminal = console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not (enabled and self._terminal)
        self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=hidden)
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()
        if enabled and not self._terminal:
            command = shlex.join(["compress", *sys.argv[1:]])
            _print_line(f"{command}: started at {time.strftime('%Y-%m-%d %H:%M:%S')}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Show ``what`` at ``done`` of ``total``."""
        if not self.enabled:
            return
        now = time.monotonic()
        if not self._terminal:
            if now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                _print_line(f"{now - self._start:.0f} s: {done} of {total}, {what}")
            return
        if self._task is None:
            if now - self._start < _BAR_AFTER_S:
                return
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, description=what, completed=done, total=total, refresh=True)


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
