"""Differentiable augmentation (DSA, arXiv 2102.08259, section 3): one random transformation a batch, drawn by sample.

Ranges are the published code's. The image may be a synthetic one: gradients pass through to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from compress.errors import InputError

__all__ = ["AUGMENTATIONS", "augment", "parse_augmentations"]

_CROP, _CUTOUT, _SCALE, _DEGREES = 0.125, 0.5, 1.2, 15.0


def parse_augmentations(text: str) -> tuple[str, ...]:
    """``"color,crop"`` as names; "all", or "none".

    Raises:
        InputError: a name is unknown.
    """
    if text in ("all", "none"):
        return tuple(AUGMENTATIONS) if text == "all" else ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in AUGMENTATIONS:
            raise InputError(f"--augment {name}: known are {', '.join(AUGMENTATIONS)}, all and none")
    return names


def augment(x: Tensor, names: Sequence[str], generator: Generator) -> Tensor:
    """One of ``names``, drawn, applied to ``x`` [N, C, H, W] with parameters drawn for each sample."""
    if not names:
        return x
    return AUGMENTATIONS[names[int(torch.randint(len(names), (), generator=generator))]](x, generator)


def _uniform(x: Tensor, generator: Generator) -> Tensor:
    """[N, 1, 1, 1] in 0..1, drawn in float32 whatever ``x`` is: a float64 check sees the same draw."""
    return torch.rand(len(x), 1, 1, 1, generator=generator).to(x)


def _color(x: Tensor, generator: Generator) -> Tensor:
    x = x + (_uniform(x, generator) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * _uniform(x, generator)) + grey
    level = x.mean((1, 2, 3), keepdim=True)
    return (x - level) * (_uniform(x, generator) + 0.5) + level


def _crop(x: Tensor, generator: Generator) -> Tensor:
    height, width = x.shape[2:]
    top, left = int(height * _CROP + 0.5), int(width * _CROP + 0.5)
    padded = F.pad(x, (left, left, top, top))
    down = torch.randint(2 * top + 1, (len(x), 1, 1, 1), generator=generator)
    right = torch.randint(2 * left + 1, (len(x), 1, 1, 1), generator=generator)
    rows, columns = torch.arange(height).view(1, 1, -1, 1) + down, torch.arange(width).view(1, 1, 1, -1) + right
    samples, channels = torch.arange(len(x)).view(-1, 1, 1, 1), torch.arange(x.shape[1]).view(1, -1, 1, 1)
    return padded[samples, channels, rows, columns]


def _cutout(x: Tensor, generator: Generator) -> Tensor:
    keep = None
    for size, view in ((x.shape[2], (1, 1, -1, 1)), (x.shape[3], (1, 1, 1, -1))):
        hole = int(size * _CUTOUT + 0.5)
        middle = torch.randint(size + (1 - hole % 2), (len(x), 1, 1, 1), generator=generator)
        place = torch.arange(size).view(view)
        outside = (place < middle - hole // 2) | (place >= middle - hole // 2 + hole)
        keep = outside if keep is None else keep | outside
    assert keep is not None
    return x * keep.to(x)


def _flip(x: Tensor, generator: Generator) -> Tensor:
    return torch.where(_uniform(x, generator) < 0.5, x.flip(3), x)


def _scale(x: Tensor, generator: Generator) -> Tensor:
    across, down = ((_uniform(x, generator).flatten() * (_SCALE - 1 / _SCALE) + 1 / _SCALE) for _ in range(2))
    zero = torch.zeros_like(across)
    return _warp(x, torch.stack([across, zero, zero, zero, down, zero], 1))


def _rotate(x: Tensor, generator: Generator) -> Tensor:
    angle = (_uniform(x, generator).flatten() - 0.5) * (2 * _DEGREES * math.pi / 180)
    zero = torch.zeros_like(angle)
    return _warp(x, torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1))


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` [N, 6] maps places of the result to places of ``x``, both in -1..1."""
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
"""Color is brightness, saturation and contrast, one after another."""
