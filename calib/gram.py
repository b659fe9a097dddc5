"""Gram matrices of layers' inputs, streamed: ``G = sum of x x^T`` over every row a weight is multiplied with.

A row is what one output position reads: the input vector of a linear, the unfolded patch of a convolution. With
``G`` the squared output error of any change of the weight is known without the samples:
``||dW X||^2 = tr(dW G dW^T)`` (GPTQ's Hessian is 2 G, arXiv 2210.17323). Grouped convolutions have one matrix a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["Gram", "SeenRows", "rows_of", "rows_read_by"]


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


def rows_read_by(call: fx.Node, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """From the input of ``call``, a layer with ``weight``, to the rows that it multiplies: see :func:`rows_of`."""
    if weight.dim() == 2:
        return lambda x: x.reshape(1, -1, x.shape[-1])
    sizes = weight.dim() - 2
    given = call.args[3:]
    stride, padding, dilation, groups = (*given, *([1], [0], [1], 1)[len(given) :])
    stride, padding, dilation = (list(each) * (sizes // len(each)) for each in (stride, padding, dilation))
    return lambda x: rows_of(x, weight.shape[2:], groups, stride, padding, dilation)


_BLOCK = 512
_ENOUGH = 64 * 1024
_SAMPLE = 2048
_SAMPLED_BATCHES = 4


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


class SeenRows:
    """A layer's rows, batch by batch, until there are enough: their gram matrix, and some of the rows themselves.

    Args:
        read: from a batch of the layer's input to its rows [1, n, K].
    """

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self._read = read
        self._gram = Gram()
        self._sample: list[Tensor] = []
        self.full = False
        self._seen = 0

    def update(self, batch: Tensor) -> None:
        """See another batch; of no effect once there are enough."""
        if self.full:
            return
        rows = self._read(batch)
        self._gram.update(rows)
        step = max(rows.shape[1] * _SAMPLED_BATCHES // _SAMPLE, 1)
        if sum(map(len, self._sample)) < _SAMPLE:
            self._sample.append(rows[0, ::step].clone())
        self._seen += rows.shape[1]
        self.full = self._seen >= max(_ENOUGH, 16 * rows.shape[2])

    def gram(self) -> Tensor:
        """[K, K]."""
        return self._gram.matrix()[0]

    def sample(self) -> Tensor:
        """[n, K]: rows of several batches."""
        return torch.cat(self._sample)[:_SAMPLE]
