"""Components that training has made worthless go for good: from the parameters and from the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.lowrank.layers import LowRankLayer

__all__ = ["hierarchical_lasso", "kept_rank", "shrink"]

_SMALLEST = 1e-12


def hierarchical_lasso(layers: Mapping[str, LowRankLayer]) -> Tensor:
    """Sum over layers and components j of ``||up[:, j:]|| + ||down[j:]||``: the later, the more often it is counted.

    A tail of zeros has no gradient of its own norm; what is added inside the root keeps it from being NaN.
    """
    squares = [
        each for layer in layers.values() for each in (layer.up.square().sum(0), layer.down.flatten(1).square().sum(1))
    ]
    tails = [(each.flip(0).cumsum(0) + _SMALLEST).sqrt().sum() for each in squares]
    return torch.stack(tails).sum() if tails else torch.zeros(())


def kept_rank(layer: LowRankLayer, threshold: float, scale: float = 1.0) -> int:
    """Components whose importance is at least ``threshold * scale``: a prefix, as importance never rises.

    Raises:
        ValueError: the weights are not finite: no component would be kept of them.
    """
    importance = layer.importance()
    if not bool(importance.isfinite().all()):
        raise ValueError("the weights are not finite: the last step was too large; go back to the last checkpoint")
    return int((importance >= threshold * scale).sum())


def shrink(layer: LowRankLayer, rank: int, optimizer: Optimizer | None = None) -> None:
    """Keep the first ``rank`` components of ``layer``, in ``optimizer`` and its state too.

    The layer gets new parameters: a graph that is still alive (the last loss's) knows the old ones by their shapes.

    Raises:
        ValueError: ``rank`` is more than there are: ranks never grow.
    """
    if not 0 <= rank <= layer.rank:
        raise ValueError(f"rank {rank}: this layer has {layer.rank}, and ranks never grow")
    if rank < layer.rank:
        layer.up = _cut(layer.up, 1, rank, optimizer)
        layer.down = _cut(layer.down, 0, rank, optimizer)


def _cut(parameter: nn.Parameter, axis: int, rank: int, optimizer: Optimizer | None) -> nn.Parameter:
    smaller = nn.Parameter(parameter.detach().narrow(axis, 0, rank).clone(), parameter.requires_grad)
    if optimizer is None:
        return smaller
    for group in optimizer.param_groups:
        group["params"] = [smaller if each is parameter else each for each in group["params"]]
    state = optimizer.state.pop(parameter, {})
    arrays = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    # State of a shape of its own (row and column sums) cannot be cut: it starts anew.
    if state and all(value.shape == parameter.shape for value in arrays.values()):
        optimizer.state[smaller] = state | {name: x.narrow(axis, 0, rank).clone() for name, x in arrays.items()}
    return smaller
