from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.quant.packing import MAX_BITS, pack, packed_bytes, planes, unpack

# Eleven codes a width: one full column of eight and one with padding. The bytes were not made by
# compress.quant.packing.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "packing.json").read_text())
WIDTHS = range(1, MAX_BITS + 1)


def random_codes(bits: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8)


def test_the_golden_file_has_every_width() -> None:
    assert [entry["bits"] for entry in GOLDEN] == list(WIDTHS)


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: f"{entry['bits']}bits")
def test_bytes_are_the_golden_ones(entry: dict[str, object]) -> None:
    bits, codes = int(str(entry["bits"])), torch.tensor(entry["codes"])
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (bits, 2)
    assert packed.numpy().tobytes().hex() == entry["hex"]
    golden = torch.frombuffer(bytearray.fromhex(str(entry["hex"])), dtype=torch.uint8).reshape(bits, 2)
    assert torch.equal(unpack(golden, bits, len(codes)), codes.to(torch.uint8))


def test_four_bits_put_the_first_code_in_the_low_nibble() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), 4).flatten().tolist() == [0x21, 0x43, 0x65, 0x87]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    packed = pack(torch.arange(8), 3)
    assert packed.tolist() == [[0b11100100], [0b11100100], [0b11110000]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5, 7), (16, 3, 3, 3), (0,), (4, 0)])
def test_unpack_inverts_pack(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(bits, shape)
    packed = pack(codes, bits)
    assert packed.numel() == packed_bytes(codes.numel(), bits)
    assert torch.equal(unpack(packed, bits, codes.numel()).reshape(shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_random_sizes(bits: int) -> None:
    for count in torch.randint(1, 400, (25,)).tolist():
        codes = random_codes(bits, (count,))
        assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype: torch.dtype) -> None:
    codes = random_codes(5, (37,))
    assert torch.equal(pack(codes.to(dtype), 5), pack(codes, 5))


def test_a_transposed_tensor_is_packed_in_its_own_order() -> None:
    codes = random_codes(4, (6, 5)).t()
    assert torch.equal(unpack(pack(codes, 4), 4, 30).reshape(5, 6), codes)


def test_extreme_codes_survive() -> None:
    for bits in WIDTHS:
        top = (1 << bits) - 1
        codes = torch.tensor([0, top, top, 0, top, 0, 0, 0, top], dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 9), codes)


def test_planes_cover_every_bit_once() -> None:
    for bits in WIDTHS:
        covered = [offset + bit for width, offset in planes(bits) for bit in range(width)]
        assert covered == list(range(bits))
    assert planes(7) == ((4, 0), (2, 4), (1, 6))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_impossible_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits; a packed code has 1 to 8"):
        planes(bits)


@pytest.mark.parametrize("code", [-1, 8, 300])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"3 bits hold 0\.\.7"):
        pack(torch.tensor([0, code]), 3)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "count"), [(3, 16), (4, 9), (4, 24)])
def test_a_wrong_shape_is_refused(bits: int, count: int) -> None:
    packed = pack(random_codes(3, (9,)), 3) if bits == 4 else pack(random_codes(3, (17,)), 3)
    with pytest.raises(ValueError, match=f"{count} codes of {bits} bits need"):
        unpack(packed, bits, count)
