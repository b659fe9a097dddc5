"""Files in sessions with ``session.x64quantprecision``, which makes 8-bit weights unsigned so that no sum saturates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from compress.exporters.build import build_onnx, write_onnx
from compress.graph.traced import TracedModel


class Convolutions(nn.Module):
    """As many outputs everywhere: equal zero points. ``twice`` is called twice; the last linear has few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.deep, self.twice = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.first, self.last = nn.Linear(16, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.deep(torch.relu(self.wide(x)) + x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.last(torch.relu(self.first(x.mean((2, 3)))))


class Linears(nn.Module):
    """Equal linears, ``twice`` called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.twice(torch.relu(self.twice(torch.tanh(self.first(x)))))))


CASES = {
    "convolutions": (Convolutions, (16, 6, 6), {}),
    "linears on rows": (Linears, (32,), {}),
    "linears on tokens": (Linears, (6, 32), {}),
    "dynamic linears": (Linears, (6, 32), {"act_bits": 8, "dynamic": True}),
}


@pytest.mark.slow(cases=2)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", list(CASES))
def test_files_load_and_compute_what_pytorch_does(
    case: str, bits: int, compress_quickly: Callable[..., TracedModel], tmp_path: Path
) -> None:
    made, shape, settings = CASES[case]
    # At 4 bits the first and the last layer keep their 8.
    traced = compress_quickly(made(), torch.randn(64, *shape), bits=bits, first_last_bits=8, **settings)
    path = tmp_path / "model.onnx"
    write_onnx(build_onnx(traced), path, {})
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = torch.randn(32, *shape)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = traced.module(x).numpy()
    # Grids' steps are the same; a value on the edge between two may round to the other.
    assert np.linalg.norm(got - wanted) <= 0.01 * np.linalg.norm(wanted)


@pytest.mark.matrix
def test_every_call_reads_a_zero_point_of_its_own(compress_quickly: Callable[..., TracedModel]) -> None:
    model = build_onnx(compress_quickly(Convolutions(), torch.randn(64, 16, 6, 6), bits=8))
    read = [
        str(node.inputs[2].name) for node in model.graph if node.op_type == "DequantizeLinear" and len(node.inputs) > 2
    ]
    weights = [name for name in read if ".weight_" in name]
    calls = ("stem", "wide", "deep", "twice", "first", "last")
    assert sorted(weights) == sorted([*(f"{name}.weight_zero_point" for name in calls), "twice.weight_zero_point#1"])
    for name in weights:
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        assert tensor.dtype == ir.DataType.INT8
        assert not tensor.numpy().any()
    assert "twice.weight_codes" in model.graph.initializers
    assert "twice.weight_codes#1" not in model.graph.initializers
