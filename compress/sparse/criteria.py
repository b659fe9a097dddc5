"""What makes an entry worth a place in the mask. A criterion is a score an entry, and the K largest are taken.

==============  =====================================================================================================
``change``      |theta1 - theta0| after full fine-tuning (LT-SFT, arXiv 2110.07560, section 3)
``snip``        |g theta0|, g the gradient at the start (SNIP, arXiv 1810.02340, section 4, not normalised)
``gradient``    |g|
``random``      a random number: the baseline of the same size
``magnitude``   |theta0|
``bitfit``      biases alone, all of them (BitFit, arXiv 2106.10199); K is their number
==============  =====================================================================================================

Scores are made a chunk at a time, for :func:`~compress.sparse.selection.top_k`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from compress.sparse.selection import CHUNK, Chunk, count_n_of_m

__all__ = ["BY_GRADIENT", "CRITERIA", "UNTRAINED", "count_entries", "given_scores", "scores_of", "with_earlier"]

_DENSITY = 0.01
UNTRAINED = ("random", "magnitude", "bitfit")
BY_GRADIENT = ("snip", "gradient")
CRITERIA = ("change", *BY_GRADIENT, *UNTRAINED)

# Flat chunks of the entries as they are (or of their gradients) and as they were, and a generator: to scores.
_Score = Callable[[str, Tensor, Tensor, torch.Generator], Tensor]


def scores_of(
    criterion: str, now: Mapping[str, Tensor], start: Mapping[str, Tensor], seed: int
) -> Callable[[], Iterator[Chunk]]:
    """Chunks of scores by ``criterion``; the same at every call.

    Args:
        now: the maskable parameters after training, or for ``snip`` and ``gradient`` their gradients at the start.
        start: the parameters before training, of the same names and shapes, in the same order.
        seed: of ``random``.

    Raises:
        ValueError: there is no such criterion.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r}: known are {', '.join(CRITERIA)}")
    score = _SCORES[criterion]

    def chunks() -> Iterator[Chunk]:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in now.items():
            flat, before = tensor.detach().reshape(-1), start[name].reshape(-1)
            for begin in range(0, flat.numel(), CHUNK):
                part = slice(begin, begin + CHUNK)
                yield name, begin, score(name, flat[part], before[part], generator)

    return chunks


def given_scores(scores: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Callable[[], Iterator[Chunk]]:
    """Chunks of scores of one's own (SNIP, gradients, ...), not below 0, by name and of the parameters' shapes.

    Raises:
        ValueError: a maskable parameter has none, or one of another shape; or a name is no maskable parameter's.
    """
    for name in sorted(scores.keys() ^ start.keys()):
        where = "is no maskable parameter" if name in scores else "has no scores"
        raise ValueError(f"{name} {where}; scores are needed for exactly the maskable parameters")
    for name, each in start.items():
        if scores[name].shape != each.shape:
            raise ValueError(
                f"{name}: scores of shape {list(scores[name].shape)}, the parameter has {list(each.shape)}"
            )

    def chunks() -> Iterator[Chunk]:
        for name in start:
            flat = scores[name].detach().reshape(-1)
            for begin in range(0, flat.numel(), CHUNK):
                yield name, begin, flat[begin : begin + CHUNK].float() + 0.0  # -0 is not below 0

    return chunks


def count_entries(
    maskable: Mapping[str, Tensor],
    criterion: str,
    density: float | None,
    k: int | None,
    pattern: tuple[int, int] | None,
) -> int:
    """How many entries of ``maskable`` are selected.

    Args:
        density: share of all, rounded down; 0.01 where nothing else is given.
        k: how many, instead.
        pattern: (n, m): n of every m, instead.

    Raises:
        ValueError: two of them are given, one is impossible, or does not go with ``criterion``.
    """
    if criterion == "bitfit":
        if density is not None or k is not None or pattern is not None:
            raise ValueError("bitfit selects all biases; density, k and pattern do not go with it")
        if not (count := sum(each.numel() for name, each in maskable.items() if _is_bias(name))):
            raise ValueError("bitfit: no maskable parameter is a bias")
        return count
    if sum(each is not None for each in (density, k, pattern)) > 1:
        raise ValueError("give density or k, not both; and neither with a pattern")
    if pattern is not None:
        n, m = pattern
        if not 1 <= n <= m or CHUNK % m:
            raise ValueError(f"pattern {n}:{m}: n between 1 and m, and m a power of two are needed, as in 2:4")
        return sum(count_n_of_m(each.numel(), n, m) for each in maskable.values())
    total = sum(each.numel() for each in maskable.values())
    if k is None:
        density = _DENSITY if density is None else density
        if not 0 <= density <= 1:
            raise ValueError(f"density {density:g}: a share between 0 and 1")
        k = int(density * total + 1e-6)  # 0.29 * 100 is below 29
    if not 0 <= k <= total:
        raise ValueError(f"k {k:,}: {total:,} entries can be selected, allowed are 0 to all of them")
    return k


def with_earlier(chunks: Callable[[], Iterable[Chunk]], earlier: Mapping[str, Tensor]) -> Callable[[], Iterable[Chunk]]:
    """``chunks`` with the highest score there is for what was selected earlier, so that it is selected again."""
    if not earlier:
        return chunks

    def raised() -> Iterator[Chunk]:
        for name, start, scores in chunks():
            index = earlier[name]
            inside = index[(index >= start) & (index < start + len(scores))] - start
            scores = scores.clone()
            scores[inside.to(scores.device)] = torch.finfo(torch.float32).max
            yield name, start, scores

    return raised


def _is_bias(name: str) -> bool:
    # torch's attention calls its own in_proj_bias.
    return name.rpartition(".")[2].endswith("bias")


def _change(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    # Half precision is subtracted in single, where differences of its numbers do not round to ties.
    wide = torch.float64 if now.dtype == torch.float64 else torch.float32
    return (now.to(wide) - before.to(now.device, wide)).abs_().float()


def _snip(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return (now.float() * before.to(now.device).float()).abs_()


def _gradient(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return now.float().abs()


def _random(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(now.numel(), generator=generator)


def _magnitude(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return before.float().abs()


def _bitfit(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full((now.numel(),), float(_is_bias(name)))


_SCORES: dict[str, _Score] = {
    "change": _change,
    "snip": _snip,
    "gradient": _gradient,
    "random": _random,
    "magnitude": _magnitude,
    "bitfit": _bitfit,
}
