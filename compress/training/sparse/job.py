"""``compress sparse train``: both phases of LT-SFT on labelled samples, from a model's file to a delta's."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.data.samples import Samples
from compress.data.text import check_length
from compress.errors import InputError
from compress.files.outputs import check_free, claims
from compress.intake.model import ModelLike, read_model
from compress.models.checkpoint import LoadedModel, load_model
from compress.progress import Progress, silent
from compress.sparse.application import apply_deltas, check_base, revert
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import CLASSES, SparseDelta
from compress.sparse.deltafile import VALUES, read_delta, write_delta
from compress.sparse.deltas import REFERENCE_SUFFIX, open_deltas, unbound
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.labelled import (
    Source,
    as_labels_of,
    check_labels,
    named_sources,
    new_outputs,
    read_labelled,
    read_sources,
)
from compress.training.loop import Epoch, Recipe, evaluate
from compress.training.sparse.phases import Phases, SparseCompanion

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


@claims("out")
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
    second = replace(recipe, epochs=sparse_epochs, rate=recipe.rate if sparse_rate is None else sparse_rate)
    _check(out, options, recipe, second)
    task = _Task.read(model, data, test, dev, options, recipe.seed)
    deltas = _Deltas.open(task.sources, options.sources)
    tuner = _make_tuner(task.loaded, options, recipe.seed, deltas)
    metric = _Metric(tuner, task.test, options.eval_source)
    base = metric.measure()
    phases = Phases(
        tuner, task.data, task.dev, options.eval_source, out.with_name(f".{out.name}.work"),
        _identity(options, task, deltas, tuner.k), options.overwrite, progress,
    )  # fmt: skip
    try:
        phases.run(recipe, second, metric.measure)
        learned = tuner.delta()
    except ValueError as error:
        raise InputError(str(error)) from error
    if task.new_outputs is not None:
        learned.notes[CLASSES] = str(task.new_outputs)
    write_delta(learned, out, options.values)
    shutil.rmtree(phases.work, ignore_errors=True)
    delta = read_delta(out)
    return SparseResult(
        delta=delta,
        maskable=tuner.parts.count,
        size_bytes=out.stat().st_size,
        metric_name=task.data.metric_name,
        base=base,
        full=phases.full_metric,
        sparse=metric.measure_with(delta),
        histories=(phases.full_epochs, phases.sparse_epochs),
        notes=(*task.loaded.notes, *task.samples.notes, *deltas.notes, *phases.notes),
        stops=tuple(phases.stops),
    )


def _check(out: Path, options: SparseOptions, first: Recipe, second: Recipe) -> None:
    """Refuse what can be refused before anything is read; ``first`` and ``second``: the phases' recipes."""
    check_free(out, options.overwrite)
    if out.suffix == REFERENCE_SUFFIX:
        raise InputError(
            f"--out {out}: {REFERENCE_SUFFIX} is for the published code's form, which `compress sparse compose` "
            "writes; give a name that ends in .safetensors"
        )
    if out.suffix in _NO_DELTAS:
        raise InputError(f"--out {out}: a delta is no model; give a name that ends in .safetensors")
    first.check()
    if options.values not in VALUES:
        raise InputError(f"--values {options.values}: known are {', '.join(VALUES)}")
    if second.epochs < 1:
        raise InputError(f"--sparse-epochs {second.epochs}: at least 1")
    if not (math.isfinite(second.rate) and second.rate > 0):
        raise InputError(f"--sparse-lr {second.rate:g}: a number above 0")


