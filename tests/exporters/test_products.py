"""Linears on integers in real files: what ONNX Runtime makes of them, and that the biases went inside."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.exporters.fusion import optimized_nodes
from compress.exporters.session import open_session, run_session
from tests.every import every

CPU = "CPUExecutionProvider"
INTEGER = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm", "QLinearMatMul"}
FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
ROWS, WIDTH = 6, 32


class Rows(nn.Module):
    """Linears in a row on [N, L, C], around a sum and, behind a mean, on [N, C]; with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 48), nn.Linear(48, 48, bias=False), nn.Linear(48, 48)
        self.d, self.e, self.f = nn.Linear(48, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(self.a(x)))
        x = (x + self.c(x)).mean(1)
        return self.f(torch.relu(self.e(torch.tanh(self.d(x)))))


class Heads(nn.Module):
    """Three linears read one value, and products whose factors are both computed; a bias that is no layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16)
        self.o, self.shift = nn.Linear(16, WIDTH, bias=False), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        weights = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2), -1)
        return x + (self.o(weights @ self.v(y)) + self.shift)


@dataclass
class Run:
    """A module that was quantized, and its file as it was written and as ONNX Runtime optimised it."""

    module: nn.Module
    path: Path
    written: onnx.GraphProto
    optimized: list[onnx.NodeProto]
    kinds: dict[str, list[str]]


def quantize(module: nn.Module, folder: Path, **settings: object) -> Run:
    result = compress.quantize(module.eval(), out=folder / "out", first_last_bits=2, **settings)  # type: ignore[arg-type]
    path = folder / "out" / "model.onnx"
    found = optimized_nodes(path, CPU)
    kinds: dict[str, list[str]] = defaultdict(list)
    for node, name in found:
        kinds[name].append(node.op_type)
    return Run(result.module, path, onnx.load(path).graph, [node for node, _ in found], kinds)


def settings_of(inputs: str, bits: int) -> dict[str, object]:
    common: dict[str, object] = {"bits": bits, "method": "mse"}
    if inputs == "dynamic":
        return common | {"act_bits": 8, "input_shape": (ROWS, WIDTH)}
    return common | {"act_bits": bits, "calib": torch.randn(64, ROWS, WIDTH), "observer": "minmax"}


def check_integer(run: Run, layers: str) -> None:
    """Every layer is one integer kernel, no product of floats reads integers, no bias is left behind."""
    for layer in layers:
        assert len(run.kinds[layer]) == 1, run.kinds
        assert set(run.kinds[layer]) <= INTEGER, run.kinds
    floats = {output for node in run.optimized if node.op_type == "DequantizeLinear" for output in node.output}
    for node in run.optimized:
        assert not (node.op_type in FLOAT and floats & set(node.input)), node.name
    stored = {each.name for each in run.written.initializer}
    assert not [node.name for node in run.written.node if node.op_type == "Add" and stored & set(node.input)]


def check_numbers(run: Run, allowed: float) -> None:
    x = torch.randn(50, ROWS, WIDTH)
    with torch.no_grad():
        wanted = run.module(x)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        (got,) = run_session(open_session(run.path, level), [(x,)])
        assert (got - wanted).norm() <= allowed * wanted.norm(), level


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("inputs", "bits"), [("static", 4), ("dynamic", 8)])
def test_linears_are_integer_with_their_biases(inputs: str, bits: int, tmp_path: Path) -> None:
    run = quantize(Rows(), tmp_path, **settings_of(inputs, bits))
    check_integer(run, "abcdef")
    check_numbers(run, 0.03)
    if inputs == "dynamic":  # each alone reads its value: quantizer and product are one
        assert every(run.kinds[layer] == ["DynamicQuantizeMatMul"] for layer in "abdef"), run.kinds
    else:
        assert every(run.kinds[layer] == ["MatMulIntegerToFloat"] for layer in "abc"), run.kinds
        assert every(run.kinds[layer] == ["QGemm"] for layer in "def"), run.kinds


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("inputs", "bits"), [("static", 8), ("dynamic", 4)])
def test_products_of_computed_values_stay_float(inputs: str, bits: int, tmp_path: Path) -> None:
    run = quantize(Heads(), tmp_path, **settings_of(inputs, bits), bias_correction=False, smoothquant=False)
    check_integer(run, "qkvo")
    check_numbers(run, 0.03)
    assert sum(node.op_type in FLOAT for node in run.optimized) == 2
    # One quantizer for the value that q, k and v read, one for the mixtures.
    quantizers = [node for node in run.written.node if node.op_type.endswith("QuantizeLinear")]
    assert len(quantizers) == 2
    # The parameter behind the last layer is its bias as good as any.
    (last,) = (node for node in run.written.node if node.name == "o")
    assert last.op_type == "MatMulIntegerToFloat"
    assert last.input[-1].endswith("shift")


class Placed(nn.Module):
    """What is added behind the first linear has numbers for each position, and is no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 48, bias=False), nn.Linear(48, 8)
        self.place = nn.Parameter(torch.randn(ROWS, 48))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) + self.place))


@pytest.mark.slow
def test_what_is_added_to_positions_is_no_bias(tmp_path: Path) -> None:
    run = quantize(Placed(), tmp_path, **settings_of("dynamic", 8))
    check_numbers(run, 0.03)
    (first,) = (node for node in run.written.node if node.name == "a")
    assert first.op_type == "MatMulIntegerToFloat"
    (add,) = (node for node in run.written.node if first.output[0] in node.input)
    assert add.op_type == "Add"


@pytest.mark.slow
def test_weights_alone_stay_packed(tmp_path: Path) -> None:
    run = quantize(Rows(), tmp_path, bits=4, group_size=32, input_shape=(ROWS, WIDTH))
    assert every(run.kinds[layer] == ["MatMulNBits"] for layer in "abcdef"), run.kinds
    assert not [node for node in run.optimized if node.op_type in FLOAT | {"DequantizeLinear"}]
    stored = {each.name for each in run.written.initializer}
    assert not [node.name for node in run.written.node if node.op_type == "Add" and stored & set(node.input)]
    check_numbers(run, 0.05)
