"""Linears over one base and sparse deltas, against float64; deltas added in place, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels.delta_add import delta_add
from compress.kernels.delta_gemv import delta_gemv
from compress.kernels.delta_linear import add_delta_, delta_linear, packed_delta_linear
from compress.kernels.delta_product import beside, merged
from compress.kernels.delta_reference import add_reference, delta_reference
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.dispatch import Call, choose
from tests.sweep import sweep

pytestmark = pytest.mark.usefixtures("outputs_of_nan")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = (21, 300)


def random_delta(shape: tuple[int, int], count: int, dtype: torch.dtype = torch.float32) -> tuple[DeltaRows, Tensor]:
    """A delta of ``count`` entries, a third of them in row 2 and none in row 3, and its float64 matrix."""
    outputs, inputs = shape
    places = torch.randperm(outputs * inputs)
    row = places // inputs
    places = torch.cat([places[row == 2][: count // 3], places[(row != 2) & (row != 3)][: count - count // 3]])
    index = places.sort().values
    values = torch.randn(len(index)).to(dtype)
    dense = torch.zeros(outputs * inputs, dtype=torch.float64)
    dense[index] = values.double()
    return DeltaRows.from_flat(shape, index, values, dtype), dense.reshape(shape)


def parts(deltas: DeltaRows) -> tuple[Tensor, Tensor, Tensor]:
    return deltas.starts, deltas.columns, deltas.values


# The layout


def test_golden_layout() -> None:
    one = DeltaRows.from_flat((3, 40_001), torch.tensor([1, 40_000, 80_002 + 7]), torch.tensor([1.0, 2, 3]))
    assert one.starts.tolist() == [[0, 2, 2, 3]]
    assert one.columns.dtype is torch.int16
    assert one.columns.tolist() == [1, 40_000 - 65_536, 7]
    assert one.full_columns().tolist() == [1, 40_000, 7]
    two = DeltaRows.stack([one, replace(one, starts=one.starts)])
    assert two.starts.tolist() == [[0, 2, 2, 3], [3, 5, 5, 6]]
    assert [part.tolist() for part in two.rows_of(1)] == [[0, 0, 2], [1, 40_000, 7], [1, 2, 3]]
    wide = DeltaRows.from_flat((1, 65_537), torch.tensor([65_536]), torch.tensor([1.0]))
    assert (wide.columns.dtype, wide.columns.tolist()) == (torch.int32, [65_536])


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        ([3, 3], [1.0, 2.0], "must increase within 0 to 11"),
        ([4, 12], [1.0, 2.0], "must increase within 0 to 11"),
        ([-1, 2], [1.0, 2.0], "must increase within 0 to 11"),
        ([1], [1.0, 2.0], "give one value an index"),
        ([1], [1e9], "keep them as torch.float32"),
    ],
)
def test_deltas_that_are_none(index: list[int], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaRows.from_flat((3, 4), torch.tensor(index), torch.tensor(values), torch.float16)


def test_stacked_deltas_fit_each_other() -> None:
    one, _ = random_delta((4, 8), 3)
    other, _ = random_delta((4, 9), 3)
    for wrong in ([], [one, other], [one, replace(one, values=one.values.half())]):
        with pytest.raises(ValueError, match="stacked ones have one shape"):
            DeltaRows.stack(wrong)


# The product


def in_small(x: Tensor, base: Any, deltas: DeltaRows, task: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Steps so short that every row takes several, rows of ``x`` in twos."""
    y = beside(x, base, replace(deltas, values=deltas.values[:0], columns=deltas.columns[:0]), task, bias)
    return delta_gemv(x, y, deltas, task, tile=(2, 4, 16, 1))