@dataclass(frozen=True)
class _Task:
    """A model and labelled samples that it has outputs for.

    Attributes:
        sources: by name, where there are several.
        samples, data: what is trained on, as it was read and as the loop takes it.
        new_outputs: of the head that the model got for the data; None: it had one.
    """

    loaded: LoadedModel
    sources: dict[str, Source]
    samples: Samples
    data: TrainingData
    test: TrainingData | None
    dev: TrainingData | None
    new_outputs: int | None

    @classmethod
    def read(
        cls, model: ModelLike, data: object, test: object, dev: object, options: SparseOptions, seed: int
    ) -> _Task:
        """Read all of it; ``seed``: of a new head's weights."""
        sources, length = named_sources(data), options.length
        check_length(length, data, test, dev, *(each.data for each in sources.values()))
        loaded = read_model(model, factory=options.factory, allow=options.allow)
        if options.eval_source is not None and options.eval_source not in sources:
            raise InputError(f"--eval-source {options.eval_source}: known are {', '.join(sources) or 'none'}")
        if sources and options.sources:
            raise InputError(
                "several sources have a delta each: give --source NAME=FILE, not one to start from for all"
            )
        samples, given = read_sources(sources, loaded, length) if sources else read_labelled(data, loaded, length)
        held, judged = (_read_like(given, each, loaded, length) for each in (test, dev))
        outputs = new_outputs(loaded, given, samples.source)
        if outputs is not None:
            loaded = load_model(loaded.source, classes=outputs, seed=seed)
        check_labels(loaded.module, given, samples.source)
        for other in (held, judged):
            if other is not None:
                check_labels(loaded.module, other[1], other[0])
        return cls(loaded, sources, samples, given, held and held[1], judged and judged[1], outputs)


def _read_like(
    given: TrainingData, data: object | None, loaded: LoadedModel, length: int | None
) -> tuple[str, TrainingData] | None:
    """Other samples than ``given``, with labels of its kind, behind where they are from."""
    if data is None:
        return None
    samples, read = read_labelled(data, loaded, length)
    return samples.source, as_labels_of(given, read)


@dataclass(frozen=True)
class _Deltas:
    """Deltas that there are already.

    Attributes:
        beside: each source's own by its name, empty for one that has none.
        started: those that the base is changed by first.
        notes: which of them name no base, as sentences.
    """

    beside: dict[str, SparseDelta]
    started: dict[str, SparseDelta]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, sources: Mapping[str, Source], paths: Sequence[Path]) -> _Deltas:
        """Read those of ``sources`` and those in ``paths``, from which training starts."""
        own = open_deltas(list(dict.fromkeys(each.delta for each in sources.values() if each.delta is not None)))
        beside = {name: own.get(str(each.delta), SparseDelta(None, {})) for name, each in sources.items()}
        started = open_deltas(paths)
        return cls(beside, started, (*unbound(started), *unbound(own)))


def _identity(options: SparseOptions, task: _Task, deltas: _Deltas, k: int) -> tuple[object, ...]:
    """What makes a run another one, for its checkpoints."""
    dev = task.dev and task.dev.digest
    one = (options.identity(task.loaded, deltas.started), task.samples.fingerprint, k, dev)
    return one + tuple((name, each.repeats, deltas.beside[name].digest) for name, each in task.sources.items())


def _make_tuner(loaded: LoadedModel, options: SparseOptions, seed: int, deltas: _Deltas) -> SparseFineTuner:
    module, base, started = loaded.module, None, deltas.started
    if deltas.beside:
        called = {f"the delta of source {name}": each for name, each in deltas.beside.items()}
        check_base(called, tensor_hashes(base_tensors(module)))
    if started:
        hashes = tensor_hashes(base_tensors(module))
        apply_deltas(module, started, heads=False)
    try:
        tuner = SparseFineTuner(
            module, density=options.density, k=options.k, criterion=options.criterion,
            rounds=options.rounds, pattern=options.pattern,
            head=(*options.head, *loaded.head), frozen=options.frozen, train_norms=options.train_norms, l1=options.l1,
            sources=deltas.beside, seed=seed,
        )  # fmt: skip
        if started:
            if options.train_norms:
                raise InputError("--train-norms changes what --source was trained beside; leave one of them out")
            base = base_hash(hashes, tuner.parts.dense)
        tuner.base = base
    except ValueError as error:
        raise InputError(str(error)) from error
    return tuner


@dataclass(frozen=True)
class _Metric:
    """The metric on the ``test`` samples beside the delta of ``source``; None where there are no samples."""

    tuner: SparseFineTuner
    test: TrainingData | None
    source: str | None

    def measure(self) -> float | None:
        """Of the module as it is."""
        if self.test is None:
            return None
        with self.tuner.step(self.source):
            return evaluate(self.tuner.module, self.test)

    def measure_with(self, delta: SparseDelta) -> float | None:
        """Of base and delta; the module is as it was at the start afterwards."""
        self.tuner.rewind()
        done = apply_deltas(self.tuner.module, {"the delta": delta}, any_base=True)
        found = self.measure()
        revert(self.tuner.module, done.before)
        return found
