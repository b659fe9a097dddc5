"""One outer iteration's task: where a student starts, what it is compared with and when (AST, arXiv 2310.10541).

    L_TM  = |th_N - th*_{t+M}|^2 / |th*_t - th*_{t+M}|^2                                          (MTT)
    L_out = L_TM + sum_{i<M} beta_i |th_{i floor(N/M)} - th*_{t+i}|^2 / |th*_t - th*_{t+i}|^2     (intermediate terms)

th* is an expert's parameters after an epoch, th_k the student's after k steps from th*_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["BETAS", "Checkpoint", "Episode", "balanced_factor", "checkpoints", "inner_batches", "perturb"]

BETAS = ("aggregate", "adaptive", "none")
"""Weights of intermediate terms: 1, i / M, or no such terms (plain MTT)."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """After ``step`` student steps, ``weight * |th - target|^2`` is added to the loss; ``target`` [P]."""

    step: int
    target: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Episode:
    """What an outer iteration matches.

    Attributes:
        start: th_0 [P].
        checkpoints: in the order of their steps; the last is at step N.
        batches: indices of the synthetic images of every step, N of them.
        scale: multiplies the student's cross-entropy (:func:`balanced_factor`).
        seed: of the augmentations; step k draws from its own, so that a step computed again sees the same images.
    """

    start: Tensor
    checkpoints: tuple[Checkpoint, ...]
    batches: tuple[Tensor, ...]
    scale: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """N."""
        return len(self.batches)


def checkpoints(start: Tensor, targets: Sequence[Tensor], steps: int, beta: str) -> tuple[Checkpoint, ...]:
    """The terms of L_out for a student that starts at ``start`` [P] and makes ``steps`` steps.

    The normaliser is the distance of ``start`` as it is given, perturbed or not, as in the published code.

    Args:
        targets: th*_{t+1} ... th*_{t+M}, [P] each.
        beta: one of :data:`BETAS`.

    Raises:
        ValueError: ``beta`` is unknown, or a target equals the start: the expert stood still.
    """
    if beta not in BETAS:
        raise ValueError(f"beta {beta!r}: known are {', '.join(BETAS)}")
    count = len(targets)
    found = []
    for number, target in enumerate(targets, 1):
        last = number == count
        weight = 1.0 if last or beta == "aggregate" else number / count if beta == "adaptive" else 0.0
        distance = float((start - target).double().square().sum())
        if distance == 0:
            raise ValueError("the expert did not move between two epochs, so there is nothing to match")
        if weight:
            found.append(Checkpoint(steps if last else number * (steps // count), target, weight / distance))
    return tuple(found)


def balanced_factor(epoch: int, last: int) -> float:
    """AST's balanced inner loss: early epochs, which move far, are learned from more gently than late ones.

    With h = last // 2: log_5(epoch - h + 8) from h on, 1 / log_5(h - epoch + 8) before it. Published so, with a jump
    at h: 1 / 1.365 below, 1.292 above.

    Args:
        epoch: t, where the student starts, 0 to ``last`` - 1.
        last: T+.
    """
    half = last // 2
    return math.log(epoch - half + 8, 5) if epoch >= half else 1 / math.log(half - epoch + 8, 5)


def perturb(parts: Sequence[Tensor], scale: float, generator: Generator) -> list[Tensor]:
    """AST's weight perturbation: w + scale * d * w with d ~ N(0, 1), divided by its norm; kernels [O, I, H, W] only.

    One norm for the whole kernel, so that the relative change is about 1 / sqrt(elements): 0.016 for 3 x 3 from 3 to
    128 channels. A norm a filter would be a far larger change.
    """
    moved = []
    for part in parts:
        if part.dim() == 4 and scale:
            noise = torch.randn(part.shape, generator=generator).to(part)
            part = part + scale * noise / noise.norm() * part
        moved.append(part)
    return moved


def inner_batches(count: int, size: int, steps: int, generator: Generator) -> tuple[Tensor, ...]:
    """Indices of ``steps`` batches of up to ``size`` out of ``count`` images: a new order when all have been seen."""
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).split(min(size, count))
    return tuple(found[:steps])
