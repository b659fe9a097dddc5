"""Every kernel that multiplies with a packed weight, against float64; fresh memory holds NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.kernels.packed_dot import packed_dot
from compress.kernels.packed_gemv import packed_gemv
from compress.kernels.packed_reference import packed_reference
from compress.kernels.packed_unpack import packed_unpack, unpack_weight
from tests.sweep import sweep

pytestmark = pytest.mark.usefixtures("outputs_of_nan")

BITS = range(2, 9)
GROUPS = (32, 64, 128, None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Outputs and inputs, by bits in twos: whole blocks, and ragged ones.
SHAPES = ((8, 512), (5, 300))


def gemv_in_small(*arguments: Any) -> Any:
    """Tiles so small that one weight takes several steps and programs."""
    return packed_gemv(*arguments, tile=(4, 1))


def dot_in_splits(*arguments: Any) -> Any:
    """Inputs split three ways."""
    return packed_dot(*arguments, tile=(16, 16, 3, 4, 2, 1))


KERNELS = {"gemv": (gemv_in_small, 2), "dot": (dot_in_splits, 5), "unpack": (packed_unpack, 3)}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("bits", BITS, sample=[3])
@sweep("group_size", GROUPS, sample=[32])
def test_every_width_and_group(
    kernel: str, bits: int, group_size: int | None, device: str, lane_weight: Callable[..., Any], assert_near: Any
) -> None:
    run, rows = KERNELS[kernel]
    outputs, inputs = SHAPES[bits % 2]
    weight, exact = lane_weight(outputs, inputs, bits, group_size, device)
    x = torch.randn(rows, inputs, device=device)
    assert_near(run(x, weight), x.double() @ exact.T)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@sweep(("bits", "group_size"), [(2, 16), (3, 256), (4, 16), (8, 256)], sample=[(4, 16)])
def test_smallest_and_largest_group(
    kernel: str, bits: int, group_size: int, device: str, lane_weight: Callable[..., Any], assert_near: Any
) -> None:
    run, rows = KERNELS[kernel]
    weight, exact = lane_weight(9, 600, bits, group_size, device)
    x = torch.randn(rows, 600, device=device)
    assert_near(run(x, weight), x.double() @ exact.T)


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
@sweep("dtype", DTYPES, sample=[torch.float16])
@sweep("bits", [3, 4, 8], sample=[8])
def test_every_dtype_with_bias_and_branch(
    kernel: str, dtype: torch.dtype, bits: int, device: str, lane_weight: Callable[..., Any], assert_near: Any
) -> None:
    run, rows = KERNELS.get(kernel, (packed_reference, 3))
    weight, exact = lane_weight(21, 200, bits, 64, device)
    x = torch.randn(rows, 200, device=device).to(dtype)
    bias = torch.randn(21, device=device).to(dtype)
    inner, up = torch.randn(rows, 5, device=device).to(dtype), torch.randn(21, 5, device=device).to(dtype)
    wanted = x.double() @ exact.T + inner.double() @ up.double().T + bias.double()
    assert_near(run(x, weight, bias, (inner, up)), wanted)


@sweep("rows", [1, 16, 17, 64, 70], sample=[17])
def test_dot_at_its_own_tile(rows: int, device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(70, 640, 4, 128, device)
    x = torch.randn(rows, 640, device=device)
    assert_near(packed_dot(x, weight), x.double() @ exact.T)


def test_gemv_at_its_own_tile(device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(9, 4200, 4, 128, device)
    x = torch.randn(1, 4200, device=device)
    assert_near(packed_gemv(x, weight), x.double() @ exact.T)


@sweep("size", [1e-9, 1e6], sample=[1e-9])
def test_gemv_carries_tiny_and_huge_inputs(
    size: float, device: str, lane_weight: Callable[..., Any], assert_near: Any
) -> None:
    weight, exact = lane_weight(16, 256, 4, 32, device)
    x = torch.randn(1, 256, device=device) * size
    assert_near(packed_gemv(x, weight), x.double() @ exact.T)


def test_rows_may_be_apart(device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(12, 128, 4, 128, device)
    x = torch.randn(3, 200, device=device)[:, :128]
    for run, _ in KERNELS.values():
        assert_near(run(x, weight), x.double() @ exact.T)


@sweep("bits", BITS, sample=[5])
def test_unpacking_is_exact(bits: int, device: str, lane_weight: Callable[..., Any]) -> None:
    weight, exact = lane_weight(11, 300, bits, 64, device)
    got = unpack_weight(weight, torch.float32)
    torch.testing.assert_close(got, exact.float(), rtol=2e-7, atol=0)
