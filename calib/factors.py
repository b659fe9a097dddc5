"""Two thin weights in a layer's place, chosen for its data and for the grids they will be stored on.

The best map of a rank is known from the gram matrix of the layer's input (compress/lowrank/factors.py). Between its two
factors any invertible map can be absorbed: ``up @ down = (up M^-1) (M down)``. Quantized, they differ: components with
large values leave the others no codes on a grid for the whole value between the factors, and columns of ``up`` with
large entries none in its rows. Lengths are shared as SmoothQuant does (arXiv 2211.10438, equation 4), with and without
an orthogonal map first that spreads every component over all (QuaRot, arXiv 2404.00456), and what errs least on real
rows is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calib.observers import activation_grid
from compress.graph.quantizers import on_grid
from compress.lowrank.factors import Factors, plain_factors, weighted_factors
from compress.quant.methods import METHODS
from compress.quant.problem import ActivationGrid, Effort, LayerProblem
from compress.records.layers import QuantOption
from compress.records.registry import resolve

__all__ = ["BRANCH_BITS", "Thin", "balanced", "best_factors", "correction", "multiply_up"]

BRANCH_BITS = 8
"""Of the factors of a branch beside a layer of few bits."""

_SMALL = 1e-12
_TURNS = 3


@dataclass(frozen=True)
class Thin:
    """``up @ down`` in a layer's place.

    Attributes:
        down: [R, I, *kernel].
        up: [O, R, *ones].
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, factors: Factors, weight: Tensor) -> Thin:
        """``factors`` of ``weight``, in the shapes that take its place."""
        down = factors.down.reshape(-1, *weight.shape[1:])
        return cls(down, factors.up.reshape(*factors.up.shape, *[1] * (weight.dim() - 2)))

    @property
    def weight(self) -> Tensor:
        """The dense weight that they stand for, [O, I, *kernel]."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


def best_factors(weight: Tensor, gram: Tensor | None) -> Factors:
    """All components of ``weight`` [O, I, *kernel] as a matrix, by what they do to its outputs.

    Args:
        gram: of the rows that ``weight`` is multiplied with, [K, K]; None: of equal rows, which is the plain SVD.
    """
    flat = weight.flatten(1)
    return plain_factors(flat) if gram is None else weighted_factors(flat, gram)


def correction(weight: Tensor, gram: Tensor | None, rank: int, option: QuantOption) -> Thin:
    """A branch that makes up for what rounding ``weight`` [O, I] as ``option`` says does to the outputs.

    Rounding and the best map of ``rank`` for what it leaves take turns (LQER, arXiv 2402.02446, weighted by the rows as
    there; LoftQ, arXiv 2310.08659, for the turns); the turn that leaves least is kept.
    """
    solve = resolve(METHODS, "mse", "method").solve
    moments = torch.eye(weight.shape[1]) if gram is None else gram
    best, least = None, float("inf")
    branch = torch.zeros_like(weight)
    for _ in range(_TURNS):
        problem = LayerProblem("", weight - branch, None, lambda x, *_: x)
        rounded = solve(problem, option, Effort(0, 0)).weight.dequantize()
        factors = best_factors(weight - rounded, gram).truncated(rank)
        branch = factors.product()
        left = weight - rounded - branch
        error = float(((left @ moments) * left).sum())
        if error < least:
            best, least = Thin.of(factors, weight), error
    assert best is not None
    return best


def balanced(thin: Thin, rows: Tensor, option: QuantOption) -> Thin:
    """``thin`` with the map between its factors that errs least with both quantized as ``option`` says.

    Args:
        rows: [n, K], what ``down`` is multiplied with.
    """
    down, up = thin.down.flatten(1), thin.up.flatten(1)
    wanted = rows @ down.T @ up.T
    best, least = (down, up), float("inf")
    for turned in (False, True):
        d, u = _turned(down, up) if turned else (down, up)
        reach, size = (rows @ d.T).abs().amax(0), u.abs().amax(0)
        for exponent in (0.0, 0.5, 1.0):
            s = reach.clamp(min=_SMALL) ** exponent / size.clamp(min=_SMALL) ** (1 - exponent)
            s = s / s.log().mean().exp()
            candidate = (d / s[:, None], u * s)
            error = float((_quantized(*candidate, rows, option) - wanted).square().sum())
            if error < least:
                best, least = candidate, error
    return Thin(best[0].reshape(thin.down.shape), best[1].reshape(thin.up.shape))


def multiply_up(x: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """The second factor's product: ``x`` [N, ..., R] with [O, R], or [N, R, *positions] with [O, R, *ones]."""
    products: dict[int, Callable[..., Tensor]] = {2: F.linear, 3: F.conv1d, 4: F.conv2d}
    return products[up.dim()](x, up, bias)


def _turned(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Every component spread over all by one random orthogonal map."""
    generator = torch.Generator().manual_seed(len(down))
    turn, _ = torch.linalg.qr(torch.randn(len(down), len(down), generator=generator))
    return turn @ down, up @ turn.T


def _quantized(down: Tensor, up: Tensor, rows: Tensor, option: QuantOption) -> Tensor:
    solve = resolve(METHODS, "minmax" if option.bits == 8 else "mse", "method").solve
    down, up = (
        solve(LayerProblem("", each, None, lambda x, *_: x), option, Effort(0, 0)).weight.dequantize()
        for each in (down, up)
    )
    between = rows @ down.T
    if option.act_bits is not None:
        low, high = min(float(between.min()), 0.0), max(float(between.max()), 0.0)
        grid = activation_grid(low, high, option.act_bits, torch.uint8)
        between = on_grid(between, ActivationGrid(*grid, option.act_bits, learnable=False))
    return between @ up.T
