"""The last steps of a set that is to calibrate a model: on the model's own terms alone.

Beside the trajectories' gradient, whose length theirs is given, the terms stay where steps of that length leave them;
alone, under Adam with a rate that falls to zero, they come down by more than an order of magnitude while images move
little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.distill.model_terms import ModelTerms
from compress.progress import Progress, silent

__all__ = ["ModelFit", "fit_to_model"]

_RATE = 0.02  # deviations of the images


@dataclass(frozen=True, eq=False)
class ModelFit:
    """Images [n, C, H, W]; the terms (BatchNorm's, logits') before and after; how far images moved, in deviations."""

    images: Tensor
    before: tuple[float, float]
    after: tuple[float, float]
    moved: float


def fit_to_model(
    images: Tensor,
    labels: Tensor,
    terms: ModelTerms,
    steps: int,
    progress: Progress = silent,
) -> ModelFit:
    """``images``, standardised, after ``steps`` steps; the best of them and of the start by the terms' sum."""
    z = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=_RATE)
    best, least, before = images, math.inf, (math.inf, math.inf)
    after = before
    for step in range(steps + 1):
        statistics, logits = terms.values(z, labels)
        total = statistics + logits
        here = (float(statistics.detach()), float(logits.detach()))
        before = here if step == 0 else before
        if sum(here) < least:
            best, least, after = z.detach().clone(), sum(here), here
        if step == steps:
            break
        optimizer.param_groups[0]["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        (z.grad,) = torch.autograd.grad(total, z)
        optimizer.step()
        progress("fitting to the model", step + 1, steps)
    return ModelFit(best, before, after, float((best - images).square().mean().sqrt()))
