"""``compress sparse`` as a user runs it: train, apply, revert, compose, inspect, merge, and every refusal by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.models.checkpoint import load_model
from compress.sparse.reference import read_reference
from tests.cli.conftest import Forks  # type: ignore[import-not-found]
from tests.every import every


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A base, two tasks' samples, and a delta for each: ``one`` and ``two`` with heads, ``plain`` without."""
    place = tmp_path_factory.mktemp("sparse")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
    torch.save(base.eval(), place / "base.pt")
    with torch.no_grad():
        base[3].weight[5, 7] += 1e-4
    torch.save(base, place / "other.pt")
    torch.save(nn.Sequential(nn.Linear(12, 3)), place / "small.pt")
    torch.save(base.state_dict(), place / "weights.pth")
    (place / "nets.py").write_text(
        "from torch import nn\n\nclass Own(nn.Sequential):\n    pass\n\ndef make():\n"
        "    first, second, last = nn.Linear(12, 48), nn.Linear(48, 48), nn.Linear(48, 3)\n"
        "    return Own(first, nn.LayerNorm(48), nn.ReLU(), second, nn.ReLU(), last)\n"
    )
    x = np.random.default_rng(0).standard_normal((256, 12), np.float32)
    np.savez(place / "x.npz", x=x)
    for name, column in (("one", 0), ("two", 3)):
        y = (x[:, column] > 0).astype(np.int64) + (x[:, 1] > 0.5)
        np.savez(place / f"{name}.npz", x=x, y=y)
        run = forks.run(place, *TRAIN, f"{name}.npz", "--head", "5", "-o", f"{name}.safetensors", "-q")
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert forks.run(place, *TRAIN, "one.npz", "-o", "plain.safetensors", "-q").returncode == 0
    return place


TRAIN = ("sparse", "train", "base.pt", "--epochs", 2, "--sparse-epochs", 3, "--lr", 0.01, "--k", 130, "--data")


def state(path: Path) -> dict[str, Tensor]:
    return load_model(path).module.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.mark.slow
