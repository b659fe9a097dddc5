from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import compress
from compress.exporters.session import open_session
from compress.graph.layers import list_layers
from compress.graph.rewrite import set_bias
from compress.graph.simplify import simplify
from compress.graph.traced import trace


class Product(nn.Module):
    """``x @ w``, as models write it that keep their weights themselves."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(dim, width) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Rows(nn.Module):
    """GPT-2's ``Conv1D``: rows, ``addmm``, and the shape again."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, width) / dim**0.5)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view((*x.size()[:-1], rows.size(-1)))


class Standardised(nn.Conv2d):
    """Its weight is normalised at every call."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), self.bias)


def sequences() -> Tensor:
    return torch.randn(6, 5, 16)


CASES = {
    "product": (lambda: Product(16, 24), sequences, "0.w"),
    "rows": (lambda: Rows(16, 24), sequences, "0"),
    "weight norm": (lambda: weight_norm(nn.Linear(16, 24)), sequences, "0"),
    "spectral norm": (lambda: spectral_norm(nn.Linear(16, 24)), sequences, "0"),
    "convolution, weight norm": (lambda: weight_norm(nn.Conv1d(5, 8, 3)), sequences, "0"),
    "standardised": (lambda: Standardised(3, 8, 3), lambda: torch.randn(6, 3, 8, 8), "0"),
}


@pytest.mark.parametrize("case", CASES)
def test_its_weight_is_stored_and_the_function_stays(case: str) -> None:
    make, inputs, name = CASES[case]
    module, x = nn.Sequential(make(), nn.ReLU()).eval(), inputs()
    traced = trace(module, (x,))
    simplify(traced)
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), module(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(traced.module(x[:3]), module(x[:3]), rtol=1e-5, atol=1e-6)
    assert [(layer.name, layer.refusal) for layer in list_layers(traced)] == [(name, None)]
    assert not traced.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)


def test_a_module_that_is_called_twice_has_its_weight_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = weight_norm(nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.f(self.f(x).relu())

    traced = trace(Twice().eval(), (sequences(),))
    simplify(traced)
    assert [(layer.name, layer.calls) for layer in list_layers(traced)] == [("f", 2)]


def test_two_weights_made_of_one_parameter_stay_two() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight + 1), self.weight * 2) + F.linear(x, self.weight)

    module, x = Both().eval(), sequences()
    traced = trace(module, (x,))
    simplify(traced)
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), module(x))
    assert len(list_layers(traced)) == 3
    assert not any(layer.refusal for layer in list_layers(traced))


def test_a_constant_that_was_not_trained_is_no_weight() -> None:
    class Filters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.randn(16, 8))
            self.f = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x @ self.bank)

    traced = trace(Filters().eval(), (sequences(),))
    simplify(traced)
    assert [layer.name for layer in list_layers(traced)] == ["f"]


def test_a_parameter_that_something_else_reads_stays_where_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + self.w[0]

    module, x = Tied().eval(), sequences()
    traced = trace(module, (x,))
    simplify(traced)
    (layer,) = list_layers(traced)
    assert (layer.name, layer.kind, layer.parameters) == ("w", "matmul", 256)
    assert layer.refusal is not None, "it is listed as it stands"
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), module(x))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named_with_the_reason(recurrent: type[nn.Module]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = recurrent(16, 8, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.reader(x)[0].mean(1))

    traced = trace(Reader().eval(), (sequences(),))
    simplify(traced)
    found = {layer.name: layer.refusal for layer in list_layers(traced)}
    assert found == {"reader": "recurrent layers are not compressed yet", "head": None}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("case", ["product", "rows", "weight norm"])
def test_it_is_quantized_as_a_linear_is(case: str, tmp_path: Path) -> None:
    module = nn.Sequential(CASES[case][0](), nn.ReLU(), nn.Linear(24, 4))
    x = torch.randn(64, 5, 16)
    result = compress.quantize(module, calib=x, bits=8, method="mse", out=tmp_path / "out")
    assert result.report.export_check.integer_layers == 2
    session = open_session(tmp_path / "out/model.onnx", "ORT_ENABLE_ALL", threads=1)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = module(x).numpy()
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_module_whose_weight_was_computed_at_a_call_is_taken_as_it_is() -> None:
    """The older ``weight_norm`` leaves the weight of its last call in the module, which copy refuses."""
    with pytest.warns(FutureWarning):
        module = nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 24)), nn.ReLU(), nn.Linear(24, 4))
    module(torch.randn(2, 16))
    inspection = compress.inspect(module, input_shape=(16,))
    assert [layer.name for layer in inspection.layers] == ["0", "2"]
    assert not any(layer.refusal for layer in inspection.layers)


class ComputedBias(nn.Module):
    """BEiT's: of queries, keys and values only the outer thirds have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 24, bias=False)
        self.q, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, torch.cat([self.q, torch.zeros_like(self.q), self.v]))


class BiasOfTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.conv.weight, x[:, 0, :8].mean(0))


class TwoBiases(nn.Module):
    """One weight, called with two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)
        self.other = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.f(x).relu(), self.f.weight, self.other)


class AddedLater(nn.Module):
    """A module's bias that is no bias of its layer: whatever the layer gains must not take its place."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.f.weight).relu() + self.f.bias


class TiedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class CrossAttention(nn.Module):
    """Queries from one place, keys and values from another: parts of one weight and of one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, :2], x, x, need_weights=False)[0]


BIASES = {
    "computed": (ComputedBias, ["qkv"]),
    "of the input": (BiasOfTheInput, ["conv"]),
    "two of one layer": (TwoBiases, ["f"]),
    "added later": (AddedLater, ["f"]),
    "tied": (TiedBias, ["a", "b"]),
    "cross-attention": (CrossAttention, ["a", "a.linear_1", "a.out_proj"]),
}


@pytest.mark.parametrize("case", BIASES)
@torch.no_grad()
def test_biases_of_all_kinds_leave_the_function(case: str) -> None:
    make, names = BIASES[case]
    module, x = make().eval(), sequences()
    traced = trace(module, (x,))
    simplify(traced)
    torch.testing.assert_close(traced.module(x), module(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(traced.module(x[:3]), module(x[:3]), rtol=1e-5, atol=1e-6)
    assert [(layer.name, layer.refusal) for layer in list_layers(traced)] == [(name, None) for name in names]


@torch.no_grad()
def test_a_layers_new_bias_is_nobody_elses() -> None:
    x, shift = sequences(), torch.randn(16)
    tied, added = TiedBias().eval(), AddedLater().eval()
    for module, layer, expected in (
        (tied, "a", tied.b(F.linear(x, tied.a.weight, shift).relu())),
        (added, "f", F.linear(x, added.f.weight, shift).relu() + added.f.bias),
    ):
        traced = trace(module, (x,))
        simplify(traced)
        set_bias(traced, layer, shift)
        torch.testing.assert_close(traced.module(x), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_bias_of_fused_attention_can_be_replaced() -> None:
    module, x, bias = nn.MultiheadAttention(16, 2, batch_first=True), sequences(), torch.randn(48)
    traced = trace(SelfAttention(module).eval(), (x,))
    simplify(traced)
    set_bias(traced, "a.in_proj_weight", bias)
    module.in_proj_bias.copy_(bias)
    torch.testing.assert_close(traced.module(x), module(x, x, x)[0], rtol=1e-4, atol=1e-5)


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.a = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x, x, x, need_weights=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", BIASES)
def test_biases_of_all_kinds_are_quantized(case: str) -> None:
    make, names = BIASES[case]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), make()).eval()
    x = torch.cat([sequences(), sequences(), sequences()])
    found = compress.quantize(
        module, calib=x, bits=8, first_last_bits=7, act_bits=8, method="minmax", bench=False, iterations=2
    )
    assert len(found.report.layers) == 1 + len(names)  # a part's name holds a number that depends on the whole
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), module(x), rtol=0, atol=0.1)
