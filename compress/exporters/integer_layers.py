"""What ONNX Runtime multiplies on integers, and the codes it multiplies with: read from the graph it optimised.

Codes come as ``[O, K]``: an output channel a row, in the order in which the kernel walks along it, because kernels
without VNNI add every two neighbours in 16 bits (compress/exporters/saturation.py). ONNX Runtime 1.32's orders, each
held against its kernels by ``tests/exporters/test_saturation.py``:

==============================================  =====================================================================
``QLinearConv``                                 kernel positions outside, the channels of the group inside
``QLinearConv``, depthwise                      the same; every product is added alone, in 32 bits
``ConvInteger``                                 channels outside, kernel positions inside (depthwise too); the weights
                                                stand left, the inputs right
``QLinearMatMul``, ``QGemm``, ``QAttention``,   along the inputs; a constant may stand left, too
``MatMulInteger``, ``MatMulIntegerToFloat``,
``DynamicQuantizeMatMul``,
``DynamicQuantizeLSTM``
==============================================  =====================================================================
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.errors import InputError, one_line
from compress.exporters.fusion import name_before
from compress.exporters.initializers import constant_of
from compress.exporters.session import open_session

__all__ = ["IntegerLayer", "has_signed_inputs", "read_integer_layers"]

# Where the operands of a product stand among a node's inputs, and the zero point of the left one: (left, right, zero).
_PRODUCTS: dict[str, tuple[int, int, int | None]] = {
    "DynamicQuantizeMatMul": (0, 1, None),
    "MatMulInteger": (0, 1, 2),
    "MatMulIntegerToFloat": (0, 1, 4),
    "QAttention": (0, 1, 6),
    "QGemm": (0, 3, 2),
    "QLinearMatMul": (0, 3, 2),
}
# Where a convolution's weights and its inputs' zero point stand.
_CONVOLUTIONS = {"ConvInteger": (1, 2), "QLinearConv": (3, 2)}
# These round float inputs to uint8 as they run.
_ROUNDING = {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
# Operators of other domains than ONNX's own that read bytes and add no products of them up; and MatMulNBits, whose
# kernels are exact at 2, 4 and 8 bits on every instruction set.
_HARMLESS = {
    "DequantizeLinear",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulNBits",
    "NhwcMaxPool",
    "Pad",
    "QEmbedLayerNormalization",
    "QLinearAdd",
    "QLinearAveragePool",
    "QLinearConcat",
    "QLinearGlobalAveragePool",
    "QLinearLeakyRelu",
    "QLinearMul",
    "QLinearReduceMean",
    "QLinearSigmoid",
    "QLinearSoftmax",
    "QLinearWhere",
    "QuantizeLinear",
}
# Operators whose outputs hold no other codes than their first input.
_MOVES = {
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "NhwcMaxPool",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
_BYTES = {ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8"}
_COMPUTED = "its weights are computed as the model runs"


@dataclass(frozen=True)
class IntegerLayer:
    """One product of codes with other codes.

    Attributes:
        name: of the node, as it was before ONNX Runtime optimised the graph.
        operator: what runs it.
        codes: [O, K], uint8 or int8, in the order the kernel adds; None where they are not known before the model runs.
        left, right: "uint8" or "int8": types of the operands as the kernel takes them; "" where they are not known.
        stands: on which side ``codes`` are, "left" or "right".
        reach: the largest magnitude of a code on the other side.
        alone: every product is added alone (depthwise).
        refusal: why the layer cannot be judged; None where it can.
    """

    name: str
    operator: str
    codes: np.ndarray | None = None
    left: str = ""
    right: str = ""
    stands: str = "right"
    reach: int = 255
    alone: bool = False
    refusal: str | None = None

    @property
    def adds_pairs(self) -> bool:
        """Whether kernels without VNNI add two products in 16 bits: those of unsigned with signed codes."""
        return (self.left, self.right) == ("uint8", "int8") and not self.alone


def read_integer_layers(path: Path, *, signed: bool, provider: str = "CPUExecutionProvider") -> list[IntegerLayer]:
    """Every product on integers in the graph that ONNX Runtime makes of the file ``path``; names are distinct.

    Args:
        signed: as on Arm, where signed activations stay as they are; else as on x86.

    Raises:
        InputError: ONNX Runtime cannot load the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, "ORT_ENABLE_ALL", provider=provider, optimized=optimized, signed=signed)
        try:
            graph = ir.load(optimized).graph
            own = {node.name or "" for node in ir.load(path).graph}
        except Exception as error:  # ONNX Runtime reads, and writes, what onnx_ir does not
            raise InputError(f"{path} is damaged ({one_line(error)}); export it again") from error
        layers: dict[str, IntegerLayer] = {}
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for layer in _layers_of(node, own):
                name = layer.name or str(node.outputs[0].name)
                count = sum(known.partition("#")[0] == name for known in layers)
                name += f"#{count}" if name in layers else ""
                # Tensors beside the graph go with the folder.
                codes = None if layer.codes is None else np.array(layer.codes)
                layers[name] = replace(layer, name=name, codes=codes)
        return list(layers.values())


