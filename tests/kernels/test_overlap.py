"""Launches that overlap, each reading what the one before writes: in a graph, often enough for a race to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels.delta_linear import packed_delta_linear
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.int8_linear import int8_dynamic_linear
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

    x = torch.randn(rows, SIZE, device=device, dtype=torch.bfloat16)
    wanted = chain(x, torch.cuda.synchronize)
    assert wanted.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, lambda: None)
    for _ in range(50):
        got.zero_()
        graph.replay()
        assert torch.equal(got, wanted)
