"""``compress distill``: from labelled images to a folder with a few synthetic ones, through experts and matching."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Generator, Tensor

from compress.data.distilled import Normalisation
from compress.distillation.distiller import PREVIEW_FILE, Distilled, Distiller
from compress.distillation.folder import DistillReport, Fitted, write_folder
from compress.distillation.judge import Judge
from compress.distillation.model_terms import ModelTerms
from compress.distillation.neighbours import Neighbours, find_neighbours
from compress.distillation.preparation import DistillOptions, Preparation, prepare
from compress.distillation.representatives import random_images, representatives
from compress.distillation.sheet import write_sheet
from compress.errors import InputError
from compress.files.cache import digest
from compress.files.outputs import claims
from compress.measure.machine import describe_environment
from compress.progress import Progress, silent

__all__ = ["DistillOptions", "distill"]

_JUDGED = 1000


@claims("out")
def distill(
    data: object,
    out: Path,
    *,
    classes: int,
    options: DistillOptions | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda sentence: None,
) -> DistillReport:
    """Distil labelled images into ``options.settings.each`` a class and write the folder ``out``.

    A stopped run keeps its state in ``.<out>.work`` beside it (with ``preview.png``), and the same call goes on.

    Args:
        data: what ``--calib`` takes, with labels 0 to ``classes`` - 1; images [N, C, H, W].
        say: called with how the model fits the images, where there is one, before anything takes long.

    Raises:
        InputError: the data, the network or an option cannot be used, an expert does not learn, or no iterate was
            better than the real images of the start (unless ``allow_originals``).
    """
    options = options or DistillOptions()
    ready = prepare(data, out, classes, options)
    settings, experts, terms = ready.settings, ready.experts, ready.terms
    if terms is not None:
        say(terms.fit)
    accuracies = experts.train(progress)
    start = _start(ready)
    labels = ready.labels[start]
    judge, judged = _judge(ready, start, options)
    clock = _Clock(progress)
    distiller = _distiller(ready, start, judge, options)
    found = distiller.run(clock.update)
    if found.scores and found.iteration == 0 and not options.allow_originals:
        raise InputError(_originals(found, len(start), ready.work if distiller.kept else None))
    fitted, z_images = _fitted(found, labels, terms, judge, settings.model_steps, progress)
    images = ready.standardisation.invert(z_images)
    neighbours = find_neighbours(images, ready.kept[start], ready.x, settings.seed)
    report = DistillReport(
        classes=classes,
        each=settings.each,
        method=options.method,
        provenance=digest([distiller.fingerprint, found.iteration]),
        step_size=found.rate,
        learned_step_size=found.learned,
        iteration=found.iteration,
        scores=found.scores,
        judged=judged if found.scores else "",
        losses=tuple(found.losses),
        matching=tuple(found.matching),
        expert_accuracies=tuple(accuracies),
        seconds_per_100=clock.seconds_per_100,
        neighbours=neighbours,
        settings={"distillation": asdict(settings), "experts": asdict(experts.settings)},
        model_accuracy=terms.accuracy if terms else None,
        model_distance=terms.distance if terms else None,
        fitted=fitted,
        notes=(*ready.notes, *_notes(found, terms, judged, fitted)),
        warnings=(*(terms.doubts if terms else ()), *_warnings(found, neighbours)),
        environment=describe_environment(),
    )
    write_folder(
        out, images, labels, settings.momentum, ready.standardisation, Normalisation.of(options.mean, options.std),
        report, *ready.span, overwrite=options.overwrite,
    )  # fmt: skip
    distiller.forget()
    return report


def _start(ready: Preparation) -> Tensor:
    """Which real images sets begin with, by index [n]: those an expert finds typical of their class, or any."""
    settings, experts, labels = ready.settings, ready.experts, ready.labels
    if not settings.representative:
        return random_images(labels, ready.classes, settings.each, settings.seed)
    recipe = experts.settings
    trained = experts.rows(settings.seed % recipe.count, recipe.epochs, recipe.epochs + 1)[0]
    logits = ready.network.logits(trained, ready.z)
    return representatives(logits, labels, ready.classes, settings.each, settings.seed)


def _distiller(ready: Preparation, start: Tensor, judge: Judge | None, options: DistillOptions) -> Distiller:
    """With its state, and a sheet of the set as it is, in the work folder."""
    settings, work, span = ready.settings, ready.work, ready.span

    def show(images: Tensor) -> None:
        write_sheet(work / PREVIEW_FILE, ready.standardisation.invert(images), settings.each, *span)

    return Distiller(
        ready.experts, ready.z[start], ready.labels[start], settings, judge=judge, terms=ready.terms,
        state=work / "state.safetensors", every=options.every, discard=options.overwrite, show=show,
    )  # fmt: skip


def _judge(ready: Preparation, start: Tensor, options: DistillOptions) -> tuple[Judge | None, str]:
    """On unseen images where there are any, or on the experts' that are not in ``start``, and in words which."""
    x, y, are = ready.unseen, ready.unseen_labels, ready.unseen_are
    if not len(x) and not options.hold_out:
        some = torch.randperm(len(ready.z), generator=Generator().manual_seed(ready.settings.seed))
        some = some[~torch.isin(some, start)][:_JUDGED]
        x, y, are = ready.z[some], ready.labels[some], f"{len(some):,} images the experts were trained on"
    if not len(x):
        return None, ""
    settings = ready.settings
    judge = Judge(
        ready.network, x, y, options.nets, options.judge_steps, settings.momentum, settings.augmentations, settings.seed
    )
    return judge, are


