"""How long a run will take and how much memory it will need, before it starts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from compress.calib.blocks import find_blocks
from compress.graph.traced import TracedModel, node_sizes
from compress.quant.methods import METHODS
from compress.quant.problem import STEP_SAMPLES
from compress.records.plan import Plan
from compress.records.registry import resolve

__all__ = ["Estimate", "estimate", "pass_seconds"]

_FRONTIER_BATCH = 64
# Measured on ResNet-20 and MobileNetV1: the walk costs about four forward passes of every sample (both graphs, with
# their scratch files).
_WALK_FORWARDS = 4.0
_COPIES = 3  # transformed samples, and all samples with them behind
_TIMED_PASSES, _TIMED_SECONDS = 10, 0.5


@dataclass(frozen=True)
class Estimate:
    """Seconds of calibration and peak bytes beyond the program itself; rough, within a factor of two."""

    seconds: float
    memory_bytes: int


def pass_seconds(traced: TracedModel) -> float:
    """Seconds that one sample takes through the float graph, in a step's batch: the fastest of a few passes.

    One alone may be ten times as long where other programs run, and ``auto`` keeps what it was told.
    """
    batch = tuple(torch.cat([x] * STEP_SAMPLES)[:STEP_SAMPLES] for x in traced.example)
    if not traced.dynamic_batch:
        batch = traced.example
    with torch.no_grad():
        traced.module(*batch)
        fastest = math.inf
        left = _TIMED_SECONDS
        for _ in range(_TIMED_PASSES):
            start = time.perf_counter()
            traced.module(*batch)
            took = time.perf_counter() - start
            fastest, left = min(fastest, took), left - took
            if left < 0:
                break
        return fastest / len(batch[0])


def estimate(traced: TracedModel, plan: Plan, samples: int) -> Estimate:
    """Time one batch through the float graph and scale it by what ``plan`` asks for."""
    weights = sum(tensor.nbytes for tensor in traced.module.state_dict().values())
    if not samples:
        return Estimate(1.0, 3 * weights)
    per_sample = pass_seconds(traced)
    cost = max((resolve(METHODS, choice.method, "method").step_cost for choice in plan.choices), default=0.0)
    largest = max(
        (
            math.prod(node_sizes(node)[1:]) * 4
            for node in traced.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dim() > 1
        ),
        default=0,
    )
    # Block methods alone have a transformation, and they are not to be imported here.
    transforms = {getattr(resolve(METHODS, choice.method, "method"), "transform", None) for choice in plan.choices}
    phases = sum(each.forwards(len(find_blocks(traced))) for each in transforms if each is not None)
    steps = phases + plan.iterations * cost
    seconds = (steps * STEP_SAMPLES + samples * _WALK_FORWARDS) * per_sample
    held = 1 + _COPIES if phases else 1
    inputs = sum(x[0].numel() * x.element_size() for x in traced.example) * samples * held
    return Estimate(seconds, inputs + 3 * weights + 8 * largest * _FRONTIER_BATCH)
