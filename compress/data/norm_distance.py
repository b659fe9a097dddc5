"""How far what a model's BatchNorm layers see is from what they saw in training.

The term that DeepInversion (arXiv 1912.08795, section 3.2) and ZeroQ (arXiv 2001.00281, section 3.1) make images by:
running statistics against those of a batch. Differences are relative to the statistics' own spread, so that layers of
any scale weigh alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["NormSeen", "norm_distance", "norms_seen"]

_EPSILON = 1e-5
# Where each form of the operation has its running mean; the variance is behind it. Exported programs call aten.
_aten = torch.ops.aten
_MEAN_AT = {
    nn.functional.batch_norm: 1,
    torch.batch_norm: 3,
    _aten.batch_norm.default: 3,
    _aten._native_batch_norm_legit_no_training.default: 3,
}


def norm_distance(module: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Tensor, int]:
    """Run ``module``, in evaluation mode (or a function that calls it), on ``inputs`` [N, ...].

    Returns:
        its output; the distance, a mean over channels and layers; how many layers kept statistics (0: no distance).
    """
    output, seen = norms_seen(module, *inputs)
    terms = [each.distance() for each in seen]
    return output, torch.stack(terms).mean() if terms else inputs[0].new_zeros(()), len(terms)


def norms_seen(module: Callable[..., Any], *inputs: Tensor) -> tuple[Any, list[NormSeen]]:
    """Run ``module``, which is in evaluation mode, on ``inputs`` [N, ...]: its output, and a row a BatchNorm layer."""
    with _Watch() as watch:
        output = module(*inputs)
    return output, watch.seen


@dataclass(frozen=True, eq=False)
class NormSeen:
    """Of a BatchNorm layer: mean and variance [C] of what goes in, and those that it keeps [C]."""

    mean: Tensor
    var: Tensor
    kept_mean: Tensor
    kept_var: Tensor

    def distance(self) -> Tensor:
        """Of what goes in from what is kept, a mean over channels."""
        shift = (self.mean - self.kept_mean).square() / (self.kept_var + _EPSILON)
        spread = ((self.var + _EPSILON) / (self.kept_var + _EPSILON)).sqrt() - 1
        return (shift + spread.square()).mean()


class _Watch(TorchFunctionMode):
    """Looks at every BatchNorm on its way: those of modules, of functions and of exported programs alike."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[NormSeen] = []

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
                self.seen.append(_seen(args[0] if args else kwargs["input"], mean, var))
        return func(*args, **kwargs)


def _seen(x: Tensor, mean: Tensor, var: Tensor) -> NormSeen:
    """What a layer that keeps ``mean`` and ``var`` sees of ``x`` [N, C, ...]."""
    places = [axis for axis in range(x.dim()) if axis != 1]
    return NormSeen(x.mean(places), x.var(places, correction=0), mean, var)
