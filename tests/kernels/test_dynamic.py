"""The dynamic grid against ONNX Runtime's own operator."""

from __future__ import annotations

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from compress.exporters.session import open_session
from compress.kernels.dynamic import fake_quantize_dynamic

SHAPES = [(1,), (17,), (5, 8), (3, 7, 16), (2, 3, 5, 7)]
KINDS = {
    "both signs": lambda x: x,
    "positive": lambda x: x.abs() + 0.5,
    "negative": lambda x: -x.abs() - 0.5,
    "mostly positive": lambda x: x + 2,
    "one value": lambda x: torch.full_like(x, 1.7),
    "one negative value": lambda x: torch.full_like(x, -0.3),
    "zeros": torch.zeros_like,
    "one outlier": lambda x: torch.cat([x.flatten()[:-1], torch.tensor([300.0])]).reshape(x.shape),
    "small": lambda x: 1e-6 * x,
    "large": lambda x: 1e6 * x,
}


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph(nodes, "dynamic", *([each] for each in values))
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    return open_session(model.SerializeToString(), "ORT_DISABLE_ALL")


def run(session: ort.InferenceSession, x: Tensor) -> Tensor:
    (found,) = session.run(None, {"x": x.contiguous().numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_equal_to_onnx(session: ort.InferenceSession, shape: tuple[int, ...], kind: str) -> None:
    for _ in range(20):
        x = KINDS[kind](torch.randn(shape))
        got = fake_quantize_dynamic(x)
        assert got.shape == x.shape
        assert got.dtype == torch.float32
        assert torch.equal(got, run(session, x))


def test_large_tensors(session: ort.InferenceSession) -> None:
    x = torch.randn(64, 128, 96) * torch.linspace(0.1, 4, 96)
    assert torch.equal(fake_quantize_dynamic(x), run(session, x))


def test_values_not_in_a_row(session: ort.InferenceSession) -> None:
    for x in (torch.randn(6, 9).t(), torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last)):
        assert torch.equal(fake_quantize_dynamic(x), run(session, x))


def test_the_grid_holds_zero_and_at_most_256_values() -> None:
    for x in (torch.rand(9000) + 4, -torch.rand(9000) - 4, torch.randn(9000)):
        got = fake_quantize_dynamic(torch.cat([x, torch.zeros(1)]))
        assert got[-1] == 0.0
        assert len(got.unique()) <= 256
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        assert (got[:-1] - x).abs().max() <= step * 0.5001


def test_the_input_is_left_alone() -> None:
    for x in (torch.randn(50), torch.zeros(50)):
        before = x.clone()
        fake_quantize_dynamic(x).add_(1)
        assert torch.equal(x, before)


def test_opcheck() -> None:
    for x in (torch.randn(3, 4), torch.zeros(5), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        torch.library.opcheck(fake_quantize_dynamic, (x,))
