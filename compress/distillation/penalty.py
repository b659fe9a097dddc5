"""AST's gradient penalty on experts (arXiv 2310.10541, section 3.2; shape of WGAN-GP, arXiv 1704.00028)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradient_penalty"]


def gradient_penalty(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Mean over images and pixels of (|g| - 1)^2, g the gradient of the sum of all logits, |g| its norm over channels.

    The published code computes it on the clean batch, takes one norm a pixel, and weighs it by 2.

    Args:
        function: ``x`` [N, C, ...] to logits [N, classes]; samples must not see each other (no BatchNorm).
    """
    x = x.detach().requires_grad_()
    # Twice differentiable, so that the penalty itself can be learned from.
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return (gradient.norm(2, dim=1) - 1).square().mean()
