"""Low rank, the two ways in: Maestro's training, and data-aware truncation of a trained model. Both give a family."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.calib.samples import Samples, load_samples
from compress.errors import InputError
from compress.intake import ModelLike, read_model
from compress.lowrank.decompose import Decomposition, decompose, decomposed_layers
from compress.lowrank.layers import Positions, SpatialConv2d
from compress.lowrank.maestro import Maestro
from compress.lowrank.norms import norm_statistics, recalibrate, set_norm_statistics
from compress.lowrank.truncate import Member, count_positions, cut_to, model_macs, ranks_by_rule, truncation_path
from compress.machine import describe_environment
from compress.training.family import Family, FamilyMember, weights_of, write_family
from compress.training.loop import Epoch, Recipe, TrainingData, criterion_of, evaluate, first, fit
from compress.training.ordering import order_layers

__all__ = ["LowRankOptions", "LowRankResult", "MaestroCompanion", "train_lowrank", "truncate"]

Progress = Callable[[str, int, int], None]
_JUDGED = 512
_BATCH = 128
_NORMALISED = 4096


@dataclass(frozen=True)
class LowRankOptions:
    """What both ways share.

    Attributes:
        smallest: the family goes down to this share of the dense model's MACs.
        factor: a cut goes to this share of a layer's rank.
    """

    ignore: tuple[str, ...] = ()
    keep_first: int = 0
    keep_last: bool = False
    smallest: float = 0.1
    factor: float = 0.85

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: with the option's name.
        """
        if not 0 < self.smallest < 1:
            raise InputError(f"--smallest {self.smallest:g}: a share of the dense model's MACs, between 0 and 1")
        if not 0 < self.factor < 1:
            raise InputError(f"--factor {self.factor:g}: between 0 and 1")


@dataclass(frozen=True)
class LowRankResult:
    """What was written, and how training went (empty where there was none)."""

    family: Family
    history: tuple[Epoch, ...]
    stopped: str | None


