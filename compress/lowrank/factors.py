"""A weight as two thin ones, ordered by what each component is worth: tensors in, tensors out.

:func:`plain_factors` orders by the weight's own singular values, :func:`weighted_factors` by what a component does to
the layer's outputs on real inputs: with their second moment ``G = E[x x^T]``, the best rank-b map is ``P_b P_b^T W``,
where ``P_b`` are the first b eigenvectors of ``W G W^T``. That is the truncated SVD of ``W G^(1/2)`` mapped back by
``G^(-1/2)``, without the inverse, and what Maestro's factors converge to for a linear map (arXiv 2308.14929).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factors", "break_even", "plain_factors", "rank_by_energy", "rank_by_threshold", "weighted_factors"]

_SLIVER = 1e-10


@dataclass(frozen=True)
class Factors:
    """``up @ down`` is the weight; the first b components are its best approximation of rank b.

    Attributes:
        up: [O, R].
        down: [R, I].
        energy: [R], non-increasing; what each component adds to the squared output (or weight), so that the squared
            error of rank b is the sum from b on.
    """

    up: Tensor
    down: Tensor
    energy: Tensor

    def truncated(self, rank: int) -> Factors:
        """The first ``rank`` components.

        Raises:
            ValueError: there are fewer, or ``rank`` is negative.
        """
        if not 0 <= rank <= len(self.energy):
            raise ValueError(f"rank {rank}: allowed are 0 to {len(self.energy)}")
        return Factors(self.up[:, :rank], self.down[:rank], self.energy[:rank])

    def product(self) -> Tensor:
        """The weight [O, I]."""
        return self.up @ self.down

    def relative_errors(self) -> Tensor:
        """Squared error of every rank 0..R, relative: [R + 1], from 1 down to 0."""
        tails = self.energy.double().flip(0).cumsum(0).flip(0)
        errors = torch.cat([tails, tails.new_zeros(1)])
        return errors / errors[0].clamp(min=torch.finfo(torch.float64).tiny)


def plain_factors(weight: Tensor) -> Factors:
    """All components of ``weight`` [O, I] by singular value, each factor with its root (exact in float64)."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values.sqrt()
    return Factors((left * root).to(weight), (root[:, None] * right).to(weight), values.square().to(weight))


def weighted_factors(weight: Tensor, gram: Tensor) -> Factors:
    """All components of ``weight`` [O, I] by what they add to the outputs of inputs with second moment ``gram`` [I, I].

    ``gram`` need not be scaled or of full rank. Both factors get rows and columns of equal length.
    """
    exact, gram = weight.double(), gram.double()
    outputs, inputs = exact.shape
    if outputs <= inputs:
        moments = exact @ gram @ exact.T
        values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    else:
        # The same left vectors from the smaller side: those of W G^(1/2). What the inputs never hold gets a sliver, so
        # that all components together stay exact.
        lengths, turn = torch.linalg.eigh(gram)
        root = turn * lengths.clamp(min=_SLIVER * max(float(lengths[-1]), _SLIVER)).sqrt()
        vectors, values, _ = torch.linalg.svd(exact @ root, full_matrices=False)
        values, vectors = values.square().flip(0), vectors.flip(1)
    count = min(outputs, inputs)
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
    down = vectors.T @ exact
    # Lengths between the two are free: as equal ones they quantize and train alike.
    root = down.norm(dim=1).clamp(min=1e-30).sqrt()
    return Factors((vectors * root).to(weight), (down / root[:, None]).to(weight), values.to(weight))


def rank_by_energy(energy: Tensor, share: float) -> int:
    """The smallest rank whose components hold ``share`` (0 to 1) of the energy."""
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: allowed are 0 to 1")
    held = energy.double().cumsum(0)
    total = float(held[-1])
    return int((held < share * total * (1 - 1e-12)).sum()) + 1 if total > 0 and share > 0 else 0


def rank_by_threshold(energy: Tensor, threshold: float) -> int:
    """How many components have at least ``threshold`` times the first one's length (root of its energy)."""
    lengths = energy.double().clamp(min=0).sqrt()
    return int((lengths >= threshold * lengths[0]).sum()) if len(lengths) and float(lengths[0]) > 0 else 0


def break_even(outputs: int, inputs: int) -> float:
    """The rank at which two factors have as many weights as one matrix; they save below it."""
    return outputs * inputs / (outputs + inputs) if outputs and inputs else math.inf
