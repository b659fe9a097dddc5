"""Samples that cannot show what real ones would: constant, few, or unlike what the model was trained on.

Each is a sentence that begins with ``WARNING``; the run goes on.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from compress.data.norm_distance import NormSeen, norms_seen
from compress.data.samples import Samples
from compress.graph.traced import call_module
from compress.intake.model import Intake
from compress.records.report import WARNING

__all__ = ["sample_doubts"]

_FEWEST, _FEWEST_ROWS = 32, 4096
# Measured on ResNet-20, ResNet-56 and MobileNetV1 (benchmarks/zoo.py): sets of 16 to 64 of their own images are at 0.02
# to 0.04, four images at 0.1 at most, a single class at 0.05; images in 0..1 without mean and deviation at 0.17 to 0.4,
# noise at 0.8 to 1.2, bytes at 800 and more. Few samples have less variance than many.
_LOOKED_AT, _FAR, _FAR_FOR_FEW = 64, 0.1, 0.4


def sample_doubts(samples: Samples, intake: Intake, what: str = "") -> tuple[str, ...]:
    """What is doubtful about ``samples`` for the model of ``intake``, as sentences; ``what`` says which samples."""
    found = (_constant(samples), _few(samples, intake), _far(samples, intake))
    return tuple(f"{WARNING}{what}{each}" for each in found if each)


def _constant(samples: Samples) -> str | None:
    """More than half of the samples of an input of fractions have one value throughout; or all samples are the same."""
    count = len(samples)
    for x in samples.inputs:
        rows = x.reshape(count, -1)
        if x.is_floating_point() and rows.shape[1] > 1:
            flat = int((rows == rows[:, :1]).all(1).sum())
            if 2 * flat > count:
                return f"{flat} of {count} samples are constant, the same value at every place: check what made them"
    if count > 1 and all(bool((x == x[:1]).all()) for x in samples.inputs):
        return f"all {count} samples are the same: check what made them"
    return None


def _few(samples: Samples, intake: Intake) -> str | None:
    layers = [layer for layer in intake.layers if not layer.refusal and layer.kind != "embedding"]
    if not layers or len(samples) >= _FEWEST:
        return None
    rows = len(samples) * int(statistics.median_low(layer.rows for layer in layers))
    if rows >= _FEWEST_ROWS:
        return None
    return (
        f"{len(samples)} samples, {rows:,} rows in the layer in the middle, are few: give {_FEWEST} samples or more, "
        "better hundreds, or longer ones"
    )


def _far(samples: Samples, intake: Intake) -> str | None:
    fixed = None if intake.traced.dynamic_batch else len(intake.traced.example[0])
    inputs = tuple(x[: fixed or _LOOKED_AT] for x in samples.inputs)

    def run(*batch: Tensor) -> object:
        return call_module(intake.original, batch, intake.names)

    with torch.no_grad():
        _, seen = norms_seen(run, *inputs)
    if not any(map(_is_trained, seen)):
        return None
    distance = float(torch.stack([each.distance() for each in seen]).mean())
    usual = _FAR + _FAR_FOR_FEW / len(inputs[0])
    if distance <= usual:
        return None
    return (
        f"samples are unlike what the model was trained on: what its BatchNorm layers see of them is {distance:.2g} "
        f"(relative, squared) from the statistics they keep, where {usual:.2g} is the most that is usual; prepare them "
        "as in training (--mean, --std, or values in the model's own range)"
    )


def _is_trained(norm: NormSeen) -> bool:
    """Whether it keeps other statistics than those that a layer begins with."""
    return bool(norm.kept_mean.any()) or bool((norm.kept_var != 1).any())
