"""Models written in the form they came in: whole or not at all, and nothing else is replaced or left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

from compress.errors import InputError
from compress.models import modelfile
from compress.models.checkpoint import load_model
from compress.models.modelfile import check_target, save_like


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.save(nn.Linear(3, 2), tmp_path / "base.pt")
    return tmp_path / "base.pt"


def save(origin: Path, out: Path, **given: Any) -> None:
    loaded = load_model(origin)
    save_like(loaded, origin, out, **({"factory": None, "overwrite": False} | given))


def test_files_to_hand_on(base: Path) -> None:
    for name in ("new/a.safetensors", "new/a.pt"):
        save(base, base.parent / name)
    assert (base.parent / "new" / "a.safetensors").stat().st_mode == base.stat().st_mode
    assert load_file(base.parent / "new" / "a.safetensors").keys() == {"weight", "bias"}
    assert sorted(each.name for each in (base.parent / "new").iterdir()) == ["a.pt", "a.safetensors"]


def test_what_is_no_target(base: Path) -> None:
    other = base.parent / "photos"
    other.mkdir()
    (other / "1.jpg").write_text("")
    for name, sentence in (
        ("base.pt", r"base\.pt exists already"),
        ("a.pt2", r"a\.pt2: a \.pt2 file is an export; write a \.pt or \.safetensors file first"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_target(base, base.parent / name, overwrite=False)
    with pytest.raises(InputError, match=r"photos is a folder, and .* a file"):
        check_target(base, other, overwrite=True)
    folder = base.parent / "bert"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="photos is no Hugging Face folder, so --overwrite leaves it alone"):
        check_target(folder, other, overwrite=True)
    check_target(folder, folder, overwrite=True)


def test_a_failed_write_leaves_what_was_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = base.read_bytes()

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: no space")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*base\.pt: torch could not write all of it; free"):
        save(base, base, overwrite=True)
    assert base.read_bytes() == before
    assert [each.name for each in base.parent.iterdir()] == ["base.pt"]


def test_a_folder_takes_along_what_is_not_weights(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, out = base.parent / "origin", base.parent / "v1.5"
    for name in ("1_Pooling", "onnx"):
        (origin / name).mkdir(parents=True)
    for name in (
        "config.json",
        "vocab.txt",
        "tf_model.h5",
        "model.safetensors",
        "1_Pooling/config.json",
        "onnx/m.onnx",
    ):
        (origin / name).write_text("{}")
    paths = ["", "1_Pooling", "../photos"]
    (origin / "modules.json").write_text(json.dumps([{"path": each} for each in paths]))

    def write(module: nn.Module, folder: Path) -> None:
        folder.mkdir()
        save_model(module, str(folder / "model.safetensors"))

    monkeypatch.setattr(modelfile, "save_pretrained", write)
    loaded = load_model(base)
    for overwrite in (False, True):
        save_like(loaded, origin, out, factory=None, overwrite=overwrite)
        found = {str(each.relative_to(out)) for each in out.rglob("*") if each.is_file()}
        assert found == {"config.json", "vocab.txt", "modules.json", "model.safetensors", "1_Pooling/config.json"}
    assert not list(base.parent.glob(".*"))
    (origin / "modules.json").write_text("[1]")
    with pytest.raises(InputError, match=r"modules\.json is damaged"):
        save_like(loaded, origin, out, factory=None, overwrite=True)
    assert (out / "vocab.txt").exists()
