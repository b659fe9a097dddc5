"""Every kernel compiles for GPUs that are not there: Ampere, Ada and Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


ARCHITECTURES = (80, 89, 90)
# From NVIDIA's tables of compute capabilities: bytes that one program may ask for.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}
# Bytes a thread may keep in memory for want of registers: float32 times 8 bits takes 272 on Hopper, most others none.
SPILLED = 320


def rows_of(program: str, cache: Path, *arguments: str) -> list[dict[str, Any]]:
    """What ``program``, which imports triton without its interpreter, prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), *arguments],
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return list(json.loads(run.stdout))


PACKED = {"packed_gemv_fwd_kernel", "packed_dot_fwd_kernel", "packed_unpack_fwd_kernel", "partial_sums_fwd_kernel"}


@pytest.mark.slow
def test_packed_weights_compile(tmp_path: Path) -> None:
    rows = rows_of("compile_launches.py", tmp_path, "90", "4")
    assert {row["kernel"] for row in rows} == PACKED
    check(rows, 90)


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    rows = rows_of("compile_launches.py", tmp_path, str(architecture))
    assert {row["kernel"] for row in rows} == PACKED | {
        "thin_gemv_fwd_kernel",
        "thin_dot_fwd_kernel",
        "delta_gemv_fwd_kernel",
        "delta_add_fwd_kernel",
        "int8_dot_fwd_kernel",
        "int8_conv_fwd_kernel",
        "row_ranges_fwd_kernel",
        "quantize_rows_fwd_kernel",
    }
    check(rows, architecture)


def check(rows: list[dict[str, Any]], architecture: int) -> None:
    """They are programs for that GPU that it can run."""
    for row in rows:
        assert row["target"].startswith(f"sm_{architecture}"), row
        assert row["cubin_bytes"] > 0, row
        assert row["shared_bytes"] <= SHARED[architecture], row
        assert 0 < row["registers"] <= 255, row
        assert row["spilled_bytes"] <= SPILLED, row
        assert row["tensor_cores"] == ("dot" in row["kernel"] or "conv" in row["kernel"]), row
        # The GEMV's codes are subnormal numbers: a compiler that flushed them would make every product zero.
        assert not row["flushes_subnormals"], row


@pytest.mark.matrix
def test_own_tiles_fit_into_shared_memory(tmp_path: Path) -> None:
    rows = rows_of("compile_tiles.py", tmp_path)
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        assert 0 < row["shared_bytes"] <= row["foreseen"] <= SHARED[row["architecture"]], row