def has_signed_inputs(path: Path) -> bool:
    """Whether the file ``path`` rounds values to signed codes, so that x86 and Arm optimise it differently."""
    model = ir.load(path)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = (node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph))
    return any(node.op_type == "QuantizeLinear" and _type_of(node.outputs[0]) == "int8" for node in nodes)


def _layers_of(node: ir.Node, own: Collection[str]) -> Iterator[IntegerLayer]:
    layer = IntegerLayer(name_before(node.name or "", own), node.op_type)
    if node.op_type in _CONVOLUTIONS:
        yield _convolution(node, layer)
    elif node.op_type in _PRODUCTS:
        yield _product(node, layer)
    elif node.op_type == "DynamicQuantizeLSTM":
        for position, part in ((1, "inputs"), (2, "state")):
            codes = constant_of(node.inputs[position])
            # [directions, K, 4 * hidden] -> [directions * 4 * hidden, K]
            rows = None if codes is None else np.swapaxes(codes, 1, 2).reshape(-1, codes.shape[1])
            name = f"{layer.name}, {part}" if layer.name else ""
            yield _judgeable(replace(layer, name=name, left="uint8", right=_type_of(node.inputs[position])), rows)
    elif node.domain and node.op_type not in _HARMLESS and any(_type_of(value) for value in node.inputs):
        yield replace(layer, refusal=f"what {node.op_type} does with its codes is not known here")


def _convolution(node: ir.Node, layer: IntegerLayer) -> IntegerLayer:
    position, zero = _CONVOLUTIONS[node.op_type]
    codes = constant_of(node.inputs[position])
    inputs, weights = _inputs_type(node, zero), _type_of(node.inputs[position])
    if node.op_type == "ConvInteger":
        rows = None if codes is None else codes.reshape(len(codes), -1)
        reach = 128 if inputs == "int8" else 255
        return _judgeable(replace(layer, left=weights, right=inputs, stands="left", reach=reach), rows)
    # [O, C / groups, *kernel] -> [O, *kernel, C / groups]
    rows = None if codes is None else np.moveaxis(codes, 1, -1).reshape(len(codes), -1)
    layer = replace(layer, left=inputs, right=weights, reach=_reach_of(node, 0, zero, inputs))
    if codes is not None:
        layer = replace(layer, alone=codes.shape[1] == 1 and len(codes) == node.attributes.get_int("group", 1))
    return _judgeable(layer, rows)


