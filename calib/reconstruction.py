"""Block reconstruction: all weights and grids of a block learned together, until its outputs come back.

One implementation, whose settings are the published methods:

    adaround   single layers, codes alone                                     Nagel et al. 2020 (arXiv 2004.10568)
    brecq      blocks, and activation steps learned                           Li et al. 2021 (arXiv 2102.05426)
    qdrop      and activation quantization dropped at random                  Wei et al. 2022 (arXiv 2203.05740)
    genie      and weight steps learned, the codes below them frozen          Jeon et al. 2022 (arXiv 2212.04780)

A block starts from the grids of the smallest squared error. The iterate whose outputs, all codes decided, are best on a
fixed part of the samples is kept, the start among them: no block is worse there than rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calib.blocks import Block
from compress.calib.frontier import Frontier
from compress.calib.soft import SoftGrid, SoftWeight
from compress.problem import ActivationGrid, Effort, LayerProblem, Solution
from compress.quant.grid import mse_grid, quantize
from compress.records import QuantOption
from compress.weights import QuantizedWeight

__all__ = ["ADAROUND", "BRECQ", "GENIE", "QDROP", "BlockMethod", "BlockProblem", "BlockSolution", "reconstruct"]

_BATCH = 32
_EVALUATED = 128
_CHECKS = 10
_WARM_UP = 0.2
_BETA = (20.0, 2.0)
# 20,000 steps of 1e-3 is what is published: as far in fewer, larger ones, but no further than this a step.
_RATE_CODES, _LARGEST_RATE = 20.0, 1e-2
_RATE_SCALE = 1e-3  # relative
_RATE_GRID = 1e-3  # relative
_SMALLEST = 1e-30


@dataclass(frozen=True)
class BlockMethod:
    """One row of the table: as a layer's method it rounds to nearest, the start of its block's reconstruction.

    Attributes:
        whole_blocks: blocks of several layers; False: every layer alone.
        learn_grids: activation steps.
        learn_scales: weight steps.
        drop: chance of an activation to stay unquantized, and of a block's input to be the float model's.
    """

    whole_blocks: bool
    learn_grids: bool
    learn_scales: bool
    drop: float
    needs_data: bool = True
    sequential: bool = True
    grouped: bool = False

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Where the block's reconstruction begins."""
        scale, zero_point = mse_grid(problem.weight, option.bits, option.symmetric)
        return Solution(quantize(problem.weight, scale, zero_point, option.bits))


ADAROUND = BlockMethod(whole_blocks=False, learn_grids=False, learn_scales=False, drop=0.0)
BRECQ = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=False, drop=0.0)
QDROP = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=False, drop=0.5)
GENIE = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=True, drop=0.5)


@dataclass(frozen=True)
class BlockProblem:
    """A block as its method sees it.

    Attributes:
        block: its place in the graph.
        ahead: the changed graph's frontier, right before the block.
        reference: the float graph's, past it, with the block's input and output at hand.
        weights: by the node that unpacks it: float weight and where it starts.
        grids: by quantizer node's name: the grid's own name and start.
    """

    block: Block
    ahead: Frontier
    reference: Frontier
    samples: int
    weights: Mapping[str, tuple[Tensor, QuantizedWeight]]
    grids: Mapping[str, tuple[str, ActivationGrid]]


@dataclass(frozen=True)
class BlockSolution:
    """Weights by node, steps [] by grid, relative squared output errors at the start and now, and a remark."""

    weights: dict[str, QuantizedWeight]
    scales: dict[str, Tensor]
    before: float
    after: float
    note: str | None


