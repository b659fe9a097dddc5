"""The integer operators of a file, each on its own: what goes into one of them does not depend on those before it.

Float sums, and functions such as tanh, end in other last bits on other instruction sets, and a quantizer behind makes
another code of one in some thousands. A whole file is therefore the same on all processors only as far as its float
parts are. Its integer operators have no such excuse.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

__all__ = ["JOINS", "PRODUCTS", "take_apart"]

# Sums of integer products: the same number everywhere, scaled and rounded by one multiplication.
PRODUCTS = {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"}
# Codes of several grids, scaled before they are added: in fixed point on AVX2 (MlasCalcQLinearAddParameters) and in
# floats on SSE2, so that a sum in the middle between two codes may be rounded to the other.
JOINS = {"QLinearAdd", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool"}


def take_apart(path: Path, feeds: dict[str, np.ndarray], target: Path) -> list[str]:
    """Write ``target``, the integer operators of ``path`` as ONNX Runtime optimises it, none of them behind another; as
    .npz beside it, what each reads in the whole file on ``feeds``. Returns their names, which their outputs have.
    """
    model = _optimized(path, target)
    graph = model.graph
    constants = {each.name for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in PRODUCTS | JOINS]
    read = sorted({name for node in nodes for name in node.input if name and name not in constants})
    computed = [name for name in read if name not in feeds]
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in computed)
    values = dict(zip(computed, _session(model, "ORT_DISABLE_ALL").run(computed, feeds), strict=True))
    values |= {name: feeds[name] for name in read if name in feeds}
    names = []
    for position, node in enumerate(nodes):
        names.append(f"{position} {node.name} ({node.op_type})")
        node.output[0] = names[-1]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    )
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    onnx.save(model, target)
    np.savez(target.with_suffix(".npz"), **values)
    return names


def _optimized(path: Path, target: Path) -> onnx.ModelProto:
    """With integer kernels in the place of floats between quantizers, before layouts that are one processor's own."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(target)


def _session(model: onnx.ModelProto, level: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
