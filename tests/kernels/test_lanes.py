from __future__ import annotations

import pytest
import torch

from compress.kernels.lanes import LaneWeight, block_columns, pack_lanes, units_per_row, unpack_lanes
from compress.weights import QuantizedWeight


def test_golden_4_bits() -> None:
    # Column c holds c % 16 in columns 0..15, then 15 - c % 16, then zeros, then ones.
    codes = torch.tensor([[*range(16), *range(15, -1, -1), *[0] * 16, *[1] * 16]])
    units = pack_lanes(codes, 4)
    assert units.tolist() == [[0x1000 | (15 - lane) << 4 | lane for lane in range(16)]]
    assert units.view(torch.uint8)[0, :6].tolist() == [0xF0, 0x10, 0xE1, 0x10, 0xD2, 0x10]


def test_golden_3_bits() -> None:
    # One code that is not zero: column 37 is lane 5, position 2; 7 has both bits of the 2-bit plane and the high one.
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 37] = 7
    units = pack_lanes(codes, 3)
    assert units.shape == (1, 48)
    assert {i: int(unit) for i, unit in enumerate(units[0]) if unit} == {5: 0b11 << 4, 32 + 5: 1 << 2}


def test_golden_8_bits() -> None:
    codes = torch.arange(32)[None] * 8
    assert pack_lanes(codes, 8).view(torch.uint8)[0, :4].tolist() == [0, 128, 8, 136]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("inputs", [1, 16, 63, 64, 300])
def test_round_trip(bits: int, inputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, inputs), dtype=torch.uint8)
    units = pack_lanes(codes, bits)
    assert units.shape == (3, units_per_row(inputs, bits))
    assert units.dtype == torch.int16
    torch.testing.assert_close(unpack_lanes(units, bits, inputs), codes, rtol=0, atol=0)


def test_rows_are_whole_blocks_of_exactly_so_many_bits() -> None:
    assert [block_columns(bits) for bits in range(2, 9)] == [128, 256, 64, 256, 128, 256, 32]
    assert [units_per_row(256, bits) * 16 for bits in range(2, 9)] == [256 * bits for bits in range(2, 9)]


def test_units_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="100 codes of 4 bits need rows of 32"):
        unpack_lanes(torch.zeros(2, 16, dtype=torch.int16), 4, 100)


def test_scales_out_of_range_are_refused() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.tensor([1.0, 1e-9]), torch.zeros(2, dtype=torch.uint8), 4)
    assert LaneWeight.from_quantized(weight).group_size == 8
    with pytest.raises(ValueError, match=r"keep them as torch\.float32"):
        LaneWeight.from_quantized(weight, torch.float16)
    with pytest.raises(ValueError, match="take \\[O, I\\]"):
        LaneWeight.from_quantized(QuantizedWeight(codes[0], torch.ones(1), torch.zeros(1, dtype=torch.uint8), 4))
