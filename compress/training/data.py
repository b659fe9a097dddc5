"""Labelled samples to train on: of one source, or of several of which a batch has one (arXiv 2110.07560)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.data.samples import Samples
from compress.errors import InputError
from compress.graph.traced import first_output
from compress.training.sources import mix_sources

__all__ = ["TrainingData"]


@dataclass(frozen=True)
class TrainingData:
    """Inputs, one tensor [N, ...] each, and labels [N]: whole numbers are classes, others are numbers to predict.

    Attributes:
        names: parameters of ``forward`` that take the inputs; () where they go by position.
        mask: which input, [N, L], is 1 at tokens and 0 at padding: batches of such samples end with their longest.
        sizes: samples of each source by its name, in their order, where there are several: a batch is of one.
        repeats: how often a source's samples are seen in an epoch; once where none is given.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    names: tuple[str, ...] = ()
    mask: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    repeats: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Samples, mask: int | None = None) -> TrainingData:
        """What ``samples`` hold.

        Raises:
            InputError: they have no labels.
        """
        if samples.labels is None:
            raise InputError(f"{samples.source} has no labels; an .npz with x and y is needed")
        return cls(samples.inputs, samples.labels, samples.names, mask)

    @classmethod
    def joined(cls, parts: Mapping[str, TrainingData], repeats: Mapping[str, int]) -> TrainingData:
        """Several sources' samples as one; texts of a source stay as long as its longest.

        Raises:
            InputError: they are not of one kind.
        """
        if not all(each.classes for each in parts.values()):  # numbers to predict, though one source's may be whole
            parts = {name: replace(each, labels=each.labels.float()) for name, each in parts.items()}
        given = list(parts.values())
        kinds = {
            name: [(x.dtype, () if each.mask is not None else tuple(x.shape[1:])) for x in (*each.inputs, each.labels)]
            for name, each in parts.items()
        }
        (first_name, wanted), *others = kinds.items()
        for name, kind in others:
            if kind != wanted or parts[name].names != given[0].names:
                raise InputError(
                    f"the samples of {first_name} and {name} differ in type or shape ({wanted} and {kind}); sources of "
                    "one task need the same inputs and labels"
                )
        inputs = tuple(_stacked([each.inputs[place] for each in given]) for place in range(len(given[0].inputs)))
        labels = torch.cat([each.labels for each in given])
        sizes = {name: len(each) for name, each in parts.items()}
        return cls(inputs, labels, given[0].names, given[0].mask, sizes, dict(repeats))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Samples at ``index``."""
        inputs = tuple(x[index] for x in self.inputs)
        if self.mask is not None:
            length = int(inputs[self.mask].any(0).nonzero().max()) + 1
            inputs = tuple(x[:, :length] for x in inputs)
        return inputs, self.labels[index]

    def output(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """The first tensor of what ``module`` makes of ``inputs``."""
        if self.names:
            return first_output(module(**dict(zip(self.names, inputs, strict=True))))
        return first_output(module(*inputs))

    def batches(self, size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """All samples in order."""
        for index in torch.arange(len(self)).split(size):
            yield self.take(index)

    def epoch(self, size: int, seed: int) -> list[tuple[str | None, Tensor]]:
        """Indices of an epoch's batches in an order by chance, and of which source each is, where there are several."""
        if not self.sizes:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
            return [(None, index) for index in order.split(size)]
        starts = dict(zip(self.sizes, itertools.accumulate(self.sizes.values(), initial=0), strict=False))
        mixed = mix_sources(self.sizes, size, repeats=self.repeats, seed=seed)
        return [(name, index + starts[name]) for name, index in mixed]

    def in_order(self, size: int) -> Iterator[tuple[str | None, Tensor]]:
        """Batches as :meth:`epoch` has them, in order, every source's as often as it is repeated."""
        start = 0
        for name, count in self.sizes.items():
            for _ in range(self.repeats.get(name, 1)):
                for index in torch.arange(start, start + count).split(size):
                    yield name, index
            start += count
        for index in torch.arange(start, len(self)).split(size) if not self.sizes else ():
            yield None, index

    @property
    def digest(self) -> str:
        """SHA-256 over inputs and labels."""
        return Samples(self.inputs, self.labels, "", (), self.names).fingerprint

    @property
    def classes(self) -> bool:
        """Whether labels are classes."""
        return not self.labels.is_floating_point()

    @property
    def metric_name(self) -> str:
        """What :func:`compress.training.loop.evaluate` measures on them."""
        return "accuracy" if self.classes else "mean squared error"


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Samples of all ``parts``, [N, L] with zeros behind those that are shorter."""
    if parts[0].dim() != 2:
        return torch.cat(list(parts))
    length = max(each.shape[1] for each in parts)
    return torch.cat([F.pad(each, (0, length - each.shape[1])) for each in parts])
