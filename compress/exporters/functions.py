"""ONNX functions that unpack weight codes and spread the grids of groups: standard operators only, one node a layer.

ONNX Runtime inlines model-local functions when it loads a file and folds whatever depends on initialisers alone, before
it looks for quantized patterns: the packed codes become a plain int8 initialiser, and the layer runs on the kernels an
int8 file would use. The layout is compress.quant.packing's.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from compress.quant.packing import planes

__all__ = [
    "DOMAIN",
    "OPSET",
    "SPREAD",
    "declare_schema",
    "declare_spread",
    "function_bytes",
    "spread_function",
    "unpack_function",
    "unpack_name",
]

DOMAIN = "compress"
OPSET = 18  # BitwiseAnd and BitwiseOr
SPREAD = "Spread"


def unpack_name(bits: int) -> str:
    """Name of the function that unpacks ``bits``-wide codes."""
    return f"Unpack{bits}"


def declare_schema(bits: int) -> None:
    """Make the function known to ONNX's schema registry, without which onnxscript builds no call to it."""
    _declare(unpack_name(bits), {"packed": "uint8", "shape": "int64"}, {"codes": "int8"})


def declare_spread() -> None:
    """The same for the function that spreads grids."""
    _declare(SPREAD, {"grid": "T", "sizes": "int64", "row": "int64", "shape": "int64"}, {"spread": "T"})


def _declare(name: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
    if onnx.defs.has(name, DOMAIN):
        return
    given, made = (
        [onnx.defs.OpSchema.FormalParameter(each, kind if kind == "T" else f"tensor({kind})") for each, kind in part]
        for part in (inputs.items(), outputs.items())
    )
    either = [("T", ["tensor(float)", "tensor(uint8)"], "scales or zero points")] if "T" in inputs.values() else []
    onnx.defs.register_schema(onnx.defs.OpSchema(name, DOMAIN, 1, inputs=given, outputs=made, type_constraints=either))


def unpack_function(bits: int) -> ir.Function:
    """``codes int8 [shape] = Unpack<bits>(packed uint8 [bits, columns], shape int64 [rank])``, less 2**(bits-1)."""
    body = _Body()
    packed, shape = body.input("packed"), body.input("shape")
    codes = None
    row = 0
    for width, offset in planes(bits):
        rows = packed
        if width != bits:
            rows = body.add("Slice", packed, body.ints([row]), body.ints([row + width]), body.ints([0]))
        row += width
        run = body.add("Reshape", rows, body.ints([-1, 1]))
        shifts = body.constant(np.arange(0, 8, width, dtype=np.uint8))
        part = body.add("BitShift", run, shifts, direction="RIGHT")
        part = body.add("BitwiseAnd", part, body.constant(np.array((1 << width) - 1, dtype=np.uint8)))
        part = body.add("Reshape", part, body.ints([-1]))
        if offset:
            part = body.add("BitShift", part, body.constant(np.array(offset, dtype=np.uint8)), direction="LEFT")
        codes = part if codes is None else body.add("BitwiseOr", codes, part)
    assert codes is not None
    count = body.add("Reshape", body.add("ReduceProd", shape), body.ints([1]))
    codes = body.add("Slice", codes, body.ints([0]), count)
    wide = body.add("Cast", codes, to=int(ir.DataType.INT32))
    centred = body.add("Sub", wide, body.constant(np.array(1 << (bits - 1), dtype=np.int32)))
    narrow = body.add("Cast", centred, to=int(ir.DataType.INT8))
    return body.function(unpack_name(bits), body.add("Reshape", narrow, shape))


def spread_function() -> ir.Function:
    """``T [shape] = Spread(grid T [O, groups], sizes (O, groups, group size), row, shape)``: a number a weight.

    As ordinary nodes the exporter would fold it into a number a weight in the file.
    """
    body = _Body()
    grid, sizes, row, shape = (body.input(name) for name in ("grid", "sizes", "row", "shape"))
    wide = body.add("Expand", body.add("Unsqueeze", grid, body.ints([2])), sizes)
    rows = body.add("Slice", body.add("Reshape", wide, body.ints([0, -1])), body.ints([0]), row, body.ints([1]))
    return body.function(SPREAD, body.add("Reshape", rows, shape))


def function_bytes(bits: int) -> int:
    """Bytes that the function takes in a file that has layers of this width."""
    return int(ir.serde.serialize_function(unpack_function(bits)).ByteSize())


class _Body:
    """A function body under construction; values are numbered as they come."""

    def __init__(self) -> None:
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []

    def input(self, name: str) -> ir.Value:
        self._inputs.append(ir.Value(name=name))
        return self._inputs[-1]

    def add(self, operator: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        values = [
            ir.AttrInt64(key, value) if isinstance(value, int) else ir.AttrString(key, value)
            for key, value in attributes.items()
        ]
        node = ir.Node("", operator, inputs, values)
        return self._append(node)

    def constant(self, array: np.ndarray) -> ir.Value:
        return self._append(ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))]))

    def ints(self, values: list[int]) -> ir.Value:
        return self.constant(np.array(values, dtype=np.int64))

    def function(self, name: str, output: ir.Value) -> ir.Function:
        graph = ir.Graph(self._inputs, [output], nodes=self._nodes, opset_imports={"": OPSET})
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])

    def _append(self, node: ir.Node) -> ir.Value:
        node.outputs[0].name = f"v{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]
