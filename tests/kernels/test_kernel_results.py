"""A benchmark of kernels loses nothing: not what was measured before a case failed, nor what comes behind it."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import kernel_tuning, kernels
from benchmarks.kernel_results import Results
from tests.every import every

HEADER = {"device": "NVIDIA H200", "command": "python -m benchmarks.kernels", "dtype": "bfloat16", "torch": "2"}
HEADER |= {"triton": "3"}
FIGURES = {"kernel": "k", "us": 1.0, "dense_us": 2.0, "speedup": 2.0, "gb_per_s": 3.0, "share_of_copy": 0.5}
FIGURES |= {"tflop_per_s": 4.0, "share_of_matmul": 0.25, "target": "", "relative_error": 1e-3}


class Restarted(BaseException):
    """In the place of another process."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(failing, usable, *arguments)`` of three cases, of which those in ``failing`` fail: what is on disk then."""
    found = [kernels.Case(name, 1, (8, 32), lambda x, outputs: None) for name in "abc"]  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(kernels, "cases", lambda: found)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 4000.0)
    monkeypatch.setattr(kernels, "matmul_rate", lambda dtype: 700.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def go(failing: str, usable: bool, *arguments: str) -> tuple[list[str], list[str], list[str]]:
        restarted: list[str] = []

        def measure(case: kernels.Case, *_: Any) -> dict[str, Any]:
            if case.name in failing:
                raise RuntimeError("an illegal memory access |\n was met")
            return {"case": case.name, "rows": case.rows, "outputs": 8, "inputs": 32, **FIGURES}

        def synchronize() -> None:
            if not usable:
                raise RuntimeError("CUDA error")

        def execv(program: str, given: list[str]) -> None:
            restarted.extend(given)
            raise Restarted

        monkeypatch.setattr(kernels, "measure", measure)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(os, "execv", execv)
        monkeypatch.setattr(sys, "argv", ["kernels", "--out", str(tmp_path), *arguments])
        with suppress(SystemExit, Restarted):
            kernels.main()
        content = json.loads((tmp_path / "kernels-nvidia-h200.json").read_text())
        return [row["case"] for row in content["rows"]], [each["case"] for each in content["failures"]], restarted

    return go


def test_a_case_that_fails_is_reported_and_the_next_one_runs(run: Any, tmp_path: Path) -> None:
    assert run("b", True) == (["a", "c"], ["b"], [])
    shown = (tmp_path / "kernels-nvidia-h200.md").read_text().splitlines()
    assert shown[-1].endswith("| failed | | | | | | | | RuntimeError: an illegal memory access / was met |")
    columns = [line.count("|") for line in shown if line.startswith("|")]
    assert columns == [13] * 5
    assert "| 4 | 25 % |" in shown[-2]


def test_behind_one_that_broke_the_gpu_another_process_goes_on(run: Any, tmp_path: Path) -> None:
    cases, failed, restarted = run("b", False)
    assert (cases, failed) == (["a"], ["b"])
    assert restarted[1:] == [
        *("-m", "benchmarks.kernels", "--out", str(tmp_path), "--dtype", "bfloat16", "--from", "2"),
    ]
    assert run("", True, "--from", "2") == (["a", "c"], ["b"], [])


def test_only_the_same_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not exist; leave --from out"):
        Results(tmp_path, HEADER, 3)
    Results(tmp_path, {**HEADER, "copy_gb_per_s": 1.0, "matmul_tflop_per_s": 1.0}).fail("a", 1, (2, 3), ValueError())
    assert len(Results(tmp_path, HEADER, 1).failures) == 1
    with pytest.raises(SystemExit, match="has triton 3, here it is 4"):
        Results(tmp_path, HEADER | {"triton": "4"}, 1)
    assert not Results(tmp_path, HEADER).failures


def test_tiles_of_the_first_shape_are_there_before_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: tuple[int, int], *_: Any) -> list[Any]:
        if shape == kernel_tuning.SHAPES[1]:
            raise Restarted
        return [{"us": 1.0}]

    monkeypatch.setattr(kernel_tuning, "measure", measure)
    monkeypatch.setattr(kernel_tuning, "copy_bandwidth", lambda: 4000.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["kernel_tuning", "--out", str(tmp_path / "tiles.json")])
    with pytest.raises(Restarted):
        kernel_tuning.main()
    assert json.loads((tmp_path / "tiles.json").read_text())["rows"] == [{"us": 1.0}]


class OnTheCpu(TorchFunctionMode):
    """What is asked for on a GPU, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        return func(*args, **(given | {"device": "cpu"} if given.get("device") == "cuda" else given))


class Replayed:
    """In the place of a CUDA graph."""

    def replay(self) -> None:
        """What was recorded has run already."""


@pytest.mark.parametrize("dtype", kernels.DTYPES.values(), ids=str)
def test_every_case_is_measured(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, on references, in made-up times: what is built, compared and written."""
    monkeypatch.setattr(kernels, "copies_for", lambda call_bytes: 2)
    monkeypatch.setattr(kernels, "record_graph", lambda calls: (Replayed(), [call() for call in calls]))
    monkeypatch.setattr(kernels, "time_in_turn", lambda graphs: {name: [2.0, 3.0, 4.0] for name in graphs})
    monkeypatch.setattr(kernels, "installed_peers", dict)
    header = {**HEADER, "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 700.0}
    results = Results(tmp_path, header)
    found = {case.name: replace(case, shape=(48, 256), rows=min(case.rows, 5)) for case in kernels.cases()}
    for case in found.values():
        with OnTheCpu():
            results.add(kernels.measure(case, 4000.0, 1e-3, dtype))
    rows = json.loads((tmp_path / "kernels-nvidia-h200.json").read_text())["rows"]
    assert [row["case"] for row in rows] == list(found)
    assert every(row["kernel"] == "reference" and row["us"] == 3.0 and row["share_of_matmul"] > 0 for row in rows)


def test_what_has_a_target_is_measured_first() -> None:
    targets = [bool(case.target) for case in kernels.cases()]
    assert targets == sorted(targets, reverse=True)
    assert sum(targets) == 17
