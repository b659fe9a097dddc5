"""Masks by gradients, N of every M, selection in rounds, the best epoch of a phase, and batches of several sources."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import InputError
from compress.sparse.selection import count_n_of_m, top_n_of_m
from compress.sparse.tuner import SparseFineTuner
from compress.training.data import TrainingData
from compress.training.loop import Recipe, best_epoch, fit
from compress.training.sources import mix_sources
from compress.training.sparse.job import SparseCompanion
from tests.every import every
from tests.networks import normed_mlp
from tests.training.sparse.test_job import arrays, labelled, train  # type: ignore[import-not-found]


def small() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def chunks_of(*tensors: Tensor):  # type: ignore[no-untyped-def]
    return lambda: [(str(number), 0, each) for number, each in enumerate(tensors)]


@pytest.mark.parametrize("criterion", ["snip", "gradient"])
def test_gradients_choose_the_mask(criterion: str) -> None:
    module = small()
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    tuner = SparseFineTuner(module, k=5, criterion=criterion, frozen=("bias",))
    with pytest.raises(ValueError, match=r"call gather\(\) after backward"):
        tuner.select()
    for part in (slice(0, 5), slice(5, 8)):  # batches of different sizes
        module.zero_grad()
        F.cross_entropy(module(x[part]), y[part], reduction="sum").backward()
        tuner.gather()
    module.zero_grad()
    F.cross_entropy(module(x), y, reduction="sum").backward()
    assert module.weight.grad is not None
    score = module.weight.grad * module.weight.detach() if criterion == "snip" else module.weight.grad
    wanted = score.abs().reshape(-1).topk(5).indices.sort().values
    tuner.select()
    assert tuner.mask is not None
    assert torch.equal(tuner.mask["weight"], wanted)


def test_n_of_every_m_with_ties_to_the_lower_index() -> None:
    first = torch.tensor([1.0, 3, 2, 2, 0, 0, 0, 0, 5, 4])
    found = top_n_of_m(chunks_of(first, torch.tensor([7.0])), 2, 4)
    assert found["0"].tolist() == [1, 2, 4, 5, 8, 9]
    assert found["1"].tolist() == [0]
    assert [count_n_of_m(size, 2, 4) for size in (10, 1, 0, 7, 8)] == [6, 1, 0, 4, 4]
    with pytest.raises(ValueError, match="0: a score is below 0 or not finite"):
        top_n_of_m(chunks_of(torch.tensor([1.0, float("nan")])), 1, 2)


@pytest.mark.slow
def test_a_pattern_goes_through_the_same_door(tmp_path: Path) -> None:
    result = train(tmp_path / "pattern.safetensors", options={"density": None, "pattern": (1, 8)})
    assert result.delta.k == (32 * 8 + 32 + 32 * 32 + 32) // 8
    index = result.delta.tensors["3.weight"].index
    assert torch.equal(index // 8, torch.arange(32 * 32 // 8))
    for wrong in ({"pattern": (2, 3)}, {"pattern": (5, 4)}, {"pattern": (2, 4), "density": 0.1}, {"rounds": 0}):
        with pytest.raises(ValueError, match=r"pattern|rounds"):
            SparseFineTuner(normed_mlp(), **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_criteria_by_gradient_learn_from_the_command(tmp_path: Path) -> None:
    result = train(tmp_path / "snip.safetensors", options={"criterion": "snip"})
    assert result.full is None
    assert result.base is not None
    assert result.sparse is not None
    assert result.sparse > result.base + 0.15


@pytest.mark.matrix
def test_every_round_adds_a_part_of_the_entries(tmp_path: Path) -> None:
    module, data = normed_mlp(), labelled()
    start = {name: each.detach().clone() for name, each in module.named_parameters()}
    tuner = SparseFineTuner(module, k=50, rounds=3, head=("5",))
    sizes, earlier = [], set[tuple[str, int]]()
    for turn in range(3):
        if turn:
            with pytest.raises(ValueError, match=f"round {turn} of 3 is not the last"):
                tuner.delta()
            tuner.reopen()
        fit(module, data, Recipe(epochs=1, rate=0.05), companion=SparseCompanion(tuner))
        tuner.select()
        assert tuner.mask is not None
        assert every(torch.equal(each, start[name]) for name, each in module.named_parameters())
        now = {(name, place) for name, index in tuner.mask.items() for place in index.tolist()}
        assert earlier <= now
        earlier = now
        sizes.append(len(now))
        fit(module, data, Recipe(epochs=1, rate=0.05), companion=SparseCompanion(tuner))
    assert sizes == [16, 33, 50]
    assert tuner.delta().k == 50
    with pytest.raises(ValueError, match="round 3 of 3 is not over, or the last"):
        tuner.reopen()
    result = train(tmp_path / "rounds.safetensors", options={"rounds": 2})
    assert [len(each) for each in result.histories] == [10, 24]
    assert [each.name for each in tmp_path.iterdir()] == ["rounds.safetensors"]


def test_the_epoch_judged_best_is_kept_by_a_run_that_goes_on_too(tmp_path: Path) -> None:
    said = iter([0.1, 0.9, 0.2, 0.9, 0.3])
    seen: list[Tensor] = []

    def judge(module: nn.Module) -> float:
        seen.append(next(module.parameters()).detach().clone())
        return next(said)

    data, recipe, file = labelled(), Recipe(epochs=5, rate=0.01), tmp_path / "checkpoint.pt"
    module = normed_mlp()
    with pytest.raises(KeyboardInterrupt):
        fit(module, data, recipe, judge=judge, checkpoint=file, progress=_interrupt)
    module = normed_mlp()
    history, _ = fit(module, data, recipe, judge=judge, checkpoint=file)
    assert (best_epoch(history), len(seen)) == (2, 5)
    assert torch.equal(next(module.parameters()), seen[1])
    assert not torch.equal(seen[1], seen[4])


def _interrupt(done: int, total: int, loss: float) -> None:
    if done > 0.7 * total:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_the_command_says_which_epoch_was_best(tmp_path: Path) -> None:
    result = train(tmp_path / "task.safetensors", dev=arrays())
    assert any(note.startswith("sparse phase: of 12 epochs number ") for note in result.notes)
    judged = [each.judged for each in result.histories[1]]
    assert result.sparse == pytest.approx(max(each for each in judged if each is not None), abs=0.01)


def test_batches_of_several_sources() -> None:
    batches = mix_sources({"de": 10, "sw": 3}, 4, repeats={"sw": 2}, seed=1)
    assert Counter(name for name, _ in batches) == {"de": 3, "sw": 2}
    seen = Counter((name, place) for name, index in batches for place in index.tolist())
    assert every(seen["de", place] == 1 for place in range(10))
    assert every(seen["sw", place] == 2 for place in range(3))
    assert [name for name, _ in batches] != [name for name, _ in mix_sources({"de": 10, "sw": 3}, 4, seed=1)]
    with pytest.raises(ValueError, match="source 'fr': known are de"):
        mix_sources({"de": 1}, 4, repeats={"fr": 2})
    with pytest.raises(ValueError, match="all at least 1"):
        mix_sources({"de": 0}, 4)


def test_a_pattern_is_two_numbers() -> None:
    from compress.cli.sparse import _pattern

    assert _pattern("2:4") == (2, 4)
    with pytest.raises(InputError, match="--pattern 2of4: two numbers are needed"):
        _pattern("2of4")


def test_labels_are_part_of_what_identifies_samples() -> None:
    data = labelled()
    assert data.digest != TrainingData(data.inputs, 1 - data.labels).digest
