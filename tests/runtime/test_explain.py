"""What is said to run each layer is what does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import api
from compress.runtime.artifact import load_artifact
from compress.runtime.explain import explain
from compress.runtime.pack import packed_for_gpu

HOPPER = (9, 0)


class Net(nn.Module):
    """A table, linears of two widths of group, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.first = nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.first(self.table(ids)))
        return self.head(self.conv(x.transpose(1, 2)).mean(2))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("explain") / "out"
    ids = torch.randint(0, 40, (8, 6))
    api.quantize(Net().eval(), calib=ids, bits=4, group_size=32, method="mse", ignore=("head",), out=folder)
    return folder


@pytest.mark.slow
def test_on_the_cpu_the_reference_runs(artifact: Path) -> None:
    rows = {row.layer: row for row in explain(load_artifact(artifact), (torch.zeros(3, 9, dtype=torch.int64),))}
    assert list(rows) == ["table", "first", "conv", "head"]
    first = rows["first"]
    assert (first.operator, first.kernel, first.bits, first.group_size) == ("linear", "reference", 4, 32)
    assert (first.rows, first.inputs, first.outputs) == (27, 64, 64)
    assert first.refused[0] == "packed_gemv: only on GPUs, not on cpu; only 1 row, not 27"
    assert rows["conv"].refused == ("no kernel takes conv1d weights in codes: they are unpacked at every call",)
    assert (rows["conv"].rows, rows["conv"].inputs, rows["conv"].outputs) == (27, 192, 8)
    assert (rows["head"].kernel, rows["head"].refused) == ("torch", ("its weight is stored as floats",))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "kernel"), [(1, "packed_gemv"), (16, "packed_dot"), (300, "packed_unpack")])
def test_of_a_gpu_that_is_not_here(artifact: Path, batch: int, kernel: str) -> None:
    packed = packed_for_gpu(load_artifact(artifact), HOPPER)
    rows = {row.layer: row for row in explain(packed, (torch.zeros(batch, 1, dtype=torch.int64),), HOPPER)}
    assert (rows["first"].operator, rows["first"].kernel, rows["first"].rows) == ("packed_linear", kernel, batch)
    assert rows["conv"].kernel == rows["table"].kernel == "torch"
    assert "they were unpacked when the model was loaded" in rows["conv"].refused[0]


def test_a_layer_no_kernel_takes_says_why(artifact: Path) -> None:
    packed = packed_for_gpu(load_artifact(artifact), (7, 5))
    rows = {row.layer: row for row in explain(packed, (torch.zeros(1, 1, dtype=torch.int64),), (7, 5))}
    assert (rows["first"].operator, rows["first"].kernel, rows["first"].bits) == ("linear", "torch", None)
    too_old = "only compute capability 8.0 and above, not 7.5"
    names = ("packed_gemv", "packed_dot", "packed_unpack")
    assert rows["first"].refused == tuple(f"{name}: {too_old}" for name in names), (
        "and nothing of rows it does not have"
    )


def test_what_is_said_is_what_the_operator_chooses(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.kernels import packed_linear

    asked: list[Any] = []

    def remember(call: Any) -> Any:
        asked.append(choose(call))
        return asked[-1]

    choose = packed_linear.choose
    monkeypatch.setattr(packed_linear, "choose", remember)
    packed = packed_for_gpu(load_artifact(artifact), HOPPER)
    rows = explain(packed, (torch.zeros(2, 5, dtype=torch.int64),))
    said = [(row.kernel, row.refused) for row in rows if row.operator == "packed_linear"]
    assert said == [(choice.name, choice.refused) for choice in asked]
    assert said