def train_lowrank(
    model: ModelLike,
    data: object,
    out: Path,
    *,
    test: object | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    options: LowRankOptions = LowRankOptions(),
    penalty: float = 1e-3,
    threshold: float = 1e-3,
    sampler: str = "pair",
    factory: str | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
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
    options.check()
    _check_out(out, overwrite)
    loaded = read_model(model, factory=factory, allow=allow)
    samples = load_samples(data, labelled=True)
    held = load_samples(test, labelled=True) if test is not None else None
    training = _training_data(samples)
    module = loaded.module
    dense = _Dense.of(module, training, _training_data(held) if held is not None else None)
    try:
        maestro = Maestro(
            module, penalty=penalty, threshold=threshold, sampler=sampler, ignore=options.ignore,
            keep_first=options.keep_first, keep_last=options.keep_last, seed=recipe.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    work = out.with_name(f".{out.name}.work")
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    settings = (loaded.fingerprint, samples.fingerprint, penalty, threshold, sampler, options)
    history, stopped = fit(
        module,
        training,
        recipe,
        companion=MaestroCompanion(maestro),
        checkpoint=work / "checkpoint.pt",
        fingerprint=repr(settings),
        progress=lambda done, total, loss: progress(f"training, loss {loss:.4f}", done, total),
    )
    module.eval()
    done = Decomposition(maestro.layers, maestro.dense)
    notes = (f"stopped early: {stopped}",) if stopped else ()
    family, statistics = _family(module, done, dense, options, notes, progress)
    write_family(out, module, family, statistics, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return LowRankResult(family, tuple(history), stopped)


def truncate(
    model: ModelLike,
    data: object,
    out: Path,
    *,
    test: object | None = None,
    options: LowRankOptions = LowRankOptions(),
    weighted: bool = True,
    unrolling: str = "best",
    energy: float | None = None,
    threshold: float | None = None,
    factory: str | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> LowRankResult:
    """Decompose a trained ``model``, ordered by what each component does on ``data``, and write the family to ``out``.

    Args:
        data: samples; with labels members are chosen by their loss, else by the relative squared error of the outputs.
        weighted: order by gram matrices of the inputs; False: by the weights' own singular values.
        unrolling: of convolutions; see :func:`~compress.training.ordering.order_layers`.
        energy, threshold: one of them: no search, but one member beside the whole model, with ranks by that rule; see
            :func:`~compress.lowrank.truncate.ranks_by_rule`.

    Raises:
        InputError: the model, the data or an option cannot be used.
    """
    options.check()
    ruled = energy is not None or threshold is not None
    if ruled:
        _ranks_by_rule({}, energy, threshold)
    _check_out(out, overwrite)
    loaded = read_model(model, factory=factory, allow=allow)
    samples = load_samples(data)
    held = load_samples(test, labelled=True) if test is not None else None
    module = loaded.module
    labelled = _training_data(samples) if samples.labels is not None else TrainingData(samples.inputs, torch.empty(0))
    dense = _Dense.of(module, labelled, _training_data(held) if held is not None else None)
    try:
        done = decompose(module, ignore=options.ignore, keep_first=options.keep_first, keep_last=options.keep_last)
    except ValueError as error:
        raise InputError(str(error)) from error
    energies = order_layers(
        done.layers, module, samples.inputs, dense.positions, progress, weighted=weighted, unrolling=unrolling
    )
    ranks = _ranks_by_rule(energies, energy, threshold) if ruled else None
    family, statistics = _family(module, done, dense, options, (), progress, ranks)
    write_family(out, module, family, statistics, overwrite=overwrite)
    return LowRankResult(family, (), None)


class MaestroCompanion:
    """:class:`~compress.lowrank.maestro.Maestro` as the loop's companion."""

    def __init__(self, maestro: Maestro) -> None:
        self.maestro = maestro

    def step(self) -> AbstractContextManager[object]:
        return self.maestro.step()

    def penalty(self) -> Tensor:
        return self.maestro.penalty()

    def end_epoch(self, optimizer: Optimizer) -> tuple[str, ...]:
        return tuple(f"{name}: rank {rank}" for name, rank in self.maestro.end_epoch(optimizer).items())

    def state_dict(self) -> dict[str, Any]:
        return self.maestro.state_dict()

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        self.maestro.load_state_dict(state, optimizer)


@dataclass(frozen=True)
class _Dense:
    """The model before it was decomposed: what the family is compared with."""

    data: TrainingData
    test: TrainingData | None
    outputs: Tensor
    macs: int
    weights: int
    positions: dict[str, Positions]
    metric: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, data: TrainingData, test: TrainingData | None) -> _Dense:
        module.eval()
        few = tuple(x[:2] for x in data.inputs)
        try:
            positions = count_positions(module, few)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"the samples do not run through the model: {str(error).splitlines()[0]}") from error
        outputs = _outputs(module, tuple(x[-_JUDGED:] for x in data.inputs))
        return cls(
            data, test, outputs, model_macs(module, positions), sum(each.numel() for each in module.parameters()),
            positions, evaluate(module, test) if test is not None else None,
        )  # fmt: skip


def _family(
    module: nn.Module,
    done: Decomposition,
    dense: _Dense,
    options: LowRankOptions,
    notes: tuple[str, ...],
    progress: Progress,
    ranks: dict[str, int] | None = None,
) -> tuple[Family, list[dict[str, Tensor]]]:
    """The members of ``module``, and every BatchNorm's statistics of each; ``module`` is left whole.

    With ``ranks`` there are two: all of it, and that one.
    """
    labelled = len(dense.data.labels) > 0
    judged = tuple(x[-_JUDGED:] for x in dense.data.inputs)
    labels = dense.data.labels[-_JUDGED:]
    criterion = criterion_of(dense.data) if labelled else None

    @torch.no_grad()
    def loss() -> float:
        outputs = _outputs(module, judged)
        if criterion is not None:
            return float(criterion(outputs, labels))
        return float((outputs - dense.outputs).square().sum() / dense.outputs.square().sum().clamp(min=1e-30))

    batches = _batches(tuple(x[:_NORMALISED] for x in dense.data.inputs))

    def recalibrated_loss() -> float:
        recalibrate(module, judging)
        return loss()

    judging = _batches(judged)
    if ranks is None:
        path = truncation_path(
            module, recalibrated_loss, dense.positions, smallest=round(options.smallest * dense.macs),
            factor=options.factor,
            progress=lambda macs, least: progress("cutting ranks", dense.macs - macs, dense.macs - least),
        )  # fmt: skip
    else:
        dear = [name for name, rank in ranks.items() if not done.layers[name].pays(rank)]
        notes += tuple(f"{name} stays dense: rank {ranks[name]} would cost more" for name in dear)
        whole = {name: layer.rank for name, layer in done.layers.items()}
        chosen = ranks | {name: whole[name] for name in dear}
        path = [Member(each, model_macs(module, dense.positions, each), 0.0) for each in (whole, chosen)]
    members, statistics = [], []
    for number, member in enumerate(path):
        with cut_to(decomposed_layers(module), member.ranks):
            recalibrate(module, batches)
            statistics.append(norm_statistics(module))
            members.append(
                FamilyMember(
                    ranks=member.ranks,
                    macs=member.macs,
                    weights=weights_of(module, member),
                    loss=loss(),
                    metric=evaluate(module, dense.test) if dense.test is not None else None,
                )
            )
        progress("measuring members", number + 1, len(path))
    set_norm_statistics(module, statistics[0])
    name = None
    if dense.test is not None:
        name = "accuracy" if dense.test.classes else "mean squared error"
    what = {
        layer_name: f"rank {layer.rank} of {layer.full_rank}" + ", spatial" * isinstance(layer, SpatialConv2d)
        for layer_name, layer in done.layers.items()
    }
    family = Family(
        loss_name=("loss" if labelled else "relative squared error of the outputs"),
        metric_name=name,
        dense_macs=dense.macs,
        dense_weights=dense.weights,
        dense_metric=dense.metric,
        input_shape=tuple(dense.data.inputs[0].shape[1:]),
        members=tuple(members),
        layers=what,
        dense=dict(done.dense),
        notes=notes,
        environment=describe_environment(),
    )
    return family, statistics


def _batches(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """About equally many samples in each: a last one alone has no variance for BatchNorm."""
    return list(zip(*(x.tensor_split(-(-len(x) // _BATCH)) for x in inputs), strict=True))


def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    index = torch.arange(len(inputs[0])).split(_BATCH)
    return torch.cat([first(module(*(x[each] for x in inputs))) for each in index])


def _training_data(samples: Samples) -> TrainingData:
    if samples.labels is None:
        raise InputError(f"{samples.source} has no labels; an .npz with x and y is needed")
    return TrainingData(samples.inputs, samples.labels)


def _ranks_by_rule(energies: dict[str, Tensor], energy: float | None, threshold: float | None) -> dict[str, int]:
    try:
        return ranks_by_rule(energies, energy=energy, threshold=threshold)
    except ValueError as error:
        raise InputError(f"--energy or --threshold: {error}") from error


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; choose another --out, or replace it with --overwrite")
