"""Kernels are launched on the GPU that their tensors are on, also where that is not the current one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.kernels import delta_gemv, int8_conv, int8_dot, int8_quantize, launch
from compress.kernels.conv_problem import ConvProblem
from compress.kernels.delta_rows import DeltaRows
from compress.kernels.int8_weight import Int8Weight
from compress.kernels.launch import on_its_device
from compress.kernels.row_grid import RowGrid
from tests.every import every


@pytest.mark.parametrize(
    ("device", "entered"),
    [(("cuda", 1), [1]), (("cuda", 0), []), (("cpu", None), [])],
    ids=["another GPU", "the current GPU", "cpu"],
)
def test_a_launch_enters_its_own_gpu(
    device: tuple[str, int | None], entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    current, seen = [0], []

    @contextmanager
    def device_of(x: Any) -> Iterator[None]:
        current.append(x.device.index)
        yield
        current.pop()

    @on_its_device
    def launcher(x: Any, number: int, named: int) -> int:
        seen.extend(current[1:])
        return number + named

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x: Any = SimpleNamespace(device=SimpleNamespace(type=device[0], index=device[1]))
    assert launcher(x, 2, named=3) == 5
    assert seen == entered
    assert current == [0]


@pytest.mark.slow
def test_every_launch_is_in_such_a_function() -> None:
    launches = 0
    for path in Path(launch.__file__).parent.glob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            found = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _is_launch(node)]
            launches += len(found)
            decorators = [ast.unparse(each) for each in function.decorator_list]
            assert not found or "on_its_device" in decorators, f"{path.name}: {function.name}"
    assert launches == 12


def test_products_of_bytes_say_what_they_sum_in() -> None:
    """Triton 3.6, which GPU machines still have, refuses to compile one that does not; the pinned one finds out."""
    found = {}
    for path in Path(launch.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                found[ast.unparse(node)] = path.name
    assert set(found.values()) == {"product.py"}, "every kernel multiplies by block_product or integer_product"
    assert "tl.dot(b_a, b_b, b_acc, out_dtype=tl.int32)" in found


class Grids:
    """Stands in for a kernel: remembers the grids it would be launched on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.settings: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.seen.append(grid)
        return lambda *arguments, **named: self.settings.append(named)


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Grids:
    """Those of the kernels that take any number of rows."""
    found = Grids()
    for module, kernel in (
        (delta_gemv, "delta_gemv"),
        (int8_conv, "int8_conv"),
        (int8_dot, "int8_dot"),
        (int8_quantize, "quantize_rows"),
        (int8_quantize, "row_ranges"),
    ):
        monkeypatch.setattr(module, f"{kernel}_fwd_kernel", found)
    return found


def test_more_rows_than_a_grids_y_takes(grids: Grids) -> None:
    static = RowGrid("static", torch.ones(1), torch.zeros(1, dtype=torch.uint8))
    sums = torch.zeros(1, dtype=torch.int32)

    rows = 70_000
    deltas = DeltaRows(torch.zeros(1, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int16), torch.zeros(0), 1)
    delta_gemv.delta_gemv(torch.zeros(rows, 1), torch.zeros(rows, 1), deltas, torch.zeros(rows, dtype=torch.int32))

    pixels = ConvProblem(static, (1, 1), (0, 0), (1, 1), 1)
    weight = Int8Weight(torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.ones(1), sums)
    int8_conv.int8_conv(torch.zeros(1, 1, 2100, 2100, dtype=torch.int8), weight, None, pixels)

    weight = Int8Weight(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), sums)
    for grid in (static, RowGrid("token")):
        int8_dot.int8_dot(torch.zeros(9_000_000, 1, dtype=torch.float16), grid, weight)
    assert len(grids.seen) == 7
    assert every(size <= 65_535 for grid in grids.seen for size in grid[1:]), grids.seen


@pytest.mark.parametrize(("stride", "long"), [(1 << 30, True), ((1 << 30) - 1, False)])
def test_places_in_a_large_image_are_counted_in_64_bits(stride: int, long: bool, grids: Grids) -> None:
    problem = ConvProblem(RowGrid("static", torch.ones(1), torch.zeros(1)), (1, 1), (0, 0), (1, 1), 1)
    weight = Int8Weight(torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.ones(1), torch.zeros(1, dtype=torch.int32))
    x = torch.empty_strided((1, 1, 3, 1), (1, 1, stride, 1), dtype=torch.int8, device="meta")
    int8_conv.int8_conv(x, weight, None, problem)
    assert [each["LONG"] for each in grids.settings] == [long]


def _is_launch(call: ast.Call) -> bool:
    """``some_fwd_kernel[grid](...)``."""
    return isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value).endswith("_fwd_kernel")
