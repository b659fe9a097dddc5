"""The walk over the graph: every layer of every topology, errors measured alike, sequential inputs, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calib.calibrate import LayerResult
from compress.calib.resume import ResumeStore
from compress.data.samples import load_samples
from compress.errors import InputError
from compress.intake.model import Intake, take_in
from compress.options import Options
from compress.pipeline.apply_plan import Compressed, apply_plan
from compress.plans.frame import make_plan
from tests.every import every
from tests.networks import FixedBatch, Masked, SequenceFirst, Shared, TwoInputs
from tests.sweep import sweep


def calibrated(
    intake: Intake,
    x: Tensor | tuple[Tensor, ...] | None,
    folder: Path,
    done: list[str] | None = None,
    **options: object,
) -> Compressed:
    samples = None if x is None else load_samples(x)
    plan = make_plan(intake, Options(**{"iterations": 20, **options}), samples)  # type: ignore[arg-type]
    store = ResumeStore(folder, "same")
    inputs = None if samples is None else samples.inputs
    return apply_plan(intake.traced.copy(), plan, inputs, store, (done if done is not None else []).append)


class Branches(nn.Module):
    """Two branches whose quantizers run before either reader does, as in an inception block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return self.head((self.c(a) + self.d(b)).mean((2, 3)))


NETS = {
    "branches": (Branches, ((2, 6, 6),)),
    "shared": (Shared, ((6,),)),
    "two inputs": (TwoInputs, ((6,), (4,))),
    "masked": (Masked, ((5, 6),)),
    "sequence first": (SequenceFirst, ((5, 6),)),
    "fixed batch": (FixedBatch, ((6,),)),
}


@pytest.mark.slow(cases=2)
@sweep("method", ["mse", "adaquant", "adaquant-parallel", "adaround", "genie"], sample=["mse"])
@pytest.mark.parametrize("net", NETS)
def test_every_topology_calibrates_close_to_float(net: str, method: str, tmp_path: Path) -> None:
    make, shapes = NETS[net]
    module = make().eval()
    x = tuple(torch.randn(70, *shape) for shape in shapes)
    intake = take_in(module, samples=load_samples(x))
    done: list[str] = []
    result = calibrated(
        intake, x, tmp_path, done, bits=8, method=method, statistics_tuning=True, bias_tuning=net == "fixed batch"
    )
    names = [layer.name for layer in intake.layers]
    assert [layer.layer for layer in result.layers] == names
    assert done[: len(names)] == names
    size = 64 if intake.traced.dynamic_batch else 1
    parts = list(zip(*(each.split(size) for each in x), strict=True))
    with torch.no_grad():
        wanted = torch.cat([module(*part) for part in parts])
    got = result.model.run(iter(parts))
    assert float((got - wanted).norm() / wanted.norm()) < 0.03
    assert every(layer.output_error is not None and layer.output_error < 1e-3 for layer in result.layers)
    assert list(tmp_path.rglob("*.samples")) == []


@pytest.mark.slow
def test_a_layer_called_twice_falls_back_and_says_so(tmp_path: Path) -> None:
    x = torch.randn(70, 6)
    intake = take_in(Shared(), samples=load_samples(x))
    by_name = {layer.layer: layer for layer in calibrated(intake, x, tmp_path, method="adaquant").layers}
    assert by_name["twice"].note == "called 2 times: scales by squared error instead of adaquant"
    assert by_name["twice"].output_error == by_name["twice"].nearest_error
    assert "called" not in (by_name["first"].note or "")


def chain(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    ).eval()


@pytest.mark.slow
def test_error_is_measured_alike_for_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Made to find nothing, all methods leave the same weights: then every measured number has to be the same.
    x = torch.randn(100, 16)
    intake = take_in(chain(0), samples=load_samples(x))
    results: dict[str, list[LayerResult]] = {}
    for method in ("mse", "adaquant", "adaquant-parallel"):
        chosen = {"method": method, "iterations": 0, "bias_correction": False, "bits": 3, "act_bits": 4}
        results[method] = calibrated(intake, x, tmp_path / method, first_last_bits=2, **chosen).layers
    for layers in results.values():
        assert [layer.output_error for layer in layers] == [layer.nearest_error for layer in layers]
        assert [layer.output_error for layer in layers] == [layer.output_error for layer in results["mse"]]
        assert [layer.weight_error for layer in layers] == [layer.weight_error for layer in results["mse"]]
    # The input comes from the quantized prefix, so errors add up along the chain.
    last = results["mse"][-1].output_error
    assert last is not None
    module = chain(0)
    with torch.no_grad():
        alone = calibrated(
            take_in(nn.Sequential(module[6]), samples=load_samples(module[:6](x))), module[:6](x), tmp_path / "alone",
            method="mse", bias_correction=False, bits=3, act_bits=4, first_last_bits=2,
        ).layers[0].output_error  # fmt: skip
    assert alone is not None
    assert last > 1.5 * alone


@pytest.mark.slow
def test_the_error_is_that_of_the_finished_prefix(tmp_path: Path) -> None:
    module, x = chain(1), torch.randn(60, 16)
    intake = take_in(module, samples=load_samples(x))
    result = calibrated(intake, x, tmp_path, method="minmax", bias_correction=False, bits=4)
    with torch.no_grad():
        wanted, got = module(x), result.model.module(x)
    measured = result.layers[-1].output_error
    assert measured == pytest.approx(float((got - wanted).square().sum() / wanted.square().sum()), rel=1e-2)


