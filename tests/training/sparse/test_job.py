"""``train_sparse``: what it writes is what it measured, a killed run goes on to the same bytes, and sources add up."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import InputError
from compress.sparse.application import apply_deltas
from compress.sparse.base import base_hash, base_tensors, tensor_hashes
from compress.sparse.delta import SparseDelta
from compress.sparse.deltafile import read_delta
from compress.sparse.reference import write_reference
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate
from compress.training.sparse.job import SparseOptions, SparseResult, train_sparse
from tests.every import every
from tests.networks import normed_mlp

RECIPE = Recipe(epochs=5, batch=32, rate=2e-2, weight_decay=0.1, schedule="linear", optimizer="adamw")


def arrays(turned: float = 1.0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(2).standard_normal((256, 8), np.float32)
    return {"x": x, "y": (x[:, 0] * turned > 0).astype(np.int64) + (x[:, 1] > 0.5)}


def labelled() -> TrainingData:
    given = arrays()
    return TrainingData((torch.from_numpy(given["x"]),), torch.from_numpy(given["y"]))


def train(out: Path, base: nn.Module | None = None, data: Any = None, **given: Any) -> SparseResult:
    options = {"density": 0.1, "head": ("5",)} | given.pop("options", {})
    given = {"test": data or arrays(), "recipe": RECIPE, "sparse_epochs": 12} | given
    return train_sparse(base or normed_mlp(), data or arrays(), out, options=SparseOptions(**options), **given)


@pytest.mark.slow
def test_classes_are_learned_by_few_entries(tmp_path: Path) -> None:
    base = normed_mlp()
    result = train(tmp_path / "task.safetensors", base)
    assert [each.name for each in tmp_path.iterdir()] == ["task.safetensors"]
    assert (result.maskable, result.delta.k) == (32 * 8 + 32 + 32 * 32 + 32, 134)
    assert result.base is not None
    assert result.full is not None
    assert result.sparse is not None
    assert result.base < 0.6 < 0.85 < result.sparse
    assert [len(each) for each in result.histories] == [5, 12]
    apply_deltas(base, {"task": read_delta(tmp_path / "task.safetensors")})
    assert evaluate(base, labelled()) == result.sparse


@pytest.mark.slow
def test_numbers_are_learned(tmp_path: Path) -> None:
    x = arrays()["x"]
    numbers, base = {"x": x, "y": x[:, 0] * 2}, normed_mlp()
    base[5] = nn.Linear(32, 1)
    result = train(tmp_path / "task.safetensors", base, data=numbers, test=numbers)
    assert result.metric_name == "mean squared error"
    assert result.sparse is not None
    assert result.base is not None
    assert result.sparse < 0.7 * result.base


@pytest.mark.matrix
def test_baselines_skip_the_full_phase(tmp_path: Path) -> None:
    result = train(tmp_path / "random.safetensors", options={"criterion": "random"})
    assert result.full is None
    assert [len(each) for each in result.histories] == [0, 12]
    assert result.delta.k == 134
    assert train(tmp_path / "head.safetensors", options={"k": 0, "density": None}).delta.k == 0


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("at", [0.4, 0.9])
def test_a_killed_run_goes_on_to_the_same_bytes(at: float, tmp_path: Path) -> None:
    train(tmp_path / "whole.safetensors")

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if ("full" in what) == (at == 0.4) and done > 0.7 * total:
            raise Killed

    with contextlib.suppress(Killed):
        train(tmp_path / "killed.safetensors", progress=kill, options={"overwrite": True})
    assert (tmp_path / ".killed.safetensors.work" / ("full.pt" if at == 0.4 else "sparse.pt")).exists()
    with pytest.raises(InputError, match="holds the checkpoint of another run"):
        train(tmp_path / "killed.safetensors", options={"k": 9, "density": None})
    steps = list[str]()
    # Nothing that is learned depends on these.
    options = {"allow": ("some.Class",), "overwrite": True}
    train(tmp_path / "killed.safetensors", options=options, progress=lambda what, done, total: steps.append(what))
    assert len(steps) == (16 + 96 if at == 0.4 else 32)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "killed.safetensors").read_bytes()


@pytest.mark.matrix
def test_a_task_learned_on_a_source_is_a_difference_to_the_base(tmp_path: Path) -> None:
    base = normed_mlp()
    train(tmp_path / "language.safetensors", base, data=arrays(-1.0))
    result = train(tmp_path / "task.safetensors", base, options={"sources": (tmp_path / "language.safetensors",)})
    assert result.delta.base == base_hash(tensor_hashes(base_tensors(base)), ("5.weight", "5.bias"))
    both = {name: read_delta(tmp_path / f"{name}.safetensors") for name in ("language", "task")}
    apply_deltas(base, both, head="task")
    accuracy = evaluate(base, labelled())
    assert result.sparse is not None
    assert abs(accuracy - result.sparse) < 0.01


@pytest.mark.slow
def test_a_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "language.safetensors", sparse_epochs=1)
    read = list[object]()

    def count(path: str | Path) -> SparseDelta:
        read.append(path)
        return read_delta(path)

    monkeypatch.setattr("compress.sparse.deltas.read_delta", count)
    source = tmp_path / "language.safetensors"
    train(tmp_path / "task.safetensors", sparse_epochs=1, options={"sources": (source,)})
    assert read == [source]


@pytest.mark.matrix
def test_sources_of_the_published_code_and_twice(tmp_path: Path) -> None:
    base = normed_mlp()
    train(tmp_path / "language.safetensors", base, data=arrays(-1.0), options={"values": "fp32"})
    write_reference(read_delta(tmp_path / "language.safetensors"), tmp_path / "pytorch_diff.bin")
    for name in ("language.safetensors", "pytorch_diff.bin"):
        result = train(tmp_path / f"on-{name}.safetensors", base, options={"sources": (tmp_path / name,)})
        assert any("does not say which base" in note for note in result.notes) == name.endswith(".bin")
    first, second = (read_delta(path) for path in sorted(tmp_path.glob("on-*")))
    assert first.digest == second.digest
    with pytest.raises(InputError, match=r"pytorch_diff\.bin is given twice"):
        train(tmp_path / "never.safetensors", options={"sources": (tmp_path / "pytorch_diff.bin",) * 2})


@pytest.mark.matrix
def test_what_moved_most_is_a_better_mask_than_chance_and_than_biases(tmp_path: Path) -> None:
    """What is promised: 5 %, two seeds, one learning rate; benchmarks/sparse_digits.py has the whole table."""
    from benchmarks.lowrank import digits
    from benchmarks.sparse_digits import BASELINES, LOTTERY, fine_tuned, trained_base

    train_data, test_data = digits()
    rows = []
    for seed in range(2):
        recipe = Recipe(
            epochs=8, batch=32, rate=1e-3, weight_decay=0.0, schedule="linear", optimizer="adamw", seed=seed
        )
        done = fine_tuned(trained_base(train_data, seed), 0.05, (), train_data, recipe, 16)
        rows.append({name: evaluate(module, test_data) for name, (module, _) in done.items()})
    for name in BASELINES:
        assert every(row[LOTTERY] > row[name] + 0.03 for row in rows), rows


def test_refusals(tmp_path: Path) -> None:
    data = arrays()
    out = tmp_path / "never.safetensors"
    with pytest.raises(InputError, match=r"the samples given has classes 0 to 4, the model has outputs for 0 to 2"):
        train(out, data=data | {"y": data["y"] + 2 * (data["y"] == 2)})
    with pytest.raises(
        InputError, match=r"numbers of shape \[2\] for 2 samples, the model's output has shape \[2, 3\]"
    ):
        train(out, data=data | {"y": data["x"][:, 0]})
    with pytest.raises(InputError, match=r"task\.bin: \.bin is for the published code's form.* ends in \.safetensors"):
        train(tmp_path / "task.bin")
    with pytest.raises(InputError, match=r"task\.pt: a delta is no model; give a name that ends in \.safetensors"):
        train(tmp_path / "task.pt")
    with pytest.raises(InputError, match=r"0 of 1,344 entries would be selected, .* nothing would be learned"):
        train(out, options={"head": (), "frozen": ("5",), "density": 1e-5})
    with pytest.raises(InputError, match="--values int4: known are fp64"):
        train(out, options={"values": "int4"})
    with pytest.raises(InputError, match="'classifier' is the name of no parameter or module"):
        train(out, options={"head": ("classifier",)})
    with pytest.raises(InputError, match="--weight-decay -1: a number, 0 or above"):
        train(out, recipe=replace(RECIPE, weight_decay=-1.0))
    with pytest.raises(InputError, match="--sparse-epochs 0: at least 1"):
        train(out, sparse_epochs=0)
    with pytest.raises(InputError, match=r"full phase: the (loss was|weights were not finite).* try a smaller --lr"):
        train(out, recipe=Recipe(epochs=2, rate=1e30))
    out.write_text("")
    with pytest.raises(InputError, match=r"never\.safetensors exists already"):
        train(out)
