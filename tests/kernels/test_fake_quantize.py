from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from compress.exporters.session import open_session
from compress.kernels.fake_quantize import code_range, fake_quantize

CASES = [(bits, dtype) for bits in range(2, 9) for dtype in (torch.uint8, torch.int8)]
SHAPES = [(), (1,), (17,), (2, 3, 5, 7), (0, 3)]


def grid(bits: int, dtype: torch.dtype, scale: float = 0.0375) -> tuple[Tensor, Tensor]:
    """A grid with its zero point about a third into the codes."""
    low, high = code_range(dtype, bits)
    return torch.tensor(scale), torch.tensor(low + (high - low) // 3, dtype=dtype)


def reference(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The formula in float64, but for the division, whose float32 result is what gets rounded."""
    info = torch.iinfo(zero_point.dtype)
    codes = torch.round((x / scale).double()) + int(zero_point)
    return (codes.clamp(info.min, info.min + 2**bits - 1) - int(zero_point)) * scale.double()


@pytest.mark.parametrize(("bits", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scale, zero_point = grid(bits, dtype)
    x = torch.randn(shape) * float(scale) * 2**bits
    got = fake_quantize(x, scale, zero_point, bits)
    assert got.shape == x.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference(x, scale, zero_point, bits), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_the_grid_has_all_its_points_and_zero(bits: int, dtype: torch.dtype) -> None:
    scale, zero_point = grid(bits, dtype)
    points = fake_quantize(torch.linspace(-40, 40, 20001), scale, zero_point, bits).unique()
    assert len(points) == 2**bits
    assert 0.0 in points
    assert torch.equal(fake_quantize(points, scale, zero_point, bits), points)


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.uint8, 0, 15), (torch.int8, -128, -113)])
def test_narrow_codes_lie_at_the_bottom(dtype: torch.dtype, low: int, high: int) -> None:
    assert code_range(dtype, 4) == (low, high)
    start = torch.tensor(low, dtype=dtype)
    got = fake_quantize(torch.tensor([-3.0, 0.0, 7.2, 99.0]), torch.tensor(1.0), start, 4)
    assert got.tolist() == [0.0, 0.0, 7.0, 15.0]


def test_ties_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    got = fake_quantize(x, torch.tensor(1.0), torch.tensor(128, dtype=torch.uint8), 8)
    assert got.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.uint8), (8, torch.int8), (4, torch.uint8), (3, torch.int8)])
def test_bit_equal_to_onnx(bits: int, dtype: torch.dtype) -> None:
    scale, zero_point = grid(bits, dtype)
    low, high = code_range(dtype, bits)
    kind = np.uint8 if dtype == torch.uint8 else np.int8
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    constants = {"s": scale.numpy(), "z": zero_point.numpy(), "low": kind(low), "high": kind(high)}
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    steps = torch.arange(-300, 300) * float(scale)
    x = torch.cat([torch.randn(5000) * float(scale) * 2**bits, steps, steps + float(scale) / 2])
    session = open_session(model.SerializeToString(), "ORT_DISABLE_ALL")
    (wanted,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(fake_quantize(x, scale, zero_point, bits), torch.from_numpy(wanted))


@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_gradient_is_that_of_the_clip(bits: int, dtype: torch.dtype) -> None:
    scale, zero_point = grid(bits, dtype)
    low, high = (code - int(zero_point) for code in code_range(dtype, bits))
    x = torch.randn(500) * float(scale) * 2**bits
    # The surrogate's slope, by central differences; away from the edges, where it jumps.
    bottom, top = (low - 0.5) * float(scale), (high + 0.5) * float(scale)
    x = x[((x - bottom).abs() > 1e-3) & ((x - top).abs() > 1e-3)].requires_grad_()
    weight = torch.randn(len(x))
    fake_quantize(x, scale, zero_point, bits).mul(weight).sum().backward()
    step = 1e-4
    surrogate = [(x.detach().double() + sign * step).clamp(bottom, top) for sign in (1, -1)]
    slope = (surrogate[0] - surrogate[1]) / (2 * step)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), slope * weight.double(), rtol=1e-6, atol=1e-7)
    assert 0 < int((slope > 0.5).sum()) < len(x)


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_opcheck(dtype: torch.dtype) -> None:
    scale, zero_point = grid(4, dtype)
    for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        torch.library.opcheck(fake_quantize, (x, scale, zero_point, 4))
    torch.library.opcheck(fake_quantize, (torch.randn(3, 4, requires_grad=True), scale, zero_point, 8))


def test_the_input_is_left_alone() -> None:
    x = torch.randn(50)
    before = x.clone()
    fake_quantize(x, *grid(3, torch.uint8), 3)
    assert torch.equal(x, before)
