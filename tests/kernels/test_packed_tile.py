"""Tiles that packed_dot chooses itself, on GPUs of every kind: what they take of shared memory, and what they split."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from compress.kernels import launch
from compress.kernels.packed_tile import Step, default_tile, step_units

INPUTS = 4096
LIMITS = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (12, 0): 101_376, (13, 7): 101_376}


@pytest.mark.parametrize("capability", LIMITS, ids=str)
def test_every_call_that_the_kernel_takes_fits(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_properties", lambda device: (capability, 132))
    limit = launch.shared_memory(torch.zeros(1))
    assert limit == LIMITS[capability]
    held = capability >= (9, 0)
    shapes = product(
        (1, 16, 64, 128), (512, 8192, 65_536), range(2, 9), (16, 64, 128, 256, INPUTS), (2, 4), (0, 32, 128)
    )
    for rows, outputs, bits, group_size, itemsize, rank in shapes:
        step = Step(step_units(bits, INPUTS, group_size), bits, itemsize, held, rank)
        n, m, splits, warps, stages, _ = default_tile(rows, outputs, 64, 132, step, limit)
        case = str((rows, outputs, bits, group_size, itemsize, rank, n, m, stages))
        assert step.shared(n, m, stages) <= limit, case
        assert min(n // 2, m) >= 16, case
        assert min(splits, stages) >= 1, case
        assert warps == (8 if n == 256 else 4), case


@pytest.mark.parametrize(
    ("call", "tile"),
    [
        ((16, 4096, 4, 128, 2, True, 0, 232_448), (128, 16, 4, 4, 3, 1)),
        ((64, 8192, 4, 128, 2, False, 0, 101_376), (256, 64, 4, 8, 3, 1)),
        ((64, 8192, 4, INPUTS, 4, False, 0, 166_912), (256, 64, 4, 8, 2, 1)),
        ((16, 8192, 4, 128, 4, False, 128, 101_376), (128, 16, 4, 4, 3, 1)),
    ],
)
def test_tiles_are_narrowed_only_where_they_must_be(call: tuple[Any, ...], tile: tuple[int, ...]) -> None:
    rows, outputs, bits, group_size, itemsize, held, rank, limit = call
    step = Step(step_units(bits, INPUTS, group_size), bits, itemsize, held, rank)
    assert default_tile(rows, outputs, 32, 132, step, limit) == tile


@pytest.mark.parametrize(
    ("bits", "group_size", "units"),
    [(2, INPUTS, 32), (3, INPUTS, 16), (4, INPUTS, 64), (8, INPUTS, 64), (2, 256, 16), (4, 16, 16), (8, 128, 64)],
)
def test_steps(bits: int, group_size: int, units: int) -> None:
    assert step_units(bits, INPUTS, group_size) == units


def test_elsewhere_the_least_is_allowed() -> None:
    assert launch.shared_memory(torch.zeros(1)) == 101_376
