"""Linears on integers whose result is float: ``com.microsoft::MatMulIntegerToFloat``, the bias inside.

Written as DequantizeLinear, MatMul and Add, ONNX Runtime finds the same kernel, but leaves the bias outside, and a
scale it does not know (of a range that is measured as the model runs) makes it give up. The quantizer may be
QuantizeLinear (a calibrated grid) or DynamicQuantizeLinear; behind the latter, where only one layer reads it, ONNX
Runtime makes both one DynamicQuantizeMatMul.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.exporters.initializers import constant_of

__all__ = ["MICROSOFT", "replace_product", "use_integer_products"]

MICROSOFT = "com.microsoft"


def use_integer_products(model: ir.Model) -> None:
    """Replace in place every product of a quantized value and quantized weights that ends in floats."""
    graph = model.graph
    for product in list(graph):
        if product.op_type not in ("MatMul", "Gemm") or product.domain:
            continue
        value, weight = (each.producer() for each in product.inputs[:2])
        if any(each is None or each.op_type != "DequantizeLinear" for each in (value, weight)):
            continue
        codes = weight.inputs[0]
        if not _is_known(codes):
            continue  # attention: both are computed
        if product.op_type == "Gemm":
            if not _is_dynamic(value):
                continue  # ONNX Runtime makes a QGemm of it
            turned = ir.Node("", "Transpose", [codes], [ir.AttrInt64s("perm", [1, 0])])
            graph.insert_before(product, turned)
            codes = turned.outputs[0]
        zero_point = value.inputs[2] if len(value.inputs) > 2 else None
        inputs = [value.inputs[0], codes, value.inputs[1], weight.inputs[1], zero_point, None]
        scales = constant_of(weight.inputs[1])
        assert scales is not None
        replace_product(graph, product, "MatMulIntegerToFloat", inputs, scales.size)
        model.opset_imports[MICROSOFT] = 1


def replace_product(
    graph: ir.Graph,
    product: ir.Node,
    operator: str,
    inputs: list[ir.Value | None],
    channels: int,
    attributes: tuple[ir.Attr, ...] = (),
) -> None:
    """Put ``operator`` of Microsoft's domain where ``product`` (a MatMul or a Gemm) and the bias behind it stand.

    Args:
        inputs: all but the bias, which comes last.
        channels: of the output; an addend of as many numbers is a bias.
    """
    assert product.op_type in ("MatMul", "Gemm"), f"{product.op_type} reads a packed weight"
    bias, last = None, product
    if product.op_type == "Gemm":
        bias = product.inputs[2] if len(product.inputs) > 2 else None
    else:
        uses = list(product.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add" and product.outputs[0] not in graph.outputs:
            (other,) = (value for value in uses[0].node.inputs if value is not product.outputs[0])
            if other is not None and other.is_initializer() and list(other.shape or ()) == [channels]:
                bias, last = other, uses[0].node
    given = [*inputs, bias]
    while given[-1] is None:
        given.pop()
    node = ir.Node(MICROSOFT, operator, given, attributes, metadata_props=dict(product.metadata_props))
    # The graph's outputs keep their names and shapes.
    before, after = last.outputs[0], node.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(last, node)
    ir.convenience.replace_all_uses_with(last.outputs[0], node.outputs[0], replace_graph_outputs=True)
    graph.remove(last, safe=True)
    if last is not product:
        graph.remove(product, safe=True)


def _is_known(value: ir.Value | None) -> bool:
    """Whether ``value`` is the same in every run: computed from initialisers alone."""
    if value is None or value.is_initializer():
        return True
    maker = value.producer()
    return maker is not None and all(_is_known(each) for each in maker.inputs)


def _is_dynamic(dequantize: ir.Node) -> bool:
    maker = dequantize.inputs[0].producer()
    return maker is not None and maker.op_type == "DynamicQuantizeLinear"
