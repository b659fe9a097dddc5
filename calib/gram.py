"""Gram matrices of layers' inputs, streamed: ``G = sum of x x^T`` over every row a weight is multiplied with.

A row is what one output position reads: the input vector of a linear, the unfolded patch of a convolution. With
``G`` the squared output error of any change of the weight is known without the samples:
``||dW X||^2 = tr(dW G dW^T)`` (GPTQ's Hessian is 2 G, arXiv 2210.17323). Grouped convolutions have one matrix a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Gram", "rows_of"]


def rows_of(
    x: Tensor,
    kernel: Sequence[int],
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The rows that a convolution multiplies its weight with, as [groups, rows, I / groups * positions of the kernel].

    Args:
        x: [N, I, H, W], or [N, I, L] for a one-dimensional kernel.
    """
    if len(kernel) == 1:
        x = x.unsqueeze(2)
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    patches = F.unfold(x, tuple(kernel), dilation=tuple(dilation), padding=tuple(padding), stride=tuple(stride))
    samples, columns, positions = patches.shape
    grouped = patches.reshape(samples, groups, columns // groups, positions)
    return grouped.permute(1, 0, 3, 2).reshape(groups, samples * positions, columns // groups)


_BLOCK = 512


class Gram:
    """``G`` [groups, K, K] in float32, accumulated batch by batch; K is a weight's row length within its group.

    It is symmetric, so only blocks on and above its diagonal are added up: little more than half of the work.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Add ``rows`` [groups, n, K]."""
        size = rows.shape[2]
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[0], size, size)
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
            self._sum[:, start:stop, start:] += torch.bmm(rows[:, :, start:stop].transpose(1, 2), rows[:, :, start:])

    def matrix(self) -> Tensor:
        """``G`` itself."""
        assert self._sum is not None, "no rows were added"
        for start in range(_BLOCK, self._sum.shape[1], _BLOCK):
            self._sum[:, start:, start - _BLOCK : start] = self._sum[:, start - _BLOCK : start, start:].transpose(1, 2)
        return self._sum

    def energy(self, weight: Tensor) -> float:
        """``tr(W G W^T)``: the squared norm that ``weight`` [O, I / groups, *kernel] gives its outputs."""
        matrix = self.matrix()
        groups = len(matrix)
        grouped = weight.reshape(groups, len(weight) // groups, -1)
        return float((torch.bmm(grouped, matrix) * grouped).double().sum())
