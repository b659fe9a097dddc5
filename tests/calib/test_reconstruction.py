"""Blocks reconstructed: better than rounding, never worse, resumable, and safe where a loss goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compress.calib import block_walk, reconstruction
from compress.calib.resume import ResumeStore
from compress.calib.soft import SoftWeight
from compress.data.samples import Samples, load_samples
from compress.intake.model import Intake, take_in
from compress.options import Options
from compress.pipeline.apply_plan import Compressed, apply_plan
from compress.plans.frame import make_plan
from compress.quant.grid import mse_grid, quantize
from compress.records.layers import QuantOption, Split
from tests.calib.test_tokens import samples as padded  # type: ignore[import-not-found]
from tests.every import every
from tests.networks import Encoder, Residual
from tests.sweep import sweep

METHODS = ("adaround", "brecq", "qdrop", "genie")


@pytest.fixture(scope="module")
def samples() -> Samples:
    generator = torch.Generator().manual_seed(21)
    coarse = torch.randn(96, 3, 4, 4, generator=generator)
    return load_samples(torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear"))


@pytest.fixture(scope="module")
def intake(samples: Samples) -> Intake:
    torch.manual_seed(20)
    return take_in(Residual().eval(), samples=samples)


def carried(
    intake: Intake, samples: Samples, method: str, store: ResumeStore, iterations: int = 120, **changes: object
) -> Compressed:
    options = Options(bits=2, act_bits=4, method=method, iterations=iterations, **changes)  # type: ignore[arg-type]
    plan = make_plan(intake, options, samples)
    return apply_plan(intake.traced.copy(), plan, samples.inputs, store, lambda label: None)


def error(intake: Intake, done: Compressed, x: Tensor) -> float:
    with torch.no_grad():
        wanted = intake.original(x)
        return float((done.model.module(x) - wanted).norm() / wanted.norm())


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_come_closer_than_rounding_leaves_them(
    method: str, intake: Intake, samples: Samples, tmp_path: Path
) -> None:
    rounded = carried(intake, samples, "mse", ResumeStore(tmp_path / "a", "a"), bias_correction=False)
    done = carried(intake, samples, method, ResumeStore(tmp_path / "b", "b"))
    if method != "adaround":  # alone, each of an untrained net's layers comes closer, and their sum may not
        assert error(intake, done, samples.inputs[0]) < 0.85 * error(intake, rounded, samples.inputs[0])
    notes = {result.layer: result.note or "" for result in done.layers}
    assert every(note.startswith("block ") for note in notes.values()), notes
    for note in notes.values():
        before, after = (float(part.rpartition(" ")[2].rstrip("%")) for part in note.split("%")[:2])
        assert after <= before


@pytest.mark.slow
def test_without_steps_it_is_rounding_to_nearest(intake: Intake, samples: Samples, tmp_path: Path) -> None:
    rounded = carried(intake, samples, "mse", ResumeStore(tmp_path / "a", "a"), bias_correction=False)
    done = carried(intake, samples, "genie", ResumeStore(tmp_path / "b", "b"), iterations=0)
    for layer in ("stem", "body.a", "body.b", "short", "head"):
        for part in ("packed", "scale"):
            name = f"{layer}.weight_{part}"
            assert torch.equal(done.model.tensor(name), rounded.model.tensor(name)), name


@pytest.mark.slow
def test_a_finished_block_is_not_learned_again_and_ends_in_the_same_bytes(
    intake: Intake, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = carried(intake, samples, "qdrop", ResumeStore(tmp_path / "whole", "x"), iterations=20)
    learned: list[str] = []

    def stopping(after: int) -> Callable[..., reconstruction.BlockSolution]:
        def run(problem: reconstruction.BlockProblem, *rest: object) -> reconstruction.BlockSolution:
            if len(learned) == after:
                raise KeyboardInterrupt
            learned.append(problem.block.name)
            return reconstruction.reconstruct(problem, *rest)  # type: ignore[arg-type]

        return run

    store = tmp_path / "continued"
    monkeypatch.setattr(block_walk, "reconstruct", stopping(1))
    with pytest.raises(KeyboardInterrupt):
        carried(intake, samples, "qdrop", ResumeStore(store, "x"), iterations=20)
    monkeypatch.setattr(block_walk, "reconstruct", stopping(-1))
    done = carried(intake, samples, "qdrop", ResumeStore(store, "x"), iterations=20)
    assert len(learned) == len(set(learned)) == 3
    states = (whole.model.module.state_dict(), done.model.module.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_start_and_says_so(
    intake: Intake, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = carried(intake, samples, "mse", ResumeStore(tmp_path / "a", "a"), bias_correction=False)
    plain = reconstruction.LearnedBlock.loss
    monkeypatch.setattr(reconstruction.LearnedBlock, "loss", lambda self, index: plain(self, index) * float("nan"))
    done = carried(intake, samples, "genie", ResumeStore(tmp_path / "b", "b"))
    assert every("not finite at step 0" in (result.note or "") for result in done.layers)
    assert torch.equal(done.model.tensor("head.weight_packed"), rounded.model.tensor("head.weight_packed"))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(("decided", "checks"), [(True, 3), (False, 10)])
def test_a_block_ends_early_once_its_codes_are_decided_and_nothing_gets_better(
    decided: bool, checks: int, intake: Intake, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, steps = reconstruction.LearnedBlock, []
    plain = block.loss

    def counted(self: reconstruction.LearnedBlock, index: Tensor) -> Tensor:
        steps.append(self.problem.block.output)
        return plain(self, index)

    monkeypatch.setattr(block, "loss", counted)
    monkeypatch.setattr(block, "hard_error", lambda self, index: 0.5)
    monkeypatch.setattr(block, "decided", lambda self: decided)
    done = carried(intake, samples, "genie", ResumeStore(tmp_path / "a", "a"), iterations=40)
    assert {steps.count(output) for output in set(steps)} == {4 * checks}
    assert every("nothing better than rounding" in (result.note or "") for result in done.layers)


def test_codes_are_decided_once_none_is_between_two() -> None:
    weight = torch.tensor([[0.3, -0.6, 0.45]])
    start = quantize(weight, *mse_grid(weight, 2, True), 2)
    soft = SoftWeight(weight, start, learn_scale=False)
    learned = SimpleNamespace(weights={"a": soft})
    assert not reconstruction.LearnedBlock.decided(learned)  # type: ignore[arg-type]
    with torch.no_grad():
        soft.logits.copy_(torch.tensor([[9.0, -9.0, 9.0]]))
    assert reconstruction.LearnedBlock.decided(learned)  # type: ignore[arg-type]


@pytest.mark.matrix
def test_fewer_samples_than_a_batch_and_constant_ones(intake: Intake, tmp_path: Path) -> None:
    few = load_samples(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)))
    done = carried(intake, few, "qdrop", ResumeStore(tmp_path / "a", "a"), iterations=10)
    assert error(intake, done, few.inputs[0]) < 2
    constant = load_samples(torch.full((40, 3, 8, 8), 0.3))
    done = carried(intake, constant, "genie", ResumeStore(tmp_path / "b", "b"), iterations=10)
    assert every(torch.isfinite(value).all() for value in done.model.module.state_dict().values())


@pytest.mark.matrix
def test_a_layer_done_by_two_thin_ones_is_learned_in_its_block(
    intake: Intake, samples: Samples, tmp_path: Path
) -> None:
    plan = make_plan(intake, Options(bits=4, act_bits=8, method="genie", iterations=120), samples)
    split = Split(layer="body.b", rank=4)
    (whole,) = (choice for choice in plan.choices if choice.layer == split.layer)
    thin = [whole.model_copy(update={"layer": part}) for part in split.parts]
    choices = (*(choice for choice in plan.choices if choice is not whole), *thin)
    plan = plan.model_copy(update={"choices": choices, "splits": (split,)})
    store = ResumeStore(tmp_path / "a", "a")
    done = apply_plan(intake.traced.copy(), plan, samples.inputs, store, lambda label: None)
    notes = {result.layer: result.note or "" for result in done.layers}
    assert notes["body.b.up"] == notes["body.b.down"] == notes["body.a"]
    assert notes["body.a"].startswith("block body")
    assert "nothing better" not in notes["body.a"]


@pytest.mark.slow
def test_inputs_whose_range_is_measured_as_it_runs(intake: Intake, samples: Samples, tmp_path: Path) -> None:
    store = ResumeStore(tmp_path / "a", "a")
    plan = make_plan(intake, Options(bits=3, dynamic=True, method="genie", iterations=20), samples)
    assert {choice.option.inputs for choice in plan.choices} == {"dynamic", "float"}
    done = apply_plan(intake.traced.copy(), plan, samples.inputs, store, lambda label: None)
    assert every((result.note or "").startswith("block ") for result in done.layers)


@pytest.mark.matrix
def test_padding_is_not_learned_from(tmp_path: Path) -> None:
    torch.manual_seed(5)
    ids, mask = padded()
    module = Encoder().eval()
    told: list[str] = []
    outputs = []
    for number, filler in enumerate((0, 29)):  # whatever stands behind a text
        given = load_samples((torch.where(mask > 0, ids, filler), mask))
        taken = take_in(module, samples=given)
        plan = make_plan(taken, Options(bits=3, method="qdrop", iterations=30, smoothquant=False), given)
        option = QuantOption(bits=3, symmetric=False)  # ranges of attention's products do count padding
        choices = [
            choice.model_copy(update={"option": option, "format": "float-weights"})
            for choice in plan.choices
            if choice.option.inputs == "static"
        ]
        plan = plan.model_copy(update={"choices": tuple(choices)})
        store = ResumeStore(tmp_path / str(number), "a")
        done = apply_plan(taken.traced.copy(), plan, given.inputs, store, lambda label: None, told.append)
        outputs.append(done.model.module.state_dict())
        assert {result.layer for result in done.layers} >= {"qkv", "out", "inner", "last"}
    assert any(label.startswith("block ") and label.endswith("s left") for label in told)
    for name, value in outputs[0].items():
        torch.testing.assert_close(value, outputs[1][name], rtol=1e-5, atol=1e-6, msg=name)


class Outputs(torch.nn.Module):
    """The number of a class, what it comes from, and a map from on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1)
        self.body, self.head = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        early = self.early(x)
        y = self.head(torch.relu(self.body(x)).mean((2, 3)))
        return early, y.argmax(1), y


