"""The meta phase of a block: the transformation learns what makes the block, learned on copies, right on originals.

Two levels (arXiv 2407.14726, equations 2 and 3). Inner: one step on the block's trainables that brings its output on
transformed samples near to the float block's. Outer: with the trainables so moved, as functions of the transformation,
the whole model's outputs on untouched samples (the quantized prefix, the block, the float rest) against the float ones.
The gradient of the outer loss passes through the inner step's gradient: the block is differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.calib.metaaug.losses import margin_loss, similarity_loss, validation_loss
from compress.calib.metaaug.settings import MetaAug
from compress.calib.metaaug.stretch import Stretch, output_names
from compress.calib.reconstruction import LearnedBlock
from compress.graph.layers import layer_calls
from compress.graph.traced import TracedModel

__all__ = ["MetaPhase", "Outcome"]

_PATIENCE, _FACTOR = 0.2, 0.95  # of the steps; published are 100 of 500
_ADAM = 1e-8
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Outcome:
    """Why the phase was given up, or None, and the mean squared change of the samples, as a share of their variance."""

    failure: str | None
    change: float


class MetaPhase:
    """Trains ``network`` in place on the block that ``learned`` holds.

    Args:
        network: the transformation.
        learned: the block's trainables, for this phase alone.
        float_model: the float graph.
        model: the changed one, finished up to the block.
        inputs: samples, one tensor [N, ...] a graph input.
        site: the node whose value is transformed.
        values: that of all samples in the float graph, images [N, C, H, W] or sequences [N, L, C].
    """

    def __init__(
        self,
        network: nn.Module,
        learned: LearnedBlock,
        float_model: TracedModel,
        model: TracedModel,
        inputs: tuple[Tensor, ...],
        site: str,
        values: Tensor,
        settings: MetaAug,
        seed: int,
    ) -> None:
        self.network, self.learned, self.settings = network, learned, settings
        self.inputs, self.site, self.values = inputs, site, values
        self.generator = torch.Generator().manual_seed(seed)
        block = learned.problem.block
        self.source = block.input if block.input is not None else site
        last = list(layer_calls(float_model).values())[-1][-1].args[0]
        assert isinstance(last, fx.Node)
        self.plain = Stretch(float_model, [self.source, block.output], [site])
        self.prefix = Stretch(model, [self.source], [site])
        self.rest = Stretch(float_model, output_names(float_model), [block.output])
        self.features = Stretch(float_model, [last.name], [site])
        self.feature_dim = float_model.batch_dim(last) or 0
        self.whole = Stretch(float_model, output_names(float_model))
        fixed = not model.dynamic_batch
        samples = learned.problem.samples
        self.batch = learned.problem.batch if fixed else min(settings.batch, samples)
        self.validation = learned.problem.batch if fixed else min(settings.validation, samples)
        self.deviation = float(self._real(values, torch.arange(len(values))).std(correction=0))
        rates = {
            id(each): float(group["lr"])  # type: ignore[arg-type]
            for group in learned.groups(settings.steps)
            for each in group["params"]  # type: ignore[attr-defined]
        }
        # What reconstruction moves each trainable by, at most, in a step.
        self.rates = {name: rates[id(each)] for name, each in learned.trainables().items()}
        self.factors: dict[str, float] = {}
        self.unrelated: float | None = None

    def run(self, progress: Callable[[int, int, float], None]) -> Outcome:
        """All steps. Where one goes wrong the transformation is what it was before.

        Args:
            progress: called with steps done, steps in all and the loss.
        """
        settings = self.settings
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        start = self.learned.trainables()
        optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.rate)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=_FACTOR, patience=max(int(_PATIENCE * settings.steps), 1)
        )
        failure = self._obstacle()
        for step in range(settings.steps if failure is None else 0):
            total, after = self.step()
            if not bool(torch.isfinite(total)):
                failure = f"its meta loss is not finite at step {step}"
                break
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
            optimizer.step()
            loss = float(total.detach())
            schedule.step(loss)
            self.learned.hold(start if settings.restart else {k: v.detach().requires_grad_() for k, v in after.items()})
            progress(step + 1, settings.steps, loss)
        change = self.change()
        if failure is None and not math.isfinite(change):
            failure = "the transformed samples are not finite"
        if failure is not None:
            self.network.load_state_dict(before)
        return Outcome(failure, change)

    def step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The outer loss of fresh batches, with its graph, and the trainables that the inner step led to."""
        settings = self.settings
        index = self._draw(self.batch)
        x = self.values[index]
        transformed = self.network(x)
        after = self.inner_step(index, transformed)
        validation = self.validation_loss(self._draw(self.validation), after)
        before, moved = (self._real(each, index) / self.deviation for each in (x, transformed))
        margin = margin_loss(before, moved, settings.margin)
        total = settings.validation_weight * validation + settings.margin_weight * margin
        if settings.similarity_weight:
            total = total + settings.similarity_weight * self._similarity(index, x, transformed)
        return total, after

    def inner_step(self, index: Tensor, transformed: Tensor) -> dict[str, Tensor]:
        """The trainables after one step towards the float block's output on ``transformed`` [B, ...].

        Functions of ``transformed``. The rounding's regulariser has no part in it: its gradient does not depend on the
        samples.
        """
        inputs, site = self._batch(index), {self.site: transformed}
        source, wanted = self.plain(inputs, site)
        (quantized,) = self.prefix(inputs, site)
        learned = self.learned
        for grid in learned.by_name.values():
            grid.training = True
        weights = {name: each.soft() for name, each in learned.weights.items()}
        given = {self.source: learned.mix(source, quantized)}
        error = self._real(learned.output(index, weights, given) - wanted, index)
        channels = error.shape[1] if error.dim() in (2, 4) else error.shape[-1]
        values = learned.trainables()
        gradients = torch.autograd.grad(
            error.square().mean() * channels, list(values.values()), create_graph=True, allow_unused=True
        )
        moves = {name: each for name, each in zip(values, gradients, strict=True) if each is not None}
        return values | {name: values[name] - self._move(name, each) for name, each in moves.items()}

    def validation_loss(self, index: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Of the untouched samples at ``index``; the block has ``values``, codes undecided, and nothing is dropped."""
        learned = self.learned
        kept = learned.trainables()
        learned.hold(values)
        for grid in learned.by_name.values():
            grid.training = False
        weights = {name: each.soft() for name, each in learned.weights.items()}
        output = learned.output(index, weights, {})
        learned.hold(kept)
        inputs = self._batch(index)
        got = self.rest(inputs, {learned.problem.block.output: output})
        with torch.no_grad():
            wanted = self.whole(inputs, {})
        aim, found = ([self._blank(each, index) for each in outputs] for outputs in (wanted, got))
        return validation_loss(aim, found, self.settings.temperature)

    @torch.no_grad()
    def change(self) -> float:
        """Mean squared change of all samples, as a share of their variance."""
        squares, count = 0.0, 0
        for index in torch.arange(len(self.values)).split(self.batch):
            x = self.values[index]
            moved = self._real(self.network(x) - x, index)
            squares, count = squares + float(moved.square().sum()), count + moved.numel()
        return squares / max(count, 1) / max(self.deviation**2, _SMALLEST)

    def _move(self, name: str, gradient: Tensor) -> Tensor:
        rate = self.rates[name]
        if self.settings.inner == "adam":  # a first step: mean and square of one gradient
            return rate * gradient / (gradient.abs() + _ADAM)
        # As far as Adam's first step would go, from the first batch on: gradients of codes, steps and biases are orders
        # of magnitude apart, and the rate must not depend on the samples that it is differentiated by.
        if name not in self.factors:
            size = float(gradient.detach().square().mean().sqrt())
            self.factors[name] = rate / size if size > _SMALLEST else 0.0
        return self.factors[name] * gradient

    def _similarity(self, index: Tensor, x: Tensor, transformed: Tensor) -> Tensor:
        x, transformed = self._blank(x, index), self._blank(transformed, index)  # partners may be longer
        mixtures = self._mixture(len(x))
        others = self._mixture(len(x)) if self.settings.independent_mixup else mixtures
        with torch.no_grad():
            wanted = self._features(index, _mixed(x, mixtures))
            if self.unrelated is None:  # the same features, each for its neighbour's
                self.unrelated = max(float(similarity_loss(wanted, wanted.roll(1, 0))), _SMALLEST)
        return similarity_loss(wanted, self._features(index, _mixed(transformed, others))) / self.unrelated

    def _features(self, index: Tensor, values: Tensor) -> Tensor:
        """What the float model's last layer reads, [B, F]."""
        (found,) = self.features(self._batch(index), {self.site: values})
        return self._blank(found.movedim(self.feature_dim, 0), index).reshape(len(values), -1)

    def _mixture(self, count: int) -> tuple[float, Tensor]:
        """Share of the first sample and partners: the larger of b and 1 - b, b from Beta(4, 4), a median of 7."""
        share = float(torch.rand(7, generator=self.generator).median())
        return max(share, 1 - share), torch.randperm(count, generator=self.generator)

    def _obstacle(self) -> str | None:
        problem = self.learned.problem
        if problem.block.input is not None and not problem.ahead.holds(problem.block.input):
            return "another block before it reads the same input"
        with torch.no_grad():
            index = torch.arange(self.batch)
            _, output = self.plain(self._batch(index), {self.site: self.values[index]})
        if not bool(torch.isfinite(output).all()):
            return "its output is not finite"
        return None if bool((output != output[:1]).any()) else "its output is the same for all samples"

    def _batch(self, index: Tensor) -> Sequence[Tensor]:
        return [each[index] for each in self.inputs]

    def _real(self, value: Tensor, index: Tensor) -> Tensor:
        return self.learned.problem.ahead.real(value, index)

    def _blank(self, value: Tensor, index: Tensor) -> Tensor:
        return self.learned.problem.ahead.blank(value, index)

    def _draw(self, count: int) -> Tensor:
        return torch.randperm(len(self.inputs[0]), generator=self.generator)[:count].sort().values


def _mixed(x: Tensor, mixture: tuple[float, Tensor]) -> Tensor:
    share, partners = mixture
    return share * x + (1 - share) * x[partners]
