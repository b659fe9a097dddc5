"""A set of images as one PNG: a row a class, a column an image of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from compress.files.outputs import new_file

__all__ = ["write_sheet"]

_GAP, _LEAST_SIDE = 2, 64


def write_sheet(path: Path, images: Tensor, each: int, low: float, high: float) -> None:
    """Write ``images`` [classes * each, C, H, W], class by class, whole or not at all.

    Args:
        low, high: values shown black and white, those of the real images; what is beyond is cut off. One channel is
            shown grey, three as colours, of any other number the first.
    """
    pixels = ((images.detach().float() - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    zoom = max(1, -(-_LEAST_SIDE // max(pixels.shape[2:])))
    tiles = pixels.permute(0, 2, 3, 1).numpy().repeat(zoom, 1).repeat(zoom, 2)
    rows, (height, width) = len(tiles) // each, tiles.shape[1:3]
    sheet = np.full((rows * (height + _GAP) - _GAP, each * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        down, across = (number // each) * (height + _GAP), (number % each) * (width + _GAP)
        sheet[down : down + height, across : across + width] = tile
    with new_file(path) as temporary:
        PIL.Image.fromarray(sheet).save(temporary, format="PNG")
