"""Bias correction: shift a layer's bias so that its mean output a channel is the float layer's.

The empirical form of Nagel et al. (arXiv 1906.04721, section 4.2), over all calibration samples, with the layer's input
from the quantized prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.graph.quantizers import on_grid
from compress.quant.problem import LayerProblem, Solution

__all__ = ["corrected_bias"]

_BATCH = 64


def corrected_bias(problem: LayerProblem, solution: Solution) -> Tensor:
    """The bias [O] that gives ``solution`` the float layer's mean output a channel, over all samples."""
    assert problem.inputs is not None
    assert problem.targets is not None
    grid = solution.grid if solution.grid is not None else problem.grid
    weight = solution.weight.dequantize()
    bias = solution.bias if solution.bias is not None else problem.bias
    bias = torch.zeros(len(weight)) if bias is None else bias
    difference = torch.zeros(len(weight), dtype=torch.float64)
    channel = -1 if weight.dim() == 2 else 1
    positions = 0
    with torch.no_grad():
        for index in torch.arange(len(problem.inputs)).split(_BATCH):
            x, y = problem.inputs.take(index), problem.targets.take(index)
            error = (y - problem.forward(on_grid(x, grid), weight, bias)).movedim(channel, 0).flatten(1)
            difference += error.sum(1, dtype=torch.float64)
            positions += error.shape[1]
    return bias + (difference / positions).float()
