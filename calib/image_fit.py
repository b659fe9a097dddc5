"""Images moved until they drive a model's layers as real ones do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.progress import Progress, silent

__all__ = ["ImageFit", "fit_images"]


@dataclass(frozen=True, eq=False)
class ImageFit:
    """Images [n, ...]; the terms before and after; how far images moved (root of the mean square)."""

    images: Tensor
    before: tuple[float, ...]
    after: tuple[float, ...]
    moved: float


def fit_images(
    images: Tensor,
    terms: Callable[[Tensor], tuple[Tensor, ...]],
    steps: int,
    rate: float,
    progress: Progress = silent,
) -> ImageFit:
    """``images`` after ``steps`` steps of Adam down the sum of ``terms``; the best of all and the start by that sum.

    The rate falls from ``rate`` to zero as a cosine: with a constant one the terms stay where steps of its length leave
    them, an order of magnitude higher.
    """
    z = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    best, least = images, math.inf
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    for step in range(steps + 1):
        values = terms(z)
        total = torch.stack(values).sum()
        here = tuple(float(value.detach()) for value in values)
        if step == 0:
            before = after = here  # also where they are not finite, and nothing is ever less
        if sum(here) < least:
            best, least, after = z.detach().clone(), sum(here), here
        if step == steps or not math.isfinite(sum(here)):  # whose gradient leads nowhere
            break
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        (z.grad,) = torch.autograd.grad(total, z)
        optimizer.step()
        progress("fitting images to the model", step + 1, steps)
    return ImageFit(best, before, after, float((best - images).square().mean().sqrt()))
