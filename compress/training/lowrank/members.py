"""The members of a family: what the dense model was, what every cut costs and loses, each with its own statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph.traced import first_output
from compress.lowrank.decompose import Decomposition, decomposed_layers
from compress.lowrank.layers import LowRankLayer, Positions, SpatialConv2d
from compress.lowrank.norms import norm_statistics, recalibrate, set_norm_statistics
from compress.lowrank.truncate import Member, count_positions, cut_to, model_macs, truncation_path
from compress.measure.machine import describe_environment
from compress.progress import Progress
from compress.training.data import TrainingData
from compress.training.loop import criterion_of, evaluate
from compress.training.lowrank.family import Family, FamilyInput, FamilyMember, weights_of
from compress.training.lowrank.rank_program import program_path, undominated

__all__ = ["DenseModel", "LowRankOptions", "make_family"]

SEARCHES = ("greedy", "program")
_JUDGED = 512
_BATCH = 128
_NORMALISED = 4096


@dataclass(frozen=True)
class LowRankOptions:
    """What training and truncation share.

    Attributes:
        ignore, keep_first, keep_last: see :func:`~compress.lowrank.decompose.decompose`.
        smallest: the family goes down to this share of the dense model's MACs.
        factor: a cut goes to this share of a layer's rank.
        search: "greedy", or "program", which adds the plans of an integer program and keeps what is undominated.
        factory: ``package.module:factory``, for a model file that holds weights only.
        allow: classes that a model file may use besides torch.nn's own.
        length: tokens of a sample of text, at most.
        overwrite: replace the folder, and throw away another run's checkpoint; that of the same run is gone on from.
    """

    ignore: tuple[str, ...] = ()
    keep_first: int = 0
    keep_last: bool = False
    smallest: float = 0.1
    factor: float = 0.85
    search: str = "greedy"
    factory: str | None = None
    allow: tuple[str, ...] = ()
    length: int | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: with the option's name.
        """
        if not 0 < self.smallest < 1:
            raise InputError(f"--smallest {self.smallest:g}: a share of the dense model's MACs, between 0 and 1")
        if not 0 < self.factor < 1:
            raise InputError(f"--factor {self.factor:g}: between 0 and 1")
        if self.search not in SEARCHES:
            raise InputError(f"--search {self.search}: known are {', '.join(SEARCHES)}")


@dataclass(frozen=True)
class DenseModel:
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
    def of(cls, module: nn.Module, data: TrainingData, test: TrainingData | None) -> DenseModel:
        """Measure ``module`` as it is.

        Raises:
            InputError: the samples do not run through it.
        """
        module.eval()
        try:
            positions = count_positions(module, _few(data))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"the samples do not run through the model: {str(error).splitlines()[0]}") from error
        outputs = _outputs(module, tuple(x[-_JUDGED:] for x in data.inputs))
        return cls(
            data, test, outputs, model_macs(module, positions), sum(each.numel() for each in module.parameters()),
            positions, evaluate(module, test) if test is not None else None,
        )  # fmt: skip

    def counted(self, module: nn.Module) -> DenseModel:
        """With the positions and MACs of ``module``, which is this one decomposed at full rank."""
        positions = count_positions(module, _few(self.data))
        return replace(self, positions=positions, macs=model_macs(module, positions))


def _few(data: TrainingData) -> tuple[Tensor, ...]:
    return tuple(x[:2] for x in data.inputs)


def make_family(
    module: nn.Module,
    done: Decomposition,
    dense: DenseModel,
    options: LowRankOptions,
    notes: tuple[str, ...],
    progress: Progress,
    ranks: dict[str, int] | None = None,
) -> tuple[Family, list[dict[str, Tensor]]]:
    """The members of ``module``, and every BatchNorm's statistics of each; ``module`` is left whole.

    With ``ranks`` there are two: all of it, and that one.
    """
    cuts = _Cuts(module, dense)
    if ranks is None:
        path = _searched(module, cuts.recalibrated_loss, dense, options, progress)
    else:
        path, dear = _ruled(module, done, dense, ranks)
        notes += dear
    members, statistics = _measured(cuts, path, progress)
    set_norm_statistics(module, statistics[0])
    family = Family(
        loss_name=cuts.loss_name,
        metric_name=dense.test.metric_name if dense.test is not None else None,
        dense_macs=dense.macs,
        dense_weights=dense.weights,
        dense_metric=dense.metric,
        inputs=tuple(FamilyInput.of(x) for x in dense.data.inputs),
        members=tuple(members),
        layers={name: _described(layer) for name, layer in done.layers.items()},
        dense=dict(done.dense),
        notes=notes,
        environment=describe_environment(),
    )
    return family, statistics


