"""Passes over the exporter's ONNX graph: names a person knows, no dead weight, patterns the runtime fuses.

1. Codes of 8 bits become a plain int8 initialiser: there is nothing to unpack.
2. ``DequantizeLinear -> Pad(0) -> QuantizeLinear`` on one grid, with slices and reshapes between, becomes a Pad of the
   codes: ONNX Runtime would leave it float.
3. A linear on more than two dimensions, ``DequantizeLinear -> Transpose -> MatMul``, gets its codes transposed instead,
   so that the MatMul reads the DequantizeLinear directly.
4. A float layer behind a DequantizeLinear reads one of its own, with the grid repeated for every channel: behind a
   scalar grid ONNX Runtime would quantize the layer's weights by itself.
5. A mean over all positions becomes a GlobalAveragePool, which has an integer kernel.
6. Products with a weight that stays packed become MatMulNBits (compress/exporters/blocks.py), those of integers that
   end in floats MatMulIntegerToFloat (compress/exporters/products.py).
7. A table of int8 codes is looked up before it is dequantized (compress/exporters/lookups.py).
8. Every call of an integer layer reads a zero point of its own, and 8-bit codes of its own, too: ONNX Runtime's option
   ``session.x64quantprecision`` replaces both, under names that it makes of the old ones.
9. Layer nodes are named after their layer (``#1``, ``#2`` ... for further calls of a shared one), values after what
   they are; the exporter's traces go.
"""

from __future__ import annotations

import ast

import numpy as np
import onnx_ir as ir

from compress.exporters.blocks import use_matmul_nbits
from compress.exporters.functions import DOMAIN, OPSET, SPREAD, spread_function, unpack_function
from compress.exporters.initializers import constant_of, initialise
from compress.exporters.lookups import look_up_codes
from compress.exporters.products import use_integer_products

__all__ = ["LAYER_SCOPE", "layer_of", "tidy"]

LAYER_SCOPE = "compress.layer"

_LAYER_NODES = ("Conv", "Gemm", "MatMul", "MatMulNBits", "MatMulIntegerToFloat")
_QUANTIZED_UNASKED = ("Conv", "ConvTranspose", "Gemm")
_UNPACKING = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Sub", "Mul", "Identity")
_MOVES = ("Slice", "Pad", "Reshape", "Transpose", "Flatten")
_IR_VERSION = 8  # the first that has model-local functions


def tidy(model: ir.Model) -> None:
    """Apply all passes in place; calls of layers stand in a scope of class ``LAYER_SCOPE``, which has their name."""
    graph = model.graph
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "Unpack8":
            _store_plainly(graph, node)
    for node in list(graph):
        if node.graph is None:
            continue  # went with an earlier one
        if node.op_type == "Pad":
            _pad_codes(graph, node)
        elif node.op_type == "Transpose":
            _transpose_codes(graph, node)
        elif node.op_type == "ReduceMean":
            _pool_globally(graph, node)
        elif node.op_type in _QUANTIZED_UNASKED:
            _keep_float(graph, node)
    look_up_codes(graph)
    use_matmul_nbits(model)
    use_integer_products(model)
    _separate_calls(graph)
    _share_constants(graph)
    _remove_unread(graph)
    _name(graph)
    used = {node.op_type for node in graph if node.domain == DOMAIN}
    for name in sorted(used):
        function = spread_function() if name == SPREAD else unpack_function(int(name.removeprefix("Unpack")))
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1
    model.opset_imports[""] = max(OPSET, model.opset_imports.get("", OPSET))
    model.ir_version = _IR_VERSION


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _store_plainly(graph: ir.Graph, node: ir.Node) -> None:
    packed, shape = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    assert packed is not None
    assert shape is not None
    codes = packed.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    name = node.inputs[0].name.replace("weight_packed", "weight_codes")
    _replace(graph, node, initialise(graph, name, (codes ^ 0x80).view(np.int8)))


