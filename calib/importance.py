"""How much each value of a block's output counts for what the model returns.

The diagonal of the Fisher information (BRECQ, arXiv 2102.05426, equation 10), of a Gaussian around what the float
model returns: ``E[(J^T v)^2]`` with ``v ~ N(0, 1)``. It needs no labels and holds for any output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.calib.frontier import Frontier
from compress.calib.spill import SpilledSamples

__all__ = ["Importance"]

_DRAWS = 4
_SMALLEST = 1e-30


class Importance:
    """One weight for each number of the float graph's value called ``value``; 1 in the mean over all.

    Args:
        reference: the float graph's frontier, past ``value``, which is kept.
        answers: the nodes whose values the model returns, floats alone; what ``value`` has no part in is left out.
        batches: indices of consecutive samples, all of them.
        path: file that holds the weights until :meth:`close`.
    """

    def __init__(
        self,
        reference: Frontier,
        value: str,
        answers: Sequence[str],
        batches: tuple[Tensor, ...],
        seed: int,
        path: Path,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._squares = SpilledSamples(path)
        total, count = 0.0, 0
        for index in batches:
            squares = _squares(reference, value, answers, index, generator)
            total, count = total + float(squares.sum(dtype=torch.float64)), count + squares.numel()
            self._squares.append(squares)
        self._mean = max(total / count, _SMALLEST)

    def take(self, index: Tensor) -> Tensor:
        """Of the samples at ``index``, [n, ...] as the value is."""
        return self._squares.take(index) / self._mean

    def close(self) -> None:
        """Delete the file."""
        self._squares.close()


def _squares(
    reference: Frontier, value: str, answers: Sequence[str], index: Tensor, generator: torch.Generator
) -> Tensor:
    start = reference.value(value, index).requires_grad_()
    squares = torch.zeros_like(start)
    for answer in answers:
        given = reference.real(reference.through(answer, index, {}, {value: start}), index)
        if not given.requires_grad:
            continue
        for draw in range(_DRAWS):
            direction = torch.randn(given.shape, generator=generator)
            (gradient,) = torch.autograd.grad(given, start, direction, retain_graph=draw + 1 < _DRAWS)
            squares += gradient.square()
    return squares / _DRAWS
