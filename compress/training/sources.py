"""Batches of several sources (languages of one task), for training with ``tuner.step(source)``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["mix_sources"]


def mix_sources(
    sizes: Mapping[str, int], batch: int, *, repeats: Mapping[str, int] | None = None, seed: int = 0
) -> list[tuple[str, Tensor]]:
    """One epoch: batches of one source each, in an order by chance (arXiv 2110.07560, multi-source training).

    Args:
        sizes: samples of every source, by its name.
        repeats: how often a source's samples are seen in the epoch, for small ones; 1 where none is given.
        seed: another one for every epoch.

    Returns:
        Name and indices, int64 [at most ``batch``], of every batch; each time round a source its order is another.

    Raises:
        ValueError: a number is below 1, or a repeated source is not there.
    """
    repeats = repeats or {}
    for name in repeats.keys() - sizes.keys():
        raise ValueError(f"source {name!r}: known are {', '.join(sizes)}")
    if min((batch, *sizes.values(), *repeats.values())) < 1:
        raise ValueError(f"batch {batch}, sizes {dict(sizes)}, repeats {dict(repeats)}: all at least 1")
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (name, index)
        for name, size in sizes.items()
        for _ in range(repeats.get(name, 1))
        for index in torch.randperm(size, generator=generator).split(batch)
    ]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
