"""What a small set is worth: accuracy, on real images, of fresh networks trained on it alone.

In `compress distill` these are images that experts were not trained on, where there are enough. Scores say which
iterate is best, and that of the best is flattered a little by the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from compress.data.samples import Samples
from compress.distillation.augment import augment
from compress.distillation.network import FlatNetwork
from compress.files.cache import digest

__all__ = ["Judge", "train_on"]

_BATCH = 256


def train_on(
    network: FlatNetwork,
    images: Tensor,
    labels: Tensor,
    rate: float,
    steps: int,
    seed: int,
    *,
    momentum: float = 0.9,
    decay: float = 1e-3,
    augmentations: tuple[str, ...] = (),
) -> Tensor:
    """Parameters [P] of a network drawn under ``seed`` after ``steps`` steps on ``images`` [n, C, H, W].

    As AST's code evaluates: SGD with momentum, half of the rate in the second half, where momentum falls to 0.8 there
    and not here; parameters after the last step, never the best of several looks at the test images.
    """
    generator = Generator().manual_seed(seed)
    theta = network.start(seed)
    velocity, order = torch.zeros_like(theta), list[Tensor]()
    for step in range(steps):
        if not order:
            order = list(torch.randperm(len(images), generator=generator).split(_BATCH))
        index = order.pop()
        here = theta.requires_grad_()
        logits = network(here, augment(images[index], augmentations, generator))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels[index]), here)
        theta = theta.detach()
        velocity = momentum * velocity + gradient + decay * theta
        theta = theta - rate * (0.5 if step >= steps // 2 else 1.0) * velocity
    return theta.detach()


@dataclass(frozen=True, eq=False)
class Judge:
    """Trains ``nets`` networks on a set and takes their mean accuracy on ``x`` [N, C, H, W], ``y`` [N].

    The networks start alike at every call, so that two sets are compared on the same starts.
    """

    network: FlatNetwork
    x: Tensor
    y: Tensor
    nets: int = 2
    steps: int = 200
    momentum: float = 0.9
    augmentations: tuple[str, ...] = ()
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        """Of the images and how they are used."""
        seen = Samples((self.x,), self.y, "", ()).fingerprint
        return digest([self.nets, self.steps, self.momentum, self.augmentations, self.seed, seen])

    def accuracy(self, images: Tensor, labels: Tensor, rate: float) -> float:
        """Of networks trained on ``images`` [n, C, H, W] with step size ``rate``, 0 for one that blew up."""
        found = []
        for number in range(self.nets):
            theta = train_on(
                self.network, images, labels, rate, self.steps, self.seed + 7919 * (number + 1),
                momentum=self.momentum, augmentations=self.augmentations,
            )  # fmt: skip
            logits = self.network.logits(theta, self.x)
            right = (logits.argmax(1) == self.y) & logits.isfinite().all(1)
            found.append(float(right.double().mean()))
        return sum(found) / len(found)
