"""``compress sparse train``: both phases of LT-SFT on labelled samples, from a model's file to a delta's."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compress.artifact import check_free
from compress.checkpoint import LoadedModel, load_model
from compress.deltas import REFERENCE_SUFFIX, open_deltas, unbound
from compress.errors import InputError
from compress.intake import ModelLike, read_model
from compress.progress import Progress, silent
from compress.sparse.application import apply_deltas, check_base, revert
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.criteria import BY_GRADIENT
from compress.sparse.delta import CLASSES, SparseDelta
from compress.sparse.deltafile import VALUES, read_delta, write_delta
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.labelled import (
    as_labels_of,
    check_labels,
    named_sources,
    new_outputs,
    read_labelled,
    read_sources,
)
from compress.training.loop import Epoch, Recipe, best_epoch, criterion_of, evaluate, fit

__all__ = ["FULL", "SparseCompanion", "SparseOptions", "SparseResult", "train_sparse"]

_NO_DELTAS = (".pt", ".pth", ".pt2", ".onnx")
FULL = Recipe(epochs=3, batch=32, rate=1e-3, weight_decay=0.0, schedule="linear", optimizer="adamw")


@dataclass(frozen=True)
class SparseOptions:
    """What is selected, from what, and how it is stored.

    Attributes:
        density, k, criterion, rounds, pattern, head, frozen, train_norms, l1: see
            :class:`~compress.sparse.tuner.SparseFineTuner`.
        sources: delta files that are added to the base first; the delta that comes out is one to the base itself. Their
            heads are left out.
        eval_source: which of several sources' deltas is added where test and dev samples are measured; None: none.
        values: see :func:`~compress.sparse.deltafile.write_delta`.
        factory: ``package.module:factory``, for a model file that holds weights only.
        allow: classes that a model file may use besides torch.nn's own.
        length: tokens of a text, at most; None: 128, or what the model takes.
        overwrite: replace the file, and throw away another run's checkpoints; those of the same run are gone on from.
    """

    density: float | None = None
    k: int | None = None
    criterion: str = "change"
    rounds: int = 1
    pattern: tuple[int, int] | None = None
    head: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    train_norms: bool = False
    l1: tuple[float, float] = (0.0, 0.0)
    sources: tuple[Path, ...] = ()
    eval_source: str | None = None
    values: str = "fp16"
    factory: str | None = None
    allow: tuple[str, ...] = ()
    length: int | None = None
    overwrite: bool = False

    def identity(self, loaded: LoadedModel, sources: Mapping[str, SparseDelta]) -> str:
        """What decides what a run on ``loaded`` learns, for its checkpoints: contents of files, not their names."""
        plain = replace(self, sources=(), overwrite=False, values="", factory=None, allow=())
        return repr((loaded.fingerprint, plain, [each.digest for each in sources.values()]))


@dataclass(frozen=True)
class SparseResult:
    """What was written, and how it went.

    Attributes:
        delta: as it is in the file.
        maskable: entries that were selected from.
        size_bytes: the file's.
        metric_name: "accuracy" or "mean squared error", of the three metrics on the test samples, which are None where
            there are none: ``base``, ``full`` (after the full phase; None where there was no such phase), and
            ``sparse``, of base and delta as the file has it; deltas of sources are added in all three.
        histories: epochs of the full and the sparse phase.
        notes: what was assumed of model and samples.
        stops: why a phase ended early, as sentences.
    """

    delta: SparseDelta
    maskable: int
    size_bytes: int
    metric_name: str
    base: float | None
    full: float | None
    sparse: float | None
    histories: tuple[tuple[Epoch, ...], tuple[Epoch, ...]]
    notes: tuple[str, ...]
    stops: tuple[str, ...]

    @property
    def new_head(self) -> bool:
        """Whether the base got a head for this task, which is untrained in ``base``."""
        return CLASSES in self.delta.notes


def train_sparse(
    model: ModelLike,
    data: object,
    out: Path,
    *,
    test: object | None = None,
    dev: object | None = None,
    options: SparseOptions = SparseOptions(),
    recipe: Recipe = FULL,
    sparse_epochs: int = 10,
    sparse_rate: float | None = None,
    progress: Progress = silent,
) -> SparseResult:
    """Fine-tune ``model`` sparsely on ``data`` and write the difference to ``out``.

    A Hugging Face folder's encoder without a head gets one: as many outputs as the largest class says, or one where
    numbers are to be predicted, weights from the recipe's seed. It is trained whole and stored in the delta.

    Args:
        data: labelled samples: classes as whole numbers, or numbers to predict; text for Hugging Face folders. Or a
            :class:`~compress.training.labelled.Source` by name: every batch is of one, trained on beside its delta.
        test: labelled samples; the metric is measured on them.
        dev: labelled samples, others than ``test``'s: of each phase the epoch that is best on them is kept.
        recipe: of the full phase; the sparse one has the same, but for ``sparse_epochs``, ``sparse_rate`` (None: the
            same rate), and a new optimizer.

    Raises:
        InputError: the model, the data or an option cannot be used, or training breaks in its first epoch.
    """
    check_free(out, options.overwrite)
    if out.suffix == REFERENCE_SUFFIX:
        raise InputError(
            f"--out {out}: {REFERENCE_SUFFIX} is for the published code's form, which `compress sparse compose` "
            "writes; give a name that ends in .safetensors"
        )
    if out.suffix in _NO_DELTAS:
        raise InputError(f"--out {out}: a delta is no model; give a name that ends in .safetensors")
    second = replace(recipe, epochs=sparse_epochs, rate=recipe.rate if sparse_rate is None else sparse_rate)
    recipe.check()
    if options.values not in VALUES:
        raise InputError(f"--values {options.values}: known are {', '.join(VALUES)}")
    if sparse_epochs < 1:
        raise InputError(f"--sparse-epochs {sparse_epochs}: at least 1")
    if not (math.isfinite(second.rate) and second.rate > 0):
        raise InputError(f"--sparse-lr {second.rate:g}: a number above 0")
    loaded = read_model(model, factory=options.factory, allow=options.allow)
    several = named_sources(data)
    if options.eval_source is not None and options.eval_source not in several:
        raise InputError(f"--eval-source {options.eval_source}: known are {', '.join(several) or 'none'}")
    if several and options.sources:
        raise InputError("several sources have a delta each: give --source NAME=FILE, not one to start from for all")
    samples, given = (
        read_sources(several, loaded, options.length) if several else read_labelled(data, loaded, options.length)
    )
    others = [_read_like(given, each, loaded, options.length) for each in (test, dev)]
    held, judged = (each[1] if each is not None else None for each in others)
    classes = new_outputs(loaded, given, samples.source)
    if classes is not None:
        loaded = load_model(loaded.source, classes=classes, seed=recipe.seed)
    module = loaded.module
    check_labels(module, given, samples.source)
    for other in others:
        if other is not None:
            check_labels(module, other[1], other[0])
    deltas = open_deltas(list(dict.fromkeys(each.delta for each in several.values() if each.delta is not None)))
    beside = {name: deltas.get(str(each.delta), SparseDelta(None, {})) for name, each in several.items()}
    started = open_deltas(options.sources)
    tuner = _make_tuner(loaded, options, recipe.seed, beside, started)
    source = options.eval_source
    base = _measured(tuner, held, source)
    start: tuple[object, ...] = (
        options.identity(loaded, started),
        samples.fingerprint,
        tuner.k,
        judged and judged.digest,
    )
    if several:
        start += tuple((name, each.repeats, beside[name].digest) for name, each in several.items())
    work = out.with_name(f".{out.name}.work")

    notes = [*loaded.notes, *samples.notes, *unbound(started), *unbound(deltas)]
    stops = list[str]()
    phases = _Phases(
        tuner, given, judged, source, work, start, options.rounds, options.overwrite, progress, notes, stops
    )
    full, first_history, second_history = None, tuple[Epoch, ...](), tuple[Epoch, ...]()
    try:
        for turn in range(options.rounds):
            if turn:
                tuner.reopen()
            if options.criterion == "change" and tuner.k:
                first_history += phases.train("full", turn, recipe, second if turn else None)
                full = _measured(tuner, held, source)
            elif options.criterion in BY_GRADIENT:
                _gather(tuner, given, recipe.batch)
            tuner.select()
            second_history += phases.train("sparse", turn, second, recipe)
        learned = tuner.delta()
        if classes is not None:
            learned.notes[CLASSES] = str(classes)
    except ValueError as error:
        raise InputError(str(error)) from error
    write_delta(learned, out, options.values)
    shutil.rmtree(work, ignore_errors=True)
    delta = read_delta(out)
    sparse = _measured_with(tuner, delta, held, source)
    name = "accuracy" if given.classes else "mean squared error"
    return SparseResult(
        delta, tuner.parts.count, out.stat().st_size, name, base, full, sparse, (first_history, second_history),
        tuple(notes), tuple(stops),
    )  # fmt: skip


@dataclass(frozen=True)
class _Phases:
    """What the phases of a run share; ``notes`` and ``stops`` grow as they are trained."""

    tuner: SparseFineTuner
    data: TrainingData
    judged: TrainingData | None
    source: str | None  # beside whose delta it is judged
    work: Path
    identity: object
    rounds: int
    discard: bool
    progress: Progress
    notes: list[str]
    stops: list[str]

    def train(self, kind: str, turn: int, recipe: Recipe, earlier: Recipe | None) -> tuple[Epoch, ...]:
        """Go through one phase, from its checkpoint if there is one; its epochs.

        Args:
            earlier: the recipe of the phase before, on which this one depends too.
        """
        number = f" {turn + 1}" if self.rounds > 1 else ""
        name = f"{kind} phase{number}"
        history, stopped = fit(
            self.tuner.module, self.data, recipe, companion=SparseCompanion(self.tuner),
            judge=judge_by(self.judged, self.tuner, self.source) if self.judged else None,
            checkpoint=self.work / f"{kind}{number}.pt",
            fingerprint=repr((self.identity, name, earlier)),
            discard=self.discard,
            progress=lambda done, total, loss: self.progress(f"{name}, loss {loss:.4f}", done, total),
        )  # fmt: skip
        if stopped and not history:
            raise InputError(f"{name}: {stopped}")
        if stopped:
            self.stops.append(f"{name} stopped early: {stopped}")
        if self.judged is not None:
            best = best_epoch(history)
            self.notes.append(f"{name}: of {len(history)} epochs number {best} was best on the samples of --dev")
        return tuple(history)


def _read_like(
    given: TrainingData, data: object | None, loaded: LoadedModel, length: int | None
) -> tuple[str, TrainingData] | None:
    """Other samples than ``given``, with labels of its kind, behind where they are from."""
    if data is None:
        return None
    samples, read = read_labelled(data, loaded, length)
    return samples.source, as_labels_of(given, read)


class SparseCompanion:
    """:class:`~compress.sparse.tuner.SparseFineTuner` as the loop's companion, in either phase."""

    def __init__(self, tuner: SparseFineTuner) -> None:
        self.tuner = tuner

    def step(self, source: str | None = None) -> AbstractContextManager[object]:
        return self.tuner.step(source)

    def penalty(self) -> Tensor:
        return self.tuner.penalty()

    def end_epoch(self, optimizer: Optimizer) -> tuple[str, ...]:
        return ()

    def state_dict(self) -> dict[str, Any]:
        return {}  # the mask is chosen again, the same, from the full phase's checkpoint

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Nothing to load."""


def _make_tuner(
    loaded: LoadedModel,
    options: SparseOptions,
    seed: int,
    beside: Mapping[str, SparseDelta],
    started: Mapping[str, SparseDelta],
) -> SparseFineTuner:
    module, base = loaded.module, None
    if beside:
        called = {f"the delta of source {name}": each for name, each in beside.items()}
        check_base(called, tensor_hashes(base_tensors(module)))
    if started:
        hashes = tensor_hashes(base_tensors(module))
        apply_deltas(module, started, heads=False)
    try:
        tuner = SparseFineTuner(
            module, density=options.density, k=options.k, criterion=options.criterion,
            rounds=options.rounds, pattern=options.pattern,
            head=(*options.head, *loaded.head), frozen=options.frozen, train_norms=options.train_norms, l1=options.l1,
            sources=beside, seed=seed,
        )  # fmt: skip
        if started:
            if options.train_norms:
                raise InputError("--train-norms changes what --source was trained beside; leave one of them out")
            base = base_hash(hashes, tuner.parts.dense)
        tuner.base = base
    except ValueError as error:
        raise InputError(str(error)) from error
    return tuner


def judge_by(data: TrainingData, tuner: SparseFineTuner, source: str | None) -> Callable[[nn.Module], float]:
    """The loop's judge: the accuracy on ``data``, or minus the squared error, beside the delta of ``source``."""
    sign = 1 if data.classes else -1

    def judge(module: nn.Module) -> float:
        with tuner.step(source):
            return sign * evaluate(module, data)

    return judge


def _gather(tuner: SparseFineTuner, data: TrainingData, batch: int) -> None:
    """The gradient of the summed loss over all ``data``, in evaluation mode, where dropout adds no chance."""
    criterion = criterion_of(data)
    tuner.module.eval()
    for source, index in data.in_order(batch):
        inputs, labels = data.take(index)
        tuner.module.zero_grad(set_to_none=True)
        with tuner.step(source):
            (criterion(data.output(tuner.module, inputs), labels) * len(labels)).backward()
        tuner.gather()
    tuner.module.zero_grad(set_to_none=True)


def _measured(tuner: SparseFineTuner, held: TrainingData | None, source: str | None) -> float | None:
    if held is None:
        return None
    with tuner.step(source):
        return evaluate(tuner.module, held)


def _measured_with(
    tuner: SparseFineTuner, delta: SparseDelta, held: TrainingData | None, source: str | None
) -> float | None:
    """The metric of base and delta; the module is as it was at the start afterwards."""
    tuner.rewind()
    done = apply_deltas(tuner.module, {"the delta": delta}, any_base=True)
    found = _measured(tuner, held, source)
    revert(tuner.module, done.before)
    return found
