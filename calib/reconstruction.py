"""Block reconstruction: all weights and grids of a block learned together, until its outputs come back.

One implementation, whose settings are the published methods:

    adaround   single layers, codes alone                                     Nagel et al. 2020 (arXiv 2004.10568)
    brecq      blocks, errors weighted, and activation steps learned          Li et al. 2021 (arXiv 2102.05426)
    qdrop      blocks, activation quantization dropped at random              Wei et al. 2022 (arXiv 2203.05740)
    genie      and weight steps learned, the codes below them frozen          Jeon et al. 2022 (arXiv 2212.04780)
    metaaug    on transformed copies of the samples as well (calib/metaaug)   Pham et al. 2024 (arXiv 2407.14726)

Biases are learned beside the weights, which none of the four does: they cost nothing at run time, and at few bits they
are worth as much as the rest. A block starts from the grids of the smallest squared error. The iterate whose outputs,
all codes decided, are best on a fixed part of the samples is kept, by their plain squared error also where learning is
weighted, and with copies of them where there are any; the start is among them: no block is worse there than rounding to
nearest. Once all codes are decided and nothing has become better for a while, the block is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calib.blocks import Block
from compress.calib.frontier import Frontier
from compress.calib.importance import Importance
from compress.calib.metaaug.settings import MetaAug
from compress.calib.soft import Masks, SoftGrid, SoftWeight
from compress.quant.grid import mse_grid, quantize
from compress.quant.pairs import step_bound
from compress.quant.problem import ActivationGrid, Effort, LayerProblem, Solution
from compress.quant.weights import QuantizedWeight
from compress.records.layers import QuantOption

__all__ = [
    "ADAROUND",
    "BRECQ",
    "GENIE",
    "QDROP",
    "BlockMethod",
    "BlockProblem",
    "BlockSolution",
    "LearnedBlock",
    "reconstruct",
]

_EVALUATED = 128
_CHECKS, _TICKS = 10, 100
_PATIENCE = 3  # checks without a better iterate, once all codes are decided
_DECIDED = 0.01
_WARM_UP = 0.2
_BETA = (20.0, 2.0)
# Published are 20,000 steps of 1e-3, 20 in all. Fewer steps are larger: at 300 (ResNet-20, W2A4, first blocks) 0.05 was
# better than 0.03, and 0.03 than 0.01; 30 in all is what was tried at 1,000, and no other sum was compared there.
_RATE_CODES, _LARGEST_RATE = 30.0, 0.05
_RATE_SCALE = 2e-3  # relative
_RATE_GRID = 1e-2  # relative
_RATE_BIAS = 2e-3  # deviations of the layer's output
_SMALLEST = 1e-30


@dataclass(frozen=True)
class BlockMethod:
    """One row of the table: as a layer's method it rounds to nearest, the start of its block's reconstruction.

    Attributes:
        whole_blocks: blocks of several layers; False: every layer alone.
        learn_grids: activation steps.
        learn_scales: weight steps.
        learn_biases: the layers' biases.
        drop: chance of an activation to stay unquantized, and of a block's input to be the float model's.
        weighted: the error of each number of the output counts as much as it matters for the model's answer.
        transform: how transformed copies of the samples are made, to learn on beside them; None: none.
    """

    whole_blocks: bool
    learn_grids: bool
    learn_scales: bool
    learn_biases: bool
    drop: float
    weighted: bool = False
    needs_data: bool = True
    sequential: bool = True
    grouped: bool = False
    iterations: int = 1000
    step_cost: float = 7.0  # measured on ResNet-20
    transform: MetaAug | None = None

    def solve(self, problem: LayerProblem, option: QuantOption, effort: Effort) -> Solution:
        """Where the block's reconstruction begins."""
        smallest = step_bound(problem, option)
        scale, zero_point = mse_grid(problem.weight, option.bits, option.symmetric, smallest=smallest)
        return Solution(quantize(problem.weight, scale, zero_point, option.bits))


ADAROUND = BlockMethod(whole_blocks=False, learn_grids=False, learn_scales=False, learn_biases=False, drop=0.0)
BRECQ = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=False, learn_biases=True, drop=0.0, weighted=True)
QDROP = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=False, learn_biases=True, drop=0.5)
GENIE = BlockMethod(whole_blocks=True, learn_grids=True, learn_scales=True, learn_biases=True, drop=0.5)


