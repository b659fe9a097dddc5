"""What makes an entry worth a place in the mask. A criterion is a score an entry, and the K largest are taken.

==============  =====================================================================================================
``change``      |theta1 - theta0| after full fine-tuning (LT-SFT, arXiv 2110.07560, section 3)
``random``      a random number: the baseline of the same size
``magnitude``   |theta0|
``bitfit``      biases alone, all of them (BitFit, arXiv 2106.10199); K is their number
==============  =====================================================================================================

Scores are made a chunk at a time, for :func:`~compress.sparse.selection.top_k`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from compress.sparse.selection import CHUNK, Chunk

__all__ = ["CRITERIA", "UNTRAINED", "bias_count", "given_scores", "scores_of"]

UNTRAINED = ("random", "magnitude", "bitfit")
CRITERIA = ("change", *UNTRAINED)

# Flat chunks of the entries as they are and as they were, and a generator: to scores.
_Score = Callable[[str, Tensor, Tensor, torch.Generator], Tensor]


def scores_of(
    criterion: str, now: Mapping[str, Tensor], start: Mapping[str, Tensor], seed: int
) -> Callable[[], Iterator[Chunk]]:
    """Chunks of scores by ``criterion``; the same at every call.

    Args:
        now, start: the maskable parameters after and before training, of the same names and shapes, in order.
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
                yield name, begin, flat[begin : begin + CHUNK].float()

    return chunks


def bias_count(start: Mapping[str, Tensor]) -> int:
    """Entries of all biases: K of ``bitfit``."""
    return sum(each.numel() for name, each in start.items() if _is_bias(name))


def _is_bias(name: str) -> bool:
    # torch's attention calls its own in_proj_bias.
    return name.rpartition(".")[2].endswith("bias")


def _change(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    # Half precision is subtracted in single, where differences of its numbers do not round to ties.
    wide = torch.float64 if now.dtype == torch.float64 else torch.float32
    return (now.to(wide) - before.to(now.device, wide)).abs_().float()


def _random(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(now.numel(), generator=generator)


def _magnitude(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return before.float().abs()


def _bitfit(name: str, now: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full((now.numel(),), float(_is_bias(name)))


_SCORES: dict[str, _Score] = {
    "change": _change,
    "random": _random,
    "magnitude": _magnitude,
    "bitfit": _bitfit,
}
