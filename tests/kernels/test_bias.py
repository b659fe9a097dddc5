"""A bias that does not fit its product is refused by every operator; one that is strided is read as it is meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels.delta_linear import delta_linear, packed_delta_linear
from compress.kernels.delta_product import beside, merged
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.int8_conv2d import int8_conv2d
from compress.kernels.int8_linear import int8_dynamic_linear, int8_linear
from compress.kernels.lanes import LaneWeight
from compress.kernels.lowrank_linear import lowrank_linear
from compress.kernels.lowrank_reference import lowrank_reference
from compress.kernels.packed_linear import checked_bias, packed_linear, packed_lowrank_linear
from compress.kernels.packed_unpack import packed_unpack

OUTPUTS, INPUTS = 16, 32
X = torch.ones(2, INPUTS)


def lane_weight_of_zeros() -> LaneWeight:
    units = torch.zeros(2, 1, 8, 32, dtype=torch.int16)
    return LaneWeight(units, torch.ones(OUTPUTS, 1), torch.zeros(OUTPUTS, 1, dtype=torch.uint8), 4, INPUTS, INPUTS)


def operators() -> dict[str, Callable[[Tensor | None], Tensor]]:
    """Every operator with a bias, of weights that are zero."""
    lanes = lane_weight_of_zeros()
    packed = (lanes.units, lanes.scale, lanes.zero_point)
    codes = torch.zeros(OUTPUTS, INPUTS, dtype=torch.int8)
    int8 = (torch.ones(OUTPUTS), torch.zeros(OUTPUTS, dtype=torch.int32))
    grid = (torch.ones(()), torch.zeros((), dtype=torch.uint8))
    up, down = torch.zeros(OUTPUTS, 3), torch.zeros(3, INPUTS)
    delta = DeltaRows.from_flat((OUTPUTS, INPUTS), torch.tensor([5]), torch.zeros(1), torch.float32)
    deltas = (delta.starts, delta.columns, delta.values)
    image = X.reshape(2, INPUTS, 1, 1)

    def conv(bias: Tensor | None) -> Tensor:
        weight = codes.reshape(OUTPUTS, 1, 1, INPUTS)
        return int8_conv2d(image, *grid, weight, *int8, bias, 8, [1], [0], [1]).reshape(2, OUTPUTS)

    return {
        "packed_linear": lambda bias: packed_linear(X, *packed, bias, 4, INPUTS),
        "packed_lowrank_linear": lambda bias: packed_lowrank_linear(X, *packed, up, down, bias, 4, INPUTS),
        "int8_linear": lambda bias: int8_linear(X, *grid, codes, *int8, bias, 8),
        "int8_dynamic_linear": lambda bias: int8_dynamic_linear(X, codes, *int8, bias, True),
        "int8_conv2d": conv,
        "lowrank_linear": lambda bias: lowrank_linear(X, up, down, bias, 3),
        "delta_linear": lambda bias: delta_linear(X, torch.zeros(OUTPUTS, INPUTS), *deltas, None, bias),
        "packed_delta_linear": lambda bias: packed_delta_linear(X, *packed, *deltas, None, bias, 4, INPUTS),
    }


NAMES = tuple(operators())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bias", "got"),
    [
        (torch.zeros(1), r"bias torch\.float32 \(1,\)"),
        (torch.zeros(OUTPUTS, 1), r"bias torch\.float32 \(16, 1\)"),
        (torch.zeros(OUTPUTS, dtype=torch.float64), r"bias torch\.float64 \(16,\)"),
        (torch.zeros(OUTPUTS, dtype=torch.int32), r"bias torch\.int32 \(16,\)"),
    ],
    ids=["one", "a column", "float64", "int32"],
)
def test_a_bias_that_does_not_fit_is_refused(name: str, bias: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=got + r" on cpu; 16 outputs on cpu need \(16,\) of torch\.float16, torch\."):
        operators()[name](bias)


def test_a_bias_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(16,\) on meta; 16 outputs on cpu need"):
        checked_bias(torch.zeros(OUTPUTS, device="meta"), OUTPUTS, X)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_types_are_read_as_they_are_meant(name: str, dtype: torch.dtype) -> None:
    bias = torch.arange(2.0 * OUTPUTS).to(dtype)[::2]
    assert torch.equal(operators()[name](bias), bias.float().expand(2, OUTPUTS))


def test_kernels_that_hand_over_to_torch_take_a_bias_of_another_type(device: str) -> None:
    weight, x = lane_weight_of_zeros().to(device), X.to(device)
    bias = torch.arange(float(OUTPUTS), device=device).bfloat16()
    wanted = bias.float().expand(2, OUTPUTS)
    delta = DeltaRows.from_flat((OUTPUTS, INPUTS), torch.tensor([5]), torch.zeros(1), torch.float32).to(device)
    floats = torch.zeros(OUTPUTS, INPUTS, device=device)
    assert torch.equal(packed_unpack(x, weight, bias), wanted)
    assert torch.equal(merged(x, floats, delta, None, bias), wanted)
    assert torch.equal(beside(x, floats, delta, None, bias), wanted)
    factors = (torch.zeros(OUTPUTS, 3, device=device), torch.zeros(3, INPUTS, device=device))
    assert torch.equal(lowrank_reference(x, *factors, bias), wanted)


@pytest.mark.parametrize(("up", "down"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
def test_factors_of_another_type_are_refused(up: torch.dtype, down: torch.dtype) -> None:
    factors: tuple[Any, ...] = (torch.zeros(OUTPUTS, 3, dtype=up), torch.zeros(3, INPUTS, dtype=down))
    message = rf"up of {up} and down of {down}; x needs both of torch\.float32"
    with pytest.raises(ValueError, match=message):
        lowrank_linear(X, *factors, None, 3)
    lanes = lane_weight_of_zeros()
    with pytest.raises(ValueError, match=message):
        packed_lowrank_linear(X, lanes.units, lanes.scale, lanes.zero_point, *factors, None, 4, INPUTS)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 0), (4, -1), (1, 32), (9, 32)])
def test_bits_and_groups_that_are_none_are_refused(bits: int, group_size: int) -> None:
    lanes = lane_weight_of_zeros()
    with pytest.raises(ValueError, match=f"{bits} bits in groups of {group_size}; allowed are 2 to 8 bits"):
        packed_linear(X, lanes.units, lanes.scale, lanes.zero_point, None, bits, group_size)


def test_a_scale_in_float64_is_refused() -> None:
    lanes = lane_weight_of_zeros()
    with pytest.raises(ValueError, match=r"scale of torch\.float64; allowed are torch\.float16"):
        packed_linear(X, lanes.units, lanes.scale.double(), lanes.zero_point, None, 4, INPUTS)
