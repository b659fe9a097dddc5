"""Between the samples as a model takes them and the form that is distilled: standardised channels, or ZCA whitening."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ZCA_EPSILON", "Standardisation"]

ZCA_EPSILON = 0.1
"""Added to the variances, as in MTT and AST."""
_CONSTANT = 1e-6


@dataclass(frozen=True, eq=False)
class Standardisation:
    """z = (x - mean) / std by channel; with whitening then z <- (z - centre) @ matrix on flattened images.

    Attributes:
        mean, std: [C].
        centre: [C * H * W], ``matrix`` and ``inverse`` [C * H * W, C * H * W]; None without whitening.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor | None = None
    matrix: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, *, whiten: bool = False, epsilon: float = ZCA_EPSILON) -> Standardisation:
        """The one for images ``x`` [N, C, H, W]; a channel that does not vary is only centred.

        Whitening takes memory and time of the square and the cube of C * H * W: 75 MB for 3 x 32 x 32.
        """
        mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
        least = _CONSTANT * x.abs().amax((0, 2, 3))  # a mean is rounded, so that a constant has a deviation too
        std = torch.where(std > least, std, torch.ones_like(std))
        plain = cls(mean, std)
        if not whiten:
            return plain
        flat = plain.apply(x).flatten(1).double()
        centre = flat.mean(0)
        covariance = (flat - centre).T @ (flat - centre) / len(flat)
        values, vectors = torch.linalg.eigh(covariance)
        roots = (values.clamp(min=0) + epsilon).sqrt()
        matrix, inverse = (vectors * each @ vectors.T for each in (1 / roots, roots))
        return cls(mean, std, centre.float(), matrix.float(), inverse.float())

    def apply(self, x: Tensor) -> Tensor:
        """Samples [N, C, H, W] to what is distilled."""
        z = (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        if self.centre is None or self.matrix is None:
            return z
        return ((z.flatten(1) - self.centre) @ self.matrix).view_as(z)

    def invert(self, z: Tensor) -> Tensor:
        """And back; differentiable."""
        if self.centre is not None and self.inverse is not None:
            z = (z.flatten(1) @ self.inverse + self.centre).view_as(z)
        return z * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
