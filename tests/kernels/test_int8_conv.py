"""Convolutions of bytes against float64, over strides, padding, groups and memory orders; fresh memory holds NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from compress.kernels import int8_conv as conv_module
from compress.kernels.conv_problem import ConvProblem, conv_reference
from compress.kernels.dispatch import Call, choose
from compress.kernels.fake_quantize import fake_quantize
from compress.kernels.int8_conv import int8_conv
from compress.kernels.int8_conv2d import dequantize_codes, int8_conv2d
from compress.kernels.int8_weight import MOST_INPUTS, Int8Weight
from compress.kernels.row_grid import RowGrid
from tests.sweep import sweep

pytestmark = pytest.mark.usefixtures("outputs_of_nan")

SCALE, ZERO = 0.03, 100


def grid(device: str, bits: int = 8) -> RowGrid:
    zero = torch.tensor([ZERO if bits == 8 else 3], dtype=torch.uint8, device=device)
    return RowGrid("static", torch.tensor([SCALE], device=device), zero, bits)


def random_weight(outputs: int, channels: int, kernel: tuple[int, int], device: str) -> tuple[Int8Weight, Tensor]:
    """A weight as the kernel reads it, and its exact float64 form [O, C, height, width]."""
    codes = torch.randint(-128, 128, (outputs, *kernel, channels), dtype=torch.int8)
    scale = torch.rand(outputs) * 0.01 + 0.001
    weight = Int8Weight(codes, scale, codes.flatten(1).sum(1, dtype=torch.int32))
    exact = codes.double().permute(0, 3, 1, 2) * scale.double()[:, None, None, None]
    return weight.to(device), exact.to(device)


def in_small(x: Tensor, weight: Int8Weight, bias: Tensor | None, problem: ConvProblem) -> Tensor:
    return int8_conv(x, weight, bias, problem, tile=(16, 16, 32, 1, 2))


KERNELS = {"kernel": in_small, "reference": conv_reference}
# Channels, outputs, size, kernel, stride, padding, dilation, groups.
CASES: dict[str, tuple[Any, ...]] = {
    "3 x 3": (5, 7, (6, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "whole steps": (32, 17, (4, 5), (2, 3), (1, 1), (1, 0), (1, 1), 1),
    "stride and dilation": (3, 4, (11, 9), (3, 2), (2, 3), (2, 1), (2, 1), 1),
    "groups": (6, 8, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "1 x 1": (33, 20, (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
}


def case(name: str, device: str) -> tuple[Tensor, Int8Weight, Tensor, Tensor, ConvProblem]:
    """Input, weight, its exact form, bias, problem."""
    channels, outputs, size, kernel, stride, padding, dilation, groups = CASES[name]
    weight, exact = random_weight(outputs, channels // groups, kernel, device)
    x = torch.randn(2, channels, *size, device=device)
    problem = ConvProblem(grid(device), stride, padding, dilation, groups)
    return x, weight, exact, torch.randn(outputs, device=device), problem


def exactly(x: Tensor, exact: Tensor, bias: Tensor, problem: ConvProblem) -> Tensor:
    """The float64 result for ``x`` rounded to its grid."""
    assert problem.grid.scale is not None
    assert problem.grid.zero_point is not None
    rounded = fake_quantize(x.float(), problem.grid.scale, problem.grid.zero_point, problem.grid.bits)
    how = (problem.stride, problem.padding, problem.dilation, problem.groups)
    return conv2d(rounded.double(), exact, bias.double(), *how)


@pytest.mark.parametrize("kernel", KERNELS)
@sweep("name", CASES, sample=["stride and dilation"])
def test_every_shape(kernel: str, name: str, device: str, assert_near: Any) -> None:
    x, weight, exact, bias, problem = case(name, device)
    assert_near(KERNELS[kernel](x, weight, bias, problem), exactly(x, exact, bias, problem))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("dtype", [torch.float16, torch.bfloat16], sample=[torch.float16])
def test_every_dtype_and_order(kernel: str, dtype: torch.dtype, device: str, assert_near: Any) -> None:
    x, weight, exact, bias, problem = case("whole steps", device)
    x = x.to(dtype, memory_format=torch.channels_last)
    wanted = exactly(x, exact, bias, problem).relu()
    got = KERNELS[kernel](x, weight, bias, replace(problem, relu=True))
    assert got.is_contiguous()
    assert_near(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("bits", [4, 8], sample=[4])
def test_bytes_in_and_out(kernel: str, bits: int, device: str) -> None:
    x, weight, exact, bias, problem = case("3 x 3", device)
    rounded = fake_quantize(x, problem.grid.scale, problem.grid.zero_point, 8)
    codes = (torch.round(rounded / SCALE) + ZERO - 128).to(torch.int8)
    problem = replace(problem, relu=True, following=replace(grid(device, bits), scale=problem.grid.scale * 10))
    got = KERNELS[kernel](codes, weight, bias, problem)
    assert got.dtype is torch.int8
    assert got.is_contiguous(memory_format=torch.channels_last)
    following = problem.following
    assert following is not None
    assert following.scale is not None
    assert following.zero_point is not None
    exact_out = exactly(x, exact, bias, problem).relu()
    wanted = fake_quantize(exact_out.float(), following.scale, following.zero_point, bits)
    floats = dequantize_codes(got, following.scale, following.zero_point)
    assert floats.is_contiguous()
    # A sum that lies between two codes may be rounded to either.
    steps = torch.round((floats - wanted) / following.scale).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < 0.02
    assert torch.equal(KERNELS[kernel](x, weight, bias, problem), got), "the same from floats, rounded as they are read"


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("bytes_out", [False, True], sample=[True])
def test_nan_is_the_lowest_code(kernel: str, bytes_out: bool, device: str) -> None:
    x, weight, _, bias, problem = case("3 x 3", device)
    if bytes_out:
        problem = replace(problem, following=replace(grid(device), scale=problem.grid.scale * 10))
    x[1, 2, 3, 4] = float("nan")
    got = KERNELS[kernel](x, weight, bias, problem)
    x[1, 2, 3, 4] = -1e9
    assert torch.equal(got, KERNELS[kernel](x, weight, bias, problem))
    bias[3] = float("nan")
    got = KERNELS[kernel](x, weight, bias, replace(problem, relu=True))
    assert (got[:, 3] == -128).all() if bytes_out else got[:, 3].isnan().all()


@sweep("outputs", [20, 70], sample=[20])
def test_own_tile(outputs: int, device: str, assert_near: Any) -> None:
    weight, exact = random_weight(outputs, 64, (3, 3), device)
    x, bias = torch.randn(1, 64, 6, 6, device=device), torch.randn(outputs, device=device)
    problem = ConvProblem(grid(device), (1, 1), (1, 1), (1, 1), 1)
    assert_near(int8_conv(x, weight, bias, problem), exactly(x, exact, bias, problem))


@pytest.mark.matrix
@sweep(("zero", "value"), [(0, 255.0), (255, -255.0)], sample=[(0, 255.0)])
@sweep("bytes_in", [False, True], sample=[True])
def test_the_largest_sums_fit(zero: int, value: float, bytes_in: bool, device: str) -> None:
    codes = torch.full((1, 1, 1, MOST_INPUTS), -128, dtype=torch.int8, device=device)
    weight = Int8Weight(codes, torch.ones(1, device=device), codes.flatten(1).sum(1, dtype=torch.int32))
    point = torch.tensor([zero], dtype=torch.uint8, device=device)
    problem = ConvProblem(RowGrid("static", torch.ones(1, device=device), point), (1, 1), (0, 0), (1, 1), 1)
    x = torch.full((1, MOST_INPUTS, 1, 1), value, device=device)
    x = (x + zero - 128).to(torch.int8) if bytes_in else x
    got = int8_conv(x, weight, None, problem, tile=(16, 16, 512, 4, 1))
    assert float(got) == -128 * value * MOST_INPUTS


def test_large_images(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those whose places need 64 bits."""
    x, weight, _, bias, problem = case("stride and dilation", device)
    wanted = in_small(x, weight, bias, problem)
    monkeypatch.setattr(conv_module, "_LONG", 0)
    assert torch.equal(in_small(x, weight, bias, problem), wanted)