def _pad_codes(graph: ir.Graph, pad: ir.Node) -> None:
    fill = constant_of(pad.inputs[2]) if len(pad.inputs) > 2 else np.zeros(())
    chain = [pad]
    while (producer := chain[0].inputs[0].producer()) is not None and producer.op_type in _MOVES:
        chain.insert(0, producer)
    while len(uses := chain[-1].outputs[0].uses()) == 1 and next(iter(uses)).node.op_type in _MOVES:
        chain.append(next(iter(uses)).node)
    dequantize = chain[0].inputs[0].producer()
    readers = [use.node for use in chain[-1].outputs[0].uses()]
    if (
        dequantize is None
        or dequantize.op_type != "DequantizeLinear"
        or len(readers) != 1
        or readers[0].op_type != "QuantizeLinear"
        or list(readers[0].inputs[1:3]) != list(dequantize.inputs[1:3])
        or fill is None
        or fill.any()
        or any(len(node.outputs[0].uses()) != 1 for node in chain)
    ):
        return
    value, _, zero_point = dequantize.inputs
    for node in chain:
        inputs = [value, *node.inputs[1:]]
        if node.op_type == "Pad":
            inputs = [value, node.inputs[1], zero_point, *node.inputs[3:]]
        moved = ir.Node("", node.op_type, inputs, node.attributes.values())
        graph.insert_before(node, moved)
        value = moved.outputs[0]
    _replace(graph, readers[0], value)
    for node in reversed(chain):
        graph.remove(node, safe=True)


def _transpose_codes(graph: ir.Graph, transpose: ir.Node) -> None:
    dequantize = transpose.inputs[0].producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or layer_of(dequantize) is None:
        return
    axis = dequantize.attributes.get_int("axis", 1)
    permutation = list(transpose.attributes["perm"].as_ints())
    moved = ir.Node("", "Transpose", [dequantize.inputs[0]], [ir.AttrInt64s("perm", permutation)])
    inputs = [moved.outputs[0], *dequantize.inputs[1:]]
    again = ir.Node("", "DequantizeLinear", inputs, [ir.AttrInt64("axis", permutation.index(axis))])
    graph.insert_before(transpose, [moved, again])
    _replace(graph, transpose, again.outputs[0])


def _pool_globally(graph: ir.Graph, mean: ir.Node) -> None:
    axes = constant_of(mean.inputs[1]) if len(mean.inputs) > 1 else None
    shape = mean.inputs[0].shape
    if axes is None or shape is None or len(shape) != 4 or not mean.attributes.get_int("keepdims", 1):
        return
    if sorted(int(axis) % 4 for axis in axes) == [2, 3]:
        pool = ir.Node("", "GlobalAveragePool", [mean.inputs[0]])
        graph.insert_before(mean, pool)
        _replace(graph, mean, pool.outputs[0])


def _keep_float(graph: ir.Graph, layer: ir.Node) -> None:
    moves: list[ir.Node] = []
    value, weight = layer.inputs[0], layer.inputs[1].producer()
    while (dequantize := value.producer()) is not None and dequantize.op_type in ("Reshape", "Flatten"):
        moves.insert(0, dequantize)
        value = dequantize.inputs[0]
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or layer_of(dequantize) is not None:
        return
    grid = [constant_of(value) for value in dequantize.inputs[1:3]]
    shape = layer.inputs[0].shape
    if (weight is not None and weight.op_type == "DequantizeLinear") or any(each is None for each in grid):
        return
    assert shape is not None
    channels = shape[1]
    assert isinstance(channels, int), f"{layer.name}: {channels} channels"
    repeated = []
    for value, array in zip(dequantize.inputs[1:3], grid, strict=True):
        name = f"{value.name}_{channels}_channels"
        known = graph.initializers.get(name)
        repeated.append(known if known is not None else initialise(graph, name, np.repeat(array.reshape(-1), channels)))
    codes = dequantize.inputs[0]
    for move in moves:  # the codes move, so that the grid stands right before the layer
        moved = ir.Node("", move.op_type, [codes, *move.inputs[1:]], move.attributes.values())
        graph.insert_before(layer, moved)
        codes = moved.outputs[0]
    own = ir.Node("", "DequantizeLinear", [codes, *repeated], [ir.AttrInt64("axis", 1)])
    graph.insert_before(layer, own)
    layer.replace_input_with(0, own.outputs[0])