KERNELS = {"beside": beside, "in small": in_small, "merged": merged, "reference": delta_reference}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@sweep("dtype", DTYPES, sample=[torch.float16])
@sweep("rows", [1, 5], sample=[5])
def test_one_delta_over_floats(kernel: str, dtype: torch.dtype, rows: int, device: str, assert_near: Any) -> None:
    deltas, difference = random_delta(SHAPE, 900, torch.float16)
    weight, bias = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE[0]).to(dtype)
    x = torch.randn(rows, SHAPE[1]).to(dtype)
    wanted = x.double() @ (weight.double() + difference).T + bias.double()
    got = KERNELS[kernel](x.to(device), weight.to(device), deltas.to(device), None, bias.to(device))
    assert_near(got.cpu(), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_delta_over_codes(kernel: str, device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(*SHAPE, 4, 32, device)
    deltas, difference = random_delta(SHAPE, 300)
    x = torch.randn(3, SHAPE[1], device=device)
    wanted = x.double() @ (exact + difference.to(device)).T
    assert_near(KERNELS[kernel](x, weight, deltas.to(device), None), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["beside", "in small", "reference"])
def test_every_row_has_its_own(kernel: str, device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(*SHAPE, 4, 32, device)
    found = [random_delta(SHAPE, count) for count in (200, 0, 900)]
    deltas = DeltaRows.stack([each for each, _ in found]).to(device)
    task = torch.tensor([2, -1, 0, 1, 0, 3], dtype=torch.int32, device=device)
    x = torch.randn(6, SHAPE[1], device=device)
    none = torch.zeros(SHAPE, dtype=torch.float64)
    own = [found[t][1] if 0 <= t < 3 else none for t in task.tolist()]
    wanted = torch.stack([row.double() @ (exact + each.to(device)).T for row, each in zip(x, own, strict=True)])
    assert_near(KERNELS[kernel](x, weight, deltas, task), wanted)


@pytest.mark.parametrize(("inputs", "columns"), [(40_004, torch.int16), (65_540, torch.int32)])
def test_wide_rows(inputs: int, columns: torch.dtype, device: str, assert_near: Any) -> None:
    """Short columns have no sign, and wider rows have long ones."""
    shape = (2, inputs)
    index = torch.tensor([3, inputs - 1, 2 * inputs - 3])
    deltas = DeltaRows.from_flat(shape, index, torch.tensor([1.0, 2.0, 3.0])).to(device)
    assert deltas.columns.dtype is columns
    x, y = torch.randn(2, inputs, device=device), torch.randn(2, 2, device=device)
    add = torch.stack([x[:, 3] + 2 * x[:, -1], 3 * x[:, -3]], 1)
    assert_near(delta_gemv(x, y, deltas, None), (y + add).double())


# In place


@sweep("dtype", DTYPES, sample=[torch.float32])
def test_in_place_is_what_the_reference_gives(dtype: torch.dtype, device: str) -> None:
    """Which is what merging gives: tests/runtime/test_delta.py."""
    weight = torch.randn(7, 3, 3, 3).to(dtype)
    index = torch.randperm(7 * 27)[:80].sort().values
    values = torch.randn(80) * torch.tensor(10.0).pow(torch.randint(-6, 3, (80,)))
    delta = DeltaRows.from_flat(tuple(weight.shape), index, values)
    got = weight.to(device, copy=True)
    delta_add(got, delta.to(device))
    add_reference(weight, delta)
    if dtype is torch.bfloat16 and device == "cpu":  # the interpreter cuts bits off
        torch.testing.assert_close(got, weight, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got.cpu(), weight), "bit for bit"


# The operators


def test_operators(device: str, lane_weight: Callable[..., Any], assert_near: Any) -> None:
    weight, exact = lane_weight(24, 96, 4, 32, device)
    found = [random_delta((24, 96), 150) for _ in range(2)]
    deltas = DeltaRows.stack([each for each, _ in found]).to(device)
    x, bias = torch.randn(2, 3, 96, device=device), torch.randn(24, device=device)
    task = torch.tensor([[0, 1, -1], [1, 1, 0]], dtype=torch.int32, device=device)
    own = torch.stack([found[0][1], found[1][1], torch.zeros(24, 96, dtype=torch.float64)]).to(device)[task.long()]
    wanted = torch.einsum("abi,aboi->abo", x.double(), exact + own) + bias.double()
    packed = (weight.units, weight.scale, weight.zero_point)
    assert_near(packed_delta_linear(x, *packed, *parts(deltas), task, bias, 4, 32), wanted)
    assert_near(delta_linear(x, exact.float(), *parts(deltas), task, bias), wanted)
    changed = exact.float().clone()
    add_delta_(changed, *parts(deltas), 1)
    assert_near(changed, exact + found[1][1].to(device))


def test_opcheck(lane_weight: Callable[..., Any]) -> None:
    weight, _ = lane_weight(6, 40, 3, 32, "cpu")
    deltas, _ = random_delta((6, 40), 20)
    x, task = torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.int32)
    packed = (weight.units, weight.scale, weight.zero_point)
    checks = ("test_schema", "test_faketensor")
    floats = torch.randn(6, 40)
    torch.library.opcheck(packed_delta_linear, (x, *packed, *parts(deltas), task, None, 3, 32), test_utils=checks)
    torch.library.opcheck(delta_linear, (x, floats, *parts(deltas), None, None), test_utils=checks)
    torch.library.opcheck(add_delta_, (floats, *parts(deltas), 0), test_utils=checks)
    assert delta_linear(x[:0], floats, *parts(deltas), None, None).shape == (0, 3, 6)


GPU_CALL = Call("delta_linear", "cuda", (9, 0), torch.bfloat16, 1, 4096, 4096, bits=4, group_size=128)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "delta_gemv"),
        ({"rows": 2048}, "delta_merge"),
        ({"rows": 2048, "mixed": True}, "delta_rows"),
        ({"rows": 2048, "bits": 0, "group_size": 4096}, "delta_merge"),
        ({"capability": (7, 5)}, "reference"),
        ({"device": "cpu", "capability": None}, "reference"),
    ],
)
def test_choice(change: dict[str, Any], kernel: str) -> None:
    choice = choose(GPU_CALL._replace(**change))
    assert choice.name == kernel
    assert not change.get("mixed") or "delta_merge: only one delta for all rows, not each row's own" in choice.refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d.starts[:, :-1], d.columns, d.values), r"deltas to 6 outputs need torch\.int32 \[deltas, 7\]"),
        (lambda d: (d.starts.long(), d.columns, d.values), "starts torch.int64"),
        (lambda d: (d.starts, d.columns[:-1], d.values), "one value each"),
        (lambda d: (d.starts, d.columns.int(), d.values), r"deltas to 40 inputs need torch\.int16 \[K\]"),
        (lambda d: (d.starts.expand(2, -1), d.columns, d.values), "must be contiguous"),
        (lambda d: (torch.cat([d.starts, d.starts]), d.columns, d.values), "2 deltas and no task"),
    ],
)
def test_wrong_sizes_are_refused(change: Callable[[DeltaRows], tuple[Tensor, ...]], message: str) -> None:
    deltas, _ = random_delta((6, 40), 20)
    with pytest.raises(ValueError, match=message):
        delta_linear(torch.zeros(2, 40), torch.zeros(6, 40), *change(deltas), None, None)


def test_more_refusals() -> None:
    deltas, _ = random_delta((6, 40), 20)
    x, weight = torch.zeros(2, 40), torch.zeros(6, 40)
    with pytest.raises(ValueError, match=r"rows \(2,\) need as many torch\.int32"):
        delta_linear(x, weight, *parts(deltas), torch.zeros(3, dtype=torch.int32), None)
    with pytest.raises(ValueError, match="needs the same type"):
        delta_linear(x, weight.half(), *parts(deltas), None, None)
    with pytest.raises(ValueError, match="delta 1; there are 0 to 0"):
        add_delta_(weight, *parts(deltas), 1)
    with pytest.raises(ValueError, match="it must be contiguous"):
        add_delta_(torch.zeros(40, 6).T, *parts(deltas), 0)