def arguments(device: str = "cpu") -> tuple[Any, ...]:
    x, weight, _, bias, problem = case("3 x 3", device)
    found = (x, problem.grid.scale, problem.grid.zero_point, weight.codes, weight.scale, weight.sums, bias)
    return (*found, 8, [1], [1], [1])


def test_operator(device: str, assert_near: Any) -> None:
    x, weight, exact, bias, problem = case("3 x 3", device)
    packed = (problem.grid.scale, problem.grid.zero_point, weight.codes, weight.scale, weight.sums, bias)
    assert_near(int8_conv2d(x, *packed, 8, [1], [1], [1]), exactly(x, exact, bias, problem))
    assert int8_conv2d(x[:0], *packed, 8, [1], [1], [1]).shape == (0, 7, 6, 9)


def test_opcheck() -> None:
    given = arguments()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(int8_conv2d, given, test_utils=checks)
    torch.library.opcheck(int8_conv2d, (*given, 1, True, given[1], given[2], 8), test_utils=checks)
    codes = torch.zeros(2, 3, dtype=torch.int8)
    torch.library.opcheck(dequantize_codes, (codes, given[1], given[2]), test_utils=checks)


GPU_CALL = Call("int8_conv2d", "cuda", (9, 0), torch.float32, 1000, 64, 576, bits=8, group_size=576)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "int8_conv"),
        ({"dtype": torch.int8}, "int8_conv"),
        ({"groups": 4}, "int8_conv"),
        ({"groups": 64}, "reference"),
        ({"inputs": 65_794}, "reference"),
        ({"device": "cpu", "capability": None}, "reference"),
    ],
)
def test_choice(change: dict[str, Any], kernel: str) -> None:
    choice = choose(GPU_CALL._replace(**change))
    assert choice.name == kernel
    wanted = "int8_conv: only groups of 16 outputs and more, which fill tensor cores, not of 1"
    assert change.get("groups") != 64 or choice.refused == (wanted,)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 4, 6, 9), r"x \(2, 4, 6, 9\) in 1 groups; a weight \(7, 3, 3, 5\) needs \[B, 5, H, W\]"),
        (0, torch.zeros(2, 5, 0, 9), r"is smaller than the kernel, 3 x 3"),
        (1, torch.ones(2), r"the input's grid: scale torch\.float32 \(2,\); a convolution takes one"),
        (2, torch.zeros(1, dtype=torch.int32), r"zero_point torch\.int32, 8 bits"),
        (4, torch.ones(6), r"weight_scale torch\.float32 \(6,\); 7 x 3 x 3 x 5 need contiguous"),
    ],
)
def test_wrong_sizes_are_refused(place: int, value: Tensor, message: str) -> None:
    given = [*arguments()]
    given[place] = value
    with pytest.raises(ValueError, match=message):
        int8_conv2d(*given)
