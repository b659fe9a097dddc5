"""Files that version 0.3 wrote are read by this one: folders, plans, deltas, families, sets, and the cache.

They lie in tests/golden/version-0.3, with the models and data they were made of, and were written by::

    compress quantize cnn.pt --calib calib.npz --bits 4 --no-bench --out quantized
    compress allocate cnn.pt --calib calib.npz --budget size=7kB --out plan.json
    compress sweep cnn.pt --calib calib.npz --method mse --points 2 --out front
    compress sparse train mlp.pt --data train.npz --epochs 1 --sparse-epochs 1 --k 40 -o delta.safetensors
    compress lowrank train mlp.pt --data train.npz --epochs 2 --lr 0.1 --batch 64 -o family
    compress distill images.npz --classes 3 --ipc 1 --width 4 --depth 1 --experts 2 --iterations 4 ... -o distilled

``outputs.npz`` holds what the models of that version returned: of ``quantized`` for calib.npz, and for its ``x`` of
mlp.pt with the delta and of the family cut to half the MACs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from tests.cli.conftest import Forks  # type: ignore[import-not-found]

FILES = Path(__file__).resolve().parents[1] / "golden" / "version-0.3"
pytestmark = pytest.mark.slow


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(FILES, tmp_path / "old"))


def assert_as_then(name: str, module: Callable[[Tensor], Tensor], x: np.ndarray) -> None:
    with np.load(FILES / "outputs.npz") as outputs, torch.no_grad():
        expected = torch.from_numpy(outputs[name])
        torch.testing.assert_close(module(torch.from_numpy(x)), expected, rtol=1e-4, atol=1e-5)


def read(path: Path, **given: object) -> nn.Module:
    return torch.load(path, weights_only=False, **given)  # type: ignore[no-any-return, arg-type]


def test_a_folder(old: Path, forks: Forks) -> None:
    samples = np.load(old / "calib.npz")["x"]
    assert_as_then("quantized", compress.load(old / "quantized"), samples)
    run = forks.run(old, "verify", "quantized")
    assert run.returncode == 0, run.stderr
    assert "quantized passed" in run.stdout
    run = forks.run(old, "export", "quantized", "-o", "again.onnx")
    assert run.returncode == 0, run.stderr
    assert (old / "again.onnx").exists()


def test_a_plan_is_carried_out(old: Path, forks: Forks) -> None:
    run = forks.run(old, "apply", "plan.json", "cnn.pt", "--calib", "calib.npz", "-o", "out")
    assert run.returncode == 0, run.stderr
    assert (
        json.loads((old / "out/plan.json").read_text())["choices"]
        == json.loads((old / "plan.json").read_text())["choices"]
    )
    run = forks.run(old, "diff", "front/plan-01.json", "plan.json")
    assert run.returncode == 0, run.stderr
    assert "adaquant" in run.stdout


def test_sensitivities_in_the_cache_are_found(old: Path, forks: Forks) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (old / "cache").rglob("*.safetensors")}

    kept = times()
    assert len(kept) == 3
    run = forks.run(
        old, "allocate", "cnn.pt", "--calib", "calib.npz", "--budget", "size=7kB", "-o", "again.json",
        variables={"COMPRESS_CACHE": str(old / "cache")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    then, now = (json.loads((old / name).read_text())["choices"] for name in ("plan.json", "again.json"))
    assert now == then
    assert times() == kept


def test_a_delta(old: Path, forks: Forks) -> None:
    run = forks.run(old, "sparse", "apply", "mlp.pt", "delta.safetensors", "-o", "tuned.pt")
    assert run.returncode == 0, run.stderr
    assert_as_then("tuned", read(old / "tuned.pt"), np.load(FILES / "outputs.npz")["x"])


def test_a_family(old: Path, forks: Forks) -> None:
    run = forks.run(old, "lowrank", "extract", "family", "--budget", "macs=0.5x", "-o", "half.pt")
    assert run.returncode == 0, run.stderr
    assert_as_then("half", read(old / "half.pt"), np.load(FILES / "outputs.npz")["x"])


def test_a_distilled_set_is_samples(old: Path, forks: Forks) -> None:
    run = forks.run(
        old, "quantize", "cnn.pt", "--calib", "distilled/distilled.npz", "--method", "mse", "--bits", "8", "-o", "out"
    )
    assert run.returncode == 0, run.stderr
    assert (old / "out/model.onnx").exists()
