"""Sensitivities against the plain way: the whole base model run anew with one layer swapped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.calib.calibrate import calibrate
from compress.calib.output_loss import output_loss
from compress.calib.resume import ResumeStore
from compress.calib.sensitivity import BASE, FLOAT, measure_sensitivity, stored_losses
from compress.calib.trials import Trial
from compress.data.samples import load_samples
from compress.graph.layers import layer_calls
from compress.graph.quantizers import place_quantizers
from compress.graph.traced import TracedModel
from compress.intake.model import Intake, take_in
from compress.kernels.table import register_operators
from compress.options import Options
from compress.plans.frame import make_plan
from compress.quant.problem import Effort, LayerProblem
from compress.quant.rtn import MSE
from compress.records.layers import QuantOption
from tests.every import every

SAMPLES = 96


class Residual(nn.Module):
    """A residual block and a shared layer's two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def taken() -> Intake:
    torch.manual_seed(3)
    module = Residual()
    with torch.no_grad():
        module.head.weight *= 20  # scores that differ, as a trained model's do
    return take_in(module, samples=load_samples(torch.randn(SAMPLES, 2, 8, 8)))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(SAMPLES, 2, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def base(taken: Intake, inputs: Tensor, tmp_path_factory: pytest.TempPathFactory) -> TracedModel:
    register_operators()
    plan = make_plan(taken, Options(bits=8, method="mse", bias_correction=False), load_samples(inputs))
    model = taken.traced.copy()
    quantizers = place_quantizers(model, {choice.layer: 8 for choice in plan.choices}, torch.uint8)
    store = ResumeStore(tmp_path_factory.mktemp("base"), "base")
    computes = {choice.layer: "integer" for choice in plan.choices}
    calibrate(taken.traced, model, quantizers, plan, computes, (inputs,), store, lambda layer: None)
    return model


def measured(
    taken: Intake,
    base: TracedModel,
    inputs: Tensor,
    measure: str,
    trials: Sequence[Trial],
    store: ResumeStore,
    labels: Tensor | None = None,
    layers: Sequence[str] = ("stem", "body", "head"),
) -> dict[str, dict[str, float]]:
    return measure_sensitivity(
        taken.traced, base, dict.fromkeys(layers, trials), measure, (inputs,), labels,
        observer="minmax", iterations=4, seed=0, store=store, progress=lambda label: None,
    )  # fmt: skip


def swapped(base: TracedModel, layer: str, weight: Tensor, x: Tensor) -> Tensor:
    """The base's output with the dequantized weight of ``layer`` replaced, by an interpreter of its own."""
    call = layer_calls(base)[layer][0]

    class Swap(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            return weight if n is call.args[1] else super().run_node(n)

    with torch.no_grad():
        return Swap(base.module).run(x)


def divergence(wanted: Tensor, output: Tensor) -> float:
    p, q = F.softmax(wanted.double(), -1), F.softmax(output.double(), -1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["stem", "body", "head"])
def test_kl_equals_the_whole_model_run_anew(
    layer: str, taken: Intake, base: TracedModel, inputs: Tensor, tmp_path: Path
) -> None:
    option = QuantOption(bits=3, act_bits=8)
    losses = measured(taken, base, inputs, "kl", [Trial("mse", option)], ResumeStore(tmp_path / "s", "s"))[layer]
    weight = taken.traced.tensor(f"{layer}.weight")
    quantized = MSE.solve(LayerProblem(layer, weight, None, lambda x, *_: x), option, Effort(0, 0)).weight.dequantize()
    judged = inputs[SAMPLES - SAMPLES // 2 :]  # methods learn on the others
    wanted, output = swapped(base, layer, weight, judged), swapped(base, layer, quantized, judged)
    assert losses[FLOAT] == 0.0
    assert losses["mse W3A8"] == pytest.approx(divergence(wanted, output), rel=1e-2)
    assert losses["mse W3A8"] > losses[BASE] >= 0.0


@pytest.mark.slow
def test_error_falls_with_every_bit(taken: Intake, base: TracedModel, inputs: Tensor, tmp_path: Path) -> None:
    trials = [Trial("mse", QuantOption(bits=bits, act_bits=bits)) for bits in (2, 4, 6, 8)]
    for measure in ("kl", "output", "gram", "weight"):
        found = measured(taken, base, inputs, measure, trials, ResumeStore(tmp_path / measure, measure))
        for layer, losses in found.items():
            values = [losses[trial.key] for trial in trials]
            # Under what the base itself loses are the other layers' roundings, which may cancel a layer's own.
            floor = losses.get("base", 0.0)
            assert all(more <= max(less, floor) for less, more in pairwise(values)), (measure, layer, losses)
            assert values[-1] < 0.1 * values[0], (measure, layer, losses)


def test_loss_needs_labels_and_counts_them(taken: Intake, base: TracedModel, inputs: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        labels = taken.traced.module(inputs).argmax(1)
    trial = Trial("mse", QuantOption(bits=2, act_bits=2))
    found = measured(taken, base, inputs, "loss", [trial], ResumeStore(tmp_path / "s", "s"), labels)
    assert every(losses[trial.key] > losses[FLOAT] > 0 for losses in found.values()), found


def test_gram_is_the_layers_own_relative_output_error(
    taken: Intake, base: TracedModel, inputs: Tensor, tmp_path: Path
) -> None:
    option = QuantOption(bits=3, symmetric=True)  # weights alone
    losses = measured(taken, base, inputs, "gram", [Trial("mse", option)], ResumeStore(tmp_path / "s", "s"))["body"]
    with torch.no_grad():
        x = torch.relu(taken.original.stem(inputs))  # type: ignore[operator, union-attr]
        weight = taken.traced.tensor("body.weight")
        solved = MSE.solve(LayerProblem("body", weight, None, lambda x, *_: x), option, Effort(0, 0))
        plain, changed = (F.conv2d(x, w, padding=1) for w in (weight, solved.weight.dequantize()))
    expected = float((changed - plain).square().sum() / plain.square().sum())
    assert losses["mse W3"] == pytest.approx(expected, rel=1e-3)


def test_finished_layers_are_kept_and_new_trials_added(
    taken: Intake, base: TracedModel, inputs: Tensor, tmp_path: Path
) -> None:
    store = ResumeStore(tmp_path / "s", "s")
    first, second = (Trial("mse", QuantOption(bits=bits, act_bits=8)) for bits in (3, 5))
    alone = measured(taken, base, inputs, "kl", [first], store)["body"]
    both = measured(taken, base, inputs, "kl", [first, second], store)["body"]
    assert both[first.key] == alone[first.key]
    assert set(both) == {BASE, FLOAT, first.key, second.key}
    assert stored_losses(store, "body") == both


def test_whole_model_loss_is_zero_for_the_float_model_and_not_for_the_base(
    taken: Intake, base: TracedModel, inputs: Tensor
) -> None:
    assert output_loss(taken.traced, taken.traced, (inputs,), None, "kl") == 0.0
    whole = output_loss(taken.traced, base, (inputs,), None, "kl")
    with torch.no_grad():
        expected = divergence(taken.traced.module(inputs), base.module(inputs))
    assert whole == pytest.approx(expected, rel=1e-3)
    assert whole > 0.0
