"""Layers as they are found in the graph ONNX Runtime makes of a file: names, types, what is known of their inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.exporters.integer_layers import read_integer_layers
from compress.exporters.saturation import INSTRUCTION_SETS, prove
from tests.emulation import constants, graph_model, node_model, row_of

PAIRS = {each.name for each in INSTRUCTION_SETS if each.pairs}
WRAPPING = {each.name for each in INSTRUCTION_SETS if each.wraps == "all"}


def test_weights_that_are_computed_are_not_judged(tmp_path: Path) -> None:
    for kinds, unproven in ((("uint8", "int8"), PAIRS | WRAPPING), (("uint8", "uint8"), set())):
        feeds = {name: np.zeros((4, 4), kind) for name, kind in zip("xw", kinds, strict=True)}
        row = row_of(node_model("MatMulInteger", feeds, {}, ["x", "w"]), tmp_path)
        assert set(row.unproven) == unproven
        assert (row.reason is not None) == bool(unproven)


def quantized_convolution(kind: type[np.generic], *, clip: int | None = None, lowest: int = -127) -> onnx.ModelProto:
    """Quantize, perhaps Clip, Dequantize, Conv, Quantize, Dequantize."""
    low = np.iinfo(kind).min
    w = np.full((4, 4, 3, 3), 100, np.int8)
    w[2, 1, 1, 1] = lowest
    values = constants(s=np.float32(0.1), z=kind(low), w=w, ws=np.ones(4, np.float32), wz=np.zeros(4, np.int8))
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    if clip is not None:
        values |= constants(low=kind(low), high=kind(low + clip))
        nodes.append(helper.make_node("Clip", ["q", "low", "high"], ["clipped"]))
    nodes += [
        helper.make_node("DequantizeLinear", ["q" if clip is None else "clipped", "s", "z"], ["x1"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["w1"], axis=0),
        helper.make_node("Conv", ["x1", "w1"], ["c"], name="first.conv"),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "s", "z"], ["y"]),
    ]
    return graph_model(nodes, {"x": np.zeros((1, 4, 5, 5), np.float32)}, values)


def test_layers_are_named_as_before_they_were_optimised(tmp_path: Path) -> None:
    row = row_of(quantized_convolution(np.uint8), tmp_path)
    assert (row.name, row.operator, row.inputs, row.weights) == ("first.conv", "QLinearConv", "uint8", "int8")
    assert (row.worst, row.limit, row.lowest) == (200, 128, -127)
    assert set(row.unproven) == PAIRS


@pytest.mark.parametrize(("clip", "limit", "exact"), [(15, 2184, True), (127, 258, True), (200, 163, False)])
def test_inputs_behind_a_clip_of_codes_leave_more_room(clip: int, limit: int, exact: bool, tmp_path: Path) -> None:
    row = row_of(quantized_convolution(np.uint8, clip=clip), tmp_path)
    assert row.limit == limit
    assert set(row.unproven) == (set() if exact else PAIRS)


def test_signed_inputs_are_unsigned_on_x86(tmp_path: Path) -> None:
    """ONNX Runtime rewrites them by default, so that a file for Arm saturates on x86 as any other."""
    row = row_of(quantized_convolution(np.int8), tmp_path)
    assert (row.inputs, row.limit) == ("uint8", 128)
    assert set(row.unproven) == PAIRS


def test_signed_inputs_of_an_integer_operator_stay(tmp_path: Path) -> None:
    x, w = np.zeros((2, 4), np.int8), np.full((4, 4), 127, np.int8)
    row = row_of(node_model("MatMulInteger", {"x": x}, {"w": w}, ["x", "w"]), tmp_path)
    assert (row.worst, row.limit, row.unproven) == (254, None, ())


def test_minus_128_is_not_proven_on_arm(tmp_path: Path) -> None:
    row = row_of(quantized_convolution(np.uint8, clip=15, lowest=-128), tmp_path)
    assert row.lowest == -128
    assert set(row.unproven) == WRAPPING
    proof = prove(tmp_path / "model.onnx")
    assert "the lowest is -128, allowed -127" in proof.failures[0]
    assert "AVX2" in proof.proven
    assert "Arm without dot product" not in proof.proven


def test_a_depthwise_layer_with_minus_128_is_not_proven_on_any_arm(tmp_path: Path) -> None:
    w = np.full((16, 1, 3, 3), -128, np.int8)
    values = constants(one=np.float32(1), zero=np.uint8(0), w=w, wz=np.int8(0))
    names = ["x", "one", "zero", "w", "one", "wz", "one", "zero"]
    row = row_of(node_model("QLinearConv", {"x": np.zeros((1, 16, 3, 3), np.uint8)}, values, names, group=16), tmp_path)
    assert (row.worst, row.limit, row.pair) == (128, 128, (0,))
    assert set(row.unproven) == {each.name for each in INSTRUCTION_SETS if each.family == "Arm"}


def test_layers_in_branches_are_found(tmp_path: Path) -> None:
    def branch(name: str, weights: str) -> onnx.GraphProto:
        node = helper.make_node("MatMulInteger", ["x", weights], [name], name=name)
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.INT32, None)])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("yes", "w"), else_branch=branch("no", "v"))
    w = np.full((4, 4), 127, np.int8)
    feeds = {"c": np.array(True), "x": np.zeros((2, 4), np.uint8)}
    onnx.save(graph_model([node], feeds, {"w": w, "v": w // 2}), tmp_path / "model.onnx")
    rows = {row.name: row.worst for row in prove(tmp_path / "model.onnx").layers}
    assert rows == {"yes": 254, "no": 126}


def test_a_files_own_name_that_looks_like_an_added_one_is_kept(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["a"], name="same"),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["b", "v"], ["y"], name="same_token_1"),
    ]
    w = np.full((4, 4), 127, np.int8)
    model = graph_model(nodes, {"x": np.zeros((2, 4), np.uint8)}, {"w": w, "v": w // 2})
    onnx.save(model, tmp_path / "model.onnx")
    assert {row.name: row.worst for row in prove(tmp_path / "model.onnx").layers} == {"same": 254, "same_token_1": 126}


def test_what_is_not_known_is_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator of ONNX Runtime's that reads codes and is in neither table."""
    monkeypatch.setattr("compress.exporters.integer_layers._PRODUCTS", {})
    feeds, values = {"x": np.zeros((1, 2), np.uint8)}, constants(w=np.zeros((2, 2), np.int8), one=np.float32(1))
    row = row_of(node_model("MatMulIntegerToFloat", feeds, values, ["x", "w", "one", "one"]), tmp_path)
    assert set(row.unproven) == {each.name for each in INSTRUCTION_SETS}
    assert row.reason == "what MatMulIntegerToFloat does with its codes is not known here"


def test_a_float_file_has_no_layers(tmp_path: Path) -> None:
    feeds, values = {"x": np.zeros((2, 4), np.float32)}, {"w": np.ones((4, 4), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("DequantizeLinear", ["q", "s"], ["y"])]
    nodes.insert(1, helper.make_node("QuantizeLinear", ["m", "s"], ["q"]))
    model = graph_model(nodes, feeds, values | constants(s=np.float32(0.1)))
    onnx.save(model, tmp_path / "model.onnx")
    proof = prove(tmp_path / "model.onnx")
    assert proof.layers == ()
    assert all(proof.instruction_sets.values())


def test_codes_outlive_the_folder_they_were_read_from(tmp_path: Path) -> None:
    """Large tensors lie beside the optimised graph, in a folder that is gone."""
    w = np.random.default_rng(0).integers(-127, 128, (512, 256)).astype(np.int8)
    onnx.save(
        node_model("MatMulInteger", {"x": np.zeros((2, 512), np.uint8)}, {"w": w}, ["x", "w"]), tmp_path / "m.onnx"
    )
    (layer,) = read_integer_layers(tmp_path / "m.onnx", signed=True)
    assert layer.codes is not None
    np.testing.assert_array_equal(layer.codes, w.T)
