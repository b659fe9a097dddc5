"""A convolution's weight as a matrix in two ways, and which of them loses less of the outputs: tensors in, tensors out.

``channel`` [O, I * kh * kw]: filters of the kernel's size, then 1 x 1. ``spatial`` [O * kw, I * kh]: filters one wide,
then filters one high; up to min(O * kw, I * kh) components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.lowrank.factors import Factors, plain_factors, weighted_factors

__all__ = ["output_error", "spatial_factors", "spatial_matrix", "spatial_weight"]

_SMALLEST = 1e-6


def spatial_matrix(weight: Tensor) -> Tensor:
    """``weight`` [O, I, kh, kw] as [O * kw, I * kh]."""
    outputs, inputs, high, wide = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(outputs * wide, inputs * high)


def spatial_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """``matrix`` [O * kw, I * kh] as the weight of ``shape`` [O, I, kh, kw] that it unrolls."""
    outputs, inputs, high, wide = shape
    return matrix.reshape(outputs, wide, inputs, high).permute(0, 2, 3, 1)


def spatial_factors(weight: Tensor, gram: Tensor | None = None) -> Factors:
    """Components of ``weight`` [O, I, kh, kw] in the spatial unrolling, by what they add to the outputs.

    Without ``gram`` they are the singular ones. ``gram`` [I * kh * kw, I * kh * kw] is the patches' second moment.
    There is a closed form only for a product of one moment for a patch's columns and one for places along its width,
    ``G[(i, a, b), (j, c, d)] = V[(i, a), (j, c)] * H[b, d]``, so V and H are taken from ``gram`` as its partial traces:
    the factors are optimal at every rank where ``gram`` is such a product, and near it otherwise; ``energy`` is by the
    product, too. What a rank really loses is :func:`output_error`.
    """
    if gram is None:
        return plain_factors(spatial_matrix(weight))
    outputs, inputs, high, wide = weight.shape
    moments = gram.double().reshape(inputs * high, wide, inputs * high, wide)
    columns, along = torch.einsum("ibjb->ij", moments), torch.einsum("ibid->bd", moments)
    values, vectors = torch.linalg.eigh(along / along.trace().clamp(min=torch.finfo(torch.float64).tiny))
    values = values.clamp(min=_SMALLEST).sqrt()
    root, inverse = (vectors * each @ vectors.T for each in (values, 1 / values))
    rows = spatial_matrix(weight).double().reshape(outputs, wide, -1)
    found = weighted_factors((root @ rows).reshape(outputs * wide, -1), columns)
    up = (inverse @ found.up.reshape(outputs, wide, -1)).reshape(outputs * wide, -1)
    # Lengths between the two are free: equal ones, as all factors have.
    scale = (found.down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return Factors(
        (up * scale).to(weight).contiguous(), (found.down / scale[:, None]).to(weight), found.energy.to(weight)
    )


def output_error(change: Tensor, gram: Tensor | None) -> float:
    """Squared norm that ``change`` [O, ...] of a weight has in the outputs; in the weight without ``gram``."""
    rows = change.flatten(1).double()
    if gram is None:
        return float(rows.square().sum())
    return max(float((rows @ gram.double() * rows).sum()), 0.0) if math.prod(rows.shape) else 0.0