def _separate_calls(graph: ir.Graph) -> None:
    """Share no weight's zero point, nor codes that need 8 bits, between two calls.

    ONNX Runtime would refuse to replace either twice. A further call reads its codes through a Reshape to the shape
    they have, which is folded at load: nothing is stored twice.
    """
    calls: dict[ir.Value, int] = {}
    for node in list(graph):
        layer = layer_of(node) if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat") else None
        if layer is None:
            continue
        if node.op_type == "MatMulIntegerToFloat":
            _separate_codes(graph, node, 1, calls)
            continue
        zero_point = constant_of(node.inputs[2])
        assert zero_point is not None, f"{layer}: its weight's zero point is computed"
        readers = [(use.node, use.idx) for use in node.outputs[0].uses()]
        for position, (reader, index) in enumerate(readers):
            own = node
            if position:
                own = ir.Node("", "DequantizeLinear", node.inputs, node.attributes.values())
                graph.insert_before(reader, own)
                reader.replace_input_with(index, own.outputs[0])
            call = _separate_codes(graph, own, 0, calls)
            name = f"{layer}.weight_zero_point" + (f"#{call}" if call else "")
            own.replace_input_with(2, initialise(graph, name, zero_point))


def _separate_codes(graph: ir.Graph, node: ir.Node, index: int, calls: dict[ir.Value, int]) -> int:
    """Which call of its codes ``node``, which reads them as input ``index``, is: counted in ``calls``, from 0."""
    codes = node.inputs[index]
    assert codes is not None
    call = calls.get(codes, 0)
    calls[codes] = call + 1
    stored = codes if codes.is_initializer() else codes.producer().inputs[0]
    if call and stored.is_initializer() and str(stored.name).endswith(".weight_codes"):
        rank = len(stored.shape)
        same = graph.initializers.get(f"same_{rank}_sizes") or initialise(
            graph, f"same_{rank}_sizes", np.zeros(rank, dtype=np.int64)
        )
        again = ir.Node("", "Reshape", [codes, same])
        graph.insert_before(node, again)
        node.replace_input_with(index, again.outputs[0])
    return call


def _share_constants(graph: ir.Graph) -> None:
    """Turn Constant nodes into initialisers, one for each distinct value."""
    known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Constant" or node.domain:
            continue
        array = constant_of(node.outputs[0])
        if array is None:
            continue
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in known:
            known[key] = initialise(graph, f"constant_{len(known)}", array)
        _replace(graph, node, known[key])


def _remove_unread(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(output.uses() or output in outputs for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]


def _name(graph: ir.Graph) -> None:
    kept = {*graph.inputs, *graph.outputs}
    taken: dict[str, int] = {}
    for node in graph:
        stem = node.op_type
        if node.op_type in _LAYER_NODES:
            stem = _called(node) or layer_of(node) or stem
        node.metadata_props.clear()
        node.doc_string = None
        count = taken.get(stem, 0)
        taken[stem] = count + 1
        node.name = stem if not count else f"{stem}#{count}"
    for position, value in enumerate(output for node in graph for output in node.outputs):
        value.metadata_props.clear()
        value.type, value.shape = (value.type, value.shape) if value in kept else (None, None)
        if value not in kept:
            value.name = f"v{position}"
    for value in graph.initializers.values():
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _called(node: ir.Node) -> str | None:
    """The layer that ``node`` was exported from, whatever has become of its weight; None for other nodes.

    Read in the exporter's own trace: folding a transposed weight gives the weight another name.
    """
    scopes, classes = (
        ast.literal_eval(node.metadata_props.get(f"pkg.torch.onnx.{key}", "[]"))
        for key in ("name_scopes", "class_hierarchy")
    )
    return next((str(scope) for scope, kind in zip(scopes, classes, strict=True) if kind == LAYER_SCOPE), None)


def layer_of(node: ir.Node) -> str | None:
    """The layer whose stored weight ``node`` (a Conv, Gemm, MatMul or DequantizeLinear) reads, or None."""
    if node.op_type not in (*_LAYER_NODES, "DequantizeLinear"):
        return None
    value = node.inputs[1 if node.op_type in _LAYER_NODES else 0]
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or (producer.op_type not in _UNPACKING and producer.domain != DOMAIN):
            return None
        value = producer.inputs[0]
    for suffix in (".weight_packed", ".weight_codes", ".weight"):
        if value is not None and value.name is not None and value.name.endswith(suffix):
            return value.name.removesuffix(suffix)
    return None
