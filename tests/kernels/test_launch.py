"""Kernels are launched on the GPU that their tensors are on, also where that is not the current one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.kernels import launch
from compress.kernels.launch import on_its_device


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


def _is_launch(call: ast.Call) -> bool:
    """``some_fwd_kernel[grid](...)``."""
    return isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value).endswith("_fwd_kernel")