def _product(node: ir.Node, layer: IntegerLayer) -> IntegerLayer:
    left, right, zero = _PRODUCTS[node.op_type]
    codes = constant_of(node.inputs[right])
    layer = replace(layer, left=_inputs_type(node, zero), right=_type_of(node.inputs[right]))
    if codes is not None:
        turned = node.op_type == "QGemm" and node.attributes.get_int("transB", 0)
        rows = codes.reshape(1, -1) if codes.ndim == 1 else codes if turned else np.swapaxes(codes, -1, -2)
        reach = 255 if zero is None else _reach_of(node, left, zero, layer.left)
        return _judgeable(replace(layer, reach=reach), rows.reshape(-1, rows.shape[-1]))
    codes = constant_of(node.inputs[left]) if node.op_type not in _ROUNDING else None
    if codes is None:
        return _judgeable(layer, None)
    turned = node.op_type == "QGemm" and node.attributes.get_int("transA", 0)
    rows = np.swapaxes(codes, -1, -2) if turned else codes
    reach = 128 if layer.right == "int8" else 255
    return _judgeable(replace(layer, stands="left", reach=reach), rows.reshape(-1, rows.shape[-1]))


def _judgeable(layer: IntegerLayer, codes: np.ndarray | None) -> IntegerLayer:
    if not layer.left or not layer.right:
        return replace(layer, refusal="the types of its codes are not known")
    if codes is None and "int8" in (layer.left, layer.right):  # unsigned codes are exact, whatever they are
        return replace(layer, refusal=_COMPUTED)
    return replace(layer, codes=codes)


def _inputs_type(node: ir.Node, zero: int | None) -> str:
    """Type of a node's first input: its zero point's, or whatever made the input says."""
    if node.op_type in _ROUNDING:
        return "uint8"
    return (_type_of(node.inputs[zero]) if zero is not None and zero < len(node.inputs) else "") or _type_of(
        node.inputs[0]
    )


def _type_of(value: ir.Value | None) -> str:
    """ "uint8" or "int8"; "" for other types, and where it is not known: an optimised graph declares few."""
    if value is None:
        return ""
    if value.dtype is not None:
        return _BYTES.get(value.dtype, "")
    maker = value.producer()
    if maker is None:
        return ""
    if maker.op_type == "DynamicQuantizeLinear":
        return "uint8" if value is not maker.outputs[1] else ""
    if maker.op_type == "QuantizeLinear":
        if len(maker.inputs) > 2 and maker.inputs[2] is not None:
            return _type_of(maker.inputs[2])
        return _BYTES.get(ir.DataType(maker.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8), "")
    if maker.op_type == "Cast":
        return _BYTES.get(ir.DataType(maker.attributes.get_int("to", 0)), "")
    if maker.op_type in _MOVES | {"Clip", "Concat", "Pad"}:
        return _type_of(maker.inputs[0])
    if maker.op_type in ("QLinearConv", "QLinearMatMul"):
        return _type_of(maker.inputs[7])
    if maker.op_type.startswith("QLinear") and maker.op_type != "QLinearWhere":
        return next((kind for each in maker.inputs if (kind := _type_of(each))), "")
    return ""


def _reach_of(node: ir.Node, position: int, zero: int, kind: str) -> int:
    """The largest magnitude of a code of an input, zero point (which pads) included."""
    if kind == "int8":
        return 128
    point = constant_of(node.inputs[zero]) if zero < len(node.inputs) else np.zeros(1)
    return 255 if point is None else max(_highest(node.inputs[position]), int(np.max(point)))


def _highest(value: ir.Value | None) -> int:
    """The highest unsigned code that ``value`` may hold: below 255 behind a Clip of codes."""
    maker = value.producer() if value is not None else None
    if maker is None:
        return 255
    if maker.op_type == "Clip":
        limit = constant_of(maker.inputs[2]) if len(maker.inputs) > 2 else None
        return 255 if limit is None else min(int(limit), _highest(maker.inputs[0]))
    if maker.op_type == "Concat":
        return max(map(_highest, maker.inputs))
    return _highest(maker.inputs[0]) if maker.op_type in _MOVES else 255
