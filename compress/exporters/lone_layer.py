"""One layer of a file, as a model of its own.

Run on what the PyTorch graph feeds the layer, it shows what the layer's kernel does by itself: nothing is inherited
from layers before it. Of a layer that runs on integers or packed weights the model is the very node of the graph that
ONNX Runtime optimised. Into float ones the optimiser puts what stands around them (padding, BatchNorm, activations,
residuals, scales); of these it is the file's own node, which ONNX Runtime then optimises by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from compress.exporters.blocks import ACCURACY_LEVEL
from compress.exporters.fusion import LAYER_OPERATORS, OptimizedGraph
from compress.exporters.session import open_session

__all__ = ["Grid", "LoneLayer", "lone_layers"]

# Where codes come in: positions of their scale and zero point. And where they go out.
_READS = {"QLinearConv": (1, 2), "QGemm": (1, 2), "QLinearMatMul": (1, 2), "MatMulIntegerToFloat": (2, 4)}
_WRITES = {"QLinearConv": (6, 7), "QGemm": (7, 8), "QLinearMatMul": (6, 7)}
_WEIGHT = dict.fromkeys(("QLinearConv", "QGemm", "QLinearMatMul"), 3)  # 1 of others
_BIAS = {"Conv": 2, "Gemm": 2, "QLinearConv": 8, "QGemm": 6}
_BIAS |= {"MatMulIntegerToFloat": 6, "DynamicQuantizeMatMul": 4, "MatMulNBits": 5}
_ALONE = {*_WEIGHT, "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}  # as the optimiser made them
_CONVOLUTIONS = ("Conv", "QLinearConv")
_FLAT = ("Gemm", "QGemm")
_IN, _OUT = "lone_input", "lone_output"
_IN_SCALE, _IN_ZERO_POINT = "lone_input_scale", "lone_input_zero_point"


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of codes, of numpy's ``dtype``: uint8 or int8."""

    scale: float
    zero_point: int
    dtype: np.dtype

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return int(np.iinfo(self.dtype).min)

    def codes(self, x: Tensor) -> Tensor:
        """``x`` as codes, in float32."""
        lowest = self.lowest
        return (torch.round(x / self.scale) + self.zero_point).clamp_(lowest, lowest + 255)

    def values(self, codes: Tensor) -> Tensor:
        """What ``codes`` stand for, in float32."""
        return (codes.float() - self.zero_point) * self.scale


