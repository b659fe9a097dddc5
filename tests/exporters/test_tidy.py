from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.exporters.build import build_onnx
from compress.exporters.tidy import layer_of
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators

WIDTH = 16


class Net(nn.Module):
    """Two convolutions and a linear, joined by ``body``."""

    def __init__(self, body: object) -> None:
        super().__init__()
        # As wide as the targets want leading convolutions to be before they run on integers.
        self.a, self.b, self.fc = (
            nn.Conv2d(3, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.Linear(WIDTH, 5),
        )
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)  # type: ignore[operator]


Exported = Callable[..., ir.Model]


@pytest.fixture
def exported(compress_quickly: Callable[..., TracedModel]) -> Exported:
    """``(body, **options)``: the net quantized, as the file that would be written."""

    def run(body: object, **options: Any) -> ir.Model:
        options = {"bits": 4, "first_last_bits": 4} | options
        return build_onnx(compress_quickly(Net(body), torch.randn(16, 3, 6, 6), **options))

    return run


def nodes(model: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


def plain(net: Net, x: Tensor) -> Tensor:
    return net.fc(torch.relu(net.b(torch.relu(net.a(x)))).mean((2, 3)))


@pytest.mark.slow
def test_eight_bits_are_stored_plainly(exported: Exported) -> None:
    model = exported(plain, bits=8)
    assert not model.functions
    for name in ("a", "b", "fc"):
        codes = model.graph.initializers[f"{name}.weight_codes"].const_value
        assert codes is not None
        assert codes.dtype == ir.DataType.INT8


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_bits_are_stored_packed_and_unpacked_by_one_function(bits: int, exported: Exported) -> None:
    model = exported(plain, bits=bits, first_last_bits=bits)
    assert [name for _, name, _ in model.functions] == [f"Unpack{bits}"]
    for name, count in (("a", WIDTH * 27), ("b", WIDTH * WIDTH * 9), ("fc", WIDTH * 5)):
        packed = model.graph.initializers[f"{name}.weight_packed"].const_value
        assert packed is not None
        assert packed.dtype == ir.DataType.UINT8
        assert packed.size == bits * -(-count // 8)
    assert not any(name.endswith(".weight") for name in model.graph.initializers)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("target", ["onnx-cpu", "onnx-arm"])
def test_narrow_codes_are_clipped_to_their_range(target: str, exported: Exported) -> None:
    model = exported(plain, act_bits=4, target=target)
    ends = []
    for node in nodes(model, "Clip"):
        low, high = (ir.convenience.get_const_tensor(each) for each in node.inputs[1:])
        assert low is not None
        assert high is not None
        ends.append((int(low.numpy()), int(high.numpy())))
    assert set(ends) == {(0, 15) if target == "onnx-cpu" else (-128, -113)}


PADS = {
    "pad": lambda net, x: F.pad(y := torch.relu(net.a(x)), (1, 1)).narrow(3, 1, 6) + net.b(y),
    "pad, slice, pad": lambda net, x: F.pad(F.pad(y := torch.relu(net.a(x)), (1, 0))[:, :, :, :6], (0, 0)) + net.b(y),
    "two pads": lambda net, x: F.pad(F.pad(y := torch.relu(net.a(x)), (1, 0)), (0, 0, 1, 0))[..., 1:, 1:] + net.b(y),
    "three pads": lambda net, x: (
        F.pad(F.pad(F.pad(y := torch.relu(net.a(x)), (1, 0)), (0, 0, 1, 0)), (0, 1))[..., 1:, 1:7] + net.b(y)
    ),
    "channels": lambda net, x: F.pad(torch.relu(net.a(x))[:, 2:], (0, 0, 0, 0, 1, 1)) + net.b(torch.relu(net.a(x))),
}


@pytest.mark.slow(cases=3)
@pytest.mark.parametrize("name", list(PADS))
@pytest.mark.parametrize("target", ["onnx-cpu", "onnx-arm"])
def test_zero_padding_is_done_on_codes(name: str, target: str, exported: Exported) -> None:
    # A sum that the output alone reads would be one of floats.
    model = exported(lambda net, x: net.b(PADS[name](net, x)), target=target)
    pads = nodes(model, "Pad")
    assert pads
    for pad in pads:
        source = pad.inputs[0].producer()
        while source is not None and source.op_type in ("Pad", "Slice"):
            source = source.inputs[0].producer()
        assert source is not None
        assert source.op_type == "QuantizeLinear"
        # Zero is the grid's zero point there.
        fill, zero = (ir.convenience.get_const_tensor(each) for each in (pad.inputs[2], source.inputs[2]))
        assert fill is not None
        assert zero is not None
        assert np.array_equal(fill.numpy(), zero.numpy())


@pytest.mark.slow
def test_a_reflected_pad_survives(exported: Exported) -> None:
    model = exported(lambda net, x: net.b(F.pad(torch.relu(net.a(x)), (1, 1, 1, 1), mode="reflect")))
    assert len(nodes(model, "Pad")) == 1


@pytest.mark.matrix
def test_a_linear_on_three_dimensions_multiplies_codes(exported: Exported) -> None:
    model = exported(lambda net, x: torch.relu(net.fc(torch.relu(net.a(x)).flatten(2).permute(0, 2, 1))))
    (product,) = nodes(model, "MatMulIntegerToFloat")
    quantize, transpose = (value.producer() for value in product.inputs[:2])
    assert quantize is not None
    assert quantize.op_type == "QuantizeLinear"
    assert transpose is None or transpose.op_type == "Transpose"
    assert product.name == "fc"


@pytest.mark.slow
def test_names_are_those_of_layers_and_nothing_of_the_exporter_is_left(exported: Exported) -> None:
    model = exported(plain)
    assert [node.name for node in model.graph if node.op_type in ("Conv", "Gemm")] == ["a", "b", "fc"]
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    for node in model.graph:
        assert not node.metadata_props
        assert not node.doc_string
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert not [name for name, value in model.graph.initializers.items() if not value.uses()]


@pytest.mark.slow
def test_a_shared_layers_calls_are_numbered_so_that_no_module_can_have_the_name(exported: Exported) -> None:
    model = exported(lambda net, x: net.b(torch.relu(net.b(torch.relu(net.a(x))))))
    assert [node.name for node in nodes(model, "Conv")] == ["a", "b", "b#1"]


class Attention(nn.Module):
    """Both operands of its products are activations; the first comes, in the end, from the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.q, self.k, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        scores = self.q(x) @ x.transpose(1, 2)
        return self.head(scores.softmax(-1) @ self.k(x))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("recurrent", [nn.RNN, nn.GRU, nn.LSTM])
def test_linears_that_the_exporter_makes_of_a_recurrent_layer_are_not_the_models(recurrent: type[nn.Module]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.linear = recurrent(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.reader(x)[0][:, -1])

    register_operators()
    model = build_onnx(trace(Reader(), (torch.randn(2, 3, 8),)))
    (found,) = (node for node in model.graph if node.name.partition("#")[0] == "linear")
    assert [value.name for value in found.inputs[1:]] == ["linear.weight", "linear.bias"]


def test_the_exporter_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Parameter(torch.randn(4, 8)), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.norm(self.table).T  # nothing but constants go into the norm

    register_operators()
    build_onnx(trace(Table(), (torch.randn(2, 8),)))
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


@pytest.mark.matrix
def test_a_product_of_activations_is_no_layer(compress_quickly: Callable[..., TracedModel]) -> None:
    model = build_onnx(compress_quickly(Attention(), torch.randint(0, 7, (16, 5)), bits=8))
    assert [layer_of(node) for node in nodes(model, "MatMul")] == [None, None]
    assert {layer_of(node) for node in nodes(model, "MatMulIntegerToFloat")} == {"q", "k", "head"}


@pytest.mark.slow
def test_a_float_layer_behind_a_grid_gets_the_grid_once_a_channel(exported: Exported) -> None:
    model = exported(lambda net, x: net.fc(torch.relu(net.b(torch.relu(net.a(x)))).mean((2, 3))), ignore=("b",))
    (convolution,) = (node for node in nodes(model, "Conv") if node.name == "b")
    dequantize = convolution.inputs[0].producer()
    assert dequantize is not None
    assert dequantize.attributes.get_int("axis", 0) == 1
    for value in dequantize.inputs[1:]:
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None
        assert tensor.numpy().shape == (WIDTH,)
        assert len(set(tensor.numpy().tolist())) == 1
