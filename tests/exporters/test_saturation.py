"""The proof against this machine's kernels: where it says exact they are, and where it does not an input shows it.

A machine with VNNI adds exactly, whatever the codes: there the orders of sums are held against the emulation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress.exporters.saturation import INSTRUCTION_SETS, largest_sum, prove
from tests.emulation import (
    constants,
    exact_sums,
    machine_sums,
    node_model,
    row_of,
    run_node,
    saturated_sums,
    saturates,
    window_sums,
    worst_inputs,
)

PAIRS = {each.name for each in INSTRUCTION_SETS if each.pairs}
WRAPPING = {each.name for each in INSTRUCTION_SETS if each.wraps == "all"}
# Outputs, channels, groups, kernel and dilations.
CONVOLUTIONS = [
    (16, 8, 1, (3, 3), (1, 1)),
    (8, 3, 1, (3, 3), (1, 1)),
    (64, 64, 1, (3, 3), (1, 1)),
    (7, 5, 1, (1, 1), (1, 1)),
    (5, 1, 1, (3, 3), (1, 1)),
    (1, 1, 1, (3, 3), (1, 1)),
    (32, 32, 32, (3, 3), (1, 1)),
    (15, 15, 15, (5, 3), (1, 2)),
    (32, 16, 16, (3, 3), (1, 1)),
    (16, 16, 8, (3, 3), (2, 1)),
    (9, 9, 3, (3, 2), (1, 2)),
    (8, 6, 2, (5,), (2,)),
    (6, 6, 6, (5,), (1,)),
    (6, 4, 2, (3, 3, 3), (1, 1, 2)),
    (4, 4, 4, (3, 3, 3), (1, 1, 1)),
]
Shape = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]


def is_exact(kind: str, inputs: np.ndarray, weights: np.ndarray, shape: Shape, sums: np.ndarray) -> bool:
    """Whether QLinearConv's sums are ``sums``, bit for bit: with those taken off as a bias, nothing is left."""
    _, _, groups, _, dilations = shape
    zero = np.iinfo(inputs.dtype).min + 7
    kept = np.array(zero, inputs.dtype)
    one = np.float32(1)
    values = constants(one=one, zero=kept, w=weights, wz=weights.dtype.type(0), bias=-sums.astype(np.int32))
    names = ["x", "one", "zero", "w", "one", "wz", "one", "zero", "bias"]
    got = run_node(kind, {"x": inputs[None]}, values, names, group=groups, dilations=dilations)
    return bool((got.reshape(-1) == kept).all())


