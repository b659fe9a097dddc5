"""What distilled images reveal: how near each is to a real one, measured by how near real ones are to each other.

A distance says whether an image is a copy in pixels. It does not say that nothing can be learned about the originals:
no bound of differential privacy is claimed or follows.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Generator, Tensor

from compress.records.layers import Record

__all__ = ["Neighbours", "find_neighbours"]

_SAMPLE, _CHUNK, _FEW = 500, 256, 4


class Neighbours(Record):
    """Distances are root mean squares over pixels, in the samples' own units."""

    nearest: tuple[int, ...] = Field(description="index of the nearest real image, by distilled image")
    distances: tuple[float, ...] = Field(description="to it")
    to_start: tuple[float, ...] = Field(description="to the real image it began as")
    typical: float = Field(description="median distance of a real image to the nearest other real one")
    nearest_is_start: int = Field(description="distilled images whose nearest real one is what they began as")
    nearer_than_typical: int = Field(
        description="distilled images as near to a real one as real ones are to each other"
    )


@torch.no_grad()
def find_neighbours(images: Tensor, start: Tensor, real: Tensor, seed: int = 0) -> Neighbours:
    """Of distilled ``images`` [n, C, H, W] among ``real`` [N, C, H, W]; ``start`` [n]: what each began as, by index."""
    flat, real = images.flatten(1), real.flatten(1)
    # Distances stay as they are, and numbers near 0 lose least where squares are subtracted from each other.
    centre = real.mean(0)
    flat, real = flat - centre, real - centre
    scale = flat.shape[1] ** 0.5
    distances, nearest = _nearest(flat, real)
    some = torch.randperm(len(real), generator=Generator().manual_seed(seed))[:_SAMPLE]
    between, _ = _nearest(real[some], real, without=some)
    typical = float(between.median()) / scale
    own = (flat - real[start]).norm(dim=1) / scale
    distances = distances / scale
    return Neighbours(
        nearest=tuple(nearest.tolist()),
        distances=tuple(distances.tolist()),
        to_start=tuple(own.tolist()),
        typical=typical,
        nearest_is_start=int((nearest == start).sum()),
        nearer_than_typical=int((distances <= typical).sum()),
    )


def _nearest(points: Tensor, real: Tensor, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance [n] and index [n]; ``without`` [n]: a real image for each point that does not count.

    The matrix product, whose rounding makes a copy's distance larger than 0, finds the few nearest; they are measured
    without it.
    """
    found = []
    few = min(_FEW, len(real))
    for place in torch.arange(len(points)).split(_CHUNK):
        rough = torch.cdist(points[place], real, compute_mode="use_mm_for_euclid_dist")
        if without is not None:
            rough[torch.arange(len(place)), without[place]] = torch.inf
        chosen = rough.topk(few, largest=False)
        exact = (points[place][:, None] - real[chosen.indices]).norm(dim=2)
        exact[chosen.values.isinf()] = torch.inf
        nearest = exact.min(1)
        found.append((nearest.values, chosen.indices.gather(1, nearest.indices[:, None])[:, 0]))
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])
