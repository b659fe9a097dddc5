"""GPTQ: rounding column by column, each column's error made up for by those that follow (arXiv 2210.17323).

With ``G`` the gram matrix of the layer's input, the error of an output channel is ``dw G dw^T``; once a column is
rounded, the best change of the remaining ones is known in closed form from the inverse of ``G``. Grids are fixed
beforehand (smallest squared error of each group), so that columns may be taken in any order: those with the largest
inputs first, while there is most left to make up with (act-order).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.calib.adaquant import evaluation_rows
from compress.calib.gram import Gram
from compress.graph.quantizers import on_grid
from compress.quant.pairs import LARGEST_CODE, LARGEST_PAIR, CodeBound, bound_of
from compress.quant.problem import Effort, LayerProblem, Solution
from compress.quant.rtn import MSE
from compress.quant.weights import QuantizedWeight, spread
from compress.records.layers import QuantOption

__all__ = ["GPTQ", "OptimalRounding"]

_BATCH = 32
_BLOCK = 128
_JUDGED = 128
_DAMPING = (0.01, 0.1, 1.0)  # of the mean diagonal; the next where the matrix is not positive definite


@dataclass(frozen=True)
class OptimalRounding:
    """The method; ``act_order``: columns by falling input energy, not as they stand."""

    act_order: bool = True
    needs_data: bool = True
    sequential: bool = True
    grouped: bool = True
    iterations: int = 0
    step_cost: float = 0.0

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Quantize the weight; bias and input grid stay. No channel ends worse than rounded to nearest."""
        nearest = MSE.solve(problem, option, effort)
        if problem.weight.dim() != 2 and problem.weight[0, 0].numel() > 1:
            return _noted(nearest, "rounded to nearest: gptq takes linears and 1x1 convolutions")
        gram = input_gram(problem)
        if len(gram) != problem.weight[0].numel():
            return _noted(nearest, "rounded to nearest: gptq takes no grouped convolutions")
        if not torch.isfinite(gram).all():
            return _noted(nearest, "rounded to nearest: its input's gram matrix is not finite")
        inverse, damping = _inverse_factor(gram, self.act_order)
        if inverse is None:
            return _noted(nearest, f"rounded to nearest: not positive definite at damping {_DAMPING[-1]:g}")
        order = _order(gram, self.act_order)
        codes = _round(problem.weight.flatten(1), nearest.weight, inverse, order, bound_of(problem, option))
        codes = _better_channels(problem, codes.reshape(problem.weight.shape), nearest.weight)
        note = f"gptq damping {damping:g}" if damping != _DAMPING[0] else None
        return Solution(replace(nearest.weight, codes=codes), note=note)


GPTQ = OptimalRounding()


def input_gram(problem: LayerProblem) -> Tensor:
    """``G`` [I, I] of the layer's input, on its grid where it has one, channels last."""
    assert problem.inputs is not None
    if problem.gram is not None:
        return problem.gram
    gram = Gram()
    for index in torch.arange(len(problem.inputs)).split(_BATCH):
        x = on_grid(problem.inputs.take(index), problem.grid)
        if problem.weight.dim() > 2:
            x = x.movedim(1, -1)
        gram.update(x.reshape(1, -1, x.shape[-1]))
    return gram.matrix()[0]


def _noted(solution: Solution, note: str) -> Solution:
    return Solution(solution.weight, solution.bias, solution.grid, note)


def _order(gram: Tensor, act_order: bool) -> Tensor:
    return gram.diagonal().argsort(descending=True) if act_order else torch.arange(len(gram))


def _inverse_factor(gram: Tensor, act_order: bool) -> tuple[Tensor | None, float]:
    """Upper Cholesky factor of the damped inverse, in the order of the columns, and the damping it took."""
    order = _order(gram, act_order)
    ordered = gram[order][:, order].double()
    dead = ordered.diagonal() == 0
    ordered.diagonal()[dead] = 1.0  # inputs that are always zero: any weight will do
    mean = ordered.diagonal().mean()
    for damping in _DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper.float(), damping
    return None, _DAMPING[-1]


def _round(weight: Tensor, nearest: QuantizedWeight, inverse: Tensor, order: Tensor, bound: CodeBound | None) -> Tensor:
    """Codes uint8 [O, I] of ``weight`` [O, I] on the grids of ``nearest``.

    Args:
        inverse: upper Cholesky factor of the damped inverse gram matrix, its columns in ``order``.
        bound: what the codes keep within; None: their type. Weights move once the step is fixed, so that the second
            of a pair takes what the first has left, and later columns make up for it.
    """
    shape = tuple(weight.shape)
    # A column of the weight is a row here: what the inner loop reads lies side by side.
    scale, zero = (
        spread(each.float(), shape, nearest.group_size).expand(shape).T[order].contiguous()
        for each in (nearest.scale, nearest.zero_point)
    )
    left = weight.T[order].contiguous()
    codes = torch.empty_like(left)
    top = (1 << nearest.bits) - 1
    neighbours = _neighbours(order) if bound is not None and bound.pairs else [None] * len(order)
    for start in range(0, shape[1], _BLOCK):
        stop = min(start + _BLOCK, shape[1])
        errors = torch.empty(stop - start, shape[0])
        for column in range(start, stop):
            q = (left[column] / scale[column]).round_().add_(zero[column])
            if bound is None:
                q.clamp_(0, top)
            else:
                _keep_within(q, zero[column], codes, neighbours[column])
            codes[column] = q
            error = q.sub_(zero[column]).mul_(scale[column]).sub_(left[column]).div_(-inverse[column, column])
            left[column + 1 : stop].addr_(inverse[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(weight, dtype=torch.uint8)
    found[:, order] = codes.T.to(torch.uint8)
    return found


def _neighbours(order: Tensor) -> list[int | None]:
    """By place in ``order``: the place of the column that it is multiplied with in one sum, where that comes before."""
    place = {int(column): at for at, column in enumerate(order)}
    found = (place.get(int(column) ^ 1) for column in order)
    return [other if other is not None and other < at else None for at, other in enumerate(found)]


def _keep_within(q: Tensor, zero: Tensor, codes: Tensor, neighbour: int | None) -> None:
    """Move ``q`` [O] to what ``codes`` [I, O] at ``neighbour`` leave it; ``zero`` [O] is in all of them."""
    if neighbour is None:
        q.clamp_(zero - LARGEST_CODE, zero + LARGEST_CODE)
        return
    other = codes[neighbour] - zero
    high = (LARGEST_PAIR - other.clamp(min=0)).clamp(max=LARGEST_CODE)
    low = (-LARGEST_PAIR - other.clamp(max=0)).clamp(min=-LARGEST_CODE)
    q.clamp_(zero + low, zero + high)


def _better_channels(problem: LayerProblem, codes: Tensor, nearest: QuantizedWeight) -> Tensor:
    """Per output channel the codes of the smaller error against the float layer, behind its activation."""
    assert problem.inputs is not None
    assert problem.targets is not None
    x, y = evaluation_rows(problem.inputs, problem.targets, _JUDGED)
    x = on_grid(x, problem.grid)
    channel = 1 if problem.weight.dim() > 2 else x.dim() - 1

    def error(weight: QuantizedWeight) -> Tensor:
        got = problem.activate(problem.forward(x, weight.dequantize(), problem.bias)) - problem.activate(y)
        return got.square().movedim(channel, 0).flatten(1).sum(1)

    better = error(replace(nearest, codes=codes)) < error(nearest)
    return torch.where(better.reshape(-1, *[1] * (codes.dim() - 1)), codes, nearest.codes)
