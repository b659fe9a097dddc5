"""A distilled set among samples: its images are as the model takes them, and it says what they were normalised with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import InputError

__all__ = ["Normalisation", "own_normalisation", "require_same"]

_KEYS = {"images", "labels", "step_size", "provenance"}


@dataclass(frozen=True)
class Normalisation:
    """What ``--mean`` and ``--std`` were when a set was distilled: a number, or one a channel; None: not given."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation:
        """As the options say."""
        return cls(*(None if each is None else tuple(each) for each in (mean, std)))

    def __str__(self) -> str:
        parts = [
            f"--{name} {','.join(f'{number:g}' for number in numbers)}"
            for name, numbers in (("mean", self.mean), ("std", self.std))
            if numbers is not None
        ]
        return " ".join(parts) or "no --mean or --std that it names"


def own_normalisation(content: Mapping[object, object]) -> Normalisation | None:
    """The one that ``content`` names, if it is a distilled set."""
    if not _KEYS.issubset(content):
        return None
    mean, std = (
        tuple(np.asarray(content[name]).reshape(-1).tolist()) if name in content else None
        for name in ("data_mean", "data_std")
    )
    return Normalisation(mean, std)


def require_same(own: Normalisation, mean: Sequence[float] | None, std: Sequence[float] | None, name: str) -> str:
    """A sentence that ``mean`` and ``std``, which are those of ``own``, are not applied again.

    Raises:
        InputError: they are others, so that images that are normalised already would be so once more.
    """
    given = Normalisation.of(mean, std)
    for here, there in ((given.mean, own.mean), (given.std, own.std)):
        if (here is None) != (there is None) or (here and there and not _equal(here, there)):
            raise InputError(
                f"{name} is a distilled set, whose images are as the model takes them: made with {own}, and now "
                f"{given} was given, which would be applied on top; leave that out, or distil again with it"
            )
    return "a distilled set, whose images are as the model takes them: --mean and --std are not applied again"


def _equal(here: Sequence[float], there: Sequence[float]) -> bool:
    return (len(here) == len(there) or 1 in (len(here), len(there))) and bool(np.allclose(here, there, 1e-5))
