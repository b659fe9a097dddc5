"""The loop under ``compress lowrank train``: it learns, goes on after a kill to the same bytes, and stops at NaN."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.training.data import TrainingData
from compress.training.loop import Nothing, Recipe, evaluate, fit
from compress.training.lowrank.family import read_family
from compress.training.lowrank.job import LowRankOptions, train_lowrank
from tests.every import every
from tests.networks import normed_mlp


def data(count: int = 256) -> TrainingData:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 8, generator=generator)
    return TrainingData((x,), (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())


def tensors(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def test_it_learns_classes_and_numbers() -> None:
    module, samples = normed_mlp(), data()
    history, stopped = fit(module, samples, Recipe(epochs=12, batch=32, rate=0.1))
    assert stopped is None
    assert [each.number for each in history] == list(range(1, 13))
    assert evaluate(module, samples) > 0.9
    numbers = TrainingData(samples.inputs, samples.inputs[0][:, :3] * 2)
    module = normed_mlp()
    before = evaluate(module, numbers)
    fit(module, numbers, Recipe(epochs=12, batch=32))
    assert evaluate(module, numbers) < 0.3 * before


class Killed(Exception):
    """In place of a signal."""


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = Recipe(epochs=5, batch=32)
    whole = normed_mlp()
    fit(whole, data(), recipe)

    def kill(done: int, total: int, loss: float) -> None:
        if done == total // 2:
            raise Killed

    with contextlib.suppress(Killed):
        fit(normed_mlp(), data(), recipe, checkpoint=tmp_path / "c.pt", progress=kill)
    continued = normed_mlp()
    history, _ = fit(continued, data(), recipe, checkpoint=tmp_path / "c.pt")
    assert len(history) == 5
    assert every(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(continued), strict=True))
    with pytest.raises(InputError, match="holds the checkpoint of another run"):
        fit(normed_mlp(), data(), Recipe(epochs=6, batch=32), checkpoint=tmp_path / "c.pt")


@pytest.mark.matrix
def test_overwrite_goes_on_with_the_same_run_and_throws_another_away(tmp_path: Path) -> None:
    given = (data().inputs[0], data().labels)

    def train(epochs: int, stop: int = 1000, overwrite: bool = True) -> int:
        """Steps that were taken; Ctrl-C at ``stop`` of them."""
        steps = 0

        def count(what: str, done: int, total: int) -> None:
            nonlocal steps
            steps += what.startswith("training")
            if steps == stop:
                raise Killed

        options = LowRankOptions(smallest=0.8, overwrite=overwrite)
        recipe = Recipe(epochs=epochs, batch=64)
        with contextlib.suppress(Killed):
            train_lowrank(normed_mlp(), given, tmp_path / "out", recipe=recipe, options=options, progress=count)
        return steps

    for _ in range(2):  # a new folder's, and one's that is there
        assert train(3, stop=6) == 6
        assert train(3) == 8, "from the second epoch on"
    train(3, stop=6)
    with pytest.raises(InputError, match="exists already"):
        train(4, overwrite=False)
    assert train(4) == 16, "another run begins anew"
    assert not (tmp_path / ".out.work").exists()


class Blowing(Nothing):
    """Breaks the weights in the third epoch."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.epochs = module, 0
        self.good: list[Tensor] = []

    def end_epoch(self, optimizer: Any) -> tuple[str, ...]:
        self.epochs += 1
        if self.epochs == 2:
            self.good = [each.clone() for each in tensors(self.module)]
        return ()

    @contextlib.contextmanager
    def step(self, source: str | None = None) -> Any:
        if self.epochs == 2:
            with torch.no_grad():
                next(iter(self.module.parameters())).fill_(float("nan"))
        yield


def test_a_loss_that_is_not_finite_stops_at_the_last_good_epoch() -> None:
    module = normed_mlp()
    companion = Blowing(module)
    history, stopped = fit(module, data(), Recipe(epochs=5, batch=32), companion=companion)
    assert "the loss was nan at step 1 of epoch 3: the model is as it was after epoch 2" in str(stopped)
    assert len(history) == 2
    assert every(torch.equal(a, b) for a, b in zip(companion.good, tensors(module), strict=True))


def test_weights_that_the_last_step_of_an_epoch_breaks_are_not_kept() -> None:
    """Its loss was finite, and no other one of that epoch sees what came of it."""
    module, samples = normed_mlp(), data()
    good: list[list[Tensor]] = [[each.clone() for each in tensors(module)]]

    class Breaking(Nothing):
        steps = 0

        @contextlib.contextmanager
        def step(self, source: str | None = None) -> Any:
            yield
            self.steps += 1
            if self.steps == 24:
                with torch.no_grad():
                    next(iter(module.parameters()))[0, 0] = float("nan")

        def end_epoch(self, optimizer: Any) -> tuple[str, ...]:
            good.append([each.clone() for each in tensors(module)])
            return ()

    history, stopped = fit(module, samples, Recipe(epochs=5, batch=32), companion=Breaking())
    assert "the weights were not finite after step 8 of epoch 3: the model is as it was after epoch 2" in str(stopped)
    assert len(history) == 2
    assert every(torch.equal(a, b) for a, b in zip(good[2], tensors(module), strict=True))


def test_a_family_of_a_training_that_went_astray_says_so(tmp_path: Path) -> None:
    samples = data()
    given = (samples.inputs[0], samples.labels)
    recipe = Recipe(epochs=3, batch=32, rate=1e30)
    result = train_lowrank(normed_mlp(), given, tmp_path / "out", recipe=recipe, options=LowRankOptions(smallest=0.5))
    assert result.stopped is not None
    assert result.family.notes == (f"stopped early: {result.stopped}",)
    module, _ = read_family(tmp_path / "out")
    assert every(bool(each.isfinite().all()) for each in tensors(module))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, "--epochs 0: at least 1"),
        ({"batch": 0}, "--batch 0: at least 1"),
        ({"rate": float("nan")}, "--lr nan: a number above 0"),
        ({"schedule": "magic"}, "--schedule magic: known are cosine, linear, steps, constant"),
        ({"optimizer": "magic"}, "--optimizer magic: known are sgd, adamw"),
    ],
)
def test_refused_recipes(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Recipe(**settings).check()


@pytest.mark.slow
def test_maestro_trains_a_family_that_shrinks(tmp_path: Path) -> None:
    samples = data(512)
    result = train_lowrank(
        normed_mlp(),
        (samples.inputs[0], samples.labels),
        tmp_path / "out",
        test=(samples.inputs[0], samples.labels),
        recipe=Recipe(epochs=25, batch=32, rate=0.1),
        options=LowRankOptions(smallest=0.2),
        penalty=0.005,
    )
    module, family = read_family(tmp_path / "out")
    assert sum(family.members[0].ranks.values()) < 8 + 32 + 3, "ranks fell in training"
    half = [each for each in family.members if each.macs <= 0.5 * family.dense_macs]
    assert float(half[0].metric or 0) > 0.85
    assert any("rank" in note for epoch in result.history for note in epoch.notes)
    assert not (tmp_path / ".out.work").exists()
    assert module.training is False
