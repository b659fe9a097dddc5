"""The transformation: of images a U-Net, without an activation at its end (arXiv 1505.04597); of tokens a residual.

Published are widths 64 to 1024 and BatchNorm. The default has the same form in the size of the images: halved until
their shorter side would fall below 4, at most 4 times, 8 (grey) or 16 channels wide, twice as many each time. BatchNorm
learns its statistics in the warm-up and keeps them from there on, so that what becomes of an image does not depend on
those beside it. Tokens have no size to be halved: two convolutions over neighbours, a quarter as wide, are added to
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TokenResidual", "UNet", "make_network", "widths_for"]

_PUBLISHED = (64, 128, 256, 512, 1024)
_SMALLEST_SIDE = 4
_MOST_HALVINGS = 4
_NARROWEST = 8


class UNet(nn.Module):
    """Images [N, C, H, W], of any size, to images of the same shape.

    Args:
        channels: C.
        widths: channels at full size, and after each halving.
        learned_upsampling: transposed convolutions, as published, instead of nearest neighbours.
    """

    def __init__(self, channels: int, widths: Sequence[int], learned_upsampling: bool) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.entry = _convolutions(channels, widths[0])
        self.down = nn.ModuleList(_convolutions(outer, inner) for outer, inner in pairs)
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(inner, outer, 2, stride=2)
            if learned_upsampling
            else nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inner, outer, 1))
            for outer, inner in reversed(pairs)
        )
        self.up = nn.ModuleList(_convolutions(2 * outer, outer) for outer, _ in reversed(pairs))
        self.exit = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        x = self.entry(x)
        passed = []
        for down in self.down:
            passed.append(x)
            x = down(F.max_pool2d(x, 2))
        for widen, up in zip(self.widen, self.up, strict=True):
            beside = passed.pop()
            x = widen(x)
            rows, columns = (wanted - got for wanted, got in zip(beside.shape[2:], x.shape[2:], strict=True))
            x = up(torch.cat([beside, F.pad(x, (0, columns, 0, rows), mode="replicate")], 1))  # an odd side lost one
        return self.exit(x)


class TokenResidual(nn.Module):
    """Sequences [N, L, C] to sequences of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // 4, _NARROWEST)
        self.inner = nn.Conv1d(channels, width, 3, padding=1)
        self.outer = nn.Conv1d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] to the same."""
        return x + self.outer(F.silu(self.inner(x.transpose(1, 2)))).transpose(1, 2)


def widths_for(shape: Sequence[int]) -> tuple[int, ...]:
    """The widths that fit images of ``shape`` (C, H, W); one alone where they are too small to be halved."""
    channels, side = shape[0], min(shape[1:])
    halvings = 0
    while halvings < _MOST_HALVINGS and side >> (halvings + 1) >= (_SMALLEST_SIDE if halvings else 2):
        halvings += 1
    width = 8 if channels == 1 else 16
    return tuple(width << level for level in range(halvings + 1))


def make_network(shape: Sequence[int], published: bool, seed: int) -> nn.Module:
    """A new transformation of images of ``shape`` (C, H, W) or sequences of (L, C), in training mode.

    Args:
        published: the published one, whatever the images' size; they must have 16 pixels a side. There is none for
            sequences.
        seed: of its initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(shape) == 2:
            return TokenResidual(shape[1])
        return UNet(shape[0], _PUBLISHED if published else widths_for(shape), published)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
