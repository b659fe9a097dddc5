"""What of ours is no model is called what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.data.samples import load_samples
from compress.errors import InputError
from compress.files.known_folders import FAMILY_FILE, SET_FILE, lookalike
from compress.models.checkpoint import load_model
from compress.runtime.artifact import load_artifact
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import Undo, write_delta, write_undo
from compress.sparse.reference import read_reference


def streamed(folder: Path) -> Path:
    (folder / "config.json").write_text('{"quantization_config": {}}')
    (folder / "plan.json").touch()
    return folder


def delta() -> SparseDelta:
    return SparseDelta(None, {"w": SparseTensor((4,), "float32", torch.tensor([1]), torch.tensor([0.5]))})


def test_a_delta(tmp_path: Path) -> None:
    path = write_delta(delta(), tmp_path / "task.safetensors")
    with pytest.raises(InputError, match=r"is a delta; `compress sparse inspect .*task\.safetensors` describes it"):
        load_model(path)
    with pytest.raises(InputError, match="takes a delta out again"):
        load_model(write_undo(Undo(delta(), "a", "b"), tmp_path / "undo.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert lookalike(path) is None  # whoever reads it says that it is damaged


@pytest.mark.parametrize(
    ("name", "what"),
    [(FAMILY_FILE, "low-rank family"), (SET_FILE, "distilled set"), ("graph.json", "compressed already"),
     ("front.json", "plans of")],
)  # fmt: skip
def test_a_folder(name: str, what: str, tmp_path: Path) -> None:
    assert lookalike(tmp_path) is None
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=what):
        load_model(tmp_path)


def test_a_streamed_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="what `compress stream` has written, for transformers"):
        load_model(streamed(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert lookalike(tmp_path) is None  # a model of floats, and a plan for it
    (tmp_path / "config.json").write_text("{")
    assert lookalike(tmp_path) is None


def test_a_part_of_a_finished_folder(tmp_path: Path) -> None:
    part = tmp_path / "model.safetensors"
    part.touch()
    assert lookalike(part) is None
    (tmp_path / "graph.json").touch()
    with pytest.raises(InputError, match=r"model\.safetensors is a part of .*, a model that is compressed already"):
        load_model(part)


def test_where_a_folder_or_samples_or_a_delta_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no graph\.json"):
        load_artifact(tmp_path)
    (tmp_path / SET_FILE).touch()
    (tmp_path / "distilled.png").touch()  # no picture to calibrate on
    for read in (load_artifact, load_samples, read_reference):
        with pytest.raises(InputError, match=r"is a distilled set; give it as samples, --calib .*distilled\.npz"):
            read(tmp_path)
    path = write_delta(delta(), tmp_path / "task.safetensors")
    with pytest.raises(InputError, match="is a delta"):
        load_samples(path)  # not the first of its arrays
