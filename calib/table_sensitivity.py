"""How much a quantized embedding hurts the whole model: the table alone is quantized, the whole model run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compress.calib.output_loss import judged_batches, loss_between
from compress.graph.traced import TracedModel
from compress.quant.methods import METHODS
from compress.quant.problem import Effort, LayerProblem
from compress.records.layers import QuantOption
from compress.records.registry import resolve

__all__ = ["measure_table"]


def measure_table(
    base: TracedModel,
    layer: str,
    options: Mapping[str, tuple[str, QuantOption]],
    measure: str,
    inputs: tuple[Tensor, ...] | None,
    labels: Tensor | None,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Loss of every option by its key, less the loss with the table float.

    Args:
        base: all other layers as they are while it is measured.
        options: method and option by key.
        measure: see :mod:`compress.calib.sensitivity`; ``weight`` and ``gram`` take the table's own relative error.
        inputs: samples, one tensor [N, ...] a graph input.
        labels: classes [N], for ``loss``.
    """
    table = base.tensor(f"{layer}.weight")
    problem = LayerProblem(layer, table, None, forward=lambda x, *_: x)
    by_outputs = measure not in ("weight", "gram") and inputs is not None
    wanted, truth, before = torch.empty(0), None, 0.0
    if by_outputs:
        assert inputs is not None
        index = judged_batches(base, len(inputs[0]))
        truth = labels[torch.cat(index)] if labels is not None else None
        wanted = base.run(tuple(x[each] for x in inputs) for each in index)
        before = loss_between(measure, wanted, wanted, truth)
    found = {}
    for key, (method, option) in options.items():
        rounded = resolve(METHODS, method, "method").solve(problem, option, Effort(0, 0)).weight.dequantize()
        if by_outputs:
            assert inputs is not None
            changed = base.copy()
            changed.set_tensor(f"{layer}.weight", rounded)
            output = changed.run(tuple(x[each] for x in inputs) for each in index)
            found[key] = loss_between(measure, output, wanted, truth) - before
        else:
            found[key] = float((rounded - table).square().sum() / table.square().sum().clamp(min=1e-30))
        progress(f"{layer} {option}")
    return found
