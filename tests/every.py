"""An ``all`` that is not content with nothing."""

from __future__ import annotations

from collections.abc import Iterable


def every(conditions: Iterable[object]) -> bool:
    """Whether all of ``conditions`` hold, and there is at least one."""
    found = [bool(each) for each in conditions]
    return bool(found) and all(found)
