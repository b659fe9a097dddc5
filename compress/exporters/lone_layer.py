"""One layer of the graph ONNX Runtime optimised, as a model of its own.

Run on what the PyTorch graph feeds the layer, it shows what the layer's kernel does by itself: nothing is inherited
from layers before it. Whatever the optimiser put into the layer's node besides (an activation, a residual, a scale
behind it, a transpose before it) is taken out again; the layout of its values is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from compress.exporters.fusion import LAYER_OPERATORS, OptimizedGraph
from compress.exporters.session import open_session

__all__ = ["Grid", "LoneLayer", "lone_layers"]

_NCHWC = "com.microsoft.nchwc"
# Where codes come in: positions of their scale and zero point. And where they go out.
_READS = {"QLinearConv": (1, 2), "QGemm": (1, 2), "QLinearMatMul": (1, 2), "MatMulIntegerToFloat": (2, 4)}
_WRITES = {"QLinearConv": (6, 7), "QGemm": (7, 8), "QLinearMatMul": (6, 7)}
_BIAS = {"Conv": 2, "FusedConv": 2, "Gemm": 2, "FusedGemm": 2, "QLinearConv": 8, "QGemm": 6}
_BIAS |= {"MatMulIntegerToFloat": 6, "DynamicQuantizeMatMul": 4, "MatMulNBits": 5}
_FLAT = ("Gemm", "FusedGemm", "QGemm")
_CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv")
_ABSORBED = {"activation", "activation_params", "alpha", "transA", "transBatchA"}  # of fused float operators
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
    """A layer's node with its weights.

    Attributes:
        operator: what ONNX Runtime runs.
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
    provider: str
    model: onnx.ModelProto = field(repr=False)

    def open(self) -> ort.InferenceSession:
        """A session that runs the node as it is; on one thread, as there is one for each layer of a model."""
        return open_session(self.model.SerializeToString(), "ORT_DISABLE_ALL", threads=1, provider=self.provider)

    def run(self, session: ort.InferenceSession, x: Tensor, grid: Grid | None, shape: torch.Size) -> Tensor:
        """The layer's output [``shape``], in codes where it writes any.

        Args:
            session: of :meth:`open`.
            x: the layer's input as PyTorch's layer takes it; in codes (of any dtype) where the node reads codes.
            grid: of those codes, where it is measured as the model runs.
        """
        if self.operator in _FLAT:
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
        if self.channels_last:
            found = found.movedim(-1, 1)
        if self.operator in _CONVOLUTIONS:
            found = found[:, : shape[1]]  # the blocked layout fills channels up
        return found.reshape(shape)


