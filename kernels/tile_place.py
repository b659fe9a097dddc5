"""Which tile of its output a program makes, where tiles may be many: they lie along a grid's x dimension.

CUDA takes 2**31 - 1 programs along x, and 65,535 along y and z: rows in tiles of one reach that with a large batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["tile_place"]


@triton.jit
def tile_place(outputs, N: tl.constexpr):
    """Which tile of N outputs, and which of rows; neighbours share rows, and go through all outputs first."""
    tiles = tl.cdiv(outputs, N)
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles
