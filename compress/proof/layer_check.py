"""Each layer alone: what ONNX Runtime's kernel makes of the very input that the PyTorch graph feeds the layer.

The PyTorch graph is walked once; at every layer the node that ONNX Runtime's optimiser made of it runs by itself
(compress/exporters/lone_layer.py) on the layer's own input, as codes where the kernel reads codes. Whatever differs is
then the layer's doing. Differences are counted in steps: of the grid of the layer's output, or where that is float of
the 8-bit grid that its range would have. A sound integer kernel is off by one step where a sum lies between two codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, fx

from compress.calib.block_rounding import round_blocks
from compress.exporters.lone_layer import Grid, LoneLayer
from compress.graph.layers import LAYER_KINDS, activation_of, layer_name
from compress.graph.traced import TracedModel, first_output
from compress.kernels.dynamic import dynamic_grid
from compress.records.report import LayerCheck

__all__ = ["check_layers", "guilty_layers", "innocent_layers", "unseen_layers"]

# Rounding explains one step. No sound kernel was further off: integers that end as codes by one step at most, those
# that end as floats by 1e-4; kernels that saturate began at three.
_ALLOWED_STEPS = 1.5
_ONE_STEP = 1.001  # of differences computed in float32
_TOP = 255
_NAMED = 3


def check_layers(
    traced: TracedModel, lone: Mapping[str, LoneLayer], batches: Iterable[tuple[Tensor, ...]]
) -> tuple[LayerCheck, ...]:
    """Every layer of ``traced`` that is in ``lone``, in order, at its worst over ``batches`` (inputs [N, ...])."""
    sessions = dict[str, ort.InferenceSession]()
    found: dict[str, LayerCheck] = {}
    for batch in batches:
        walk = _Walk(traced, lone, sessions)
        with torch.no_grad():
            walk.run(*batch)
        for row in walk.rows:
            found[row.name] = _worse(found[row.name], row) if row.name in found else row
    return tuple(found.values())


def guilty_layers(layers: Sequence[LayerCheck]) -> str | None:
    """A sentence about the layers that are further off than rounding explains, the worst first; None without one."""
    guilty = sorted((row for row in layers if not row.steps <= row.allowed_steps), key=_excess, reverse=True)
    if not guilty:
        return None
    told = "; ".join(
        f"layer {row.name} ({row.operator}): {row.steps:.3g} steps of its output's grid (rounding explains "
        f"{row.allowed_steps:.2g}), {row.beyond_one_step:,} of {row.values:,} values off by more than one, "
        f"relative L2 {row.relative_l2:.2%}"
        for row in guilty[:_NAMED]
    )
    more = f"; and {len(guilty) - _NAMED} more layers" if len(guilty) > _NAMED else ""
    return f"run alone on PyTorch's own inputs, ONNX Runtime's kernel is off at {told}{more}"


def unseen_layers(layers: Sequence[LayerCheck], names: Iterable[str]) -> str | None:
    """A sentence about those of ``names`` that no row is about; None without one."""
    seen = {row.name.partition("#")[0] for row in layers}
    unseen = [name for name in names if name not in seen]
    if not unseen:
        return None
    more = f" and {len(unseen) - _NAMED} more" if len(unseen) > _NAMED else ""
    return f"of {', '.join(unseen[:_NAMED])}{more} ONNX Runtime has no node that can be looked at alone"


def innocent_layers(layers: Sequence[LayerCheck]) -> str:
    """A sentence for a file that is off although no layer of it is."""
    if not layers:
        return "no layer's kernel could be run alone"
    worst = max(layers, key=_excess)
    return (
        f"no layer is at fault by itself: run alone on PyTorch's own inputs, the furthest off, {worst.name} "
        f"({worst.operator}), is at {worst.steps:.2g} steps of its output's grid; the difference arises between layers"
    )


class _Walk(fx.Interpreter):
    """Runs a graph, and every layer's node in ONNX Runtime beside it."""

    def __init__(
        self, traced: TracedModel, lone: Mapping[str, LoneLayer], sessions: dict[str, ort.InferenceSession]
    ) -> None:
        super().__init__(traced.module)
        self._traced, self._lone, self._sessions = traced, lone, sessions
        self._calls: dict[str, int] = {}
        self._before: dict[fx.Node, Tensor] = {}  # what goes into a grid that is measured as the model runs
        self.rows: list[LayerCheck] = []

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        if n.target is torch.ops.compress.fake_quantize_dynamic.default:
            self._before[n] = args[0]
        if n.op == "call_function" and n.target in LAYER_KINDS:
            name = layer_name(n)
            calls = self._calls.get(name, 0)
            self._calls[name] = calls + 1
            name += f"#{calls}" if calls else ""
            if name in self._lone and (row := self._compare(n, name, args, first_output(value))) is not None:
                self.rows.append(row)
        return value

    def _compare(self, call: fx.Node, name: str, args: tuple[Any, ...], y: Tensor) -> LayerCheck | None:
        layer = self._lone[name]
        if name not in self._sessions:
            padded = call.target is not torch.ops.aten.linear.default
            self._sessions[name] = layer.open((args[4] if len(args) > 4 else [0]) if padded else None)
        x, grid = self._input(call, layer, args[0])
        got = layer.run(self._sessions[name], x, grid, y.shape)
        if got is None:
            return None
        room = 0.0
        if layer.writes is not None:
            wanted, high = self._written(call, layer.writes, y)
            got, step = layer.writes.values(got.clamp(max=high)), layer.writes.scale
        else:
            wanted = self._biased(call, args, y) if layer.biased else y - _bias(call, args)
            step = _step(wanted, args[0], args[1])
            if layer.block is not None:
                rounded = call.target(round_blocks(args[0], layer.block), *args[1:])
                # Not every processor's kernel rounds the same blocks.
                room = 2 * float((rounded - y).abs().max()) / step
        difference = (got - wanted).nan_to_num_(nan=torch.inf)
        far = torch.linalg.vector_norm(difference, dtype=torch.float64)
        size = torch.linalg.vector_norm(wanted, dtype=torch.float64).clamp(min=1e-30)
        steps = difference.abs_().div_(step)
        return LayerCheck(
            name=name,
            operator=layer.operator,
            relative_l2=float(far / size),
            steps=float(steps.max()),
            allowed_steps=_ALLOWED_STEPS + room,
            beyond_one_step=int((steps > _ONE_STEP).sum()),
            values=steps.numel(),
        )

    def _input(self, call: fx.Node, layer: LoneLayer, x: Tensor) -> tuple[Tensor, Grid | None]:
        """What the layer's node reads, in codes where it reads codes; and their grid."""
        source = call.args[0]
        assert isinstance(source, fx.Node)
        before = self._before.get(source)
        if layer.measured:
            assert before is not None, f"{layer.operator} of {call} reads a measured grid, the graph none"
            scale, zero_point = dynamic_grid(before)
            grid = Grid(float(scale), int(zero_point), torch.zeros((), dtype=torch.uint8).numpy().dtype)
            return grid.codes(before), grid
        if layer.reads is None:
            return (x if before is None else before), None
        # PyTorch's codes, on its own grid: the file's may be wrong.
        while source.target is not torch.ops.compress.fake_quantize.default and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.target is not torch.ops.compress.fake_quantize.default:
            return layer.reads.codes(x), None
        return self._grid(source).codes(x), None

    def _written(self, call: fx.Node, writes: Grid, y: Tensor) -> tuple[Tensor, int]:
        """The layer's output on the grid that follows in the graph, and the largest code of that."""
        _, last = activation_of(call)
        for node in (call, last):
            grids = [user for user in node.users if user.target is torch.ops.compress.fake_quantize.default]
            if grids:
                y = y if node is call else node.target(y, *node.args[1:])
                widest = max(grids, key=lambda each: each.args[3])
                scale, zero_point = (self._traced.tensor(str(each.target)) for each in widest.args[1:3])
                return widest.target(y, scale, zero_point, widest.args[3]), writes.lowest + (1 << widest.args[3]) - 1
        return writes.values(writes.codes(y)), writes.lowest + _TOP

    def _biased(self, call: fx.Node, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """``y`` with a bias: what is added to a linear that has none is one in the file."""
        if len(args) > 2 and args[2] is not None:
            return y
        added = [user for user in call.users if user.target is torch.ops.aten.add.Tensor]
        others = [each for user in added for each in user.all_input_nodes if each.op == "get_attr"]
        return y + self._traced.tensor(str(others[0].target)) if len(others) == 1 else y

    def _grid(self, quantizer: fx.Node) -> Grid:
        scale, zero_point = (self._traced.tensor(str(each.target)) for each in quantizer.args[1:3])
        return Grid(float(scale), int(zero_point), zero_point.numpy().dtype)


def _bias(call: fx.Node, args: tuple[Any, ...]) -> Tensor | float:
    """Of a layer, along its channels; the file may have it elsewhere, or none where it is zero."""
    if len(args) < 3 or args[2] is None:
        return 0.0
    places = 0 if call.target is torch.ops.aten.linear.default else args[0].dim() - 2
    return args[2].reshape(-1, *[1] * places)


def _step(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Of the 8-bit grid of the range of ``y``, or of that of a single product where the sums are smaller."""
    ranges = [float(each.amax().clamp(min=0) - each.amin().clamp(max=0)) for each in (y, x)]
    return max(ranges[0], ranges[1] * float(weight.abs().max()), 1e-30) / _TOP


def _worse(one: LayerCheck, other: LayerCheck) -> LayerCheck:
    worst = max(one, other, key=_excess)
    return worst.model_copy(
        update={
            "beyond_one_step": one.beyond_one_step + other.beyond_one_step,
            "values": one.values + other.values,
        }
    )


def _excess(row: LayerCheck) -> float:
    return row.steps / row.allowed_steps
