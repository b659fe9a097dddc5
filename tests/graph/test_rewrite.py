from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.graph.layers import is_stored, layer_calls
from compress.graph.quantizers import fake_quantize_op, place_quantizers
from compress.graph.rewrite import (
    absorb_activations,
    input_quantizer,
    layer_bias,
    set_bias,
    set_grid,
    set_weight,
    store_biases,
)  # fmt: skip
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators
from compress.quant.grid import min_max_grid, quantize
from compress.quant.weights import QuantizedWeight
from tests.every import every


def nearest(weight: Tensor, bits: int = 4) -> QuantizedWeight:
    return quantize(weight, *min_max_grid(weight, bits, True), bits)


def traced_of(module: nn.Module, *shape: int) -> TracedModel:
    register_operators()
    traced = trace(module.eval(), (torch.randn(2, *shape),))
    simplify(traced)
    return traced


def integer_model(module: nn.Module, *shape: int, scale: float = 0.05, zero: int = 0) -> TracedModel:
    """Every layer integer at 4 bits, every grid the same."""
    traced = traced_of(module, *shape)
    names = list(layer_calls(traced))
    for quantizer in place_quantizers(traced, dict.fromkeys(names, 8), torch.uint8):
        set_grid(traced, quantizer.name, torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8))
    for name in names:
        set_weight(traced, name, nearest(traced.tensor(f"{name}.weight")), "integer")
    return traced


@torch.no_grad()
def test_set_weight_computes_what_the_codes_stand_for() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    traced = traced_of(module, 3, 8, 8)
    weight = nearest(module[2].weight.detach())
    set_weight(traced, "2", weight, "float")
    x = torch.randn(3, 3, 8, 8)
    module[2].weight.copy_(weight.dequantize())
    assert torch.equal(traced.module(x), module(x))
    assert "2.weight" not in traced.module.state_dict()
    assert list(layer_calls(traced)) == ["0", "2"]


@torch.no_grad()
def test_set_weight_twice_replaces_everything() -> None:
    module = nn.Sequential(nn.Linear(6, 5))
    traced = traced_of(module, 6)
    set_weight(traced, "0", nearest(module[0].weight.detach(), 3), "integer")
    last = nearest(torch.randn(5, 6), 7)
    set_weight(traced, "0", last, "float")
    (call,) = layer_calls(traced)["0"]
    assert call.args[1].args[3:] == (7, [5, 6], "float", None)
    assert len(traced.graph.find_nodes(op="call_function", target=call.args[1].target)) == 1
    x = torch.randn(3, 6)
    torch.testing.assert_close(traced.module(x), nn.functional.linear(x, last.dequantize(), module[0].bias))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)) * 3.0)


@torch.no_grad()
def test_set_weight_reaches_every_call_of_a_shared_layer() -> None:
    module = Shared()
    traced = traced_of(module, 4)
    weight = nearest(module.fc.weight.detach())
    set_weight(traced, "fc", weight, "float")
    assert every(is_stored(call.args[1]) for call in layer_calls(traced)["fc"])
    module.fc.weight.copy_(weight.dequantize())
    x = torch.randn(3, 4)
    assert torch.equal(traced.module(x), module(x))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_set_bias(bias: bool) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=bias))
    traced = traced_of(module, 3, 8, 8)
    x, new = torch.randn(3, 3, 8, 8), torch.randn(4)
    set_bias(traced, "0", new)
    torch.testing.assert_close(traced.module(x), nn.functional.conv2d(x, module[0].weight, new, stride=2))
    (call,) = layer_calls(traced)["0"]
    assert torch.equal(layer_bias(traced, call), new)  # type: ignore[arg-type]


@torch.no_grad()
def test_biases_move_by_less_than_half_a_step() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    traced = integer_model(module, 3, 8, 8)
    x = torch.randn(3, 3, 8, 8)
    before = traced.module(x)
    steps = [traced.tensor(f"{name}.weight_scale") * 0.05 for name in ("0", "2")]
    store_biases(traced)
    for name, step in zip(("0", "2"), steps, strict=True):
        (call,) = layer_calls(traced)[name]
        codes = traced.tensor(f"{name}.bias_codes")
        assert codes.dtype == torch.int32
        assert str(call.args[2].target) == "compress.dequantize_bias.default"
        assert ((codes * step - getattr(module, name).bias).abs() <= step * 0.501).all()
    assert "0.bias" not in traced.module.state_dict()
    torch.testing.assert_close(traced.module(x), before, rtol=0, atol=0.11)  # two steps of the last grid


def test_a_float_layers_bias_stays() -> None:
    module = nn.Sequential(nn.Linear(4, 3))
    traced = traced_of(module, 4)
    set_weight(traced, "0", nearest(module[0].weight.detach()), "float")
    store_biases(traced)
    (call,) = layer_calls(traced)["0"]
    assert call.args[2].op == "get_attr"


