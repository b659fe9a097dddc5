"""Integer linears, inputs rounded on calibrated and on measured grids, against float64; codes bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.kernels.dispatch import Call, choose
from compress.kernels.dynamic import fake_quantize_dynamic
from compress.kernels.fake_quantize import fake_quantize
from compress.kernels.int8_dot import int8_dot, int8_fused
from compress.kernels.int8_linear import int8_dynamic_linear, int8_linear
from compress.kernels.int8_quantize import grid_arguments, quantize_rows
from compress.kernels.int8_reference import int8_reference
from compress.kernels.int8_weight import MOST_INPUTS, Int8Weight
from compress.kernels.row_grid import RowGrid
from compress.quant.weights import QuantizedWeight
from tests.sweep import sweep

pytestmark = pytest.mark.usefixtures("outputs_of_nan")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_int8(outputs: int, inputs: int, bits: int, device: str) -> tuple[Int8Weight, Tensor]:
    """A weight and its exact float64 matrix."""
    codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    middle = torch.full((outputs,), 1 << (bits - 1), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.rand(outputs) * 0.01 + 0.001, middle, bits)
    return Int8Weight.from_quantized(weight).to(device), weight.dequantize().double().to(device)


def grids(rows: int, device: str) -> dict[str, RowGrid]:
    scale, zero = torch.tensor(0.03, device=device), torch.tensor(100, dtype=torch.uint8, device=device)
    each = torch.rand(rows, device=device) * 0.02 + 0.02
    signed = torch.randint(-20, 20, (rows,), dtype=torch.int8, device=device)
    return {
        "static": RowGrid("static", scale, zero),
        "narrow": RowGrid("static", scale * 8, torch.tensor(-120, dtype=torch.int8, device=device), 4),
        "a row": RowGrid("static", each, signed),
        "tensor": RowGrid("tensor"),
        "token": RowGrid("token"),
    }


GRIDS = ("static", "narrow", "a row", "tensor", "token")


def fused_in_splits(*arguments: Any) -> Any:
    return int8_fused(*arguments, tile=(16, 16, 32, 3, 1, 2))


def dot_in_small(*arguments: Any) -> Any:
    return int8_dot(*arguments, tile=(16, 16, 32, 1, 1, 2))


KERNELS = {"fused": fused_in_splits, "dot": dot_in_small, "reference": int8_reference}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("kind", GRIDS, sample=["token"])
def test_every_grid(kernel: str, kind: str, device: str, assert_near: Any) -> None:
    weight, exact = random_int8(21, 300, 8, device)
    x = torch.randn(5, 300, device=device)
    grid = grids(5, device)[kind]
    codes, scale, zero = grid.quantize(x)
    wanted = ((codes - zero).double() * scale) @ exact.T
    assert_near(KERNELS[kernel](x, grid, weight), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@sweep("dtype", DTYPES, sample=[torch.float16])
@sweep("kind", ["static", "token"], sample=["static"])
def test_every_dtype_with_bias(kernel: str, dtype: torch.dtype, kind: str, device: str, assert_near: Any) -> None:
    weight, exact = random_int8(21, 100, 4, device)
    x, bias = torch.randn(3, 100, device=device).to(dtype), torch.randn(21, device=device).to(dtype)
    grid = grids(3, device)[kind]
    codes, scale, zero = grid.quantize(x)
    wanted = ((codes - zero).double() * scale) @ exact.T + bias.double()
    assert_near(KERNELS[kernel](x, grid, weight, bias), wanted)


@sweep("kind", GRIDS, sample=["narrow"])
def test_codes_are_the_references(kind: str, device: str) -> None:
    # Steps of a half: every other value lies between two codes, and is rounded to the even one.
    x = torch.arange(-600, 600, device=device).reshape(4, 300) * (0.03 / 2)
    x[0] = 0.0
    grid = grids(4, device)[kind]
    codes = quantize_rows(x, grid, grid_arguments(x, grid))
    assert torch.equal(codes.float(), grid.quantize(x)[0])


class AsOnGpus(TorchDispatchMode):
    """Tensors divided by plain numbers as CUDA does it: multiplied with the reciprocal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.div and not isinstance(args[1], Tensor):
            return args[0] * args[0].new_full((), args[1]).reciprocal()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", GRIDS)
