"""Whether labelled samples go with what the model returns."""

from __future__ import annotations

import math

import torch

from compress.data.samples import Samples
from compress.errors import InputError
from compress.graph.traced import first_output
from compress.intake.model import Intake, check_fits

__all__ = ["check_metric"]


def check_metric(intake: Intake, samples: Samples) -> None:
    """Refuse labelled samples that :func:`measure_metric` could not use, before any work is done.

    Raises:
        InputError: their shape is not the model's, or the labels do not go with its output.
    """
    assert samples.labels is not None
    check_fits(samples, intake.traced)
    with torch.no_grad():
        output = first_output(
            intake.traced.module(*(x[: len(e)] for x, e in zip(samples.inputs, intake.traced.example, strict=True)))
        )
    per_sample = tuple(output.shape[1:])
    if samples.labels.is_floating_point():
        fits, needed = math.prod(per_sample) == 1, "one number a sample for labels that are fractions"
    else:
        fits, needed = len(per_sample) == 1 and per_sample[0] > 1, "one score a class for labels that are whole numbers"
    if fits and not samples.labels.is_floating_point():
        low, high = int(samples.labels.min()), int(samples.labels.max())
        if low < 0 or high >= per_sample[0]:
            raise InputError(
                f"{samples.source}: labels run from {low} to {high}, the model has classes 0 to {per_sample[0] - 1}; "
                "check that both count the same classes from 0"
            )
    if not fits:
        shape = "x".join(map(str, per_sample)) or "one number"
        raise InputError(f"{samples.source}: the metric needs {needed}; the model gives {shape} a sample")
