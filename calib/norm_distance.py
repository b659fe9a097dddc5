"""How far what a model's BatchNorm layers see is from what they saw in training.

The term that DeepInversion (arXiv 1912.08795, section 3.2) and ZeroQ (arXiv 2001.00281, section 3.1) make images by:
running statistics against those of a batch. Differences are relative to the statistics' own spread, so that layers of
any scale weigh alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["norm_distance"]

_EPSILON = 1e-5
# Where each form of the operation has its running mean; the variance is behind it. Exported programs call aten.
_aten = torch.ops.aten
_MEAN_AT = {
    nn.functional.batch_norm: 1,
    torch.batch_norm: 3,
    _aten.batch_norm.default: 3,
    _aten._native_batch_norm_legit_no_training.default: 3,
}


def norm_distance(module: nn.Module, *inputs: Tensor) -> tuple[Any, Tensor, int]:
    """Run ``module``, which is in evaluation mode, on ``inputs`` [N, ...].

    Returns:
        its output; the distance, a mean over channels and layers; how many layers kept statistics (0: no distance).
    """
    with _Watch() as watch:
        output = module(*inputs)
    terms = watch.terms
    return output, torch.stack(terms).mean() if terms else inputs[0].new_zeros(()), len(terms)


class _Watch(TorchFunctionMode):
    """Looks at every BatchNorm on its way: those of modules, of functions and of exported programs alike."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = {},
    ) -> Any:
        kwargs = kwargs or {}
        if (at := _MEAN_AT.get(func)) is not None:
            names = (("running_mean", at), ("running_var", at + 1))
            mean, var = (kwargs.get(name, args[place] if place < len(args) else None) for name, place in names)
            if mean is not None and var is not None:
                self.terms.append(_distance(args[0] if args else kwargs["input"], mean, var))
        return func(*args, **kwargs)


def _distance(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Of the statistics of ``x`` [N, C, ...] from the running ones [C]."""
    places = [axis for axis in range(x.dim()) if axis != 1]
    shift = (x.mean(places) - mean).square() / (var + _EPSILON)
    spread = ((x.var(places, correction=0) + _EPSILON) / (var + _EPSILON)).sqrt() - 1
    return (shift + spread.square()).mean()
