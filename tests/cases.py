"""Of the many cases of a slow test a few run in ``make test``, the others in ``make matrix``.

``@pytest.mark.slow(cases=2)`` keeps the first two. Where not the first are wanted, a sweep (``tests/sweep.py``) names
its sample.
"""

from __future__ import annotations

from collections import Counter

import pytest

__all__ = ["mark_further_cases"]


def mark_further_cases(items: list[pytest.Item]) -> None:
    """Mark with ``matrix`` what comes after a slow test's first cases, in the order of collection."""
    seen: Counter[str] = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow is None or "cases" not in slow.kwargs or item.get_closest_marker("matrix"):
            continue
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if seen[test] > slow.kwargs["cases"]:
            item.add_marker(pytest.mark.matrix)
