"""What a distillation would do, how long and in how much memory, before it does: a few steps of each kind, timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field
from torch import Generator, Tensor

from compress.distillation.distiller import PROBED, TRIED_RATES
from compress.distillation.episode import Episode, checkpoints, inner_batches
from compress.distillation.experts import train_expert
from compress.distillation.judge import train_on
from compress.distillation.preparation import DistillOptions, Preparation, prepare
from compress.distillation.representatives import random_images
from compress.distillation.student import Student
from compress.records.layers import Record

__all__ = ["DistillPreview", "preview"]

_STEPS, _TRIES, _BATCH = 2, 2, 512


class DistillPreview(Record):
    """A run that has not begun; times are within a factor of two where nothing else runs."""

    images: int = Field(description="that experts are trained on and sets are made of")
    shape: tuple[int, ...] = Field(description="[C, H, W]")
    classes: int
    each: int = Field(description="images a class to distil")
    judged: str = Field(description="the images sets are to be judged on")
    looks: int = Field(description="how often, the start among them")
    experts: int
    experts_there: int = Field(description="of them finished already")
    expert_epochs: int
    expert_steps: int = Field(description="of an epoch")
    expert_folder: str
    expert_bytes: int = Field(description="on disk, all of them")
    iterations: int
    student_steps: int = Field(description="of an iteration")
    iteration_seconds: float
    expert_seconds: float = Field(description="of all that are to be trained")
    distill_seconds: float = Field(description="of all iterations")
    judge_seconds: float
    memory_bytes: int = Field(description="beyond the program itself")
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.expert_seconds + self.distill_seconds + self.judge_seconds


def preview(data: object, out: Path, *, classes: int, options: DistillOptions | None = None) -> DistillPreview:
    """Read and check all that :func:`compress.distillation.job.distill` would, time a few steps, and write nothing.

    Raises:
        InputError: as there, before the first expert is trained.
    """
    options = options or DistillOptions()
    ready = prepare(data, out, classes, options)
    settings, recipe, terms = ready.settings, ready.experts.settings, ready.terms
    rehearsal = _Rehearsal(ready, options)
    judged = _judged_on(ready, options)
    return DistillPreview(
        images=len(ready.z),
        shape=tuple(ready.x.shape[1:]),
        classes=classes,
        each=settings.each,
        judged=judged,
        looks=_looks(ready) if judged else 0,
        experts=recipe.count,
        experts_there=rehearsal.experts_there,
        expert_epochs=recipe.epochs,
        expert_steps=rehearsal.expert_steps,
        expert_folder=str(ready.experts.folder),
        expert_bytes=recipe.count * rehearsal.trajectory_bytes,
        iterations=settings.iterations,
        student_steps=settings.steps,
        iteration_seconds=rehearsal.iteration_seconds,
        expert_seconds=rehearsal.expert_seconds(),
        distill_seconds=rehearsal.distill_seconds(),
        judge_seconds=rehearsal.judge_seconds() if judged else 0.0,
        memory_bytes=rehearsal.memory_bytes(),
        notes=(*ready.notes, *((terms.fit,) if terms else ())),
        warnings=terms.doubts if terms else (),
    )


def _looks(ready: Preparation) -> int:
    """How often sets are to be judged, the start among them."""
    return ready.settings.looks + 1 if ready.settings.looks else 0


def _judged_on(ready: Preparation, options: DistillOptions) -> str:
    """The images sets are to be judged on, in words; empty: none are judged."""
    if not _looks(ready):
        return ""
    if len(ready.unseen):
        return ready.unseen_are
    return "" if options.hold_out else "images the experts are trained on"


class _Rehearsal:
    """A few steps of each kind on the images at hand: how long they take, and what they hold in memory."""

    def __init__(self, ready: Preparation, options: DistillOptions) -> None:
        settings = ready.settings
        self.ready, self.options = ready, options
        start = random_images(ready.labels, ready.classes, settings.each, settings.seed)
        self.images, self.labels = ready.z[start], ready.labels[start]
        self.theta = ready.network.start(settings.seed)
        self.student = Student(ready.network, settings.momentum, augmentations=settings.augmentations)

    @property
    def experts_there(self) -> int:
        """How many are finished already."""
        experts = self.ready.experts
        return sum(experts.path(number).exists() for number in range(experts.settings.count))

    @property
    def expert_steps(self) -> int:
        """Of an epoch."""
        return -(-len(self.ready.z) // self.ready.experts.settings.batch)

    @property
    def trajectory_bytes(self) -> int:
        """Of an expert."""
        return (self.ready.experts.settings.epochs + 1) * self.theta.nbytes

    def expert_seconds(self) -> float:
        """Of all experts that are to be trained, and of looking at what all have learned."""
        recipe, count = self.ready.experts.settings, len(self.ready.z)
        some = min(_STEPS * recipe.batch, count)
        step = _seconds(lambda: self._train_expert(some)) / -(-some // recipe.batch)
        missing = recipe.count - self.experts_there
        trained = missing * (recipe.epochs * self.expert_steps * step + count * self.pass_seconds)
        return trained + recipe.count * count * self.pass_seconds

    @cached_property
    def pass_seconds(self) -> float:
        """Of an image through the network, without a graph."""
        some = self.ready.z[:_BATCH]
        return _seconds(lambda: self.ready.network.logits(self.theta, some)) / len(some)

    @cached_property
    def iteration_seconds(self) -> float:
        """Of the outer loop: the student's steps and the way back, and the model's terms, where there are some."""
        settings, episode = self.ready.settings, self._episode(_STEPS)
        run = _seconds(lambda: self.student.outcome(self.images, self.labels, 0.01, episode, settings.gradients))
        return settings.steps / _STEPS * run + self.model_seconds

    @cached_property
    def model_seconds(self) -> float:
        """Of a step on the model's terms alone; 0 where there are none."""
        terms = self.ready.terms
        return _seconds(lambda: terms.gradient(self.images, self.labels)) if terms is not None else 0.0

    def distill_seconds(self) -> float:
        """Of all iterations, of what is tried before them, and of the last steps on the model's terms."""
        settings, probing = self.ready.settings, 0.0
        if settings.rate is None:
            episode = self._episode(_STEPS)
            forward = _seconds(lambda: self.student.losses(self.images, self.labels, 0.01, episode))
            probing += len(TRIED_RATES) * PROBED * (settings.steps / _STEPS * forward)
        if settings.rate_images is None or settings.rate_rate is None:
            probing += PROBED * self.iteration_seconds
        fitting = settings.model_steps * self.model_seconds
        return probing + settings.iterations * self.iteration_seconds + fitting

    def judge_seconds(self) -> float:
        """Of all looks at sets, each with the step size that was learned and with the usual one."""
        options, network, augmentations = self.options, self.ready.network, self.ready.settings.augmentations

        def train() -> object:
            return train_on(network, self.images, self.labels, 0.01, _STEPS, 0, augmentations=augmentations)

        one = options.judge_steps * (_seconds(train) / _STEPS) + len(self.ready.unseen) * self.pass_seconds
        return _looks(self.ready) * 2 * options.nets * one

    def memory_bytes(self) -> int:
        """Beyond the program itself, where most is held."""
        ready, settings = self.ready, self.ready.settings
        batch = ready.experts.settings.batch
        kept = _saved_bytes(lambda: self._train_expert(batch))
        single = self._episode(1)
        held = _saved_bytes(lambda: self.student.unrolled(self.images, self.labels, 0.01, single))
        held *= settings.steps if settings.gradients == "unrolled" else 1
        held += 8 * math.isqrt(settings.steps) * self.theta.nbytes
        # A pass without a graph holds about half of what one with a graph keeps, and takes more images at a time.
        passing = kept * len(ready.z[:_BATCH]) // len(ready.z[:batch]) // 2
        # The images as they are, standardised, and flat twice where neighbours are searched; whitening in doubles.
        real = 4 * ready.x.nbytes + (8 * ready.x[0].numel() ** 2 * 4 if self.options.zca else 0)
        return real + max(kept + 2 * self.trajectory_bytes, held, passing)

    def _train_expert(self, count: int) -> object:
        """An epoch of one expert on the first ``count`` images."""
        ready = self.ready
        one = replace(ready.experts.settings, epochs=1)
        return train_expert(ready.network, ready.z[:count], ready.labels[:count], one)

    def _episode(self, steps: int) -> Episode:
        """As an iteration has, with an end that no expert has been to."""
        count = len(self.labels)
        batches = inner_batches(count, self.ready.settings.batch or count, steps, Generator().manual_seed(0))
        return Episode(self.theta, checkpoints(self.theta, [self.theta + 0.01], steps, "none"), batches)


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of a few: one alone may be ten times as long where other programs run."""
    found = math.inf
    for _ in range(_TRIES):
        begun = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - begun)
    return found


def _saved_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the way back, each storage once."""
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(found.values())
