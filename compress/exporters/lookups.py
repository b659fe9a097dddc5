"""Look-ups of an embedding whose table is a linear's int8 weight, too: the row is looked up first, then dequantized.

As the exporter writes it, ``DequantizeLinear -> Gather`` would dequantize the whole table in every run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.exporters.initializers import initialise

__all__ = ["look_up_codes"]


def look_up_codes(graph: ir.Graph) -> None:
    """Replace every ``DequantizeLinear(codes, scale by row) -> Gather`` by a Gather of each and their product."""
    for gather in list(graph):
        dequantize = gather.inputs[0].producer() if gather.op_type == "Gather" and gather.inputs[0] else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        if dequantize.attributes.get_int("axis", 1) != 0 or gather.attributes.get_int("axis", 0) != 0:
            continue
        codes, scale = dequantize.inputs[:2]
        assert codes is not None
        assert scale is not None
        ids = gather.inputs[1]
        row = ir.node("Gather", [codes, ids])
        number = ir.node("Cast", [row.outputs[0]], {"to": ir.DataType.FLOAT})
        factor = ir.node("Gather", [scale, ids])
        last = initialise(graph, "last_axis", np.array([-1], dtype=np.int64))
        wide = ir.node("Unsqueeze", [factor.outputs[0], last])
        product = ir.node("Mul", [number.outputs[0], wide.outputs[0]])
        before, after = gather.outputs[0], product.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        for node in (row, number, factor, wide, product):
            node.metadata_props.update(gather.metadata_props)
            graph.insert_before(gather, node)
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        graph.remove(gather, safe=True)
