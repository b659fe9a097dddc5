"""Weights that stay packed at run time: ``com.microsoft::MatMulNBits``, and GatherBlockQuantized for embeddings.

The exporter leaves a marker for the weight, ``BlockWeight<bits>g<group>k<row>l<level>(packed, scale, zero_point)``, and
an ordinary product that reads it. Here both, and the bias behind them, become one MatMulNBits. For 2, 4 and 8 bits its
layout ([N, blocks, bytes of a block], first code in the lowest bits) is compress.quant.packing's; only rows that end
within a block are filled up.

``accuracy_level`` is always written: without it 8- and 2-bit nodes run many times slower than floats. Level 4 rounds
each block of the input to int8, which calibration measures for every layer; one that suffers computes in floats
(level 1).
"""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch.nn import functional

from compress.exporters.functions import DOMAIN
from compress.exporters.initializers import constant_of, initialise
from compress.exporters.products import MICROSOFT, replace_product
from compress.quant.packing import pack, unpack

__all__ = ["ACCURACY_LEVEL", "block_weight_name", "declare_block_weight", "use_matmul_nbits"]

ACCURACY_LEVEL = 4
_FLOAT_LEVEL = 1
_MARKER = re.compile(r"BlockWeight(\d+)g(\d+)k(\d+)l(\d+)")


def block_weight_name(bits: int, group_size: int | None, row: int, compute: str) -> str:
    """Name of the marker for rows of ``row`` weights."""
    return f"BlockWeight{bits}g{group_size}k{row}l{_FLOAT_LEVEL if compute == 'blocks-float' else ACCURACY_LEVEL}"


def declare_block_weight(name: str) -> None:
    """Make the marker known to ONNX's schema registry, without which onnxscript builds no call to it."""
    if onnx.defs.has(name, DOMAIN):
        return
    parameter = onnx.defs.OpSchema.FormalParameter
    inputs = [
        parameter("packed", "tensor(uint8)"), parameter("scale", "tensor(float)"), parameter("zero", "tensor(uint8)"),
    ]  # fmt: skip
    outputs = [parameter("weight", "tensor(float)")]
    onnx.defs.register_schema(onnx.defs.OpSchema(name, DOMAIN, 1, inputs=inputs, outputs=outputs))


def use_matmul_nbits(model: ir.Model) -> None:
    """Replace every marker and its products in place."""
    graph = model.graph
    for marker in list(graph):
        found = _MARKER.fullmatch(marker.op_type) if marker.domain == DOMAIN else None
        if found is None:
            continue
        stored = _store(graph, marker, *map(int, found.groups()))
        readers = [use.node for use in marker.outputs[0].uses()]
        lookups = [reader for reader in readers if reader.op_type == "Gather"]
        rows = _rows(graph, marker, stored[0][0], alone=len(lookups) == len(readers)) if lookups else None
        for reader in readers:
            if rows is not None and reader.op_type == "Gather":
                _look_up(graph, reader, rows, stored)
            elif reader.op_type == "Transpose":
                for product in [each.node for each in reader.outputs[0].uses()]:
                    _replace(graph, product, stored)
                graph.remove(reader, safe=True)
            else:
                _replace(graph, reader, stored)
        graph.remove(marker, safe=True)
        model.opset_imports[MICROSOFT] = 1


def _store(
    graph: ir.Graph, marker: ir.Node, bits: int, group: int, row: int, level: int
) -> tuple[list[ir.Value | None], dict[str, int]]:
    """The weight as MatMulNBits reads it, and its attributes."""
    packed, scale, zero = (constant_of(value) for value in marker.inputs)
    names = [str(value.name) for value in marker.inputs if value is not None]
    assert packed is not None
    assert scale is not None
    assert zero is not None
    channels, groups = scale.shape
    if row != groups * group:
        codes = unpack(torch.from_numpy(packed.copy()), bits, channels * row).reshape(channels, row)
        packed = pack(functional.pad(codes, (0, groups * group - row)), bits).numpy()
    size = group * bits // 8
    blocks = packed.reshape(-1)[: channels * groups * size].reshape(channels, groups, size)
    inputs: list[ir.Value | None] = [initialise(graph, names[0], blocks), initialise(graph, names[1], scale)]
    looked_up = any(use.node.op_type == "Gather" for use in marker.outputs[0].uses())
    if not looked_up and (zero == 1 << (bits - 1)).all():  # what is assumed without
        inputs.append(None)
    else:
        filled = functional.pad(torch.from_numpy(zero.copy()), (0, -groups % (8 // bits)))
        run = pack(filled, bits).numpy().reshape(-1)[: filled.numel() * bits // 8]
        inputs.append(initialise(graph, names[2], run.reshape(channels, -1)))
    return inputs, {"K": row, "N": channels, "bits": bits, "block_size": group, "accuracy_level": level}


def _look_up(
    graph: ir.Graph, gather: ir.Node, rows: ir.Value, stored: tuple[list[ir.Value | None], dict[str, int]]
) -> None:
    """Put GatherBlockQuantized where ``gather`` reads the table."""
    (_, scale, zero), sizes = stored
    attributes = {"bits": sizes["bits"], "block_size": sizes["block_size"], "gather_axis": 0, "quantize_axis": 1}
    node = ir.Node(
        MICROSOFT,
        "GatherBlockQuantized",
        [rows, gather.inputs[1], scale, zero],
        [ir.AttrInt64(key, value) for key, value in attributes.items()],
        metadata_props=dict(gather.metadata_props),
    )
    graph.insert_before(gather, node)
    if sizes["K"] % sizes["block_size"]:  # a tied table's rows are filled up for the product
        ends = {"first": 0, "end": sizes["K"], "axis": -1}
        bounds = [initialise(graph, f"{gather.name}_{name}", np.array([value])) for name, value in ends.items()]
        node = ir.node("Slice", [node.outputs[0], *bounds])
        graph.insert_before(gather, node)
    before, after = gather.outputs[0], node.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(gather, safe=True)


def _rows(graph: ir.Graph, marker: ir.Node, table: ir.Value | None, alone: bool) -> ir.Value:
    """The codes as [N, bytes of a row]; where a product reads them too, by a node that is folded at load."""
    array = constant_of(table)
    assert array is not None
    assert table is not None
    if alone:
        return initialise(graph, str(table.name), array.reshape(len(array), -1))
    shape = initialise(graph, f"{table.name}_rows", np.array([len(array), -1], dtype=np.int64))
    node = ir.node("Reshape", [table, shape])
    graph.insert_before(marker, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, product: ir.Node, stored: tuple[list[ir.Value | None], dict[str, int]]) -> None:
    inputs, attributes = stored
    written = tuple(ir.AttrInt64(key, value) for key, value in attributes.items())
    replace_product(graph, product, "MatMulNBits", [product.inputs[0], *inputs, None], attributes["N"], written)
