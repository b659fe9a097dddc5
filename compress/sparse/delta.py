"""A sparse difference to a base model, and sums of several: theta0 + sum of weight * delta (arXiv 2110.07560).

Indices are flat, of the tensor's logical shape with the last dimension fastest, whatever its strides, and 64 bits wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CLASSES",
    "MOST_OVERLAP",
    "Overlap",
    "SparseDelta",
    "SparseTensor",
    "measure_overlap",
    "put",
    "sum_deltas",
    "take",
]

# The note of a delta whose base gets a new head: for how many classes, or 1 for a number.
CLASSES = "classes"
# Share of a delta's entries that others may have too before it is warned of.
MOST_OVERLAP = 0.2


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Some entries of a tensor of ``shape``.

    Attributes:
        dtype: of the base's tensor, torch's name, as in float32.
        index: int64 [n], increasing.
        values: float [n]; 0 is a value like any other.
    """

    shape: tuple[int, ...]
    dtype: str
    index: Tensor
    values: Tensor

    @property
    def size(self) -> int:
        """Entries of the whole tensor; Python's own number, which does not overflow."""
        size = 1
        for each in self.shape:
            size *= each
        return size


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """What to add to a base, and what to replace in it.

    Attributes:
        base: hash of the base (:func:`~compress.sparse.base.base_hash`); None: unknown.
        tensors: entries to add, by the parameter's name.
        dense: tensors to replace whole: heads, and buffers that training has changed.
        notes: how it was made, by keyword.
        without: names that ``base`` leaves out, those in ``dense`` as a rule: bases may differ in the head.
    """

    base: str | None
    tensors: dict[str, SparseTensor]
    dense: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def k(self) -> int:
        """Entries, explicit zeros among them."""
        return sum(len(each.index) for each in self.tensors.values())

    @property
    def digest(self) -> str:
        """SHA-256 over everything that is added; of two deltas in any order the one with the lower comes first."""
        digest = hashlib.sha256()
        for name, each in sorted(self.tensors.items()):
            digest.update(f"{name}\0{each.shape}\0".encode())
            digest.update(each.index.numpy().data)
            digest.update(each.values.double().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Overlap:
    """How much several deltas meet: entries in more than one of them, and of the smallest one's how large a share."""

    entries: int
    share: float

    def warning(self, most: float = MOST_OVERLAP) -> tuple[str, ...]:
        """A sentence where the share is above ``most``."""
        if self.share <= most:
            return ()
        return (
            f"{self.entries:,} entries are in more than one delta, {100 * self.share:.1f} % of the smallest one's: "
            "tasks may disturb each other; check both, or lower --density in training",
        )


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries [n] of ``tensor`` at flat ``index``."""
    return tensor.detach().reshape(-1)[index.to(tensor.device)]


@torch.no_grad()
def put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write ``values`` [n] into ``tensor`` at flat ``index``."""
    index, values = index.to(tensor.device), values.to(tensor.device, tensor.dtype)
    if tensor.is_contiguous():
        tensor.detach().view(-1)[index] = values
    else:  # channels last, for one: flat indices are those of the logical shape
        flat = tensor.detach().reshape(-1).clone()
        flat[index] = values
        tensor.detach().copy_(flat.view(tensor.shape))


def sum_deltas(deltas: Sequence[SparseDelta], weights: Sequence[float] | None = None) -> dict[str, SparseTensor]:
    """The weighted sum by tensor, in float64; the same bits in whatever order the deltas come.

    Args:
        weights: one a delta; None: 1 each.

    Raises:
        ValueError: not one weight a delta, a weight that is not finite, or two shapes for one tensor.
    """
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if len(weights) != len(deltas):
        counts = ((len(weights), "weight"), (len(deltas), "delta"))
        given, there = (f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts)
        raise ValueError(f"{given} for {there}; give one each, or none")
    if not np.isfinite(weights).all():
        raise ValueError(f"weights {weights}: all must be finite")
    pairs = list(zip(deltas, weights, strict=True))
    if len(pairs) > 2:
        # Sums of two commute; of more they round by order, so one that does not depend on the caller's is taken.
        pairs.sort(key=lambda pair: (pair[0].digest, pair[1]))
    found: dict[str, list[tuple[SparseTensor, float]]] = {}
    for delta, weight in pairs:
        for name, each in delta.tensors.items():
            found.setdefault(name, []).append((each, weight))
    return {name: _sum(name, found[name]) for name in sorted(found)}


def _sum(name: str, terms: list[tuple[SparseTensor, float]]) -> SparseTensor:
    first = terms[0][0]
    for each, _ in terms:
        if each.shape != first.shape:
            raise ValueError(f"{name} has shape {list(first.shape)} in one delta and {list(each.shape)} in another")
    values = [each.values.double() if weight == 1 else each.values.double() * weight for each, weight in terms]
    if len(terms) == 1:
        return SparseTensor(first.shape, first.dtype, first.index, values[0])
    index = np.concatenate([each.index.numpy() for each, _ in terms])
    # Stable: equal indices stay in the order of the deltas; the runs are sorted already, which it makes use of.
    order = np.argsort(index, kind="stable")
    index = index[order]
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    summed = np.add.reduceat(torch.cat(values).numpy()[order], starts) if len(index) else np.empty(0)
    return SparseTensor(first.shape, first.dtype, torch.from_numpy(index[starts]), torch.from_numpy(summed))


def measure_overlap(deltas: Sequence[SparseDelta], summed: Mapping[str, SparseTensor]) -> Overlap:
    """How much ``deltas`` meet, whose sum is ``summed``."""
    if len(deltas) < 2:
        return Overlap(0, 0.0)
    shared = 0
    for name, whole in summed.items():
        counts = np.zeros(len(whole.index), np.int32)
        for delta in deltas:
            if name in delta.tensors:
                counts[np.searchsorted(whole.index.numpy(), delta.tensors[name].index.numpy())] += 1
        shared += int((counts > 1).sum())
    least = min(delta.k for delta in deltas)
    return Overlap(shared, shared / least if least else 0.0)
