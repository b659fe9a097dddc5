"""Tiles of kernels/packed_dot.py where none was measured: what fits into the shared memory of a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from compress.kernels.lanes import LANES, block_columns
from compress.kernels.launch import power_of_two
from compress.quant.packing import planes

__all__ = ["Step", "default_tile", "step_units"]

_SLACK = 2048  # for what threads pass to each other

Tile = tuple[int, int, int, int, int, int]


def step_units(bits: int, inputs: int, group_size: int) -> int:
    """Units of a row that a step takes: a group's, of the largest ones half; of one grid a row, 256 columns' at most.

    More inputs would not fit into the memory of a multiprocessor.
    """
    if group_size >= inputs:
        return min(64, LANES * max(1, 256 // block_columns(bits)))
    return LANES * max(1, min(128, group_size) // block_columns(bits))


@dataclass(frozen=True)
class Step:
    """What a step of a program brings into shared memory, whatever the tile.

    Attributes:
        units: of a row and position, as :func:`step_units` says.
        bits: of a code.
        itemsize: bytes of an input.
        held: whether tensor cores read inputs from shared memory, where they then stay a stage longer: from Hopper on.
        rank: of the branch; 0 without.
    """

    units: int
    bits: int
    itemsize: int
    held: bool
    rank: int = 0

    def shared(self, n: int, m: int, stages: int) -> int:
        """At most so many bytes of shared memory does a program of ``n`` outputs and ``m`` rows ask for.

        Inputs are brought once for each plane of the codes.
        """
        columns = self.units // LANES * block_columns(self.bits)
        inputs = columns * m * self.itemsize * len(planes(self.bits))
        codes = n * columns * self.bits // 8
        ahead = max(1, stages - 1)
        loop = (stages if self.held else ahead) * inputs + ahead * codes
        return max(loop, self.branch(n, m)) + _SLACK

    def branch(self, n: int, m: int) -> int:
        """Bytes of the branch's two factors, after the loop."""
        return (n + m) * max(16, power_of_two(self.rank)) * self.itemsize if self.rank else 0


def default_tile(rows: int, outputs: int, steps: int, processors: int, step: Step, limit: int) -> Tile:
    """Wide tiles where there are outputs enough, and splits of at least 8 steps until the multiprocessors are busy.

    Two stages, then a narrower tile, then one stage, until a program gets by with ``limit`` bytes of shared memory.
    """
    wide = outputs >= 62 * processors
    m = 16 if rows <= 16 else 64 if wide or rows > 64 else 32
    n, stages = 256 if wide else 128, 3
    while step.shared(n, m, stages) > limit and stages > 1:
        if (stages > 2 and step.branch(n, m) + _SLACK <= limit) or (n, m) == (32, 16):
            stages -= 1
        elif n > 2 * m or m == 16:
            n //= 2
        else:
            m //= 2
    wanted = processors * (4 if not wide else 2 if m == 16 else 1)
    programs = -(-outputs // n) * -(-rows // m)
    splits = max(1, min(8, steps // 8, round(wanted / programs)))
    return n, m, splits, 8 if n == 256 else 4, stages, 1
