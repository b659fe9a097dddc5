from __future__ import annotations

import pytest
import torch

from compress.kernels.lanes import LaneWeight, block_columns, pack_lanes, unit_shape, unpack_lanes
from compress.quant.weights import QuantizedWeight


def test_golden_4_bits() -> None:
    # Column c holds c % 16 in columns 0..15, then 15 - c % 16, then zeros, then ones.
    codes = torch.tensor([[*range(16), *range(15, -1, -1), *[0] * 16, *[1] * 16]])
    units = pack_lanes(codes, 4)
    assert units.shape == (1, 1, 8, 32)
    assert units[0, 0, 0].tolist() == [0x1000 | (15 - lane) << 4 | lane for lane in range(16)] + [0] * 16
    assert not units[0, 0, 1:].any()
    assert units.view(torch.uint8).flatten()[:6].tolist() == [0xF0, 0x10, 0xE1, 0x10, 0xD2, 0x10]


def test_golden_rows() -> None:
    # Row 9 is row 1 of stripe 1; column 128 is lane 0, position 0 of the third block, where the second chunk begins.
    codes = torch.zeros(10, 200, dtype=torch.uint8)
    codes[9, 128] = 5
    units = pack_lanes(codes, 4)
    assert units.shape == (2, 2, 8, 32)
    assert units.nonzero().tolist() == [[1, 1, 1, 0]]


def test_golden_3_bits() -> None:
    # One code that is not zero: column 37 is lane 5, position 2; 7 has both bits of the 2-bit plane and the high one.
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 37] = 7
    units = pack_lanes(codes, 3)
    assert units.shape == (1, 2, 8, 32)
    assert {i: int(unit) for i, unit in enumerate(units[0, :, 0].flatten()) if unit} == {5: 0b11 << 4, 32 + 5: 1 << 2}


def test_golden_8_bits() -> None:
    codes = torch.arange(32)[None] * 8
    assert pack_lanes(codes, 8).view(torch.uint8).flatten()[:4].tolist() == [0, 128, 8, 136]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("inputs", [1, 16, 63, 64, 300])
def test_round_trip(bits: int, inputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, inputs), dtype=torch.uint8)
    units = pack_lanes(codes, bits)
    assert units.shape == unit_shape(3, inputs, bits)
    assert units.dtype == torch.int16
    torch.testing.assert_close(unpack_lanes(units, bits, 3, inputs), codes, rtol=0, atol=0)


def test_rows_are_whole_blocks_of_exactly_so_many_bits() -> None:
    assert [block_columns(bits) for bits in range(2, 9)] == [128, 256, 64, 256, 128, 256, 32]
    assert [torch.Size(unit_shape(8, 512, bits)).numel() * 16 for bits in range(2, 9)] == [
        8 * 512 * b for b in range(2, 9)
    ]


def test_units_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 bits x 2 x 100 need \(1, 1, 8, 32\)"):
        unpack_lanes(torch.zeros(2, 16, dtype=torch.int16), 4, 2, 100)


def test_scales_out_of_range_are_refused() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.tensor([1.0, 1e-9]), torch.zeros(2, dtype=torch.uint8), 4)
    assert LaneWeight.from_quantized(weight).group_size == 8
    with pytest.raises(ValueError, match=r"keep them as torch\.float32"):
        LaneWeight.from_quantized(weight, torch.float16)
    with pytest.raises(ValueError, match="take \\[O, I\\]"):
        LaneWeight.from_quantized(QuantizedWeight(codes[0], torch.ones(1), torch.zeros(1, dtype=torch.uint8), 4))
