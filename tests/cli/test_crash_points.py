"""Every verb that writes, killed at its changes to files: old or new, never half, and the same end afterwards."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.conftest import Forks, populate  # type: ignore[import-not-found]
from tests.sweep import sweep

POINTS = 8


@dataclass(frozen=True)
class Verb:
    """Its arguments but for ``--out``, and what of its result is the same in every run; () for a file.

    With ``beside`` the file has another one that belongs to it, and is away while that one changes, for the next run to
    put in its place: it is never seen beside a file that it was not written with.
    """

    arguments: tuple[object, ...]
    same: tuple[str, ...] = ()
    out: str = "out"
    beside: bool = False


SMALL = ("--width", 4, "--depth", 1, "--experts", 2, "--expert-epochs", 2, "--expert-batch", 8, "--expert-lr", 0.05)
FOLDER = ("model.onnx", "model.safetensors", "graph.json", "plan.json")
VERBS = {
    "quantize": Verb(("quantize", "model.pt", "--calib", "calib.npz", "--bits", 3, "--iterations", 20), FOLDER),
    "export": Verb(("export", "model.pt", "--input-shape", "1,8,8"), out="out.onnx"),
    "sweep": Verb(
        ("sweep", "model.pt", "--calib", "calib.npz", "--method", "mse", "--sensitivity", "gram", "--points", 2),
        ("front.csv",),
    ),
    "lowrank train": Verb(
        ("lowrank", "train", "mlp.pt", "--data", "train.npz", "--epochs", 3, "--lr", 0.1, "--batch", 64),
        ("norms.safetensors",),
    ),
    "lowrank truncate": Verb(("lowrank", "truncate", "mlp.pt", "--calib", "x.npz"), ("norms.safetensors",)),
    "sparse train": Verb(
        ("sparse", "train", "mlp.pt", "--epochs", 1, "--sparse-epochs", 2, "--k", 40, "--data", "train.npz"),
        out="out.safetensors",
    ),
    "sparse apply": Verb(("sparse", "apply", "mlp.pt", "delta.safetensors"), out="out.pt", beside=True),
    "distill": Verb(
        ("distill", "images.npz", "--classes", 3, "--ipc", 1, *SMALL, "--steps", 2, "--start-epochs", 1,
         "--iterations", 6, "--looks", 0),
        ("distilled.npz",),
    ),
    "stream": Verb(
        ("stream", "llama", "--calib", "ids.npz", "--bits", 4, "--group-size", 32), ("config.json", "plan.json")
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Forks, request: pytest.FixtureRequest) -> Path:
    """A convolutional network, a perceptron, a small Llama, and data for each."""
    folder = populate(tmp_path_factory.mktemp("crash"))
    random = np.random.default_rng(0)
    layers = (nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
    torch.manual_seed(0)
    torch.save(nn.Sequential(*layers).eval(), folder / "mlp.pt")
    x = random.standard_normal((256, 12), np.float32)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "train.npz", x=x, y=(x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5))
    np.savez(folder / "images.npz", images=random.standard_normal((30, 1, 8, 8), np.float32), labels=np.arange(30) % 3)
    np.savez(folder / "ids.npz", input_ids=random.integers(0, 100, (8, 16)))
    made = forks.run(folder, *VERBS["sparse train"].arguments, "-o", "delta.safetensors")
    assert made.returncode == 0, made.stderr
    return folder


def content(out: Path, same: tuple[str, ...]) -> dict[str, bytes]:
    """Of a file its bytes, of a folder those of ``same`` and the names of all."""
    if not out.exists():
        return {}
    if out.is_file():
        return {"": out.read_bytes()}
    names = {str(each.relative_to(out)): b"" for each in sorted(out.rglob("*"))}
    return names | {name: (out / name).read_bytes() for name in same if (out / name).exists()}


@sweep("verb", VERBS, sample=["sparse apply"])
@pytest.mark.slow
def test_old_or_new_and_on_to_the_same_end(verb: str, place: Path, tmp_path: Path, forks: Forks) -> None:
    work = Path(shutil.copytree(place, tmp_path / "work"))
    if verb == "stream":
        pytest.importorskip("transformers")
        from tests.streaming.conftest import save_llama  # type: ignore[import-not-found]

        save_llama(work / "llama", 3)
    given = VERBS[verb]
    command = (*given.arguments, "-o", given.out)
    cached = {"COMPRESS_CACHE": str(work / "cache")}

    # What was there before: another run's result, which the killed one is to replace.
    first = forks.run(work, *command, variables=cached)
    assert first.returncode == 0, first.stderr
    new = content(work / given.out, given.same)
    assert set(given.same) <= set(new)
    old = work / "old"
    (work / given.out).rename(old)
    if old.is_dir():
        (old / "notes").write_text("of the run before")
    else:
        old.write_bytes(b"of the run before")
    before = content(old, given.same)

    def begin() -> None:
        shutil.rmtree(work / "cache", ignore_errors=True)
        if old.is_dir():
            shutil.copytree(old, work / given.out)
        else:
            shutil.copy(old, work / given.out)

    begin()
    command = (*command, "--overwrite")
    beside = {path.name for path in work.iterdir()}
    done = forks.run(work, *command, variables=cached, counts_to=tmp_path / "count")
    assert done.returncode == 0, done.stderr
    assert content(work / given.out, given.same) == new
    count = int((tmp_path / "count").read_text())
    assert count > 3
    found = []
    for point in sorted({round((count - 1) * part / (POINTS - 1)) for part in range(POINTS)}):
        shutil.rmtree(work / given.out) if old.is_dir() else (work / given.out).unlink()
        begin()
        killed = forks.run(work, *command, variables=cached, dies_at=point)
        assert killed.returncode == -9, f"the run came to its end before change {point} of {count}"
        left = content(work / given.out, given.same)
        # A run that died while it took its result's place is put right when the next one starts.
        again = forks.run(work, *command, variables=cached)
        assert again.returncode == 0, f"after a death at change {point} of {count}: {again.stderr}"
        assert content(work / given.out, given.same) == new, f"after a death at change {point} of {count}"
        assert left in (before, new, *([{}] if given.beside else [])), f"at change {point} of {count}"
        found.append(left == new)
        assert {path.name for path in work.iterdir()} - {"cache"} == beside - {"cache"}
    assert not found[0]
    assert found == sorted(found)