def test_a_gpus_reference_finds_the_same_grids(kind: str) -> None:
    x = torch.randn(400, 30)
    grid = grids(400, "cpu")[kind]
    wanted = grid.quantize(x)
    with AsOnGpus():
        assert not torch.equal(x / 127, torch.div(x, torch.tensor(127.0))), "they do differ"
        for got, exact in zip(grid.quantize(x), wanted, strict=True):
            assert torch.equal(got, exact)


def test_grids_are_those_of_the_graphs_operators(device: str) -> None:
    x = torch.randn(70, 40, device=device)
    found = grids(1, device)
    for kind in ("static", "narrow"):
        codes, scale, zero = found[kind].quantize(x)
        wanted = fake_quantize(x, found[kind].scale, found[kind].zero_point, found[kind].bits)
        assert torch.equal((codes - zero) * scale, wanted)
    codes, scale, zero = found["tensor"].quantize(x)
    assert torch.equal((codes - zero) * scale, fake_quantize_dynamic(x))


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("kernel", [int8_fused, int8_dot])
@sweep(("zero", "value"), [(0, 255.0), (255, -255.0)], sample=[(0, 255.0)])
def test_the_largest_sums_fit(kernel: Any, zero: int, value: float, device: str) -> None:
    codes = torch.full((2, MOST_INPUTS), -128, dtype=torch.int8, device=device)
    weight = Int8Weight(codes, torch.ones(2, device=device), codes.sum(1, dtype=torch.int32))
    point = torch.tensor([zero], dtype=torch.uint8, device=device)
    grid = RowGrid("static", torch.ones(1, device=device), point)
    x = torch.full((1, MOST_INPUTS), value, device=device)
    got = kernel(x, grid, weight, tile=(16, 16, 512, 1, 4, 1))
    assert torch.equal(got, torch.full((1, 2), -128 * value * MOST_INPUTS, device=device))


@pytest.mark.slow
@sweep("rows", [1, 17, 70, 200], sample=[17])
def test_own_tile(rows: int, device: str, assert_near: Any) -> None:
    weight, exact = random_int8(70, 600, 8, device)
    x = torch.randn(rows, 600, device=device)
    grid = grids(rows, device)["tensor"]
    codes, scale, zero = grid.quantize(x)
    assert_near(int8_dot(x, grid, weight), ((codes - zero).double() * scale) @ exact.T)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("kind", GRIDS, sample=["a row", "token"])
@sweep("odd", ["nan", "inf", "-inf"], sample=["nan"])
def test_what_is_not_finite(kernel: str, kind: str, odd: str, device: str) -> None:
    weight, _ = random_int8(21, 300, 8, device)
    x = torch.randn(5, 300, device=device)
    x[2, 7] = float(odd)
    grid = grids(5, device)[kind]
    got = KERNELS[kernel](x, grid, weight)
    if kind == "tensor":
        assert got.isnan().all(), "the range of all"
    elif kind == "token":
        assert got[2].isnan().all()
        others = [0, 1, 3, 4]
        x[2, 7] = 0.0
        assert torch.equal(got[others], KERNELS[kernel](x, grid, weight)[others]), "they have ranges of their own"
    else:
        x[2, 7] = 1e9 if odd == "inf" else -1e9
        assert torch.equal(got, KERNELS[kernel](x, grid, weight)), "the end of the grid; NaN the lower one"


@sweep("rows", [1, 3, 130], sample=[3])
def test_a_tensors_range_is_found_once_for_all_programs(rows: int, device: str) -> None:
    x = torch.randn(rows, 300, device=device)
    low, high, apart = grid_arguments(x, RowGrid("tensor"))
    assert (low.numel(), high.numel(), apart) == (1, 1, 0)
    assert (float(low), float(high)) == (float(x.min()), float(x.max()))


