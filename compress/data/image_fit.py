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
    """Images [n, ...]; what was moved with them; terms before and after; how far images moved (root mean square)."""

    images: Tensor
    others: tuple[Tensor, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    moved: float


@torch.enable_grad()
def fit_images(
    images: Tensor,
    terms: Callable[..., tuple[Tensor, ...]],
    steps: int,
    rate: float,
    progress: Progress = silent,
    others: tuple[Tensor, ...] = (),
) -> ImageFit:
    """``images`` after ``steps`` steps of Adam down the sum of ``terms``; the best of all and the start by that sum.

    ``terms`` is called with the images and ``others``, which are moved at the same rate.

    The rate falls from ``rate`` to zero as a cosine: with a constant one the terms stay where steps of its length leave
    them, an order of magnitude higher.
    """
    moved = [each.clone().requires_grad_() for each in (images, *others)]
    optimizer = torch.optim.Adam(moved, lr=rate)
    best, least = [images, *others], math.inf
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    for step in range(steps + 1):
        values = terms(*moved)
        total = torch.stack(values).sum()
        here = tuple(float(value.detach()) for value in values)
        if step == 0:
            before = after = here  # also where they are not finite, and nothing is ever less
        if sum(here) < least:
            best, least, after = [each.detach().clone() for each in moved], sum(here), here
        if step == steps or not math.isfinite(sum(here)):  # whose gradient leads nowhere
            break
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for each, gradient in zip(moved, torch.autograd.grad(total, moved), strict=True):
            each.grad = gradient
        optimizer.step()
        progress("fitting images to the model", step + 1, steps)
    found, *with_it = best
    return ImageFit(found, tuple(with_it), before, after, float((found - images).square().mean().sqrt()))
