"""Launches that overlap, each reading what the one before writes: in a graph, often enough for a race to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels.delta_linear import packed_delta_linear
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.int8_conv2d import int8_conv2d
from compress.kernels.int8_linear import int8_dynamic_linear, int8_linear
from compress.kernels.lowrank_linear import lowrank_linear
from compress.kernels.packed_linear import packed_linear, packed_lowrank_linear

SIZE = 2048


@pytest.mark.parametrize("rows", [1, 2, 16, 200])
def test_a_chain_in_a_graph_is_the_chain_one_by_one(rows: int, device: str, lane_weight: Callable[..., Any]) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU: the interpreter runs one launch at a time")
    weight, _ = lane_weight(SIZE, SIZE, 4, 128, device)
    packed = (weight.units, weight.scale, weight.zero_point)
    up = torch.randn(SIZE, 256, device=device, dtype=torch.bfloat16) / 16
    down = torch.randn(256, SIZE, device=device, dtype=torch.bfloat16) / SIZE**0.5
    codes = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8, device=device)
    int8 = (codes, torch.full((SIZE,), 1e-4, device=device), codes.sum(1, dtype=torch.int32))
    index = torch.arange(0, SIZE * SIZE, 37, device=device)
    delta = DeltaRows.from_flat((SIZE, SIZE), index, torch.randn(len(index), device=device) * 1e-2, torch.float16)
    deltas = (delta.starts, delta.columns, delta.values)
    narrow_up, narrow_down = up[:, :32].contiguous(), down[:32].contiguous()

    def chain(x: Tensor, between: Callable[[], None]) -> Tensor:
        for _ in range(4):
            for layer in (
                lambda x: packed_linear(x, *packed, None, 4, 128),
                lambda x: packed_lowrank_linear(x, *packed, narrow_up, narrow_down, None, 4, 128),
                lambda x: lowrank_linear(x, up, down, None, 200),
                lambda x: int8_dynamic_linear(x, *int8, None, True),
                lambda x: packed_delta_linear(x, *packed, *deltas, None, None, 4, 128),
            ):
                x = layer(x)
                between()
                x = x / x.float().norm().to(x.dtype)
                x = layer(x)  # and once without another kernel in between
                between()
        return x

    assert_the_same_in_a_graph(chain, torch.randn(rows, SIZE, device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("images", [1, 16])
def test_convolutions_and_what_reads_their_bytes(images: int, device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU: the interpreter runs one launch at a time")
    codes = torch.randint(-127, 128, (64, 3, 3, 64), dtype=torch.int8, device=device)
    parts = (torch.full((64,), 1e-3, device=device), codes.flatten(1).sum(1, dtype=torch.int32))
    square = torch.randint(-127, 128, (64, 64), dtype=torch.int8, device=device)
    linear = (square, torch.full((64,), 1e-2, device=device), square.sum(1, dtype=torch.int32), None, 8)
    grid = (torch.full((), 0.05, device=device), torch.full((), 40, dtype=torch.uint8, device=device))

    def chain(x: Tensor, between: Callable[[], None]) -> Tensor:
        for _ in range(4):
            for _ in range(2):  # from floats, then from bytes
                x = int8_conv2d(x, *grid, codes, *parts, None, 8, [1], [1], [1], 1, True, *grid, 8)
                between()
            x = int8_conv2d(x, *grid, codes, *parts, None, 8, [1], [1], [1])
            between()
            x = int8_linear(x.permute(0, 2, 3, 1), *grid, *linear).permute(0, 3, 1, 2)
            between()
        return x

    assert_the_same_in_a_graph(chain, torch.randn(images, 64, 32, 32, device=device))


def assert_the_same_in_a_graph(chain: Callable[[Tensor, Callable[[], None]], Tensor], x: Tensor) -> None:
    """What ``chain`` makes of ``x`` with nothing between its launches, captured, as with a wait behind each of them."""
    wanted = chain(x, torch.cuda.synchronize)
    assert wanted.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, lambda: None)
    for _ in range(50):
        got.zero_()
        graph.replay()
        assert torch.equal(got, wanted)
