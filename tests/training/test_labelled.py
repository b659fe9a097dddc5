"""Several sources of one task: batches of one each, beside its delta, and a delta to the base that all can use."""

from __future__ import annotations

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
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import read_delta, write_delta
from compress.training.data import TrainingData
from compress.training.labelled import Source
from compress.training.loop import Recipe, evaluate
from compress.training.sparse.job import SparseOptions, SparseResult, train_sparse
from tests.every import every

RECIPE = Recipe(epochs=4, batch=32, rate=2e-2, weight_decay=0.0, schedule="linear", optimizer="adamw")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


def samples(turned: float, count: int = 128) -> dict[str, np.ndarray]:
    """One task, whose inputs a language turns round."""
    x = np.random.default_rng(int(turned) + 2).standard_normal((count, 8), np.float32)
    return {"x": x * np.float32(turned), "y": (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5)}


@pytest.fixture
def languages(tmp_path: Path) -> dict[str, Source]:
    """The second one's delta turns the first layer round, so that behind it both are alike."""
    base = net()
    values = -2 * base[0].weight.detach().reshape(-1)
    tensors = {"0.weight": SparseTensor((64, 8), "float32", torch.arange(512), values)}
    delta = SparseDelta(base_hash(tensor_hashes(base_tensors(base))), tensors)
    write_delta(delta, tmp_path / "de.safetensors", "fp32")
    return {"en": Source(samples(1.0, 256)), "de": Source(samples(-1.0), tmp_path / "de.safetensors", repeats=2)}


def train(out: Path, data: Any, **given: Any) -> SparseResult:
    options = SparseOptions(density=0.3, head=("4",), frozen=("0",), values="fp32", **given.pop("options", {}))
    return train_sparse(net(), data, out, options=options, recipe=RECIPE, sparse_epochs=8, **given)


@pytest.mark.matrix
def test_one_task_from_two_languages_beside_their_deltas(languages: dict[str, Source], tmp_path: Path) -> None:
    result = train(
        tmp_path / "task.safetensors", languages, test=samples(-1.0, 200), dev=samples(-1.0, 60),
        options={"eval_source": "de"},
    )  # fmt: skip
    assert result.sparse is not None
    assert result.sparse > 0.8
    base = net()
    assert result.delta.base == base_hash(tensor_hashes(base_tensors(base)), result.delta.dense)
    both = {name: read_delta(tmp_path / f"{name}.safetensors") for name in ("task", "de")}
    apply_deltas(base, both, head="task")
    given = samples(-1.0, 200)
    held = TrainingData((torch.from_numpy(given["x"]),), torch.from_numpy(given["y"]))
    assert abs(evaluate(base, held) - result.sparse) < 0.011  # a step's sums round otherwise
    alone = net()
    apply_deltas(alone, {"task": both["task"]})
    assert evaluate(alone, held) < 0.5, "without its language the task does not know what it sees"
    # Snip gathers beside the deltas too, and a killed run's checkpoint knows its sources.
    assert train(tmp_path / "snip.safetensors", languages, options={"criterion": "snip"}).delta.k == result.delta.k

    def stop(what: str, done: int, total: int) -> None:
        if "sparse" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut.safetensors", languages, progress=stop)
    more = {**languages, "de": replace(languages["de"], repeats=3)}
    with pytest.raises(InputError, match="holds the checkpoint of another run"):
        train(tmp_path / "cut.safetensors", more)
    checkpoint = tmp_path / ".cut.safetensors.work" / "full.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"full\.pt is damaged .* throw it away with --overwrite"):
        train(tmp_path / "cut.safetensors", languages)


def test_epochs_and_order(languages: dict[str, Source]) -> None:
    parts = {
        name: TrainingData((torch.zeros(count, length), torch.ones(count, length)), torch.arange(count), mask=1)
        for name, count, length in (("a", 5, 3), ("b", 4, 6))
    }
    joined = TrainingData.joined(parts, {"b": 2})
    assert [tuple(each.shape) for each in joined.inputs] == [(9, 6), (9, 6)]
    epoch = joined.epoch(2, seed=0)
    assert sorted((name, len(index)) for name, index in epoch) == [("a", 1), ("a", 2), ("a", 2), *[("b", 2)] * 4]
    assert every(bool((index < 5).all()) == (name == "a") for name, index in epoch)
    assert sorted(torch.cat([index for _, index in epoch]).tolist()) == [0, 1, 2, 3, 4, *sorted([5, 6, 7, 8] * 2)]
    assert [name for name, _ in joined.in_order(4)] == ["a", "a", "b", "b"]
    assert joined.take(epoch[0][1])[0][0].shape[1] == (3 if epoch[0][0] == "a" else 6)


def test_numbers_of_one_source_that_are_whole_by_chance() -> None:
    x = torch.zeros(2, 3)
    parts = {"a": TrainingData((x,), torch.tensor([0.5, 2.0])), "b": TrainingData((x,), torch.tensor([1, 2]))}
    assert TrainingData.joined(parts, {}).labels.tolist() == [0.5, 2.0, 1.0, 2.0]


def test_refusals(languages: dict[str, Source], tmp_path: Path) -> None:
    out = tmp_path / "never.safetensors"
    with pytest.raises(InputError, match="--eval-source fr: known are en, de"):
        train(out, languages, options={"eval_source": "fr"})
    with pytest.raises(InputError, match="several sources have a delta each"):
        train(out, languages, options={"sources": (tmp_path / "de.safetensors",)})
    with pytest.raises(InputError, match="the samples of en and fr differ in type or shape"):
        train(out, {**languages, "fr": Source({"x": np.zeros((4, 9), np.float32), "y": np.zeros(4, np.int64)})})
    with pytest.raises(InputError, match="--repeat de=0: at least 1"):
        train(out, {**languages, "de": replace(languages["de"], repeats=0)})
    other = read_delta(tmp_path / "de.safetensors")
    write_delta(replace(other, base="0" * 64), tmp_path / "other.safetensors", "fp32")
    with pytest.raises(InputError, match="the delta of source de is for another base"):
        train(out, {**languages, "de": Source(samples(-1.0), tmp_path / "other.safetensors")})