class _Cuts:
    """A decomposed module, judged as it is cut at the moment, and given BatchNorm statistics that suit the cut."""

    def __init__(self, module: nn.Module, dense: DenseModel) -> None:
        self.module, self.dense = module, dense
        self._judged = tuple(x[-_JUDGED:] for x in dense.data.inputs)
        self._labels = dense.data.labels[-_JUDGED:]
        self._criterion = criterion_of(dense.data) if len(dense.data.labels) else None
        self._judged_batches = _batches(self._judged)
        self._batches = _batches(tuple(x[:_NORMALISED] for x in dense.data.inputs))
        self._given = norm_statistics(module)

    @property
    def loss_name(self) -> str:
        """What :meth:`loss` is."""
        return "loss" if self._criterion is not None else "relative squared error of the outputs"

    @torch.no_grad()
    def loss(self) -> float:
        """Of the labels where there are some, else of the dense model's outputs."""
        outputs = _outputs(self.module, self._judged)
        if self._criterion is not None:
            return float(self._criterion(outputs, self._labels))
        wanted = self.dense.outputs
        return float((outputs - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))

    def recalibrated_loss(self) -> float:
        """With statistics measured on the samples that are judged: enough to compare cuts."""
        recalibrate(self.module, self._judged_batches)
        return self.loss()

    def settle(self) -> float:
        """Give the cut statistics of its own where they are better than those the module came with; the loss then."""
        set_norm_statistics(self.module, self._given)
        before = self.loss()
        if self._computes_dense() or recalibrate(self.module, self._batches) == 0:
            return before
        after = self.loss()
        if after <= before:
            return after
        set_norm_statistics(self.module, self._given)
        return before

    @torch.no_grad()
    def _computes_dense(self) -> bool:
        """Whether the dense model's function is still computed: its own statistics then hold."""
        change = (_outputs(self.module, self._judged) - self.dense.outputs).square().sum()
        return float(change) <= 1e-6 * float(self.dense.outputs.square().sum())


def _measured(
    cuts: _Cuts, path: Sequence[Member], progress: Progress
) -> tuple[list[FamilyMember], list[dict[str, Tensor]]]:
    """Each of ``path`` with its loss and metric, and the statistics it has them with."""
    module, test = cuts.module, cuts.dense.test
    members, statistics = [], []
    for number, member in enumerate(path):
        with cut_to(decomposed_layers(module), member.ranks):
            lost = cuts.settle()
            statistics.append(norm_statistics(module))
            members.append(
                FamilyMember(
                    ranks=member.ranks,
                    macs=member.macs,
                    weights=weights_of(module, member),
                    loss=lost,
                    metric=evaluate(module, test) if test is not None else None,
                )
            )
        progress("measuring members", number + 1, len(path))
    return members, statistics


def _described(layer: LowRankLayer) -> str:
    return f"rank {layer.rank} of {layer.full_rank}" + ", spatial" * isinstance(layer, SpatialConv2d)


def _ruled(
    module: nn.Module, done: Decomposition, dense: DenseModel, ranks: dict[str, int]
) -> tuple[list[Member], tuple[str, ...]]:
    """The whole model and the member of ``ranks``, and which layers stay dense in it, as sentences."""
    dear = [name for name, rank in ranks.items() if not done.layers[name].pays(rank)]
    notes = tuple(f"{name} stays dense: rank {ranks[name]} would cost more" for name in dear)
    whole = {name: layer.rank for name, layer in done.layers.items()}
    chosen = ranks | {name: whole[name] for name in dear}
    return [Member(each, model_macs(module, dense.positions, each), 0.0) for each in (whole, chosen)], notes


def _searched(
    module: nn.Module, loss: Callable[[], float], dense: DenseModel, options: LowRankOptions, progress: Progress
) -> list[Member]:
    """Members by greedy search, or by that and the integer program."""
    smallest = round(options.smallest * dense.macs)
    path = truncation_path(
        module, loss, dense.positions, smallest=smallest, factor=options.factor,
        progress=lambda macs, least: progress("cutting ranks", dense.macs - macs, dense.macs - least),
    )  # fmt: skip
    if options.search == "greedy":
        return path
    planned = program_path(
        module, loss, dense.positions, smallest=smallest, factor=options.factor,
        progress=lambda done, total: progress("planning ranks", done, total),
    )  # fmt: skip
    return undominated(path, planned)


def _batches(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """About equally many samples in each: a last one alone has no variance for BatchNorm."""
    return list(zip(*(x.tensor_split(-(-len(x) // _BATCH)) for x in inputs), strict=True))


def _outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    index = torch.arange(len(inputs[0])).split(_BATCH)
    return torch.cat([first_output(module(*(x[each] for x in inputs))) for each in index])
