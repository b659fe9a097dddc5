"""How far one tensor is from another, infinities included: where both have the same one, they do not differ."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cosine", "relative_l2", "worst_sample"]

_SMALLEST = 1e-30


def relative_l2(got: Tensor, wanted: Tensor) -> float:
    """L2 of the difference, relative to that of what is finite in ``wanted``; NaN where either holds NaN.

    An infinity that only one of them has is an infinite distance.
    """
    return float(_difference(got, wanted).norm() / _finite(wanted).norm().clamp(min=_SMALLEST))


def cosine(got: Tensor, wanted: Tensor) -> float:
    """Cosine of the angle between the two, as vectors of what is finite in both; 1 where both are nothing but zeros."""
    one, other = (_finite(each).flatten() for each in (got, wanted))
    sizes = one.norm() * other.norm()
    if sizes < _SMALLEST:
        return float(torch.equal(one, other))
    return float((one @ other / sizes).clamp(-1, 1))


def worst_sample(got: list[Tensor], wanted: list[Tensor]) -> tuple[int | None, float | None]:
    """The sample whose outputs [N, ...] are furthest from what is wanted, and how far; None where none has N rows.

    A sample whose own outputs nearly vanish is measured by what the others have.
    """
    count = len(wanted[0])
    distances = []
    for one, other in zip(got, wanted, strict=False):
        if one.shape == other.shape and len(other) == count:
            rows = (each.reshape(count, -1).norm(dim=1) for each in (_difference(one, other), _finite(other)))
            difference, size = rows
            distances.append(difference / size.clamp(min=1e-3 * float(size.mean()) + _SMALLEST))
    if not distances:
        return None, None
    furthest = torch.stack(distances).nan_to_num(nan=torch.inf, posinf=torch.inf).amax(0)
    worst = int(furthest.argmax())
    return worst, float(furthest[worst])


def _difference(got: Tensor, wanted: Tensor) -> Tensor:
    got, wanted = got.double(), wanted.double()
    return torch.where(got == wanted, 0.0, got - wanted)  # of two infinities the difference is no number


def _finite(x: Tensor) -> Tensor:
    x = x.double()
    return torch.where(x.isinf(), 0.0, x)