def test_operators(device: str, assert_near: Any) -> None:
    weight, exact = random_int8(24, 96, 8, device)
    x, bias = torch.randn(2, 3, 96, device=device), torch.randn(24, device=device)
    scale, zero = torch.tensor(0.03, device=device), torch.tensor(100, dtype=torch.uint8, device=device)
    packed = (weight.codes, weight.scale, weight.sums)
    wanted = fake_quantize(x, scale, zero, 8).double() @ exact.T + bias.double()
    assert_near(int8_linear(x, scale, zero, *packed, bias, 8), wanted)
    each = scale.expand(2, 3).contiguous(), zero.expand(2, 3).contiguous()
    assert_near(int8_linear(x, *each, *packed, bias, 8), wanted)
    wanted = fake_quantize_dynamic(x).double() @ exact.T
    assert_near(int8_dynamic_linear(x, *packed, None, False), wanted)
    assert float((int8_dynamic_linear(x, *packed, None, True) - x.float() @ exact.float().T).norm()) < 0.02 * float(
        wanted.norm()
    )


def test_opcheck() -> None:
    weight, _ = random_int8(6, 40, 8, "cpu")
    packed, x = (weight.codes, weight.scale, weight.sums), torch.randn(2, 3, 40)
    grid = (torch.tensor(0.1), torch.tensor(0, dtype=torch.int8))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(int8_linear, (x, *grid, *packed, None, 8), test_utils=checks)
    torch.library.opcheck(int8_dynamic_linear, (x, *packed, None, True), test_utils=checks)
    assert int8_dynamic_linear(x[:0], *packed, None, False).shape == (0, 3, 6)


GPU_CALL = Call("int8_linear", "cuda", (9, 0), torch.float32, 1, 4096, 4096, bits=8, group_size=4096)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "int8_fused"),
        ({"rows": 2048}, "int8_dot"),
        ({"inputs": 65_793}, "int8_fused"),
        ({"inputs": 65_794}, "reference"),
        ({"capability": (7, 5)}, "reference"),
        ({"device": "cpu", "capability": None}, "reference"),
    ],
)
def test_choice(change: dict[str, Any], kernel: str) -> None:
    choice = choose(GPU_CALL._replace(**change))
    assert choice.name == kernel
    wanted = "only up to 65793 inputs, whose sum fits into 32 bits, not 65794"
    assert change.get("inputs") != 65_794 or wanted in choice.refused[0]


def test_weights_that_are_refused() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    zero = torch.full((2,), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="integer products take symmetric grids"):
        Int8Weight.from_quantized(QuantizedWeight(codes, torch.ones(2), zero, 4))
    with pytest.raises(ValueError, match="a weight in groups of 4; integer products take one scale a row"):
        Int8Weight.from_quantized(QuantizedWeight(codes, torch.ones(2, 2), zero.expand(2, 2), 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(6, 39, dtype=torch.int8)}, r"weight torch\.int8 \(6, 39\); 6 x 40 need contiguous"),
        ({"codes": torch.zeros(6, 40, dtype=torch.uint8)}, r"weight torch\.uint8"),
        (
            {"scale": torch.zeros(5)},
            r"weight_scale torch\.float32 \(5,\); 6 x 40 need contiguous torch\.float32 \(6,\)",
        ),
        ({"sums": torch.zeros(6)}, r"weight_sums torch\.float32"),
    ],
)
def test_wrong_sizes_are_refused(change: dict[str, Tensor], message: str) -> None:
    weight = replace(random_int8(6, 40, 8, "cpu")[0], **change)
    with pytest.raises(ValueError, match=message):
        int8_dynamic_linear(torch.zeros(2, 40), weight.codes, weight.scale, weight.sums, None, True)


def test_wrong_grids_are_refused() -> None:
    weight, _ = random_int8(6, 40, 8, "cpu")
    packed, x = (weight.codes, weight.scale, weight.sums), torch.zeros(2, 40)
    with pytest.raises(ValueError, match="one of each, or one of each a row"):
        int8_linear(x, torch.ones(3), torch.zeros(3, dtype=torch.uint8), *packed, None, 8)
    with pytest.raises(ValueError, match=r"zero_point torch\.int32, 8 bits"):
        int8_linear(x, torch.ones(()), torch.zeros((), dtype=torch.int32), *packed, None, 8)
