"""``--share K/N``: every N-th test, as its name has it, beginning with the K-th.

The matrix takes longer than CI has for it. Each commit there runs another quarter, and four in a row all of it; `make
matrix` runs the whole.
"""

from __future__ import annotations

import zlib

import pytest

__all__ = ["add_option", "keep_share"]


def add_option(parser: pytest.Parser) -> None:
    """``--share``; without it every test runs."""
    parser.addoption("--share", metavar="K/N", help="run the K-th of N shares of the tests")


def keep_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is in another share.

    Raises:
        pytest.UsageError: the share is not one of 1/N to N/N.
    """
    asked = config.getoption("--share")
    if not asked:
        return
    number, _, count = str(asked).partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"--share {asked}: one of 1/N to N/N is needed, as 2/3")
    own = [each for each in items if zlib.crc32(each.nodeid.encode()) % int(count) == int(number) - 1]
    config.hook.pytest_deselected(items=[each for each in items if each not in own])
    items[:] = own
