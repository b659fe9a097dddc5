"""Statistics tuning: channels get their mean and deviation back, codes stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calib.statistics import tune_statistics
from compress.graph.fold import fold_batch_norm
from compress.graph.layers import layer_calls
from compress.graph.rewrite import set_bias, set_weight
from compress.graph.simplify import simplify
from compress.graph.traced import TracedModel, trace
from compress.kernels.table import register_operators
from compress.quant.grid import mse_grid, quantize
from compress.quant.weights import QuantizedWeight

register_operators()


def net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((2, 6), (6, 6), (6, 4)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Conv2d(4, 3, 1))
    module.train()
    with torch.no_grad():
        for _ in range(5):
            module(torch.randn(32, 2, 6, 6))
    return module.eval()


def folded(x: Tensor) -> TracedModel:
    traced = trace(net(), (x[:2],))
    simplify(traced)
    fold_batch_norm(traced)
    return traced


def quantized(float_model: TracedModel, bits: int) -> TracedModel:
    model = float_model.copy()
    for name in layer_calls(model):
        weight = float_model.tensor(f"{name}.weight")
        set_weight(model, name, quantize(weight, *mse_grid(weight, bits, True), bits), "float")
    return model


def moments(model: TracedModel, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    found: list[Tensor] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.name == layer_calls(model)[layer][0].name:
                found.append(value)
            return value

    with torch.no_grad():
        Recorder(model.module).run(x)
    values = found[0].double().movedim(1, 0).flatten(1)
    return values.mean(1), values.std(1, correction=0)


@pytest.mark.slow
def test_an_unquantized_net_is_left_alone(tmp_path: Path) -> None:
    # Weights that lie on their grid: nothing was lost, nothing may move.
    x = torch.randn(100, 2, 6, 6)
    float_model = folded(x)
    for name in layer_calls(float_model):
        weight = float_model.tensor(f"{name}.weight")
        float_model.set_tensor(f"{name}.weight", quantize(weight, *mse_grid(weight, 8, True), 8).dequantize())
    float_model.module.recompile()
    model = float_model.copy()
    for name in layer_calls(model):
        weight = float_model.tensor(f"{name}.weight")
        set_weight(model, name, quantize(weight, *mse_grid(weight, 8, True), 8), "float")
    before = model.run(iter([(x,)]))
    torch.testing.assert_close(before, float_model.run(iter([(x,)])), atol=1e-6, rtol=0)
    tune_statistics(float_model, model, list(layer_calls(model)), (x,), tmp_path)
    torch.testing.assert_close(model.run(iter([(x,)])), before, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_shifted_layer_is_put_right_and_its_codes_stay(tmp_path: Path) -> None:
    x = torch.randn(100, 2, 6, 6)
    float_model = folded(x)
    model = quantized(float_model, 4)
    layer = "3"
    # Shift the values of one layer by 0.1 steps: a bias a channel in proportion to the sum of its inputs.
    scale = model.tensor(f"{layer}.weight_scale")
    grid = QuantizedWeight.from_tensors(
        {part: model.tensor(f"{layer}.weight_{part}") for part in ("packed", "scale", "zero_point")}, 4, (6, 6, 3, 3)
    )
    shifted = (grid.dequantize() + 0.1 * scale[:, None, None, None]) * 1.1
    set_weight(model, layer, quantize(shifted, scale / 16, torch.full((6,), 128.0), 8), "float")

    codes = {name: model.tensor(f"{name}.weight_packed").clone() for name in layer_calls(model)}
    wanted_mean, wanted_deviation = moments(float_model, layer, x)
    mean, deviation = moments(model, layer, x)
    changed = tune_statistics(float_model, model, list(layer_calls(model)), (x,), tmp_path)
    mean_after, deviation_after = moments(model, layer, x)

    assert changed == ["0", "3", "6"], "the last convolution had no BatchNorm"
    assert float((mean_after - wanted_mean).norm()) < 0.5 * float((mean - wanted_mean).norm())
    assert float((deviation_after - wanted_deviation).norm()) < 0.5 * float((deviation - wanted_deviation).norm())
    # Exact, in fact, also over a chain of corrected layers.
    torch.testing.assert_close(mean_after, wanted_mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation_after, wanted_deviation, atol=1e-5, rtol=0)
    for name, before in codes.items():
        assert torch.equal(model.tensor(f"{name}.weight_packed"), before)
    assert list(tmp_path.rglob("*.samples")) == []


@pytest.mark.slow
def test_the_network_as_a_whole_gains(tmp_path: Path) -> None:
    x, held = torch.randn(200, 2, 6, 6).split(100)
    float_model = folded(x)
    model = quantized(float_model, 3)
    wanted = float_model.run(iter([(held,)]))
    before = float((model.run(iter([(held,)])) - wanted).square().mean())
    tune_statistics(float_model, model, list(layer_calls(model)), (x,), tmp_path)
    assert float((model.run(iter([(held,)])) - wanted).square().mean()) < before


@pytest.mark.slow
def test_a_dead_channel_keeps_its_scale_and_gets_its_mean(tmp_path: Path) -> None:
    x = torch.randn(70, 2, 6, 6)
    float_model = folded(x)
    dead = float_model.tensor("3.weight").clone()
    dead[2] = 0
    float_model.set_tensor("3.weight", dead)
    model = quantized(float_model, 4)
    scale = model.tensor("3.weight_scale").clone()
    set_bias(model, "3", float_model.tensor("3.bias") + 1)
    tune_statistics(float_model, model, ["3"], (x,), tmp_path)
    assert float(model.tensor("3.weight_scale")[2]) == float(scale[2])
    assert float(model.tensor("3.bias")[2]) == float(float_model.tensor("3.bias")[2])
    assert bool(torch.isfinite(model.tensor("3.bias")).all())


@pytest.mark.slow
def test_a_factor_has_limits(tmp_path: Path) -> None:
    x = torch.randn(70, 2, 6, 6)
    float_model = folded(x)
    model = quantized(float_model, 8)
    scale = model.tensor("0.weight_scale").clone()
    model.set_tensor("0.weight_scale", scale / 100)
    tune_statistics(float_model, model, ["0"], (x,), tmp_path)
    torch.testing.assert_close(model.tensor("0.weight_scale"), scale / 50)