def lone_layers(graph: OptimizedGraph, provider: str) -> dict[str, LoneLayer]:
    """Every node of ``graph`` that multiplies with weights, by the name that it has there."""
    tensors = {each.name: each for each in graph.model.graph.initializer}
    makers = {value: node for node, _ in graph.nodes for value in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node, _ in graph.nodes:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    return {
        name: _lone(node, tensors, makers, readers.get(node.output[0], []), graph.model, provider)
        for node, name in graph.nodes
        if node.op_type in LAYER_OPERATORS and any(value in tensors for value in node.input[1:4])
        # Integers that end as sums are not comparable by themselves, and nothing here asks for them.
        if node.op_type != "MatMulInteger"
    }


def _lone(
    node: onnx.NodeProto,
    tensors: Mapping[str, TensorProto],
    makers: Mapping[str, onnx.NodeProto],
    readers: list[onnx.NodeProto],
    model: onnx.ModelProto,
    provider: str,
) -> LoneLayer:
    own = onnx.NodeProto()
    own.CopyFrom(node)
    operator, places = own.op_type, _READS.get(own.op_type)
    attributes = {each.name: helper.get_attribute_value(each) for each in own.attribute}
    reads = _grid(own, tensors, places)
    measured = places is not None and reads is None
    kind = _element_type(reads.dtype) if reads else TensorProto.UINT8 if measured else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(_IN, kind, None)]
    blocked = own.domain == _NCHWC
    was = own.input[0]
    own.input[0], own.output[0] = _IN, _OUT
    if measured:
        assert places is not None
        for place, name, element in zip(places, (_IN_SCALE, _IN_ZERO_POINT), (TensorProto.FLOAT, kind), strict=True):
            own.input[place] = name
            inputs.append(helper.make_tensor_value_info(name, element, []))
    if operator in _CONVOLUTIONS and operator != "QLinearConv":
        del own.input[3:]  # a residual that is added as the kernel writes
    if operator.startswith("Fused") or blocked:
        kept = [each for each in own.attribute if each.name not in _ABSORBED or operator == "FusedGemm"]
        kept = [each for each in kept if not each.name.startswith("activation")]
        del own.attribute[:]
        own.attribute.extend(kept)
    nodes = [own]
    place = _BIAS.get(operator)
    biased = place is not None and len(own.input) > place and bool(own.input[place])
    if operator in ("MatMul", "FusedMatMul") and (bias := _bias_behind(node, readers, tensors)) is not None:
        own.output[0] = "product"
        nodes.append(helper.make_node("Add", ["product", bias], [_OUT]))
        biased = True
    if blocked:
        nodes = _unblocked(own, tensors, makers.get(was))
    used = {value for each in nodes for value in each.input}
    writes = _grid(own, tensors, _WRITES.get(operator))
    output = helper.make_tensor_value_info(_OUT, _element_type(writes.dtype) if writes else TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "lone", inputs, [output], [tensors[name] for name in used if name in tensors])
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    level = attributes.get("accuracy_level") if operator == "MatMulNBits" else None
    return LoneLayer(
        operator=operator,
        reads=reads,
        measured=measured,
        writes=writes,
        biased=biased,
        block=attributes["block_size"] if level == 4 else None,
        channels_last=operator == "QLinearConv" and bool(attributes.get("channels_last")),
        provider=provider,
        model=alone,
    )


def _grid(node: onnx.NodeProto, tensors: Mapping[str, TensorProto], places: tuple[int, int] | None) -> Grid | None:
    if places is None or len(node.input) <= max(places) or node.input[places[0]] not in tensors:
        return None
    scale, zero_point = (numpy_helper.to_array(tensors[node.input[place]]) for place in places)
    return Grid(float(scale.reshape(-1)[0]), int(zero_point.reshape(-1)[0]), zero_point.dtype)


def _bias_behind(
    product: onnx.NodeProto, readers: list[onnx.NodeProto], tensors: Mapping[str, TensorProto]
) -> str | None:
    """The bias in an Add that alone reads ``product``: a linear on more than two dimensions has it there."""
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    other = next((value for value in readers[0].input if value != product.output[0]), "")
    weight = tensors[product.input[1]]
    fits = other in tensors and list(tensors[other].dims) in ([weight.dims[0]], [weight.dims[-1]])
    return other if fits else None


def _unblocked(
    convolution: onnx.NodeProto, tensors: Mapping[str, TensorProto], maker: onnx.NodeProto | None
) -> list[onnx.NodeProto]:
    """``convolution`` in the blocked layout, between the two operators that lead there and back."""
    blocked_before = maker is not None and maker.domain == _NCHWC and maker.op_type != "ReorderOutput"
    nodes = [convolution]
    if blocked_before:
        convolution.input[0] = "blocked"
        nodes.insert(0, helper.make_node("ReorderInput", [_IN], ["blocked"], domain=_NCHWC))
    convolution.output[0] = "blocked_output"
    channels = tensors[convolution.input[1]].dims[0]
    nodes.append(helper.make_node("ReorderOutput", ["blocked_output"], [_OUT], domain=_NCHWC, channels=channels))
    return nodes


def _element_type(dtype: np.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(dtype)
