"""The store of finished layers: whole files only, of one run only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.calib.resume import ResumeStore, open_store
from compress.errors import InputError
from tests.every import every


def tensors() -> dict[str, torch.Tensor]:
    return {"packed": torch.arange(6, dtype=torch.uint8).reshape(2, 3).T, "scale": torch.rand(3)}


def finished(store: ResumeStore) -> int:
    return len(list(store.folder.glob("*.safetensors")))


def test_what_is_saved_comes_back_in_the_next_run(tmp_path: Path) -> None:
    saved = tensors()
    ResumeStore(tmp_path / "work", "a").save("layer.0", saved, {"note": "slow"})
    store = ResumeStore(tmp_path / "work", "a")
    assert finished(store) == 1
    found = store.load("layer.0")
    assert found is not None
    assert found[1] == {"note": "slow"}
    assert found[0].keys() == saved.keys()
    assert every(torch.equal(found[0][name], saved[name]) for name in saved)
    assert store.load("layer.1") is None


def test_another_fingerprint_is_another_run(tmp_path: Path) -> None:
    ResumeStore(tmp_path / "work", "a").save("layer", tensors(), {})
    store = ResumeStore(tmp_path / "work", "b")
    assert finished(store) == 0
    assert store.load("layer") is None
    assert finished(ResumeStore(tmp_path / "work", "b")) == 0


def test_layers_without_a_fingerprint_are_not_trusted(tmp_path: Path) -> None:
    # What a run leaves that was killed while it deleted the folder.
    ResumeStore(tmp_path / "work", "a").save("layer", tensors(), {})
    (tmp_path / "work" / "fingerprint").unlink()
    assert finished(ResumeStore(tmp_path / "work", "b")) == 0


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_cut_short_is_done_again(tmp_path: Path, size: int) -> None:
    store = ResumeStore(tmp_path / "work", "a")
    store.save("layer", tensors(), {})
    (file,) = store.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    assert store.load("layer") is None
    store.save("layer", tensors(), {})
    assert store.load("layer") is not None


def test_a_write_that_fails_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResumeStore(tmp_path / "work", "a")

    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        store.save("layer", tensors(), {})
    assert store.load("layer") is None
    assert finished(ResumeStore(tmp_path / "work", "a")) == 0


def test_names_that_differ_only_in_signs_stay_apart(tmp_path: Path) -> None:
    store = ResumeStore(tmp_path, "a")
    names = ["a/b", "a_b", "a.b", "a b", "ä" * 300, "ä" * 299, ".."]
    for position, name in enumerate(names):
        store.save(name, {"x": torch.tensor([position])}, {})
    for position, name in enumerate(names):
        found = store.load(name)
        assert found is not None
        assert int(found[0]["x"]) == position


def test_scratch_starts_empty(tmp_path: Path) -> None:
    store = ResumeStore(tmp_path, "a")
    (store.fresh_scratch() / "old").write_text("x")
    assert list(store.fresh_scratch().iterdir()) == []


def test_the_folder_goes_when_the_run_ends_well(tmp_path: Path) -> None:
    with open_store(tmp_path / "work", "a") as store:
        store.save("layer", tensors(), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_run_keeps_its_layers_and_nothing_else(tmp_path: Path, finished: int) -> None:
    def run() -> None:
        with open_store(tmp_path / "work", "a") as store:
            (store.fresh_scratch() / "large").write_text("x")
            for layer in range(finished):
                store.save(f"layer{layer}", tensors(), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    names = sorted(path.name.partition("-")[0] for path in tmp_path.rglob("*") if path.is_file())
    assert names == (["fingerprint", "layer0", "parts.json"] if finished else [])
    assert (tmp_path / "work").exists() == bool(finished)


def test_without_a_folder_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run() -> None:
        with open_store(None, "a") as store:
            store.save("layer", tensors(), {})
            assert list(tmp_path.iterdir()) != []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_have_scratch_folders_of_their_own(tmp_path: Path) -> None:
    store = ResumeStore(tmp_path / "store", "same")
    mine = store.fresh_scratch()
    (mine / "file").write_text("mine")
    other = tmp_path / "store" / "scratch-1"  # a process that lives
    other.mkdir()
    (other / "file").write_text("another's")
    gone = tmp_path / "store" / "scratch-999999999"
    gone.mkdir()
    assert list(store.fresh_scratch().iterdir()) == []
    assert (other / "file").exists()
    assert not gone.exists()
    store.leave()
    assert (other / "file").exists()
    assert not mine.exists()
