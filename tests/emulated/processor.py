"""Processors that qemu emulates, instruction by instruction: ONNX Runtime picks the kernels it would pick there."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

__all__ = ["AVX2", "SSE2", "Answers", "run_files", "why_not_emulated"]

# AVX2 without VNNI: u8 by s8 products are added in pairs, in 16 bits that saturate.
AVX2 = "Haswell"
# Before AVX2: ONNX Runtime widens to 16 bits first and adds in 32, so that nothing can saturate.
SSE2 = "Nehalem"

Answers = dict[str, dict[str, np.ndarray]]

_SCRIPT = Path(__file__).with_name("run_files.py")
_SECONDS = 300


def _qemu() -> str | None:
    return shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")


def why_not_emulated() -> str | None:
    """What is missing to emulate x86 processors here; None where nothing is."""
    if platform.machine() != "x86_64":
        return f"emulates x86-64 programs with this machine's own Python, which is one for {platform.machine()}"
    if _qemu() is None:
        return "needs qemu-x86_64-static (Debian and Ubuntu: apt-get install qemu-user-static)"
    return None


def run_files(files: Path, answers: Path, processor: str | None = None) -> Answers:
    """Outputs by file and by name of every ONNX file in ``files`` (see run_files.py).

    Args:
        answers: a folder for what the process writes.
        processor: one that qemu knows, such as ``AVX2``; None: this machine's own.
    """
    answers.mkdir()
    command = [sys.executable, str(_SCRIPT), str(files), str(answers)]
    if processor is not None:
        qemu = _qemu()
        assert qemu is not None
        command = [qemu, "-cpu", processor, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, f"on {processor or 'this machine'}: {done.stderr[-2000:]}"
    return {file.stem: dict(np.load(file)) for file in sorted(answers.glob("*.npz"))}
