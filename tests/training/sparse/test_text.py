"""``train_sparse`` on a Hugging Face folder: a new head, padding cut off, dropout that resumes, and application."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

import compress
from compress.data.samples import load_samples
from compress.errors import InputError
from compress.models.checkpoint import load_model
from compress.sparse.deltafile import read_delta
from compress.sparse.deltas import apply, compose, restore
from compress.training.data import TrainingData
from compress.training.loop import Recipe, evaluate
from compress.training.sparse.job import SparseOptions, SparseResult, train_sparse

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from tests.every import every  # noqa: E402
from tests.models.test_huggingface import WORDS, bert, llama, save_tokenizer  # type: ignore[import-not-found]  # noqa: E402

RECIPE = Recipe(epochs=2, batch=16, rate=3e-3, weight_decay=0.0, schedule="linear", optimizer="adamw")
HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head, and texts of 2 to 20 words: two classes of them, and three."""
    place = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    bert(1).save_pretrained(place / "bert")
    save_tokenizer(place / "bert", WORDS, ends=True)
    generator = torch.Generator().manual_seed(0)
    for name, classes in (("two", 2), ("three", 3)):
        lines = ["sentence\tlabel"]
        for number in range(96):
            words = torch.randint(0, 16, (2 + number % 19,), generator=generator) + 16 * (number % classes)
            lines.append(" ".join(WORDS[each] for each in words.tolist()) + f"\t{number % classes}")
        (place / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return place


def train(folder: Path, out: Path, data: str = "two", **given: object) -> SparseResult:
    path = str(folder / f"{data}.tsv")
    options = SparseOptions(density=0.2, values="fp32")
    return train_sparse(folder / "bert", path, out, test=path, options=options, recipe=RECIPE, **given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_encoder_learns_classes_and_takes_its_delta(folder: Path, tmp_path: Path) -> None:
    result = train(folder, tmp_path / "task.safetensors", sparse_epochs=10, sparse_rate=2e-2)
    assert result.sparse is not None
    assert result.sparse > 0.9
    assert set(result.delta.dense) == HEAD
    assert any("a new head for 2 classes" in note for note in result.notes)
    apply(folder / "bert", [tmp_path / "task.safetensors"], tmp_path / "task")
    assert json.loads((tmp_path / "task" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    loaded = load_model(tmp_path / "task")
    assert loaded.text is not None
    texts, labels = zip(*(line.split("\t") for line in (folder / "two.tsv").read_text().split("\n")[1:-1]), strict=True)
    inputs = tuple(loaded.text.encode(texts).values())
    assert evaluate(loaded.module, TrainingData(inputs, torch.tensor([int(each) for each in labels]))) == result.sparse
    with pytest.raises(InputError, match=r"takes back what was added to .*task before, and would be replaced"):
        apply(tmp_path / "task", [tmp_path / "task.safetensors"], tmp_path / "task", overwrite=True)
    restore(tmp_path / "task", tmp_path / "again")
    before, after = (load_model(path).module.state_dict() for path in (folder / "bert", tmp_path / "again"))
    assert before.keys() == after.keys()  # the head was new, and is gone again
    assert every(torch.equal(each, after[name]) for name, each in before.items())


@pytest.mark.matrix
def test_pairs_and_a_number_to_predict(folder: Path, tmp_path: Path) -> None:
    """The share of a second text's words that are of one kind, from a head of one output."""
    generator = torch.Generator().manual_seed(0)
    lines = ["sentence1\tsentence2\tscore"]
    for number in range(96):
        words = torch.randint(0, 16, (2, 4), generator=generator)
        words[1, : number % 5] += 16
        first, second = (" ".join(WORDS[each] for each in row.tolist()) for row in words)
        lines.append(f"{first}\t{second}\t{(number % 5) / 4:.2f}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    options = SparseOptions(density=0.2, values="fp32")
    path = str(tmp_path / "pairs.tsv")
    result = train_sparse(
        folder / "bert", path, tmp_path / "task.safetensors", test=path, options=options, recipe=RECIPE,
        sparse_epochs=20, sparse_rate=2e-2,
    )  # fmt: skip
    assert any("a new head for one number" in note for note in result.notes)
    assert result.sparse is not None
    assert result.sparse < 0.06  # half of the scores' variance
    apply(folder / "bert", [tmp_path / "task.safetensors"], tmp_path / "task")
    (tmp_path / "whole.tsv").write_text("\n".join(line for line in lines if not line.endswith((".25", ".50", ".75"))))
    whole = (tmp_path / "whole.tsv").read_text().replace("0.00", "0").replace("1.00", "1")
    (tmp_path / "whole.tsv").write_text(whole)
    again = train_sparse(
        folder / "bert", path, tmp_path / "again.safetensors", test=str(tmp_path / "whole.tsv"), options=options,
        recipe=RECIPE, sparse_epochs=1,
    )  # fmt: skip
    assert again.metric_name == "mean squared error", "whole numbers are no classes where numbers are predicted"
    loaded = load_model(tmp_path / "task")
    assert loaded.text is not None
    samples = load_samples(path, labelled=True, parameters=loaded.parameters, text=loaded.text)
    assert samples.notes[0].startswith("pairs of texts as 96 samples")
    types = samples.inputs[loaded.text.inputs.index("token_type_ids")]
    assert types.sum(1).tolist() == [5] * 96  # four words and the end's mark
    assert evaluate(loaded.module, TrainingData.of(samples)) == pytest.approx(result.sparse, rel=1e-5)


@pytest.mark.matrix
def test_deltas_with_heads_of_different_sizes_share_a_base(folder: Path, tmp_path: Path) -> None:
    deltas = [tmp_path / f"{name}.safetensors" for name in ("two", "three")]
    for each in deltas:
        train(folder, each, each.stem, sparse_epochs=1)
    assert read_delta(deltas[0]).base == read_delta(deltas[1]).base
    compose(deltas, tmp_path / "both.safetensors", head=str(deltas[1]))
    apply(folder / "bert", [tmp_path / "both.safetensors"], tmp_path / "composed")
    apply(folder / "bert", deltas, tmp_path / "added", head=str(deltas[1]))
    first, second = (load_model(tmp_path / name).module.state_dict() for name in ("composed", "added"))
    assert first["classifier.weight"].shape == (3, 32)
    assert every(torch.allclose(each, second[name], atol=1e-6) for name, each in first.items())
    done = apply(folder / "bert", deltas, tmp_path / "headless", heads=False)
    assert "classifier.bias, classifier.weight is new and untrained, as no delta's head was taken" in done.notes


@pytest.mark.matrix
def test_a_compressed_encoder_takes_a_delta_with_a_head_beneath_one(folder: Path, tmp_path: Path) -> None:
    delta = tmp_path / "task.safetensors"
    train(folder, delta, sparse_epochs=1, sparse_rate=2e-2)
    compress.quantize(folder / "bert", out=tmp_path / "bare", bits=8)
    with pytest.raises(InputError, match=r"task\.safetensors brings a head.* has none: .* again with --classes 2"):
        compress.load(tmp_path / "bare", deltas=delta)
    compress.quantize(folder / "bert", out=tmp_path / "w8", bits=8, classes=2)
    apply(folder / "bert", [delta], tmp_path / "task")
    wanted = load_model(tmp_path / "task")
    assert wanted.text is not None
    inputs = tuple(wanted.text.example().values())
    with torch.no_grad():
        logits, base = wanted.module(*inputs).logits, compress.load(tmp_path / "w8")(*inputs)
        found = compress.load(tmp_path / "w8", deltas=delta)(*inputs)
    assert float((found - logits).norm()) < 0.05 * float((base - logits).norm())
    with pytest.raises(InputError, match="--classes 0: at least 1"):
        compress.quantize(folder / "bert", out=tmp_path / "never", classes=0)
    with pytest.raises(InputError, match="only a Hugging Face folder gets a new head"):
        compress.quantize(bert(1), out=tmp_path / "never", classes=2)


@pytest.mark.slow
def test_a_killed_run_with_dropout_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "whole.safetensors", sparse_epochs=2)

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if "full" in what and done > 0.8 * total:
            raise Killed

    with contextlib.suppress(Killed):
        train(folder, tmp_path / "killed.safetensors", sparse_epochs=2, progress=kill)
    torch.rand(3)  # whatever else happens to torch's own generator
    train(folder, tmp_path / "killed.safetensors", sparse_epochs=2)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "killed.safetensors").read_bytes()


def test_batches_end_with_their_longest_text() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    data = TrainingData((mask * 7, mask), torch.zeros(3, dtype=torch.int64), ("input_ids", "attention_mask"), 1)
    inputs, labels = data.take(torch.tensor([1, 0]))
    assert [each.shape for each in inputs] == [(2, 2), (2, 2)]
    assert len(labels) == 2


@pytest.mark.slow
def test_refusals(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "never.safetensors"
    (tmp_path / "plain.txt").write_text("w1 w2\n")
    with pytest.raises(InputError, match=r"plain\.txt has no labels; give a \.tsv or \.csv with a column label"):
        train_sparse(folder / "bert", str(tmp_path / "plain.txt"), out)
    (tmp_path / "odd.tsv").write_text("sentence\tlabel\nw1\t-1\nw2\t0\n")
    with pytest.raises(InputError, match=r"odd\.tsv has classes -1 to 0; a new head needs them numbered from 0"):
        train_sparse(folder / "bert", str(tmp_path / "odd.tsv"), out)
    (tmp_path / "gaps.tsv").write_text("sentence\tlabel\nw1\t1000000\nw2\t0\n")
    with pytest.raises(InputError, match=r"has 2 of the classes 0 to 1,000,000; .* need a fraction, as in 3\.0"):
        train_sparse(folder / "bert", str(tmp_path / "gaps.tsv"), out)
    llama(1).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama", WORDS, ends=False)
    with pytest.raises(InputError, match="predicts the next token"):
        train_sparse(tmp_path / "llama", str(folder / "two.tsv"), out)
    with pytest.raises(InputError, match=r"--sparse-lr 0: a number above 0"):
        train_sparse(folder / "bert", str(folder / "two.tsv"), out, sparse_rate=0.0)
    with pytest.raises(InputError, match=r"--length 65: .* takes 2 to 64 tokens"):
        train_sparse(folder / "bert", str(folder / "two.tsv"), out, options=SparseOptions(length=65))
    with pytest.raises(InputError, match="is no Hugging Face folder, which alone gets a new head"):
        load_model(tmp_path / "plain.pt", classes=2)