def reconstruct(
    problem: BlockProblem, method: BlockMethod, effort: Effort, progress: Callable[[int, int, float], None]
) -> BlockSolution:
    """Learn the block of ``problem``.

    Args:
        progress: called with steps done, steps in all and the loss.
    """
    generator = torch.Generator().manual_seed(effort.seed)
    learned = _Learned(problem, method, generator)
    evaluated = torch.linspace(0, problem.samples - 1, min(_EVALUATED, problem.samples)).round().long().unique()
    best = learned.solution()
    before = after = learned.hard_error(evaluated)
    optimizer = torch.optim.Adam(learned.groups(effort.iterations))
    rates = [group["lr"] for group in optimizer.param_groups]
    warm_up = int(_WARM_UP * effort.iterations)
    interval = max(effort.iterations // _CHECKS, 1)
    note = None
    for step in range(effort.iterations):
        decay = 0.5 * (1 + math.cos(math.pi * step / effort.iterations))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (decay if group["anneal"] else 1.0)
        index = torch.randperm(problem.samples, generator=generator)[:_BATCH].sort().values
        loss = learned.loss(index)
        total = loss
        if step >= warm_up:
            done = (step - warm_up) / max(effort.iterations - warm_up, 1)
            total = loss + learned.undecided(_BETA[0] + (_BETA[1] - _BETA[0]) * done)
        if not bool(torch.isfinite(total)):
            note = f"its loss is not finite at step {step}: what it was best at before is kept"
            break
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        if (step + 1) % interval == 0 or step + 1 == effort.iterations:
            now = learned.hard_error(evaluated)
            if now < after:
                best, after = learned.solution(), now
            progress(step + 1, effort.iterations, now)
    if note is None and after == before and effort.iterations:
        note = "reconstruction found nothing better than rounding to nearest"
    return BlockSolution(*best, before, after, note)


class _Learned:
    """The trainables of a block, and the block run with them."""

    def __init__(self, problem: BlockProblem, method: BlockMethod, generator: torch.Generator) -> None:
        self.problem, self.method, self.generator = problem, method, generator
        self.weights = {
            name: SoftWeight(weight, start, method.learn_scales) for name, (weight, start) in problem.weights.items()
        }
        made = {
            name: SoftGrid(grid, method.drop, method.learn_grids, generator) for name, grid in problem.grids.values()
        }
        self.grids = {node: made[name] for node, (name, _) in problem.grids.items()}
        self.by_name = made
        self.starts = {name: start for name, (_, start) in problem.weights.items()}
        self.moved = False

    def groups(self, iterations: int) -> list[dict[str, object]]:
        """Parameter groups for Adam; ``anneal`` says whether the rate falls to zero."""
        codes = [each.logits for each in self.weights.values()]
        scales = [each.factor_log for each in self.weights.values() if each.factor_log.requires_grad]
        steps = [each.factor_log for each in self.by_name.values() if each.factor_log.requires_grad]
        rate = min(_RATE_CODES / max(iterations, 1), _LARGEST_RATE)
        found: list[dict[str, object]] = [{"params": codes, "lr": rate, "anneal": False}]
        for parameters, each in ((scales, _RATE_SCALE), (steps, _RATE_GRID)):
            if parameters:
                found.append({"params": parameters, "lr": each, "anneal": True})
        return found

    def loss(self, index: Tensor) -> Tensor:
        """Squared error of the block's output, summed over channels, mean over everything else."""
        self.moved = True
        for grid in self.by_name.values():
            grid.training = True
        error = self._run(index, {name: each.soft() for name, each in self.weights.items()}, mixed=True)
        channels = error.shape[1] if error.dim() in (2, 4) else error.shape[-1]
        return error.square().mean() * channels

    def undecided(self, beta: float) -> Tensor:
        """See :meth:`SoftWeight.undecided`; of all weights."""
        return torch.stack([each.undecided(beta) for each in self.weights.values()]).sum()

    @torch.no_grad()
    def hard_error(self, index: Tensor) -> float:
        """Relative squared error with every code decided and nothing dropped."""
        for grid in self.by_name.values():
            grid.training = False
        weights = {name: each.dequantize() for name, each in self._decided().items()}
        error = norm = 0.0
        for part in index.split(_BATCH):
            change = self._run(part, weights, mixed=False)
            error += float(change.square().sum())
            norm += float(self._wanted(part).square().sum())
        return error / max(norm, _SMALLEST) if math.isfinite(error) else math.inf

    @torch.no_grad()
    def solution(self) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Weights by node and steps by grid."""
        return self._decided(), {name: grid.scale().clone() for name, grid in self.by_name.items()}

    def _decided(self) -> dict[str, QuantizedWeight]:
        # What nobody has moved is where it started: to nearest, which a logit of zero decides upwards.
        return {name: each.hard() for name, each in self.weights.items()} if self.moved else dict(self.starts)

    def _wanted(self, index: Tensor) -> Tensor:
        reference = self.problem.reference
        return reference.real(reference.value(self.problem.block.output, index), index)

    def _run(self, index: Tensor, weights: Mapping[str, Tensor], mixed: bool) -> Tensor:
        problem = self.problem
        instead: dict[str, Callable[..., Tensor]] = dict(self.grids)
        instead |= {name: _constant(weight) for name, weight in weights.items()}
        given = {}
        source = problem.block.input
        if mixed and self.method.drop and source is not None:
            quantized, plain = (frontier.value(source, index) for frontier in (problem.ahead, problem.reference))
            kept = torch.rand(plain.shape, generator=self.generator) < self.method.drop
            given = {source: torch.where(kept, plain, quantized)}
        found = problem.ahead.through(problem.block.output, index, instead, given)
        return problem.ahead.real(found, index) - self._wanted(index)


def _constant(weight: Tensor) -> Callable[..., Tensor]:
    return lambda *_: weight
