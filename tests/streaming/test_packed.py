"""The packed layout byte by byte: what another program's reader has to find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quant.grid import min_max_grid, quantize
from compress.quant.weights import QuantizedWeight
from compress.streaming.packed import pack_rows, packed_tensors, quantization_config, unpack_rows

WIDTHS = range(2, 9)


def stored_bytes(packed: Tensor) -> list[list[int]]:
    """Each row as it lies in the file."""
    assert packed.dtype == torch.int32
    return [list(row.contiguous().numpy().astype("<i4").tobytes()) for row in packed]


def quantized(bits: int, symmetric: bool, group_size: int | None, shape: tuple[int, int] = (5, 44)) -> QuantizedWeight:
    weight = torch.randn(shape) + 0.3
    scale, zero_point = min_max_grid(weight, bits, symmetric, group_size)
    return quantize(weight, scale, zero_point, bits, group_size)


@pytest.mark.parametrize("columns", [1, 3, 8, 31, 33, 64, 101])
@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip(bits: int, columns: int) -> None:
    codes = torch.randint(1 << bits, (7, columns), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (7, -(-columns * bits // 32))
    back = unpack_rows(packed, bits, columns)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip_of_all_codes_in_many_rows(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(600, 1)  # more rows than are packed at a time
    codes[300:] = codes[300:].flip(1)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 1 << bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_packed_as_it_is_alone(bits: int) -> None:
    codes = torch.randint(1 << bits, (4, 21), dtype=torch.uint8)
    alone = torch.cat([pack_rows(row[None], bits) for row in codes])
    assert torch.equal(pack_rows(codes, bits), alone)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_that_do_not_lie_row_by_row_in_memory(bits: int) -> None:
    codes = torch.randint(1 << bits, (9, 6), dtype=torch.uint8)
    assert torch.equal(pack_rows(codes.T, bits), pack_rows(codes.T.contiguous(), bits))


def test_golden_bytes_of_four_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9], [15, 0, 15, 0, 8, 8, 8, 8, 1]], dtype=torch.uint8)
    packed = pack_rows(codes, 4)
    assert stored_bytes(packed) == [
        [0x21, 0x43, 0x65, 0x87, 0x09, 0, 0, 0],
        [0x0F, 0x0F, 0x88, 0x88, 0x01, 0, 0, 0],
    ]
    assert packed.tolist() == [[0x87654321 - (1 << 32), 9], [0x88880F0F - (1 << 32), 1]]


def test_golden_bytes_of_three_bits() -> None:
    # The eleventh code lies in two words: nothing is left free at the end of the first.
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 5, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 7]])
    packed = pack_rows(codes.to(torch.uint8), 3)
    assert stored_bytes(packed) == [
        [0b10001000, 0b11000110, 0b11111010, 0b01111111, 0b00000011, 0, 0, 0],
        [0b00000001, 0, 0, 0, 0b00001111, 0, 0, 0],
    ]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bits_of_a_row_run_on_without_gaps(bits: int) -> None:
    codes = torch.randint(1 << bits, (1, 32), dtype=torch.uint8)
    number = sum(int(code) << position * bits for position, code in enumerate(codes[0]))
    assert bytes(stored_bytes(pack_rows(codes, bits))[0]) == number.to_bytes(4 * bits, "little")


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (16, 3)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tensors_of_symmetric_weights(bits: int, group_size: int | None, groups: int) -> None:
    weight = quantized(bits, True, group_size)
    found = packed_tensors(weight, torch.bfloat16)
    assert set(found) == {"weight_packed", "weight_scale", "weight_shape"}
    assert torch.equal(unpack_rows(found["weight_packed"], bits, 44), weight.codes)
    assert found["weight_scale"].shape == (5, groups)
    assert torch.equal(found["weight_scale"], weight.scale.reshape(5, groups).to(torch.bfloat16))
    assert found["weight_shape"].dtype == torch.int64
    assert found["weight_shape"].tolist() == [5, 44]


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (16, 3)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tensors_of_asymmetric_weights(bits: int, group_size: int | None, groups: int) -> None:
    weight = quantized(bits, False, group_size)
    assert not weight.symmetric
    found = packed_tensors(weight, torch.float16)
    assert set(found) == {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}
    assert found["weight_scale"].dtype == torch.float16
    # Zero points are packed along the output channels.
    zero = found["weight_zero_point"]
    assert zero.dtype == torch.int32
    assert zero.shape == (-(-5 * bits // 32), groups)
    assert zero.is_contiguous()
    assert torch.equal(unpack_rows(zero.T.contiguous(), bits, 5).T, weight.zero_point.reshape(5, groups))


def test_golden_bytes_of_zero_points() -> None:
    weight = QuantizedWeight(
        torch.zeros(9, 32, dtype=torch.uint8),
        torch.ones(9, 2),
        torch.tensor([[1, 15]] * 8 + [[2, 3]], dtype=torch.uint8),
        bits=4,
        group_size=16,
    )
    zero = packed_tensors(weight, torch.float32)["weight_zero_point"]
    assert zero.tolist() == [[0x11111111, -1], [2, 3]]


def test_asymmetric_grids_whose_zero_points_happen_to_be_the_middle() -> None:
    weight = QuantizedWeight(
        torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2), torch.full((2,), 8, dtype=torch.uint8), bits=4
    )
    assert "weight_zero_point" not in packed_tensors(weight, torch.float32)


def test_config_of_groups() -> None:
    found = quantization_config(4, 128, True, ("lm_head", "pooler.dense"))
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "pack-quantized"
    assert found["quantization_status"] == "compressed"
    assert found["ignore"] == ["lm_head", "pooler.dense"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    assert group["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
    }


def test_config_of_whole_rows() -> None:
    found = quantization_config(3, None, False, ())
    weights = found["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == "channel"
    assert weights["group_size"] is None
    assert weights["symmetric"] is False
    assert weights["num_bits"] == 3
    assert found["ignore"] == []