def _fitted(
    found: Distilled, labels: Tensor, terms: ModelTerms | None, judge: Judge | None, steps: int, progress: Progress
) -> tuple[Fitted | None, Tensor]:
    """The set's last steps, and its images after them; real images of the start stay as they are."""
    if terms is None or not steps or found.iteration == 0:
        return None, found.images
    fit = terms.fitted(found.images, labels, steps, progress)
    accuracy = judge.accuracy(fit.images, labels, found.rate) if judge is not None and found.scores else None
    distance, logits = zip(fit.before, fit.after, strict=True)
    return Fitted(steps=steps, distance=distance, logits=logits, moved=fit.moved, accuracy=accuracy), fit.images


class _Clock:
    """Passes progress on, and times iterations between two reports of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._last, self._seconds, self._count = progress, (0, 0.0), 0.0, 0

    def update(self, what: str, done: int, total: int) -> None:
        now, (before, then) = time.perf_counter(), self._last
        if done == before + 1 and then:
            self._seconds, self._count = self._seconds + now - then, self._count + 1
        judging = not what.startswith("distilling")
        self._last = (done, 0.0 if judging else now)
        self._progress(what, done, total)

    @property
    def seconds_per_100(self) -> float | None:
        return 100 * self._seconds / self._count if self._count else None


def _originals(found: Distilled, count: int, work: Path | None) -> str:
    ended = f" (stopped early: {found.stopped})" if found.stopped else ""
    anew = f" (each with --overwrite, as {work} keeps this run's state)" if work else ""
    return (
        f"nothing is written: no iterate was better than the {count} real images of the start{ended}; try more "
        f"--iterations or another --lr-images{anew}, or write real images with --allow-originals"
    )


def _warnings(found: Distilled, near: Neighbours) -> list[str]:
    """What makes the file as sensitive as the data, where that can be seen."""
    count = len(near.distances)
    if found.iteration == 0:
        return [f"the {count} images written are real ones: no iterate was better; treat this file like the originals"]
    if near.nearest_is_start or near.nearer_than_typical:
        return [
            f"{near.nearest_is_start} of the {count} images written are nearest to the real ones they began as, and "
            f"{near.nearer_than_typical} are as near to a real one as real ones are to each other: they can be matched "
            "to their originals; treat this file like the originals"
        ]
    return []


def _notes(found: Distilled, terms: ModelTerms | None, judged: str, fitted: Fitted | None) -> list[str]:
    notes = [f"sets were judged on {judged}, none of them among the start's"]
    if not found.scores:
        notes = ["no set was judged: the last one was kept"]
    elif found.iteration == 0:
        notes.append("no iterate was better than the real images of the start, which are what was written")
    if found.stopped:
        notes.append(f"stopped early: {found.stopped}")
    if terms is not None:
        notes.append(terms.fit)
        if terms.distance is None:
            notes.append("the model has no BatchNorm with statistics: its logits alone were matched")
    if fitted is not None:
        what, (then, now) = "mean logits of each class", fitted.logits
        if terms is not None and terms.distance is not None:
            what, (then, now) = "BatchNorm statistics", fitted.distance
        notes.append(
            f"{fitted.steps} steps on the model's terms alone took the set from {then:.2g} to {now:.2g} from its {what}"
        )
        if fitted.accuracy is not None:
            notes.append(f"networks trained on the set as it is then reach {100 * fitted.accuracy:.1f} %")
    return notes
