"""What a distillation would do, how long and in how much memory, before it does: a few steps of each kind, timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field
from torch import Generator, Tensor

from compress.distill.distiller import PROBED, TRIED_RATES
from compress.distill.episode import Episode, checkpoints, inner_batches
from compress.distill.experts import train_expert
from compress.distill.judge import train_on
from compress.distill.preparation import DistillOptions, prepare
from compress.distill.representatives import random_images
from compress.distill.student import Student
from compress.records import Record

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
    """Read and check all that :func:`compress.distill.job.distill` would, time a few steps, and write nothing.

    Raises:
        InputError: as there, before the first expert is trained.
    """
    options = options or DistillOptions()
    ready = prepare(data, out, classes, options)
    settings, experts, network = ready.settings, ready.experts, ready.network
    recipe = experts.settings
    start = random_images(ready.labels, classes, settings.each, settings.seed)
    images, labels = ready.z[start], ready.labels[start]
    there = sum(experts.path(number).exists() for number in range(recipe.count))
    steps = -(-len(ready.z) // recipe.batch)

    one = replace(recipe, epochs=1)
    some = slice(0, min(_STEPS * recipe.batch, len(ready.z)))
    step = _seconds(lambda: train_expert(network, ready.z[some], ready.labels[some], one)) / -(
        -len(ready.z[some]) // recipe.batch
    )
    theta = network.start(settings.seed)
    a_pass = _seconds(lambda: network.logits(theta, ready.z[:_BATCH])) / len(ready.z[:_BATCH])
    expert = (recipe.count - there) * (recipe.epochs * steps * step + len(ready.z) * a_pass) + (
        recipe.count * len(ready.z) * a_pass
    )

    student = Student(network, settings.momentum, augmentations=settings.augmentations)
    episode = _episode(theta, len(labels), settings.batch or len(labels), _STEPS)
    iteration = (
        settings.steps / _STEPS * _seconds(lambda: student.outcome(images, labels, 0.01, episode, settings.gradients))
    )
    terms, fitting = ready.terms, 0.0
    if terms is not None:
        step_on_model = _seconds(lambda: terms.gradient(images, labels))
        iteration, fitting = iteration + step_on_model, settings.model_steps * step_on_model
    probing = 0.0
    if settings.rate is None:
        forward = settings.steps / _STEPS * _seconds(lambda: student.losses(images, labels, 0.01, episode))
        probing += len(TRIED_RATES) * PROBED * forward
    if settings.rate_images is None or settings.rate_rate is None:
        probing += PROBED * iteration

    looks, judged = settings.looks + 1 if settings.looks else 0, ""
    if looks:
        seen = "" if options.hold_out else "images the experts are trained on"
        judged = ready.unseen_are if len(ready.unseen) else seen
    judging = 0.0
    if judged:
        trained = _seconds(
            lambda: train_on(
                network, images, labels, 0.01, _STEPS, 0, augmentations=settings.augmentations
            )
        ) / _STEPS  # fmt: skip
        judging = looks * 2 * options.nets * (options.judge_steps * trained + len(ready.unseen) * a_pass)

    kept = _saved_bytes(lambda: train_expert(network, ready.z[: recipe.batch], ready.labels[: recipe.batch], one))
    single = _episode(theta, len(labels), settings.batch or len(labels), 1)
    unrolled = _saved_bytes(lambda: student.unrolled(images, labels, 0.01, single))
    held = unrolled * (settings.steps if settings.gradients == "unrolled" else 1)
    held += 8 * math.isqrt(settings.steps) * theta.nbytes
    trajectory = (recipe.epochs + 1) * theta.nbytes
    # A pass without a graph holds about half of what one with a graph keeps, and takes more images at a time.
    passing = kept * len(ready.z[:_BATCH]) // len(ready.z[: recipe.batch]) // 2
    # The images as they are, standardised, and flat twice where neighbours are searched; whitening in doubles.
    real = 4 * ready.x.nbytes + (8 * ready.x[0].numel() ** 2 * 4 if options.zca else 0)
    return DistillPreview(
        images=len(ready.z),
        shape=tuple(ready.x.shape[1:]),
        classes=classes,
        each=settings.each,
        judged=judged,
        looks=looks if judged else 0,
        experts=recipe.count,
        experts_there=there,
        expert_epochs=recipe.epochs,
        expert_steps=steps,
        expert_folder=str(experts.folder),
        expert_bytes=recipe.count * trajectory,
        iterations=settings.iterations,
        student_steps=settings.steps,
        iteration_seconds=iteration,
        expert_seconds=expert,
        distill_seconds=probing + settings.iterations * iteration + fitting,
        judge_seconds=judging,
        memory_bytes=real + max(kept + 2 * trajectory, held, passing),
        notes=(*ready.notes, *((terms.fit,) if terms else ())),
        warnings=terms.doubts if terms else (),
    )


def _episode(start: Tensor, count: int, size: int, steps: int) -> Episode:
    """As an iteration has, with an end that no expert has been to."""
    batches = inner_batches(count, size, steps, Generator().manual_seed(0))
    return Episode(start, checkpoints(start, [start + 0.01], steps, "none"), batches)


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
