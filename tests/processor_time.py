"""With ``--limit-time`` (``make times``) an unmarked test that takes much of the processor fails: that is for ``slow``.

Counted is the processor time of the test's own call, processes it waited for included: other work on the machine takes
no part in it. Fixtures are not counted, which several tests share. What a test pays because it is the first of its
process (imports, the exporter's table of operators) is forgiven: a test over the limit runs once more, and the second
time counts. On a machine that is slower than ours, or one whose cores are shared, the limit grows by as much as a loop
of pure Python takes longer there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from _pytest.runner import runtestprotocol

__all__ = ["LIMIT_SECONDS", "add_option", "pytest_runtest_call", "pytest_runtest_protocol"]

# With 4,000 tests on two cores, `make check` stays under two minutes if few come near it: a test that compresses a toy
# network from end to end takes about half of it.
LIMIT_SECONDS = 1.5
_LOOP_SECONDS = 0.0043  # what _loop takes on a quiet core of the machine the limit was set on

_SPENT = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keep the processor time of the test's call."""
    before = _processor_seconds()
    try:
        return (yield)
    finally:
        item.stash[_SPENT] = _processor_seconds() - before


def add_option(parser: pytest.Parser) -> None:
    """``--limit-time``: whether tests that take too long fail."""
    parser.addoption(
        "--limit-time", action="store_true", help="fail unmarked tests that take too much of the processor"
    )


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run ``item``, once more where it took too long, and fail it where it does so again."""
    if not item.config.getoption("--limit-time"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if _is_over(item, reports):
        first = item.stash[_SPENT]
        item._initrequest()  # type: ignore[attr-defined]  # as plugins that repeat tests do: fixtures are made anew
        again = runtestprotocol(item, nextitem=nextitem, log=False)
        repeated = all(report.passed for report in again)
        if not repeated or _is_over(item, again):
            call = next(report for report in reports if report.when == "call")
            call.outcome = "failed"
            call.longrepr = _complaint(first, item.stash[_SPENT] if repeated else None)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _is_over(item: pytest.Item, reports: list[pytest.TestReport]) -> bool:
    marked = any(item.get_closest_marker(name) for name in ("slow", "real", "matrix"))
    if marked or not all(each.passed for each in reports):
        return False
    spent = item.stash[_SPENT]
    return spent > LIMIT_SECONDS and spent > LIMIT_SECONDS * _slowness()


def _complaint(first: float, second: float | None) -> str:
    again = f"and {second:.1f} s when repeated" if second is not None else "and could not be repeated"
    return (
        f"took {first:.1f} s of processor time, {again}; an unmarked test may take {LIMIT_SECONDS} s: make it smaller, "
        "share its work in a fixture, or mark it slow"
    )


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _slowness() -> float:
    """How many times longer than usual pure Python takes at this moment, 1 at least; the median of many short runs."""
    taken = []
    for _ in range(25):
        before = time.process_time()
        _loop()
        taken.append(time.process_time() - before)
    return max(1.0, sorted(taken)[len(taken) // 2] / _LOOP_SECONDS)


def _loop() -> None:
    total: dict[int, float] = {}
    for number in range(20_000):
        total[number % 97] = total.get(number % 97, 0.0) + number * 0.5
