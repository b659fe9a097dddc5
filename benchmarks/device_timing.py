"""Times on a GPU that mean something: graphs of many calls over cold buffers, candidates taken in turn.

Each call has its own copy of its tensors, and together they exceed the GPU's cache several times, as the layers of a
model do. All calls of a candidate are captured into one CUDA graph, the baseline's as well, so that neither is charged
for Python; its replays are timed with device events. Candidates are replayed in turn, round after round, and a
candidate's time is the median of its rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["copies_for", "copy_bandwidth", "matmul_rate", "record_graph", "time_in_turn"]

ROUNDS = 15
MIN_ROUND_US = 2000.0


def copies_for(call_bytes: int) -> int:
    """How many copies of a call's tensors make the cache useless: four times its size, and at least 2."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-4 * cache // call_bytes))


def record_graph(calls: Sequence[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """All ``calls`` in one graph, after each has run once: kernels are compiled, libraries awake; and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph, outputs


def time_in_turn(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds a call for every candidate and round; ``graphs`` holds a graph and its number of calls."""
    replays = {}
    for name, (graph, _) in graphs.items():
        graph.replay()
        replays[name] = max(1, round(MIN_ROUND_US / max(1.0, _replay_us(graph, 1))))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            times[name].append(_replay_us(graph, replays[name]) / calls)
    return times


def _replay_us(graph: torch.cuda.CUDAGraph, count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / count


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 4 GB, bytes read and written both counted: the best of several rounds."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = 0.0
    for _ in range(10):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = max(best, 2 * source.numel() * 4 / start.elapsed_time(end) / 1e6)
    return best


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of torch.matmul on two random matrices [size, size] of ``dtype``: the best of several rounds."""
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = 0.0
    for _ in range(10):
        start.record()
        torch.matmul(a, b, out=out)
        end.record()
        end.synchronize()
        best = max(best, 2 * size**3 / start.elapsed_time(end) / 1e9)
    return best
