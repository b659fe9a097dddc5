"""BatchNorm's statistics belong to one set of ranks: measured anew for every size that a model is cut to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["norm_statistics", "recalibrate", "set_norm_statistics"]


def norm_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every BatchNorm's running mean and variance, by name."""
    return {
        f"{name}.{part}": getattr(norm, part).clone()
        for name, norm in _norms(module).items()
        for part in ("running_mean", "running_var")
    }


@torch.no_grad()
def set_norm_statistics(module: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Put back what :func:`norm_statistics` gave."""
    buffers = dict(module.named_buffers())
    for name, value in statistics.items():
        buffers[name].copy_(value)


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> int:
    """Measure every BatchNorm's statistics anew, as plain means over ``batches``; other rank, other statistics.

    Everything else stays in evaluation mode. Returns how many modules were measured.
    """
    norms = list(_norms(module).values())
    if not norms:
        return 0
    training = module.training
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        for batch in batches:
            module(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.train(training)
    return len(norms)


def _norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats
    }