def random_window(shape: Shape, rng: np.random.Generator, codes: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, half of them at their highest, and weights up to +-``codes``."""
    outputs, channels, groups, kernel, dilations = shape
    extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    inputs = np.where(rng.random((channels, *extent)) < 0.5, 255, rng.integers(0, 256, (channels, *extent)))
    weights = rng.integers(-codes, codes + 1, (outputs, channels // groups, *kernel))
    return inputs.astype(np.uint8), weights.astype(np.int8)


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_convolutions_add_as_emulated(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    differ = 0
    for _ in range(4):
        inputs, weights = random_window(shape, rng)
        found = {
            sums: window_sums(inputs, weights, dilations=shape[4], zero_point=7, sums=sums)
            for sums in (exact_sums, saturated_sums)
        }
        assert is_exact("QLinearConv", inputs, weights, shape, found[machine_sums()])
        differ += int((found[exact_sums] != found[saturated_sums]).any())
    alone = shape[0] == shape[1] == shape[2]
    assert differ == 0 if alone else differ > 0


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("codes", [64, 127])
def test_a_convolution_is_proven_where_its_worst_inputs_come_out_exact(
    shape: Shape, codes: int, tmp_path: Path
) -> None:
    """The worst channel's inputs, laid out in the order of the proof: the emulation, and the kernel, agree with it."""
    outputs, channels, groups, kernel, dilations = shape
    rng = np.random.default_rng(1)
    inputs, weights = random_window(shape, rng, codes)
    weights.reshape(-1)[:1] = codes
    one = np.float32(1)
    values = constants(one=one, zero=np.uint8(0), w=weights, wz=np.int8(0))
    names = ["x", "one", "zero", "w", "one", "wz", "one", "zero"]
    row = row_of(
        node_model("QLinearConv", {"x": inputs[None]}, values, names, group=groups, dilations=dilations), tmp_path
    )
    assert row.channel is not None
    assert row.worst is not None
    alone = outputs == channels == groups
    assert len(row.pair) <= (1 if alone else 2)
    assert set(row.unproven) == (PAIRS if codes == 127 and not alone else set())
    # [O, *kernel, C / groups]: the order that is proven.
    ordered = np.moveaxis(weights, 1, -1).reshape(outputs, -1)
    assert tuple(ordered[row.channel, list(row.pair)]) == row.codes
    found = []
    for driven in worst_inputs(ordered[row.channel]):
        block = np.moveaxis(driven.reshape(*kernel, -1), -1, 0)
        group = row.channel // (outputs // groups)
        window = np.zeros_like(inputs)
        places = (slice(None, None, step) for step in dilations)
        per_group = channels // groups
        window[(slice(group * per_group, (group + 1) * per_group), *places)] = block
        exact, cut = (
            window_sums(window, weights, dilations=dilations, zero_point=7, sums=sums)
            for sums in (exact_sums, saturated_sums)
        )
        found.append(bool((exact == cut).all()))
        assert is_exact("QLinearConv", window, weights, shape, exact) == (found[-1] or not saturates())
    assert all(found) == (not row.unproven)


def product(
    operator: str, left: np.ndarray, right: np.ndarray
) -> tuple[dict[str, np.ndarray], list[str], dict[str, Any]]:
    """Constants, inputs and attributes of a product of ``x`` with ``right`` [K, N] whose output is the bare sums."""
    zeros = constants(xz=left.dtype.type(0), wz=right.dtype.type(0), one=np.float32(1))
    if operator == "MatMulInteger":
        return zeros | {"w": right}, ["x", "w", "xz", "wz"], {}
    if operator == "QGemm":
        return zeros | {"w": right.T.copy()}, ["x", "one", "xz", "w", "one", "wz"], {"transB": 1}
    return zeros | {"w": right}, ["x", "w", "one", "one", "xz", "wz"], {}


@pytest.mark.parametrize("operator", ["MatMulInteger", "MatMulIntegerToFloat", "QGemm"])
@pytest.mark.parametrize("shape", [(1, 32, 16), (1, 7, 5), (3, 33, 20), (5, 1001, 3)], ids=str)
@pytest.mark.parametrize("kinds", ["uint8 int8", "uint8 uint8", "int8 int8"])
def test_products_add_as_emulated(operator: str, shape: tuple[int, int, int], kinds: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    left, right = (np.dtype(kind) for kind in kinds.split())
    rows, inner, outputs = shape
    low, high = np.iinfo(left).min, np.iinfo(left).max
    x = np.where(rng.random((rows, inner)) < 0.5, high, rng.integers(low, high + 1, (rows, inner))).astype(left)
    w = rng.integers(max(-127, np.iinfo(right).min), np.iinfo(right).max + 1, (inner, outputs)).astype(right)
    values, names, attributes = product(operator, x, w)
    got = run_node(operator, {"x": x}, values, names, **attributes)
    sums = machine_sums() if kinds == "uint8 int8" else exact_sums
    np.testing.assert_array_equal(got, sums(x, w.T).astype(got.dtype))
    row = row_of(node_model(operator, {"x": x}, values, names, **attributes), tmp_path)
    assert (row.inputs, row.weights) == (left.name, right.name)
    assert set(row.unproven) == (PAIRS if kinds == "uint8 int8" else set())
    assert row.limit == (128 if kinds == "uint8 int8" else None)


@pytest.mark.parametrize("highest", [64, 127])
def test_a_product_that_rounds_its_inputs_as_it_runs(highest: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-highest, highest + 1, (33, 8)).astype(np.int8)
    x = rng.choice([0.0, 255.0], (4, 33)).astype(np.float32)
    x[0, :2] = 0, 255
    values, names = constants(w=w, one=np.float32(1), wz=np.int8(0)), ["x", "w", "one", "wz"]
    got = run_node("DynamicQuantizeMatMul", {"x": x}, values, names)
    np.testing.assert_array_equal(got, machine_sums()(x.astype(np.uint8), w.T))
    row = row_of(node_model("DynamicQuantizeMatMul", {"x": x}, values, names), tmp_path)
    assert set(row.unproven) == (PAIRS if highest == 127 else set())


BOUNDED, SHIFTED = [1, 127, 127, 1], [127, 127, 1, 1]


def attention(
    codes: Sequence[int],
) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray], list[str], dict[str, Any]]:
    w = np.tile(np.resize(codes, 8)[:, None], (1, 24)).astype(np.int8)
    w[:, 8:16] *= -1
    x = np.full((1, 4, 8), 255, np.uint8)
    x[0, 2:, ::3] = 0
    values = constants(w=w, b=np.zeros(24, np.float32), xs=np.float32(0.01), xz=np.uint8(0), wz=np.int8(0))
    return "QAttention", {"x": x}, values, ["x", "w", "b", "xs", "xs", "", "xz", "wz"], {"num_heads": 2}


