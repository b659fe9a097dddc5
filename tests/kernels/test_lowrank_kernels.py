"""Kernels of low-rank weights against float64, at every rank of the same tensors; fresh memory holds NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.kernels.lowrank_linear import lowrank_linear
from compress.kernels.lowrank_reference import lowrank_reference
from compress.kernels.thin_dot import lowrank_dot
from compress.kernels.thin_gemv import lowrank_gemv

pytestmark = pytest.mark.usefixtures("outputs_of_nan")


def dot_in_splits(*arguments: Any) -> Any:
    """Both products split."""
    return lowrank_dot(*arguments, tiles=((16, 32, 3, 1, 2), (16, 16, 2, 1, 2)))


KERNELS = {"gemv": (lowrank_gemv, 2), "dot": (lowrank_dot, 5), "splits": (dot_in_splits, 18)}


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 21, 40])
def test_every_rank_of_the_same_factors(
    kernel: str, dtype: torch.dtype, rank: int, device: str, assert_near: Any
) -> None:
    run, rows = KERNELS.get(kernel, (lowrank_reference, 5))
    up, down = torch.randn(37, 40, device=device).to(dtype), torch.randn(40, 300, device=device).to(dtype)
    x, bias = torch.randn(rows, 300, device=device).to(dtype), torch.randn(37, device=device).to(dtype)
    wanted = x.double() @ down[:rank].double().T @ up[:, :rank].double().T + bias.double()
    assert_near(run(x, up[:, :rank], down[:rank], bias), wanted)


def test_operator(device: str, assert_near: Any) -> None:
    up, down = torch.randn(12, 8, device=device), torch.randn(8, 20, device=device)
    x = torch.randn(2, 3, 20, device=device)
    got = lowrank_linear(x, up, down, None, 5)
    assert_near(got, x.double() @ down[:5].double().T @ up[:, :5].double().T)
    torch.library.opcheck(lowrank_linear, (x, up, down, None, 5), test_utils=("test_schema", "test_faketensor"))
    assert lowrank_linear(x[:0], up, down, None, 5).shape == (0, 3, 12)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="ranks from 1 to R"):
        lowrank_linear(torch.zeros(1, 20), torch.zeros(12, 8), torch.zeros(8, 20), None, rank)


def test_columns_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="must be row-major"):
        lowrank_linear(torch.zeros(1, 20), torch.zeros(8, 12).T, torch.zeros(8, 20), None, 3)
