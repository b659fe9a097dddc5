"""How far what a model's BatchNorm layers see is from what they saw in training.

The term that DeepInversion (arXiv 1912.08795, section 3.2) and ZeroQ (arXiv 2001.00281, section 3.1) make images by:
running statistics against those of a batch. Differences are relative to the statistics' own spread, so that layers of
any scale weigh alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NormDistance"]

_EPSILON = 1e-5


class NormDistance:
    """Runs ``module``, which is in evaluation mode and stays as it is, and measures at its BatchNorm layers.

    Attributes:
        norms: those with running statistics, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.norms = {
            name: part
            for name, part in module.named_modules()
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and part.running_mean is not None
        }

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The module's output for ``x`` [N, ...], and the distance: a mean over channels and layers; 0 without any."""
        terms: list[Tensor] = []
        handles = [
            part.register_forward_pre_hook(lambda norm, inputs: terms.append(_distance(norm, inputs[0])))
            for part in self.norms.values()
        ]
        try:
            output = self._module(x)
        finally:
            for handle in handles:
                handle.remove()
        return output, torch.stack(terms).mean() if terms else x.new_zeros(())


def _distance(norm: nn.Module, x: Tensor) -> Tensor:
    """Of the statistics of ``x`` [N, C, ...] from the running ones."""
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    places = [axis for axis in range(x.dim()) if axis != 1]
    shift = (x.mean(places) - mean).square() / (var + _EPSILON)
    spread = ((x.var(places, correction=0) + _EPSILON) / (var + _EPSILON)).sqrt() - 1
    return (shift + spread.square()).mean()
