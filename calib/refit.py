"""The second of two thin layers fitted anew to what the whole layer gave, behind whatever comes before it by now.

The first factor and the layers before it are rounded, and a rank lost: the value between the factors is not what the
factors were made for. The map from there to the whole layer's outputs is a least-squares problem with a closed form,
``(U, b) = Y H^T (H H^T)^-1``, pulled towards the factor as it was where the samples say little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.graph.quantizers import on_grid
from compress.quant.problem import LayerProblem

__all__ = ["refit_up"]

_BATCH = 64
# Of the mean square of the values between the factors, over all rows.
_PULL = 1e-3


def refit_up(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Weight [O, R, *ones] and bias [O] that come closest to ``problem.targets`` from ``problem.inputs``.

    The problem is a linear's or a 1 x 1 convolution's, with samples.
    """
    assert problem.inputs is not None
    assert problem.targets is not None
    outputs, rank = problem.weight.shape[:2]
    channel = -1 if problem.weight.dim() == 2 else 1
    square = torch.zeros(rank + 1, rank + 1, dtype=torch.float64)
    cross = torch.zeros(rank + 1, outputs, dtype=torch.float64)
    for index in torch.arange(len(problem.inputs)).split(_BATCH):
        x, y = on_grid(problem.inputs.take(index), problem.grid), problem.targets.take(index)
        rows, wanted = (value.movedim(channel, -1).flatten(0, -2) for value in (x, y))
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        square += (rows.T @ rows).double()
        cross += (rows.T @ wanted).double()
    before = torch.cat([problem.weight.flatten(1).T, _bias(problem)[None]]).double()
    pull = _PULL * float(square.diagonal()[:-1].mean().clamp(min=1e-30)) * torch.eye(rank + 1, dtype=torch.float64)
    found = torch.linalg.solve(square + pull, cross + pull @ before)
    return found[:-1].T.reshape(problem.weight.shape).to(problem.weight), found[-1].to(problem.weight)


def _bias(problem: LayerProblem) -> Tensor:
    return problem.weight.new_zeros(len(problem.weight)) if problem.bias is None else problem.bias
