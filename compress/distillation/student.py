"""A student's steps on synthetic images, and the exact gradient of what they end in with respect to the images.

    v_{k+1} = m v_k + g_k,   th_{k+1} = th_k - a v_{k+1},   g_k = gradient of scale * CE(S_k) + decay/2 |th|^2 at th_k

Two ways to the same gradient:

- ``unrolled`` keeps the graph of all N steps, which is the definition (MTT, arXiv 2203.11932) and the oracle of the
  tests. Its memory grows with N times the activations of a step.
- ``recomputed`` goes forward without a graph and back by the adjoint equations, with the graph of one step at a time:

      l_v <- l_v - a l_th,   u = gradient of <g_k, l_v>,   l_th <- l_th + u_th,   S += u_S,   l_v <- m l_v

  Memory is that of one step plus th_k and v_k of about 2 sqrt(N) steps; the steps between are walked again. It is
  exact: it differs from ``unrolled`` by the rounding of sums. TESLA (arXiv 2211.10586), the published form, instead
  takes every th_k for a constant, which drops how a step changes the ones behind it; it costs less and is not
  used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from compress.distillation.augment import augment
from compress.distillation.episode import Episode
from compress.distillation.network import FlatNetwork

__all__ = ["GRADIENTS", "Outcome", "Student"]

GRADIENTS = ("recomputed", "unrolled")


@dataclass(frozen=True, eq=False)
class Outcome:
    """``loss`` and its gradients: ``images`` like the images, ``rate`` a number; ``matching``: L_TM, its last term."""

    loss: float
    matching: float
    images: Tensor
    rate: float


@dataclass(frozen=True, eq=False)
class Student:
    """How a student learns.

    Attributes:
        momentum: heavy ball; 0.9 in AST, 0 in MTT. It makes the fitting step size about ten times smaller.
        decay: weight decay, 0 in both.
    """

    network: FlatNetwork
    momentum: float = 0.9
    decay: float = 0.0
    augmentations: Sequence[str] = ()

    def outcome(self, images: Tensor, labels: Tensor, rate: float, episode: Episode, gradients: str) -> Outcome:
        """L_out of ``episode`` and its gradient.

        Args:
            images: S [n, C, H, W].
            labels: classes [n].
            rate: a, the step size.
            gradients: one of :data:`GRADIENTS`.

        Raises:
            ValueError: ``gradients`` is unknown.
        """
        if gradients not in GRADIENTS:
            raise ValueError(f"gradients {gradients!r}: known are {', '.join(GRADIENTS)}")
        way = self.recomputed if gradients == "recomputed" else self.unrolled
        return way(images, labels, rate, episode)

    def losses(self, images: Tensor, labels: Tensor, rate: float, episode: Episode) -> tuple[float, float]:
        """L_out and L_TM alone."""
        theta, velocity, terms = episode.start, torch.zeros_like(episode.start), list[float]()
        for step in range(episode.steps + 1):
            terms += _terms(theta, episode, step)
            if step < episode.steps:
                theta, velocity = self._advance(theta, velocity, images, labels, rate, episode, step)
        return math.fsum(terms), terms[-1]

    def unrolled(self, images: Tensor, labels: Tensor, rate: float, episode: Episode) -> Outcome:
        """See :meth:`outcome`; all steps in one graph."""
        images = images.detach().requires_grad_()
        step_size = images.new_tensor(rate).requires_grad_()
        theta = episode.start.detach().requires_grad_()
        velocity = torch.zeros_like(theta)
        states = [theta]
        for step in range(episode.steps):
            gradient = self._gradient(theta, images, labels, episode, step)
            velocity = self.momentum * velocity + gradient
            theta = theta - step_size * velocity
            states.append(theta)
        terms = [each.weight * (states[each.step] - each.target).square().sum() for each in episode.checkpoints]
        loss = torch.stack(terms).sum()
        found = torch.autograd.grad(loss, (images, step_size), allow_unused=True)
        pixels, change = (torch.zeros(()) if each is None else each for each in found)
        return Outcome(float(loss.detach()), float(terms[-1].detach()), pixels.expand_as(images), float(change))

    def recomputed(self, images: Tensor, labels: Tensor, rate: float, episode: Episode) -> Outcome:
        """See :meth:`outcome`; the graph of one step at a time."""
        images = images.detach()
        stride = max(math.isqrt(max(episode.steps, 1)), 1)
        theta, velocity = episode.start.detach(), torch.zeros_like(episode.start)
        kept = {0: (theta, velocity)}
        due = {each.step: each for each in episode.checkpoints}  # steps of checkpoints may coincide only at 0
        terms: list[float] = []
        adjoint, adjoint_velocity = torch.zeros_like(theta), torch.zeros_like(theta)
        total, change = torch.zeros_like(images), 0.0
        for step in range(episode.steps + 1):
            terms += _terms(theta, episode, step)
            if step % stride == 0:
                kept[step] = (theta, velocity)
            if step < episode.steps:
                theta, velocity = self._advance(theta, velocity, images, labels, rate, episode, step)
        end = theta
        for first in range((episode.steps - 1) // stride * stride, -1, -stride) if episode.steps else ():
            last = min(first + stride, episode.steps)
            walked = [kept.pop(first)]
            for step in range(first, last - 1):
                walked.append(self._advance(*walked[-1], images, labels, rate, episode, step))
            for step in range(last - 1, first - 1, -1):
                after = end if step + 1 == episode.steps else theta
                if step + 1 in due:
                    adjoint = adjoint + 2 * due[step + 1].weight * (after - due[step + 1].target)
                theta, velocity = walked.pop()
                adjoint_velocity = adjoint_velocity - rate * adjoint
                with torch.enable_grad():
                    here, pixels = theta.detach().requires_grad_(), images.clone().requires_grad_()
                    gradient = self._gradient(here, pixels, labels, episode, step)
                    found = torch.autograd.grad(gradient, (here, pixels), adjoint_velocity, allow_unused=True)
                change -= float(adjoint @ (self.momentum * velocity + gradient.detach()))
                adjoint = adjoint + (0 if found[0] is None else found[0])
                total += 0 if found[1] is None else found[1]
                adjoint_velocity = self.momentum * adjoint_velocity
        return Outcome(math.fsum(terms), terms[-1], total, change)

    def _advance(
        self, theta: Tensor, velocity: Tensor, images: Tensor, labels: Tensor, rate: float, episode: Episode, step: int
    ) -> tuple[Tensor, Tensor]:
        """th_{k+1} and v_{k+1}, without a graph."""
        here = theta.detach().requires_grad_()
        with torch.enable_grad():
            gradient = self._gradient(here, images, labels, episode, step, keep=False)
        velocity = self.momentum * velocity + gradient.detach()
        return theta - rate * velocity, velocity

    def _gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, episode: Episode, step: int, *, keep: bool = True
    ) -> Tensor:
        """g_k [P]; with its graph if ``keep``."""
        chosen = episode.batches[step]
        x = augment(images[chosen], self.augmentations, _generator(episode.seed, step))
        loss = episode.scale * F.cross_entropy(self.network(theta, x), labels[chosen])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=keep)
        return gradient + self.decay * theta if self.decay else gradient


def _terms(theta: Tensor, episode: Episode, step: int) -> list[float]:
    """What ``theta`` [P] adds to the loss after ``step`` steps."""
    return [
        each.weight * float((theta - each.target).square().sum()) for each in episode.checkpoints if each.step == step
    ]


def _generator(seed: int, step: int) -> Generator:
    return Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
