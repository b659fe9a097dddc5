"""The compressed graph of a plan without its calibration: the same operators and bytes, made-up numbers.

Size and speed of a file depend on its operators, shapes and widths, not on the values in it. A skeleton has them all
and is made in seconds, so that a plan's size is known and its latency timed before anything is calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from compress.calib.observers import activation_grid
from compress.exporters.build import build_onnx, write_onnx
from compress.graph.layers import ACTIVATIONS
from compress.graph.quantizers import Quantizer, quantize_inputs
from compress.graph.rewrite import absorb_activations, set_grid, set_weight, store_biases
from compress.graph.split import split_layer
from compress.graph.traced import TracedModel
from compress.kernels.table import register_operators
from compress.quant.formats import find_format
from compress.quant.methods import METHODS
from compress.quant.problem import Effort, LayerProblem
from compress.quant.targets import Target
from compress.records.layers import Split
from compress.records.plan import Choice
from compress.records.registry import resolve

__all__ = ["build_skeleton", "write_skeleton"]

# A ReLU6's own range, so that it is absorbed as the calibrated one would be; any other number would do elsewhere.
_TOP = 6.0


def build_skeleton(
    float_model: TracedModel, choices: Sequence[Choice], target: Target, splits: Sequence[Split] = ()
) -> TracedModel:
    """The graph that ``choices`` lead to, weights rounded to nearest, factors and every activation grid made up.

    Args:
        float_model: simplified and folded; it is left as it is.
    """
    register_operators()
    model = float_model.copy()
    for number, split in enumerate(splits):
        split_layer(model, split, *_made_up_factors(model, split, number))
    quantizers = quantize_inputs(model, choices, target)
    for number, quantizer in enumerate(quantizers):
        set_grid(model, quantizer.name, *_made_up_grid(model, quantizer, number))
    for choice in choices:
        weight = model.tensor(f"{choice.layer}.weight")
        problem = LayerProblem(choice.layer, weight, None, forward=lambda x, *_: x)
        solution = resolve(METHODS, "minmax", "method").solve(problem, choice.option, Effort(0, 0))
        set_weight(model, choice.layer, solution.weight, find_format(choice.format).compute)
    store_biases(model)
    absorb_activations(model)
    return model


def write_skeleton(
    float_model: TracedModel, choices: Sequence[Choice], target: Target, path: Path, splits: Sequence[Split] = ()
) -> int:
    """Export the skeleton to ``path`` and return the file's bytes."""
    write_onnx(build_onnx(build_skeleton(float_model, choices, target, splits)), path, {})
    return path.stat().st_size


def _made_up_factors(model: TracedModel, split: Split, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unlike any others, for the same reason as grids are."""
    weight = model.tensor(f"{split.layer}.weight").flatten(1)
    generator = torch.Generator().manual_seed(number)
    down = torch.randn(split.rank, weight.shape[1], generator=generator)
    return down, torch.randn(weight.shape[0], split.rank, generator=generator)


def _made_up_grid(model: TracedModel, quantizer: Quantizer, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid unlike any other's, as calibration would give: equal tensors would be stored once."""
    node = next(node for node in model.graph.nodes if node.name == quantizer.node)
    low = 0.0 if node.args[0].target in ACTIVATIONS else -_TOP * (1 + number / 100)
    dtype = model.tensor(f"{quantizer.name}.zero_point").dtype
    return activation_grid(low, _TOP / (1 + number / 1000), quantizer.bits, dtype)
