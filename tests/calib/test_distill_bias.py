"""Bias tuning: never worse on the samples held back, on class scores and on other outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compress.calib.distill_bias import distillation_loss, tune_biases
from compress.graph.traced import TracedModel, trace


def ignore(label: str) -> None:
    """No progress wanted."""


def pair(outputs: int, shift: float) -> tuple[TracedModel, TracedModel, Tensor]:
    """A float model, the same with its biases moved, and samples."""
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()
    x = torch.randn(120, 8)
    float_model = trace(module, (x[:2],))
    model = float_model.copy()
    for name in ("0.bias", "2.bias"):
        bias = float_model.tensor(name)
        model.set_tensor(name, bias + shift * torch.randn_like(bias))
    return float_model, model, x


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_the_loss_falls_and_is_what_is_returned(outputs: int) -> None:
    float_model, model, x = pair(outputs, 0.2)
    labels: list[str] = []
    before, after = tune_biases(float_model, model, ["0.bias", "2.bias"], (x,), 150, 0, labels.append)
    assert after < 0.9 * before
    held = torch.randperm(120, generator=torch.Generator().manual_seed(0))[:24]
    with torch.no_grad():
        loss = distillation_loss(model.module(x[held]), float_model.module(x[held]))
    assert float(loss) == pytest.approx(after, rel=1e-4)
    assert labels[-1] == "bias tuning 150/150"


def test_only_the_named_biases_move() -> None:
    float_model, model, x = pair(3, 0.2)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    tune_biases(float_model, model, ["2.bias"], (x,), 60, 0, ignore)
    moved = {name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"2.bias"}
    assert not any(tensor.requires_grad for tensor in model.module.buffers())


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_model_without_error_stays_as_it_is(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps this large can only harm; the untuned state is among those compared.
    monkeypatch.setattr("compress.calib.distill_bias._RATE", 100.0)
    float_model, model, x = pair(outputs, 0.0)
    wanted = model.tensor("0.bias").clone()
    before, after = tune_biases(float_model, model, ["0.bias", "2.bias"], (x,), 24, 0, ignore)
    assert after <= before
    assert torch.equal(model.tensor("0.bias"), wanted)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_samples(count: int) -> None:
    float_model, model, x = pair(3, 0.1)
    before, after = tune_biases(float_model, model, ["2.bias"], (x[:count],), 10, 0, ignore)
    assert after <= before


@pytest.mark.slow
def test_same_seed_same_biases() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        float_model, model, x = pair(3, 0.1)
        torch.manual_seed(len(results))
        tune_biases(float_model, model, ["2.bias"], (x,), 20, 5, ignore)
        results.append(model.tensor("2.bias"))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("shape", "reference"),
    [
        ((6, 4), lambda p, q: (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()),
        ((6, 1), lambda p, q: (p - q).square().mean()),
        ((6,), lambda p, q: (p - q).square().mean()),
        ((6, 4, 3), lambda p, q: (p - q).square().mean()),
    ],
    ids=["class scores", "one number", "one number, flat", "a map"],
)
def test_the_loss_of_each_kind_of_output(shape: tuple[int, ...], reference: Callable[[Tensor, Tensor], Tensor]) -> None:
    wanted, outputs = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(distillation_loss(outputs, wanted), reference(wanted, outputs))
    assert float(distillation_loss(wanted, wanted)) == pytest.approx(0, abs=1e-6)
