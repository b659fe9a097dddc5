"""Weights and grids while they are learned: rounding that is decided softly, steps that move.

``h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)`` is added to the frozen codes below a weight, ``floor(W / s0)``, and pushed
to 0 or 1 by ``sum(1 - |2 h - 1|^beta)`` (AdaRound, arXiv 2004.10568, equations 23 and 24). The step may be learned beside
it while the codes below stay (Genie, arXiv 2212.04780, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.problem import ActivationGrid
from compress.weights import QuantizedWeight, spread

__all__ = ["SoftGrid", "SoftWeight"]

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


class SoftGrid:
    """An activation's grid whose step is learned (LSQ, arXiv 1902.08153), as a factor; its zero point stays.

    Args:
        drop: the chance of each value to be left as it is (QDrop, arXiv 2203.05740); 0 where ``generator`` is None.
    """

    def __init__(self, grid: ActivationGrid, drop: float, learn: bool, generator: torch.Generator) -> None:
        self.grid, self.drop, self.generator = grid, drop, generator
        self.factor_log = torch.zeros(()).requires_grad_(learn)
        self.training = True

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """``x`` on the grid, gradients passing straight through where it does not clip."""
        kept = None
        if self.training and self.drop:
            kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(self.drop, generator=self.generator)
        low = torch.iinfo(self.grid.zero_point.dtype).min - int(self.grid.zero_point)
        return _OnGrid.apply(x, self.scale(), low, low + (1 << self.grid.bits) - 1, kept)  # type: ignore[no-untyped-call, no-any-return]

    def scale(self) -> Tensor:
        """[]."""
        return (self.grid.scale * self.factor_log.exp()).clamp(max=self.grid.largest_scale)


class _OnGrid(torch.autograd.Function):
    """``clip(round(x / s), low, high) * s`` where ``kept`` does not leave ``x`` as it is; one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, kept: Tensor | None) -> Tensor:
        steps = x / scale
        codes = steps.round().clamp_(low, high)
        ctx.save_for_backward(steps, codes, kept)
        ctx.ends = (low - 0.5, high + 0.5)
        found = codes * scale
        return found if kept is None else torch.where(kept, x, found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, codes, kept = ctx.saved_tensors
        low, high = ctx.ends
        inside = (steps >= low) & (steps <= high)
        rounded = gradient if kept is None else gradient.masked_fill(kept, 0.0)
        # d/ds: what rounding moved a value by, in steps; the code itself where it clips.
        by_scale = torch.dot(rounded.flatten(), (codes - steps.masked_fill_(~inside, 0.0)).flatten())
        passed = inside if kept is None else inside | kept
        return gradient.masked_fill(~passed, 0.0), by_scale, None, None, None
