"""Low rank, the two ways in: Maestro's training, and data-aware truncation of a trained model. Both give a family."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.data.samples import Samples
from compress.data.synthetic import is_synthetic, synthesize
from compress.data.text import check_length
from compress.errors import InputError
from compress.files.outputs import claims
from compress.intake.model import ModelLike, read_model
from compress.lowrank.decompose import Decomposition, decompose
from compress.lowrank.maestro import Maestro
from compress.lowrank.truncate import ranks_by_rule
from compress.models.input_shape import find_input_shape
from compress.progress import Progress, silent
from compress.training.data import TrainingData
from compress.training.labelled import check_labels, read_labelled, read_samples, training_data
from compress.training.loop import Epoch, Recipe, fit
from compress.training.lowrank.family import Family, refuse_existing, write_family
from compress.training.lowrank.members import DenseModel, LowRankOptions, make_family
from compress.training.lowrank.ordering import order_layers

__all__ = ["LowRankOptions", "LowRankResult", "MaestroCompanion", "train_lowrank", "truncate"]


@dataclass(frozen=True)
class LowRankResult:
    """What was written, and how training went (empty where there was none)."""

    family: Family
    history: tuple[Epoch, ...]
    stopped: str | None


@dataclass(frozen=True)
class _Start:
    """What both ways begin with: the model and its data, read and measured."""

    module: nn.Module
    samples: Samples
    data: TrainingData
    dense: DenseModel
    fingerprint: str

    def decomposed(self) -> _Start:
        """The same behind the decomposition, before anything is cut: opened attention has layers of its own."""
        return replace(self, dense=self.dense.counted(self.module))


@claims("out")
def train_lowrank(
    model: ModelLike,
    data: object,
    out: Path,
    *,
    test: object | None = None,
    options: LowRankOptions = LowRankOptions(),  # noqa: B008 - frozen
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    penalty: float = 1e-3,
    threshold: float = 1e-3,
    sampler: str = "pair",
    progress: Progress = silent,
) -> LowRankResult:
    """Train ``model`` with ordered factors from where it stands, and write the family to ``out``.

    Args:
        data: labelled samples: classes as whole numbers, or numbers to predict.
        test: labelled samples; every member's metric is measured on them.
        penalty, threshold, sampler: see :class:`~compress.lowrank.maestro.Maestro`.

    Raises:
        InputError: the model, the data or an option cannot be used.
    """
    recipe.check()
    start = _start(model, data, out, test, options, progress, labelled=True)
    try:
        maestro = Maestro(
            start.module, penalty=penalty, threshold=threshold, sampler=sampler, ignore=options.ignore,
            keep_first=options.keep_first, keep_last=options.keep_last, seed=recipe.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    start = start.decomposed()
    work = out.with_name(f".{out.name}.work")
    layers = (options.ignore, options.keep_first, options.keep_last)
    settings = (start.fingerprint, start.samples.fingerprint, penalty, threshold, sampler, layers)
    history, stopped = fit(
        start.module,
        start.data,
        recipe,
        companion=MaestroCompanion(maestro),
        checkpoint=work / "checkpoint.pt",
        fingerprint=repr(settings),
        discard=options.overwrite,
        progress=lambda done, total, loss: progress(f"training, loss {loss:.4f}", done, total),
    )
    done = Decomposition(maestro.layers, maestro.dense)
    notes = (f"stopped early: {stopped}",) if stopped else ()
    family = _finish(start, done, out, options, notes, progress)
    shutil.rmtree(work, ignore_errors=True)
    return LowRankResult(family, tuple(history), stopped)


@claims("out")
def truncate(
    model: ModelLike,
    data: object,
    out: Path,
    *,
    test: object | None = None,
    options: LowRankOptions = LowRankOptions(),  # noqa: B008 - frozen
    weighted: bool = True,
    unrolling: str = "best",
    energy: float | None = None,
    threshold: float | None = None,
    progress: Progress = silent,
) -> LowRankResult:
    """Decompose a trained ``model``, ordered by what each component does on ``data``, and write the family to ``out``.

    Args:
        data: samples; with labels members are chosen by their loss, else by the relative squared error of the outputs.
            ``synthetic`` makes some of noise (compress/data/synthetic.py).
        weighted: order by gram matrices of the inputs; False: by the weights' own singular values.
        unrolling: of convolutions; see :func:`~compress.training.lowrank.ordering.order_layers`.
        energy, threshold: one of them: no search, but one member beside the whole model, with ranks by that rule; see
            :func:`~compress.lowrank.truncate.ranks_by_rule`.

    Raises:
        InputError: the model, the data or an option cannot be used.
    """
    ruled = energy is not None or threshold is not None
    if ruled:
        _ranks_by_rule({}, energy, threshold)
    start = _start(model, data, out, test, options, progress)
    try:
        done = decompose(
            start.module, ignore=options.ignore, keep_first=options.keep_first, keep_last=options.keep_last
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    start = start.decomposed()
    energies = order_layers(
        done.layers, start.module, start.samples.inputs, start.dense.positions, progress, weighted=weighted,
        unrolling=unrolling,
    )  # fmt: skip
    ranks = _ranks_by_rule(energies, energy, threshold) if ruled else None
    return LowRankResult(_finish(start, done, out, options, (), progress, ranks), (), None)


def _start(
    model: ModelLike,
    data: object,
    out: Path,
    test: object | None,
    options: LowRankOptions,
    progress: Progress,
    *,
    labelled: bool = False,
) -> _Start:
    options.check()
    check_length(options.length, data, test)
    refuse_existing(out, overwrite=options.overwrite)
    loaded = read_model(model, factory=options.factory, allow=options.allow)
    made = is_synthetic(data) and not labelled
    samples = None if made else read_samples(data, loaded, options.length, labelled=labelled)
    held = read_labelled(test, loaded, options.length)[1] if test is not None else None
    if samples is None:
        example = (find_input_shape(loaded.module).example(),) if held is None else held.inputs
        samples = synthesize(loaded.module, example, loaded.fingerprint, progress=progress)
    plain = samples.labels is None
    given = TrainingData(samples.inputs, torch.empty(0)) if plain else training_data(samples, loaded)
    if samples.names:
        raise InputError(
            f"{samples.source}: {', '.join(samples.names)} are not the first parameters of the model's forward, which "
            f"are {', '.join(loaded.parameters)}, and low rank hands inputs over by position; give those between, too"
        )
    for each, source in ((given, samples.source), (held, f"{test}")):
        if each is not None and len(each.labels):
            check_labels(loaded.module, each, source)
    return _Start(loaded.module, samples, given, DenseModel.of(loaded.module, given, held), loaded.fingerprint)


def _finish(
    start: _Start,
    done: Decomposition,
    out: Path,
    options: LowRankOptions,
    notes: tuple[str, ...],
    progress: Progress,
    ranks: dict[str, int] | None = None,
) -> Family:
    start.module.eval()
    family, statistics = make_family(start.module, done, start.dense, options, notes, progress, ranks)
    return write_family(out, start.module, family, statistics, overwrite=options.overwrite)


def _ranks_by_rule(energies: dict[str, Tensor], energy: float | None, threshold: float | None) -> dict[str, int]:
    try:
        return ranks_by_rule(energies, energy=energy, threshold=threshold)
    except ValueError as error:
        raise InputError(f"--energy or --threshold: {error}") from error


class MaestroCompanion:
    """:class:`~compress.lowrank.maestro.Maestro` as the loop's companion."""

    def __init__(self, maestro: Maestro) -> None:
        self.maestro = maestro

    def step(self, source: str | None = None) -> AbstractContextManager[object]:
        return self.maestro.step()

    def penalty(self) -> Tensor:
        return self.maestro.penalty()

    def end_epoch(self, optimizer: Optimizer) -> tuple[str, ...]:
        return tuple(f"{name}: rank {rank}" for name, rank in self.maestro.end_epoch(optimizer).items())

    def state_dict(self) -> dict[str, Any]:
        return self.maestro.state_dict()

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        self.maestro.load_state_dict(state, optimizer)