@dataclass(frozen=True, eq=False)
class LoneLayer:
    """A layer's node with its weights and what they are computed from.

    Attributes:
        operator: what ONNX Runtime runs.
        channels_last, flat: how its input lies: channels behind; all rows in one dimension.
        level: of optimisation, as ONNX Runtime spells it.
        reads: the grid of the codes that it reads; None for floats, and for a grid measured as the model runs.
        measured: whether it reads codes whose grid is measured as the model runs.
        writes: the grid of the codes that it writes; None for floats.
        biased: whether the layer's bias is inside.
        block: weights in a block whose input the kernel rounds to int8; None for others.
    """

    operator: str
    reads: Grid | None
    measured: bool
    writes: Grid | None
    biased: bool
    block: int | None
    channels_last: bool
    flat: bool
    level: str
    provider: str
    model: onnx.ModelProto = field(repr=False)

    def open(self, padding: Sequence[int] | None = None) -> ort.InferenceSession:
        """A session that runs the layer; on one thread, as there is one for each layer of a model.

        Args:
            padding: of a convolution in PyTorch, a number for each axis or one for all: what is padded before it may
                have been put into its node, and is in its input already.
        """
        convolution = next((node for node in self.model.graph.node if node.op_type in _CONVOLUTIONS), None)
        if convolution is not None and padding is not None:
            pads = next((each for each in convolution.attribute if each.name == "pads"), None)
            if pads is not None:
                ends = list(padding) * (len(pads.ints) // (2 * len(padding)))
                pads.ints[:] = [*ends, *ends]
        return open_session(self.model.SerializeToString(), self.level, threads=1, provider=self.provider)

    def run(self, session: ort.InferenceSession, x: Tensor, grid: Grid | None, shape: torch.Size) -> Tensor | None:
        """The layer's output [``shape``], in codes where it writes any; None where it has another shape.

        Args:
            session: of :meth:`open`.
            x: the layer's input as PyTorch's layer takes it; in codes (of any dtype) where the node reads codes.
            grid: of those codes, where it is measured as the model runs.
        """
        if self.flat:
            x = x.reshape(-1, x.shape[-1])
        if self.channels_last:
            x = x.movedim(1, -1)
        array = np.ascontiguousarray(x.numpy())
        known = self.reads if self.reads is not None else grid
        feeds = {_IN: array if known is None else array.astype(known.dtype)}
        if self.measured:
            assert grid is not None
            feeds |= {
                _IN_SCALE: np.array(grid.scale, np.float32),
                _IN_ZERO_POINT: np.array(grid.zero_point, grid.dtype),
            }
        (result,) = session.run(None, feeds)
        found = torch.from_numpy(result)
        found = found.movedim(-1, 1) if self.channels_last else found
        return found.reshape(shape) if found.numel() == shape.numel() else None


def lone_layers(path: Path, optimized: OptimizedGraph, provider: str) -> dict[str, LoneLayer]:
    """Every node of the file ``path`` that multiplies with weights, by its name.

    Args:
        optimized: what ONNX Runtime made of ``path``.
    """
    made, written = _Source(optimized.model), _Source(onnx.load(path))
    own = {node.name: node for node in written.model.graph.node}
    found = {}
    for node, name in optimized.nodes:
        if node.op_type not in LAYER_OPERATORS:
            continue
        if node.op_type in _ALONE:
            lone = _lone(made, node, node.op_type, "ORT_DISABLE_ALL", provider)
        elif name in own and own[name].op_type in ("Conv", "Gemm", "MatMul"):
            lone = _lone(written, own[name], node.op_type, "ORT_ENABLE_ALL", provider)
        else:
            lone = None
        if lone is not None:
            found[name] = lone
    return found


class _Source:
    """A graph by its values: tensors, and the nodes that make and read them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.tensors = {each.name: each for each in model.graph.initializer}
        self.makers = {value: node for node in model.graph.node for value in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)

    def behind(self, value: str) -> list[onnx.NodeProto] | None:
        """The nodes that compute ``value`` from tensors alone, in order; None where it depends on an input."""
        if not value or value in self.tensors:
            return []
        maker = self.makers.get(value)
        if maker is None:
            return None
        found: list[onnx.NodeProto] = []
        for each in maker.input:
            before = self.behind(each)
            if before is None:
                return None
            found += [node for node in before if node not in found]
        return [*found, maker]

    def grid(self, node: onnx.NodeProto, places: tuple[int, int] | None) -> Grid | None:
        """The grid that ``node`` has at ``places``; None where there is none, or it is computed."""
        if places is None or len(node.input) <= max(places) or node.input[places[0]] not in self.tensors:
            return None
        scale, zero_point = (numpy_helper.to_array(self.tensors[node.input[place]]) for place in places)
        return Grid(float(scale.reshape(-1)[0]), int(zero_point.reshape(-1)[0]), zero_point.dtype)

    def bias_behind(self, product: onnx.NodeProto) -> str | None:
        """What alone is added to ``product``: a linear on more than two dimensions has its bias there."""
        readers = self.readers.get(product.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add":
            return None
        other = next((value for value in readers[0].input if value != product.output[0]), "")
        return other if other in self.tensors and len(self.tensors[other].dims) == 1 else None


def _lone(source: _Source, node: onnx.NodeProto, operator: str, level: str, provider: str) -> LoneLayer | None:
    """None for a product of two computed values, and where only a computed grid is written to."""
    own = onnx.NodeProto()
    own.CopyFrom(node)
    kind = own.op_type
    attributes = {each.name: helper.get_attribute_value(each) for each in own.attribute}
    reads = source.grid(own, _READS.get(kind))
    measured = kind in _READS and reads is None
    element = _element_type(reads.dtype) if reads else TensorProto.UINT8 if measured else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(_IN, element, None)]
    own.input[0], own.output[0] = _IN, _OUT
    if measured:
        for place, name, each in zip(
            _READS[kind], (_IN_SCALE, _IN_ZERO_POINT), (TensorProto.FLOAT, element), strict=True
        ):
            own.input[place] = name
            inputs.append(helper.make_tensor_value_info(name, each, []))
    given = {each.name for each in inputs}
    nodes: list[onnx.NodeProto] = []
    for value in own.input:
        before = [] if value in given else source.behind(value)
        if before is None:
            return None
        nodes += [each for each in before if each not in nodes]
    nodes.append(own)
    place = _BIAS.get(kind)
    biased = place is not None and len(own.input) > place and bool(own.input[place])
    if kind == "MatMul" and (bias := source.bias_behind(node)) is not None:
        own.output[0], biased = "lone_product", True
        nodes.append(helper.make_node("Add", ["lone_product", bias], [_OUT]))
    used = {value for each in nodes for value in each.input}
    writes = source.grid(own, _WRITES.get(kind))
    output = helper.make_tensor_value_info(_OUT, _element_type(writes.dtype) if writes else TensorProto.FLOAT, None)
    tensors = [source.tensors[name] for name in sorted(used) if name in source.tensors]
    graph = helper.make_graph(nodes, "lone", inputs, [output], tensors)
    model = helper.make_model(
        graph,
        opset_imports=source.model.opset_import,
        functions=source.model.functions,
        ir_version=source.model.ir_version,
    )
    rounds = kind == "MatMulNBits" and attributes.get("accuracy_level") == ACCURACY_LEVEL
    return LoneLayer(
        operator=operator,
        reads=reads,
        measured=measured,
        writes=writes,
        biased=biased,
        block=attributes["block_size"] if rounds else None,
        channels_last=kind == "QLinearConv" and bool(attributes.get("channels_last")),
        flat=kind in _FLAT,
        level=level,
        provider=provider,
        model=model,
    )


def _element_type(dtype: np.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(dtype)
