"""Where the transformation begins: an autoencoder of the calibration samples, close to changing nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["warm_start"]

_BATCH = 32
_RATE = 2e-3
_CHECKS = 10
_EVALUATED = 128
_GOOD = 0.1  # of the margin


def warm_start(
    network: nn.Module,
    values: Tensor,
    steps: int,
    margin: float,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> None:
    """Train ``network`` in place to return ``values``, images [N, C, H, W] or sequences [N, L, C].

    Args:
        steps: at most; ends early where the error is a tenth of ``margin``.
        margin: mean squared change that it will be asked for later on.
        progress: called with steps done, steps in all and the mean squared error.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    judged = values[:_EVALUATED]
    interval = max(steps // _CHECKS, 1)
    network.train()
    for step in range(steps):
        x = values[torch.randperm(len(values), generator=generator)[:_BATCH]]
        for group in optimizer.param_groups:  # small steps at the end: statistics kept are those of settled weights
            group["lr"] = _RATE * max(1 - step / steps, 0.1)
        loss = (network(x) - x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % interval == 0 or step + 1 == steps:
            network.eval()  # as it will be used
            with torch.no_grad():
                error = float((network(judged) - judged).square().mean())
            network.train()
            progress(step + 1, steps, error)
            if error <= _GOOD * margin:
                break