@dataclass(frozen=True)
class BlockProblem:
    """A block as its method sees it.

    Attributes:
        block: its place in the graph.
        ahead: the changed graph's frontier, right before the block.
        reference: the float graph's, past it, with the block's input and output at hand.
        samples: how many there are.
        batch: samples a step; what the graph's batch is fixed to, where it is.
        weights: by the node that unpacks it: float weight and where it starts.
        grids: by quantizer node's name: the grid's own name and start.
        biases: by call's node name: the node's operator, and the bias [O] that it adds (zeros where it adds none).
        importance: what the squared error of each number of the output is multiplied with; None: 1.
    """

    block: Block
    ahead: Frontier
    reference: Frontier
    samples: int
    batch: int
    weights: Mapping[str, tuple[Tensor, QuantizedWeight]]
    grids: Mapping[str, tuple[str, ActivationGrid]]
    biases: Mapping[str, tuple[Callable[..., Tensor], Tensor]]
    importance: Importance | None = None


@dataclass(frozen=True)
class BlockSolution:
    """Weights by node, steps [] by grid, biases [O] by call; relative squared errors before and after, and a remark."""

    weights: dict[str, QuantizedWeight]
    scales: dict[str, Tensor]
    biases: dict[str, Tensor]
    before: float
    after: float
    note: str | None


