"""Two frontiers side by side: each layer's input from the changed graph, its wanted output from the float one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx

from compress.calib.frontier import Frontier
from compress.graph.layers import activation_of, channel_groups, layer_calls
from compress.graph.quantizers import Quantizer
from compress.graph.rewrite import input_quantizer, layer_bias
from compress.graph.traced import TracedModel
from compress.quant.problem import ActivationGrid, LayerProblem, RowSource

__all__ = ["LayerInputs", "TensorRows", "Walk"]


@dataclass(frozen=True)
class TensorRows:
    """Samples in memory as a :class:`~compress.quant.problem.RowSource`."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Tensor) -> Tensor:
        """The samples at ``index``."""
        return self.values[index]


@dataclass(frozen=True)
class LayerInputs:
    """A layer as the walk found it.

    Attributes:
        problem: for the layer's method.
        prefix: its input from the changed graph, whatever the method learns on; None without data.
        quantizer: the grid that the method may change, or None.
    """

    problem: LayerProblem
    prefix: RowSource | None
    quantizer: Quantizer | None


class Walk:
    """A position in ``float_model`` and in its changed copy ``model``, over all samples; one direction only.

    Args:
        inputs: samples, one tensor [N, ...] a graph input; None where no method needs them.
        scratch: folder for values on disk.
    """

    def __init__(
        self, float_model: TracedModel, model: TracedModel, inputs: tuple[Tensor, ...] | None, scratch: Path
    ) -> None:
        self.float_model, self.model, self.inputs, self.scratch = float_model, model, inputs, scratch
        self.largest_scales: dict[str, float] = {}
        self.ahead: Frontier | None = None
        self.reference: Frontier | None = None
        if inputs is not None:
            self.ahead = Frontier(model, inputs, scratch / "quantized")
            self.reference = Frontier(float_model, inputs, scratch / "float")

    def close(self) -> None:
        """Delete everything on disk."""
        for frontier in (self.ahead, self.reference):
            if frontier is not None:
                frontier.close()

    def layer(self, name: str, quantizers: list[Quantizer], sequential: bool) -> LayerInputs:
        """Move up to the layer called ``name`` and describe it.

        Args:
            quantizers: those whose grids a method may still change.
            sequential: whether the problem's inputs come from the changed graph or from the float one.
        """
        calls = layer_calls(self.model)[name]
        call = calls[0]
        float_call = _node(self.float_model, call.name)
        grid, quantizer, inputs, prefix, targets = None, None, None, None, None
        if self.ahead is not None and self.reference is not None:
            quantizer = next((q for q in quantizers if name in q.layers), None)
            grid_node = input_quantizer(call)
            source = call.args[0]
            assert isinstance(source, fx.Node)
            learnable = (
                quantizer is not None and quantizer.exclusive and quantizer.layers == (name,)
                and source is grid_node
                and source.args[0].op != "placeholder" and len(calls) == 1
                and not self.ahead.passed(source.name)
            )  # fmt: skip
            if learnable:
                source = source.args[0]
            elif source.op != "placeholder":
                self.ahead.advance(source.name)
            if grid_node is not None:
                scale, zero_point = (self.model.tensor(node.target) for node in grid_node.args[1:3])
                limit = self.largest_scales.get(quantizer.name, math.inf) if quantizer is not None else math.inf
                grid = ActivationGrid(scale, zero_point, grid_node.args[3], learnable, limit)
            before = _node(self.float_model, _unquantized(call.args[0]).name)
            self.reference.advance(before.name)
            prefix = self._rows(self.ahead, source)
            inputs = prefix if sequential else self._rows(self.reference, before)
            self.reference.advance(call.name, keep=(call.name, before.name))
            targets = self._rows(self.reference, float_call)
        problem = LayerProblem(
            name=name,
            weight=self.float_model.tensor(f"{name}.weight"),
            bias=layer_bias(self.float_model, float_call),
            forward=_forward_of(call),
            relu=activation_of(float_call)[0],
            inputs=inputs,
            targets=targets,
            grid=grid,
            groups=channel_groups(call),
        )
        return LayerInputs(problem, prefix, quantizer if grid is not None and grid.learnable else None)

    def _rows(self, frontier: Frontier, node: fx.Node) -> RowSource:
        if node.op == "placeholder":
            assert self.inputs is not None
            names = [each.name for each in self.model.inputs()]
            return TensorRows(self.inputs[names.index(node.name)])
        return frontier.samples(node.name)


def _node(traced: TracedModel, name: str) -> fx.Node:
    return next(node for node in traced.graph.nodes if node.name == name)


def _unquantized(value: fx.Node) -> fx.Node:
    """What is read, whatever grid it is put on first."""
    while str(value.target).startswith("compress.fake_quantize"):
        value = value.args[0]
    return value


def _forward_of(call: fx.Node) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    target, rest, kwargs = call.target, call.args[3:], call.kwargs

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return target(x, weight, bias, *rest, **kwargs)

    return forward
