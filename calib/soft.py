"""Weights and grids while they are learned: rounding that is decided softly, steps that move.

``h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)`` is added to the frozen codes below a weight, ``floor(W / s0)``, and
pushed to 0 or 1 by ``sum(1 - |2 h - 1|^beta)`` (AdaRound, arXiv 2004.10568, equations 23 and 24). The step may be
learned beside it while the codes below stay (Genie, arXiv 2212.04780, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.quant.problem import ActivationGrid
from compress.quant.weights import QuantizedWeight, spread

__all__ = ["Masks", "SoftGrid", "SoftWeight"]

_STRETCH = 1.2
_SHIFT = 0.1
_EDGE = 1e-4


class SoftWeight:
    """A weight on a grid whose codes may still go up or down by one.

    Args:
        weight: float32 [O, ...].
        start: its grid; its codes may be any.
        learn_scale: whether the step is learned, as a factor.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight, learn_scale: bool) -> None:
        self.bits, self.shape = start.bits, tuple(weight.shape)
        self.scale, self.zero_point = start.scale, start.zero_point
        steps = weight / self._spread(self.scale)
        self.below = torch.floor(steps)
        rest = (steps - self.below).clamp(_EDGE, 1 - _EDGE)
        self.logits = torch.logit((rest + _SHIFT) / _STRETCH).requires_grad_()
        self.factor_log = torch.zeros_like(self.scale).requires_grad_(learn_scale)

    def soft(self) -> Tensor:
        """The weight with every code between the two that it may have, [O, ...]."""
        return self._of_codes(self.below + self.up())

    def up(self) -> Tensor:
        """How far each code has gone up, 0 to 1."""
        return (_STRETCH * torch.sigmoid(self.logits) - _SHIFT).clamp(0, 1)

    def undecided(self, beta: float) -> Tensor:
        """What is added to the loss: the number of codes between, counted the more strictly the smaller ``beta``."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> QuantizedWeight:
        """Every code decided."""
        zero = self._spread(self.zero_point.float())
        codes = (self.below + (self.logits >= 0) + zero).clamp(0, (1 << self.bits) - 1)
        return QuantizedWeight(codes.to(torch.uint8), self._scale().detach(), self.zero_point, self.bits)

    def _of_codes(self, codes: Tensor) -> Tensor:
        low = -self._spread(self.zero_point.float())
        return torch.clamp(codes, low, low + ((1 << self.bits) - 1)) * self._spread(self._scale())

    def _scale(self) -> Tensor:
        return self.scale * self.factor_log.exp()

    def _spread(self, values: Tensor) -> Tensor:
        return spread(values, self.shape, None)


class Masks:
    """Random zeros and ones, float32: windows of one long row of them, as drawing anew costs as much as a layer.

    Args:
        drop: the share of zeros.
    """

    def __init__(self, drop: float, generator: torch.Generator) -> None:
        self.drop, self.generator = drop, generator
        self._row = torch.empty(0)

    def draw(self, shape: torch.Size) -> Tensor:
        """A mask of ``shape``."""
        count = shape.numel()
        if len(self._row) < 4 * count:
            self._row = (torch.rand(4 * count, generator=self.generator) >= self.drop).float()
        start = int(torch.randint(len(self._row) - count, (), generator=self.generator))
        return self._row[start : start + count].reshape(shape)


class SoftGrid:
    """An activation's grid whose step is learned (LSQ, arXiv 1902.08153), as a factor; its zero point stays.

    Args:
        masks: where it is 0 a value is left as it is while training (QDrop, arXiv 2203.05740); None: nowhere.
    """

    def __init__(self, grid: ActivationGrid, masks: Masks | None, learn: bool) -> None:
        self.grid, self.masks = grid, masks
        self.factor_log = torch.zeros(()).requires_grad_(learn)
        self.training = True

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """``x`` on the grid, gradients passing straight through where it does not clip."""
        rounded = self.masks.draw(x.shape) if self.training and self.masks is not None else None
        low = torch.iinfo(self.grid.zero_point.dtype).min - int(self.grid.zero_point)
        return _OnGrid.apply(x, self.scale(), low, low + (1 << self.grid.bits) - 1, rounded)

    def scale(self) -> Tensor:
        """[]."""
        return (self.grid.scale * self.factor_log.exp()).clamp(max=self.grid.largest_scale)


class _OnGrid(torch.autograd.Function):
    """``clip(round(x / s), low, high) * s`` where ``rounded`` is 1, and ``x`` where it is 0; one pass each way.

    Masks are numbers, and clipped gradients come from hardtanh's: operators on booleans are ten times slower.
    Twice differentiable: between two codes it is linear in ``x`` and ``s``, so that its gradients depend on nothing but
    the gradient that comes in, and what is saved may be without a history. Nothing saved is written to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, rounded: Tensor | None) -> Tensor:
        steps = x / scale
        codes = steps.round().clamp_(low, high)
        ctx.ends = (low - 0.5, high + 0.5)
        found = codes * scale
        # d/ds: what rounding moved a value by, in steps; the code itself where it clips.
        moved = codes.sub_(torch.ops.aten.hardtanh_backward(steps, steps, *ctx.ends))
        ctx.save_for_backward(steps, moved, rounded)
        return found if rounded is None else found.sub_(x).mul_(rounded).add_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, moved, rounded = ctx.saved_tensors
        quantized = gradient if rounded is None else gradient * rounded
        by_scale = torch.dot(quantized.flatten(), moved.flatten())
        passed = torch.ops.aten.hardtanh_backward(quantized, steps, *ctx.ends)
        if rounded is not None:
            passed = passed.add_(gradient).sub_(quantized)
        return passed, by_scale, None, None, None
