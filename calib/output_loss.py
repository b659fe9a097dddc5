"""How far a changed model's outputs are from the float one's: one number, the same for a layer and for a plan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.graph.traced import TracedModel

__all__ = ["judged_batches", "loss_between", "output_loss"]

_BATCH = 64
_JUDGED = 256
_SMALLEST = 1e-30


def output_loss(
    float_model: TracedModel, model: TracedModel, inputs: tuple[Tensor, ...], labels: Tensor | None, measure: str
) -> float:
    """What ``measure`` gives for a whole model, less what it gives for the float one: the sum that errors predict.

    Args:
        inputs: samples, one tensor [N, ...] a graph input.
        labels: classes [N], for ``loss``.
        measure: ``kl``, ``loss`` or ``output``.
    """
    size = _batch_size(model)
    count = len(inputs[0]) if model.dynamic_batch else len(inputs[0]) // size * size
    index = torch.arange(count).split(size)
    wanted, output = (graph.run(tuple(x[each] for x in inputs) for each in index) for graph in (float_model, model))
    labels = labels[:count] if labels is not None else None
    return loss_between(measure, output, wanted, labels) - loss_between(measure, wanted, wanted, labels)


def _batch_size(model: TracedModel) -> int:
    return _BATCH if model.dynamic_batch else len(model.example[0])


def judged_batches(model: TracedModel, count: int) -> tuple[Tensor, ...]:
    """Indices of the last of ``count`` samples, batch by batch: methods learn on the others and are judged on these."""
    size = _batch_size(model)
    judged = min(_JUDGED, count - count // 2)
    if not model.dynamic_batch:  # whole batches only
        judged = max(judged // size, 1) * size
    return torch.arange(count)[count - judged :].split(size)


def loss_between(measure: str, output: Tensor, wanted: Tensor, labels: Tensor | None) -> float:
    """Mean over samples and, where there are any, positions."""
    if measure == "output":
        return float((output - wanted).square().sum() / wanted.square().sum().clamp(min=_SMALLEST))
    output, wanted = (x.movedim(_class_dim(x), -1).flatten(0, -2) for x in (output, wanted))
    if measure == "loss":
        assert labels is not None
        return float(F.cross_entropy(output, labels.flatten()))
    got, true = (F.log_softmax(x.double(), -1) for x in (output, wanted))
    return float(F.kl_div(got, true, reduction="batchmean", log_target=True))


def _class_dim(output: Tensor) -> int:
    """The dimension that counts classes: the second of pictures, the last of everything else."""
    return 1 if output.dim() == 4 else output.dim() - 1