def test_train_says_what_came_of_it(forks: Forks, folder: Path) -> None:
    run = forks.run(folder, *TRAIN, "one.npz", "--test", "one.npz", "--head", "5", "-o", "told.safetensors")
    assert run.returncode == 0, run.stderr
    assert "Written to told.safetensors: 130 of 2,976 entries (4.37 %), " in run.stdout
    assert "replaced whole: 5.bias, 5.weight" in run.stdout or "replaced whole: 5.weight, 5.bias" in run.stdout
    assert "accuracy: base 0." in run.stdout
    assert re.search(r"Mean loss in full: [\d.]+ in the first epoch, [\d.]+ in the last.", run.stdout)
    assert "Apply it: compress sparse apply base.pt told.safetensors -o base-task.pt" in run.stdout
    modes = [(folder / name).stat().st_mode for name in ("told.safetensors", "base.pt")]
    assert modes[0] == modes[1]  # a file to hand on is no secret
    assert (folder / "told.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()


@pytest.mark.slow
def test_apply_and_revert(forks: Forks, folder: Path) -> None:
    run = forks.run(folder, "sparse", "apply", "base.pt", "plain.safetensors", "one.safetensors", "-o", "both.pt")
    assert run.returncode == 0, run.stderr
    assert "in more than one delta" in run.stdout
    assert "both.pt.undo.safetensors takes it back: compress sparse revert both.pt -o base-again.pt" in run.stdout
    turned = ("one.safetensors", "plain.safetensors", "-o", "turned.pt", "-q", "--max-overlap", 1)
    run = forks.run(folder, "sparse", "merge", "base.pt", *turned)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert same(state(folder / "both.pt"), state(folder / "turned.pt"))
    assert not same(state(folder / "both.pt"), state(folder / "base.pt"))
    assert not (folder / "turned.pt.undo.safetensors").exists()
    run = forks.run(folder, "sparse", "revert", "both.pt", "-o", "back.pt")
    assert run.returncode == 0, run.stderr
    assert same(state(folder / "back.pt"), state(folder / "base.pt"))
    run = forks.run(folder, "sparse", "revert", "turned.pt", "-o", "never.pt")
    assert run.returncode == 2
    assert "There is no turned.pt.undo.safetensors" in run.stderr
    run = forks.run(folder, "sparse", "revert", "other.pt", "--undo", "both.pt.undo.safetensors", "-o", "never.pt")
    assert "both.pt.undo.safetensors is for another model: the hash there is" in run.stderr


@pytest.mark.slow
def test_overlap_is_warned_of(forks: Forks, folder: Path) -> None:
    arguments = (
        "sparse",
        "merge",
        "base.pt",
        "one.safetensors",
        "plain.safetensors",
        "-q",
        "--overwrite",
        "-o",
        "o.pt",
    )
    run = forks.run(folder, *arguments, "--max-overlap", 0)
    assert run.returncode == 0
    assert run.stderr.startswith("warning: ")
    assert "entries are in more than one delta" in run.stderr


@pytest.mark.slow
def test_composed_is_applied_together(forks: Forks, folder: Path) -> None:
    run = forks.run(
        folder, "sparse", "compose", "one.safetensors", "two.safetensors", "--weights", "1,0.5", "--head",
        "two.safetensors", "--values", "fp64", "--max-overlap", 1, "-o", "sum.safetensors",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert forks.run(folder, "sparse", "merge", "base.pt", "sum.safetensors", "-o", "sum.pt", "-q").returncode == 0
    run = forks.run(
        folder, "sparse", "merge", "base.pt", "two.safetensors", "one.safetensors", "--weights", "0.5,1", "--head",
        "two.safetensors", "--max-overlap", 1, "-o", "together.pt", "-q",
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert same(state(folder / "sum.pt"), state(folder / "together.pt"))
    run = forks.run(folder, "sparse", "compose", "one.safetensors", "plain.safetensors", "-o", "mixed.safetensors")
    assert run.returncode == 0, run.stderr
    assert "entries of 5.weight are left out, as another delta replaces that whole" in run.stdout
    forks.run(folder, "sparse", "merge", "base.pt", "mixed.safetensors", "--max-overlap", 1, "-o", "mixed.pt")
    forks.run(folder, "sparse", "merge", "base.pt", "plain.safetensors", "one.safetensors", "-o", "direct.pt")
    a, b = state(folder / "mixed.pt"), state(folder / "direct.pt")
    assert every(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-4) for name in a)
    assert torch.equal(a["5.weight"], load_file(folder / "one.safetensors")["dense/5.weight"])


@pytest.mark.slow
def test_the_published_form_and_back(forks: Forks, folder: Path) -> None:
    run = forks.run(folder, "sparse", "compose", "one.safetensors", "-o", "pytorch_diff.bin")
    assert run.returncode == 0, run.stderr
    assert read_reference(folder / "pytorch_diff.bin").k == 130
    run = forks.run(folder, "sparse", "merge", "base.pt", "pytorch_diff.bin", "-o", "published.pt")
    assert "pytorch_diff.bin does not say which base it is for: not checked" in run.stdout
    forks.run(folder, "sparse", "merge", "base.pt", "one.safetensors", "-o", "ours.pt")
    assert same(state(folder / "published.pt"), state(folder / "ours.pt"))


@pytest.mark.slow
def test_several_sources(forks: Forks, folder: Path) -> None:
    language = ("sparse", "compose", "plain.safetensors", "--weights", "0.1", "-o", "language.safetensors", "-q")
    assert forks.run(folder, *language).returncode == 0
    several = ("en=one.npz", "--data", "de=one.npz", "--source", "de=language.safetensors", "--repeat", "de=2")
    several += ("--test", "one.npz", "--eval-source", "de", "--head", "5", "-o", "several.safetensors")
    run = forks.run(folder, *TRAIN, *several)
    assert run.returncode == 0, run.stderr
    assert "Apply it: compress sparse apply base.pt several.safetensors language.safetensors -o " in run.stdout
    assert "130 of 2,976 entries" in run.stdout
    base = json.loads(forks.run(folder, "sparse", "inspect", "one.safetensors", "--json").stdout)["base"]
    assert json.loads(forks.run(folder, "sparse", "inspect", "several.safetensors", "--json").stdout)["base"] == base


def test_inspect(forks: Forks, folder: Path) -> None:
    run = forks.run(folder, "sparse", "inspect", "one.safetensors", "--json")
    found = json.loads(run.stdout)
    assert (found["k"], found["values"]) == (130, "fp16")
    assert found["dense"] == {"5.weight": [3, 48], "5.bias": [3]}
    assert sum(each["count"] for each in found["tensors"].values()) == 130
    run = forks.run(folder, "sparse", "inspect", "one.safetensors")
    assert "criterion: change" in run.stdout
    assert "Replaced whole: 5.weight [3, 48]" in run.stdout


def test_weights_and_a_factory(forks: Forks, folder: Path) -> None:
    """A class of one's own is not written into the file, so that it can be read again."""
    model = ("--model", "nets:make")
    run = forks.run(folder, "sparse", "apply", "weights.pth", "one.safetensors", *model, "-o", "own.pth", "--any-base")
    assert run.returncode == 0, run.stderr
    assert "was not checked (--any-base)" in run.stdout
    assert isinstance(torch.load(folder / "own.pth", weights_only=True), dict)
    run = forks.run(folder, "sparse", "revert", "own.pth", *model, "-o", "back.safetensors")
    assert run.returncode == 0, run.stderr
    assert same(state(folder / "other.pt"), load_file(folder / "back.safetensors"))


@pytest.mark.slow
def test_a_delta_is_merged_before_calibration(forks: Forks, folder: Path) -> None:
    merged = ("sparse", "merge", "base.pt", "one.safetensors", "-o", "merged.pt", "-q")
    assert forks.run(folder, *merged).returncode == 0
    given = ("--calib", "x.npz", "--method", "mse", "--eval", "one.npz", "--json")
    run = forks.run(folder, "quantize", "base.pt", "--delta", "one.safetensors", *given, "-o", "a")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert any("130 entries of one.safetensors added to the model first" in each for each in report["notes"])
    run = forks.run(folder, "quantize", "merged.pt", *given, "-o", "b")
    assert run.returncode == 0, run.stderr
    assert (folder / "a" / "model.safetensors").read_bytes() == (folder / "b" / "model.safetensors").read_bytes()
    assert json.loads(run.stdout)["metric"] == report["metric"]
    run = forks.run(folder, "export", "base.pt", "--delta", "one.safetensors", "--out", "task.onnx")
    assert run.returncode == 0, run.stderr
    run = forks.run(folder, "export", "a", "--delta", "one.safetensors", "--out", "never.onnx")
    assert run.returncode == 2
    assert "a is compressed already; add deltas to the float model" in run.stderr
    run = forks.run(folder, "quantize", "other.pt", "--delta", "one.safetensors", "-o", "never")
    assert run.returncode == 2
    assert "one.safetensors is for another base" in run.stderr


REFUSED = {
    "another base": (("apply", "other.pt", "one.safetensors"), "one.safetensors is for another base: its hash is"),
    "architecture": (("apply", "small.pt", "one.safetensors"), "0.weight has shape [48, 12] there and [3, 12] in the"),
    "truncated": (("apply", "base.pt", "cut.safetensors"), "cut.safetensors is truncated"),
    "tampered": (("apply", "base.pt", "bent.safetensors"), "bent.safetensors was changed or damaged since it was"),
    "no delta": (("apply", "base.pt", "base.pt"), "base.pt is truncated or no safetensors file"),
    "missing": (("merge", "base.pt", "none.safetensors"), "There is no file none.safetensors"),
    "heads": (("merge", "base.pt", "one.safetensors", "two.safetensors"), "all replace a head"),
    "twice": (("merge", "base.pt", "one.safetensors", "one.safetensors"), "one.safetensors is given twice"),
    "weights": (("merge", "base.pt", "one.safetensors", "--weights", "1,2"), "2 weights for 1 delta;"),
    "weight": (("merge", "base.pt", "one.safetensors", "--weights", "nan"), "all must be finite"),
    "number": (("merge", "base.pt", "one.safetensors", "--weights", "half"), "--weights 'half': numbers separated"),
    "bases": (("compose", "one.safetensors", "otherone.safetensors"), "are for different bases"),
    "k": (("train", "base.pt", "--data", "one.npz", "--k", "9999999"), "k 9,999,999: 3,123 entries can be selected"),
    "criterion": (
        ("train", "base.pt", "--data", "one.npz", "--criterion", "luck"),
        "known are change, snip, gradient, random",
    ),
    "values": (("train", "base.pt", "--data", "one.npz", "--values", "int4", "--epochs", "1"), "known are fp64, fp32"),
    "labels": (("train", "base.pt", "--data", "x.npz"), "labels"),
    "existing": (("merge", "base.pt", "one.safetensors", "-o", "other.pt"), "other.pt exists already"),
    "existing undo": (("apply", "base.pt", "one.safetensors", "-o", "x.pt"), "x.pt.undo.safetensors exists already"),
    "unnamed": (("train", "base.pt", "--data", "one.npz", "--data", "two.npz"), "--data one.npz: with several --data"),
    "one named": (("train", "base.pt", "--data", "a=none.npz"), "There is no file or folder none.npz"),
    "source": (
        ("train", "base.pt", "--data", "a=one.npz", "--data", "b=two.npz", "--source", "c=one.safetensors"),
        "--source c=one.safetensors: there is no --data c=...",
    ),
    "repeat": (
        ("train", "base.pt", "--data", "a=one.npz", "--data", "b=two.npz", "--repeat", "a=x"),
        "--repeat a=x: a whole number is needed",
    ),
    "optimizer": (("train", "base.pt", "--data", "one.npz", "--optimizer", "lion"), "known are sgd, adamw"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, forks: Forks, folder: Path) -> None:
    whole = (folder / "one.safetensors").read_bytes()
    (folder / "x.pt.undo.safetensors").write_bytes(whole)
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    (folder / "bent.safetensors").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    if not (folder / "otherone.safetensors").exists():
        run = forks.run(folder, "sparse", "train", "other.pt", *TRAIN[3:], "one.npz", "--head", "5", "--epochs", 1,
                        "-o", "otherone.safetensors", "-q")  # fmt: skip
        assert run.returncode == 0, run.stderr
    arguments, sentence = REFUSED[case]
    before = {each.name: each.stat().st_mtime_ns for each in folder.iterdir()}
    run = forks.run(folder, "sparse", *arguments, *([] if "-o" in arguments else ["-o", "never.safetensors"]))
    assert run.returncode == 2, run.stderr
    assert sentence in run.stderr
    assert run.stderr.startswith("error:")
    assert {each.name: each.stat().st_mtime_ns for each in folder.iterdir()} == before


@pytest.mark.matrix
def test_a_hugging_face_folder(forks: Forks, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "bert")
    (folder / "bert" / "vocab.txt").write_text("[PAD]\n")
    words = np.random.default_rng(0).integers(0, 40, (64, 8))
    np.savez(folder / "words.npz", x=words, y=(words[:, 0] > 19).astype(np.int64))
    run = forks.run(folder, "sparse", "train", "bert", "--data", "words.npz", "--head", "classifier", "--epochs", 1,
                    "--sparse-epochs", 1, "-o", "bert.safetensors")  # fmt: skip
    assert run.returncode == 0, run.stderr
    run = forks.run(folder, "sparse", "apply", "bert", "bert.safetensors", "-o", "bert-task")
    assert run.returncode == 0, run.stderr
    assert (folder / "bert-task" / "vocab.txt").exists()
    assert not same(state(folder / "bert"), state(folder / "bert-task"))
    run = forks.run(folder, "sparse", "revert", "bert-task", "-o", "bert-back")
    assert run.returncode == 0, run.stderr
    assert same(state(folder / "bert"), state(folder / "bert-back"))
    shutil.rmtree(folder / "bert-back")