@torch.no_grad()
def test_a_dead_channel_keeps_its_bias() -> None:
    """BatchNorm with gamma near 0 leaves weights of nothing and a bias that does not fit into int32 on their grid."""
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    module[0].weight[0] = 0.0
    module[0].weight[1] *= 1e-9
    module[0].bias[:] = torch.tensor([1.5, -2.0, 3.0, 0.1, 0.0, 2.5])
    traced = integer_model(module, 3, 8, 8)
    before = nearest(module[0].weight.detach())
    store_biases(traced)
    (call,) = layer_calls(traced)["0"]
    got = torch.ops.compress.dequantize_bias(
        traced.tensor("0.bias_codes"), torch.tensor(0.05), traced.tensor("0.weight_scale")
    )
    torch.testing.assert_close(got, module[0].bias.detach(), rtol=1e-3, atol=5e-3)
    assert int(traced.tensor("0.bias_codes").abs().max()) <= 2**30 + 1
    # Living channels keep their codes and scales.
    assert torch.equal(traced.tensor("0.weight_scale")[2:], before.scale[2:])
    stored = call.args[1]
    parts = {part: traced.tensor(f"0.weight_{part}") for part in ("packed", "scale", "zero_point")}
    after = QuantizedWeight.from_tensors(parts, stored.args[3], tuple(stored.args[4]))
    assert torch.equal(after.codes[2:], before.codes[2:])
    torch.testing.assert_close(after.dequantize()[:2], torch.zeros(2, 3, 3, 3), rtol=0, atol=1e-7)


@torch.no_grad()
def test_a_shared_layer_with_a_dead_channel_keeps_its_bias_in_both_calls() -> None:
    module = Shared()
    module.fc.weight[0] = 0.0
    module.fc.bias[0] = 2.0
    traced = integer_model(module, 4)
    # The second call's input grid is the finer one, so it needs the coarser weight grid.
    first, second = layer_calls(traced)["fc"]
    for call, scale in ((first, 0.05), (second, 0.0005)):
        quantizer = input_quantizer(call)
        assert quantizer is not None
        set_grid(
            traced, str(quantizer.args[1].target).removesuffix(".scale"), torch.tensor(scale), torch.tensor(0).byte()
        )
    store_biases(traced)
    for call, scale in ((first, 0.05), (second, 0.0005)):
        codes, _, weight_scale = (traced.tensor(str(part.target)) for part in call.args[2].args)
        got = torch.ops.compress.dequantize_bias(codes, torch.tensor(scale), weight_scale)
        torch.testing.assert_close(got, module.fc.bias.detach(), rtol=1e-3, atol=5e-3)


def absorbed(
    activation: nn.Module, scale: float, zero: int = 0, bits: int = 8
) -> tuple[bool, TracedModel, TracedModel]:
    """Whether the activation went; the graph before and after."""
    traced = traced_of(nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2)), 4)
    for quantizer in place_quantizers(traced, {"0": 8, "2": bits}, torch.uint8):
        set_grid(traced, quantizer.name, torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8))
    before = traced.copy()
    absorb_activations(traced)
    left = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    left += traced.graph.find_nodes(op="call_function", target=torch.ops.aten.hardtanh.default)
    return not left, before, traced


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "scale", "zero", "bits", "goes"),
    [
        (nn.ReLU(), 0.02, 0, 8, True),
        (nn.ReLU(), 3.0, 0, 8, True),
        (nn.ReLU(), 0.3, 0, 4, True),
        (nn.ReLU(), 0.02, 1, 8, False),  # the grid has a negative point
        (nn.ReLU6(), 6 / 255, 0, 8, True),
        (nn.ReLU6(), 0.4, 0, 4, True),
        (nn.ReLU6(), 0.02, 0, 8, True),  # ends at 5.1: the quantizer clips first
        (nn.ReLU6(), 0.03, 0, 8, False),  # ends at 7.65
        (nn.ReLU6(), 6 / 255, 1, 8, False),
        (nn.Hardtanh(0.0, 1.0), 1 / 255, 0, 8, True),
        (nn.Hardtanh(0.0, 1.0), 0.01, 0, 8, False),  # ends at 2.55, within ReLU6 but not within this
        (nn.Hardtanh(-1.0, 1.0), 0.003, 0, 8, True),
        (nn.Hardtanh(-1.0, 1.0), 0.01, 0, 8, False),
        (nn.Hardtanh(0.2, 6.0), 0.02, 0, 8, False),  # its lower end is inside the grid
    ],
)  # fmt: skip
@torch.no_grad()
def test_an_activation_goes_exactly_when_the_quantizer_clips_the_same(
    activation: nn.Module, scale: float, zero: int, bits: int, goes: bool
) -> None:
    gone, before, after = absorbed(activation, scale, zero, bits)
    assert gone == goes
    x = torch.randn(400, 4) * 12
    assert torch.equal(after.module(x), before.module(x))


def test_a_relu_that_someone_else_reads_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(x)
            return self.a(y), torch.tanh(y)

    traced = integer_model(Twice(), 3, 4, 4)
    absorb_activations(traced)
    assert len(traced.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)) == 1


@pytest.mark.slow
def test_input_quantizer_looks_through_zero_padding_only() -> None:
    traced = integer_model(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)), 3, 8, 8)
    (call,) = layer_calls(traced)["1"]
    found = input_quantizer(call)
    assert found is not None
    assert found.target is fake_quantize_op()
    plain = traced_of(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), 3, 8, 8)
    assert input_quantizer(layer_calls(plain)["1"][0]) is None
