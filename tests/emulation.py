"""Integer kernels in numpy: as processors with VNNI add, exactly, and as others do, pairs cut off at 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from compress.exporters.saturation import prove
from compress.records.report import LayerProof

Sums = Callable[[np.ndarray, np.ndarray], np.ndarray]


def exact_sums(inputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[N, K] and [O, K] -> [N, O]: what VNNI adds, in 32 bits."""
    return inputs.astype(np.int64) @ codes.astype(np.int64).T


def saturated_sums(inputs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[N, K] and [O, K] -> [N, O]: two neighbouring products at a time in 16 bits, saturating, those sums in 32."""
    odd = ((0, 0), (0, inputs.shape[1] % 2))
    inputs, codes = np.pad(inputs.astype(np.int64), odd), np.pad(codes.astype(np.int64), odd)
    pairs = (inputs[:, None] * codes[None]).reshape(len(inputs), len(codes), -1, 2).sum(-1)
    return pairs.clip(-(2**15), 2**15 - 1).sum(-1)


def window_sums(
    inputs: np.ndarray, weights: np.ndarray, *, dilations: Sequence[int], zero_point: int, sums: Sums
) -> np.ndarray:
    """One window of a convolution: [C, *extent] and [O, C / groups, *kernel] -> [O], the zero point taken off.

    Channels are inside, as QLinearConv's kernels walk; where a group has one channel and one output nothing is added
    in 16 bits.
    """
    groups = len(inputs) // weights.shape[1]
    taken = inputs[(slice(None), *(slice(None, None, step) for step in dilations))]
    parts = zip(np.split(taken, groups), np.split(weights, groups), strict=True)
    if weights.shape[1] == 1 and len(weights) == groups:
        sums = exact_sums
    rows = [
        (np.moveaxis(x, 0, -1).reshape(1, -1), np.moveaxis(w, 1, -1).reshape(len(w), -1).astype(np.int64))
        for x, w in parts
    ]
    return np.concatenate([sums(x, w)[0] - zero_point * w.sum(1) for x, w in rows])


def worst_inputs(codes: np.ndarray, highest: int = 255) -> np.ndarray:
    """[K] -> [2, K]: the inputs that drive a channel's sums furthest up, and furthest down."""
    return np.where(np.stack([codes > 0, codes < 0]), highest, 0)


def run_node(
    operator: str,
    feeds: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    config: Mapping[str, str] | None = None,
    **attributes: Any,
) -> np.ndarray:
    """The first output of one node on this machine's kernels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    model = node_model(operator, feeds, constants, inputs, **attributes)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(feeds))[0])


def node_model(
    operator: str,
    feeds: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    inputs: Sequence[str],
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node called ``layer``, of ONNX's own domain or, where it has none of the name, of Microsoft's."""
    domain = "" if onnx.defs.has(operator) else "com.microsoft"
    node = helper.make_node(operator, list(inputs), ["y"], name="layer", domain=domain, **attributes)
    return graph_model([node], feeds, constants)


def graph_model(
    nodes: Sequence[onnx.NodeProto], feeds: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """A model with one output, ``y``; its type is inferred from what makes it."""
    floats = {"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "DynamicQuantizeLSTM"}
    last = nodes[-1]
    kind = onnx.TensorProto.FLOAT
    if last.op_type in ("MatMulInteger", "ConvInteger", "If"):
        kind = onnx.TensorProto.INT32
    elif last.op_type not in floats and not (last.op_type == "QGemm" and len(last.input) < 8):
        first = feeds[last.input[0]] if last.input[0] in feeds else constants[last.input[2]]
        kind = helper.np_dtype_to_tensor_dtype(first.dtype)
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape)
            for name, each in feeds.items()
        ],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@cache
def saturates() -> bool:
    """Whether this machine's kernels cut sums of two products off at 16 bits: it has no VNNI."""
    feeds = {"x": np.full((1, 2), 255, np.uint8)}
    got = run_node("MatMulInteger", feeds, {"w": np.full((2, 16), 127, np.int8)}, ["x", "w"])
    assert got[0, 0] in (2**15 - 1, 2 * 255 * 127)
    return bool(got[0, 0] == 2**15 - 1)


def machine_sums() -> Sums:
    """What this machine's kernels add."""
    return saturated_sums if saturates() else exact_sums


def constants(**numbers: Any) -> dict[str, np.ndarray]:
    """Arrays and numbers, as initialisers of a model."""
    return {name: np.asarray(each) for name, each in numbers.items()}


def row_of(model: onnx.ModelProto, folder: Path) -> LayerProof:
    """What is proven of the one layer of ``model``."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    (row,) = prove(path).layers
    return row