@pytest.mark.matrix
def test_sequential_is_no_worse_than_parallel(tmp_path: Path) -> None:
    table = []
    for seed in range(5):
        module = chain(seed)
        x, held = torch.randn(512, 16).split(256)
        intake = take_in(module, samples=load_samples(x))
        with torch.no_grad():
            wanted = module(held)
            errors = []
            for method in ("mse", "adaquant-parallel", "adaquant"):
                with torch.enable_grad():
                    result = calibrated(
                        intake, x, tmp_path / f"{method}{seed}",
                        method=method, iterations=150, bits=3, act_bits=4, first_last_bits=3,
                    )  # fmt: skip
                errors.append(float((result.model.module(held) - wanted).square().mean()))
        table.append(errors)
    mean = torch.tensor(table).mean(0)
    assert mean[2] <= mean[1] * 1.02, table
    assert mean[2] < mean[0], table


@pytest.mark.slow
def test_sequential_uses_every_sample_of_the_quantized_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.calib import adaquant

    module, x = chain(2), torch.randn(130, 16)  # three batches of the frontier
    intake = take_in(module, samples=load_samples(x))
    seen: dict[str, Tensor] = {}
    solve = adaquant.AdaQuant.solve

    def spy(self: adaquant.AdaQuant, problem: object, *rest: object) -> object:
        rows = problem.inputs  # type: ignore[attr-defined]
        seen[problem.name] = rows.take(torch.arange(len(rows)))  # type: ignore[attr-defined]
        return solve(self, problem, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(adaquant.AdaQuant, "solve", spy)
    result = calibrated(intake, x, tmp_path, method="adaquant", bits=2, first_last_bits=2)
    with torch.no_grad():
        hidden = torch.relu(module[0](x))
    difference = (seen["2"] - hidden).flatten(1).norm(dim=1) / hidden.norm(dim=1)
    assert len(difference) == 130
    assert float(difference.min()) > 1e-3, "some samples are still the float model's"
    # And it is the finished prefix: the second layer's input in the compressed graph, before its own grid.
    first = result.model.graph
    recorded: list[Tensor] = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and n.target is torch.ops.aten.linear.default:
                recorded.append(value)  # type: ignore[arg-type]
            return value

    with torch.no_grad():
        Recorder(result.model.module, graph=first).run(x)
    # Biases are rounded to the accumulator's step at the very end; beside the layer's own error that is nothing.
    distance = (seen["2"] - torch.relu(recorded[0])).norm(dim=1) / hidden.norm(dim=1)
    assert bool((distance < 0.1 * difference).all())


@pytest.mark.slow
@sweep("method", ["adaquant", "adaquant-parallel", "mse"], sample=["adaquant"])
def test_a_continued_walk_ends_in_the_same_place(method: str, tmp_path: Path) -> None:
    make, shapes = NETS["branches"]
    module, x = make(), torch.randn(70, *shapes[0])
    intake = take_in(module, samples=load_samples(x))
    whole = calibrated(intake, x, tmp_path / "whole", method=method)

    class Stopped(Exception):
        pass

    def stop(label: str) -> None:
        if label == "b":
            raise Stopped

    samples = load_samples(x)
    plan = make_plan(intake, Options(method=method, iterations=20), samples)
    with pytest.raises(Stopped):
        apply_plan(intake.traced.copy(), plan, samples.inputs, ResumeStore(tmp_path / "part", "same"), stop)
    assert len(list((tmp_path / "part").glob("*.safetensors"))) == 3
    continued = calibrated(intake, x, tmp_path / "part", method=method)
    assert continued.layers == whole.layers
    wanted, got = whole.model.module.state_dict(), continued.model.module.state_dict()
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dead input", "dead channel"])
def test_a_bias_that_outweighs_its_layer_survives(what: str, tmp_path: Path) -> None:
    # An accumulator's step of next to nothing would clip the bias, and nobody would see it: parity still holds.
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        if what == "dead input":
            module[0].bias.fill_(-100)
        else:
            module[2].weight[:4] = 0
            module[2].weight[4] = 1e-20
        module[2].bias.uniform_(0.5, 1)
    x = torch.randn(64, 8)
    result = calibrated(take_in(module, samples=load_samples(x)), x, tmp_path, method="mse", bits=8)
    with torch.no_grad():
        wanted = module(x)
        assert float((result.model.module(x) - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.slow
def test_overflow_names_the_layer_or_the_normalisation(tmp_path: Path) -> None:
    module, x = chain(0), torch.randn(70, 16)
    x[66] *= 1e38
    with pytest.raises(InputError, match=r"layer 0: the quantized output is not finite|overflows on the calibration"):
        calibrated(take_in(module, samples=load_samples(x)), x, tmp_path)


@pytest.mark.slow
def test_weights_only_needs_no_data_and_measures_weights(tmp_path: Path) -> None:
    result = calibrated(take_in(chain(0), input_shape=(16,)), None, tmp_path)
    assert every(layer.output_error is None and layer.weight_error > 0 for layer in result.layers)
    assert not any("fake_quantize" in str(node.target) for node in result.model.graph.nodes)