def reconstruct(
    problem: BlockProblem, method: BlockMethod, effort: Effort, progress: Callable[[int, int, float], None]
) -> BlockSolution:
    """Learn the block of ``problem``.

    Args:
        progress: called with steps done, steps in all and the relative squared error of the last check.
    """
    generator = torch.Generator().manual_seed(effort.seed)
    learned = LearnedBlock(problem, method, generator)
    evaluated = _spread(problem.samples, problem.batch)
    best = learned.solution()
    before = after = now = learned.hard_error(evaluated)
    optimizer = torch.optim.Adam(learned.groups(effort.iterations))
    rates = [group["lr"] for group in optimizer.param_groups]
    warm_up = int(_WARM_UP * effort.iterations)
    interval, tick = (max(effort.iterations // each, 1) for each in (_CHECKS, _TICKS))
    idle = 0
    note = None
    for step in range(effort.iterations):
        decay = 0.5 * (1 + math.cos(math.pi * step / effort.iterations))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (decay if group["anneal"] else 1.0)
        index = torch.randperm(problem.samples, generator=generator)[: problem.batch].sort().values
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
            idle = 0 if now < after else idle + 1
            if now < after:
                best, after = learned.solution(), now
            if idle >= _PATIENCE and learned.decided():
                break
        if (step + 1) % tick == 0:
            progress(step + 1, effort.iterations, now)
    if note is None and after == before and effort.iterations:
        note = "reconstruction found nothing better than rounding to nearest"
    return BlockSolution(*best, before, after, note)


def _spread(samples: int, batch: int) -> Tensor:
    """Samples to be judged by, evenly over all of them, in whole batches where there are enough."""
    count = min(_EVALUATED, samples)
    count = count // batch * batch or count
    return torch.arange(count) * samples // count


class LearnedBlock:
    """The trainables of a block, and the block run with them."""

    def __init__(self, problem: BlockProblem, method: BlockMethod, generator: torch.Generator) -> None:
        self.problem, self.method = problem, method
        self.masks = Masks(method.drop, generator) if method.drop else None
        self.weights = {
            name: SoftWeight(weight, start, method.learn_scales) for name, (weight, start) in problem.weights.items()
        }
        made = {name: SoftGrid(grid, self.masks, method.learn_grids) for name, grid in problem.grids.values()}
        self.grids = {node: made[name] for node, (name, _) in problem.grids.items()}
        self.by_name = made
        self.shifts = {
            name: torch.zeros_like(bias).requires_grad_(method.learn_biases)
            for name, (_, bias) in problem.biases.items()
        }
        self.units = self._deviations()
        self.starts = {name: start for name, (_, start) in problem.weights.items()}
        self.moved = False

    def trainables(self) -> dict[str, Tensor]:
        """What is learned, by name."""
        found = {f"{name} logits": each.logits for name, each in self.weights.items()}
        found |= {f"{name} scale": each.factor_log for name, each in self.weights.items() if self.method.learn_scales}
        if self.method.learn_grids:
            found |= {f"{name} step": each.factor_log for name, each in self.by_name.items()}
        if self.method.learn_biases:
            found |= {f"{name} shift": each for name, each in self.shifts.items()}
        return found

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Compute with ``values`` from now on, by the names of :meth:`trainables`; they may have a history."""
        for name, each in self.weights.items():
            each.logits = values.get(f"{name} logits", each.logits)
            each.factor_log = values.get(f"{name} scale", each.factor_log)
        for name, grid in self.by_name.items():
            grid.factor_log = values.get(f"{name} step", grid.factor_log)
        for name, shift in self.shifts.items():
            self.shifts[name] = values.get(f"{name} shift", shift)

    def groups(self, iterations: int) -> list[dict[str, object]]:
        """Parameter groups for Adam; ``anneal`` says whether the rate falls to zero."""
        codes = [each.logits for each in self.weights.values()]
        scales = [each.factor_log for each in self.weights.values() if each.factor_log.requires_grad]
        steps = [each.factor_log for each in self.by_name.values() if each.factor_log.requires_grad]
        rate = min(_RATE_CODES / max(iterations, 1), _LARGEST_RATE)
        found: list[dict[str, object]] = [{"params": codes, "lr": rate, "anneal": False}]
        shifts = [each for each in self.shifts.values() if each.requires_grad]
        for parameters, each in ((scales, _RATE_SCALE), (steps, _RATE_GRID), (shifts, _RATE_BIAS)):
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
        squares = error.square()
        if self.problem.importance is not None:
            squares = squares * self.problem.ahead.real(self.problem.importance.take(index), index)
        return squares.mean() * channels

    def undecided(self, beta: float) -> Tensor:
        """See :meth:`SoftWeight.undecided`; of all weights."""
        return torch.stack([each.undecided(beta) for each in self.weights.values()]).sum()

    @torch.no_grad()
    def decided(self) -> bool:
        """Whether no code is still between two."""
        return all(float((each.up() * (1 - each.up())).max()) < _DECIDED for each in self.weights.values())

    @torch.no_grad()
    def hard_error(self, index: Tensor) -> float:
        """Relative squared error with every code decided and nothing dropped."""
        for grid in self.by_name.values():
            grid.training = False
        weights = {name: each.dequantize() for name, each in self._decided().items()}
        error = norm = 0.0
        for part in index.split(self.problem.batch):
            change = self._run(part, weights, mixed=False)
            error += float(change.square().sum())
            norm += float(self._wanted(part).square().sum())
        return error / max(norm, _SMALLEST) if math.isfinite(error) else math.inf

    @torch.no_grad()
    def solution(self) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, Tensor]]:
        """Weights by node, steps by grid, biases by call."""
        scales = {name: grid.scale().clone() for name, grid in self.by_name.items()}
        return self._decided(), scales, {name: self._bias(name).clone() for name in self.shifts}

    def _decided(self) -> dict[str, QuantizedWeight]:
        # What nobody has moved is where it started: to nearest, which a logit of zero decides upwards.
        return {name: each.hard() for name, each in self.weights.items()} if self.moved else dict(self.starts)

    def _bias(self, call: str) -> Tensor:
        return self.problem.biases[call][1] + self.shifts[call] * self.units[call]

    @torch.no_grad()
    def _deviations(self) -> dict[str, Tensor]:
        """Of each call's output, on one batch."""
        problem = self.problem
        index = torch.arange(min(problem.batch, problem.samples))
        seen: dict[str, Tensor] = {}

        def watched(call: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: object) -> Tensor:
                found = operator(*args)
                seen[call] = problem.ahead.real(found, index).std(correction=0).clamp(min=_SMALLEST)
                return found

            return run

        instead = {call: watched(call, operator) for call, (operator, _) in problem.biases.items()}
        problem.ahead.through(problem.block.output, index, instead, {})
        return seen

    def _wanted(self, index: Tensor) -> Tensor:
        reference = self.problem.reference
        return reference.real(reference.value(self.problem.block.output, index), index)

    def output(self, index: Tensor, weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """The block's output for the samples at ``index``.

        Args:
            weights: by the node that unpacks it.
            given: what it reads, where that is not these samples' own.
        """
        problem = self.problem
        instead: dict[str, Callable[..., Tensor]] = dict(self.grids)
        instead |= {name: _constant(weight) for name, weight in weights.items()}
        instead |= {call: _with_bias(operator, self._bias(call)) for call, (operator, _) in problem.biases.items()}
        return problem.ahead.through(problem.block.output, index, instead, given)

    def mix(self, plain: Tensor, quantized: Tensor) -> Tensor:
        """The block's input, each element from the float or the quantized model by chance."""
        return quantized if self.masks is None else torch.lerp(plain, quantized, self.masks.draw(plain.shape))

    def _run(self, index: Tensor, weights: Mapping[str, Tensor], mixed: bool) -> Tensor:
        problem, given = self.problem, {}
        source = problem.block.input
        # Where several heads read one value, only the first of them finds it as it was before it was rounded.
        if mixed and self.masks is not None and source is not None and problem.ahead.holds(source):
            quantized, plain = (frontier.value(source, index) for frontier in (problem.ahead, problem.reference))
            given = {source: self.mix(plain, quantized)}
        return problem.ahead.real(self.output(index, weights, given), index) - self._wanted(index)


def _with_bias(operator: Callable[..., Tensor], bias: Tensor) -> Callable[..., Tensor]:
    return lambda x, weight, _=None, *rest: operator(x, weight, bias, *rest)


def _constant(weight: Tensor) -> Callable[..., Tensor]:
    return lambda *_: weight
