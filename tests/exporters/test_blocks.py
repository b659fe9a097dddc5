"""Grouped weights in real files: MatMulNBits where its widths allow, folded float weights elsewhere."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from compress import api
from compress.exporters.blocks import ACCURACY_LEVEL
from compress.exporters.session import open_session, run_session


class Rows(nn.Module):
    """Linears on rows and, behind a mean, on vectors; rows of 40 and 72 weights; one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 72), nn.Linear(72, 72, bias=False)
        self.third, self.last = nn.Linear(72, 72), nn.Linear(72, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x) + x).mean(1)
        return self.last(torch.relu(self.third(x)))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Rows().eval()


def folder_of(module: nn.Module, tmp_path: Path, **settings: object) -> Path:
    out = tmp_path / "out"
    api.quantize(module, input_shape=(5, 40), out=out, **settings)  # type: ignore[arg-type]
    return out


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("bits", "group", "method"), [(2, 16, "hqq"), (4, 16, "mse"), (4, 32, "hqq"), (8, 64, "mse"), (4, 128, "hqq")]
)
def test_packed_weights_stay_packed(module: nn.Module, tmp_path: Path, bits: int, group: int, method: str) -> None:
    out = folder_of(module, tmp_path, bits=bits, group_size=group, method=method, first_last_bits=bits)
    graph = onnx.load(out / "model.onnx").graph
    nodes = {node.name: node for node in graph.node if node.op_type == "MatMulNBits"}
    assert set(nodes) == {"first", "second", "third", "last"}
    for node in nodes.values():
        attributes = {each.name: each.i for each in node.attribute}
        assert attributes["bits"] == bits
        assert attributes["block_size"] == group
        assert attributes["accuracy_level"] == ACCURACY_LEVEL
    assert not any(node.op_type in ("Add", "Gemm", "MatMul") for node in graph.node if node.name in nodes)
    loaded = api.load(out)
    x = torch.randn(9, 5, 40)
    with torch.no_grad():
        wanted = loaded(x)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        (got,) = run_session(open_session(out / "model.onnx", level), [(x,)])
        # Level 4 rounds the input of every layer to int8.
        assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("bits", [3, 5])
def test_other_widths_fold_to_float_weights(module: nn.Module, tmp_path: Path, bits: int) -> None:
    out = folder_of(module, tmp_path, bits=bits, group_size=32, first_last_bits=bits)
    assert not any(node.op_type == "MatMulNBits" for node in onnx.load(out / "model.onnx").graph.node)
    loaded = api.load(out)
    x = torch.randn(9, 5, 40)
    (got,) = run_session(open_session(out / "model.onnx", "ORT_ENABLE_ALL"), [(x,)])
    with torch.no_grad():
        torch.testing.assert_close(got, loaded(x), rtol=1e-4, atol=1e-5)


@pytest.mark.matrix
def test_finer_groups_are_closer_to_the_float_model(module: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(64, 5, 40)
    errors = []
    for group in (16, 64):
        out = folder_of(module, tmp_path / str(group), bits=3, group_size=group, first_last_bits=3)
        with torch.no_grad():
            errors.append(float((api.load(out)(x) - module(x)).norm()))
    assert errors[0] < errors[1]
