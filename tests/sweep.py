"""Sweeps over many values: a fixed sample of them runs in every ``make test``, the rest in ``make matrix``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(
    names: str | tuple[str, ...], values: Iterable[Any], sample: Iterable[Any], **more: Any
) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize``, with all values but those of ``sample`` marked ``matrix``.

    Where several sweeps meet in one test, each one's sample meets the others'.

    Args:
        more: what else ``parametrize`` takes.

    Raises:
        ValueError: nothing is in the sample, and ``make test`` would leave the test out; or what is no value.
    """
    values, sample = list(values), list(sample)
    unknown = [each for each in sample if each not in values]
    if unknown or not sample:
        raise ValueError(f"{names}: the sample {sample} must be some of {values}")
    cases = []
    for value in values:
        parts = (value,) if isinstance(names, str) else value
        cases.append(pytest.param(*parts, marks=() if value in sample else pytest.mark.matrix))
    return pytest.mark.parametrize(names, cases, **more)
