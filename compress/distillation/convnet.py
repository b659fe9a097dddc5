"""The ConvNet of the field: blocks of convolution, instance norm, ReLU and average pooling, then a linear.

Zhao et al., Dataset Condensation (arXiv 2006.05929), section 4; MTT and AST use it with three blocks of width 128.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from compress.errors import InputError

__all__ = ["convnet"]


def convnet(channels: int, classes: int, side: tuple[int, int], *, width: int = 32, depth: int = 3) -> nn.Sequential:
    """A new one for images [N, ``channels``, ``side``], with ``classes`` outputs.

    Raises:
        InputError: the images are too small for ``depth`` blocks, each of which halves them.
    """
    if width < 1 or depth < 1:
        raise InputError(f"--width {width} --depth {depth}: at least 1 each")
    height, across = side
    layers: list[tuple[str, nn.Module]] = []
    for block in range(depth):
        if height * across < 2 or min(height, across) < 2:
            raise InputError(
                f"--depth {depth}: {side[0]} x {side[1]} pixels are {height} x {across} after {block} blocks, "
                f"nothing to pool; give --depth {block} or less"
            )
        layers += [
            (f"conv{block}", nn.Conv2d(channels, width, 3, padding=1)),
            # As many groups as channels: instance norm with an affine map, which keeps no running statistics.
            (f"norm{block}", nn.GroupNorm(width, width)),
            (f"relu{block}", nn.ReLU()),
            (f"pool{block}", nn.AvgPool2d(2)),
        ]
        channels, height, across = width, height // 2, across // 2
    layers += [("flatten", nn.Flatten()), ("linear", nn.Linear(width * height * across, classes))]
    return nn.Sequential(OrderedDict(layers))
