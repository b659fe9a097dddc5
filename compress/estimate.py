"""How long a run will take and how much memory it will need, before it starts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from compress.calib.blocks import find_blocks
from compress.graph.layers import node_sizes
from compress.graph.traced import TracedModel
from compress.methods import METHODS
from compress.records import Plan
from compress.registry import resolve

__all__ = ["Estimate", "estimate"]

_FRONTIER_BATCH = 64
_TRAINING_BATCH = 32
# Measured on ResNet-20 and MobileNetV1: a training step costs about four forward passes of its batch, and the walk
# about four forward passes of every sample (both graphs, with their scratch files).
_STEP_FORWARDS = 4.0
_WALK_FORWARDS = 4.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of calibration and peak bytes beyond the program itself; rough, within a factor of two."""

    seconds: float
    memory_bytes: int


def estimate(traced: TracedModel, plan: Plan, samples: int) -> Estimate:
    """Time one batch through the float graph and scale it by what ``plan`` asks for."""
    weights = sum(tensor.nbytes for tensor in traced.module.state_dict().values())
    if not samples:
        return Estimate(1.0, 3 * weights)
    batch = tuple(torch.cat([x] * _TRAINING_BATCH)[:_TRAINING_BATCH] for x in traced.example)
    if not traced.dynamic_batch:
        batch = traced.example
    with torch.no_grad():
        traced.module(*batch)
        start = time.perf_counter()
        traced.module(*batch)
        per_batch = time.perf_counter() - start
    per_sample = per_batch / len(batch[0])
    trained = any(resolve(METHODS, choice.method, "method").needs_data for choice in plan.choices)
    steps = plan.iterations if trained else 0
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
    seconds = (
        phases * per_batch
        + steps * _STEP_FORWARDS * per_sample * _TRAINING_BATCH
        + samples * _WALK_FORWARDS * per_sample
    )
    inputs = sum(x[0].numel() * x.element_size() for x in traced.example) * samples
    return Estimate(seconds, inputs + 3 * weights + 8 * largest * _FRONTIER_BATCH)
