"""The K largest of scores that never lie in memory together, exactly, with ties in order; and N of every M.

A float that is not negative orders as its bits do. Three passes over the scores, a chunk at a time: a histogram of the
upper 16 bits finds the bin of the K-th largest, one of the lower 16 bits within that bin its exact value, and the third
pass takes everything above it, and as many equal to it as are still wanted: by tensor, then by index. The published
code keeps every tie and so may select more than K.

Memory beside the result (8 bytes an entry): a few chunks and two histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["CHUNK", "Chunk", "count_n_of_m", "top_k", "top_n_of_m"]

CHUNK = 1 << 22
_HALF = 1 << 16
_INFINITY = 0x7F800000

# Name of a tensor, where in it (flat) the chunk begins, and its scores: float32 [n], none below 0.
Chunk = tuple[str, int, Tensor]


def top_k(chunks: Callable[[], Iterable[Chunk]], k: int) -> dict[str, Tensor]:
    """Flat indices, int64 and increasing, of the ``k`` largest scores, by tensor.

    Args:
        chunks: called once a pass; yields the same each time, the chunks of a tensor in order.
        k: how many; 0 to all of them.

    Raises:
        ValueError: a score is below 0 or not finite, or there are fewer than ``k``.
    """
    upper = torch.zeros(_HALF // 2, dtype=torch.int64)
    for name, _, scores in chunks():
        if not scores.numel():
            continue
        bits = _bits(scores)
        least, most = (int(each) for each in torch.aminmax(bits))
        if least < 0 or most >= _INFINITY:
            raise ValueError(f"{name}: a score is {'below 0' if least < 0 else 'not finite'}, so nothing is selected")
        upper += torch.bincount(bits >> 16, minlength=len(upper)).cpu()
    total = int(upper.sum())
    if not 0 <= k <= total:
        raise ValueError(f"{k:,} entries were to be selected out of {total:,}; allowed are 0 to {total:,}")
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name, _, _ in chunks()}
    high, above = _kth(upper, k)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for _, _, scores in chunks():
        bits = _bits(scores)
        inside = bits[(bits >> 16) == high]
        lower += torch.bincount(inside & (_HALF - 1), minlength=_HALF).cpu()
    low, more = _kth(lower, k - above)
    return _take(chunks(), (high << 16) | low, k - above - more)


def top_n_of_m(chunks: Callable[[], Iterable[Chunk]], n: int, m: int) -> dict[str, Tensor]:
    """Flat indices, int64 and increasing, of the ``n`` largest scores of every ``m`` neighbours, by tensor.

    Neighbours are counted from a tensor's first entry; a last group may be shorter. Ties go to the lower index.

    Args:
        chunks: as for :func:`top_k`, all but a tensor's last of a length that ``m`` divides.

    Raises:
        ValueError: a score is below 0 or not finite.
    """
    found: dict[str, list[Tensor]] = {}
    for name, start, scores in chunks():
        if not bool(((scores >= 0) & (scores < float("inf"))).all()):
            raise ValueError(f"{name}: a score is below 0 or not finite, so nothing is selected")
        groups = torch.full((-(-len(scores) // m), m), -1.0)  # below every score: padding is selected last
        groups.view(-1)[: len(scores)] = scores.cpu()
        chosen = groups.argsort(stable=True, dim=1, descending=True)[:, :n]
        flat = (chosen + m * torch.arange(len(groups))[:, None]).reshape(-1).sort().values
        found.setdefault(name, []).append(flat[flat < len(scores)] + start)
    return {name: torch.cat(each) for name, each in found.items()}


def count_n_of_m(size: int, n: int, m: int) -> int:
    """Entries that :func:`top_n_of_m` selects of a tensor with ``size``."""
    return size // m * n + min(n, size % m)


def _kth(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and how many lie in bins above it."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, k))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


def _take(chunks: Iterable[Chunk], threshold: int, ties: int) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for name, start, scores in chunks:
        bits = _bits(scores)
        chosen = bits > threshold
        if ties:
            equal = (bits == threshold).nonzero()[:ties, 0]
            chosen[equal] = True
            ties -= len(equal)
        found.setdefault(name, []).append(chosen.nonzero()[:, 0].cpu() + start)
    return {name: torch.cat(each) for name, each in found.items()}


def _bits(scores: Tensor) -> Tensor:
    return scores.contiguous().view(torch.int32)
