from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import InputError
from compress.kernels.dequantize import dequantize_bias, dequantize_weight
from compress.kernels.table import OPERATORS, register_operators
from compress.quant.packing import pack
from compress.records.registry import resolve

SHAPES = [[5, 3], [4, 1, 3, 3], [3, 2, 7], [1, 1]]


def stored(bits: int, shape: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, and the three tensors they are stored as."""
    codes = torch.randint(0, 1 << bits, shape)
    zero_point = torch.randint(0, 1 << bits, (shape[0],), dtype=torch.uint8)
    return codes, pack(codes, bits), torch.rand(shape[0]) + 0.01, zero_point


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_against_float64(bits: int, shape: list[int]) -> None:
    codes, packed, scale, zero_point = stored(bits, shape)
    per_channel = (-1, *[1] * (len(shape) - 1))
    wanted = (codes.double() - zero_point.double().reshape(per_channel)) * scale.double().reshape(per_channel)
    for compute in ("integer", "float"):
        got = dequantize_weight(packed, scale, zero_point, bits, shape, compute)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


def test_bias_against_float64() -> None:
    codes = torch.randint(-(2**20), 2**20, (9,), dtype=torch.int32)
    input_scale, weight_scale = torch.tensor(0.02), torch.rand(9) * 1e-2
    got = dequantize_bias(codes, input_scale, weight_scale)
    wanted = codes.double() * input_scale.double() * weight_scale.double()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 8])
def test_opcheck(bits: int) -> None:
    _, packed, scale, zero_point = stored(bits, [4, 2, 3, 3])
    torch.library.opcheck(dequantize_weight, (packed, scale, zero_point, bits, [4, 2, 3, 3], "integer"))
    torch.library.opcheck(dequantize_bias, (torch.arange(4, dtype=torch.int32), torch.tensor(0.1), scale))


def test_packed_codes_of_another_size_are_refused() -> None:
    _, packed, scale, zero_point = stored(4, [5, 3])
    with pytest.raises(ValueError, match="need"):
        dequantize_weight(packed, scale, zero_point, 4, [5, 30], "float")


def test_every_operator_of_the_table_is_callable() -> None:
    register_operators()
    for name in OPERATORS:
        assert callable(getattr(torch.ops.compress, name).default)


def test_an_unknown_operator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown operator 'nothing'; known: fake_quantize"):
        resolve(OPERATORS, "nothing", "operator")
