"""Shipped tiles are those that the measured tables say, are found by the calls they were measured for, and fit them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernel_tuning import fastest_tiles, shipped
from compress.kernels import tuning
from compress.kernels.tuning import file_name, measured_tile

ROOT = Path(__file__).resolve().parents[2]
TABLES = sorted((ROOT / "benchmarks" / "results").glob("kernel-tuning-*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_files_are_made_of_measured_tables(path: Path) -> None:
    table = json.loads(path.read_text())
    assert (ROOT / "kernels" / file_name(table["device"])).read_text() == shipped(table, path.name)
    assert fastest_tiles(table)


def test_every_shipped_file_has_a_table() -> None:
    files = {path.name for path in (ROOT / "kernels").glob("tiles-*.json")}
    assert files == {file_name(json.loads(path.read_text())["device"]) for path in TABLES}


def on_gpu(rows: int, inputs: int) -> Any:
    """What a launcher knows about an ``x`` that is on a GPU."""
    return SimpleNamespace(device=torch.device("cuda:0"), shape=(rows, inputs))


def test_only_what_was_measured_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_gpu_name", lambda device: "NVIDIA H200")
    bf16 = torch.bfloat16
    assert measured_tile(on_gpu(1, 4096), "packed_gemv", 4096, bf16, 4, 128) == (8, 4)
    assert measured_tile(on_gpu(9, 4096), "packed_dot", 4096, bf16, 4, 128) == (128, 16, 4, 4, 3, 1), "9 rows as 16"
    assert measured_tile(on_gpu(1, 4096), "thin_gemv", 512, bf16) == (2, 8)
    for rows in (2, 4, 7, 8):
        assert measured_tile(on_gpu(rows, 4096), "packed_dot", 4096, bf16, 4, 128) == (128, 16, 4, 4, 3, 1)
        assert measured_tile(on_gpu(rows, 512), "thin_dot", 4096, bf16) == (64, 128, 1, 4, 4)
    for call in (
        (on_gpu(1, 4096), "packed_gemv", 4096, bf16, 3, 128),
        (on_gpu(1, 4096), "packed_gemv", 4096, bf16, 4, 64),
        (on_gpu(1, 4096), "packed_gemv", 4096, torch.float32, 4, 128),
        (on_gpu(1, 4100), "packed_gemv", 4096, bf16, 4, 128),
        (on_gpu(100, 4096), "packed_dot", 4096, bf16, 4, 128),
        (on_gpu(2, 4096), "thin_gemv", 512, bf16),
    ):
        assert measured_tile(*call) is None
    monkeypatch.setattr(tuning, "_gpu_name", lambda device: "NVIDIA Something Else")
    assert measured_tile(on_gpu(1, 4096), "packed_gemv", 4096, bf16, 4, 128) is None
    assert measured_tile(torch.zeros(1, 4096), "packed_gemv", 4096, bf16, 4, 128) is None


def test_file_names() -> None:
    assert file_name("NVIDIA GeForce RTX 4090") == "tiles-nvidia-geforce-rtx-4090.json"