def recurrent(codes: Sequence[int], state: Sequence[int]) -> Any:
    w, r = (np.tile(np.resize(each, 8)[None, :, None], (1, 1, 32)).astype(np.int8) for each in (codes, state))
    x = np.ones((5, 2, 8), np.float32)
    x[0, 0, 0] = 0
    scales = {name: np.full(1, 0.0005, np.float32) for name in ("s1", "s2")}
    values = constants(w=w, r=r, b=np.zeros((1, 64), np.float32), z1=np.zeros(1, np.int8), z2=np.zeros(1, np.int8))
    names = ["x", "w", "r", "b", "", "", "", "", "s1", "z1", "s2", "z2"]
    return "DynamicQuantizeLSTM", {"x": x}, values | scales, names, {"hidden_size": 8}


@pytest.mark.parametrize(
    ("node", "layer", "exact"),
    [
        (attention(BOUNDED), "layer", True),
        (attention(SHIFTED), "layer", False),
        (recurrent(BOUNDED, [1]), "layer, inputs", True),
        (recurrent(SHIFTED, [1]), "layer, inputs", False),
        (recurrent([1], BOUNDED), "layer, state", True),
        (recurrent([1], SHIFTED), "layer, state", False),
    ],
    ids=["attention", "attention over", "inputs", "inputs over", "state", "state over"],
)
def test_operators_with_sums_inside_add_the_same_neighbours(node: Any, layer: str, exact: bool, tmp_path: Path) -> None:
    """Against themselves with weights of another type, which are exact everywhere."""
    operator, feeds, values, names, attributes = node
    path = tmp_path / "model.onnx"
    onnx.save(node_model(operator, feeds, values, names, **attributes), path)
    rows = {row.name: row for row in prove(path).layers}
    assert set(rows[layer].unproven) == (set() if exact else PAIRS)
    assert rows[layer].worst == (128 if exact else 254)
    got, wanted = (
        run_node(operator, feeds, values, names, {"session.x64quantprecision": precise}, **attributes)
        for precise in "01"
    )
    assert np.array_equal(got, wanted) == (exact or not saturates())


@pytest.mark.parametrize("kinds", ["uint8 int8", "uint8 uint8", "int8 int8", "int8 uint8"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_integer_adds_weights_left_and_channels_outside(kinds: str, groups: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    left, right = (np.dtype(kind) for kind in kinds.split())
    limits = np.iinfo(left)
    x = rng.choice([limits.min, limits.max], (1, 4, 3, 3)).astype(left)
    w = rng.integers(np.iinfo(right).min + 1, np.iinfo(right).max + 1, (8, 4 // groups, 3, 3)).astype(right)
    values = {"w": w}
    got = run_node("ConvInteger", {"x": x}, values, ["x", "w"], group=groups).reshape(-1)
    sums = machine_sums() if kinds == "int8 uint8" else exact_sums
    parts = zip(np.split(x[0], groups), np.split(w, groups), strict=True)
    wanted = np.concatenate([sums(part.reshape(1, -1), codes.reshape(len(codes), -1))[0] for part, codes in parts])
    np.testing.assert_array_equal(got, wanted)
    row = row_of(node_model("ConvInteger", {"x": x}, values, ["x", "w"], group=groups), tmp_path)
    assert (row.inputs, row.weights) == (left.name, right.name)
    if kinds == "int8 uint8":
        assert row.limit == 256
        assert set(row.unproven) >= PAIRS
    else:
        assert row.unproven == ()


def test_a_constant_on_the_left_is_judged(tmp_path: Path) -> None:
    a = np.full((3, 4), 255, np.uint8)
    b = np.full((4, 2), -128, np.int8)
    row = row_of(node_model("MatMulInteger", {"b": b}, {"a": a}, ["a", "b"]), tmp_path)
    assert (row.worst, row.limit, row.inputs, row.weights) == (510, 256, "int8", "uint8")
    assert set(row.unproven) >= PAIRS
    got = run_node("MatMulInteger", {"b": b}, {"a": a}, ["a", "b"])
    np.testing.assert_array_equal(got, machine_sums()(a, b.T))
    a //= 2
    assert row_of(node_model("MatMulInteger", {"b": b}, {"a": a}, ["a", "b"]), tmp_path).worst == 254
    got = run_node("MatMulInteger", {"b": b}, {"a": a}, ["a", "b"])
    np.testing.assert_array_equal(got, exact_sums(a, b.T))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("shape", [(5, 6), (3, 7), (1, 1)], ids=str)
def test_the_largest_sum_is_the_largest(width: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.exporters.saturation._CHUNK", 8)  # a row or two in one go
    rng = np.random.default_rng(0)
    for _ in range(20):
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        wanted = {}
        for row, line in enumerate(codes.astype(int)):
            for start in range(0, shape[1], width):
                part = line[start : start + width]
                wanted[row, start] = max(part[part > 0].sum(), -part[part < 0].sum())
        worst, *place = largest_sum(codes, width)
        assert worst == max(wanted.values())
        assert wanted[tuple(place)] == worst
