"""Tables that map a name to ``"module:object"``, resolved on first use.

A literal table is the index a newcomer looks for, costs nothing at import, and can be iterated by tests and
benchmarks; decorators would do none of the three.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from compress.errors import InputError

__all__ = ["resolve"]


def resolve(table: Mapping[str, str], name: str, noun: str) -> Any:
    """Return the object behind ``table[name]``; ``noun`` names the kind of thing in the error.

    Raises:
        InputError: ``name`` is not in the table; the message lists the known names.
    """
    if name not in table:
        raise InputError(f"unknown {noun} {name!r}; known: {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
