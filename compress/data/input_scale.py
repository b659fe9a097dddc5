"""Level and spread of a model's inputs, as its first BatchNorm layer implies them.

Up to there most models are affine: a mean of the inputs' channels gives a mean of the layer's, and noise of a variance
a variance. Both are measured, on constant inputs and on noise; the inputs' level and spread that would give what the
layer keeps from training follow by least squares. So models that take raw pixels, small signals or ones with an offset
get inputs of their own size to start from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.data.norm_distance import NormSeen, norm_distance, norms_seen

__all__ = ["InputScale", "implied_scale"]

_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_SMALLEST = 1e-30
# Against levels that hardly any channel tells apart: those of two inputs that a layer only adds, say.
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class InputScale:
    """Inputs are ``level + spread * noise``: ``level`` [1, C, 1, ...], ``spread`` [1, 1, 1, ...] above zero."""

    level: Tensor
    spread: Tensor


def implied_scale(module: nn.Module, noise: Tensor) -> InputScale:
    """Where standard noise [N, C, ...] is to be taken, so that BatchNorm's statistics are met best.

    Of all that is tried, the noise as it is among it, that with the smallest distance over all layers.

    Args:
        module: in evaluation mode, with one BatchNorm layer or more.
    """
    shape = (1, noise.shape[1], *[1] * (noise.dim() - 2))
    with torch.no_grad():
        tried = [InputScale(torch.zeros(shape), torch.ones([1] * noise.dim())), *_implied(module, noise, shape)]
        distances = [float(norm_distance(module, each.level + each.spread * noise)[1]) for each in tried]
    finite = [place for place, distance in enumerate(distances) if distance < float("inf")]
    return tried[min(finite, key=distances.__getitem__)] if finite else tried[0]


def _implied(module: nn.Module, noise: Tensor, shape: tuple[int, ...]) -> Iterator[InputScale]:
    zero = _first(module, torch.zeros_like(noise))
    unit = torch.eye(shape[1]).reshape(shape[1], *shape[1:])
    columns = [_first(module, each.expand_as(noise)).mean - zero.mean for each in unit]
    weight = (zero.kept_var + _SMALLEST).rsqrt()
    response, wanted = torch.stack(columns, 1) * weight[:, None], (zero.kept_mean - zero.mean) * weight
    square = response.T.double() @ response.double()
    ridge = _RIDGE * float(square.diagonal().mean()) + _SMALLEST
    level = torch.linalg.solve(square + ridge * torch.eye(shape[1]).double(), response.T.double() @ wanted.double())
    level = level.float().reshape(shape)
    gain = _first(module, level + noise).var
    ratio = (zero.kept_var / gain.clamp(min=_SMALLEST))[gain > 0]
    if not len(ratio) or not level.isfinite().all():
        return
    spread = ratio.clamp(min=_SMALLEST).log().median().mul(0.5).exp()
    for factor in _FACTORS:
        for place in (level, torch.zeros(shape)):
            yield InputScale(place, (spread * factor).reshape([1] * noise.dim()))


def _first(module: nn.Module, x: Tensor) -> NormSeen:
    return norms_seen(module, x)[1][0]