@pytest.mark.slow
@sweep("method", [*METHODS, "metaaug"], sample=["qdrop"])
def test_no_output_is_forgotten(method: str, samples: Samples, tmp_path: Path) -> None:
    torch.manual_seed(2)
    intake = take_in(Outputs().eval(), samples=samples)
    done = carried(intake, samples, method, ResumeStore(tmp_path / "a", "a"), iterations=60)
    for result in done.layers:
        assert "nothing better" not in (result.note or "")
    (early,) = (result for result in done.layers if result.layer == "early")
    assert early.output_error is not None
    assert early.nearest_error is not None
    assert early.output_error < early.nearest_error


@pytest.mark.matrix
def test_an_activation_behind_another_layer(samples: Samples, tmp_path: Path) -> None:
    class Late(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.a = (torch.nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
            self.b, self.head = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            side = self.side(x)
            x = self.b(torch.relu(self.a(x)))
            return self.head(torch.relu(side) + torch.relu(x))

    torch.manual_seed(2)
    intake = take_in(Late().eval(), samples=samples)
    done = carried(intake, samples, "adaround", ResumeStore(tmp_path / "a", "a"), iterations=60, first_last_bits=2)
    for result in done.layers:
        assert result.output_error is not None
        assert result.nearest_error is not None
        assert result.output_error < 0.9 * result.nearest_error, result
