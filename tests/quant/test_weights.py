from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from compress.quant.weights import QuantizedWeight


def random_weight(bits: int, shape: tuple[int, ...]) -> QuantizedWeight:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    zero_point = torch.randint(0, 1 << bits, (shape[0],), dtype=torch.uint8)
    return QuantizedWeight(codes, torch.rand(shape[0]) + 0.01, zero_point, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(4, 3), (6, 1, 3, 3), (5, 2, 7), (1, 1)])
def test_dequantize_against_float64(bits: int, shape: tuple[int, ...]) -> None:
    weight = random_weight(bits, shape)
    got = weight.dequantize()
    assert got.dtype == torch.float32
    for channel in range(shape[0]):
        centred = weight.codes[channel].double() - int(weight.zero_point[channel])
        torch.testing.assert_close(got[channel].double(), centred * weight.scale[channel].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_tensors_round_trip_bit_exactly(bits: int) -> None:
    weight = random_weight(bits, (5, 3, 3, 3))
    stored = weight.tensors()
    assert stored["packed"].shape == (bits, 17)
    again = QuantizedWeight.from_tensors(stored, bits, (5, 3, 3, 3))
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.bits == bits


def test_from_tensors_refuses_another_shape() -> None:
    stored = random_weight(4, (5, 3)).tensors()
    with pytest.raises(ValueError, match="need"):
        QuantizedWeight.from_tensors(stored, 4, (7, 3))


def test_symmetric_means_the_middle_in_every_channel() -> None:
    weight = QuantizedWeight(torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2), torch.tensor([8, 8]).byte(), 4)
    assert weight.symmetric
    mixed = QuantizedWeight(weight.codes, weight.scale, torch.tensor([8, 7], dtype=torch.uint8), 4)
    assert not mixed.symmetric


def test_scaling_multiplies_channels_and_leaves_the_codes() -> None:
    weight = random_weight(3, (4, 2, 3))
    factor = torch.tensor([1.0, 0.5, 2.0, 4.0])  # powers of two: exact
    scaled = weight.scaled(factor)
    assert scaled.codes is weight.codes
    assert torch.equal(scaled.dequantize(), weight.dequantize() * factor.reshape(4, 1, 1))


@pytest.mark.slow
def test_a_weight_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        random_weight(4, (2, 2)).bits = 3  # type: ignore[misc]
