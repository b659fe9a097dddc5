"""What of ours is no model is called what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.checkpoint import load_model
from compress.distill.folder import SET_FILE
from compress.errors import InputError
from compress.lookalike import lookalike
from compress.sparse.delta import SparseDelta, SparseTensor
from compress.sparse.deltafile import Undo, write_delta, write_undo
from compress.training.family import FAMILY_FILE


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
